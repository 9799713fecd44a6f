"""Generators of classes: what is drawn, what its moments are, and what a memory of them promises."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from cairn.errors import DataError, NotFinite, ResultError
from cairn.maths.gaussian import AffineMap
from cairn.memory import generators
from cairn.memory.generators import Decoders, GeneratorMemory, generated
from cairn.memory.protocol import ClassMemory

LATENT, HIDDEN, DIM = 3, 5, 4


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decoders(k: int, seed: int = 0) -> Decoders:
    """Generators whose dimensions hang together, each with noise of its own."""
    empty = Decoders.empty(LATENT, HIDDEN, DIM)
    A, a, B, m, s = (torch.randn(k, *tensor.shape[1:], generator=rng(seed + i)) for i, tensor in enumerate(empty))
    return Decoders(A, a, B, 3 * m, 0.2 * s.abs())


def memory(k: int = 3, seed: int = 0) -> GeneratorMemory:
    return GeneratorMemory(torch.arange(k) + 4, decoders(k, seed))


def same(one: GeneratorMemory, other: GeneratorMemory) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_is_drawn_is_the_written_formula():
    A, a, B, m, s = made = decoders(2)
    u = torch.randn(2, 6, LATENT, generator=(twin := rng(5)))
    e = torch.randn(2, 6, DIM, generator=twin)
    drawn = generated(made, 6, rng(5))
    for c in range(2):
        for i in range(6):
            hidden = [
                max(0.0, float(sum(u[c, i, r] * A[c, r, j] for r in range(LATENT)) + a[c, j])) for j in range(HIDDEN)
            ]
            for q in range(DIM):
                x = (
                    sum(hidden[j] * float(B[c, j, q]) for j in range(HIDDEN))
                    + float(m[c, q])
                    + float(s[c, q] * e[c, i, q])
                )
                assert drawn[c, i, q].item() == pytest.approx(x, abs=1e-5)


def test_means_are_those_of_many_draws():
    held = memory()
    drawn, labels = held.draw(200_000, rng(1))
    for c in range(3):
        own = drawn[labels == c].double()
        assert ((own.mean(0) - held.means[c]) / own.std(0)).abs().max() < 5 / 200_000**0.5


def test_a_unit_without_weights_is_constant():
    A, a, B, m, s = decoders(1)
    held = GeneratorMemory(torch.tensor([1]), Decoders(0 * A, a, B, m, s))
    torch.testing.assert_close(held.means.float(), (a[:, None].relu() @ B)[:, 0] + m)


def test_draws_are_those_of_each_generator_in_turn_whatever_is_held_at_once(monkeypatch):
    held = memory()
    alone = [held.draw(7, rng(seed), [2, 0])[0] for seed in (1, 2)]
    together, labels = held.draws(7, [rng(1), rng(2)], [2, 0])
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
    assert labels.tolist() == [2] * 7 + [0] * 7
    (there, _), _ = held.draws(7, [rng(1), rng(2)], [2, 0], device=torch.device("meta"))
    assert (there.device.type, there.shape) == ("meta", together[0].shape)
    monkeypatch.setattr(generators, "CHUNK_VALUES", 1)
    (one,), _ = held.draws(7, [rng(1)], [2])
    torch.testing.assert_close(one, generated(held._decoders.rows([2]), 7, rng(1))[0])


def test_a_map_moves_what_is_drawn_but_for_the_noise_and_of_that_the_variances():
    k, T = 3, torch.randn(3, DIM, DIM, generator=rng(7))
    b = torch.randn(k, DIM, generator=rng(8))
    A, a, B, m, s = decoders(k)
    still = GeneratorMemory(torch.ones(k, dtype=torch.int64), Decoders(A, a, B, m, 0 * s))
    before, labels = still.draw(5, rng(1))
    after, _ = still.moved(AffineMap(T, b)).draw(5, rng(1))
    for x, y, c in zip(before, after, labels, strict=True):
        torch.testing.assert_close(y, T[c] @ x + b[c], rtol=1e-4, atol=1e-4)
    moved = memory().moved([AffineMap(T[c], b[c]) for c in range(k)])
    for c in range(k):
        torch.testing.assert_close(
            moved.means[c], T[c].double() @ memory().means[c] + b[c].double(), rtol=1e-4, atol=1e-4
        )
        noise = T[c] @ torch.diag(s[c] ** 2) @ T[c].T
        torch.testing.assert_close(moved._decoders.s[c], noise.diagonal().sqrt())
    whole = memory().moved(AffineMap(T[0], b[0]))
    torch.testing.assert_close(whole.means[0], moved.means[0])


def test_adding_trains_new_classes_on_their_rows_and_known_ones_on_draws_and_rows():
    held, given = memory(2), []
    x, y = torch.randn(9, DIM, generator=rng(3)), torch.tensor([2, 0, 2, 0, 2, 2, 3, 0, 3])

    def train(rows):
        given.extend(rows)
        return decoders(len(rows), seed=40)

    kept = {name: tensor.clone() for name, tensor in held.state_dict().items()}
    added = held.add(x, y, train, rng(9))
    drawn, _ = held.draw(4, rng(9), [0])
    for own, wanted in zip(given, (torch.cat([drawn, x[y == 0]]), x[y == 2], x[y == 3]), strict=True):
        assert torch.equal(own, wanted)
    assert added.counts.tolist() == [4 + 3, 5, 4, 2]
    new = GeneratorMemory(added.counts[:3], decoders(3, seed=40))
    for c, place in ((0, 0), (2, 1), (3, 2)):
        assert torch.equal(added.means[c], new.means[place])
    assert torch.equal(added.means[1], held.means[1])
    assert all(torch.equal(kept[name], tensor) for name, tensor in held.state_dict().items())
    assert same(held.add(x[:0], y[:0], train, rng(9)), held)


def test_a_gap_and_what_is_not_finite_are_refused():
    x, y = torch.zeros(1, DIM), torch.tensor([3])
    with pytest.raises(DataError, match="leave no gap"):
        memory(2).add(x, y, lambda rows: decoders(len(rows)), rng())
    with pytest.raises(NotFinite):
        memory(3).add(x, y, lambda rows: decoders(len(rows))._replace(m=torch.full((1, DIM), torch.nan)), rng())


def test_a_class_goes_and_later_ones_move_up():
    held = memory()
    rest = held.without(1)
    assert rest.counts.tolist() == [4, 6]
    assert torch.equal(rest.means, held.means[[0, 2]])
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            held.without(outside)
        with pytest.raises(IndexError):
            held.draw(1, rng(), [outside])


def test_it_is_a_class_memory_of_the_size_it_says_and_returns_from_disk():
    held, empty = memory(), GeneratorMemory.empty(LATENT, HIDDEN, DIM)
    assert isinstance(held, ClassMemory)
    assert (held.dim, held.classes, empty.classes, empty.bytes) == (DIM, 3, 0, 0)
    assert held.bytes == 3 * (4 * (LATENT * HIDDEN + HIDDEN + HIDDEN * DIM + 2 * DIM) + 8)
    assert empty.draw(2, rng())[0].shape == (0, DIM)
    back = GeneratorMemory.from_state(load(save(held.state_dict())), LATENT, HIDDEN, DIM)
    assert same(back, held)
    state = held.state_dict()
    for wrong in (state | {"A": state["A"].double()}, state | {"m": state["m"][:2]}, {"counts": state["counts"]}):
        with pytest.raises(ResultError):
            GeneratorMemory.from_state(wrong, LATENT, HIDDEN, DIM)
    with pytest.raises(ResultError):
        GeneratorMemory.from_state(state, LATENT + 1, HIDDEN, DIM)
