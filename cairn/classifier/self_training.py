"""Images without labels for methods that learn from labelled ones alone: one round of self-training.

A second learner, the *teacher*, learns the labelled images of a task. It gives each image x without a label the likeliest of the
classes C that the task has labelled images of, and those with the largest margin are learned, with the labelled ones, by the method
itself, from where it stood before the task:

    y(x) = argmax_{c in C} f_c(x),  m(x) = f_y(x) - max_{c in C, c != y} f_c(x)

The ceil(share n) of the n images of largest m are taken. A margin orders scores of any kind, cosines, log densities or outputs of a
regression, where a probability would want a temperature.

Source: self-training as in Lee, Pseudo-Label (ICML 2013 workshop), in one round as in Xie et al., Noisy Student (CVPR 2020), without
its noise; a share in place of a threshold, and the classes of the task, are ours. Classes that came before are not among C: an image
without a label comes with its task.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cairn.data.images import Concatenation, Subset
from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.methods.protocol import HoldsOut, KeepsImages, LearnsUnlabelled, LeavesOut, Method
from cairn.training.context import Context, Log
from cairn.training.encode import encode

TEACHER = "teacher-"
"""How the names of the teacher's work begin in a checkpoint."""

SHARE = 1.0
"""Of the images without labels that a learner is given, what is learned: of .5, .8 and 1 the best on `shapes:dev` for `simplecil` and
`lda`, and level with .8 for `dmc`."""

BATCH = 64


def why_not(method: Method | type[Method]) -> str | None:
    """Why a method is not taught so, None if it is."""
    kind = method if isinstance(method, type) else type(method)
    if issubclass(kind, LearnsUnlabelled):
        return "it learns from images without labels by itself"
    return "it keeps the images of every task" if issubclass(kind, KeepsImages) else None


def learned_twice(name: str, number: int) -> str:
    """What is to be said where a learner does so by itself."""
    return (
        f"{name} learns from labelled images alone, so it learns twice: once to tell what the {number:,} without labels show, then "
        "with these"
    )


def learn_with_unlabelled(method: Method, before: Callable[[], Method], task: Task, share: float, ctx: Context) -> None:
    """`method` learns `task` with that share of its images without labels. `before()` makes a method as it is before the task.

    Raises what `method.learn` does; a method for which there is a reason `why_not` must not be given.
    """
    hidden = task.unlabelled
    if hidden is None or not len(hidden):
        method.learn(task, ctx)
        return
    found, taken = _told_by_teacher(before(), task, share, ctx)
    ctx.log("unlabelled", task=task.index, images=len(hidden), trusted=int(taken.sum()))
    rows = np.flatnonzero(taken.numpy())
    more = Subset(hidden, rows, found.numpy()[rows])
    ctx.checkpoint.expect_more(len(rows))
    method.learn(replace(task, train=Concatenation([task.train, more]), unlabelled=None), ctx)
    # Images that it scored by itself may be such as nobody has labelled: they tell nothing of how often it is right
    if isinstance(method, HoldsOut):
        method.held_out = None
    if isinstance(method, LeavesOut):
        method.left_out = None


def _told_by_teacher(
    teacher: Method, task: Task, share: float, ctx: Context
) -> tuple[Int[Tensor, " u"], Bool[Tensor, " u"]]:
    """The class that each image without a label is taken for, and whether it is learned."""
    assert task.unlabelled is not None
    # What it tells of itself would be told twice
    aside = Context(ctx.seeds, Log(show=ctx.log.show, where=ctx.log.where), ctx.checkpoint.named(TEACHER))
    teacher.learn(replace(task, unlabelled=None), aside)
    loader = Loader(task.unlabelled, teacher.towers.prepare, teacher.towers.pixels, batch=BATCH, cache_bytes=0)
    scores, _ = encode(
        loader, lambda features, _: teacher.scores(features), aside, f"task-{task.index}", embed=teacher.embed
    )
    among = torch.as_tensor(np.unique(task.train.labels))
    found, taken = surest(scores[:, among], share)
    return among[found], taken


def surest(scores: Float[Tensor, "n k"], share: float) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
    """The likeliest class of each row, and the ceil(share n) rows whose best score is farthest ahead of the second; of equals the
    first. Of one class all rows are alike."""
    n, k = scores.shape
    best = scores.double().topk(min(2, k), 1)
    margin = best.values[:, 0] - best.values[:, 1] if k > 1 else best.values.new_zeros(n)
    taken = torch.zeros(n, dtype=torch.bool)
    taken[margin.argsort(descending=True, stable=True)[: math.ceil(share * n)]] = True
    return best.indices[:, 0], taken
