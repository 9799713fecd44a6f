"""What a learner is, for people."""

from __future__ import annotations

import math

from cairn.classifier.advice import accuracy_lines
from cairn.classifier.estimate import AccuracyEstimate
from cairn.classifier.record import LearnerRecord
from cairn.errors import counted, one_line
from cairn.methods.catalogue import method_named

KEPT = {
    "buffer": "some of which are kept as the tower sees them: they are in this folder",
    "exemplars": "none of which is kept, but embeddings of some",
}
"""What is said of the images that were learned from, where a method keeps single ones."""


def card(record: LearnerRecord) -> str:
    """A page of Markdown from the record that a learner is saved with."""
    entry, towers, made_by = method_named(record.method), record.towers, record.versions
    sets, learned = record.label_sets, "image" if record.label_sets is None else "label"
    column = "estimated accuracy, with its interval" if sets is None else "said to be shown from a probability of"
    lines = [
        "# A classifier that learns on",
        "",
        f"- method: {record.method}, {entry.card.title} ({entry.card.source})",
        f"- towers: {one_line(towers.name)}, fingerprint {one_line(towers.fingerprint)}, "
        f"revision {one_line(towers.revision or 'none')}",
        f"- {counted(len(record.classes), 'class')} from {counted(sum(record.counts), learned)}, "
        f"{KEPT.get(entry.card.keeps, 'none of which is kept')}",
        f"- {counted(record.bytes, 'byte')}, of which {record.memory_bytes:,} are "
        f"{'images' if entry.card.keeps == 'buffer' else 'statistics of classes'}",
        f"- {counted(record.picture_hashes, 'hash')} (SHA-256 of the pixels) by which learned images are known again; no image can "
        "be made from one, but who has an image can tell whether it was learned",
        f"- made with cairn {one_line(made_by.get('cairn', '?'))}, torch {one_line(made_by.get('torch', '?'))}",
        "",
        *(f"- {line}" for line in _what_is_known(record)),
        "",
        f"| class | images | {column} |",
        "|---|---|---|",
        *(
            f"| {_cell(name)} | {count} | {_estimated(record.estimate, c) if sets is None else f'{sets.thresholds[c]:.2f}'} |"
            for c, (name, count) in enumerate(zip(record.classes, record.counts, strict=True))
        ),
        "",
        "| date | what |",
        "|---|---|",
    ]
    lines += [f"| {entry.date} | {entry.told} |" for entry in record.history]
    moved = [(entry.date, one) for entry in record.history if entry.drift for one in entry.drift.shifted]
    if moved:
        lines += [
            "",
            "| date | class whose new images were shifted | images | shift | by chance |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {date} | {_cell(one.name)} | {one.images} | {one.shift:.2f} | {one.by_chance:.2f} |"
            for date, one in moved
        ]
    return "\n".join(lines) + "\n"


def _what_is_known(record: LearnerRecord) -> list[str]:
    if record.label_sets is None:
        return accuracy_lines(record.estimate, [*map(_cell, record.classes)], record.counts)
    rule = record.label_sets
    images = counted(rule.images, "image") + " left out" if rule.images else counted(rule.learned, "image") + " learned"
    return [f"images may show several classes; probabilities and thresholds are from {images}"]


def _estimated(estimate: AccuracyEstimate, c: int) -> str:
    a = estimate.by_class[c] if c < len(estimate.doubt) else math.nan
    if math.isnan(a):
        return "not known"
    low, high = estimate.interval_of(c)
    return f"{100 * a:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def _cell(name: str) -> str:
    """A name in a Markdown table: text, never markup."""
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>()#+-.!|" else sign for sign in one_line(name))
