"""Kinds of covariance: what a memory stores of a class's scatter, and how it is read, moved and drawn from.

One contract. `shapes`: what is stored per class. `isotropic`: v I. `trace`: tr(S). `absorbed`: w S + B B^T, which is
what learning a batch amounts to. `plus`: S + sum_i shares_i S_i. `moved`: A S A^T. `covariance`: S after shrinkage,
written out. `factors`, `noise` and `drawn`: what draws need, the standard normals that they are made of, and the draws;
`factor_values`: numbers in one factor; `jitters`: what had to be added to a singular S before it had a factor, as a share of
its average variance. Arithmetic is float64; `isotropic`, `trace`, `factors`, `noise`, `drawn` and the second argument of
`plus` have several classes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from cairn.maths.gaussian import Halved, cholesky_repaired, leading, low_rank, low_rank_placed, placed
from cairn.maths.shrinkage import Shrinkage
from cairn.settings import Given

Held: TypeAlias = dict[str, Tensor]
"""What a kind of covariance stores, by name: of one class, or with a leading dimension, of several."""

Noise: TypeAlias = tuple[Float[Tensor, "k n _"], ...]
"""Standard normals, n rows for each of k classes; drawing overwrites them."""


class _Dense(Given):
    """S itself, as its lower triangle row by row: `lower`, d (d + 1) / 2 values."""

    pooled: ClassVar[bool]

    def shapes(self, d: int) -> dict[str, tuple[int, ...]]:
        return {"lower": (d * (d + 1) // 2,)}

    def isotropic(self, v: Float[Tensor, " k"], d: int) -> Held:
        return {"lower": torch.outer(v, _packed(torch.eye(d, dtype=v.dtype)))}

    def trace(self, held: Held, d: int) -> Float[Tensor, " k"]:
        i = torch.arange(d)
        return held["lower"][:, i * (i + 3) // 2].sum(-1)

    def absorbed(self, held: Held, w: float, B: Float[Tensor, "d m"]) -> Held:
        return {"lower": w * held["lower"] + _packed(B @ B.T)}

    def plus(self, held: Held, others: Held, shares: Float[Tensor, " k"]) -> Held:
        return {"lower": held["lower"] + shares @ others["lower"]}

    def moved(self, held: Held, A: Float[Tensor, "d d"]) -> Held:
        return {"lower": _packed(A @ _unpacked(held["lower"], len(A)) @ A.T)}

    def covariance(self, held: Held, n: int, d: int, shrinkage: Shrinkage) -> Float[Tensor, "d d"]:
        return shrinkage(_unpacked(held["lower"], d), n)

    def factor_values(self, d: int) -> int:
        return d * d

    def factors(self, held: Held, n: Int[Tensor, " k"], d: int, shrinkage: Shrinkage) -> tuple[Tensor, ...]:
        factors, jitters = torch.empty(len(n), d, d), torch.zeros(len(n))
        for i, count in enumerate(n.tolist()):
            factors[i], jitters[i] = cholesky_repaired(
                self.covariance({"lower": held["lower"][i]}, count, d, shrinkage)
            )
        return factors, jitters

    def jitters(self, factors: tuple[Tensor, ...]) -> Float[Tensor, " k"]:
        return factors[1]

    def noise(self, k: int, n: int, d: int, generator: torch.Generator) -> Noise:
        return (_normals(k, n, d, generator),)

    def drawn(self, means: Float[Tensor, "k d"], factors: tuple[Tensor, ...], noise: Noise) -> Float[Tensor, "k n d"]:
        # One matrix for all classes goes in as such: with a leading 1 it would be copied for every class
        return placed(means, factors[0][0] if self.pooled else factors[0], noise[0])


class Full(_Dense):
    """A full covariance per class. Exact under merging and moving; 2 d (d + 1) bytes per class."""

    kind: Literal["full"] = Field(default="full", description="a full covariance for every class")
    pooled: ClassVar[bool] = False


class Shared(_Dense):
    """One covariance for all classes: the within-class scatter, S = sum_c n_c S_c / sum_c n_c. Exact under merging.

    It is shrunk as an estimate from sum_c n_c samples. Under one map per class it becomes
    sum_c n_c A_c S A_c^T / sum_c n_c: what the pooled scatter would be had every class the scatter S. 2 d (d + 1) bytes
    in all.
    """

    kind: Literal["shared"] = Field(default="shared", description="one covariance pooled over all classes")
    pooled: ClassVar[bool] = True


class Diagonal(Given):
    """Variances only; `variances`, 4 d bytes per class. Exact under merging.

    A map acts on the diagonal covariance, and of A S A^T the diagonal is kept: exact for diagonal maps.
    """

    kind: Literal["diagonal"] = Field(default="diagonal", description="only the variances of every class")
    pooled: ClassVar[bool] = False

    def shapes(self, d: int) -> dict[str, tuple[int, ...]]:
        return {"variances": (d,)}

    def isotropic(self, v: Float[Tensor, " k"], d: int) -> Held:
        return {"variances": v[:, None].repeat(1, d)}

    def trace(self, held: Held, d: int) -> Float[Tensor, " k"]:
        return held["variances"].sum(-1)

    def absorbed(self, held: Held, w: float, B: Float[Tensor, "d m"]) -> Held:
        return {"variances": w * held["variances"] + (B * B).sum(1)}

    def plus(self, held: Held, others: Held, shares: Float[Tensor, " k"]) -> Held:
        return {"variances": held["variances"] + shares @ others["variances"]}

    def moved(self, held: Held, A: Float[Tensor, "d d"]) -> Held:
        return {"variances": (A * A) @ held["variances"]}

    def covariance(self, held: Held, n: int, d: int, shrinkage: Shrinkage) -> Float[Tensor, "d d"]:
        return shrinkage.diagonal(held["variances"], n).diag()

    def factor_values(self, d: int) -> int:
        return d

    def factors(self, held: Held, n: Int[Tensor, " k"], d: int, shrinkage: Shrinkage) -> tuple[Tensor, ...]:
        return (shrinkage.diagonal(held["variances"], n).sqrt().float(),)

    def jitters(self, factors: tuple[Tensor, ...]) -> Float[Tensor, " k"]:
        return torch.zeros(len(factors[0]))

    def noise(self, k: int, n: int, d: int, generator: torch.Generator) -> Noise:
        return (_normals(k, n, d, generator),)

    def drawn(self, means: Float[Tensor, "k d"], factors: tuple[Tensor, ...], noise: Noise) -> Float[Tensor, "k n d"]:
        return noise[0].mul_(factors[0][:, None, :]).add_(means[:, None, :])


class LowRank(Given):
    """S = U diag(lam) U^T + diag(rest), U of `rank` orthonormal columns; 4 (d rank + rank + d) bytes per class.

    Approximate. Learning a batch keeps the leading eigenpairs of the updated low-rank part and puts the diagonal of the
    others into `rest`: variances stay exact, covariances do while a class was seen in fewer than `rank` directions
    (n <= rank for one batch). Under a map the low-rank part moves exactly, U diag(lam) U^T -> A U diag(lam) U^T A^T
    (decomposed again), and of A diag(rest) A^T the diagonal is kept.
    """

    kind: Literal["low_rank"] = Field(default="low_rank", description="leading directions plus variances, per class")
    rank: int = Field(default=32, ge=1, description="directions kept per class (at most the width)")
    pooled: ClassVar[bool] = False

    def shapes(self, d: int) -> dict[str, tuple[int, ...]]:
        r = min(self.rank, d)
        return {"U": (d, r), "lam": (r,), "rest": (d,)}

    def isotropic(self, v: Float[Tensor, " k"], d: int) -> Held:
        blank = {name: v.new_zeros(len(v), *shape) for name, shape in self.shapes(d).items()}
        return blank | {"rest": v[:, None].repeat(1, d)}

    def trace(self, held: Held, d: int) -> Float[Tensor, " k"]:
        return held["lam"].sum(-1) + held["rest"].sum(-1)

    def absorbed(self, held: Held, w: float, B: Float[Tensor, "d m"]) -> Held:
        return self._decomposed(torch.cat([w**0.5 * self._root(held), B], 1), w * held["rest"])

    def plus(self, held: Held, others: Held, shares: Float[Tensor, " k"]) -> Held:
        roots = others["U"] * (shares[:, None] * others["lam"]).sqrt()[:, None, :]
        B = torch.cat([self._root(held), roots.movedim(0, 1).flatten(1)], 1)
        return self._decomposed(B, held["rest"] + shares @ others["rest"])

    def moved(self, held: Held, A: Float[Tensor, "d d"]) -> Held:
        return self._decomposed(A @ self._root(held), (A * A) @ held["rest"])

    def covariance(self, held: Held, n: int, d: int, shrinkage: Shrinkage) -> Float[Tensor, "d d"]:
        one = {name: tensor[None] for name, tensor in held.items()}
        a, b = self._scales(one, torch.tensor([n]), d, shrinkage)
        root = self._root(held)
        return a * (root @ root.T) + (a * held["rest"] + b).diag()

    def factor_values(self, d: int) -> int:
        return d * min(self.rank, d)

    def factors(self, held: Held, n: Int[Tensor, " k"], d: int, shrinkage: Shrinkage) -> tuple[Tensor, ...]:
        a, b = self._scales(held, n, d, shrinkage)
        lam, rest = a[:, None] * held["lam"], a[:, None] * held["rest"] + b[:, None]
        return held["U"].float(), lam.float(), rest.float()

    def jitters(self, factors: tuple[Tensor, ...]) -> Float[Tensor, " k"]:
        return torch.zeros(len(factors[0]))

    def noise(self, k: int, n: int, d: int, generator: torch.Generator) -> Noise:
        return _normals(k, n, d, generator), _normals(k, n, min(self.rank, d), generator)

    def drawn(self, means: Float[Tensor, "k d"], factors: tuple[Tensor, ...], noise: Noise) -> Float[Tensor, "k n d"]:
        U, lam, rest = factors
        wide, narrow = noise
        return low_rank_placed(means, U, lam, rest, narrow, wide)

    def _root(self, held: Held) -> Float[Tensor, "d r"]:
        return held["U"] * held["lam"].sqrt()

    def _decomposed(self, B: Float[Tensor, "d m"], diag: Float[Tensor, " d"]) -> Held:
        U, lam, rest = low_rank(B, diag, min(self.rank, len(diag)))
        return {"U": U, "lam": lam, "rest": rest}

    def _scales(
        self, held: Held, n: Int[Tensor, " k"], d: int, shrinkage: Shrinkage
    ) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        # tr(S S) for orthonormal U: |lam|^2 + 2 sum_ri lam_r U_ir^2 rest_i + |rest|^2
        mixed = torch.einsum("kdr,kdr,kd,kr->k", held["U"], held["U"], held["rest"], held["lam"])
        square = (held["lam"] ** 2).sum(-1) + 2 * mixed + (held["rest"] ** 2).sum(-1)
        return shrinkage.scales(self.trace(held, d), square, n, d)


class Auto(Given):
    """Full while its factors are few (`CACHE_BYTES` of gaussians.py: 1,024 classes of 512 numbers), low rank from there on.

    Going over, S keeps its variances and its `rank` leading eigenpairs, nearly (see `leading`).
    """

    kind: Literal["auto"] = Field(default="auto", description="full, and low_rank where classes are very many")
    rank: int = Field(default=32, ge=1, description="directions kept per class once they are (at most the width)")
    pooled: ClassVar[bool] = False

    @property
    def low_rank(self) -> LowRank:
        return LowRank(rank=self.rank)

    def lowered(self, held: Held, d: int) -> Held:
        """A full covariance, written as one of low rank."""
        S, r = _unpacked(held["lower"], d), min(self.rank, d)
        U, lam = leading(S, r)
        return {"U": U, "lam": lam, "rest": (S.diagonal() - U**2 @ lam).clamp_min(0)}


Kind: TypeAlias = Full | LowRank | Diagonal | Shared
"""What is stored."""

Covariance: TypeAlias = Annotated[Auto | Full | LowRank | Diagonal | Shared, Field(discriminator="kind")]
"""What is asked for."""


def parts(k: int, size: int) -> list[int]:
    """k as parts of this size, the last of them smaller."""
    return [min(size, k - start) for start in range(0, k, size)]


def in_turn(of_parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Factors or noise of some classes after those of others."""
    return of_parts[0] if len(of_parts) == 1 else tuple(map(torch.cat, zip(*of_parts, strict=True)))


def _normals(k: int, n: int, width: int, generator: torch.Generator) -> Float[Tensor, "k n {width}"]:
    return torch.randn(k, n, width, generator=generator, device=generator.device)


@lru_cache(maxsize=4)
def _triangle(d: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(d, d)
    return rows, columns


def _packed(S: Float[Tensor, "d d"]) -> Float[Tensor, " t"]:
    return S[_triangle(S.shape[-1])]


def _unpacked(lower: Float[Tensor, " t"], d: int) -> Float[Tensor, "d d"]:
    rows, columns = _triangle(d)
    S = lower.new_empty(d, d)
    S[rows, columns] = lower
    S[columns, rows] = lower
    return S


Factors = tuple[Tensor, ...]
"""As the kind of covariance makes them, stacked: of a full one the triangles and what was added to each."""

Key = tuple[tuple[int, ...], torch.device]


class KeptFactors:
    """Up to `limit` bytes; what is beyond is made again for every draw. With `halved`, triangles are kept in half precision."""

    def __init__(self):
        self._kept: dict[Key, tuple[Factors, Halved | None]] = {}
        self._bytes = 0

    def of(self, key: Key, make: Callable[[], Factors], limit: int, *, halved: bool) -> Factors:
        """Those of `key`, which `make` makes. Whether they were kept or not changes nothing in them."""
        if key not in self._kept:
            factors, small = make(), None
            if halved:
                small, factors = Halved.of(factors[0]), factors[1:]
            size = sum(tensor.nbytes for tensor in (*factors, *(small or ())))
            if self._bytes + size > limit:
                return factors if small is None else (small.whole(), *factors)
            self._kept[key] = factors, small
            self._bytes += size
        factors, small = self._kept[key]
        return factors if small is None else (small.whole(), *factors)
