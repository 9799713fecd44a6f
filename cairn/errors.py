"""What can go wrong for a reason outside the code. Each message is one line: the value, then the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CairnError(Exception):
    """Root of the tree. The command prints the message alone and exits with status 2."""


class UnknownName(CairnError):
    """A name that no table holds; the message shows the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = list(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
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


class NotFinite(CairnError):
    """A loss, statistic or map that is no longer a number."""
