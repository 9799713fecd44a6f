"""A learner whose images may show several classes: what it says of each class by itself, and from when on it says that it is shown.

Scores of most methods only tell the classes of one image apart, so v = (score - mean score of the image) / s, s the deviation over the
images that were left out last, since the scale of scores changes with what is learned; of methods that learn label sets as they are
(`Card.label_sets`) v is the score. The probability that an image shows class c is sigma(a v + o_c) (see
`cairn.maths.binary_posteriors`), and the image is said to show c where that is at least the threshold t_c, which has the largest F1.
Both come from images that were left out of learning, all of one image's copies together.

What is kept of these images are decisions: v, whether the class is shown, a weight, at most MOST_SHOWN and MOST_OTHERS of a class,
in order of size. None says which image it is of, nor which other decision is of the same image.

A call tells of the classes that it names: an image of the call that is not said to show one of them does not show it. Of other known
classes nothing is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from cairn.maths.binary_posteriors import Decisions, best_threshold, log_odds, weighted_average_precision
from cairn.storage.schema import Amount, Count, Record, Share
from cairn.types import Scores

MOST_SHOWN, MOST_OTHERS = 128, 384
"""Decisions on images that show the class, and that do not."""

TRUSTED = 10.0
"""Images that show a class, of which a threshold follows what is seen as much as what its probabilities expect."""

UNKNOWN = 0.5
"""The threshold of a class of which no image is known not to show it."""

State = Mapping[str, Tensor]


class LabelSetRule(Record):
    """How sets of classes are made of scores."""

    centred: bool = Field(description="whether the mean score of an image is taken off its scores first")
    scale: Annotated[float, Field(gt=0)] = Field(default=1.0, description="s; 1 where the mean is not taken off")
    slope: Amount = Field(default=1.0, description="a")
    offsets: list[float] = Field(default=[], description="o_c of each class")
    thresholds: list[Share] = Field(default=[], description="t_c: from this probability on an image is said to show c")
    images: Count = Field(default=0, description="left-out images that they come from")
    learned: Count = Field(default=0, description="images that could not be left out and stand in for such")

    @model_validator(mode="after")
    def _one_of_each_class(self) -> LabelSetRule:
        if len(self.offsets) != len(self.thresholds):
            raise ValueError(f"offsets: {len(self.offsets)} of them for {len(self.thresholds)} thresholds")
        return self

    def differences(self, scores: Scores) -> Float[Tensor, "n k"]:
        """v s, in float64."""
        v = scores.detach().double().cpu()
        return v - v.mean(1, keepdim=True) if self.centred else v

    def probabilities(self, scores: Scores) -> Float[Tensor, "n k"]:
        """Of each class by itself, in float64."""
        v = self.differences(scores) / self.scale
        return (self.slope * v + torch.tensor(self.offsets, dtype=torch.float64)).sigmoid()


NOTHING = Decisions(
    torch.zeros(0, dtype=torch.int64), *(torch.zeros(0, dtype=torch.float32) for _ in ("values", "shown", "weights"))
)


@dataclass(frozen=True, eq=False)
class LearnedSets:
    """The rule of a learner, and the decisions that it comes from. Immutable: every change returns another."""

    rule: LabelSetRule
    decisions: Decisions = field(default=NOTHING)

    @property
    def thresholds(self) -> np.ndarray:
        """t_c, (k,)."""
        return np.array(self.rule.thresholds, dtype=np.float64)

    def with_images(
        self, scores: Scores, shown: Bool[Tensor, "n k"], told: Bool[Tensor, " k"], left_out: bool = True
    ) -> LearnedSets:
        """With images scored among all k classes seen, which show what is said of the classes `told`. `left_out` is false for images
        that were learned."""
        key, k, v = "images" if left_out else "learned", scores.shape[1], self.rule.differences(scores)
        scale = (float(v.std(correction=0)) or 1.0) if self.rule.centred else 1.0
        x, own = (v / scale).float(), [_of_class(self.decisions, c) for c in range(k)]
        parts = [_thinned(own[c], c, x[:, c], shown[:, c]) if told[c] else own[c] for c in range(k)]
        rule = self.rule.model_copy(update={"scale": scale, key: getattr(self.rule, key) + len(scores)})
        return _fitted(rule, _joined(parts), k)

    def without_class(self, c: int) -> LearnedSets:
        """Class c forgotten; later classes one number lower."""
        k = len(self.rule.offsets)
        left = _kept(self.decisions, [other != c for other in range(k)])
        left = left._replace(classes=left.classes - (left.classes > c).long())
        return _fitted(self.rule, left, k - 1)

    def for_classes(self, k: int) -> LearnedSets:
        """With k classes in all, nothing being known of those that are new."""
        return _fitted(self.rule, self.decisions, k)

    @property
    def macro_f1(self) -> float | None:
        """Mean of the classes' F1 with their thresholds on the images left out; None without any."""
        found = [
            2 * hits / (said + shows) if said + shows else 0.0
            for hits, said, shows in map(self._counts, range(len(self.rule.offsets)))
            if shows
        ]
        return float(np.mean(found)) if found else None

    @property
    def mean_average_precision(self) -> float | None:
        """mAP on the images left out; None without any."""
        own = [_of_class(self.decisions, c) for c in range(len(self.rule.offsets))]
        found = [weighted_average_precision(one.values, one.shown, one.weights) for one in own]
        known = [value for value in found if value is not None]
        return float(np.mean(known)) if known else None

    def _counts(self, c: int) -> tuple[float, float, float]:
        """Of class c: decisions that it is shown and is, that it is shown, that it is."""
        own = _of_class(self.decisions, c)
        said = _probabilities(self.rule, own, c) >= self.rule.thresholds[c]
        w, y = own.weights.double(), own.shown.double()
        return float((w * y)[said].sum()), float(w[said].sum()), float((w * y).sum())

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.decisions._asdict())

    @classmethod
    def from_state(cls, rule: LabelSetRule, state: State | None) -> LearnedSets:
        """Raises ValueError for a state that is none of so many classes."""
        if state is None or state.keys() != set(Decisions._fields):
            raise ValueError(f"holds {', '.join(state or ()) or 'nothing'} in place of {', '.join(Decisions._fields)}")
        found = Decisions(*(state[name] for name in Decisions._fields))
        n = found.classes.numel()
        if found.classes.dtype != torch.int64 or any(
            part.shape != (n,) or (i and part.dtype != torch.float32) for i, part in enumerate(found)
        ):
            raise ValueError("shapes or types are not those of decisions")
        if n and not (int(found.classes.min()) >= 0 and int(found.classes.max()) < len(rule.offsets)):
            raise ValueError("a class number is out of range")
        if n and not (bool((found.weights > 0).all()) and bool(((found.shown >= 0) & (found.shown <= 1)).all())):
            raise ValueError("weights or targets are out of range")
        return cls(rule, found)

    def to_record(self) -> dict[str, Any]:
        return self.rule.model_dump(mode="json")


def _fitted(rule: LabelSetRule, told: Decisions, k: int) -> LearnedSets:
    """With slope, offsets and thresholds of k classes from these decisions. A class that every image of its calls shows, as one
    that is taught alone, says nothing of when it is not shown: it has the offset of all, and UNKNOWN for a threshold."""
    both = [bool((_of_class(told, c).shown < 0.5).any()) for c in range(k)]
    slope, offsets = log_odds(_kept(told, both) if any(both) else told, k)
    rule = rule.model_copy(update={"slope": slope, "offsets": offsets.tolist()})
    thresholds = [_threshold(rule, _of_class(told, c), c) if both[c] else UNKNOWN for c in range(k)]
    return LearnedSets(rule.model_copy(update={"thresholds": thresholds}), told)


def _threshold(rule: LabelSetRule, own: Decisions, c: int) -> float:
    """t_c. Few images tell little of the best one: they count as much as there are, beside what the probabilities expect."""
    p, yes = _probabilities(rule, own, c), float((own.weights * own.shown).sum())
    share = yes / (yes + TRUSTED)
    return best_threshold(p, share * own.shown.double() + (1 - share) * p, own.weights.double())[0]


def _probabilities(rule: LabelSetRule, own: Decisions, c: int) -> Tensor:
    return (rule.slope * own.values.double() + rule.offsets[c]).sigmoid()


def _of_class(told: Decisions, c: int) -> Decisions:
    return Decisions(*(part[told.classes == c] for part in told))


def _kept(told: Decisions, which: list[bool]) -> Decisions:
    """Those of the classes of which that is true."""
    known = torch.tensor(which, dtype=torch.bool)[told.classes] if len(told.classes) else told.classes.bool()
    return Decisions(*(part[known] for part in told))


def _joined(parts: list[Decisions]) -> Decisions:
    return Decisions(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _thinned(own: Decisions, c: int, values: Tensor, shown: Tensor) -> Decisions:
    """Decisions on class c with these, in order of size; of more than there may be evenly chosen ones stand for all."""
    n = len(values)
    more = Decisions(torch.full((n,), c), values, shown.float(), torch.ones(n))
    both, found = _joined([own, more]), []
    for most, which in ((MOST_SHOWN, both.shown >= 0.5), (MOST_OTHERS, both.shown < 0.5)):
        part = Decisions(*(column[which] for column in both))
        order = part.values.argsort(descending=True)
        part = Decisions(*(column[order] for column in part))
        if len(order) > most:
            weight = part.weights.sum() / most
            middles = (torch.arange(most) + 0.5) * weight
            part = Decisions(*(column[torch.searchsorted(part.weights.cumsum(0), middles)] for column in part))
            part = part._replace(weights=torch.full((most,), float(weight)))
        found.append(part)
    return _joined(found)


def told(sets: LearnedSets) -> str:
    """What images left out tell, in a line."""
    rule, mean, f1 = sets.rule, sets.mean_average_precision, sets.macro_f1
    if not rule.images or mean is None or f1 is None:
        return (
            "too few pictures to leave any out: thresholds are from those learned, and how good it is is not estimated"
        )
    of = "picture left out, each class" if rule.images == 1 else "pictures left out, each class"
    return (
        f"on {rule.images:,} {of} among those of the calls that named it: mAP {100 * mean:.0f} %, macro F1 {100 * f1:.0f} %; among "
        "all classes it is less: `cairn evaluate` tells, on pictures kept aside"
    )


def before_any(centred: bool) -> LearnedSets:
    """Before anything was learned."""
    return LearnedSets(LabelSetRule(centred=centred))
