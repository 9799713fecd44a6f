"""A LoRA that a checkpoint brings: merged into its weights, so that the towers are those that were fine-tuned; a model that
carries one unmerged is refused.

Source: Hu et al., LoRA (2021), section 4.1: W + (alpha / rank) B A, in the variants that peft's config names.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from cairn.errors import TowersError, counted, first_line
from cairn.storage.files import read_json
from cairn.towers.weights import no_weights, read_file

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import CLIPModel

# peft takes long to import, so functions import it when a checkpoint has an adapter.

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def has_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def adapter_config(folder: Path) -> LoraConfig:
    """Raises TowersError for a config that is damaged, of an adapter other than LoRA, or with an option that this version of
    peft does not know, unless that is off."""
    from peft import LoraConfig

    where = f"'{folder / CONFIG}'"
    stored = read_json(folder / CONFIG, links=True)
    if not isinstance(stored, dict) or "peft_type" not in stored:
        raise TowersError(f"{where}: not the config of an adapter; save the adapter again")
    if stored["peft_type"] != "LORA":
        raise TowersError(
            f"{where}: an adapter of type {stored['peft_type']}, only LoRA is merged on loading; merge it with peft's "
            "merge_and_unload() and save the model"
        )
    known = {field.name for field in fields(LoraConfig)}
    if unknown := [key for key, value in stored.items() if key not in known and value not in (None, False, {}, [])]:
        raise TowersError(
            f"{where}: {unknown[0]} is not known to this version of peft; merge the adapter or update peft"
        )
    try:
        return LoraConfig(**{key: value for key, value in stored.items() if key in known})
    except Exception as error:  # a file may hold anything, and none may reach a user as a traceback
        raise TowersError(f"{where}: not the config of a LoRA: {first_line(error)}") from None


def with_adapter(model: CLIPModel, folder: Path) -> CLIPModel:
    """The model with the folder's LoRA merged. Raises TowersError for one that is incomplete or of another model."""
    from peft import PeftModel, set_peft_model_state_dict

    config = adapter_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise no_weights(folder, WEIGHTS)
    state = read_file(folder / WEIGHTS)
    try:
        # Layers begin at random and are then overwritten
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel(model, config)
            loaded = set_peft_model_state_dict(adapted, state)
    except Exception as error:  # shapes, layers that do not exist, options of later versions
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        raise TowersError(
            f"'{folder}': the adapter does not fit the model: {lines[0] if lines else first_line(error)}"
        ) from None
    missing = [name for name in loaded.missing_keys if "lora_" in name or "modules_to_save" in name]
    for what, names in (("has nothing for", missing), ("has too much with", loaded.unexpected_keys)):
        if names:
            raise TowersError(
                f"'{folder}': the adapter does not fit the model: it {what} {counted(len(names), 'tensor')}, first '{names[0]}'; give "
                "the model that it was trained on"
            )
    return adapted.merge_and_unload().eval().requires_grad_(False)


def require_unadapted(model: nn.Module, where: str) -> None:
    """Raises TowersError for a model that carries layers of peft: what they add is no part of its weights."""
    if "peft" not in sys.modules:  # then no module can be a layer of it
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    if found := [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]:
        raise TowersError(
            f"{where}: carries an adapter of peft on {counted(len(found), 'layer')}, first '{found[0]}'; give the model that its "
            "merge_and_unload() returns"
        )
