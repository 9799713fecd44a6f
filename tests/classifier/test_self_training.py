"""What a teacher's scores make of images without labels."""

from __future__ import annotations

import pytest
import torch

from cairn.classifier.self_training import surest, why_not
from cairn.methods.catalogue import METHODS


def test_those_farthest_ahead_are_taken_whatever_the_scale():
    rng = torch.Generator().manual_seed(0)
    scores = torch.randn(37, 5, generator=rng)
    found, taken = surest(scores, 0.4)
    two = scores.double().topk(2, 1).values
    order = sorted(range(37), key=lambda i: (-(two[i, 0] - two[i, 1]).item(), i))
    assert sorted(order[:15]) == taken.nonzero().flatten().tolist()  # ceil(.4 x 37)
    assert torch.equal(found, scores.argmax(1))
    for same in (100 * scores, scores - 7, scores / 1000):
        assert torch.equal(surest(same, 0.4)[1], taken)


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_of_one_class_and_of_equal_scores_the_first_are_taken(share):
    number = -(-round(100 * share) // 10)
    for scores in (torch.randn(10, 1), torch.zeros(10, 3)):
        found, taken = surest(scores, share)
        assert found.tolist() == [0] * 10
        assert taken.tolist() == [i < number for i in range(10)]


def test_no_image_is_none_taken():
    found, taken = surest(torch.zeros(0, 3), 1.0)
    assert len(found) == len(taken) == 0


def test_who_is_taught_so():
    assert {name for name, entry in METHODS.items() if why_not(entry.build)} == {"blend", "joint", "mccl", "segment"}
