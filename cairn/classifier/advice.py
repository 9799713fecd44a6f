"""What an estimate or an evaluation says in a few lines, and what to do about classes that are mixed up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from cairn.classifier.estimate import FEWEST, AccuracyEstimate, ConfusedPair, short_of_pictures
from cairn.data.names import listed
from cairn.errors import counted, one_line
from cairn.towers.protocol import Towers

NAMED = 3
"""Classes in a line, at most."""

ALIKE = 0.25
"""Two names mean nearly the same to the text tower if 1 - cosine is less than so many times that of the median pair: with
CLIP's, 'beer bottle' and 'wine bottle', and not 'duck' and 'goose'."""


COMPARED = 100
"""Names that the median is taken of, at most, beside those of the pairs."""


def accuracy_lines(estimate: AccuracyEstimate, names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """The accuracy to expect, the lowest classes, those short of pictures, and what changed for those known before."""
    lines, accuracy, interval = [], estimate.accuracy, estimate.interval
    if accuracy is not None and interval is not None:
        how = ", ".join(f"{counted(n, 'picture')} {source}" for source, n in estimate.sources.items())
        unknown = int(np.isnan(estimate.by_class).sum())
        missing = f"; not known of {counted(unknown, 'class')}" if unknown else ""
        lines.append(
            f"estimated accuracy: {_percent(accuracy)} ({_percent(interval[0])} to {_percent(interval[1])}), every class counted "
            f"the same; from {how}{missing}{_of_texts(estimate, counts)}"
        )
        lines += _lowest(estimate, names, accuracy)
    if short := short_of_pictures(counts):
        few = listed([f"{_name(names[c])} ({counts[c]})" for c in short], NAMED)
        lines.append(f"short of pictures (fewer than {FEWEST}, or than half of the median class): {few}")
    return lines + _changed(estimate, names)


def _of_texts(estimate: AccuracyEstimate, counts: Sequence[int]) -> str:
    """That a class's only picture, left out, leaves it to its text: what more the picture tells is not in the estimate."""
    alone = sum(n == 1 and m > 0 for n, m in zip(counts, estimate.images.tolist(), strict=False))
    return f"; too low: {counted(alone, 'class')} with a single picture, scored without it" if alone else ""


def pair_line(pair: ConfusedPair, names: Sequence[str], images: Sequence[float]) -> str:
    """Which two classes are mixed up, and how often; `images` counts those of each class."""
    a, b = _name(names[pair.a]), _name(names[pair.b])
    return f"{a} and {b}, {pair.images:.0f} of {counted(round(images[pair.a] + images[pair.b]), 'picture')}"


def _lowest(estimate: AccuracyEstimate, names: Sequence[str], accuracy: float) -> list[str]:
    """Classes that are below the mean whatever chance does."""
    a = estimate.by_class.tolist()
    order = map(int, np.argsort(a))
    low = [c for c in order if not math.isnan(a[c]) and estimate.interval_of(c)[1] < accuracy]
    if not low:
        return []
    return [f"lowest: {listed([f'{_name(names[c])} {_percent(a[c])}' for c in low], NAMED)}"]


def _changed(estimate: AccuracyEstimate, names: Sequence[str]) -> list[str]:
    """How the classes known before the last task do now, and the one that lost most to the new ones."""
    a, M = estimate.by_class.tolist(), estimate.matrix
    before = {c: value for c, value in enumerate(estimate.before) if value is not None and not math.isnan(a[c])}
    if not before:
        return []
    was, now = sum(before.values()) / len(before), sum(a[c] for c in before) / len(before)
    line = f"classes known before this task: {_percent(was)} before, {_percent(now)} now"
    most = min(before, key=lambda c: a[c] - before[c])
    gone = M[most, len(estimate.before) :]
    if round(100 * a[most]) < round(100 * before[most]) and gone.any():
        taken = _name(names[len(estimate.before) + int(gone.argmax())])
        line += (
            f"; most: {_name(names[most])} {_percent(before[most])} before, {_percent(a[most])} now, taken for {taken}"
        )
    return [line]


def advice(
    pairs: Sequence[ConfusedPair],
    names: Sequence[str],
    counts: Sequence[int],
    alike: Sequence[bool],
    shared: Sequence[int] | None = None,
) -> list[str]:
    """What to do about classes that are taken for one another: where pictures that were learned as both, `shared`, make up half of
    what is mixed up or of either class, these; more pictures of a class that is short of them; where the text tower hardly tells the
    two apart, `alike`, another name; otherwise they are to be looked at."""
    short, found = short_of_pictures(counts), []
    for pair, same, both in zip(pairs, alike, shared or [0] * len(pairs), strict=True):
        if both and 2 * both >= min(pair.images, counts[pair.a], counts[pair.b]):
            found.append(
                f"{counted(both, 'picture')} {'was' if both == 1 else 'were'} learned as both: `cairn merge` if they are one class, "
                "else `cairn relabel` says of which each picture is"
            )
        elif few := [f"{_name(names[c])} (it has {counts[c]})" for c in short if c in pair[:2]]:
            found.append(f"learn more pictures of {' and '.join(few)}")
        elif same:
            found.append(
                "the names mean nearly the same to the text tower: a more telling name for one, or descriptions"
            )
        else:
            found.append("look at the pictures: some under the wrong name, or one class under two names?")
    return found


def alike_names(
    towers: Towers, names: Sequence[str], templates: Sequence[str], pairs: Sequence[ConfusedPair]
) -> list[bool]:
    """Of each pair, whether its names mean nearly the same to the text tower. Of fewer than three classes there is nothing to
    compare with; of very many the first are enough for that."""
    compared = sorted({c for pair in pairs for c in pair[:2]} | set(range(min(len(names), COMPARED))))
    if not pairs or len(compared) < 3 or not towers.has_text:
        return [False] * len(pairs)
    with torch.no_grad():
        t = towers.class_texts([names[c] for c in compared], list(templates)).double().cpu().numpy()
    distance, at = 1 - t @ t.T, {c: i for i, c in enumerate(compared)}
    near = ALIKE * np.median(distance[np.triu_indices(len(compared), 1)])
    return [bool(distance[at[pair.a], at[pair.b]] < near) for pair in pairs]


def _name(name: str) -> str:
    return f"'{one_line(name)}'"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
