"""The field's metrics as functions of an accuracy table; no tensors, no files.

A[i][j] is the accuracy, in [0, 1], on the test images of task j after learning task i, over the classes seen by then
(None for j > i). B tasks, numbered from 0; n_j test images of task j. Source: the field's protocol (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Sequence

Table = Sequence[Sequence[float | None]]


def seen_accuracy(A: Table, sizes: Sequence[int]) -> list[float]:
    """A_i = sum_{j <= i} n_j A[i][j] / sum_{j <= i} n_j: top-1 over all classes seen after each task."""
    rows = _lower(A)
    return [sum(n * a for n, a in zip(sizes, row, strict=False)) / sum(sizes[: len(row)]) for row in rows]


def _lower(A: Table) -> list[list[float]]:
    """A[i][j] for j <= i."""
    return [[a for a in row[: i + 1] if a is not None] for i, row in enumerate(A)]


def average_incremental(seen: Sequence[float]) -> float:
    """(1/B) sum_i A_i."""
    return sum(seen) / len(seen)


def any_time(accuracies: Sequence[float], images: Sequence[int]) -> float:
    """sum_j m_j a_j / sum_j m_j: the area under the curve of accuracy by images learned, a_j being reached with chunk j of m_j
    images. Source: Koh et al. 2022, Online Continual Learning on Class Incremental Blurry Task Configuration."""
    return sum(m * a for m, a in zip(images, accuracies, strict=True)) / sum(images)


def forgetting(A: Table) -> float | None:
    """1/(B-1) sum_{j < B-1} (max_{j <= l < B-1} A[l][j] - A[B-1][j]); None with a single task."""
    B, A = len(A), _lower(A)
    if B < 2:
        return None
    return sum(max(A[i][j] for i in range(j, B - 1)) - A[B - 1][j] for j in range(B - 1)) / (B - 1)


def backward_transfer(A: Table) -> float | None:
    """1/(B-1) sum_{j < B-1} (A[B-1][j] - A[j][j]); negative means forgetting; None with a single task."""
    B, A = len(A), _lower(A)
    if B < 2:
        return None
    return sum(A[B - 1][j] - A[j][j] for j in range(B - 1)) / (B - 1)


def mean_of_known(values: Sequence[float | None]) -> float:
    """Mean of those that are not None: mAP of the average precisions of classes. Of none 0."""
    known = [value for value in values if value is not None]
    return sum(known) / max(1, len(known))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1; 0 for a single value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
