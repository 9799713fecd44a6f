"""What a method may ask of a memory of old classes, and labelled features as a memory takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cairn.errors import DataError
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
        self,
        per_class: int,
        generators: Sequence[torch.Generator],
        classes: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> tuple[list[Features], Labels]:
        """The same for several generators at once; on `device`, if one is given, from the same random numbers."""
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


def rows_by_class(features: Features, labels: Labels, dim: int, classes: int) -> dict[int, Int[Tensor, " m"]]:
    """The rows of each class present, in order, for a memory of width `dim` that holds `classes` of them.

    Raises DataError where shapes disagree or new labels leave a gap.
    """
    if features.ndim != 2 or features.shape[1] != dim or labels.shape != features.shape[:1]:
        raise DataError(
            f"features {tuple(features.shape)} with labels {tuple(labels.shape)}: "
            f"a memory of width {dim} takes (n, {dim}) and (n,)"
        )
    # Sorted once: a mask per class would be quadratic in the number of classes
    labels = labels.detach().cpu()
    seen, sizes = labels.unique(return_counts=True)
    numbers = seen.tolist()
    if numbers and (numbers[0] < 0 or not {*range(classes, numbers[-1] + 1)} <= {*numbers}):
        raise DataError(
            f"labels {numbers[:8]}: classes are numbered in order of arrival, "
            f"so after {classes} classes the new ones start at {classes} and leave no gap"
        )
    rows = torch.argsort(labels, stable=True).split(sizes.tolist()) if numbers else ()
    return dict(zip(numbers, rows, strict=True))
