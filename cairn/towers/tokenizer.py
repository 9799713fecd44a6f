"""What turns a text into tokens: read from a checkpoint's folder, held against its text tower, named by a hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import (
    CLIPTextConfig,
    CLIPTokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]  version 5 makes the name when it is asked for
    PreTrainedTokenizerFast,
)

from cairn.errors import TowersError

WHOLE = "tokenizer.json"
PARTS = ("vocab.json", "merges.txt")
FILES = (WHOLE, *PARTS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Every file that a tokenizer is read from."""

START, END = "<|startoftext|>", "<|endoftext|>"
"""CLIP's own special tokens, where the folder names none."""

PADDING = 128
"""Rows by which a token table may be longer than the vocabulary: tables are rounded up for speed."""

_UNSAID = {"bos_token_id": 0, "eos_token_id": 2}
"""Ids that transformers once wrote into every CLIP config, whatever the tokenizer; they say nothing."""


_ADVICE = "copy the tokenizer's files from the model that this one was made from"


def has_tokenizer(folder: Path) -> bool:
    return (folder / WHOLE).is_file() or all((folder / name).is_file() for name in PARTS)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder: `tokenizer.json` as it is written, or CLIP's own from `vocab.json` and `merges.txt`.

    The class is one of these two, whatever the files name, and no code of the folder is run. Raises TowersError naming the
    missing files, or for files that are no tokenizer.
    """
    if not has_tokenizer(folder):
        parts = " and ".join(name for name in PARTS if not (folder / name).is_file())
        raise TowersError(f"'{folder}': no tokenizer: {WHOLE} is missing, or {parts} in its place; {_ADVICE}")
    try:
        if (folder / WHOLE).is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
        else:
            tokenizer = CLIPTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a file may hold anything, and none may reach a user as a traceback
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TowersError(f"'{folder}': not a tokenizer: {reason}; copy its files again") from None
    known = tokenizer.get_vocab()
    for key, token in (("bos_token", START), ("eos_token", END)):
        if getattr(tokenizer, key) is None and token in known:
            setattr(tokenizer, key, token)
    return tokenizer


def require_fit(tokenizer: PreTrainedTokenizerFast, vocab_size: int, config: CLIPTextConfig | None, where: str) -> None:
    """Raises TowersError for the tokenizer of another model: more or clearly fewer tokens than the table has rows, or
    start and end tokens other than those in the config, if it says any."""
    known = tokenizer.get_vocab()
    largest = max(known.values(), default=-1)
    if largest >= vocab_size or len(known) <= vocab_size - PADDING:
        raise TowersError(
            f"towers '{where}': the tokenizer has {len(known)} tokens with ids up to {largest}, the text tower a table of "
            f"{vocab_size} rows; {_ADVICE}"
        )
    for key, unsaid in _UNSAID.items():
        found, said = getattr(tokenizer, key), getattr(config, key, None)
        if found is None:
            raise TowersError(f"towers '{where}': the tokenizer has no {key.removesuffix('_id')}; {_ADVICE}")
        if said not in (None, unsaid, found) and said < vocab_size:
            raise TowersError(f"towers '{where}': {key} is {found} in the tokenizer, {said} in config.json; {_ADVICE}")


def start_and_end(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """The ids of the tokens that CLIP puts before and behind a text. Raises TowersError for a tokenizer without them."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not isinstance(start, int) or not isinstance(end, int):
        raise TowersError(f"the tokenizer has no start or no end token; {_ADVICE}")
    return start, end


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """16 hex digits over what decides the tokens of a text: normaliser, pre-tokenizer, vocabulary with its merges, added
    tokens, and the ids of start and end."""
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    model = dict(stored["model"])
    if "merges" in model:  # pairs, or in older versions both in one text
        model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    parts = {key: stored.get(key) for key in ("normalizer", "pre_tokenizer", "added_tokens")} | {"model": model}
    said = [_said(parts), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _said(value: Any) -> Any:
    """Without entries that say nothing: later versions of the tokenizer library write more of them."""
    if isinstance(value, dict):
        return {
            key: _said(part) for key, part in value.items() if part is not None and part is not False and part != ""
        }
    return [_said(part) for part in value] if isinstance(value, list) else value
