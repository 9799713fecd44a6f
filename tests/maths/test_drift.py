from __future__ import annotations

from dataclasses import dataclass

import pydantic
import pytest
import torch
from torch.nn.functional import normalize

from cairn.errors import NotFinite
from cairn.maths.bures import bures_parts
from cairn.maths.drift import (
    LAMS,
    AnyDrift,
    BuresMap,
    Drift,
    Gaussians,
    Guarded,
    KernelShift,
    LocalPairedMap,
    MeanShift,
    NoDrift,
    PairedMap,
    SinkhornMap,
    map_health,
)
from cairn.maths.gaussian import AffineMap, moments
from cairn.maths.shrinkage import Oas
from cairn.memory.gaussians import GaussianMemory

EVERY = [
    NoDrift(),
    MeanShift(),
    KernelShift(),
    BuresMap(),
    SinkhornMap(),
    PairedMap(),
    PairedMap(lam=None),
    LocalPairedMap(),
    LocalPairedMap(lam=1e-2),
]
ESTIMATORS = pytest.mark.parametrize("drift", EVERY, ids=repr)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


@dataclass
class Known:
    """Old classes with exact moments."""

    means: torch.Tensor
    covariances: torch.Tensor

    @property
    def classes(self) -> int:
        return len(self.means)

    def covariance(self, c: int) -> torch.Tensor:
        return self.covariances[c]


@dataclass
class World:
    """Images of old and of current classes under an encoder; old ones are seen through their moments alone."""

    old: torch.Tensor  # k x n x d
    current: torch.Tensor  # j n x d
    labels: torch.Tensor

    @property
    def memory(self) -> Known:
        return known(self.old)


def known(rows: torch.Tensor) -> Known:
    means, covariances = zip(*(moments(x) for x in rows), strict=True)
    return Known(torch.stack(means), torch.stack(covariances))


def world(d: int = 24, k: int = 6, j: int = 4, n: int = 60, seed: int = 0, unit: bool = True) -> World:
    """Unit rows of k + j classes in three clusters, with correlated anisotropic scatter that differs from class to class."""
    shared = normal(d, d, seed=seed) * torch.logspace(0, -1, d, dtype=torch.float64) / d**0.5
    clusters = normal(3, d, seed=seed + 1)
    rows = []
    for c in range(k + j):
        own = shared + 0.3 * normal(d, d, seed=seed + 100 + c) / d**0.5
        mean = clusters[c % 3] + 0.7 * shared @ normal(d, seed=seed + 200 + c)
        rows.append(mean + 0.8 * normal(n, d, seed=seed + 300 + c) @ own.T)
    x = torch.stack(rows)
    x = normalize(x, dim=-1) if unit else x
    return World(x[:k], x[k:].flatten(0, 1), torch.arange(k, k + j).repeat_interleave(n))


def planted(d: int, seed: int, size: float = 0.3) -> AffineMap:
    """An affine drift that is neither symmetric nor diagonal."""
    A = torch.eye(d, dtype=torch.float64) + size * normal(d, d, seed=seed) / d**0.5
    return AffineMap(A, 0.2 * normal(d, seed=seed + 1))


def estimated(drift: Drift, before, after, labels, memory: Gaussians) -> AffineMap:
    """The maps of all old classes, batched."""
    maps = list(drift.maps(before, after, labels, memory))
    if not maps:
        return AffineMap(before.new_zeros(0, 24, 24), before.new_zeros(0, 24))
    return AffineMap(*(torch.stack(parts) for parts in zip(*maps, strict=True)))


def first(maps: AffineMap) -> AffineMap:
    """The map of all, where all have one."""
    assert all(torch.equal(part, part[:1].expand_as(part)) for part in maps)
    return AffineMap(maps.A[0], maps.b[0])


def moved(memory: Known, found: AffineMap) -> Known:
    A, b = (x.expand(memory.classes, *x.shape[-n:]) for x, n in zip(found, (2, 1), strict=True))
    means = (A @ memory.means[..., None])[..., 0] + b
    return Known(means, A @ memory.covariances @ A.mT)


def errors(memory: Known, found: AffineMap, truth: Known) -> tuple[float, float]:
    """Squared error of means and Bures error of covariances, both relative to moving nothing."""
    after = moved(memory, found)

    def apart(one: Known) -> tuple[float, float]:
        _, covariance = bures_parts(truth.means, one.covariances, truth.means, truth.covariances)
        return float((one.means - truth.means).square().sum()), float(covariance.sum())

    (mean, covariance), (mean0, covariance0) = apart(after), apart(memory)
    return mean / mean0, covariance / covariance0


def close(one: Known, other: Known, tolerance: float) -> None:
    torch.testing.assert_close(one.means, other.means, rtol=0, atol=tolerance)
    torch.testing.assert_close(one.covariances, other.covariances, rtol=0, atol=tolerance)


# What holds for every estimator


@ESTIMATORS
def test_keeps_the_contract(drift):
    w = world()
    found = estimated(drift, w.current, w.current + 0.01 * normal(*w.current.shape, seed=9), w.labels, w.memory)
    assert isinstance(drift, Drift)
    assert isinstance(w.memory, Gaussians)
    assert found.A.dtype == found.b.dtype == torch.float64
    assert (found.A.shape, found.b.shape) == ((6, 24, 24), (6, 24))


@ESTIMATORS
def test_a_frozen_encoder_moves_nothing_to_the_bit(drift):
    w = world()
    A, b = estimated(drift, w.current, w.current.clone(), w.labels, w.memory)
    assert torch.equal(A, torch.eye(24, dtype=torch.float64).expand_as(A))
    assert torch.equal(b, torch.zeros_like(b))


@ESTIMATORS
@pytest.mark.parametrize(("j", "n"), [(3, 4), (1, 6), (1, 1), (5, 1)])
def test_few_images_give_finite_maps(drift, j, n):
    w = world(d=40, j=j, n=n)
    after = normalize(planted(40, 5)(w.current), dim=-1)
    memory = GaussianMemory(40).add(w.old.flatten(0, 1).float(), torch.arange(6).repeat_interleave(n))
    found = estimated(drift, w.current, after, w.labels, memory)
    assert found.A.isfinite().all()
    assert found.b.isfinite().all()
    assert memory.moved(found).means.isfinite().all()


@ESTIMATORS
def test_copies_of_one_image_give_finite_maps(drift):
    w = world(d=12)
    same = w.current[:1].repeat(8, 1)
    found = estimated(drift, same, normalize(same + 0.1, dim=-1), w.labels[:8], w.memory)
    assert found.A.isfinite().all()
    assert float((found.A - torch.eye(12, dtype=torch.float64)).abs().max()) < 0.5


@ESTIMATORS
def test_does_not_depend_on_the_order_or_the_names_of_classes_and_images(drift):
    w = world()
    after = normalize(planted(24, 5)(w.current), dim=-1)
    found = estimated(drift, w.current, after, w.labels, w.memory)
    order = torch.randperm(len(after), generator=rng(1))
    again = estimated(drift, w.current[order], after[order], w.labels[order] + 17, w.memory)
    torch.testing.assert_close(again.A, found.A, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(again.b, found.b, rtol=1e-7, atol=1e-8)


@ESTIMATORS
def test_a_translation_is_found(drift):
    w = world()
    b = 0.3 * normal(24, seed=3)
    found = estimated(drift, w.current, w.current + b, w.labels, w.memory)
    truth = known(w.old + b)
    if drift.kind != "none":
        close(moved(w.memory, found), truth, 1e-6)
    else:
        assert errors(w.memory, found, known(planted(24, 5)(w.old))) == (1.0, 1.0)


@ESTIMATORS
def test_takes_the_memory_and_single_precision_features(drift):
    w = world()
    memory = GaussianMemory(24, shrinkage=Oas()).add(w.old.flatten(0, 1).float(), torch.arange(6).repeat_interleave(60))
    after = normalize(planted(24, 5, 0.1)(w.current), dim=-1)
    carried = memory.moved(estimated(drift, w.current.float(), after.float(), w.labels, memory))
    assert carried.classes == 6
    assert carried.means.isfinite().all()


@ESTIMATORS
def test_no_old_class_is_no_problem(drift):
    w = world()
    empty = Known(torch.zeros(0, 24, dtype=torch.float64), torch.zeros(0, 24, 24, dtype=torch.float64))
    found = estimated(drift, w.current, w.current + 0.1, w.labels, empty)
    assert found.A.shape == (0, 24, 24)


@ESTIMATORS
def test_refuses_no_image_and_what_is_not_finite(drift):
    w = world()
    with pytest.raises(ValueError, match="same images in the same order, at least one"):
        estimated(drift, w.current[:0], w.current[:0], w.labels[:0], w.memory)
    with pytest.raises(NotFinite, match="features after"):
        estimated(drift, w.current, w.current * float("nan"), w.labels, w.memory)


def test_configurations_are_told_apart_by_kind_and_frozen():
    adapter = pydantic.TypeAdapter(AnyDrift)
    for drift in EVERY:
        assert adapter.validate_python(drift.model_dump()) == drift
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python({"kind": "sdc", "sigmas": 0.3})
    with pytest.raises(pydantic.ValidationError):
        PairedMap().lam = 0.5
    assert all(field.description for drift in EVERY for field in type(drift).model_fields.values())


# What each is for


@pytest.mark.parametrize("drift", [PairedMap(lam=1e-13), LocalPairedMap(lam=1e-13)], ids=repr)
def test_regression_recovers_an_affine_drift(drift):
    w, truth = world(unit=False), planted(24, 7)
    found = estimated(drift, w.current, truth(w.current), w.labels, w.memory)
    torch.testing.assert_close(found.A, truth.A.expand_as(found.A), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.b, truth.b.expand_as(found.b), rtol=0, atol=1e-6)
    close(moved(w.memory, found), known(truth(w.old)), 1e-6)


def test_regression_equals_its_normal_equations():
    w = world()
    after = normalize(planted(24, 7)(w.current), dim=-1)
    lam, n, d = 0.05, len(after), 24
    m0 = w.current.mean(0)
    # The ridge written as d more rows of data
    G = torch.cov(w.current.T, correction=0)
    rows = torch.cat([w.current - m0, (n * lam * G.trace() / d).sqrt() * torch.eye(d, dtype=torch.float64)])
    targets = torch.cat([after - w.current, torch.zeros(d, d, dtype=torch.float64)])
    D = torch.linalg.lstsq(rows, targets).solution
    found = first(estimated(PairedMap(lam=lam), w.current, after, w.labels, w.memory))
    torch.testing.assert_close(found.A, torch.eye(d, dtype=torch.float64) + D.T, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found(m0[None])[0], after.mean(0), rtol=1e-10, atol=1e-12)


def test_regression_where_images_are_fewer_than_dimensions_leaves_the_rest_alone():
    w = world(d=48, j=2, n=10)
    truth = planted(48, 7)
    found = first(estimated(PairedMap(lam=1e-8), w.current, truth(w.current), w.labels, w.memory))
    torch.testing.assert_close(found(w.current), truth(w.current), rtol=0, atol=1e-5)
    unseen = torch.linalg.svd(w.current - w.current.mean(0)).Vh[len(w.current) :]
    torch.testing.assert_close(unseen @ found.A.T, unseen, rtol=0, atol=1e-6)


def test_local_correction_equals_a_weighted_regression():
    w = world()
    after = normalize(torch.tanh(2 * planted(24, 7)(w.current)), dim=-1)
    drift = LocalPairedMap(lam=0.02, sigma=0.5, stiffness=3.0)
    found = estimated(drift, w.current, after, w.labels, w.memory)
    shared = first(estimated(PairedMap(lam=0.02), w.current, after, w.labels, w.memory))
    for c in range(6):
        weights = torch.exp(-(w.current - w.memory.means[c]).square().sum(1) / (2 * 0.5**2))
        weights = weights / weights.sum()
        residual = after - shared(w.current)
        m, E = weights @ w.current, weights @ residual
        Z = w.current - m
        G = Z.T @ torch.diag(weights) @ Z
        ridge = 3.0 * 0.02 * G.trace() / 24 * torch.eye(24, dtype=torch.float64)
        D = torch.linalg.inv(G + ridge) @ Z.T @ torch.diag(weights) @ (residual - E)
        x = w.old[c]
        expected = shared(x) + E + (x - m) @ D
        torch.testing.assert_close(AffineMap(found.A[c], found.b[c])(x), expected, rtol=1e-8, atol=1e-9)


def test_bures_recovers_a_symmetric_positive_definite_drift():
    w = world(unit=False)
    root = normal(24, 24, seed=4) / 24**0.5
    truth = AffineMap(torch.eye(24, dtype=torch.float64) * 0.5 + root @ root.T, 0.2 * normal(24, seed=5))
    found = first(estimated(BuresMap(reg=0.0), w.current, truth(w.current), w.labels, w.memory))
    torch.testing.assert_close(found.A, truth.A, rtol=0, atol=1e-6)
    close(moved(w.memory, found), known(truth(w.old)), 1e-5)


def test_bures_matches_the_current_moments_whatever_the_drift():
    w = world(n=100)
    after = normalize(torch.tanh(2 * planted(24, 7)(w.current)), dim=-1)
    found = first(estimated(BuresMap(reg=1e-10), w.current, after, w.labels, w.memory))
    mean, covariance = moments(found(w.current))
    torch.testing.assert_close(mean, after.mean(0), rtol=0, atol=1e-8)
    torch.testing.assert_close(covariance, torch.cov(after.T, correction=0), rtol=0, atol=1e-6)


def test_a_shift_repairs_means_only():
    w = world()
    after = planted(24, 7, 0.1)
    for drift in (MeanShift(), KernelShift()):
        found = estimated(drift, w.current, after(w.current), w.labels, w.memory)
        mean, covariance = errors(w.memory, found, known(after(w.old)))
        assert mean < 0.8
        assert covariance == pytest.approx(1.0)


def apart() -> tuple[World, torch.Tensor, torch.Tensor]:
    """Two groups of classes far apart, of which each drifts its own way; the ways, one per group."""
    d, n = 16, 50
    mix = 0.15 * normal(d, d, seed=0) * torch.logspace(0, -1, d, dtype=torch.float64) / d**0.5
    centres = torch.zeros(2, d, dtype=torch.float64)
    centres[0, 0] = centres[1, 1] = 1.0
    rows = torch.stack(
        [centres[c % 2] + 0.1 * normal(d, seed=50 + c) / 4 + normal(n, d, seed=c) @ mix.T for c in range(8)]
    )
    ways = 0.3 * normalize(normal(2, d, seed=99), dim=-1)
    return World(rows[:4], rows[4:].flatten(0, 1), torch.arange(4, 8).repeat_interleave(n)), ways, mix


@pytest.mark.parametrize(
    "drift", [KernelShift(sigma=0.2), SinkhornMap(eps=0.05), LocalPairedMap(sigma=0.2, lam=1e-3)], ids=repr
)
def test_drift_is_local(drift):
    w, ways, _ = apart()
    after = w.current + ways[w.labels % 2]
    found = moved(w.memory, estimated(drift, w.current, after, w.labels, w.memory))
    for c in range(4):
        went = found.means[c] - w.memory.means[c]
        assert float((went - ways[c % 2]).norm()) < 0.04
    everywhere = moved(w.memory, estimated(MeanShift(), w.current, after, w.labels, w.memory)).means - w.memory.means
    assert float((everywhere - ways[torch.arange(4) % 2]).norm(dim=1).min()) > 0.1


def test_sinkhorn_moves_covariances_by_the_group_they_belong_to():
    w, _, _ = apart()
    Q = torch.linalg.qr(normal(16, 16, seed=3))[0]
    stretches = [
        Q @ torch.diag(v) @ Q.T for v in (torch.linspace(0.5, 2, 16).double(), torch.linspace(2, 0.5, 16).double())
    ]
    centres = torch.stack([w.current[w.labels % 2 == g].mean(0) for g in (0, 1)])

    def drifted(x: torch.Tensor, group: int) -> torch.Tensor:
        return centres[group] + (x - centres[group]) @ stretches[group]

    after = torch.where((w.labels % 2 == 0)[:, None], drifted(w.current, 0), drifted(w.current, 1))
    truth = known(torch.stack([drifted(x, c % 2) for c, x in enumerate(w.old)]))
    local = errors(w.memory, estimated(SinkhornMap(eps=0.05), w.current, after, w.labels, w.memory), truth)
    shared = errors(w.memory, estimated(BuresMap(), w.current, after, w.labels, w.memory), truth)
    assert local[1] < 0.3
    assert local[1] < 0.5 * shared[1]


def test_sinkhorn_compares_in_fewer_directions_what_full_ones_tell():
    w = world(d=32)
    after = normalize(planted(32, 5)(w.current), dim=-1)
    full = estimated(SinkhornMap(rank=500), w.current, after, w.labels, w.memory)
    few = estimated(SinkhornMap(rank=12), w.current, after, w.labels, w.memory)
    assert float((full.A - few.A).norm() / full.A.norm()) < 0.1


@pytest.mark.parametrize("n", [8, 40])
def test_holding_out_classes_chooses_about_the_best_ridge(n):
    w, encoder = world(d=32, k=12, j=8, n=n), nonlinear(32)
    truth = known(encoder(w.old))
    chosen = errors(w.memory, estimated(PairedMap(lam=None), w.current, encoder(w.current), w.labels, w.memory), truth)
    fixed = [
        errors(w.memory, estimated(PairedMap(lam=x), w.current, encoder(w.current), w.labels, w.memory), truth)
        for x in LAMS
    ]
    assert chosen in fixed
    assert chosen[0] <= 1.25 * min(mean for mean, _ in fixed)


def nonlinear(d: int, size: float = 0.5):
    """Two encoders of hidden features that differ by a low-rank change of their weights, seen from one to the other."""
    W, V = normal(d, 2 * d, seed=1) / d**0.5, normal(2 * d, d, seed=2) / (2 * d) ** 0.5
    change = size * normal(d, 3, seed=3) @ normal(3, 2 * d, seed=4) / (3 * d) ** 0.5

    def encoder(x: torch.Tensor) -> torch.Tensor:
        return normalize(x + torch.tanh(2 * x @ (W + change)) @ V - torch.tanh(2 * x @ W) @ V, dim=-1)

    return encoder


@pytest.mark.parametrize("size", [0.3, 1.0])
def test_on_a_nonlinear_drift_knowing_the_pairs_beats_knowing_the_moments(size):
    table = {}
    for seed in range(2):
        w, encoder = world(d=32, k=9, j=6, n=100, seed=1000 * seed), nonlinear(32, size)
        truth = known(encoder(w.old))
        for drift in EVERY:
            found = estimated(drift, w.current, encoder(w.current), w.labels, w.memory)
            table.setdefault(repr(drift), []).append(torch.tensor(errors(w.memory, found, truth)))
    mean, covariance = ({name: float(sum(rows)[i]) / 2 for name, rows in table.items()} for i in (0, 1))
    none, shift, bures, paired, local = (
        repr(x) for x in (NoDrift(), MeanShift(), BuresMap(), PairedMap(), LocalPairedMap())
    )
    assert mean[none] == covariance[none] == 1.0
    assert mean[local] < mean[paired] < mean[bures] < 1.0
    assert mean[paired] < mean[shift] < 1.0
    assert covariance[local] < covariance[paired] < covariance[bures] < covariance[shift]
    assert covariance[shift] == pytest.approx(1.0)


# Health


def test_health_of_known_maps():
    d = 10
    assert map_health(AffineMap.identity(d)) == (-16.0, 1.0, 0.0)
    stretch = torch.diag(torch.tensor([4.0, 0.5, *[1.0] * 8], dtype=torch.float64))
    health = map_health(AffineMap(stretch, torch.zeros(d).double()))
    assert health.log_norm == pytest.approx(0.5 * torch.tensor(9.25).log10().item(), rel=1e-6)
    assert health.condition == pytest.approx(8.0)
    assert health.effective_rank == pytest.approx(9.25**2 / (3.0**4 + 0.5**4))
    triple = AffineMap(3 * torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64))
    assert map_health(triple).effective_rank == pytest.approx(d)


@pytest.mark.parametrize(("seed", "size"), [(0, 0.1), (1, 0.5), (2, 2.0)])
def test_health_is_that_of_the_singular_values(seed, size):
    one = planted(8, seed, size)
    s = torch.linalg.svdvals(one.A - torch.eye(8, dtype=torch.float64))
    health = map_health(one)
    assert health.condition == pytest.approx(float(torch.linalg.cond(one.A)))
    assert health.log_norm == pytest.approx(float(s.norm().log10()))
    assert health.effective_rank == pytest.approx(float(s.square().sum() ** 2 / s.pow(4).sum()))


def test_health_of_broken_maps_is_no_nan():
    zero = torch.zeros(5, dtype=torch.float64)
    assert map_health(AffineMap(torch.zeros(5, 5, dtype=torch.float64), zero)).condition == float("inf")
    for bad in (float("nan"), float("inf")):
        assert map_health(AffineMap.identity(5)._replace(b=zero + bad)) == (float("inf"), float("inf"), 0.0)


def test_sound_maps_are_kept():
    maps = [planted(8, seed) for seed in range(3)]
    guarded = Guarded(maps, AffineMap.identity(8), limit=1e4)
    assert all(kept is given for kept, given in zip(guarded, maps, strict=True))
    assert guarded.reason == ""
    assert guarded.health == tuple(max(column) for column in zip(*map(map_health, maps), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_map_that_is_not_finite_falls_back(bad):
    one = planted(8, 0)
    broken = one._replace(A=one.A.clone().index_fill_(0, torch.tensor([2]), bad))
    mean = AffineMap.identity(8)._replace(b=one.b)
    guarded = Guarded([broken], mean)
    assert list(guarded) == [mean]
    assert "not finite" in guarded.reason
    assert guarded.health == map_health(mean)


def test_only_the_maps_concerned_fall_back():
    maps = [planted(8, seed) for seed in range(3)]
    maps[1].A[0] *= 1e6
    mean = AffineMap.identity(8)._replace(b=maps[0].b)
    guarded = Guarded(maps, mean)
    found = list(guarded)
    assert found[0] is maps[0]
    assert found[1] is mean
    assert found[2] is maps[2]
    assert guarded.replaced == [1]
    assert guarded.reason.startswith("1 of 3 maps (class 1) condition number")
    assert "above 10000" in guarded.reason


def test_a_shared_matrix_is_judged_once_and_each_translation_on_its_own(monkeypatch):
    judged = []
    monkeypatch.setattr("cairn.maths.drift.map_health", lambda map: judged.append(map) or map_health(map))
    identity = AffineMap.identity(5)
    shifts = [identity._replace(b=torch.full((5,), x, dtype=torch.float64)) for x in (1.0, float("nan"), 2.0, 3.0)]
    guarded = Guarded(shifts, identity)
    found = list(guarded)
    assert [map.b[0].item() for map in found] == [1.0, 0.0, 2.0, 3.0]
    assert guarded.replaced == [1]
    assert len(judged) <= 4


def test_maps_are_made_when_they_are_asked_for():
    w = world()
    for drift in (SinkhornMap(), LocalPairedMap()):
        maps = drift.maps(w.current, w.current + 0.01 * normal(*w.current.shape, seed=9), w.labels, w.memory)
        assert iter(maps) is maps
        assert next(maps).A is not next(maps).A
