"""CLIP checkpoints in the transformers layout: config, weights, and a LoRA of peft beside them or in their place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from transformers import CLIPConfig, CLIPModel

from cairn.errors import TowersError, counted, first_line
from cairn.towers import adapter
from cairn.towers.adapter import adapter_config, has_adapter, with_adapter
from cairn.towers.hub import Location, find_checkpoint, safetensors_conversion
from cairn.towers.preprocessing import FILES as PREPROCESSING
from cairn.towers.tokenizer import FILES as TOKENIZER
from cairn.towers.tokenizer import has_tokenizer
from cairn.towers.weights import (
    INDEX,
    WHOLE,
    ClipCheckpoint,
    has_weights,
    model_with,
    prefix_notices,
    read_weights,
    without_prefixes,
)

CONFIG = "config.json"
_FILES = {CONFIG, WHOLE, INDEX, adapter.CONFIG, adapter.WEIGHTS, *PREPROCESSING, *TOKENIZER}
_MARKS = (CONFIG, adapter.CONFIG)
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def load_checkpoint(source: str, revision: str | None = None) -> ClipCheckpoint:
    """From a folder, or an id of the hub. A LoRA is merged, whether its model lies beside it or is named by its config.

    Weights are read from safetensors alone. Raises TowersError naming what is missing, damaged, or does not fit.
    """
    place = _located(source, revision)
    folder, commit, notices = place.folder, place.commit, []
    if has_adapter(folder) and not (folder / CONFIG).is_file():
        base = adapter_config(folder)
        named = base.base_model_name_or_path
        if not named:
            raise TowersError(f"'{folder / adapter.CONFIG}': names no base model; merge the adapter and save the model")
        found = _located(named, base.revision)
        if has_adapter(found.folder) and not (found.folder / CONFIG).is_file():
            raise TowersError(f"'{folder}': an adapter of the adapter '{named}'; merge that one first")
        folders = (folder, found.folder)
    else:
        folders = (folder,)
    model = _model(folders[-1], notices)
    for adapted in dict.fromkeys(reversed(folders)):  # that of the base model first
        if has_adapter(adapted):
            model = with_adapter(model, adapted)
            notices.append(f"'{adapted}': its LoRA is merged into the weights")
    return ClipCheckpoint(model, folders, commit, tuple(notices))


def _located(source: str, revision: str | None) -> Location:
    found = find_checkpoint(source, revision, _MARKS, _chosen, _is_complete)
    whole = has_weights(found.folder) or has_adapter(found.folder)
    if not whole and found.commit is not None and revision is None and (converted := safetensors_conversion(source)):
        return find_checkpoint(source, converted, _MARKS, _chosen, _is_complete)
    return found


def _chosen(names: Sequence[str]) -> list[str]:
    return [name for name in names if name in _FILES or _SHARD.fullmatch(name)]


def _is_complete(folder: Path) -> bool:
    """Of a cached copy: whether nothing is missing that could change what the towers compute."""
    if has_adapter(folder) and not (folder / CONFIG).is_file():
        return (folder / adapter.WEIGHTS).is_file()
    files = has_weights(folder) and (folder / CONFIG).is_file() and has_tokenizer(folder)
    return files and any((folder / name).is_file() for name in PREPROCESSING)


def _model(folder: Path, notices: list[str]) -> CLIPModel:
    try:
        config = CLIPConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a file may hold anything, and none may reach a user as a traceback
        raise TowersError(f"'{folder / CONFIG}': cannot be read: {first_line(error)}") from None
    if config.model_type != "clip":
        raise TowersError(f"'{folder}': a '{config.model_type}' model, not a CLIP; give a CLIP checkpoint")
    state, prefixes = without_prefixes(read_weights(folder), folder)
    model, left = model_with(config, state, folder, CONFIG)
    notices += prefix_notices(prefixes, folder)
    if left:
        notices.append(
            f"'{folder}': left out, without a place in the model: {counted(len(left), 'tensor')}, first '{left[0]}'"
        )
    return model
