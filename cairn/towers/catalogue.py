"""From what a user writes after `--towers` to towers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Literal

from transformers.utils import logging as transformers_logging

from cairn.errors import UnknownName
from cairn.towers.clip import ClipTowers
from cairn.towers.clip_checkpoint import load_checkpoint
from cairn.towers.hub import find_checkpoint
from cairn.towers.openclip import CLIP_VOCABULARY, open_clip_checkpoint
from cairn.towers.preprocessing import FILES as PREPROCESSING_FILES
from cairn.towers.preprocessing import processor_preprocessing
from cairn.towers.tokenizer import FILES as TOKENIZER_FILES
from cairn.towers.tokenizer import has_tokenizer, load_tokenizer, require_fit
from cairn.towers.weights import image_side

CLIP_TOKENIZER = "openai/clip-vit-base-patch32"
"""Whose tokenizer an open_clip checkpoint of CLIP's vocabulary takes, where it brings none."""

KNOWN = {
    "tiny": "the embedded CLIP of 2.6 M parameters, for the drawn world `shapes`",
    "openai/clip-vit-base-patch16": "OpenAI ViT-B/16 (setting A of the field)",
    "openai/clip-vit-base-patch32": "OpenAI ViT-B/32",
    "openai/clip-vit-large-patch14": "OpenAI ViT-L/14",
    "open_clip:timm/vit_base_patch16_clip_224.laion400m_e32": "LAION-400M ViT-B/16 (setting B of the field)",
}
"""Names to start from; any hub id or local folder in the transformers layout works, and `open_clip:` before one in
the open_clip layout."""


def load_towers(
    spec: str | os.PathLike[str],
    *,
    device: str = "auto",
    precision: str = "float32",
    preprocess: Literal["crop", "squash"] | None = None,
    decode: Literal["whole", "reduced"] = "whole",
    revision: str | None = None,
) -> ClipTowers:
    """Towers from `tiny`, a hub id, a local folder, or `open_clip:` and either of the last two.

    `preprocess` says how images become squares; None: as the checkpoint does. `decode` is how JPEG files are to be opened for them
    (see `Preprocessing`). Weights are read from safetensors alone and
    code from a hub is never run. Raises TowersError naming what is missing.
    """
    spec = os.fspath(spec)
    if spec.startswith("open_clip:"):
        found, preprocessing = open_clip_checkpoint(spec.removeprefix("open_clip:"), revision)
        model, folder = found.model, found.folders[0]
        text_config = None  # the config of open_clip names no token
        if not has_tokenizer(folder) and model.text_model.config.vocab_size == CLIP_VOCABULARY:
            folder = find_checkpoint(
                CLIP_TOKENIZER, None, TOKENIZER_FILES, _tokenizer_files, has_tokenizer
            ).folder  # as open_clip does
    else:
        if spec != "tiny" and "/" not in spec and not os.path.isdir(spec):
            raise UnknownName("towers", spec, KNOWN)
        with _quiet():
            found = load_checkpoint(_embedded() if spec == "tiny" else spec, revision)
        model, folder = found.model, found.folder_with(TOKENIZER_FILES)
        text_config = model.text_model.config
        preprocessing = processor_preprocessing(found.folder_with(PREPROCESSING_FILES), image_side(model))
    with _quiet():
        tokenizer = load_tokenizer(folder)
    require_fit(tokenizer, model.text_model.config.vocab_size, text_config, spec)
    return ClipTowers(
        model,
        tokenizer,
        preprocessing.with_mode(preprocess).with_decoding(decode),
        name=spec,
        device=device,
        precision=precision,
        revision=None if spec == "tiny" else found.commit,
        source=absolute(spec),
        notices=found.notices,
    )


def absolute(spec: str) -> str:
    """What names the same towers from any working directory: the path of a local folder made absolute."""
    layout = "open_clip:" if spec.startswith("open_clip:") else ""
    folder = os.path.expanduser(spec.removeprefix(layout))
    return f"{layout}{os.path.abspath(folder)}" if spec != "tiny" and os.path.isdir(folder) else spec


def _embedded() -> str:
    return str(resources.files("cairn.towers").joinpath("tiny"))


def _tokenizer_files(names: Sequence[str]) -> list[str]:
    return [name for name in names if name in TOKENIZER_FILES]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings: what matters of them is checked here."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
