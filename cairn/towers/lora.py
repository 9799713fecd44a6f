"""Low-rank adapters on the vision tower, through peft: injected by regex, merged for inference, kept as a delta."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from cairn.errors import ConfigError

ADAPTER = "cairn"


def inject(tower: nn.Module, *, targets: str, rank: int, alpha: float, dropout: float, rng: torch.Generator) -> None:
    """Give every linear layer whose name matches the regex a trainable delta (alpha / rank) B A, zero at first.

    A is Kaiming-uniform from `rng`, B is zero. Raises ConfigError if nothing matches.
    Source: Hu et al., LoRA (2021), section 4.1.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, tower, adapter_name=ADAPTER)
    except ValueError:
        linear = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear)]
        raise ConfigError(
            f"lora targets '{targets}': no layer matches; linear layers are named like {linear[0]}"
        ) from None
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5  # kaiming_uniform with a = sqrt(5)
            values = torch.rand(parameter.shape, generator=rng) * 2 * bound - bound
            parameter.data.copy_(values)


def delta(tower: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapters' weights alone."""
    return {name: p.detach().cpu().clone() for name, p in tower.named_parameters() if "lora_" in name}


def restore(tower: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a delta back. Raises KeyError if the tower was adapted differently."""
    parameters = {name: p for name, p in tower.named_parameters() if "lora_" in name}
    if parameters.keys() != state.keys():
        raise KeyError(f"delta has {len(state)} tensors, the tower's adapters {len(parameters)}")
    for name, value in state.items():
        parameters[name].data.copy_(value)


@contextmanager
def merged(tower: nn.Module) -> Iterator[None]:
    """Inside, the deltas are part of the weights; on leaving, the weights are what they were, to the bit."""
    layers = [module for module in tower.modules() if isinstance(module, LoraLayer)]
    kept = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer, weight in zip(layers, kept, strict=True):
            layer.get_base_layer().weight.data = weight.clone()
            layer.merge()
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.merged_adapters.clear()
            layer.get_base_layer().weight.data = weight
