"""A method against the test images of the classes it has seen. Nothing here reaches back into learning."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cairn.data.loading import Loader
from cairn.data.stream import TaskStream
from cairn.errors import NotFinite
from cairn.maths.similarity import unit
from cairn.methods.protocol import Method
from cairn.towers.protocol import Towers

KEEP_BYTES = 2 << 30
"""Test embeddings held in memory; what does not fit lies in a file."""

ROWS = 1024
"""Images scored at once."""


@dataclass(frozen=True)
class Evaluation:
    """After one task: `accuracy[j]` on task j <= i, correct and total per class seen, and `future`: zero-shot accuracy
    of the current image side on the classes still to come, among those classes (None if there are none, or no texts)."""

    accuracy: list[float]
    correct: list[int]
    total: list[int]
    future: float | None


class Evaluator:
    """Evaluates a method after each task. Embeddings are kept while the method's `encoder` stays the same: in memory up to
    `keep_bytes`, beyond that in a temporary file, which patches of many images need."""

    def __init__(self, stream: TaskStream, towers: Towers, keep_bytes: int = KEEP_BYTES):
        self.stream, self.towers, self.keep_bytes = stream, towers, keep_bytes
        self.loaders = [Loader(test, towers.prepare, towers.pixels, batch=256) for test in stream.tests]
        self._encoder: str | None = None
        self._kept: dict[int, Tensor] = {}

    def after(self, task: int, method: Method) -> Evaluation:
        """The row of the table that follows learning task number `task`. Raises NotFinite if a score is not a number."""
        if self._encoder != method.encoder:
            self._encoder, self._kept = method.encoder, {}
        seen = self.stream.tasks[task].classes.stop
        correct, total = torch.zeros(seen, dtype=torch.long), torch.zeros(seen, dtype=torch.long)
        accuracy = []
        for j in range(task + 1):
            labels = self.loaders[j].labels
            scores = torch.cat([method.scores(rows) for rows in self._embedded(j, method).split(ROWS)])
            if scores.shape[1] != seen or not torch.isfinite(scores).all():
                raise NotFinite(
                    f"task {task}: scores of shape {tuple(scores.shape)} must be finite, one column per {seen} classes"
                )
            right = scores.argmax(1).cpu() == labels
            accuracy.append(right.float().mean().item())
            correct += torch.bincount(labels[right], minlength=seen)
            total += torch.bincount(labels, minlength=seen)
        return Evaluation(accuracy, correct.tolist(), total.tolist(), self._future(task, method))

    def _future(self, task: int, method: Method) -> float | None:
        coming = range(task + 1, len(self.stream.tasks))
        if not coming or not self.towers.has_text:
            return None
        first = self.stream.tasks[task + 1].classes.start
        T = self.towers.class_texts(self.stream.class_names[first:], self.stream.tasks[0].templates).cpu()
        right = [
            (unit(self._embedded(j, method)[:, : T.shape[1]].cpu()) @ T.T).argmax(1) + first == self.loaders[j].labels
            for j in coming
        ]
        return torch.cat(right).float().mean().item()

    @torch.no_grad()
    def _embedded(self, j: int, method: Method) -> Tensor:
        if j not in self._kept:
            start = 0
            for pixels, _ in self.loaders[j]:
                rows = method.embed(pixels)
                if start == 0:
                    self._kept[j] = self._room(len(self.loaders[j].labels), rows)
                self._kept[j][start : start + len(rows)] = rows
                start += len(rows)
        return self._kept[j]

    def _room(self, n: int, like: Tensor) -> Tensor:
        """An empty matrix for n rows like these, in memory while there is room."""
        size = n * like[0].numel()
        held = sum(kept.nbytes for kept in self._kept.values())
        if held + size * like.element_size() <= self.keep_bytes:
            return like.new_empty(n, *like.shape[1:])
        # The name goes at once, the file when the last tensor on it does
        with tempfile.TemporaryDirectory(prefix="cairn-", ignore_cleanup_errors=True) as folder:
            kept = torch.from_file(str(Path(folder) / "rows"), shared=True, size=size, dtype=like.dtype)
        return kept.view(n, *like.shape[1:])
