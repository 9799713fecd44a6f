"""What can go wrong for a reason outside the code. Each message is one line: the value, then the remedy."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable

LETTERS = 2000
"""Longest message: a value from a file may have any length."""

_NOT_ON_A_LINE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: str | os.PathLike) -> str:
    """The text as a message can hold it: control characters, line breaks and bytes that are not UTF-8 as escapes."""
    return _NOT_ON_A_LINE.sub(lambda found: found[0].encode("unicode_escape").decode(), os.fspath(text))


def first_line(error: Exception) -> str:
    """What a foreign error says, as far as a message of one line can hold it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class CairnError(Exception):
    """Root of the tree. The command prints the message alone and exits with status 2."""

    def __str__(self) -> str:
        message = super().__str__()
        if len(message) > LETTERS:
            message = f"{message[: LETTERS // 2]} ... {message[-LETTERS // 2 :]}"
        return one_line(message)


class UnknownName(CairnError):
    """A name that no table holds; the message shows the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = list(known)
        near = difflib.get_close_matches(name[:100], known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        super().__init__(f"unknown {kind} '{name}': {hint}")


class ConfigError(CairnError):
    """Settings that are unknown, out of range or contradict each other."""


class DataError(CairnError):
    """A data set that is missing, empty, damaged or of the wrong shape."""


class TowersError(CairnError):
    """Weights that cannot be loaded, or towers that lack what a method asks of them."""


class ResultError(CairnError):
    """An output folder or a stored result that cannot be used."""


class ExemplarsKept(CairnError):
    """A method that is said to be exemplar-free and keeps images."""


class NotFinite(CairnError):
    """A loss, statistic or map that is no longer a number."""


class Stopped(CairnError):
    """Asked to stop by a signal, after the state was kept; the command exits with 128 and the signal's number."""

    def __init__(self, signal: int):
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal
