"""What can go wrong for a reason outside the code. Each message is one line: the value, then the remedy."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from signal import SIGINT, Signals

LETTERS = 2000
"""Longest message: a value from a file may have any length."""

KNOWN = 30
"""Names that are listed, at most, where none is near."""

_NOT_ON_A_LINE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"  # control characters, line ends, bytes that are not UTF-8
    # Unicode's category Cf: of no width, and those that turn the direction of writing
    "\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f"
    "\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0001\U000e0020-\U000e007f"
    # of other categories and invisible all the same: joiners, fillers, blanks, variation selectors
    "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def one_line(text: str | os.PathLike) -> str:
    """The text as a message can hold it, on one line: characters that are not seen, or that change how others are seen, as
    escapes."""
    return _NOT_ON_A_LINE.sub(_escape, os.fspath(text))


def printable(text: str) -> str:
    """Lines of text as a terminal can show them: as `one_line`, line by line."""
    return "\n".join(map(one_line, text.split("\n")))


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def counted(number: int, noun: str) -> str:
    """'1 picture', '1,200 pictures', '2 classes'."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number:,} {noun}{ending}"


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


def suggestion(name: str, known: Iterable[str]) -> str:
    """The names that are meant, perhaps; where none is near, which there are."""
    known = list(known)
    if near := difflib.get_close_matches(name[:100], known, n=3, cutoff=0.4):
        return f"did you mean {' or '.join(near)}?"
    more = f" and {len(known) - KNOWN} more" if len(known) > KNOWN else ""
    return f"known: {', '.join(known[:KNOWN])}{more}"


class UnknownName(CairnError):
    """A name that no table holds; the message shows the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        super().__init__(f"unknown {kind} '{name}': {suggestion(name, known)}")


class ConfigError(CairnError):
    """Settings that are unknown, out of range or contradict each other."""


class DataError(CairnError):
    """A data set that is missing, empty, damaged or of the wrong shape."""


class NotFitted(ConfigError, ValueError, AttributeError):
    """A classifier is asked that has learned nothing; of the kinds that scikit-learn's NotFittedError is of."""


class InvalidInput(DataError, ValueError):
    """Images, rows or labels handed over in Python that cannot be used."""


class UnreadableImages(InvalidInput):
    """Images that cannot be read; `reasons` says why, by position."""

    def __init__(self, message: str, reasons: Mapping[int, str]):
        super().__init__(message)
        self.reasons = dict(reasons)


class TowersError(CairnError):
    """Weights that cannot be loaded, or towers that lack what a method asks of them."""


class ResultError(CairnError):
    """An output folder or a stored result that cannot be used."""


class ExemplarsKept(CairnError):
    """A method that is said to be exemplar-free and keeps images."""


class NotFinite(CairnError):
    """A loss, statistic or map that is no longer a number."""


class OutOfMemory(CairnError):
    """The memory of a device, or of the machine, does not hold what is asked for."""


def out_of_memory(error: BaseException) -> str | None:
    """What is to be said where Python, numpy or torch got no memory; None of another error."""
    said = str(error)
    if not isinstance(error, MemoryError) and not (
        isinstance(error, RuntimeError)
        and ("DefaultCPUAllocator" in said or type(error).__name__ == "OutOfMemoryError")
    ):
        return None
    asked = re.search(r"[Uu]nable to allocate [^,]*?B\b|allocate \d+ bytes|allocate [\d.]+ [KMGT]iB", said)
    return f"out of memory{f' ({one_line(asked[0])})' if asked else ''}; free some, or give less at once"


GOES_ON = "the same call goes on where it was"


class Interrupted(CairnError):
    """Asked to stop by a signal; `state` says what was done and how it goes on. The command exits with 128 and the signal's
    number."""

    def __init__(self, signal: int, state: str = ""):
        name = "Ctrl-C" if signal == SIGINT else Signals(signal).name
        super().__init__(f"interrupted ({name})" + (f"; {state}" if state else ""))
        self.signal = signal
