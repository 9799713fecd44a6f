"""How many new pictures a learner classifies correctly, estimated from pictures that it learned from. No torch, no images.

Letters: M expected counts of left-out images (k x k), row the class, column the class that they are taken for; n_c sum of row c;
a_c = M_cc / n_c estimated accuracy of class c.

A task's own images are scored among all classes seen as if they had not been learned, and are counted. Classes come later
among which the images of class c were not scored, and none of its images is there any more. What c loses to the classes J
that are new is estimated twice:

    by symmetry   r_c = 1 - sum_{j in J} M_jc / n_j        as often as j is taken for c, c is taken for j
    by draws      r_c = p_c / q_c                          shares of draws from what the method keeps of c that are classified
                                                           correctly after (p) and before (q) the task

and a_c becomes a_c times the mean of both, symmetry alone where a method keeps nothing to draw from. Symmetry takes a little
too much, draws too little: they lie where the class was learned. Half their difference is kept as the doubt of a_c, of
symmetry alone half of what it takes: the true one may lie anywhere between.

The accuracy is the mean of a_c over classes, so that each counts the same; its interval holds the true one in about 95 of 100
cases, from the binomial variance of each class's count (with Laplace's rule for a_c) and that of the mean doubt, a third of
its square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from cairn.storage.schema import Amount, Count, Record, Share

Source = Literal["left out one by one", "left out in five parts", "a fifth left out"]
"""How images came to be scored as if they had not been learned."""

Z = 1.96
"""Of a normal distribution 95 % lie within so many deviations."""

LEAST_DRAWN = 0.05
"""q_c at least: a ratio to less says nothing."""

SMALL = 1e-3
"""Of an image: less is not kept."""

FEWEST = 10
"""With fewer pictures a class is short of them whatever the others have: an accuracy is known to 30 points then."""


class ConfusedPair(NamedTuple):
    """Two classes that are taken for one another."""

    a: int
    b: int
    a_as_b: float
    """Images of a that are taken for b; expected ones have fractions."""
    b_as_a: float

    @property
    def images(self) -> float:
        return self.a_as_b + self.b_as_a


class AccuracyEstimate(Record):
    """M in its sparse form, and what goes with it. Immutable: every change returns another."""

    confusions: list[tuple[Count, Count, Annotated[Amount, Field(gt=0)]]] = Field(
        default=[], description="class, class that it is taken for, expected number of left-out images"
    )
    doubt: list[Share] = Field(default=[], description="of each class, how far a_c may be off beyond chance")
    before: list[Share | None] = Field(
        default=[], description="a_c of the classes known before the last task, as it was by then"
    )
    sources: dict[Source, Count] = Field(default={}, description="images that were left out, by how")

    @model_validator(mode="after")
    def _fits_together(self) -> AccuracyEstimate:
        if any(max(c, taken) >= len(self.doubt) for c, taken, _ in self.confusions):
            raise ValueError(f"confusions: of a class beyond the {len(self.doubt)} there are")
        if len(self.before) > len(self.doubt):
            raise ValueError(f"before: of {len(self.before)} classes, where there are {len(self.doubt)}")
        return self

    @property
    def matrix(self) -> np.ndarray:
        """M, (k, k)."""
        M = np.zeros((len(self.doubt),) * 2)
        for c, taken, images in self.confusions:
            M[c, taken] = images
        return M

    @property
    def images(self) -> np.ndarray:
        """n_c, (k,)."""
        return self.matrix.sum(1)

    @property
    def by_class(self) -> np.ndarray:
        """a_c, (k,); NaN for a class of which no image was left out."""
        return _shares(self.matrix)

    @property
    def accuracy(self) -> float | None:
        """Mean of a_c; None before any image was left out."""
        found = self.by_class
        return float(np.nanmean(found)) if np.isfinite(found).any() else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """That of the accuracy, in [0, 1]."""
        if (accuracy := self.accuracy) is None:
            return None
        M = self.matrix
        n, hits, known = M.sum(1), M.diagonal(), M.sum(1) > 0
        a = (hits[known] + 1) / (n[known] + 2)
        variance = (a * (1 - a) / n[known]).sum() / known.sum() ** 2 + np.array(self.doubt)[known].mean() ** 2 / 3
        half = Z * math.sqrt(variance)
        return max(0.0, accuracy - half), min(1.0, accuracy + half)

    def interval_of(self, c: int) -> tuple[float, float]:
        """That of a_c: Wilson's, and the doubt on either side. Source: Wilson 1927, J. Am. Stat. Assoc. 22."""
        n, a = float(self.images[c]), float(self.by_class[c])
        if not n:
            return 0.0, 1.0
        middle, half = (a + Z**2 / (2 * n)), Z * math.sqrt(a * (1 - a) / n + Z**2 / (4 * n**2))
        low, high = (middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n)
        return max(0.0, low - self.doubt[c]), min(1.0, high + self.doubt[c])

    @property
    def confused(self) -> list[ConfusedPair]:
        """Pairs of classes that are taken for one another, those of the most images first."""
        return confused_pairs(self.matrix)

    def with_task(
        self,
        left_out: np.ndarray,
        source: Source,
        drawn: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> AccuracyEstimate:
        """After a task. `left_out` (K, K) counts its left-out images among all K classes seen; `drawn` holds, for the k classes
        known before, the shares of draws that are taken for each class before (k, k) and after the task (k, K)."""
        k, K = len(self.doubt), len(left_out)
        M, doubt = np.zeros((K, K)), np.zeros(K)
        M[:k, :k], doubt[:k] = self.matrix, self.doubt
        before = _shares(M)[:k]
        taken = left_out[k:] / np.maximum(left_out[k:].sum(1, keepdims=True), 1)  # (new, K)
        lost = np.minimum(taken[:, :k].sum(0), 1)
        for c in np.flatnonzero(M.sum(1)[:k]).tolist():
            by_symmetry = by_draws = 1 - lost[c]
            into = np.concatenate([np.zeros(k), taken[:, c]])
            if drawn is not None:
                by_draws = drawn[1][c, c] / max(drawn[0][c, c], LEAST_DRAWN)
                into = into + drawn[1][c]
            into[c] = 0
            ratio = (by_symmetry + by_draws) / 2
            off = abs(by_draws - by_symmetry) / 2 if drawn is not None else lost[c] / 2
            doubt[c] = min(1.0, doubt[c] * ratio + before[c] * off)
            M[c] = _aged(M[c], c, ratio, into)
        sources = dict(self.sources)
        if left_out.sum():
            sources[source] = sources.get(source, 0) + int(left_out.sum())
        return AccuracyEstimate(
            confusions=_sparse(M + left_out),
            doubt=doubt.tolist(),
            before=[None if np.isnan(a) else float(a) for a in before],
            sources=sources,
        )

    def for_classes(self, k: int) -> AccuracyEstimate:
        """With classes of which nothing is known, k in all."""
        return self.model_copy(update={"doubt": [*self.doubt, *[0.0] * (k - len(self.doubt))]})

    def merged(self, c: int, other: int) -> AccuracyEstimate:
        """Class `other` counted as class c < other: what was taken for one another is right then."""
        M = self.matrix
        M[c] += M[other]
        M[:, c] += M[:, other]
        found = self.model_copy(update={"confusions": _sparse(M)}).without_class(other)
        doubt = [*found.doubt]
        doubt[c] = max(self.doubt[c], self.doubt[other])
        return found.model_copy(update={"doubt": doubt, "before": []})

    def without_class(self, c: int) -> AccuracyEstimate:
        """Class c forgotten, with the images of others that were taken for it."""
        return AccuracyEstimate(
            confusions=_sparse(np.delete(np.delete(self.matrix, c, 0), c, 1)),
            doubt=np.delete(self.doubt, c).tolist(),
            before=[a for i, a in enumerate(self.before) if i != c],
            sources=self.sources,
        )


def confusion_counts(predicted: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """(k, k): how many images of each class (row) are taken for each class (column)."""
    return np.bincount(labels * k + predicted, minlength=k * k).reshape(k, k).astype(float)


def confused_pairs(M: np.ndarray) -> list[ConfusedPair]:
    """Of a confusion matrix, pairs of at least one image, those of the most first."""
    rows, columns = np.nonzero(np.triu(M + M.T, 1) >= 1)
    found = [
        ConfusedPair(a, b, float(M[a, b]), float(M[b, a])) for a, b in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    return sorted(found, key=lambda pair: -pair.images)


def short_of_pictures(counts: Sequence[int]) -> list[int]:
    """Classes with fewer than FEWEST pictures, or with fewer than half of what the median class has, the fewest first."""
    least = max(FEWEST, float(np.median(counts)) / 2) if len(counts) else 0
    return sorted((c for c, n in enumerate(counts) if n < least), key=lambda c: counts[c])


def _shares(M: np.ndarray) -> np.ndarray:
    """The diagonal by the sums of rows, NaN for an empty row."""
    n = M.sum(1)
    return np.divide(M.diagonal(), n, out=np.full(len(M), np.nan), where=n > 0)


def _aged(row: np.ndarray, c: int, ratio: float, into: np.ndarray) -> np.ndarray:
    """A row of M with `ratio` times the images that are classified correctly, as far as there are so many; as many fewer as are
    wrong remain so, and what is lost is shared out as `into` says."""
    n, hits = row.sum(), row[c]
    wrong = np.delete(row, c).sum()
    kept = min(n, ratio * hits)
    found = row * (min(1.0, ratio) if into.sum() else 1.0)
    found[c] = 0
    if kept + found.sum() > n or not into.sum():
        found *= (n - kept) / wrong if wrong else 0.0
    if into.sum():
        found += into * (n - kept - found.sum()) / into.sum()
    found[c] = n - found.sum()
    return found


def _sparse(M: np.ndarray) -> list[tuple[int, int, float]]:
    return [(int(c), int(taken), float(M[c, taken])) for c, taken in zip(*np.nonzero(M > SMALL), strict=True)]
