"""Do new images still look like those that a class was learned from? What a comparison tells. No torch, no images.

Two things are told, each with a test at LEVEL:

- the share of images whose known score is below BELOW. If nothing has changed it is BELOW, as far as references tell: of n
  images the number below the r-th of m references is beta-binomial, n with Beta(r, m + 1 - r). References that weigh less
  with age count as m = (sum w)^2 / sum w^2; r is BELOW m, rounded up.
- for each class, how far the mean of its images has moved from that learned (`cairn.maths.mean_shift`), p-values times the
  number of classes (Bonferroni).

Of images without labels a class's are those that are predicted as it. Those that are taken for another are missing then, and
others are among them: where much is confused the second test finds drift more often than LEVEL says.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from cairn.classifier.estimate import Z
from cairn.storage.schema import Amount, Count, Record, Share

BELOW, LEVEL = 0.05, 0.01


class ClassShift(Record):
    """How far the mean of a class's images is from that learned, in the classes' own metric."""

    name: str
    images: Count
    shift: Amount
    by_chance: Amount = Field(description="root of its mean square where nothing has moved")
    p: Share = Field(description="of Dempster's test, see cairn.maths.mean_shift")


class Drift(Record):
    """What new images tell."""

    images: Annotated[Count, Field(gt=0)]
    below: Count = Field(description="those with a known score below .05")
    p_below: Share = Field(description="of so many or more, if nothing has changed")
    shifts: list[ClassShift] = Field(default=[], description="of classes with five images at least")

    @property
    def share(self) -> float:
        return self.below / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """That of the share, Wilson's, 95 %."""
        n, a = self.images, self.share
        middle, half = a + Z**2 / (2 * n), Z * math.sqrt(a * (1 - a) / n + Z**2 / (4 * n**2))
        low, high = ((middle + sign * half) / (1 + Z**2 / n) for sign in (-1, 1))
        return max(0.0, low), min(1.0, high)

    @property
    def shifted(self) -> list[ClassShift]:
        """Classes whose means have moved, the surest first."""
        return sorted((one for one in self.shifts if one.p * len(self.shifts) < LEVEL), key=lambda one: one.p)

    @property
    def drifted(self) -> bool:
        return self.p_below < LEVEL or bool(self.shifted)

    @property
    def told(self) -> str:
        """In a few words, without the names of classes."""
        moved = f", {len(self.shifted)} of {len(self.shifts)} classes shifted" if self.shifts else ""
        return f"{100 * self.share:.0f} % of {self.images:,} below {BELOW:g}{moved}"
