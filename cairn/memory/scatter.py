"""Count, mean and scatter of each class, the scatter as a factor of few rows: statistics of which everything is a sum.

Letters: n_c, m_c, A_c = sum (x - m_c)(x - m_c)^T of class c, d wide; A_c = F_c^T F_c + rest_c, where F_c holds the r largest
principal axes of the class, times the root of the scatter along them. Of the rests their sum and each one's trace are kept.

    merge   A = A_1 + A_2 + n_1 n_2 / (n_1 + n_2) (m_1 - m_2)(m_1 - m_2)^T, n = n_1 + n_2, m = (n_1 m_1 + n_2 m_2) / n

A factor spans what its images span, and turned to principal axes no row of it is one of them. While no class has more than
r + 1 images nothing is cut off: what is held then does not depend on how images came, and without a class it is what it would
be had the class never been learned.

Source: the merge by Chan, Golub and LeVeque 1979, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cairn.errors import DataError, NotFinite, ResultError
from cairn.maths.gaussian import AffineMap, cholesky_repaired
from cairn.maths.quadratic_discriminant import ScatterStatistics
from cairn.maths.rows import merged, without
from cairn.memory.protocol import rows_by_class
from cairn.types import Features, Labels

Precision = Literal["float16", "float32", "float64"]

FOREIGN = 0.02
"""What factors in float16 lack of the rows that they are of, at most, as a share: rows that leave more were not learned."""

FLAT = 1e-13
"""Principal axes with less than this share of the largest scatter are rounding."""


class ScatterMemory:
    """Statistics of classes 0..k-1 in order of arrival. Immutable: what changes it returns another one.

    At most `rank` axes of a class are kept (None: all), in `precision`; means and the rest in float32, or in float64 with it.
    `add` takes everything in whole, in float64; `stored` rounds and cuts it to what is kept.
    """

    def __init__(self, dim: int, rank: int | None = None, precision: Precision = "float32"):
        self._set(
            dim, rank, precision, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dim).double(), [], torch.zeros(0).double(),
            None,
        )  # fmt: skip

    def _set(
        self,
        dim: int,
        rank: int | None,
        precision: Precision,
        counts: Int[Tensor, " k"],
        means: Float[Tensor, "k d"],
        factors: list[Tensor],
        cut: Float[Tensor, " k"],
        rest: Float[Tensor, "d d"] | None,
    ) -> None:
        self._dim, self._rank = dim, rank
        self._precision: Precision = precision
        self._counts, self._means, self._factors, self._cut, self._rest = counts, means, factors, cut, rest

    def _with(
        self, counts: Tensor, means: Tensor, factors: list[Tensor], cut: Tensor, rest: Tensor | None
    ) -> ScatterMemory:
        other = object.__new__(type(self))
        other._set(self._dim, self._rank, self._precision, counts, means, factors, cut, rest)
        return other

    # What is held

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def classes(self) -> int:
        return len(self._counts)

    @property
    def counts(self) -> Int[Tensor, " k"]:
        """Images each class was learned from."""
        return self._counts.clone()

    @property
    def means(self) -> Float[Tensor, "k d"]:
        return self._means.double()

    @cached_property
    def scatter(self) -> Float[Tensor, "d d"]:
        """A = sum_c A_c, float64."""
        A = torch.zeros(self._dim, self._dim, dtype=torch.float64)
        for F in self._factors:
            A += F.double().T @ F.double()
        return A if self._rest is None else A + self._rest.double()

    @property
    def statistics(self) -> ScatterStatistics:
        factors = [F.double() for F in self._factors]
        return ScatterStatistics(self._counts.double(), self.means, factors, self._cut.double(), self.scatter)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    # What changes it

    def add(self, features: Features, labels: Labels) -> ScatterMemory:
        """With these rows learned, whole: new classes appended, known ones merged. Raises DataError where shapes disagree or
        new labels leave a gap, NotFinite naming the class."""
        arrived, x = (
            rows_by_class(features, labels, self._dim, self.classes),
            features.detach().to("cpu", torch.float64),
        )
        more = max([self.classes, *(c + 1 for c in arrived)]) - self.classes
        counts = torch.cat([self._counts, self._counts.new_zeros(more)])
        means = torch.cat([self.means, torch.zeros(more, self._dim, dtype=torch.float64)])
        cut = torch.cat([self._cut.double(), torch.zeros(more, dtype=torch.float64)])
        factors = [*self._factors, *[torch.zeros(0, self._dim, dtype=torch.float64)] * more]
        for c, index in arrived.items():
            own = x[index]
            if not own.isfinite().all():
                raise NotFinite(f"features of class {c}: not all are finite; compute them in float32 or float64")
            n, m, mean = int(counts[c]), len(own), own.mean(0)
            gap = mean - means[c]
            bridge = math.sqrt(n * m / (n + m)) * gap
            factors[c] = principal_axes(torch.cat([factors[c].double(), own - mean, bridge[None]]))
            means[c] += m / (n + m) * gap
            counts[c] += m
        return self._with(counts, means, factors, cut, self._rest)

    def stored(self) -> ScatterMemory:
        """As it is kept and saved: cut to `rank` axes, rounded."""
        fine = torch.float64 if self._precision == "float64" else torch.float32
        coarse = getattr(torch, self._precision)
        factors, cut = [], self._cut.double().clone()
        rest = None if self._rest is None else self._rest.double().clone()
        for c, F in enumerate(self._factors):
            kept = F if self._rank is None else F[: self._rank]
            kept = kept.to(coarse)
            if len(kept) < len(F):
                lost = F.double().T @ F.double() - kept.double().T @ kept.double()
                rest = lost if rest is None else rest + lost
                cut[c] += lost.trace()
            factors.append(kept)
        rest = None if rest is None else ((rest + rest.T) / 2).to(fine)
        return self._with(self._counts, self._means.to(fine), factors, cut.to(fine), rest)

    def without_rows(self, features: Features, labels: Labels) -> ScatterMemory:
        """As if these rows had not been learned; a class of which none is left stays with count 0.

        A_c loses B^T B, B the rows less their mean and one more for the shift of the mean. What of that a factor's axes do not
        span, and what they have not enough of, is taken from the rest: the sum of all classes stays exact, to rounding, whatever
        was cut off, and a class's own scatter does where nothing was. Raises DataError for rows that were not learned.
        """
        left = rows_by_class(features, labels, self._dim, self.classes)
        x = features.detach().to("cpu", torch.float64)
        counts, means, cut = self._counts.clone(), self.means.clone(), self._cut.double().clone()
        factors, rest = list(self._factors), None if self._rest is None else self._rest.double().clone()
        for c, index in left.items():
            own, F = x[index], factors[c].double()
            n, m, mean = int(counts[c]), len(own), own.mean(0)
            if m > n:
                raise DataError(f"class {c}: {m} rows to take out of {n} that were learned")
            means[c] = means[c] - m / (n - m) * (mean - means[c]) if n > m else 0.0
            counts[c] -= m
            B = torch.cat([own - mean, math.sqrt((n - m) * m / n) * (mean - means[c])[None]])
            kept, over = _reduced(F, B, max(0, n - m - 1))
            if cut[c] > 0 and rest is not None:
                rest += over
                cut[c] = (cut[c] + over.trace()).clamp(min=0) if n - m > 1 else 0.0
            elif over.norm() > FOREIGN * max((F.T @ F).norm(), 1e-6 * own.square().sum()):
                raise DataError(f"class {c}: rows that were not learned cannot be taken out")
            factors[c] = kept
        return self._with(counts, means, factors, cut, rest).stored()

    def merged(self, c: int, other: int) -> ScatterMemory:
        """With class `other` gone into class c < other, as if its rows had been learned as c's; later classes one number lower."""
        n, m, means = int(self._counts[c]), int(self._counts[other]), self.means.clone()
        gap = means[other] - means[c]
        bridge = math.sqrt(n * m / (n + m)) * gap
        means[c] += m / (n + m) * gap
        factors = list(self._factors)
        factors[c] = principal_axes(torch.cat([factors[c].double(), factors[other].double(), bridge[None]]))
        del factors[other]
        counts, cut = merged(self._counts, c, other), merged(self._cut.double(), c, other)
        return self._with(counts, without(means, other), factors, cut, self._rest).stored()

    def without(self, c: int) -> ScatterMemory:
        """With class c gone and later classes one number lower. Of what was cut off its share of the sum goes: only if nothing
        was is all of it gone."""
        cut = self._cut.double()
        rest = self._rest
        if rest is not None:
            share = 1 - float(cut[c] / cut.sum().clamp(min=1e-300))
            rest = (rest.double() * share).to(rest.dtype) if share > 0 else None
        factors = [F for i, F in enumerate(self._factors) if i != c]
        return self._with(without(self._counts, c), without(self._means, c), factors, without(self._cut, c), rest)

    def moved(self, maps: AffineMap | Sequence[AffineMap]) -> ScatterMemory:
        """With class c carried along by x -> A_c x + b_c. What was cut off is moved by the mean of the maps' matrices."""
        each = (
            [maps] * self.classes if isinstance(maps, AffineMap) and maps.A.ndim == 2 else [AffineMap(*m) for m in maps]
        )
        if len(each) != self.classes:
            raise ValueError(f"{len(each)} maps for {self.classes} classes")
        means = torch.stack([A.double() @ m + b.double() for (A, b), m in zip(each, self.means, strict=True)])
        factors = [F.double() @ A.double().T for (A, _), F in zip(each, self._factors, strict=True)]
        rest = self._rest
        if rest is not None:
            A = torch.stack([A.double() for A, _ in each]).mean(0)
            rest = A @ rest.double() @ A.T
        return self._with(self._counts, means, factors, self._cut, rest).stored()

    # What it is for

    def draw(
        self, per_class: int, generator: torch.Generator, classes: Sequence[int] | None = None
    ) -> tuple[Features, Labels]:
        """`per_class` rows of each of `classes` (all of them if None) from N(m_c, (d S + A_c) / (d + n_c)), grouped by class; S
        is the common covariance, shrunk."""
        (drawn,), labels = self.draws(per_class, [generator], classes)
        return drawn, labels

    def draws(
        self,
        per_class: int,
        generators: Sequence[torch.Generator],
        classes: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> tuple[list[Features], Labels]:
        wanted = list(range(self.classes) if classes is None else classes)
        source, d = generators[0].device, self._dim
        found: list[list[Tensor]] = [[] for _ in generators]
        for c in wanted:
            F, n = self._factors[c].float().to(source), int(self._counts[c])
            mean, common = self._means[c].float().to(source), self._common.to(source)
            for rows, rng in zip(found, generators, strict=True):
                wide = torch.randn(per_class, d, generator=rng, device=source) @ common.T * math.sqrt(d / (d + n))
                own = torch.randn(per_class, len(F), generator=rng, device=source) @ F / math.sqrt(d + n)
                rows.append(mean + wide + own)
        labels = torch.tensor(wanted, dtype=torch.int64).repeat_interleave(per_class).to(device or source)
        return [(torch.cat(rows) if rows else torch.zeros(0, d)).to(device or source) for rows in found], labels

    @cached_property
    def _common(self) -> Float[Tensor, "d d"]:
        """A factor L of S = L L^T."""
        N = max(1, int((self._counts - 1).sum()))
        rho, A = self._dim / (N + self._dim), self.scatter / N
        return cholesky_repaired((1 - rho) * A + rho * A.trace() / self._dim * torch.eye(self._dim).double())[0].float()

    def tell_repairs(self, log: Callable[..., object]) -> None:
        """Nothing is ever repaired: S is shrunk."""

    # On disk

    def state_dict(self) -> dict[str, Tensor]:
        held = self.stored()
        sizes = torch.tensor([len(F) for F in held._factors], dtype=torch.int64)
        coarse = getattr(torch, self._precision)
        factors = torch.cat(held._factors) if held._factors else torch.zeros(0, self._dim, dtype=coarse)
        state = {"counts": held._counts, "means": held._means, "sizes": sizes, "factors": factors, "cut": held._cut}
        if held._rest is not None:
            i, j = torch.tril_indices(self._dim, self._dim)
            state["rest"] = held._rest[i, j]
        return state

    def restored(self, state: dict[str, Tensor]) -> ScatterMemory:
        """The memory whose `state_dict` this is, with the settings of this one. Raises ResultError if it does not fit."""
        missing = {"counts", "means", "sizes", "factors", "cut"} - state.keys()
        k, d = len(state.get("counts", ())), self._dim
        if missing or state["means"].shape != (k, d) or state["factors"].shape != (int(state["sizes"].sum()), d):
            raise ResultError(f"memory state with {sorted(state)}: does not hold statistics of width {d}")
        rest = None
        if "rest" in state:
            if state["rest"].shape != (d * (d + 1) // 2,):
                raise ResultError(f"memory state 'rest' {tuple(state['rest'].shape)}: no triangle of width {d}")
            i, j = torch.tril_indices(d, d)
            rest = state["rest"].new_zeros(d, d)
            rest[i, j] = state["rest"]
            rest[j, i] = state["rest"]
        factors = list(state["factors"].split(state["sizes"].tolist()))
        return self._with(state["counts"], state["means"], factors, state["cut"], rest)


def _reduced(
    F: Float[Tensor, "r d"], B: Float[Tensor, "b d"], most: int
) -> tuple[Float[Tensor, "q d"], Float[Tensor, "d d"]]:
    """At most `most` principal axes of what is positive of F^T F - B^T B in the span of F, and what of the difference they lack."""
    Q = torch.linalg.qr(F.T)[0]
    own, out = F @ Q, B @ Q
    values, U = torch.linalg.eigh(own.T @ own - out.T @ out)
    kept = (values > FLAT * own.square().sum()).nonzero()[:, 0].flip(0)[:most]
    axes = values[kept].sqrt()[:, None] * (Q @ U[:, kept]).T
    return axes, F.T @ F - B.T @ B - axes.T @ axes


def principal_axes(rows: Float[Tensor, "n d"]) -> Float[Tensor, "r d"]:
    """F with F^T F = rows^T rows, its rows orthogonal, the longest first; axes without scatter are left out."""
    if len(rows) <= rows.shape[1]:
        values, U = torch.linalg.eigh(rows @ rows.T)
        F = U.T @ rows
    else:
        values, U = torch.linalg.eigh(rows.T @ rows)
        F = values.clamp(min=0).sqrt()[:, None] * U.T
    return F[values > FLAT * values.amax().clamp(min=1e-300)].flip(0) if len(values) else F
