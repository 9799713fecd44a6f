from __future__ import annotations

import pydantic
import pytest
import torch
from safetensors.torch import load, save
from torch.utils._python_dispatch import TorchDispatchMode

from cairn.errors import DataError, NotFinite, ResultError
from cairn.maths.gaussian import AffineMap, cholesky_repaired, merged, moments
from cairn.maths.shrinkage import Oas, Ridge, oas, oas_diagonal, ridge
from cairn.memory import gaussians
from cairn.memory.covariances import Auto, Covariance, Diagonal, Full, LowRank, Shared
from cairn.memory.gaussians import GaussianMemory, GaussianSettings, first_too_many, kept_bytes, too_many
from cairn.memory.protocol import ClassMemory

RAW = Ridge(eps=0)
"""No shrinkage: what is read is what is stored."""

KINDS = [Full(), LowRank(rank=3), Diagonal(), Shared()]
EXACT = [Full(), Diagonal(), Shared()]

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
each_exact_kind = pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.kind)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def world(sizes: tuple[int, ...], d: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated, anisotropic classes, each with axes of its own; rows in random order."""
    generator = rng(seed)
    rows, labels = [], []
    for c, n in enumerate(sizes):
        axes, _ = torch.linalg.qr(torch.randn(d, d, generator=generator))
        spread = axes * torch.logspace(0, -1, d)
        rows.append(torch.randn(n, d, generator=generator) @ spread.T + 3 * torch.randn(d, generator=generator))
        labels += [c] * n
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat(rows)[order], torch.tensor(labels)[order]


def maps_of(k: int, d: int, seed: int = 7) -> AffineMap:
    """One map per class: near the identity, not symmetric."""
    generator = rng(seed)
    A = torch.eye(d, dtype=torch.float64) + 0.3 * torch.randn(k, d, d, generator=generator, dtype=torch.float64)
    return AffineMap(A, torch.randn(k, d, generator=generator, dtype=torch.float64))


def expected_covariance(kind: Covariance, x: torch.Tensor, y: torch.Tensor, c: int) -> torch.Tensor:
    """The naive twin of what a memory without shrinkage reads; for low rank, what it approximates."""
    S = moments(x[y == c])[1]
    if kind.kind == "diagonal":
        return S.diagonal().diag()
    if kind.kind == "shared":
        classes, counts = y.unique(return_counts=True)
        return sum(n * moments(x[y == i])[1] for i, n in zip(classes, counts, strict=True)) / len(y)
    return S


def distance(A: torch.Tensor, B: torch.Tensor) -> float:
    return float((A.double() - B.double()).norm() / B.double().norm())


def assert_same_statistics(one: GaussianMemory, other: GaussianMemory, rtol: float) -> None:
    assert torch.equal(one.counts, other.counts)
    torch.testing.assert_close(one.means, other.means, rtol=rtol, atol=rtol)
    for c in range(one.classes):
        torch.testing.assert_close(one.covariance(c), other.covariance(c), rtol=rtol, atol=rtol)


# --- Statistics


@each_exact_kind
def test_statistics_are_those_of_the_features(kind):
    x, y = world((30, 8, 12))
    memory = GaussianMemory(6, kind, RAW).add(x, y)
    assert memory.classes == 3
    assert memory.counts.tolist() == [30, 8, 12]
    for c in range(3):
        torch.testing.assert_close(memory.mean(c), moments(x[y == c])[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(memory.covariance(c), expected_covariance(kind, x, y, c), rtol=1e-5, atol=1e-6)
    assert torch.equal(memory.means[1], memory.mean(1))
    assert memory.means.dtype == memory.covariance(0).dtype == torch.float64


def test_low_rank_keeps_variances_exactly_and_covariances_in_its_rank():
    x, y = world((30, 4))
    memory = GaussianMemory(6, LowRank(rank=3), RAW).add(x, y)
    many, few = moments(x[y == 0])[1], moments(x[y == 1])[1]
    torch.testing.assert_close(memory.covariance(0).diagonal(), many.diagonal(), rtol=1e-5, atol=0)
    assert 0.001 < distance(memory.covariance(0), many) < distance(many.diagonal().diag(), many) / 3
    torch.testing.assert_close(memory.covariance(1), few, rtol=1e-5, atol=1e-6)


def test_a_rank_above_the_width_is_a_full_covariance():
    x, y = world((30, 8))
    low, full = (GaussianMemory(6, kind, Oas()).add(x, y) for kind in (LowRank(rank=50), Full()))
    assert_same_statistics(low, full, 1e-5)


@each_kind
def test_adding_in_one_go_is_adding_in_parts(kind):
    x, y = world((10, 14, 9))
    whole = GaussianMemory(6, kind).add(x, y)
    parts = GaussianMemory(6, kind)
    for classes in ((0,), (1, 2)):
        rows = torch.isin(y, torch.tensor(classes))
        parts = parts.add(x[rows], y[rows])
    assert_same_statistics(whole, parts, 1e-6)


@each_exact_kind
def test_a_class_seen_again_is_merged_exactly(kind):
    x, y = world((40, 20, 30))
    whole = GaussianMemory(6, kind).add(x, y)
    first = torch.arange(len(x)) < 37
    assert set(y[first].tolist()) == {0, 1, 2}
    again = GaussianMemory(6, kind).add(x[first], y[first]).add(x[~first], y[~first])
    assert_same_statistics(again, whole, 1e-5)


def test_merging_agrees_with_the_closed_form_for_far_apart_parts():
    x, _ = world((20,))
    near, far = x[:5], x[5:] + 100
    memory = GaussianMemory(6, Full(), RAW)
    for part in (near, far):
        memory = memory.add(part, torch.zeros(len(part), dtype=torch.int64))
    n, m, S = merged(5, *moments(near), 15, *moments(far))
    assert memory.counts.tolist() == [n]
    torch.testing.assert_close(memory.mean(0), m, rtol=1e-6, atol=0)
    assert distance(memory.covariance(0), S) < 1e-6


def test_low_rank_merges_keep_variances_and_the_leading_direction():
    x, y = world((200,))
    memory = GaussianMemory(6, LowRank(rank=2), RAW)
    for rows in torch.arange(200).split(20):
        memory = memory.add(x[rows], y[rows])
    S = moments(x)[1]
    torch.testing.assert_close(memory.covariance(0).diagonal(), S.diagonal(), rtol=1e-5, atol=0)
    ours, exact = (torch.linalg.eigh(matrix)[1][:, -1] for matrix in (memory.covariance(0), S))
    assert float((ours @ exact).abs()) > 0.98


@each_kind
def test_shrinkage_is_applied_to_what_is_held_and_not_stored(kind):
    x, y = world((9, 7))
    raw = GaussianMemory(6, kind, RAW).add(x, y)
    shrunk = GaussianMemory(6, kind, Ridge(eps=0.3)).add(x, y)
    assert all(torch.equal(tensor, shrunk.state_dict()[name]) for name, tensor in raw.state_dict().items())
    torch.testing.assert_close(shrunk.covariance(1), ridge(raw.covariance(1), 0.3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [Full(), LowRank(rank=2), Shared()], ids=lambda kind: kind.kind)
def test_oas_counts_the_features_behind_the_covariance(kind):
    x, y = world((9, 7))
    raw, shrunk = (GaussianMemory(6, kind, shrinkage).add(x, y) for shrinkage in (RAW, Oas()))
    expected, rho = oas(raw.covariance(1), 16 if kind.kind == "shared" else 7)
    assert float(rho) < 0.9
    torch.testing.assert_close(shrunk.covariance(1), expected, rtol=1e-5, atol=1e-6)


def test_oas_of_a_diagonal_is_that_of_variances():
    x, y = world((9, 40))
    raw, shrunk = (GaussianMemory(6, Diagonal(), shrinkage).add(x, y) for shrinkage in (RAW, Oas()))
    expected, rho = oas_diagonal(raw.covariance(1).diagonal(), 40)
    assert float(rho) < 0.9
    torch.testing.assert_close(shrunk.covariance(1), expected.diag(), rtol=1e-6, atol=0)


# --- Few samples


@pytest.mark.parametrize("shrinkage", [Oas(), Ridge()], ids=lambda shrinkage: shrinkage.kind)
@each_kind
def test_five_samples_in_64_dimensions_can_be_factorised(kind, shrinkage):
    x, y = world((5, 5), d=64)
    memory = GaussianMemory(64, kind, shrinkage).add(x, y)
    for c in range(2):
        S = memory.covariance(c)
        factor, jitter = cholesky_repaired(S)
        assert factor.isfinite().all()
        assert jitter == 0.0
        assert torch.linalg.eigvalsh(S)[0] > 1e-3 * S.trace() / 64
    assert memory.draw(3, rng())[0].isfinite().all()


@each_kind
def test_a_single_image_is_read_with_the_scatter_of_the_other_classes(kind):
    x, y = world((30, 1, 20))
    memory = GaussianMemory(6, kind, RAW).add(x, y)
    others = y != 1
    if kind.kind == "diagonal":
        expected = expected_covariance(Shared(), x[others], y[others], 0).diagonal().diag()
    else:
        # the shared scatter includes the single image, which adds to the count alone
        expected = expected_covariance(Shared(), x[others], y[others], 0) * (50 / 51 if kind.kind == "shared" else 1)
    if kind.kind == "low_rank":
        torch.testing.assert_close(memory.covariance(1).diagonal(), expected.diagonal(), rtol=1e-5, atol=0)
        assert distance(memory.covariance(1), expected) < 0.3
    else:
        torch.testing.assert_close(memory.covariance(1), expected, rtol=1e-5, atol=1e-6)
    drawn, _ = memory.draw(20_000, rng(), classes=[1])
    torch.testing.assert_close(moments(drawn)[0], x[y == 1][0].double(), rtol=0, atol=0.05)
    assert distance(moments(drawn)[1], memory.covariance(1)) < 0.05


@each_kind
def test_a_single_image_seen_again_has_a_scatter_of_its_own(kind):
    x, y = world((30, 8))
    one = (y == 1).nonzero()[0]
    rest = torch.ones(len(y), dtype=torch.bool)
    rest[one] = False
    started = GaussianMemory(6, kind).add(torch.cat([x[y == 0], x[one]]), torch.tensor([0] * 30 + [1]))
    rest &= y == 1
    again = started.add(x[rest], y[rest])
    if kind.kind == "low_rank":
        expected = moments(x[y == 1])[1].trace()
        torch.testing.assert_close(again.covariance(1).trace(), expected, rtol=1e-5, atol=0)
    else:
        assert_same_statistics(again, GaussianMemory(6, kind).add(x, y), 1e-5)


@pytest.mark.parametrize("copies", [1, 3])
@each_kind
def test_without_any_scatter_the_variance_is_small_and_isotropic(kind, copies):
    x, y = world((1, 1))
    x = x / x.norm(dim=1, keepdim=True)
    memory = GaussianMemory(6, kind, RAW).add(x.repeat(copies, 1), y.repeat(copies))
    expected = gaussians.LONE_VARIANCE / 6 * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(memory.covariance(0), expected, rtol=1e-6, atol=1e-9)
    assert memory.draw(4, rng())[0].isfinite().all()


@each_kind
def test_a_class_at_the_origin_without_scatter_can_be_drawn(kind):
    memory = GaussianMemory(4, kind).add(torch.zeros(1, 4), torch.tensor([0]))
    drawn, _ = memory.draw(5, rng())
    assert drawn.isfinite().all()
    assert float(drawn.abs().max()) > 0


# --- Draws


@each_kind
def test_draws_have_the_moments_that_are_read(kind):
    x, y = world((50, 30, 40))
    memory = GaussianMemory(6, kind).add(x, y)
    drawn, labels = memory.draw(30_000, rng())
    assert drawn.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0] * 30_000 + [1] * 30_000 + [2] * 30_000
    for c in range(3):
        m, S = moments(drawn[labels == c])
        torch.testing.assert_close(m, memory.mean(c), rtol=0, atol=0.05)
        assert distance(S, memory.covariance(c)) < 0.03


def test_draws_do_not_have_the_covariance_of_the_transposed_factor():
    x, y = world((50,))
    memory = GaussianMemory(6).add(x, y)
    L, _ = cholesky_repaired(memory.covariance(0))
    S = moments(memory.draw(30_000, rng())[0])[1]
    assert distance(S, L.T @ L) > 0.3
    assert distance(S, L @ L.T) < 0.03


@each_kind
def test_draws_follow_the_generator_and_nothing_else(kind):
    x, y = world((9, 7))
    memory = GaussianMemory(6, kind).add(x, y)
    state = torch.random.get_rng_state()
    first, _ = memory.draw(5, rng(1))
    assert torch.equal(first, memory.draw(5, rng(1))[0])
    assert torch.equal(first, GaussianMemory(6, kind).add(x, y).draw(5, rng(1))[0])
    assert not torch.equal(first, memory.draw(5, rng(2))[0])
    generator = rng(1)
    memory.draw(5, generator)
    assert not torch.equal(first, memory.draw(5, generator)[0])
    assert torch.equal(state, torch.random.get_rng_state())


@each_kind
def test_classes_are_drawn_in_the_order_asked_for(kind):
    x, y = world((9, 7, 8))
    memory = GaussianMemory(6, kind).add(x, y)
    drawn, labels = memory.draw(4000, rng(), classes=[2, 0, 2])
    assert labels.tolist() == [2] * 4000 + [0] * 4000 + [2] * 4000
    for block, c in enumerate((2, 0, 2)):
        m = drawn[block * 4000 : (block + 1) * 4000].double().mean(0)
        torch.testing.assert_close(m, memory.mean(c), rtol=0, atol=0.15)


@each_kind
def test_nothing_asked_for_is_nothing_drawn(kind):
    x, y = world((9, 7))
    memory = GaussianMemory(6, kind).add(x, y)
    assert GaussianMemory(6, kind).draw(5, rng())[0].shape == (0, 6)
    for drawn, labels in (memory.draw(0, rng()), memory.draw(5, rng(), classes=[])):
        assert drawn.shape == (0, 6)
        assert labels.shape == (0,)


@each_kind
def test_chunks_change_what_is_held_at_once_but_not_the_gaussians(kind, monkeypatch):
    x, y = world((20,) * 12)
    memory = GaussianMemory(6, kind).add(x, y)
    monkeypatch.setattr(gaussians, "CHUNK_VALUES", 5 * 2000 * 6)
    drawn, labels = memory.draw(2000, rng())
    for c in range(12):
        assert distance(moments(drawn[labels == c])[1], memory.covariance(c)) < 0.15


def test_what_is_foreseen_are_the_bytes_that_are_then_stored():
    full, small = GaussianMemory(600).foreseen(3000), GaussianMemory(600, LowRank())
    assert full is not None
    assert small.foreseen(3000) is None
    assert GaussianMemory(600).foreseen(100) is None
    x, y = torch.randn(6, 600, generator=rng()), torch.arange(3).repeat_interleave(2)
    sizes = [1000 * memory.add(x, y).bytes / 1e9 for memory in (GaussianMemory(600), small)]
    assert [f"{size:.2f} GB" in full for size in sizes] == [True, True]


@each_kind
@pytest.mark.parametrize("values", [1, 10 * 36, 2**28])
def test_draws_on_another_device_are_those_of_the_generators(kind, values, monkeypatch):
    """Its numbers, drawn by as many classes, however many of these one product takes. `cpu:0` is another device by name alone."""
    x, y = world((9, 7, 8, 1, 6))
    memory = GaussianMemory(6, kind).add(x, y)
    monkeypatch.setattr(gaussians, "CHUNK_VALUES", 2 * 36)
    monkeypatch.setattr(gaussians, "DEVICE_VALUES", values)
    wanted, there = [4, 0, 2, 3, 1], torch.device("cpu:0")
    expected, labels = memory.draws(5, [rng(3), rng(4)], wanted)
    found, same = memory.draws(5, [rng(3), rng(4)], wanted, device=there)
    assert torch.equal(labels, same)
    for some, others in zip(found, expected, strict=True):
        torch.testing.assert_close(some, others, rtol=1e-6, atol=1e-6)
    assert memory.draws(0, [rng()], device=there)[0][0].shape == (0, 6)
    assert memory.draws(5, [rng()], [], device=there)[0][0].shape == (0, 6)


@each_kind
def test_factors_that_do_not_fit_the_cache_give_the_same_draws(kind, monkeypatch):
    x, y = world((9, 7, 8))
    kept, fresh = (GaussianMemory(6, kind).add(x, y) for _ in range(2))
    kept.draw(1, rng())
    expected = kept.draw(5, rng(3))[0]
    monkeypatch.setattr(gaussians, "CACHE_BYTES", 0)
    fresh.draw(1, rng())
    found = fresh.draw(5, rng(3))[0]
    if fresh.halves_factors:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.std()))
    else:
        assert torch.equal(found, expected)


def test_beyond_the_cache_full_covariances_are_drawn_with_in_half_precision_and_factorised_once(monkeypatch):
    x, y = world((9, 7, 8))
    exact = GaussianMemory(6).add(x, y)
    monkeypatch.setattr(gaussians, "CACHE_BYTES", 3 * 4 * 36 - 1)
    assert exact.halves_factors
    assert not exact.without(0).halves_factors
    memory, made, plain = GaussianMemory(6).add(x, y), [], Full.factors
    monkeypatch.setattr(Full, "factors", lambda *args: made.append(1) or plain(*args))
    first, labels = memory.draw(20_000, rng(3))
    assert torch.equal(memory.draw(20_000, rng(3))[0], first)
    assert len(made) == 1
    for c in range(3):
        (factor,) = memory._factored([0, 1, 2], torch.device("cpu"))[0][c : c + 1].double()
        assert distance(factor @ factor.T, memory.covariance(c)) < 2e-3
        assert distance(moments(first[labels == c])[1], memory.covariance(c)) < 0.05
    said = []
    memory.tell_repairs(lambda kind, text: said.append((kind, text)))
    assert said == [("notice", "factors of 3 full covariances are drawn with in half precision")]


@each_kind
def test_factors_are_computed_once(kind, monkeypatch):
    x, y = world((9, 7))
    memory = GaussianMemory(6, kind).add(x, y)
    first = memory.draw(5, rng())[0]

    def fails(*_):
        raise AssertionError("a factor was computed again")

    monkeypatch.setattr(type(kind), "factors", fails)
    assert torch.equal(memory.draw(5, rng())[0], first)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation inside made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("kind", [Full(), LowRank(rank=4), Diagonal(), Shared()], ids=lambda kind: kind.kind)
def test_many_classes_are_drawn_in_bounded_memory(kind, monkeypatch):
    k, d = 600, 16
    x = torch.randn(2 * k, d, generator=rng()) + 1
    memory = GaussianMemory(d, kind).add(x, torch.arange(k).repeat(2))
    monkeypatch.setattr(gaussians, "CHUNK_VALUES", 50 * d * d)
    with Largest() as largest:
        drawn, _ = memory.draw(4, rng())
    result = drawn.numel() * 4
    assert result == 600 * 4 * 16 * 4
    # Whatever its number of classes, no more than a chunk in float64 beside what is stored and what is returned
    assert largest.bytes <= max(result, memory.bytes, 8 * gaussians.CHUNK_VALUES)
    assert largest.bytes < k * d * d * 4


def test_ten_thousand_classes_of_width_512_are_a_few_stacked_tensors():
    k, d = 10_000, 512
    memory = GaussianMemory(d, Diagonal()).add(torch.randn(k, d, generator=rng()), torch.arange(k))
    assert memory.bytes == 8 * k + 2 * 4 * k * d
    drawn, labels = memory.draw(1, rng())
    assert drawn.shape == (k, d)
    assert torch.equal(labels, torch.arange(k))


# --- Maps


@each_kind
def test_the_identity_leaves_the_statistics(kind):
    x, y = world((9, 1, 12))
    memory = GaussianMemory(6, kind).add(x, y)
    tolerance = 1e-5 if kind.kind == "low_rank" else 1e-12
    each = [AffineMap.identity(6) for _ in range(3)]
    for maps in (AffineMap.identity(6), each, AffineMap(*(torch.stack(parts) for parts in zip(*each, strict=True)))):
        assert_same_statistics(memory.moved(maps), memory, tolerance)


def test_moved_full_statistics_are_those_of_the_mapped_features():
    x, y = world((30, 4, 12))
    A, b = maps_of(3, 6)
    mapped = torch.stack([A[c] @ row + b[c] for row, c in zip(x.double(), y, strict=True)])
    moved = GaussianMemory(6, Full(), RAW).add(x, y).moved(AffineMap(A, b))
    assert_same_statistics(moved, GaussianMemory(6, Full(), RAW).add(mapped, y), 1e-5)


@each_kind
def test_a_sequence_of_maps_is_a_batched_map(kind):
    x, y = world((9, 7, 8))
    A, b = maps_of(3, 6)
    memory = GaussianMemory(6, kind).add(x, y)
    each = [AffineMap(A[c], b[c]) for c in range(3)]
    assert memory.moved(each) == memory.moved(AffineMap(A, b))


@each_kind
def test_one_map_for_all_is_that_map_for_each(kind):
    x, y = world((9, 7, 8))
    A, b = maps_of(1, 6)
    memory = GaussianMemory(6, kind).add(x, y)
    expected = memory.moved([AffineMap(A[0].clone(), b[0]) for _ in range(3)])
    assert_same_statistics(memory.moved(AffineMap(A[0], b[0])), expected, 1e-6)


def test_a_moved_diagonal_is_the_diagonal_of_the_moved_covariance():
    x, y = world((9, 7))
    A, b = maps_of(2, 6)
    memory = GaussianMemory(6, Diagonal(), RAW).add(x, y)
    for c in range(2):
        expected = (A[c] @ memory.covariance(c) @ A[c].T).diagonal().diag()
        torch.testing.assert_close(memory.moved(AffineMap(A, b)).covariance(c), expected, rtol=1e-5, atol=1e-7)


def test_a_moved_shared_covariance_is_the_average_by_counts():
    x, y = world((9, 27, 4))
    A, b = maps_of(3, 6)
    memory = GaussianMemory(6, Shared(), RAW).add(x, y)
    S = memory.covariance(0)
    expected = (9 * A[0] @ S @ A[0].T + 27 * A[1] @ S @ A[1].T + 4 * A[2] @ S @ A[2].T) / 40
    moved = memory.moved(AffineMap(A, b))
    torch.testing.assert_close(moved.covariance(2), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moved.mean(1), A[1] @ memory.mean(1) + b[1], rtol=1e-6, atol=1e-6)


def test_a_moved_low_rank_part_is_exact_and_the_rest_keeps_its_variances():
    x, y = world((4, 30))
    A, b = maps_of(2, 6)
    memory = GaussianMemory(6, LowRank(rank=3), RAW).add(x, y)
    moved = memory.moved(AffineMap(A, b))
    # Four samples have rank three: nothing is left for the diagonal
    torch.testing.assert_close(moved.covariance(0), A[0] @ memory.covariance(0) @ A[0].T, rtol=1e-5, atol=1e-6)
    exact = A[1] @ memory.covariance(1) @ A[1].T
    torch.testing.assert_close(moved.covariance(1).diagonal(), exact.diagonal(), rtol=1e-5, atol=0)
    U = moved.state_dict()["U"]
    torch.testing.assert_close(U.mT @ U, torch.eye(3).expand(2, 3, 3), rtol=0, atol=1e-5)
    assert moved.bytes == memory.bytes


@each_kind
def test_moving_then_drawing_uses_the_moved_statistics(kind):
    x, y = world((30, 20))
    memory = GaussianMemory(6, kind).add(x, y)
    memory.draw(2, rng())
    moved = memory.moved(maps_of(2, 6))
    drawn, labels = moved.draw(30_000, rng())
    for c in range(2):
        m, S = moments(drawn[labels == c])
        torch.testing.assert_close(m, moved.mean(c), rtol=0, atol=0.1)
        assert distance(S, moved.covariance(c)) < 0.03


# --- The object


@each_kind
def test_adding_moving_and_drawing_leave_the_memory_as_it_was(kind):
    x, y = world((9, 7))
    memory = GaussianMemory(6, kind).add(x, y)
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    x_before = x.clone()
    memory.draw(3, rng())
    memory.counts.zero_()
    memory.means.zero_()
    memory.covariance(0).zero_()
    assert memory.add(x + 1, y) != memory
    assert memory.moved(maps_of(2, 6)) != memory
    x.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory.state_dict().items())
    assert memory == GaussianMemory(6, kind).add(x_before, y)
    with pytest.raises(AttributeError):
        memory.dim = 7


@each_kind
def test_equality_is_of_settings_and_statistics_not_of_factors(kind):
    x, y = world((9, 7))
    drawn, untouched = (GaussianMemory(6, kind).add(x, y) for _ in range(2))
    drawn.draw(2, rng())
    assert drawn == untouched
    assert drawn != GaussianMemory(6, kind, Ridge()).add(x, y)
    assert drawn != GaussianMemory(6, LowRank(rank=2), Oas()).add(x, y)
    assert drawn != "a memory"


@each_kind
def test_state_round_trips_through_safetensors_bit_for_bit(kind):
    x, y = world((9, 1, 8))
    memory = GaussianMemory(6, kind, Ridge()).add(x, y)
    state = memory.state_dict()
    assert all(isinstance(tensor, torch.Tensor) and tensor.is_contiguous() for tensor in state.values())
    again = GaussianMemory.from_state(load(save(state)), kind, Ridge())
    assert again == memory
    assert torch.equal(again.draw(4, rng())[0], memory.draw(4, rng())[0])
    empty = GaussianMemory(6, kind)
    assert GaussianMemory.from_state(load(save(empty.state_dict())), kind, Oas()) == empty


def test_a_state_of_another_kind_is_refused():
    x, y = world((9, 7))
    state = GaussianMemory(6, Diagonal()).add(x, y).state_dict()
    with pytest.raises(ResultError, match="a full memory has"):
        GaussianMemory.from_state(state, Full(), Oas())
    with pytest.raises(ResultError, match="'variances' is"):
        GaussianMemory.from_state(state | {"variances": torch.zeros(2, 5)}, Diagonal(), Oas())
    with pytest.raises(ResultError, match="'means'"):
        GaussianMemory.from_state({}, Diagonal(), Oas())


@pytest.mark.parametrize(
    ("kind", "per_class", "once"),
    [
        (Full(), 4 * 6 * 7 // 2, 0),
        (LowRank(rank=3), 4 * (6 * 3 + 3 + 6), 0),
        (Diagonal(), 4 * 6, 0),
        (Shared(), 0, 4 * 6 * 7 // 2),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_declared_bytes_are_the_bytes_stored(kind, per_class, once):
    x, y = world((9, 7, 8))
    memory = GaussianMemory(6, kind).add(x, y)
    assert memory.bytes == 3 * (8 + 4 * 6 + per_class) + once
    assert memory.bytes == sum(t.untyped_storage().nbytes() for t in memory.state_dict().values())
    memory.draw(10, rng())
    assert memory.bytes == 3 * (8 + 4 * 6 + per_class) + once


@each_kind
def test_it_is_a_class_memory(kind):
    memory = GaussianMemory(6, kind)
    assert isinstance(memory, ClassMemory)
    assert memory.classes == 0
    assert memory.dim == 6
    assert f"'{kind.kind}'" in repr(memory)


@each_kind
def test_an_empty_batch_changes_nothing(kind):
    x, y = world((9, 7))
    memory = GaussianMemory(6, kind).add(x, y)
    assert memory.add(x[:0], y[:0]) == memory


@each_kind
def test_half_precision_and_gradients_are_taken_as_they_come(kind):
    x, y = world((9, 7))
    memory = GaussianMemory(6, kind).add(x.bfloat16().requires_grad_(), y)
    assert memory == GaussianMemory(6, kind).add(x.bfloat16().float(), y)
    assert not any(tensor.requires_grad for tensor in memory.state_dict().values())


# --- Refusals


@each_kind
def test_what_is_not_finite_is_refused_by_class(kind):
    x, y = world((9, 7))
    memory = GaussianMemory(6, kind).add(x, y)
    broken = x.clone()
    broken[(y == 1).nonzero()[0], 2] = float("inf")
    with pytest.raises(NotFinite, match="features of class 1: 1 of 42 values"):
        memory.add(broken, y)
    with pytest.raises(NotFinite, match="class 0"):
        memory.add(torch.full((2, 6), 1e30) * torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]))
    A, b = maps_of(2, 6)
    A[1, 0, 0] = float("nan")
    with pytest.raises(NotFinite, match="map of class 1"):
        memory.moved(AffineMap(A, b))


def test_labels_that_leave_a_gap_are_refused():
    x, y = world((9, 7))
    memory = GaussianMemory(6).add(x, y)
    for labels in (y + 3, y - 1, torch.where(y == 1, 4, 2)):
        with pytest.raises(DataError, match="after 2 classes the new ones start at 2"):
            memory.add(x, labels)
    with pytest.raises(DataError, match="width 6"):
        memory.add(x[:, :5], y)


def test_classes_and_maps_that_do_not_exist_are_refused():
    x, y = world((9, 7))
    memory = GaussianMemory(6).add(x, y)
    for c in (-1, 2):
        with pytest.raises(IndexError, match="classes 0 to 1"):
            memory.mean(c)
        with pytest.raises(IndexError, match="classes 0 to 1"):
            memory.covariance(c)
        with pytest.raises(IndexError, match="classes 0 to 1"):
            memory.draw(1, rng(), classes=[c])
    with pytest.raises(ValueError, match="1 maps for 2 classes"):
        memory.moved([AffineMap.identity(6)])
    with pytest.raises(ValueError, match="map of class 0"):
        memory.moved(AffineMap.identity(5))


def test_kinds_are_frozen_chosen_by_name_and_refused_when_wrong():
    choice = pydantic.TypeAdapter(Covariance)
    assert choice.validate_python({"kind": "low_rank", "rank": 8}) == LowRank(rank=8)
    for kind in KINDS:
        assert choice.validate_json(kind.model_dump_json()) == kind
        assert all(f.description for f in type(kind).model_fields.values())
        with pytest.raises(pydantic.ValidationError):
            kind.kind = "other"
    for wrong in ({"kind": "low_rank", "rank": 0}, {"kind": "full", "rank": 3}, {"kind": "sparse"}):
        with pytest.raises(pydantic.ValidationError):
            choice.validate_python(wrong)


def test_a_singular_covariance_is_repaired_and_told():
    """Fewer images than directions and no shrinkage: there is no factor without help."""
    told = []
    memory = GaussianMemory(8, covariance=Full(), shrinkage=Ridge(eps=0.0)).add(
        torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 0, 0])
    )
    memory.tell_repairs(lambda *args, **kwargs: told.append(kwargs))
    assert told == []
    drawn, _ = memory.draw(4, torch.Generator().manual_seed(0))
    assert drawn.isfinite().all()
    assert memory.repaired.keys() == {0}
    memory.tell_repairs(lambda *args, **kwargs: told.append(kwargs["text"]))
    assert "singular: 1 of 1 covariance" in told[0]
    sound = GaussianMemory(8).add(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(5).long())
    sound.draw(4, torch.Generator().manual_seed(0))
    assert sound.repaired == {}


# --- Full as long as classes are not too many


@pytest.fixture
def four_are_too_many(monkeypatch):
    """Full covariances 6 wide."""
    monkeypatch.setattr(gaussians, "CACHE_BYTES", 4 * 3 * 6**2)
    assert first_too_many(6) == 4
    assert [too_many(k, 6) for k in (3, 4)] == [False, True]


def by_class(memory: GaussianMemory, x: torch.Tensor, y: torch.Tensor, classes: range) -> GaussianMemory:
    for c in classes:
        memory = memory.add(x[y == c], y[y == c])
    return memory


def test_a_memory_of_its_own_choice_is_a_full_one_while_classes_are_few(four_are_too_many):
    x, y = world((30, 8, 12))
    auto, full = (GaussianMemory(6, kind).add(x, y) for kind in (Auto(rank=3), Full()))
    assert auto.kind == Full()
    assert auto.state_dict().keys() == full.state_dict().keys()
    assert all(torch.equal(tensor, full.state_dict()[name]) for name, tensor in auto.state_dict().items())
    assert torch.equal(auto.draw(5, rng())[0], full.draw(5, rng())[0])
    assert auto != full


@pytest.mark.parametrize("at_once", [False, True])
def test_with_too_many_classes_it_becomes_one_of_low_rank(four_are_too_many, at_once):
    x, y = world((30, 8, 12, 9, 20, 3))
    auto, low = (GaussianMemory(6, kind, RAW) for kind in (Auto(rank=3), LowRank(rank=3)))
    if at_once:
        auto = auto.add(x, y)
    else:
        kinds = []
        for c in range(6):
            auto = by_class(auto, x, y, range(c, c + 1))
            kinds.append(auto.kind.kind)
        assert kinds == ["full"] * 3 + ["low_rank"] * 3
    assert_same_statistics(auto, low.add(x, y), 1e-5)
    for c in range(6):
        S = moments(x[y == c])[1]
        torch.testing.assert_close(auto.covariance(c).diagonal(), S.diagonal(), rtol=1e-5, atol=1e-7)
    assert auto.bytes == low.add(x, y).bytes
    assert auto.moved(maps_of(6, 6)).kind == auto.without(5).without(4).without(3).kind == LowRank(rank=3)


def test_a_memory_of_its_own_choice_is_restored_as_what_it_had_become(four_are_too_many):
    x, y = world((30, 8, 12, 9, 20, 3))
    blank = GaussianMemory(6, Auto(rank=3))
    for classes in (2, 5):
        memory = by_class(blank, x, y, range(classes))
        again = blank.restored(load(save(memory.state_dict())))
        assert again == memory
        assert again.kind == memory.kind
        assert by_class(again, x, y, range(classes, 6)) == by_class(memory, x, y, range(classes, 6))
    with pytest.raises(ResultError, match="'U' is"):
        GaussianMemory(6, Auto(rank=4)).restored(memory.state_dict())


def test_what_it_has_become_is_foreseen_and_told(four_are_too_many):
    blank = GaussianMemory(6, Auto(rank=3))
    assert blank.foreseen(3) is None
    text = blank.foreseen(1_000_000)
    assert text.startswith("1,000,000 classes, 6 numbers wide, are too many for full covariances (0.12 GB): from 4 on")
    assert "low_rank of rank 3 (0.14 GB)" in text
    told: list[str] = []
    x, y = world((30, 8, 12, 9))
    for k in (3, 4):
        by_class(blank, x, y, range(k)).tell_repairs(lambda event, text: told.append(text))
    assert told == ["covariances of 4 classes are kept as low_rank of rank 3"]


@pytest.mark.parametrize(("k", "d"), [(1024, 512), (1025, 512), (456, 768), (256, 1024), (257, 1024)])
def test_the_bytes_of_many_classes_are_those_that_are_kept_by_default(k, d):
    kind = Auto().low_rank if too_many(k, d) else Full()
    held = sum(4 * torch.Size(shape).numel() for shape in kind.shapes(d).values())
    assert kept_bytes(k, d) == k * (held + 4 * d + 8)
    assert GaussianSettings().covariance == Auto()
