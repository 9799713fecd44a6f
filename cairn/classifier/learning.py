"""One call of `partial_fit`: a copy of the method learns a task, and images left out of it tell how far it is to be trusted.

Nothing of the classifier is changed: it takes the result over whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from cairn.classifier.assessment import assessed, needs_every_image
from cairn.classifier.calibration import keep_left_out, own_left_out
from cairn.classifier.choice import NAMES_TELL_NOTHING, WORDLESS, choice, comparable, untold
from cairn.classifier.comparison import compared_rows, drift_in_task
from cairn.classifier.intake import Intake
from cairn.classifier.label_set_learning import IntakeOfSets, LeavingOut
from cairn.classifier.label_sets import before_any
from cairn.classifier.learned import Learned
from cairn.classifier.novelty import Novelty
from cairn.classifier.self_training import SHARE, learn_with_unlabelled, learned_twice, why_not
from cairn.data.task import Task
from cairn.methods.protocol import KeepsImages, LeavesOut, Method, without_labels_unused
from cairn.training.context import Context


class Lesson(NamedTuple):
    """What takes the place of a classifier's own after a task."""

    method: Method
    chosen: str
    learned: Learned


@dataclass(frozen=True)
class Learning:
    """Learns what a classifier is given."""

    learned: Learned
    previous: Method | None
    """What it was before the task, if anything."""
    copy: Callable[..., Method]
    """Makes a copy of that, or a new method of the name, with changed settings if they are given."""
    known: Callable[[], Novelty]
    """Its known scores."""
    compares: bool
    """Whether images left out may choose another method than the one called for."""

    def learned_with(self, task: Task, given: Intake | IntakeOfSets, called: str, ctx: Context) -> Lesson:
        """By the method of that name."""
        if isinstance(given, IntakeOfSets):
            return self._sets_of_classes(task, given, called, ctx)
        learned, method, settings = self.learned, self.copy(called), {}
        compares = self.compares and comparable(task)
        keep_left_out(task, ctx, compares or needs_every_image(method, task), compared_rows(task))
        self._learn(method, called, settings, task, ctx)
        if compares:
            found = choice(method, task, ctx)
            ctx.log("notice", text=found.reason)
            if found.method != called:
                called = found.method
                method, ctx = self._learned_anew(called, settings, task, ctx)
        elif self.compares and self._names_tell_nothing(method, task):
            ctx.log("notice", text=NAMES_TELL_NOTHING)
            settings = WORDLESS
            method, ctx = self._learned_anew(called, settings, task, ctx)
        if isinstance(method, KeepsImages) and (
            text := without_labels_unused(called, method, len(task.unlabelled or ()))
        ):
            ctx.log("notice", text=text)
            task = replace(task, unlabelled=None)
        before = partial(self.copy, called, settings)
        found = assessed(learned.calibration, learned.estimate, method, self.previous, before, task, ctx)
        drift = drift_in_task(self.previous, self.known, task, ctx, list(map(str, learned.classes)))
        after = learned.with_task(task, given.hashes, found.calibration, found.references, found.estimate, drift)
        return Lesson(method, called, after)

    def _learned_anew(
        self, called: str, settings: Mapping[str, Any], task: Task, ctx: Context
    ) -> tuple[Method, Context]:
        """Another method than was learned first, and the context of its own passes."""
        method, ctx = self.copy(called, settings), Context(ctx.seeds, ctx.log)
        keep_left_out(task, ctx, every=needs_every_image(method, task))
        self._learn(method, called, settings, task, ctx)
        return method, ctx

    def _learn(self, method: Method, called: str, settings: Mapping[str, Any], task: Task, ctx: Context) -> None:
        """The task, and what it has of images without labels."""
        if task.unlabelled and why_not(method) is None:
            ctx.log("notice", text=learned_twice(called, len(task.unlabelled)))
            learn_with_unlabelled(method, partial(self.copy, called, settings), task, SHARE, ctx)
        else:
            method.learn(task, ctx)

    def _names_tell_nothing(self, method: Method, task: Task) -> bool:
        """Whether all that is known of images left out are the names of their classes, which tell no more than chance."""
        left_out = own_left_out(method) if isinstance(method, LeavesOut) and method.towers.has_text else None
        return left_out is not None and len(left_out.labels) > 0 and bool(untold(left_out, task).all())

    def _sets_of_classes(self, task: Task, given: IntakeOfSets, called: str, ctx: Context) -> Lesson:
        """Of images that may show several."""
        learned, method = self.learned, self.copy(called)
        leaving_out = LeavingOut(task, given.fresh, method, ctx)
        leaving_out.keep_features()
        method.learn(task, ctx)
        sets = learned.sets or before_any(centred=not method.card.label_sets)
        found = leaving_out.told(sets, partial(self.copy, called))
        estimate = learned.estimate.for_classes(task.classes.stop)
        after = learned.with_task(task, given.train_hashes, learned.calibration, [], estimate, sets=found)
        return Lesson(method, called, after)
