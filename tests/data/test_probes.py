"""Altered copies of images: what they are made of, and that they are the same every time."""

from __future__ import annotations

import torch

from cairn.data.loading import Loader
from cairn.data.probes import Probes, exchanged, halved


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 12) -> torch.Tensor:
    return torch.rand(n, 3, 8, 8, generator=rng(5))


def test_channels_are_exchanged_and_nothing_else():
    x = images()
    y = exchanged(x, rng())
    assert all(not torch.equal(a, b) for a, b in zip(x, y, strict=True))
    torch.testing.assert_close(x.sort(1).values, y.sort(1).values)
    orders = {tuple(int((a == c).flatten(1).all(1).nonzero()[0, 0]) for c in b) for a, b in zip(x, y, strict=True)}
    assert len(orders) > 2


def test_one_half_is_another_image_s_and_the_other_stays():
    x = images()
    kept = (halved(x, rng()) == x).all(1)
    kinds = set()
    for mask in kept:
        if mask.all():  # its own partner
            continue
        assert mask.sum() == 32
        kinds.add((bool(mask[0, 0]), bool(mask[0, -1])))
    assert kinds == {(True, True), (False, False), (True, False), (False, True)}


def test_every_pass_sees_the_same_probes_in_the_order_of_the_images(small_stream, towers):
    loader = Loader(small_stream.tasks[0].train, towers.prepare, towers.pixels, batch=4)
    probes = Probes(loader, 2, rng)
    first, second = (torch.cat([pixels for pixels, _ in probes]) for _ in range(2))
    assert torch.equal(first, second)
    plain = torch.cat([pixels for pixels, _ in loader])
    assert len(first) == 2 * len(plain)
    torch.testing.assert_close(first[:4], halved(exchanged(plain[:4], draws := rng()), draws))
    assert torch.equal(probes.labels, torch.cat([labels for _, labels in probes]))
