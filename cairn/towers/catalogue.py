"""From what a user writes after `--towers` to towers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Literal

import torch
from transformers import CLIPConfig, CLIPModel
from transformers.utils import logging as transformers_logging

from cairn.errors import TowersError, UnknownName
from cairn.towers.clip import ClipTowers
from cairn.towers.openclip import CLIP_VOCABULARY, open_clip_model
from cairn.towers.preprocessing import FILES as PREPROCESSING_FILES
from cairn.towers.preprocessing import processor_preprocessing
from cairn.towers.tokenizer import FILES as TOKENIZER_FILES
from cairn.towers.tokenizer import has_tokenizer, load_tokenizer, require_fit

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
    spec: str,
    *,
    device: str = "auto",
    precision: str = "float32",
    preprocess: Literal["crop", "squash"] | None = None,
    revision: str | None = None,
) -> ClipTowers:
    """Towers from `tiny`, a hub id, a local folder, or `open_clip:` and either of the last two.

    `preprocess` says how images become squares; None: as the checkpoint does. Weights are read from safetensors alone and
    code from a hub is never run. Raises TowersError naming what is missing.
    """
    if spec.startswith("open_clip:"):
        model, folder, preprocessing = open_clip_model(spec.removeprefix("open_clip:"), revision)
        text_config, commit = None, revision  # the config of open_clip names no token
        if not has_tokenizer(folder) and model.config.text_config.vocab_size == CLIP_VOCABULARY:
            folder = _hub_folder(CLIP_TOKENIZER, None, spec)  # what open_clip itself takes
    else:
        source, folder = spec, Path(spec)
        if spec == "tiny":
            folder = Path(str(resources.files("cairn.towers").joinpath("tiny")))
            source = str(folder)
        elif not os.path.exists(folder) and (spec.count("/") != 1 or spec.startswith((".", "/", "~"))):
            if "/" in spec:
                raise TowersError(f"towers '{spec}': no such folder")
            raise UnknownName("towers", spec, KNOWN)
        model = _transformers_model(source, spec, revision)
        commit = getattr(model.config, "_commit_hash", None)
        text_config = model.config.text_config
        if not folder.is_dir():
            folder = _hub_folder(source, commit, spec)
        preprocessing = processor_preprocessing(folder, model.config.vision_config.image_size)
    with _quiet():
        tokenizer = load_tokenizer(folder)
    require_fit(tokenizer, model.config.text_config.vocab_size, text_config, spec)
    return ClipTowers(
        model, tokenizer, preprocessing.with_mode(preprocess), name=spec, device=device, precision=precision, revision=commit
    )  # fmt: skip


def _transformers_model(source: str, spec: str, revision: str | None) -> CLIPModel:
    try:
        with _quiet():
            config = CLIPConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
            if config.model_type != "clip":
                raise TowersError(f"towers '{spec}': a '{config.model_type}' model, not a CLIP; give a CLIP checkpoint")
            model, report = CLIPModel.from_pretrained(
                source, revision=revision, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
                attn_implementation="sdpa", output_loading_info=True,
            )  # fmt: skip
    except TowersError:
        raise
    except Exception as error:  # a hub or a file can fail in many ways; none may reach a user as a traceback
        raise TowersError(f"towers '{spec}': cannot be loaded: {_first_line(error)}") from None
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("position_ids"))
    if missing:
        raise TowersError(
            f"towers '{spec}': {len(missing)} weights are missing, first '{missing[0]}'; the file is incomplete"
        )
    return model


def _hub_folder(source: str, revision: str | None, spec: str) -> Path:
    """Where the hub's tokenizer and preprocessing files of a repository lie, once fetched."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=[*TOKENIZER_FILES, *PREPROCESSING_FILES])
        )
    except Exception as error:
        raise TowersError(
            f"towers '{spec}': the tokenizer of '{source}' cannot be fetched: {_first_line(error)}"
        ) from None


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
