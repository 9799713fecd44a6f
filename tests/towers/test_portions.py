"""Passes that the memory of a device does not hold at once. The device is this processor, with a memory of so many rows."""

from __future__ import annotations

import pytest
import torch

from cairn.errors import OutOfMemory
from cairn.towers.catalogue import load_towers
from cairn.towers.portions import Portions


class Memory:
    """Of so many images: embedding more raises what CUDA raises."""

    def __init__(self, rows, monkeypatch, towers):
        self.rows, self.asked = rows, []
        plain = type(towers._vision.vision_model).forward

        def forward(model, pixel_values, **words):
            self.asked.append(len(pixel_values))
            if len(pixel_values) > self.rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return plain(model, pixel_values=pixel_values, **words)

        monkeypatch.setattr(type(towers._vision.vision_model), "forward", forward)


@pytest.fixture
def held():
    return load_towers("tiny", device="cpu")


@pytest.fixture
def pixels(held):
    size = held.preprocessing.size
    return torch.randn(11, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_half_of_them_at_a_time_and_next_time_at_once(held, pixels, monkeypatch):
    whole = held.image(pixels)
    memory = Memory(3, monkeypatch, held)
    before = held.passes["images"]
    torch.testing.assert_close(held.image(pixels), whole, rtol=1e-5, atol=1e-6)
    assert memory.asked == [11, 6, 3, 3, 3, 2]
    assert held.passes["images"] == before + 11
    memory.asked.clear()
    torch.testing.assert_close(held.image(pixels), whole, rtol=1e-5, atol=1e-6)
    assert memory.asked == [3, 3, 3, 2]
    for made, plain in zip(held.image_and_hidden(pixels), held.image_and_hidden(pixels[:3]), strict=True):
        assert len(made) == 11
        torch.testing.assert_close(made[:3], plain)


def test_what_is_behind_the_image_is_in_portions_too(held, pixels, monkeypatch):
    patches, rows = held.image_and_patches(pixels)[1], held.vision().trunk(pixels)
    from cairn.towers import clip

    plain, asked = clip.embedded_tokens, []

    def few(vision, projection, some, attention):
        asked.append(len(some))
        if len(some) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(vision, projection, some, attention)

    monkeypatch.setattr(clip, "embedded_tokens", few)
    torch.testing.assert_close(held.image_and_patches(pixels)[1], patches, rtol=1e-5, atol=1e-6)
    assert asked == [11, 6, 5]
    again = held.vision()
    again._portions.most = 4
    torch.testing.assert_close(again.trunk(pixels).rows, rows.rows, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(again(again.trunk(pixels)), again(pixels), rtol=1e-5, atol=1e-6)


def test_with_gradients_a_batch_is_what_was_asked_for(held, pixels, monkeypatch):
    memory = Memory(3, monkeypatch, held)
    with pytest.raises(torch.OutOfMemoryError):
        held.vision()(pixels)
    assert memory.asked == [11]


def test_one_that_is_too_much_is_told(held, pixels, monkeypatch):
    Memory(0, monkeypatch, held)
    with pytest.raises(
        OutOfMemory, match=r"^cpu: its memory does not hold a pass of one image; free some of it, or give"
    ):
        held.image(pixels)


def test_no_row_and_another_error():
    portions = Portions()
    assert portions(lambda rows: rows * 2, torch.zeros(0, 3)).shape == (0, 3)

    def wrong(rows):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        portions(wrong, torch.zeros(4, 3))
    assert portions.most is None
