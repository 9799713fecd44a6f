"""What a method may ask of a memory of old classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cairn.maths.gaussian import AffineMap
from cairn.types import Features, Labels


@runtime_checkable
class ClassMemory(Protocol):
    """Classes 0..k-1 in order of arrival, without their images. Immutable: what changes it returns another one."""

    @property
    def dim(self) -> int:
        """Width d of the features."""
        ...

    @property
    def classes(self) -> int:
        """Number k of classes held."""
        ...

    @property
    def counts(self) -> Int[Tensor, " k"]:
        """Images each class was learned from."""
        ...

    @property
    def means(self) -> Float[Tensor, "k d"]:
        """Class means, float64."""
        ...

    @property
    def bytes(self) -> int:
        """What is stored between tasks: the figure to declare."""
        ...

    def draw(
        self, per_class: int, generator: torch.Generator, classes: Sequence[int] | None = None
    ) -> tuple[Features, Labels]:
        """`per_class` pseudo-features of each of `classes` (all of them if None), grouped by class."""
        ...

    def draws(
        self, per_class: int, generators: Sequence[torch.Generator], classes: Sequence[int] | None = None
    ) -> tuple[list[Features], Labels]:
        """The same for several generators at once."""
        ...

    def moved(self, maps: AffineMap | Sequence[AffineMap]) -> ClassMemory:
        """With every class carried along by its affine map, or all by the same."""
        ...

    def without(self, c: int) -> ClassMemory:
        """With class c gone and later classes one number lower."""
        ...

    def tell_repairs(self, log: Callable[..., object]) -> None:
        """A warning through `log`, if what is held had to be repaired before it could be drawn from."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What is stored, as a flat dictionary of contiguous tensors."""
        ...

    def restored(self, state: dict[str, Tensor]) -> ClassMemory:
        """The memory whose `state_dict` this is, with the settings of this one. Raises ResultError if it does not fit."""
        ...


@runtime_checkable
class WithScatter(ClassMemory, Protocol):
    """A memory that knows how its classes scatter."""

    @property
    def scatter(self) -> Float[Tensor, "d d"]:
        """sum_c sum (z - mean_c)(z - mean_c)^T over the features z that classes were learned from, float64."""
        ...
