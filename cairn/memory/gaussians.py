"""One Gaussian per class: counts, means, and covariances held in full, as low rank, as a diagonal, or pooled.

Stored are the plain statistics of the features seen, in float32; all arithmetic is in float64. A rounding of 6e-8
relative is far below the sampling error of any mean or covariance, and because centred moments are kept (not sums of
squares) no later merge or map magnifies it. Shrinkage is a way of reading: it enters where a covariance is read or
factorised and is never stored, so merging and moving stay exact, and shrinking twice cannot happen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import repeat
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator
from torch import Tensor

from cairn.errors import DataError, NotFinite, ResultError, counted
from cairn.maths.gaussian import AffineMap
from cairn.maths.rows import without
from cairn.maths.shrinkage import Oas, Ridge, Shrinkage
from cairn.memory.covariances import Auto, Covariance, Full, Held, KeptFactors, Kind, LowRank, in_turn, parts
from cairn.memory.protocol import rows_by_class
from cairn.settings import Settings, kind_by_name
from cairn.types import Features, Labels

CHUNK_VALUES = 2**24
"""Numbers that drawing holds at once beside its result: 64 MiB in float32."""

DEVICE_VALUES = 2**28
"""Numbers in the factors, or in the draws, of one product on another device than the generator's: 1 GiB in float32."""

CACHE_BYTES = 2**30
"""Factors kept between draws, per memory. Where those of full covariances are more, they are kept in half precision, which takes
half of what is stored; of other kinds the remaining ones are computed again for every draw."""

LONE_VARIANCE = 0.01
"""Share of |mean|^2 that is the total variance of a class without scatter, when no other class has any either."""

ROUNDING = 1e-6
"""A trace below this share of what it was before features were taken out is rounding: they were all the scatter there was."""

FOREIGN = 1e-3
"""A trace that would be negative by more than this share is no rounding: the features were not learned."""

FLAT = 1e-12
"""A trace below this share of |mean|^2 is rounding: the class counts as having no scatter."""


class GaussianSettings(Settings):
    """How a method keeps Gaussians."""

    covariance: Covariance = Field(
        default=Auto(),
        description="what is kept of a class: full, low_rank, diagonal, shared, or auto: full, low_rank where they are very many "
        "[I; SLCA and RAPF, P: full]",
    )
    shrinkage: Shrinkage = Field(
        default=Oas(), description="how a covariance of few images is made usable: oas or ridge [I]"
    )

    _kinds = field_validator("covariance", "shrinkage", mode="before")(kind_by_name)

    def memory(self, dim: int) -> GaussianMemory:
        """A memory that holds no class yet."""
        return GaussianMemory(dim, covariance=self.covariance, shrinkage=self.shrinkage)


def full_bytes(d: int) -> int:
    """Bytes of a class with a full covariance: that, mean and count."""
    return 2 * d * (d + 1) + 4 * d + 8


def low_rank_bytes(d: int, kind: LowRank) -> int:
    """The same with one of low rank."""
    return 4 * (d + sum(math.prod(shape) for shape in kind.shapes(d).values())) + 8


def kept_bytes(k: int, d: int) -> int:
    """Of k classes, by default."""
    return k * (low_rank_bytes(d, Auto().low_rank) if too_many(k, d) else full_bytes(d))


def too_many(k: int, d: int) -> bool:
    """Whether factors of k full covariances are more than CACHE_BYTES."""
    return k >= first_too_many(d)


def first_too_many(d: int) -> int:
    """The smallest such k."""
    return CACHE_BYTES // (4 * d**2) + 1


class _Stored(NamedTuple):
    counts: Int[Tensor, " k"]
    means: Float[Tensor, "k d"]
    held: Held
    """As the kind of covariance has it, one row per class; a pooled kind has one row in all."""


class GaussianMemory:
    """N(mean_c, S_c) for every class c = 0..k-1 seen so far. Immutable: `add` and `moved` return another memory.

    `covariance` says what is stored of S_c, `shrinkage` how S_c is read. Statistics live on the CPU; draws are made on
    the generator's device. Two memories are equal if their settings and everything stored are.

    A class without scatter (a single image, or copies of one) has no covariance of its own. It is read with that of the
    classes that have some, pooled: sum_c n_c S_c / sum_c n_c, shrunk as an estimate from sum_c n_c samples. Where no
    class has any, it is read with the isotropic variance LONE_VARIANCE |mean_c|^2 / d (|mean_c| = 1 if that is zero).
    This too is a way of reading: once the class is seen again, its own scatter counts.

    Source: Gaussians replayed for old classes, as in SLCA (Zhang et al. 2023, ICCV) and its successors. The exact merge
    of a class that comes back, the low-rank form and the reading of classes without scatter are ours.
    """

    def __init__(self, dim: int, covariance: Covariance | None = None, shrinkage: Shrinkage | None = None):
        asked = Full() if covariance is None else covariance
        kind = Full() if isinstance(asked, Auto) else asked
        rows = 1 if kind.pooled else 0
        held = {name: torch.zeros(rows, *shape) for name, shape in kind.shapes(dim).items()}
        stored = _Stored(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dim), held)
        self._set(dim, asked, kind, shrinkage or Oas(), stored)

    def _set(self, dim: int, asked: Covariance, kind: Kind, shrinkage: Shrinkage, stored: _Stored) -> None:
        self._dim, self._asked, self._kind, self._shrinkage, self._stored = dim, asked, kind, shrinkage, stored
        self._factors = KeptFactors()
        self.repaired: dict[int, float] = {}
        """Covariances drawn from that were singular, and what was added to their diagonal, as a share of its average."""

    def _with(self, stored: _Stored, kind: Kind | None = None) -> GaussianMemory:
        other = object.__new__(type(self))
        other._set(self._dim, self._asked, kind or self._kind, self._shrinkage, stored)
        return other

    def _ready_for(self, k: int) -> GaussianMemory:
        """This memory, or where it is `auto` and k classes are too many for full covariances, the same of low rank."""
        if not (isinstance(self._asked, Auto) and isinstance(self._kind, Full) and too_many(k, self._dim)):
            return self
        other = self._as(self._asked.low_rank)
        for c in range(self.classes):
            other._place(other._stored, c, self._asked.lowered(_row_of(self._stored, c), self._dim), f"class {c}")
        return other

    def _as(self, kind: Kind) -> GaussianMemory:
        """The same classes with covariances of this kind, all 0."""
        held = {name: torch.zeros(self.classes, *shape) for name, shape in kind.shapes(self._dim).items()}
        return self._with(self._stored._replace(held=held), kind)

    def foreseen(self, classes: int) -> str | None:
        """What so many classes will take, where they are too many for full covariances; else None."""
        if not isinstance(self._kind, Full) or not too_many(classes, self._dim):
            return None
        d, small = self._dim, self._asked.low_rank if isinstance(self._asked, Auto) else LowRank()
        full, low_rank = (f"{classes * each / 1e9:.2f} GB" for each in (full_bytes(d), low_rank_bytes(d, small)))
        if isinstance(self._asked, Auto):
            return (
                f"{classes:,} classes, {d} numbers wide, are too many for full covariances ({full}): from {first_too_many(d):,} "
                f"on they are kept as low_rank of rank {small.rank} ({low_rank}); covariance=full keeps them all"
            )
        return (
            f"full covariances of {classes:,} classes, {d} numbers wide, will take {full}, and as much again while a task is "
            f"learned; covariances of kind low_rank (rank {small.rank}) {low_rank}"
        )

    def tell_repairs(self, log: Callable[..., object]) -> None:
        """A warning, if covariances that were drawn from had to be repaired; a notice, if draws were made in half precision."""
        if self.halves_factors:
            log("notice", text=f"factors of {self.classes} full covariances are drawn with in half precision")
        if isinstance(self._asked, Auto) and isinstance(self._kind, LowRank):
            log(
                "notice", text=f"covariances of {self.classes:,} classes are kept as low_rank of rank {self._kind.rank}"
            )
        if self.repaired:
            log(
                "warning",
                text=f"singular: {len(self.repaired)} of {counted(self.classes, 'covariance')}; up to "
                f"{max(self.repaired.values()):.0e} of their average variance was added: more shrinkage would do better",
            )

    # What is held

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def kind(self) -> Kind:
        """What is stored of a covariance: the `covariance` this memory was made with, or what `auto` has come to."""
        return self._kind

    @property
    def shrinkage(self) -> Shrinkage:
        return self._shrinkage

    @property
    def classes(self) -> int:
        return len(self._stored.counts)

    @property
    def counts(self) -> Int[Tensor, " k"]:
        """Features each class was learned from."""
        return self._stored.counts.clone()

    @property
    def means(self) -> Float[Tensor, "k d"]:
        """Class means in float64."""
        return self._stored.means.double()

    def mean(self, c: int) -> Float[Tensor, " d"]:
        """Mean of class c in float64. Raises IndexError for a class not held."""
        return self._stored.means[self._known(c)].double()

    def covariance(self, c: int) -> Float[Tensor, "d d"]:
        """Covariance of class c after shrinkage, in float64. Raises IndexError for a class not held."""
        held, n = self._readable([self._row(self._known(c))])
        return self._kind.covariance({name: rows[0] for name, rows in held.items()}, int(n), self._dim, self._shrinkage)

    @property
    def scatter(self) -> Float[Tensor, "d d"]:
        """sum_c n_c S_c before shrinkage, in float64."""
        plain = self.from_state(self.state_dict(), self._kind, Ridge(eps=0.0))
        T = torch.zeros(self._dim, self._dim, dtype=torch.float64)
        return sum((n * plain.covariance(c) for c, n in enumerate(self.counts.tolist())), T)

    @property
    def bytes(self) -> int:
        """What is stored between tasks: 8 k for counts, 4 k d for means, and what the kind of covariance says."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GaussianMemory):
            return NotImplemented
        mine, theirs = self.state_dict(), other.state_dict()
        return (
            (self._dim, self._asked, self._shrinkage) == (other._dim, other._asked, other._shrinkage)
            and mine.keys() == theirs.keys()
            and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
        )

    def __repr__(self) -> str:
        return (
            f"GaussianMemory(dim={self._dim}, covariance={self._asked!r}, shrinkage={self._shrinkage!r}, "
            f"classes={self.classes}, bytes={self.bytes})"
        )

    # What changes it

    def add(self, features: Features, labels: Labels) -> GaussianMemory:
        """With these features learned: new classes appended, known ones merged by their counts.

        For class c with n features held and m new ones, Z0 the new ones centred (d x m), gap the new mean less the old:
        mean' = mean + m/(n + m) gap
        S' = w S + B B^T,  w = n/(n + m),  B = [Z0, sqrt(n m/(n + m)) gap] / sqrt(n + m)
        and for a shared covariance the same with the total count of all classes in place of n in w and sqrt(n + m).
        Exact for full, diagonal and shared, up to storage in float32, so how the features are spread over calls is immaterial.

        Raises DataError where shapes disagree or new labels leave a gap after 0..k-1, NotFinite naming the class where
        a feature, or a statistic in float32, is not finite.
        """
        arrived = rows_by_class(features, labels, self._dim, self.classes)
        classes = max([self.classes, *(c + 1 for c in arrived)])
        if (ready := self._ready_for(classes)) is not self:
            return ready.add(features, labels)
        stored = self._room_for(classes)
        weights = self._weights(stored.counts).tolist()
        for c, index in arrived.items():
            x = features.detach()[index.to(features.device)].to("cpu", torch.float64)
            _refuse_not_finite(x, f"features of class {c}")
            n, m, row = int(stored.counts[c]), len(x), self._row(c)
            gap = x.mean(0) - stored.means[c].double()
            bridge = (n * m / (n + m)) ** 0.5 * gap
            total = weights[row] + m
            B = torch.cat([(x - x.mean(0)).T, bridge[:, None]], 1) / total**0.5
            held = self._kind.absorbed(_row_of(stored, row), weights[row] / total, B)
            weights[row] = total
            _write(stored.means, c, stored.means[c].double() + m / (n + m) * gap, f"mean of class {c}")
            for name, tensor in held.items():
                _write(stored.held[name], row, tensor, f"covariance of class {c}")
            stored.counts[c] += m
        return self._with(stored)

    def moved(self, maps: AffineMap | Iterable[AffineMap]) -> GaussianMemory:
        """With class c carried along by x -> A_c x + b_c: mean' = A mean + b, S' = A S A^T, counts unchanged.

        `maps` is a single one for all classes, a batched AffineMap, or one per class in order, taken one at a time so that
        they may be made as they are needed. What is moved is the statistic, before shrinkage: full covariances become
        exactly those of the mapped features. What the other kinds keep of A S A^T is in their docstrings.

        Raises ValueError for the wrong number or width of maps, NotFinite naming the class where a map or a moved
        statistic is not finite. Holds one copy of the statistics besides its own.
        """
        if isinstance(maps, AffineMap):
            maps = repeat(maps, self.classes) if maps.A.ndim == 2 else map(AffineMap, *maps)
        stored = self._room_for(self.classes)
        shares = (stored.counts / self._weights(stored.counts)).tolist()
        given, last, share, after = 0, None, 0.0, _blank(self._kind, self._dim)
        for given, (A, b) in enumerate(maps, start=1):
            c = given - 1
            if c == self.classes:
                raise ValueError(f"more maps than the {self.classes} classes")
            if A.shape != (self._dim, self._dim) or b.shape != (self._dim,):
                raise ValueError(f"map of class {c}: {tuple(A.shape)} and {tuple(b.shape)} for width {self._dim}")
            _refuse_not_finite(A, f"map of class {c}")
            _refuse_not_finite(b, f"map of class {c}")
            mean = _exact(A) @ stored.means[c].double() + _exact(b)
            _write(stored.means, c, mean, f"moved mean of class {c}")
            if not self._kind.pooled:
                self._place(stored, c, self._kind.moved(_row_of(stored, c), _exact(A)), f"class {c}")
                continue
            # The one covariance is moved by each matrix in turn: sum_c (n_c / n) A_c S A_c^T
            if last is not None and A is not last:
                after, share = self._plus_moved(after, stored, last, share), 0.0
            last, share = A, share + shares[c]
        if given < self.classes:
            raise ValueError(f"{given} maps for {self.classes} classes")
        if last is not None:
            self._place(stored, 0, self._plus_moved(after, stored, last, share), "all classes")
        return self._with(stored)

    def without_rows(self, features: Features, labels: Labels) -> GaussianMemory:
        """As if these features had not been learned; a class of which none is left stays with count 0. The inverse of `add`, with
        m of n features taken out and n' = n - m left:

        mean' = mean - m/n' (mean of them - mean)
        S' = n/n' S - B B^T,  B = [Z0, sqrt(n' m/n) (mean of them - mean')] / sqrt(n')

        Exact for full, diagonal and shared, up to storage in float32. Raises ValueError for low_rank, DataError for features
        that were not learned.
        """
        if isinstance(self._kind, LowRank):
            raise ValueError("low_rank: what was cut off of a class cannot be told apart")
        left = rows_by_class(features, labels, self._dim, self.classes)
        stored = self._room_for(self.classes)
        for c, index in left.items():
            x = _exact(features)[index]
            weight = int(self._weights(stored.counts)[self._row(c)])
            n, m, mean, row = int(stored.counts[c]), len(x), stored.means[c].double(), self._row(c)
            if m > n:
                raise DataError(f"class {c}: {m} features to take out of {n} that were learned")
            after = mean - m / (n - m) * (x.mean(0) - mean) if n > m else torch.zeros_like(mean)
            bridge = ((n - m) * m / n) ** 0.5 * (x.mean(0) - after)
            B, total = torch.cat([(x - x.mean(0)).T, bridge[:, None]], 1), weight - m
            held = _blank(self._kind, self._dim)
            if total:
                out = self._kind.absorbed(held, 0.0, B / total**0.5)
                old = self._kind.absorbed(_row_of(stored, row), weight / total, B[:, :0])
                new = self._kind.plus(old, _several(out), torch.tensor([-1.0], dtype=torch.float64))
                before, trace = (float(self._kind.trace(_several(part), self._dim)) for part in (old, new))
                if trace < -FOREIGN * before:
                    raise DataError(f"class {c}: features that were not learned cannot be taken out")
                single = total == 1 and not self._kind.pooled
                held = held if single or trace < ROUNDING * before else new
            for name, tensor in held.items():
                _write(stored.held[name], row, tensor, f"covariance of class {c}")
            _write(stored.means, c, after, f"mean of class {c}")
            stored.counts[c] -= m
        return self._with(stored)

    def merged(self, c: int, other: int) -> GaussianMemory:
        """With class `other` gone into class c < other, as if its features had been learned as c's; later classes one number lower.
        The merge of `add`. Raises ValueError for low_rank."""
        if isinstance(self._kind, LowRank):
            raise ValueError("low_rank: what was cut off of classes is not that of both as one")
        stored = self._room_for(self.classes)
        n, m = int(stored.counts[c]), int(stored.counts[other])
        gap = (stored.means[other].double() - stored.means[c].double())[:, None]
        row, total = self._row(c), int(stored.counts.sum()) if self._kind.pooled else n + m
        share = 1.0 if self._kind.pooled else n / total
        held = self._kind.absorbed(_row_of(stored, row), share, (n * m / (n + m) / total) ** 0.5 * gap)
        if not self._kind.pooled:
            held = self._kind.plus(
                held, _several(_row_of(stored, other)), torch.tensor([m / total], dtype=torch.float64)
            )
        self._place(stored, row, held, f"class {c}")
        _write(stored.means, c, stored.means[c].double() + m / (n + m) * gap[:, 0], f"mean of class {c}")
        stored.counts[c] += m
        return self._with(stored).without(other)

    def without(self, c: int) -> GaussianMemory:
        """With class c gone and later classes one number lower. A pooled covariance keeps what the class put into it: what
        is kept does not tell which part that is. Raises IndexError for a class not held."""
        self._known(c)
        counts, means, held = self._stored
        held = held if self._kind.pooled else {name: without(rows, c) for name, rows in held.items()}
        return self._with(_Stored(without(counts, c), without(means, c), held))

    # What it is for

    def draw(
        self, per_class: int, generator: torch.Generator, classes: Sequence[int] | None = None
    ) -> tuple[Features, Labels]:
        """`per_class` features of each of `classes` (all of them if None), grouped by class, and their labels.

        Features are float32 on the generator's device and not normalised. Beside the result at most about CHUNK_VALUES
        numbers are held; factors are computed at the first draw and kept (see CACHE_BYTES).
        The same generator state and arguments give the same draws. No other source of randomness is used.

        Raises IndexError for a class not held, NotFinite where a covariance has no factor.
        """
        (features,), labels = self.draws(per_class, [generator], classes)
        return features, labels

    def draws(
        self,
        per_class: int,
        generators: Sequence[torch.Generator],
        classes: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> tuple[list[Features], Labels]:
        """What `draw` gives of each generator in turn, to the bit; every factor is made or fetched once for all of them.

        With a `device` features lie there. Their random numbers are still the generator's, so that they are those of any device;
        they are copied, and multiplied by the factors, as far as DEVICE_VALUES go in one.
        """
        wanted = [self._known(c) for c in (range(self.classes) if classes is None else classes)]
        source, values = generators[0].device, max(1, per_class * self._dim, self._kind.factor_values(self._dim))
        device = device or source
        # Numbers drawn in one call are others than in two: on any device they are drawn by as many classes
        chunk = max(1, CHUNK_VALUES // values)
        step = chunk if device == source else chunk * max(1, DEVICE_VALUES // values // chunk)
        features = [torch.empty(len(wanted), per_class, self._dim, device=device) for _ in generators]
        for start in range(0, len(wanted), step):
            some = wanted[start : start + step]
            means = self._stored.means[some].to(device)
            factors = self._factored([0] if self._kind.pooled else some, device)
            for own, generator in zip(features, generators, strict=True):
                noise = in_turn([self._kind.noise(k, per_class, self._dim, generator) for k in parts(len(some), chunk)])
                own[start : start + step] = self._kind.drawn(means, factors, tuple(part.to(device) for part in noise))
        labels = torch.tensor(wanted, dtype=torch.int64, device=device).repeat_interleave(per_class)
        return [own.flatten(0, 1) for own in features], labels

    # On disk

    def state_dict(self) -> dict[str, Tensor]:
        """Everything stored, as contiguous tensors: `counts` (int64), `means` and the covariances' (float32).

        The tensors are the memory's own, not copies: like those of a torch module they are for writing to a file.
        """
        return {"counts": self._stored.counts, "means": self._stored.means, **self._stored.held}

    def restored(self, state: dict[str, Tensor]) -> GaussianMemory:
        """The memory whose `state_dict` this is, with the settings of this one. Raises ResultError if it does not fit."""
        return self.from_state(state, self._asked, self._shrinkage)

    @classmethod
    def from_state(cls, state: dict[str, Tensor], covariance: Covariance, shrinkage: Shrinkage) -> GaussianMemory:
        """The memory whose `state_dict` this is, given the settings it was made with. Equal to it, bit for bit.

        The settings have no default here: a state does not tell how it was to be shrunk.

        Raises ResultError where names, types or shapes are not those of `covariance`.
        """
        if "means" not in state or state["means"].ndim != 2:
            raise ResultError(f"memory state with {sorted(state)}: 'means' (k x d) is missing")
        k, dim = state["means"].shape
        memory = cls(dim, covariance, shrinkage)
        if isinstance(covariance, Auto) and "U" in state:
            memory = memory._as(covariance.low_rank)
        expected = memory._room_for(k)
        wanted = {"counts": expected.counts, "means": expected.means, **expected.held}
        if state.keys() != wanted.keys():
            raise ResultError(f"memory state with {sorted(state)}: a {memory.kind.kind} memory has {sorted(wanted)}")
        for name, tensor in wanted.items():
            given = state[name]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise ResultError(
                    f"memory state '{name}' is {given.dtype} {tuple(given.shape)}: "
                    f"a {memory.kind.kind} memory has {tensor.dtype} {tuple(tensor.shape)}"
                )
        held = {name: state[name].cpu().contiguous() for name in expected.held}
        return memory._with(_Stored(state["counts"].cpu(), state["means"].cpu().contiguous(), held))

    # Inside

    def _known(self, c: int) -> int:
        if not 0 <= c < self.classes:
            raise IndexError(f"class {c} of a memory that holds classes 0 to {self.classes - 1}")
        return int(c)

    def _row(self, c: int) -> int:
        return 0 if self._kind.pooled else c

    def _weights(self, counts: Int[Tensor, " k"]) -> Int[Tensor, " rows"]:
        """Features behind each stored covariance."""
        return counts.sum()[None] if self._kind.pooled else counts

    def _room_for(self, k: int) -> _Stored:
        """A copy of what is stored, with empty rows up to k classes."""

        def grown(tensor: Tensor, rows: int) -> Tensor:
            return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])

        counts, means, held = self._stored
        rows = 1 if self._kind.pooled else k
        return _Stored(grown(counts, k), grown(means, k), {name: grown(tensor, rows) for name, tensor in held.items()})

    def _plus_moved(self, held: Held, stored: _Stored, A: Tensor, share: float) -> Held:
        """held + share A S A^T, S the covariance of all classes."""
        image = self._kind.moved(_row_of(stored, 0), _exact(A))
        if share > 1 - 1e-9:
            return image
        several = {name: tensor[None] for name, tensor in image.items()}
        return self._kind.plus(held, several, torch.tensor([share], dtype=torch.float64))

    def _place(self, stored: _Stored, row: int, held: Held, whose: str) -> None:
        for name, tensor in held.items():
            _write(stored.held[name], row, tensor, f"moved covariance of {whose}")

    def _factored(self, rows: list[int], device: torch.device) -> tuple[Tensor, ...]:
        """Factors of these covariances, stacked. Where those of all classes are beyond CACHE_BYTES and are triangles, they are
        kept, and drawn with, in half precision: half of what is stored."""

        def of(some: list[int]) -> tuple[Tensor, ...]:
            factors = self._kind.factors(*self._readable(some), self._dim, self._shrinkage)
            self.repaired |= {
                c: jitter for c, jitter in zip(some, self._kind.jitters(factors).tolist(), strict=True) if jitter
            }
            return tuple(tensor.to(device) for tensor in factors)

        def made() -> tuple[Tensor, ...]:
            step = max(1, CHUNK_VALUES // self._kind.factor_values(self._dim))
            return in_turn([of(rows[start : start + step]) for start in range(0, len(rows), step)])

        halved = self.halves_factors
        limit = max(CACHE_BYTES, self.bytes // 2 + 8 * self.classes) if halved else CACHE_BYTES
        return self._factors.of((tuple(rows), device), made, limit, halved=halved)

    @property
    def halves_factors(self) -> bool:
        """Whether draws are made with factors in half precision: full covariances whose factors are more than CACHE_BYTES."""
        return isinstance(self._kind, Full) and too_many(self.classes, self._dim)

    def _readable(self, rows: list[int]) -> tuple[Held, Int[Tensor, " rows"]]:
        """Stored covariances in float64 and the features behind each, with a stand-in where there is no scatter."""
        held = {name: tensor[rows].double() for name, tensor in self._stored.held.items()}
        n = self._weights(self._stored.counts)[rows]
        flat = ~self._scattered[rows]
        if flat.any():
            if self._scattered.any():
                instead, n[flat] = self._pooled
            else:
                instead, n[flat] = self._kind.isotropic(LONE_VARIANCE * self._energies[rows] / self._dim, self._dim), 1
            for name, tensor in instead.items():
                held[name][flat] = tensor
        return held, n

    @cached_property
    def _scattered(self) -> Bool[Tensor, " rows"]:
        return self._kind.trace(self._stored.held, self._dim).double() > FLAT * self._energies

    @cached_property
    def _energies(self) -> Float[Tensor, " rows"]:
        """|mean|^2 of the class behind each row, or the average over all classes; 1 where that is zero."""
        energies = (self.means**2).sum(1)
        energies = energies.mean()[None] if self._kind.pooled else energies
        return torch.where(energies > 0, energies, 1.0)

    @cached_property
    def _pooled(self) -> tuple[Held, int]:
        """sum_c n_c S_c / sum_c n_c over the classes with scatter, as their kind holds it, and sum_c n_c."""
        rows = self._scattered.nonzero()[:, 0]
        total = int(self._stored.counts[rows].sum())
        pooled = _blank(self._kind, self._dim)
        for chunk in rows.split(max(1, CHUNK_VALUES // self._kind.factor_values(self._dim))):
            others = {name: tensor[chunk].double() for name, tensor in self._stored.held.items()}
            pooled = self._kind.plus(pooled, others, self._stored.counts[chunk].double() / total)
        return pooled, total


def _blank(kind: Kind, d: int) -> Held:
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in kind.shapes(d).items()}


def _several(held: Held) -> Held:
    """Of one class, as of several."""
    return {name: tensor[None] for name, tensor in held.items()}


def _row_of(stored: _Stored, row: int) -> Held:
    return {name: tensor[row].double() for name, tensor in stored.held.items()}


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _refuse_not_finite(tensor: Tensor, name: str) -> None:
    if not tensor.isfinite().all():
        bad = int((~tensor.isfinite()).sum())
        raise NotFinite(f"{name}: {bad} of {tensor.numel()} values are not finite: compute them in float32 or float64")


def _write(stored: Tensor, row: int, value: Tensor, name: str) -> None:
    stored[row] = value
    _refuse_not_finite(stored[row], name)
