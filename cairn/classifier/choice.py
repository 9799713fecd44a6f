"""`method="auto"`: which method suits the images of a learner's first call, as images left out tell.

`blend` learns them. Methods in closed form that cost next to nothing beside it learn the same embeddings, and each says of
images that it has not learned how likely their classes are: blend of each without learning it, the others in five parts, with
the temperature that suits their scores best (`cairn.classifier.calibration`). By mean log-likelihood L and its standard error e

    method m is taken in place of blend if L_m - L_blend > 2 sqrt(e_m^2 + e_blend^2)

the likeliest of several. Blend has what the others score by among its own parts, so another is seldom better by more than chance;
and a choice among the first classes is kept for all that come later, where blend weighs its parts anew with each call.

Of classes of one image each, nothing is known of an image left out but its class's name. Where that tells no more than chance, as
of article numbers, blend is taken without texts: with them it would look for the classes where their names are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from cairn.classifier.calibration import UNCALIBRATED, LeftOut, rehearsed_in_folds
from cairn.data.embeddings import Rows
from cairn.data.task import Task
from cairn.methods.catalogue import METHODS
from cairn.methods.protocol import LeavesOut, Method
from cairn.towers.features import FeatureTowers
from cairn.towers.protocol import Towers
from cairn.training.context import Context, Seeds
from cairn.types import Features

AUTO, FIRST = "auto", "blend"
CHEAP = ("lda", "simplecil", "zero-shot")
"""What is compared with FIRST."""

MOST = 4096
"""Images; of more, blend is taken as it is."""

CERTAIN = 2.0
"""Standard errors."""


WORDLESS = {"text": False}
"""Settings of FIRST, where names of classes tell nothing."""

NAMES_TELL_NOTHING = (
    f"method {FIRST} without class texts (text=false): there is one image of each class, and the classes' names tell no more than "
    "chance which is which"
)


class Compared(NamedTuple):
    """A method, and what it says of images that it has not learned."""

    method: str
    likelihood: float
    """L, mean log-probability of their classes, in nats."""
    error: float
    """e."""
    accuracy: float
    images: int

    def better_than(self, other: Compared) -> bool:
        """By more than chance."""
        return self.likelihood - other.likelihood > CERTAIN * math.hypot(self.error, other.error)


@dataclass(frozen=True)
class Choice:
    """The method that is taken, and why."""

    method: str
    compared: tuple[Compared, ...] = ()
    """Of FIRST and the others, in this order; none where nothing could be compared."""

    @property
    def reason(self) -> str:
        """One line."""
        if not self.compared:
            return f"method {self.method}: nothing to compare it by yet"
        first, *others = self.compared
        told = ", ".join(f"{one.method} {one.likelihood:.2f}" for one in self.compared)
        why = (
            "no other is better by more than chance"
            if self.method == first.method
            else f"better than {first.method} by more than chance"
        )
        return (
            f"method {self.method}: {why} on {first.images} images left out of learning (mean log-likelihood {told}; "
            f"{first.method} tells {100 * first.accuracy:.0f} % of them right, the others at most "
            f"{100 * max(one.accuracy for one in others):.0f} %)"
        )


def comparable(task: Task) -> bool:
    """Whether images of a first task tell which method suits them. Beside images without labels they do not: of the methods that
    are compared one learns from these by itself."""
    return (
        task.unlabelled is None
        and len(task.classes) > 1
        and len(task.train) <= MOST
        and bool((np.bincount(task.train.labels) > 1).sum() > 1)
    )


def untold(left_out: LeftOut, task: Task) -> Bool[Tensor, " n"]:
    """Which images left out are the only ones of classes that are new, if what is said of these is no better than chance."""
    y = left_out.labels.cpu()
    counts = np.bincount(task.train.labels, minlength=task.classes.stop)
    alone = torch.from_numpy(counts)[y].eq(1) & (y >= task.classes.start)
    k = left_out.scores.shape[1]
    if k < 2 or not alone.any():
        return torch.zeros_like(alone)
    loss = torch.nn.functional.cross_entropy(left_out.scores.cpu().double()[alone], y[alone])
    return alone & (loss >= math.log(k))


def choice(first: Method, task: Task, ctx: Context) -> Choice:
    """`first` has just learned the task, its first; the checkpoint of `ctx` has kept the features of all images, unless they
    are features themselves."""
    assert isinstance(first, LeavesOut)
    features = ctx.checkpoint.features_of(torch.arange(len(task.train)))
    if (features is None and first.towers.has_images) or first.left_out is None:
        return Choice(FIRST)
    if features is None:
        features = torch.stack([torch.as_tensor(task.train[i]) for i in range(len(task.train))])
    found = [_compared(FIRST, LeftOut(*first.left_out))]
    flat = _embedded(features[:, : first.towers.dim], task)
    towers = _as_features(first.towers, task)
    for name in CHEAP:
        if name != "zero-shot" or towers.has_text:
            parts = list(rehearsed_in_folds(lambda name=name: _fresh(name, towers, ctx.seeds), flat, ctx))
            scores, labels = torch.cat([part.scores for part in parts]), torch.cat([part.labels for part in parts])
            found.append(_compared(name, LeftOut(scores, labels)))
    best = max(
        (one for one in found[1:] if one.better_than(found[0])), key=lambda one: one.likelihood, default=found[0]
    )
    return Choice(best.method, tuple(found))


def _compared(method: str, left_out: LeftOut) -> Compared:
    calibration, y = UNCALIBRATED.with_images(left_out), left_out.labels.cpu()
    log_p = calibration.log_probabilities(left_out.scores)[torch.arange(len(y)), y]
    right = (left_out.scores.cpu().argmax(1) == y).double().mean().item()
    error = log_p.std().item() / math.sqrt(len(y)) if len(y) > 1 else math.inf
    return Compared(method, log_p.mean().item(), error, right, len(y))


def _fresh(name: str, towers: Towers, seeds: Seeds) -> Method:
    entry = METHODS[name]
    return entry.build(towers, entry.default_config(towers), seed=seeds.seed)


def _embedded(z: Features, task: Task) -> Task:
    """The task with embeddings in place of images."""
    return Task(
        task.index, task.classes, task.names, task.templates, Rows(z.cpu().numpy(), task.train.labels, "left out")
    )


def _as_features(towers: Towers, task: Task) -> FeatureTowers:
    """Towers whose images are their embeddings, with the texts of the task's classes."""
    text = towers.class_texts(task.names, task.templates).cpu().numpy() if towers.has_text else None
    return FeatureTowers(
        name=towers.name,
        dim=towers.dim,
        logit_scale=towers.logit_scale,
        fingerprint=towers.fingerprint,
        names=task.names,
        text=text,
    )
