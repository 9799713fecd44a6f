"""Fingerprints of towers: `<weights>-<tokenizer>`, and which of them name the same towers.

The weights' part covers weights, activation and preprocessing, the tokenizer's part what turns a text into tokens. Records
that were written before tokenizers were covered hold the weights' part alone and are compared by it. Any other text, such
as the fingerprint of a features file, equals only itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_FULL = re.compile("([0-9a-f]{16})-[0-9a-f]{16}")


def full_fingerprint(weights: str, tokenizer: str) -> str:
    return f"{weights}-{tokenizer}"


def weights_part(fingerprint: str) -> str:
    """The part that decides the embedding of an image."""
    found = _FULL.fullmatch(fingerprint)
    return found[1] if found else fingerprint


def same_towers(first: str, second: str) -> bool:
    """Whether two fingerprints can be of the same towers: equal, or equal in the one part that both have."""
    return first == second or weights_part(first) == second or first == weights_part(second)


def completed(fingerprints: Iterable[str]) -> dict[str, str]:
    """What each fingerprint is compared as among the others: one of weights alone as the full one that begins with it, if
    there is exactly one, so that old and new records of the same towers belong together."""
    known = set(fingerprints)
    found = {}
    for fingerprint in known:
        longer = {other for other in known if other != fingerprint and weights_part(other) == fingerprint}
        found[fingerprint] = longer.pop() if len(longer) == 1 else fingerprint
    return found
