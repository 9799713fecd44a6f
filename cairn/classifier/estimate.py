"""How many new pictures a learner classifies correctly, estimated from pictures that it learned from. No torch, no images.

Letters: M counts of left-out images (k x k), row the class, column the class that they are taken for; n_c sum of row c; P shares of
draws from what the method keeps of each class that are taken for each class (k x k), as the learner is now; q_c what P_cc was
when the images of class c were left out, the mean over them; a_c estimated accuracy of class c.

A task's own images are scored among all classes seen as if they had not been learned, and are counted. Later the learner changes:
classes come that take images of c, more images make the means of c and of others better, images are taken out again. None of
the images that were counted is there any more. What becomes of them is estimated twice:

    by draws      a_c = M_cc / n_c * P_cc / q_c
    by symmetry   a_c = M_cc / n_c * prod_J (1 - sum_{j in J} M_jc / n_j min(1, n_j / n_c))     J: new classes of a later task

Draws are taken from the statistics as they are at the time. A draw is easier than an image, about as much easier before a change as
after it, and the ratio depends on where the learner stands, not on the way there. Symmetry: as often as j is taken for c, c is
taken for j, in proportion to their numbers of images where c has more. It counts no gain, and draws show less loss than there is:
a_c is the mean of both, and half their difference its doubt. What a class loses goes to the others as row c of P, or symmetry, says.
Where a method keeps nothing to draw from, symmetry alone is there, and half of what it takes is the doubt.

Images that are unlearned leave M as the learner without them takes them.

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
"""P_cc and q_c at least: a ratio of less says nothing."""

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
        default=[],
        description="class, class that it is taken for, number of left-out images; expected ones have fractions",
    )
    aged: list[tuple[Count, Count, Annotated[Amount, Field(gt=0)]]] | None = Field(
        default=None, description="the same after what classes lost by symmetry; null: as counted"
    )
    drawn: list[tuple[Count, Count, Share]] = Field(
        default=[], description="P: class, class that it is taken for, share of draws; none where there are no draws"
    )
    reference: list[Share | None] = Field(default=[], description="q_c of each class; null: not known")
    doubt: list[Share] = Field(
        default=[], description="of each class, how far a_c by symmetry may be off beyond chance"
    )
    before: list[Share | None] = Field(
        default=[], description="a_c of the classes known before the last task, as it was by then"
    )
    sources: dict[Source, Count] = Field(default={}, description="images that were left out, by how")

    @model_validator(mode="after")
    def _fits_together(self) -> AccuracyEstimate:
        for name, entries in (("confusions", self.confusions), ("aged", self.aged or []), ("drawn", self.drawn)):
            if any(max(c, taken) >= len(self.doubt) for c, taken, _ in entries):
                raise ValueError(f"{name}: of a class beyond the {len(self.doubt)} there are")
        if len(self.reference) > len(self.doubt):
            raise ValueError(f"reference: of {len(self.reference)} classes, where there are {len(self.doubt)}")
        if len(self.before) > len(self.doubt):
            raise ValueError(f"before: of {len(self.before)} classes, where there are {len(self.doubt)}")
        return self

    @property
    def counted(self) -> np.ndarray:
        """M, (k, k), as it was counted."""
        return self._dense(self.confusions)

    @property
    def by_symmetry(self) -> np.ndarray:
        """M as it would be counted now, by symmetry, (k, k)."""
        return self._dense(self.confusions if self.aged is None else self.aged)

    @property
    def by_draws(self) -> np.ndarray:
        """M as it would be counted now, by draws, (k, k); by symmetry for classes of which there are none."""
        M, found, P = self.counted, self.by_symmetry, self._dense(self.drawn)
        for c, q in enumerate(self.reference):
            if q is not None and M[c].sum():
                into = P[c] * (np.arange(len(P)) != c)
                found[c] = _aged(M[c], c, max(P[c, c], LEAST_DRAWN) / max(q, LEAST_DRAWN), into)
        return found

    @property
    def matrix(self) -> np.ndarray:
        """M as it would be counted now, (k, k): row c with n_c a_c on the diagonal."""
        return (self.by_draws + self.by_symmetry) / 2

    def _dense(self, entries: Sequence[tuple[int, int, float]]) -> np.ndarray:
        M = np.zeros((len(self.doubt),) * 2)
        for c, taken, value in entries:
            M[c, taken] = value
        return M

    @property
    def doubts(self) -> np.ndarray:
        """How far a_c may be off beyond chance, (k,)."""
        apart = np.abs(_shares(self.by_draws) - _shares(self.by_symmetry)) / 2
        known = np.array([q is not None for q in self.for_classes(len(self.doubt)).reference], bool)
        return np.where(known, np.nan_to_num(apart), np.array(self.doubt))

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
        variance = (a * (1 - a) / n[known]).sum() / known.sum() ** 2 + self.doubts[known].mean() ** 2 / 3
        half = Z * math.sqrt(variance)
        return max(0.0, accuracy - half), min(1.0, accuracy + half)

    def interval_of(self, c: int) -> tuple[float, float]:
        """That of a_c: Wilson's, and the doubt on either side. Source: Wilson 1927, J. Am. Stat. Assoc. 22."""
        n, a = float(self.images[c]), float(self.by_class[c])
        if not n:
            return 0.0, 1.0
        middle, half = (a + Z**2 / (2 * n)), Z * math.sqrt(a * (1 - a) / n + Z**2 / (4 * n**2))
        low, high = (middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n)
        doubt = float(self.doubts[c])
        return max(0.0, min(a, low) - doubt), min(1.0, max(a, high) + doubt)  # which rounding may put beside a

    @property
    def confused(self) -> list[ConfusedPair]:
        """Pairs of classes that are taken for one another, those of the most images first."""
        return confused_pairs(self.matrix)

    def with_task(self, left_out: np.ndarray, source: Source, drawn: np.ndarray | None = None) -> AccuracyEstimate:
        """After a task. `left_out` (K, K) counts its left-out images among all K classes seen; `drawn` is P after the task."""
        k, K, before = len(self.doubt), len(left_out), self.by_class
        known = self.for_classes(K)
        M = known.counted
        reference: list[float | None] = [*known.reference]
        aged, doubt = _lost_by_symmetry(known.by_symmetry, np.array(known.doubt), left_out, k)
        if drawn is None:
            reference = [None] * K
        else:
            for c in np.flatnonzero(left_out.sum(1)).tolist():
                n, m, now = M[c].sum(), left_out[c].sum(), float(drawn[c, c])
                earlier = reference[c]
                reference[c] = min(1.0, (n * (now if earlier is None else earlier) + m * now) / (n + m))
        sources = dict(self.sources)
        if left_out.sum():
            sources[source] = sources.get(source, 0) + int(left_out.sum())
        return AccuracyEstimate(
            confusions=_sparse(M + left_out),
            aged=_sparse(aged + left_out),
            drawn=[] if drawn is None else _sparse(drawn),
            reference=reference,
            doubt=doubt.tolist(),
            before=[None if np.isnan(a) else float(a) for a in before],
            sources=sources,
        )

    def with_draws(self, drawn: np.ndarray | None) -> AccuracyEstimate:
        """Of the learner after a change, with P of it. Where q_c is not known, what was counted is taken to be true of it now."""
        if drawn is None:
            return self
        reference = [
            float(drawn[c, c]) if q is None else q for c, q in enumerate(self.for_classes(len(drawn)).reference)
        ]
        return self.for_classes(len(drawn)).model_copy(update={"drawn": _sparse(drawn), "reference": reference})

    def for_classes(self, k: int) -> AccuracyEstimate:
        """With classes of which nothing is known, k in all."""
        doubt = [*self.doubt, *[0.0] * (k - len(self.doubt))]
        reference = [*self.reference, *[None] * (k - len(self.reference))]
        return self.model_copy(update={"doubt": doubt, "reference": reference})

    def without_images(self, taken: np.ndarray) -> AccuracyEstimate:
        """With images unlearned that the learner without them takes so, `taken` (k, k), row the class that they were learned as."""
        left = [_less(M, taken) for M in (self.counted, self.by_symmetry)]
        return self.model_copy(update={"confusions": _sparse(left[0]), "aged": _sparse(left[1])})

    def merged(self, c: int, other: int) -> AccuracyEstimate:
        """Class `other` counted as class c < other: what was taken for one another is right then."""
        M, aged, P, n = self.counted, self.by_symmetry, self._dense(self.drawn), self.images
        now = self.by_draws
        M[c] = now[c] + now[other]  # of the learner as it is: q_c of both is what P is
        aged[c] += aged[other]
        P[c] = (n[c] * P[c] + n[other] * P[other]) / max(n[c] + n[other], 1e-300)
        for one in (M, aged, P):
            one[:, c] += one[:, other]
        reference, doubt = list(self.for_classes(len(M)).reference), list(self.doubt)
        reference[c] = min(1.0, float(P[c, c])) if self.drawn else None
        doubt[c] = max(doubt[c], doubt[other])
        update = {"confusions": _sparse(M), "aged": _sparse(aged), "drawn": _sparse(P), "reference": reference}
        found = self.model_copy(update=update | {"doubt": doubt}).without_class(other)
        return found.model_copy(update={"before": []})

    def without_class(self, c: int) -> AccuracyEstimate:
        """Class c forgotten, with the images of others that were taken for it."""
        return AccuracyEstimate(
            confusions=_sparse(_without(self.counted, c)),
            aged=None if self.aged is None else _sparse(_without(self.by_symmetry, c)),
            drawn=_sparse(_without(self._dense(self.drawn), c)),
            reference=[q for i, q in enumerate(self.reference) if i != c],
            doubt=np.delete(self.doubt, c).tolist(),
            before=[a for i, a in enumerate(self.before) if i != c],
            sources=self.sources,
        )


def _less(M: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """M without images that are taken so: as many fewer of each class, as far as there are some of the kind those that are taken."""
    M = M.copy()
    for c in np.flatnonzero(taken.sum(1)).tolist():
        left, row = max(0.0, M[c].sum() - taken[c].sum()), np.maximum(0, M[c] - taken[c])
        M[c] = row * (left / row.sum() if row.sum() else 0.0)
    return M


def _without(M: np.ndarray, c: int) -> np.ndarray:
    return np.delete(np.delete(M, c, 0), c, 1)


def _lost_by_symmetry(M: np.ndarray, doubt: np.ndarray, left_out: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """M and doubts of the K classes after a task with these left-out images, the first k of them known before."""
    n, new, before = M.sum(1), left_out[k:].sum(1), _shares(M)
    taken = left_out[k:, :k] / np.maximum(new, 1)[:, None]  # (new, k)
    M, doubt = M.copy(), doubt.copy()
    for c in np.flatnonzero(n[:k]).tolist():
        into = np.zeros(len(M))
        into[k:] = taken[:, c] * np.minimum(1, new / n[c])
        lost = min(1.0, float(into.sum()))
        doubt[c] = min(1.0, doubt[c] * (1 - lost) + before[c] * lost / 2)
        M[c] = _aged(M[c], c, 1 - lost, into)
    return M, doubt


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
