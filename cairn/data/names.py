"""Class names: one spelling for each, no invisible characters, and a notice of names that are too much alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from importlib import resources

from cairn.errors import DataError, one_line

SHOWN = 10
"""Names in a message at most."""

BETWEEN = ";"
"""Stands between the names of a label set."""


def packaged(file: str) -> tuple[str, ...]:
    """The lines of a list of names that the package brings, below `names/`."""
    return tuple(resources.files("cairn.data").joinpath("names", file).read_text(encoding="utf-8").splitlines())


def normal_form(name: str) -> str:
    """In Unicode form NFC, so that an accent is spelled in one way, and without spaces at the ends."""
    return unicodedata.normalize("NFC", name).strip()


def class_name(name: str) -> str:
    """The name as it is kept, in `normal_form`. Raises DataError for one that is empty then, or that `require_text` refuses."""
    kept = normal_form(name)
    if not kept:
        raise DataError(f"class {name!r}: a name needs at least one visible character; give the class a name")
    require_text([kept])
    return kept


def text_problem(text: str) -> str | None:
    """What is wrong with a text that goes into prompts, results, tables and terminals, if anything: characters not seen."""
    if one_line(text) != text:
        return "holds a control character, an invisible or direction-changing one, or is not UTF-8"
    return None


def require_text(names: Iterable[str]) -> None:
    """Raises DataError for a class name that has a `text_problem`."""
    for name in names:
        if problem := text_problem(name):
            raise DataError(f"class '{one_line(name)}': the name {problem}; rename the class")


def require_whole(names: Iterable[str]) -> None:
    """Raises DataError for a class name that is several where names of a label set are written side by side."""
    for name in names:
        if BETWEEN in name:
            raise DataError(
                f"class '{name}': semicolons stand between the names of a label set; leave them out of names"
            )


def spaced(name: str) -> str:
    """'aquarium_fish' -> 'aquarium fish'."""
    return " ".join(name.replace("_", " ").split())


def alike(names: Sequence[str], new: Collection[str] | None = None) -> list[str]:
    """A notice of classes that the towers can hardly tell apart by name, if there are any; with `new`, of groups with one
    of these in them alone. CLIP's tokenizer makes all letters small, so that such classes have one prompt."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(spaced(name).casefold(), []).append(name)
    found = [
        " and ".join(map(repr, group))
        for group in groups.values()
        if len(group) > 1 and (new is None or not set(group).isdisjoint(new))
    ]
    if not found:
        return []
    return [
        f"different classes whose names differ by case, underscores or spaces alone, so that their prompts are the same: "
        f"{listed(found)}; if they are one class, give them one name"
    ]


def listed(texts: Sequence[str], most: int = SHOWN, separator: str = ", ") -> str:
    """The first of them, and how many more there are."""
    more = len(texts) - most
    return separator.join(texts[:most]) + (f"{separator}and {more} more" if more > 0 else "")
