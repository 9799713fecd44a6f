"""Changes to what was learned: a class forgotten or called otherwise, two classes made one, pictures taken out again.

Each is made to a copy of the method. The classifier takes the result over whole, so that a change that fails changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from cairn.classifier.estimate import confusion_counts
from cairn.classifier.inputs import Sentences, descriptions_of, unlabelled
from cairn.classifier.learned import Learned
from cairn.classifier.scoring import BATCH
from cairn.data.identity import SHOWN
from cairn.data.images import reduced
from cairn.data.in_memory import InMemoryImages
from cairn.data.loading import Loader
from cairn.data.names import alike, class_name, listed, require_whole
from cairn.data.task import Task
from cairn.data.templates import prompt_templates
from cairn.errors import ConfigError, DataError, counted, one_line
from cairn.methods.protocol import KeepsSums, Method, NamesClasses
from cairn.towers.preprocessing import decoded_side
from cairn.training.context import Log
from cairn.training.encode import encode
from cairn.types import Features


class Mended(NamedTuple):
    """What takes the place of a classifier's own after a change."""

    method: Method
    learned: Learned
    descriptions: Sentences


@dataclass(frozen=True)
class Mending:
    """Makes changes to what a classifier has learned; see the classifier's methods of the same names."""

    called: str
    """The method's name."""
    copy: Callable[[], Method]
    """Makes a copy of the method as it stands."""
    learned: Learned
    descriptions: Sentences
    templates: Sequence[str] | str
    log: Log

    def forget(self, name: str) -> Mended:
        c, method = self.learned.number(name), self.copy()
        method.forget(c)
        return Mended(method, self.learned.without_class(c), _without_sentences(self.descriptions, self._name(c)))

    def rename(self, name: str, new: str) -> Mended:
        c, new = self.learned.number(name), class_name(new)
        if (other := self.learned.numbers().get(new)) is not None:
            called = (
                "has that name already" if other == c else f"is there already; merge '{self._name(c)}' with it instead"
            )
            raise DataError(f"class '{new}' {called}")
        if self.learned.sets is not None:
            require_whole([new])
        others = [str(kept) for i, kept in enumerate(self.learned.classes) if i != c]
        for notice in alike([*others, new], [new]):
            self.log("notice", text=notice)
        descriptions = _sentences_renamed(self.descriptions, self._name(c), new)
        return Mended(self._named(self.copy(), c, new, descriptions), self.learned.renamed(c, new), descriptions)

    def merge(self, name: str, other: str, into: str | None) -> Mended:
        learned = self.learned
        first, second = sorted((learned.number(name), learned.number(other)))
        into = self._name(learned.number(name)) if into is None else class_name(into)
        if first == second:
            raise DataError(f"class '{name}' and class '{other}' are one class already")
        if learned.numbers().get(into, first) not in (first, second):
            raise DataError(f"class '{into}' is there already; merge two of the three first")
        method, descriptions = self.copy(), self.descriptions
        for old in (self._name(first), self._name(second)):
            if old != into:
                descriptions = _sentences_renamed(descriptions, old, into)
        self._sums(method, "two classes cannot become one").merge(first, second)
        if into != self._name(first):
            self._named(method, first, into, descriptions)
        if twice := len(learned.pictures.of_both(first, second)):
            self.log("notice", text=f"learned as either class, now twice as one: {counted(twice, 'image')}")
        return Mended(method, learned.merged(first, second, into), descriptions)

    def take_out(
        self, given: InMemoryImages, wanted: Callable[[int, int], bool] = lambda row, c: True, how: str = ""
    ) -> Mended | None:
        """Without pictures as the classes that they were learned as and `wanted(row, class number)` says; None if there are none.
        `how` is what a notice says of those not learned so."""
        method, learned, hashes = self.copy(), self.learned, given.content_hashes()
        sums = self._sums(method, "pictures cannot be taken out")
        pairs: dict[tuple[bytes, int], int] = {}
        missing = []
        for row, value in enumerate(hashes):
            own = [c for c in sorted({*learned.pictures.learned_as(value)}) if wanted(row, c)]
            missing += [] if own else [row]
            for c in own:
                pairs.setdefault((value, c), row)
        if missing:
            shown = listed([one_line(given.describe(row)) for row in missing], SHOWN)
            self.log("notice", text=f"not learned{how}: {len(missing)} of {counted(len(given), 'image')}, {shown}")
        if not pairs:
            return None
        copies = {(value, c): learned.pictures.learned_as(value).count(c) for value, c in pairs}
        for c in sorted({c for _, c in pairs}):
            if unknown := int(learned.counts[c]) - learned.pictures.number(c):
                self.log(
                    "notice",
                    text=f"class '{self._name(c)}': {counted(unknown, 'image')} not known one by one; copies of these may be "
                    "among them, which stay",
                )
        rows = sorted({*pairs.values()})
        place = {row: i for i, row in enumerate(rows)}
        seen = reduced(given.taken(rows), decoded_side(method.towers))
        loader = Loader(seen, method.towers.prepare, method.towers.pixels, batch=BATCH)
        features, _ = encode(loader, lambda features, _: features, embed=method.embed)
        each = [(place[row], pair[1]) for pair, row in pairs.items() for _ in range(copies[pair])]
        index, labels = torch.tensor(each).T
        sums.unlearn(features[index], labels)
        descriptions = self.descriptions
        for c in learned.emptied(copies):
            method.forget(c)
            descriptions = _without_sentences(descriptions, self._name(c))
            self.log("notice", text=f"class '{self._name(c)}': all of its images are taken out, so it is gone")
        taken = _taken(method, features[index], labels.numpy(), len(learned.classes), learned.emptied(copies))
        return Mended(method, learned.without_pictures(copies, taken), descriptions)

    def _name(self, c: int) -> str:
        return str(self.learned.classes[c])

    def _sums(self, method: Method, what: str) -> KeepsSums:
        """The method, if what it keeps are sums alone. Raises ConfigError, whose beginning is `what`, otherwise."""
        reason = (
            method.trained if isinstance(method, KeepsSums) else "it trains on images, or keeps more of them than sums"
        )
        if not isinstance(method, KeepsSums) or reason is not None:
            raise ConfigError(
                f"method '{self.called}': {what}: {reason}; undo the change that learned them, or forget the class and learn again"
            )
        return method

    def _named(self, method: Method, c: int, name: str, descriptions: Sentences) -> Method:
        """The method, with class number `c` called so."""
        if not isinstance(method, NamesClasses):
            if method.card.text:
                raise ConfigError(
                    f"method '{self.called}': what it made of a class's name cannot be made anew; forget the class and learn its "
                    "pictures under the new name"
                )
            return method
        templates, found = prompt_templates(self.templates), descriptions_of(descriptions)
        method.rename(c, Task(0, range(c, c + 1), (name,), templates, unlabelled([], None), found), self.log)
        return method


@torch.no_grad()
def _taken(method: Method, features: Features, labels: np.ndarray, k: int, gone: Sequence[int]) -> np.ndarray:
    """(k, k): how many images of each class the method, which knows all but those that are `gone`, takes for each."""
    kept = np.setdiff1d(np.arange(k), gone)
    rows = np.flatnonzero(np.isin(labels, kept))
    if not len(rows):
        return np.zeros((k, k))
    found = method.scores(features[torch.from_numpy(rows)]).argmax(1).cpu().numpy()
    return confusion_counts(kept[found], labels[rows], k)


def _without_sentences(given: Sentences, name: str) -> Sentences:
    """Less those of class `name`; a file of them stays as it is."""
    return {other: said for other, said in given.items() if other != name} if isinstance(given, Mapping) else given


def _sentences_renamed(given: Sentences, old: str, new: str) -> Sentences:
    """With the sentences of class `old` under its name `new`, unless that has some of its own."""
    found = descriptions_of(given)
    if found is None or old not in found.classes:
        return given
    sentences = {name: list(said.sentences) for name, said in found.classes.items()}
    own = sentences.pop(old)
    return {new: own} | sentences
