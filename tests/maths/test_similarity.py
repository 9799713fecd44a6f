from __future__ import annotations

import torch
from torch.nn.functional import normalize

from cairn.maths.similarity import representative_and_diverse


def clusters(n: int = 40, d: int = 8, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, d, generator=rng)
    return normalize(centres[torch.arange(n) % 4] + 0.2 * torch.randn(n, d, generator=rng), dim=-1)


def naive(z, representative, diverse):
    mean = z.double().mean(0)
    left = list(range(len(z)))
    chosen = sorted(left, key=lambda i: -float(z[i].double() @ mean))[:representative]
    while len(chosen) < min(representative + diverse, len(z)):
        rest = [i for i in left if i not in chosen]
        chosen.append(min(rest, key=lambda i: max(float(z[i].double() @ z[j].double()) for j in chosen)))
    return chosen


def test_choices_are_those_of_the_naive_twin():
    for seed in range(5):
        z = clusters(seed=seed)
        assert representative_and_diverse(z, 4, 4) == naive(z, 4, 4)


def test_diverse_rows_come_from_every_cluster():
    z = clusters()
    assert {i % 4 for i in representative_and_diverse(z, 1, 3)} == {0, 1, 2, 3}


def test_no_row_is_chosen_twice_and_few_rows_are_all_chosen():
    z = clusters(n=5)
    assert sorted(representative_and_diverse(z, 4, 4)) == [0, 1, 2, 3, 4]
    same = z[:1].expand(6, -1)
    assert len(set(representative_and_diverse(same, 2, 3))) == 5


def test_the_order_of_the_rows_does_not_matter():
    z = clusters()
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(1))
    again = representative_and_diverse(z[order], 4, 4)
    assert [int(order[i]) for i in again] == representative_and_diverse(z, 4, 4)
