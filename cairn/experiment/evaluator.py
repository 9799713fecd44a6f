"""A method against the test images of the classes it has seen. Nothing here reaches back into learning."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cairn.classifier.calibration import UNCALIBRATED, Calibration
from cairn.classifier.label_sets import LearnedSets
from cairn.data.images import LabelSets
from cairn.data.loading import Loader, room_for_images
from cairn.data.stream import TaskStream
from cairn.errors import DataError, NotFinite
from cairn.experiment.exemplar_check import looked_for, refuse_exemplars
from cairn.experiment.metrics import mean_of_known
from cairn.maths.average_precision import average_precision
from cairn.maths.calibration_error import (
    calibration_error,
    calibration_error_by_chance,
    negative_log_likelihood,
)
from cairn.maths.f1 import f1_by_class, macro_f1, micro_f1
from cairn.maths.overlap import confusion, overlaps, pixel_classes
from cairn.maths.similarity import unit
from cairn.methods.protocol import FROZEN, Method, Segments, TunesImageTower
from cairn.storage.files import unwritable
from cairn.storage.schema import Amount, Count, Positive, Share
from cairn.storage.tensors import first_not_finite
from cairn.towers.masks import mask_in_view
from cairn.towers.protocol import Towers
from cairn.training.context import OneProcess, Processes
from cairn.types import Features, Labels, Pixels, Scores

KEEP_BYTES = 2 << 30
"""Test embeddings held in memory; what does not fit lies in a file."""

TRUNK_BYTES = 2 << 30
"""What the frozen blocks of a moving tower made of test images, held in memory, on a CUDA device at most a quarter of what is free.
Images beyond that pass the whole tower after every task. With tokens in float32 an image takes 605 kB behind a block of ViT-B/16."""

SEGMENTED = 64
"""Images segmented at once."""

BATCH = 256
"""Images embedded, and scored, at once: the same ones in any number of processes, since the rounding of a product of matrices
depends on how many rows it has."""


@dataclass(frozen=True)
class SaidSets:
    """How good the sets of classes are that images are said to show: F1 of each class seen (None for one that no test image shows),
    and over the classes of each task j <= i, and over all classes seen, macro and micro. An image is said to show class c where its
    calibrated probability is `thresholds[c]` at least."""

    by_class: list[Share | None]
    macro: list[Share | None]
    micro: list[Share | None]
    macro_seen: Share | None
    micro_seen: Share | None
    thresholds: list[Share]

    @classmethod
    def of(
        cls, said: Bool[Tensor, "n k"], shown: Bool[Tensor, "n k"], tasks: list[range], thresholds: list[float]
    ) -> SaidSets:
        """Of what is said of all k classes seen."""
        columns = [slice(classes.start, classes.stop) for classes in tasks]
        return cls(
            f1_by_class(said, shown),
            [macro_f1(said[:, own], shown[:, own]) for own in columns],
            [micro_f1(said[:, own], shown[:, own]) for own in columns],
            macro_f1(said, shown),
            micro_f1(said, shown),
            thresholds,
        )


@dataclass(frozen=True)
class Evaluation:
    """After one task: `accuracy[j]` on task j <= i, correct and total per class seen; `future`: zero-shot accuracy of the
    current image side on the classes still to come, among those classes (None if there are none); `zero_shot`: that of
    the towers as they came, on the classes seen. Both are None without class texts. `ece` and `nll`: calibration error and
    negative log-likelihood of the calibrated probabilities, whose T is `temperature`, over all test images of classes seen,
    and `ece_by_chance` the error that perfect ones would have; None in what was kept before there were any."""

    accuracy: list[Share]
    correct: list[Count]
    total: list[Count]
    future: Share | None
    zero_shot: Share | None
    ece: Share | None = None
    ece_by_chance: Share | None = None
    nll: Amount | None = None
    temperature: Positive | None = None
    precision: list[Share | None] | None = None
    """Where images may show several classes, the average precision of each class seen (None for one that no test image shows);
    `accuracy[j]` is then its mean over the classes of task j, and nothing is counted as correct."""

    sets: SaidSets | None = None
    """Beside `precision`; None in what was kept before there was any."""

    iou: list[Share | None] | None = None
    """Where the method segments and the objects of test images are known: intersection over union of the background, and of each class
    seen (None for one that no test image shows)."""

    @property
    def by_class(self) -> list[float | None]:
        """Accuracy, or average precision, of each class seen."""
        if self.precision is not None:
            return self.precision
        return [right / n for right, n in zip(self.correct, self.total, strict=True)]

    @property
    def seen(self) -> float:
        """Accuracy over all test images of classes seen, or mAP over the classes."""
        if self.precision is not None:
            return mean_of_known(self.precision)
        return sum(self.correct) / sum(self.total)


class Evaluator:
    """Evaluates a method after each task. Embeddings are kept while the method's `encoder` stays the same: in memory up to
    `keep_bytes`, beyond that in a temporary file, which patches of many images need. Where the encoder moves, what its frozen
    first blocks made of images is kept, up to `trunk_bytes`, and images pass the others. `between` is called after every
    batch. With `exemplar_free` a method that keeps images of the task is refused. `world` share the batches out: each embeds
    and scores its own, and all know which images were told right."""

    def __init__(
        self,
        stream: TaskStream,
        towers: Towers,
        keep_bytes: int = KEEP_BYTES,
        between: Callable[[], Any] = lambda: None,
        exemplar_free: bool = False,
        world: Processes | None = None,
        trunk_bytes: int = TRUNK_BYTES,
    ):
        self.stream, self.towers, self.keep_bytes, self.between = stream, towers, keep_bytes, between
        self.exemplar_free = exemplar_free
        self.world: Processes = world or OneProcess()
        # Test images count as memory that does not grow: all sets together have what one loader would
        room = room_for_images() // len(stream.tests)
        self.loaders = [
            Loader(test, towers.prepare, towers.pixels, batch=BATCH, cache_bytes=room) for test in stream.tests
        ]
        self._encoder: str | None = None
        self._kept: dict[int, Features | None] = {}
        self._frozen: dict[int, Features | None] = {}
        self._trunk_room = trunk_bytes
        self._trunks: dict[int, list[Pixels]] = {}
        """Of test set j, of the first of this process's batches."""
        self._masks: dict[int, np.ndarray] = {}
        """Of test set j, of this process's images, in bits."""

    def after(
        self,
        task: int,
        method: Method,
        calibration: Calibration = UNCALIBRATED,
        whole: bool = True,
        sets: LearnedSets | None = None,
    ) -> Evaluation:
        """The row of the table that follows learning task number `task`, probabilities being what `calibration` makes of
        scores, or `sets` where images may show several classes. Where the task is not yet learned as a `whole`, class texts are not
        evaluated, and no image is looked for.
        Raises NotFinite if a score is not a number, ExemplarsKept if the method is said to be exemplar-free and is
        not."""
        if self.exemplar_free and whole:
            learned = self.stream.tasks[task]
            refuse_exemplars(method, learned, looked_for(learned, self.towers))
        if self._encoder != method.encoder:
            self._encoder, self._kept = method.encoder, {}
        if self.stream.label_sets:
            return self._of_sets(task, method, sets)
        seen = self.stream.tasks[task].classes.stop
        correct, total = torch.zeros(seen, dtype=torch.long), torch.zeros(seen, dtype=torch.long)
        accuracy, figures = [], []
        for j in range(task + 1):
            labels = self.loaders[j].labels
            found = self._figures(j, task, method, calibration)
            right = found[:, 0] > 0
            accuracy.append(_share(right))
            correct += torch.bincount(labels[right], minlength=seen)
            total += torch.bincount(labels, minlength=seen)
            figures.append(found)
        right, confidence, log_probability = torch.cat(figures).T.tolist()
        coming, known = (range(task + 1, len(self.stream.tasks)), range(task + 1)) if whole else (range(0), range(0))
        return Evaluation(
            accuracy,
            correct.tolist(),
            total.tolist(),
            future=self._by_texts(coming, range(seen, len(self._texts)), lambda j: self._embedded(j, method)),
            zero_shot=self._by_texts(known, range(seen), lambda j: self._untouched(j, method)),
            ece=calibration_error(confidence, [bool(one) for one in right]),
            ece_by_chance=calibration_error_by_chance(confidence),
            nll=negative_log_likelihood(log_probability),
            temperature=calibration.temperature,
            iou=self._overlaps(task, method) if whole else None,
        )

    @torch.no_grad()
    def _overlaps(self, task: int, method: Method) -> list[float | None] | None:
        """Over all pixels of test images of the classes seen, as the tower sees them; patches brought to that size bilinearly."""
        if not isinstance(method, Segments) or mask_in_view(self.stream.tests[0], 0, self.towers) is None:
            return None
        k = self.stream.tasks[task].classes.stop + 1
        counts = torch.zeros(k, k, dtype=torch.int64)
        for j in range(task + 1):
            embedded, own = self._embedded(j, method), self._places(j)[self.world.rank]
            if embedded is None or not len(own):
                continue
            if j not in self._masks:
                self._masks[j] = np.stack([np.packbits(self._mask(j, int(i)), axis=-1) for i in own])
            for rows in torch.arange(len(own)).split(SEGMENTED):
                bits = self._masks[j][rows]
                masks = torch.from_numpy(np.unpackbits(bits, axis=-1, count=bits.shape[1]).astype(bool))
                labels = self.loaders[j].labels[own[rows]] + 1
                found = pixel_classes(method.segment(embedded[rows]), *masks.shape[1:])
                truth = torch.where(masks, labels[:, None, None], 0)
                counts += confusion(truth.flatten(), found.cpu().flatten(), k)
        return overlaps(torch.stack(self.world.all_gather(counts)).sum(0))

    def _mask(self, j: int, i: int) -> np.ndarray:
        """Where the object of test image i of task j lies in what the tower sees of it."""
        if (mask := mask_in_view(self.stream.tests[j], i, self.towers)) is None:
            raise DataError(f"{self.stream.tests[j].describe(i)}: has no mask, though others do")
        return mask

    def _figures(self, j: int, task: int, method: Method, calibration: Calibration) -> Float[Tensor, "n 3"]:
        """Of every test image of task j: whether it is classified correctly, the probability of the class that it is taken
        for, and the log-probability of its own."""

        def figures(rows: Features, y: Labels) -> Float[Tensor, "n 3"]:
            scores = self._scores(task, method, rows)
            best = _likeliest(scores, f"task {task}: the scores of the method")
            log_p = calibration.log_probabilities(scores)
            columns = (
                (best == y).to(log_p),
                log_p.gather(1, best[:, None])[:, 0].exp(),
                log_p.gather(1, y[:, None])[:, 0],
            )
            return torch.stack(columns, 1)

        return self._of_all(j, figures, self._embedded(j, method), torch.empty(0, 3, dtype=torch.float64))

    def _of_sets(self, task: int, method: Method, sets: LearnedSets | None) -> Evaluation:
        """As `after`, where images may show several classes: over all test images that show a class seen, how well the scores of
        each class rank them, and with `sets` how good what is said of them is. From scores that only tell the classes of one image
        apart (not `Card.label_sets`) what is the same for all of them is taken off first."""
        tasks = self.stream.tasks
        seen, everything = tasks[task].classes.stop, range(len(tasks))

        def ranked(
            classes: range, which: range, rows: Callable[[int], Features | None], scores: Callable[[Features], Scores]
        ) -> tuple[Scores, Bool[Tensor, "n k"]]:
            """Scores of all images that show one of the classes, and what they show of them."""
            found = [
                self._of_all(j, lambda some, _: scores(some), rows(j), torch.empty(0, len(classes))) for j in which
            ]
            shown = torch.cat([torch.from_numpy(_sets(self.stream, j))[:, classes.start : classes.stop] for j in which])
            some = shown.any(1)
            return torch.cat(found)[some].double(), shown[some]

        def precision(found: Scores, shown: Bool[Tensor, "n k"], alone: bool = False) -> list[float | None]:
            return average_precision(found if alone else found - found.mean(1, keepdim=True), shown)

        def by_texts(classes: range, which: range, rows: Callable[[int], Features | None]) -> float | None:
            if not classes or not self.towers.has_text:
                return None
            T = self._texts[classes.start : classes.stop]

            def scores(z: Features) -> Scores:
                return _scored(lambda some: self._text_scores(some, T), z).cpu()

            return mean_of_known(precision(*ranked(classes, which, rows, scores)))

        def scores(rows: Features) -> Scores:
            found = self._scores(task, method, rows)
            _likeliest(found, f"task {task}: the scores of the method")
            return found.cpu()

        values, shown = ranked(range(seen), range(task + 1), lambda j: self._embedded(j, method), scores)
        found = precision(values, shown, method.card.label_sets)
        return Evaluation(
            [mean_of_known([found[c] for c in tasks[j].classes]) for j in range(task + 1)],
            [],
            [],
            future=by_texts(range(seen, len(self._texts)), everything, lambda j: self._embedded(j, method)),
            zero_shot=by_texts(range(seen), range(task + 1), lambda j: self._untouched(j, method)),
            precision=found,
            sets=None if sets is None else self._said(task, sets, values, shown),
        )

    def _said(self, task: int, sets: LearnedSets, scores: Scores, shown: Bool[Tensor, "n k"]) -> SaidSets:
        thresholds = sets.rule.thresholds
        said = sets.rule.probabilities(scores) >= torch.tensor(thresholds, dtype=torch.float64)
        return SaidSets.of(said, shown, [each.classes for each in self.stream.tasks[: task + 1]], thresholds)

    def _scores(self, task: int, method: Method, rows: Features) -> Scores:
        seen = self.stream.tasks[task].classes.stop
        scores = _scored(method.scores, rows)
        if scores.shape[1] != seen:
            raise NotFinite(
                f"task {task}: scores of shape {tuple(scores.shape)} must have one column per {seen} classes"
            )
        return scores

    def _of_all(
        self, j: int, figures: Callable[[Features, Labels], Tensor], rows: Features | None, nothing: Tensor
    ) -> Tensor:
        """figures(rows, labels) of all test images of task j, in their order; `rows` are those of this process, if it has any."""
        labels, places = self.loaders[j].labels, self._places(j)
        own = places[self.world.rank]
        found = self.world.all_gather(nothing if rows is None else figures(rows, labels[own]))
        whole = nothing.new_empty(len(labels), *nothing.shape[1:])
        for place, some in zip(places, found, strict=True):
            whole[place] = some
        return whole

    def _places(self, j: int) -> list[Tensor]:
        """Of each process, the test images of task j that are for it."""
        rows, number = torch.arange(len(self.loaders[j].labels)), self.world.world_size
        batches = rows.split(self.loaders[j].batch)
        return [torch.cat([rows[:0], *batches[rank::number]]) for rank in range(number)]

    def _by_texts(self, tasks: range, classes: range, rows: Callable[[int], Features | None]) -> float | None:
        """Accuracy of class texts alone on the test images of `tasks`, among `classes`."""
        if not tasks or not self.towers.has_text:
            return None
        T = self._texts[classes.start : classes.stop]

        def scores(z: Features) -> Scores:
            return self._text_scores(z, T)

        def right(z: Features, y: Labels) -> Bool[Tensor, " n"]:
            return _likeliest(_scored(scores, z), "zero-shot scores") + classes.start == y

        nothing = torch.empty(0, dtype=torch.bool)
        return _share(torch.cat([self._of_all(j, right, rows(j), nothing) for j in tasks]))

    def _text_scores(self, z: Features, T: Float[Tensor, "k d"]) -> Scores:
        """To the bit those of method `zero-shot`."""
        return self.towers.logit_scale * unit(z[:, : T.shape[1]]) @ T.to(z.device).T

    @cached_property
    def _texts(self) -> Float[Tensor, "k d"]:
        """Of all classes, those to come included."""
        if not self.towers.has_text:
            return torch.zeros(len(self.stream.class_names), self.towers.dim)
        return self.towers.class_texts(self.stream.class_names, self.stream.tasks[0].templates).cpu()

    @torch.no_grad()
    def _embedded(self, j: int, method: Method) -> Features | None:
        if j not in self._kept:
            self._kept[j] = self._all(j, method.embed, self._trunk(method))
        return self._kept[j]

    def _trunk(self, method: Method) -> Callable[[Pixels], Pixels] | None:
        return method.trunk if isinstance(method, TunesImageTower) and method.encoder != FROZEN else None

    @torch.no_grad()
    def _untouched(self, j: int, method: Method) -> Features | None:
        """Embeddings of the towers as they came."""
        if method.encoder == FROZEN:
            return self._embedded(j, method)
        if j not in self._frozen:
            self._frozen[j] = self._all(j, self.towers.image, self._trunk(method))
        return self._frozen[j]

    def _all(
        self, j: int, embed: Callable[[Pixels], Features], trunk: Callable[[Pixels], Pixels] | None = None
    ) -> Features | None:
        """Rows of the images that are for this process, None if none are."""
        start, kept, loader, number = 0, None, self.loaders[j], self.world.world_size
        batches = self._begun(j, trunk)
        for _ in range(-(-len(loader) // number)):  # as often in every process
            for pixels in islice(batches, 1):
                rows = embed(pixels)
                if kept is None:
                    kept = self._room(len(self._places(j)[self.world.rank]), rows)
                kept[start : start + len(rows)] = rows
                start += len(rows)
            self.between()
        return kept

    def _begun(self, j: int, trunk: Callable[[Pixels], Pixels] | None) -> Iterator[Pixels]:
        """This process's batches of test set j, as `embed` takes them; with a `trunk`, what that makes of them, once a run while
        there is room."""
        known = self._trunks.setdefault(j, []) if trunk else []
        done, number = len(known), self.world.world_size
        yield from known[:done]
        batches = self.loaders[j].ordered(self.world.rank + done * number, number)
        for batch, (pixels, _) in enumerate(batches, start=done):
            found = trunk(pixels) if trunk else None
            if found is not None and batch == len(known) and found.nbytes <= self._room_for_trunk(found.device):
                self._trunk_room -= found.nbytes
                known.append(found)
            yield pixels if found is None else found

    def _room_for_trunk(self, device: torch.device) -> int:
        if device.type != "cuda":
            return self._trunk_room
        return min(self._trunk_room, torch.cuda.mem_get_info(device)[0] // 4)

    def _room(self, n: int, like: Tensor) -> Tensor:
        """An empty matrix for n rows like these, in memory while there is room."""
        size = n * like[0].numel()
        held = sum(kept.nbytes for kept in self._kept.values() if kept is not None)
        if held + size * like.element_size() <= self.keep_bytes:
            return like.new_empty(n, *like.shape[1:])
        # The name goes at once, the file when the last tensor on it does
        with tempfile.TemporaryDirectory(prefix="cairn-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "rows"
            _reserve(path, size * like.element_size())
            kept = torch.from_file(str(path), shared=True, size=size, dtype=like.dtype)
        return kept.view(n, *like.shape[1:])


def _reserve(path: Path, size: int) -> None:
    """A file of so many bytes, with room for them where the system can tell: without it, a write to the mapped file would be the
    process's end. Raises ResultError if there is none."""
    try:
        with path.open("wb") as file:
            if sys.platform in ("linux", "freebsd"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise unwritable(path, error, "set TMPDIR to another folder") from None


def _sets(stream: TaskStream, j: int) -> np.ndarray:
    """What the test images of task j show, bool (n, K)."""
    images = stream.tests[j]
    assert isinstance(images, LabelSets)
    return images.targets


def _scored(scores: Callable[[Features], Scores], rows: Features) -> Scores:
    return torch.cat([scores(some) for some in rows.split(BATCH)])


def _likeliest(scores: Scores, what: str) -> Labels:
    """Column of the largest score. Raises NotFinite where one is not a number: `argmax` would take NaN for the largest."""
    if (row := first_not_finite(scores)) is not None:
        raise NotFinite(f"{what}: those of test image {row} are not finite; look for NaN in the weights and the images")
    return scores.argmax(1).cpu()


def _share(right: Bool[Tensor, " n"]) -> float:
    return int(right.sum()) / len(right)
