"""What a learner is, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cairn.errors import one_line
from cairn.methods.catalogue import method_named


def card(record: Mapping[str, Any]) -> str:
    """A page of Markdown from the record that a learner is saved with."""
    entry, towers = method_named(record["method"]), record["towers"]
    lines = [
        "# A classifier that learns on", "",
        f"- method: {record['method']}, {entry.title} ({entry.source})",
        f"- towers: {one_line(towers['name'])}, fingerprint {towers['fingerprint']}, revision {towers['revision'] or 'none'}",
        f"- {len(record['classes'])} classes from {sum(record['counts'])} images, none of which is kept",
        f"- {record['bytes']:,} bytes, of which {record['memory_bytes']:,} are statistics of classes",
        f"- made with cairn {record['versions']['cairn']}, torch {record['versions']['torch']}", "",
        "| class | images |", "|---|---|",
        *(f"| {_cell(name)} | {count} |" for name, count in zip(record["classes"], record["counts"], strict=True)), "",
        "| date | what |", "|---|---|",
    ]  # fmt: skip
    for entry in record["history"]:
        if "forgotten" in entry:
            lines.append(f"| {entry['date']} | a class was forgotten |")
        else:
            what = f"{len(entry['new'])} new classes" + (
                f", more of {len(entry['again'])} known ones" if entry["again"] else ""
            )
            lines.append(f"| {entry['date']} | {what}, {entry['images']} images |")
    return "\n".join(lines) + "\n"


def _cell(name: str) -> str:
    """A name in a Markdown table: text, never markup."""
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>()#+-.!|" else sign for sign in one_line(name))
