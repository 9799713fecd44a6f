"""From what a data set of one's own holds to a picture in RGB."""

import numpy as np
import pytest
import torch
from PIL import Image

from cairn.data.decoding import picture_of, rgb
from cairn.data.loading import Loader
from cairn.errors import InvalidInput
from cairn.towers.preprocessing import Preprocessing

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (6, 8, 3), np.uint8)


class Own:
    """A data set of one item."""

    def __init__(self, item):
        self.item, self.labels = item, np.zeros(1, np.int64)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.item

    def describe(self, index):
        return f"slide {index}"


def seen(item):
    return np.asarray(picture_of(item))


def test_values_are_a_picture_as_a_file_of_them_is(tmp_path):
    grey, clear = BYTES[..., 0], np.dstack([BYTES, BYTES[..., :1]])
    for values in (BYTES, torch.from_numpy(BYTES), Image.fromarray(BYTES)):
        assert np.array_equal(seen(values), BYTES)
    assert np.array_equal(seen(grey), grey[..., None].repeat(3, 2))
    Image.fromarray(clear).save(tmp_path / "clear.png")
    with Image.open(tmp_path / "clear.png") as image:
        assert np.array_equal(seen(clear), np.asarray(rgb(image)))  # on white


def test_a_deep_picture_keeps_its_greys():
    """As files have them: neither black nor white."""
    deep = Image.fromarray(BYTES[..., 0].astype(np.uint16) * 256)
    floats = Image.fromarray(BYTES[..., 0].astype(np.float32) / 255)
    assert np.array_equal(seen(deep)[..., 0], BYTES[..., 0])
    assert np.abs(seen(floats)[..., 0].astype(int) - BYTES[..., 0]).max() <= 1
    turned = Image.fromarray(BYTES)
    turned.getexif()[0x0112] = 6
    turned.info["exif"] = turned.getexif().tobytes()
    assert seen(turned).shape == (8, 6, 3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (BYTES / 255, r"slide 0: an array of float64 \(6, 8, 3\); give a picture as uint8"),
        (BYTES[..., 0] / np.float32(255), r"slide 0: an array of float32 \(6, 8\)"),
        (BYTES[..., 0].astype(np.uint16), "slide 0: an array of uint16"),
        (BYTES.astype(int), "slide 0: an array of int64"),
        (BYTES.transpose(2, 0, 1), "slide 0: .*channels last, as from transpose"),
        (BYTES[..., :2], r"slide 0: an array of uint8 \(6, 8, 2\)"),
        (BYTES[:0], r"slide 0: an array of uint8 \(0, 8, 3\)"),
        ("slide.png", "slide 0: an array of <U9"),
    ],
)
def test_other_values_of_a_data_set_are_refused_by_name(values, said):
    preprocessing = Preprocessing(size=8)
    with pytest.raises(InvalidInput, match=said) as found:
        list(Loader(Own(values), preprocessing.prepare, preprocessing.pixels))
    assert "\n" not in str(found.value)
