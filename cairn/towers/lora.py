"""Low-rank adapters on the vision tower, through peft: injected by regex, merged for inference, kept as a delta."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cairn.errors import ConfigError, TowersError, counted

if TYPE_CHECKING:
    from peft.tuners.lora import Linear

# peft takes long to import, so functions import it when they meet a LoRA.

ADAPTER = "cairn"


def inject(tower: nn.Module, *, targets: str, rank: int, alpha: float, dropout: float, rng: torch.Generator) -> None:
    """Give every linear layer whose name matches the regex a trainable delta (alpha / rank) B A, zero at first.

    A is Kaiming-uniform from `rng`, B is zero. `dropout` is that of `SeededDropout`, on the input of A. Raises ConfigError if
    nothing matches.
    Source: Hu et al., LoRA (2021), section 4.1.
    """
    from peft import LoraConfig, inject_adapter_in_model

    require_unadapted(tower, "lora")
    scale: Any = alpha  # peft declares a whole number, and takes any
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=targets, bias="none")
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, tower, adapter_name=ADAPTER)
    except ValueError:
        linear = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear)]
        raise ConfigError(
            f"lora targets '{targets}': no layer matches; linear layers are named like {linear[0]}"
        ) from None
    if dropout:
        for layer, _ in _layers(tower):
            layer.lora_dropout[ADAPTER] = SeededDropout(dropout)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5  # kaiming_uniform with a = sqrt(5)
            values = torch.rand(parameter.shape, generator=rng) * 2 * bound - bound
            parameter.data.copy_(values)


class SeededDropout(nn.Module):
    """x m / (1 - p) with m ~ Bernoulli(1 - p) for each number, drawn from `generator`; x itself while there is none.

    torch's own dropout draws from the global generator, so that a stage could not be resumed to the bit.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.generator is None:
            return x
        kept = torch.rand(x.shape, generator=self.generator, device=x.device) >= self.p
        return x * kept / (1 - self.p)


@contextmanager
def dropping(tower: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Inside, dropout is on and draws from `generator`."""
    layers = [module for module in tower.modules() if isinstance(module, SeededDropout)]
    for layer in layers:
        layer.generator = generator
    try:
        yield
    finally:
        for layer in layers:
            layer.generator = None


def _peft_is_imported() -> bool:
    """Where it is not, no module can hold a layer of it."""
    return "peft" in sys.modules


def _layers(tower: nn.Module) -> list[tuple[Linear, nn.Linear]]:
    """The adapted layers, each with the layer that it stands in front of."""
    if not _peft_is_imported():
        return []
    from peft.tuners.lora import Linear

    adapted = [module for module in tower.modules() if isinstance(module, Linear)]
    return [(layer, base) for layer in adapted if isinstance(base := layer.get_base_layer(), nn.Linear)]


def require_unadapted(model: nn.Module, where: str) -> None:
    """Raises TowersError for a model that carries layers of peft: a LoRA of a method beside them would replace theirs."""
    if not _peft_is_imported():
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    if found := [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]:
        raise TowersError(
            f"{where}: carries an adapter of peft on {counted(len(found), 'layer')}, first '{found[0]}'; give the model that its "
            "merge_and_unload() returns"
        )


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
    layers = _layers(tower)
    kept = [base.weight.data for _, base in layers]
    try:
        for (layer, base), weight in zip(layers, kept, strict=True):
            base.weight.data = weight.clone()
            layer.merge()
        yield
    finally:
        for (layer, base), weight in zip(layers, kept, strict=True):
            layer.merged_adapters.clear()
            base.weight.data = weight
