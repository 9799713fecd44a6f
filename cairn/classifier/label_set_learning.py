"""Images that may show several classes, made ready to be learned, and left out of learning to tell of probabilities and thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cairn.classifier.assessment import MOST_IN_FOLDS
from cairn.classifier.calibration import BATCH, FOLDS, folds, left_out
from cairn.classifier.inputs import Labelled, Labels, labelled_sets, readable
from cairn.classifier.label_sets import LearnedSets
from cairn.classifier.learned import Learned
from cairn.data.images import LabelSets, Subset, reduced_subset
from cairn.data.in_memory import InMemoryImages
from cairn.data.loading import Loader
from cairn.data.names import alike, class_name, require_whole
from cairn.data.task import Task
from cairn.errors import InvalidInput, UnreadableImages, counted
from cairn.methods.protocol import LeavesOut, Method
from cairn.training.checkpoint import Checkpoint
from cairn.training.context import Context
from cairn.training.encode import encode
from cairn.training.log import Log
from cairn.types import Scores

MOST_IN_SLOW_FOLDS = 1024
"""The same where the method takes more time for a task than other heads do, since it leaves out labels one by one."""

TAKEN_AS_SETS = (
    "lists of labels: images may show several classes, from now on too (targets='sets'), and each takes a list of names"
)


class IntakeOfSets(NamedTuple):
    """Images of one call, maybe none, each of which has a label that was not learned of it yet."""

    label_sets: LabelSets
    """With all that is said of them."""
    fresh: np.ndarray
    """Of these labels, (n, k), those that were not learned yet."""
    hashes: list[bytes]
    new: list[str]

    @property
    def train(self) -> Subset:
        """Each image once for every label of it that is to be learned."""
        return _copies(self.label_sets, self.fresh)

    @property
    def train_hashes(self) -> list[bytes]:
        return [self.hashes[row] for row in np.nonzero(self.fresh.T)[1]]

    def reduced(self, side: int | None) -> IntakeOfSets:
        """To be decoded with that side."""
        return self._replace(label_sets=reduced_subset(self.label_sets, side))


def _copies(sets: LabelSets, fresh: np.ndarray) -> Subset:
    return LabelSets.of(sets.source, fresh, sets.indices).copies()


def intake_of_sets(
    images: Labelled,
    labels: Labels,
    learned: Learned,
    width: int | None,
    again: bool,
    on_bad_image: Literal["stop", "skip"],
    log: Log,
) -> IntakeOfSets:
    """Without labels that were `learned` of an image already, unless `again`; notices say what was left out, and which names are
    nearly the same. An image that is given twice shows what is said of either. Raises UnreadableImages, and DataError for labels
    that are none."""
    items, given = labelled_sets(images, labels, width)
    named = [[*dict.fromkeys(map(class_name, own))] for own in given]
    if not any(named):
        raise InvalidInput("labels: no image has one, so there is nothing to learn; give those that show a class")
    known, classes = learned.numbers(), list(map(str, learned.classes))
    new = [name for name in dict.fromkeys(name for own in named for name in own) if name not in known]
    require_whole(new)
    numbers = known | {name: len(classes) + i for i, name in enumerate(new)}
    targets = np.zeros((len(items), len(classes) + len(new)), dtype=bool)
    for row, own in enumerate(named):
        targets[row, [numbers[name] for name in own]] = True
    pictures = readable(InMemoryImages(items, np.arange(len(items)), width), {}, on_bad_image, log)
    targets = targets[pictures.labels]
    for name in new:
        if not targets[:, numbers[name]].any():
            raise UnreadableImages(f"class '{name}': none of its images can be read", {})
    for notice in alike([*classes, *new], new):
        log("notice", text=notice)
    pictures, hashes, targets = _once(pictures, targets, log)
    was = np.zeros_like(targets)
    for row, value in enumerate(hashes):
        was[row, list(learned.pictures.learned_as(value))] = True
    fresh = targets if again else targets & ~was
    for notice in _notices(targets, was, again):
        log("notice", text=notice)
    # In order of the first class, as a stream has them: the order of arrival within a task must not matter
    rows = np.flatnonzero(fresh.any(1))
    rows = rows[np.argsort(targets[rows].argmax(1), kind="stable")]
    sets = LabelSets.of(pictures, targets).taken(rows)
    return IntakeOfSets(sets, fresh[rows], [hashes[row] for row in rows], new)


def _once(pictures: InMemoryImages, targets: np.ndarray, log: Log) -> tuple[InMemoryImages, list[bytes], np.ndarray]:
    """The images that show something, each once, with their hashes and all that is said of them."""
    if empty := int((~targets.any(1)).sum()):
        log("notice", text=f"left out: {counted(empty, 'image')} without a label")
    rows = np.flatnonzero(targets.any(1))
    pictures, targets = pictures.taken(rows), targets[rows]
    hashes = pictures.content_hashes()
    first: dict[bytes, int] = {}
    for row, value in enumerate(hashes):
        targets[first.setdefault(value, row)] |= targets[row]
    if twice := len(hashes) - len(first):
        log("notice", text=f"given twice: {counted(twice, 'image')}; each shows all that is said of it")
    kept = list(first.values())
    return pictures.taken(kept), [hashes[row] for row in kept], targets[kept]


def _notices(targets: np.ndarray, was: np.ndarray, again: bool) -> Iterator[str]:
    """What is to be said of labels that were learned already."""
    done, some = (was | ~targets).all(1), (was & targets).any(1)
    of = f"of {counted(len(targets), 'image')}, already learned with"
    if again:
        if some.any():
            yield f"learned once more: {int(some.sum())} {of} a label that it has"
        return
    if done.any():
        yield f"left out: {int(done.sum())} {of} these labels; again=True, on the command line --again, learns them once more"
    if (some & ~done).any():
        yield f"only the further labels are learned: {int((some & ~done).sum())} {of} others"


@dataclass(frozen=True)
class LeavingOut:
    """Whole images of a task left out, to see how a method scores them that has not learned them.

    Where learning again costs little, the method's statistics being in closed form, every image is left out once, in five
    parts, near-duplicates together; otherwise a fifth of them. A method's own leave-one-out scores would not do: they leave
    out one label of an image and not the others.
    """

    task: Task
    fresh: np.ndarray
    method: Method
    """That learns the task, before or after it."""
    ctx: Context

    @property
    def _sets(self) -> LabelSets:
        assert self.task.label_sets is not None
        return self.task.label_sets

    @property
    def _natively(self) -> bool:
        return self.method.card.label_sets

    @property
    def _in_parts(self) -> bool:
        most = MOST_IN_SLOW_FOLDS if isinstance(self.method, LeavesOut) else MOST_IN_FOLDS
        return self.method.card.closed_form and len(self._sets) <= most

    def keep_features(self) -> None:
        """Before the task is learned: have the passes over it keep the features that are needed."""
        out = np.arange(len(self._sets)) if self._in_parts else self._fifth()
        self.ctx.checkpoint.keep_features(self._passed(out), self._number)

    def told(self, sets: LearnedSets, before: Callable[[], Method]) -> LearnedSets:
        """After it: with what the images left out tell, or those learned where too few are to leave any out."""
        k, shown = self.task.classes.stop, torch.from_numpy(np.ascontiguousarray(self._sets.targets))
        told, sets = shown.any(0), sets.for_classes(k)
        found = [(out, self._scores_without(out, before)) for out in self._parts() if len(out)]
        if not found:
            return sets.with_images(self._scores(self.method, np.arange(len(self._sets))), shown, told, left_out=False)
        rows = torch.from_numpy(np.concatenate([out for out, _ in found]))
        return sets.with_images(torch.cat([scores for _, scores in found]), shown[rows], told)

    def _parts(self) -> list[np.ndarray]:
        z = self._features(np.arange(len(self._sets))) if self._in_parts else None
        if z is None:
            return [self._fifth()]
        rng = self.ctx.seeds.at(task=self.task.index).generator("folds")
        chosen = folds(z, self._sets.labels, rng, largest=1 / FOLDS)
        return [self._with_all_classes(np.flatnonzero(chosen == part)) for part in np.unique(chosen[chosen >= 0])]

    def _fifth(self) -> np.ndarray:
        rng = self.ctx.seeds.at(task=self.task.index).generator("calibration")
        return self._with_all_classes(left_out(self._sets.labels, rng))

    def _with_all_classes(self, out: np.ndarray) -> np.ndarray:
        """Without images beside which none would be left of a new class."""
        targets = self._sets.targets[:, self.task.classes.start :]
        only = np.delete(targets, out, 0).any(0) < targets.any(0)
        return out[~targets[out][:, only].any(1)]

    def _scores_without(self, out: np.ndarray, before: Callable[[], Method]) -> Scores:
        """Of images that a method did not learn which learned all others."""
        kept = np.setdiff1d(np.arange(len(self._sets)), out)
        other, sets = before(), self._sets.taken(kept)
        rest = replace(self.task, train=_copies(sets, self.fresh[kept]), label_sets=sets)
        with_tower, checkpoint = other.towers.has_images, Checkpoint()
        if with_tower:
            checkpoint = self.ctx.checkpoint.handed_on(self._passed(kept), self._number)
        other.learn(rest, Context(self.ctx.seeds, checkpoint=checkpoint))
        return self._scores(other, out)

    def _scores(self, method: Method, rows: np.ndarray) -> Scores:
        features = self._features(rows)
        if features is not None and method.towers.has_images:
            device = torch.device(method.towers.device)
            with torch.no_grad():
                return torch.cat([method.scores(some.to(device)).cpu() for some in features.split(BATCH)])
        towers, images = method.towers, self._sets.taken(rows)
        loader = Loader(images, towers.prepare, towers.pixels, batch=BATCH, cache_bytes=0)
        return encode(loader, lambda features, _: method.scores(features), embed=method.embed)[0]

    def _features(self, rows: np.ndarray) -> Tensor | None:
        """Of images by their number, None where they are not at hand."""
        if not self.method.towers.has_images:
            return torch.stack([torch.as_tensor(self._sets[int(row)]) for row in rows])
        if self._natively:
            return self.ctx.checkpoint.features_of(torch.from_numpy(rows))
        first = dict(zip(*reversed(self._places()), strict=True))
        return self.ctx.checkpoint.features_of(torch.tensor([first[row] for row in rows.tolist()]))

    def _places(self) -> tuple[list[int], list[int]]:
        """Of the rows that the method's passes go over, where they are and which image each is of."""
        images = np.arange(len(self._sets)) if self._natively else np.nonzero(self.fresh.T)[1]
        return list(range(len(images))), images.tolist()

    def _passed(self, rows: np.ndarray) -> Tensor:
        places, images = self._places()
        return torch.tensor(places)[torch.from_numpy(np.isin(images, rows))]

    @property
    def _number(self) -> int:
        return len(self._places()[0])
