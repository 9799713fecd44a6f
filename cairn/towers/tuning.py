"""What is trained of the image side: a family of choices, each an object with its layers, and the encoder that results.

The paper ([P], abstract) says that the vision encoder is trained; by which means is ours to choose [I]. LoRA on keys and
values follows MG-CLIP [K], full tuning with a Beta moving average CLIPood [K], the projection alone BOFA [K].
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from cairn.errors import ConfigError, counted
from cairn.settings import Given
from cairn.towers.protocol import WHOLE, HasTrunk, Towers, TrunkOutput
from cairn.types import Features, Pixels

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPMLP

LORA = "cairn"
"""Name of the LoRA in stored tensors, `LAYER.lora_A.cairn.weight`: those of peft for an adapter of this name."""


BLOCK = re.compile(r"\.layers\.(\d+)\.")
"""In the name of a layer, the number of its block."""


class Frozen(Given):
    """Nothing moves."""

    kind: Literal["none"] = "none"

    def attach(self, vision: nn.Module, dim: int, rng: torch.Generator) -> nn.Module:
        return vision


class Lora(Given):
    """Low-rank deltas on linear layers chosen by regex, continued over the tasks [K: MG-CLIP].

    What lies below the first chosen layer is the same after every task, and is not computed again for test images
    (`cairn.towers.trunk`): with the default, which is every block, that is nothing.
    """

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1, description="rank of each delta")
    alpha: float = Field(default=8.0, gt=0, description="scale; the delta is alpha / rank * B A")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the delta's input, in training alone")
    targets: str = Field(
        default=r".*vision_model.*\.self_attn\.(k_proj|v_proj)",
        description="regex of layer names; e.g. '.*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)' for attention and MLP",
    )

    layers: int | None = Field(
        default=None, ge=1, description="how many blocks from the last on may have deltas; null: all"
    )

    def attach(self, vision: nn.Module, dim: int, rng: torch.Generator) -> nn.Module:
        linear = {name: module for name, module in vision.named_modules() if isinstance(module, nn.Linear)}
        matching = {name: layer for name, layer in linear.items() if re.fullmatch(self.targets, name)}
        if self.layers is not None:
            block = {name: int(found[1]) for name in linear if (found := BLOCK.search(name))}
            first = 1 + max(block.values(), default=-1) - self.layers
            matching = {name: layer for name, layer in matching.items() if block.get(name, first) >= first}
        if not matching:
            raise ConfigError(
                f"lora targets '{self.targets}': no layer {'' if self.layers is None else f'of the last {self.layers} blocks '}"
                f"matches; linear layers are named like {next(iter(linear))}"
            )
        for name, layer in matching.items():
            parent, _, child = name.rpartition(".")
            adapted = LowRank(layer, self.rank, self.alpha, self.dropout, rng)
            vision.get_submodule(parent).add_module(child, adapted)
        return vision


class LowRank(nn.Module):
    """A linear layer with a delta beside it: x -> W x + b + (alpha / rank) B A x, B zero at first.

    A is Kaiming-uniform from `rng`. `dropout` is that of `SeededDropout`, on the input of A.
    Source: Hu et al., LoRA (2021), section 4.1; computed as peft computes it, to the bit.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, rng: torch.Generator):
        super().__init__()
        self.base_layer, self.scale, self.merged = base, alpha / rank, False
        self.lora_dropout = SeededDropout(dropout) if dropout else nn.Identity()
        A, B = _weight_alone(base, base.in_features, rank), _weight_alone(base, rank, base.out_features)
        bound = base.in_features**-0.5  # kaiming_uniform with a = sqrt(5)
        A.weight.data.copy_(torch.rand(A.weight.shape, generator=rng) * 2 * bound - bound)
        nn.init.zeros_(B.weight)
        self.lora_A, self.lora_B = nn.ModuleDict({LORA: A}), nn.ModuleDict({LORA: B})

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        if self.merged:
            return result
        dropped = self.lora_dropout(x.to(self.base_layer.weight.dtype))
        return result + self.lora_B[LORA](self.lora_A[LORA](dropped)) * self.scale

    def delta(self) -> Tensor:
        """(alpha / rank) B A."""
        A, B = (matrix[LORA].get_parameter("weight") for matrix in (self.lora_A, self.lora_B))
        return B @ A * self.scale


def _weight_alone(like: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    """A layer without bias, of the kind and on the device of `like`; its numbers are not set."""
    layer = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=like.weight.dtype)
    return layer.to_empty(device=like.weight.device)


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


@contextmanager
def merged(tower: nn.Module) -> Iterator[None]:
    """Inside, the deltas are part of the weights; on leaving, the weights are what they were, to the bit."""
    layers = [module for module in tower.modules() if isinstance(module, LowRank)]
    kept = [layer.base_layer.weight.data for layer in layers]
    try:
        for layer, weight in zip(layers, kept, strict=True):
            layer.base_layer.weight.data = weight + layer.delta()
            layer.merged = True
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.base_layer.weight.data = weight
            layer.merged = False


class Full(Given):
    """Every weight of the vision tower; with a Beta moving average of the trajectory [K: CLIPood, section 3.3]."""

    kind: Literal["full"] = "full"
    lr: float = Field(default=5e-6, gt=0, description="peak learning rate, in place of the schedule's [K: CLIPood]")
    average: float | None = Field(
        default=0.5, gt=0, description="beta of the Beta(beta, beta) average over a stage; null for none"
    )

    def attach(self, vision: nn.Module, dim: int, rng: torch.Generator) -> nn.Module:
        return vision.requires_grad_(True)


class Projection(Given):
    """The visual projection alone [K: BOFA]."""

    kind: Literal["projection"] = "projection"

    def attach(self, vision: nn.Module, dim: int, rng: torch.Generator) -> nn.Module:
        vision.visual_projection.requires_grad_(True)
        return vision


class Adapter(Given):
    """A residual linear map behind the frozen tower: x + D x + c, with D and c zero at first [I].

    The embedding form of stage 1: it needs no image tower, and its motion is known exactly.
    """

    kind: Literal["adapter"] = "adapter"

    def attach(self, vision: nn.Module, dim: int, rng: torch.Generator) -> nn.Module:
        return _Residual(vision, dim)


def _uninitialised(rows: int, columns: int) -> nn.Linear:
    """Draws nothing from torch's global generator."""
    return nn.Linear(rows, columns, device="meta").to_empty(device="cpu")


class _Residual(nn.Module):
    def __init__(self, vision: nn.Module, dim: int):
        super().__init__()
        self.vision = vision
        self.map = _uninitialised(dim, dim)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, pixels: Pixels) -> Features:
        with torch.no_grad():
            x = pixels.rows if isinstance(pixels, TrunkOutput) else self.vision(pixels)
        return x + self.map(x)


class Bottleneck(Given):
    """A small network beside the MLP of every block: MLP(x) + scale up(relu(down(x))), up zero at first.

    Source: AdaptFormer (Chen et al. 2022), section 3.2; x is the MLP's own input, behind its layer norm.
    """

    kind: Literal["bottleneck"] = "bottleneck"
    width: int = Field(default=64, ge=1, description="numbers between down and up")
    scale: float = Field(default=0.1, gt=0, description="factor on what is added")

    def attach(self, vision: nn.Module, dim: int, rng: torch.Generator) -> nn.Module:
        from transformers.models.clip.modeling_clip import CLIPEncoderLayer

        for block in [module for module in vision.modules() if isinstance(module, CLIPEncoderLayer)]:
            block.add_module("mlp", Beside(block.mlp, self.width, self.scale, rng))
        return vision


class Beside(nn.Module):
    """An MLP with a bottleneck beside it, x -> mlp(x) + added(x); at first it adds nothing."""

    def __init__(self, mlp: CLIPMLP, width: int, scale: float, rng: torch.Generator):
        super().__init__()
        d = mlp.fc1.in_features
        self.mlp, self.scale = mlp, scale
        self.down, self.up = _uninitialised(d, width), _uninitialised(width, d)
        bound = d**-0.5  # kaiming_uniform with a = sqrt(5)
        self.down.weight.data.copy_(torch.rand(self.down.weight.shape, generator=rng) * 2 * bound - bound)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.added(x)

    def added(self, x: Tensor) -> Tensor:
        return self.scale * self.up(torch.relu(self.down(x)))


Tuning = Annotated[Frozen | Lora | Full | Projection | Adapter | Bottleneck, Field(discriminator="kind")]


class ImageEncoder:
    """A copy of the image tower with a tuning attached; the towers it came from stay as they are.

    `version` counts the stages that trained it: equal versions give equal embeddings.
    """

    def __init__(self, towers: Towers, tuning: Tuning, rng: torch.Generator):
        if not towers.has_images and tuning.kind not in ("none", "adapter"):
            raise ConfigError(
                f"stage1.tuning '{tuning.kind}': a features file has no tower to tune; take adapter or none"
            )
        self.tuning = tuning
        self._frozen = towers if tuning.kind in ("none", "adapter") else None
        vision = _Frozen(towers) if self._frozen is not None else towers.vision()
        self.device = towers.device
        self.module = tuning.attach(vision, towers.dim, rng).to(self.device).eval()
        if self._frozen is None and towers.precision != "float32":
            _keep_as_computed(self.module, getattr(torch, towers.precision))
        self.version = 0

    def __call__(self, pixels: Pixels) -> Features:
        return self.module(pixels)

    @property
    def has_trunk(self) -> bool:
        """Whether a part of the tower worth keeping the output of stands below the first trained one."""
        if self._frozen is not None:
            return bool(self.parameters()) and self._frozen.has_images
        return isinstance(self.module, HasTrunk) and self.module.has_trunk

    def trunk(self, pixels: Pixels) -> TrunkOutput:
        """What the parts of the tower below the first trained one make of images: taken in place of their pixels, it gives the same
        embeddings, to the bit."""
        if self._frozen is not None:
            return TrunkOutput.of(self._frozen.image(pixels), WHOLE)
        return cast(HasTrunk, self.module).trunk(pixels)

    def copied(self) -> nn.Module:
        """A copy that shares nothing with it."""
        if self._frozen is None:
            return copy.deepcopy(self.module)
        vision = self._frozen.vision()
        if not isinstance(self.module, _Residual):
            return vision
        twin = _Residual(vision, self._frozen.dim)
        twin.map.load_state_dict(self.module.map.state_dict())
        return twin

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def state_dict(self) -> dict[str, Tensor]:
        """What was trained, and nothing else: for LoRA the delta."""
        state = {name: p.detach().cpu().clone() for name, p in self.module.named_parameters() if p.requires_grad}
        return state | {"version": torch.tensor(self.version)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        given = {name: value for name, value in state.items() if name != "version"}
        if {name: p.shape for name, p in own.items()} != {name: value.shape for name, value in given.items()}:
            raise ConfigError(
                f"encoder state: {counted(len(given), 'tensor')}, not those of tuning '{self.tuning.kind}' ({len(own)})"
            )
        for name, value in given.items():
            own[name].data.copy_(value)
        self.version = int(state["version"])

    @contextmanager
    def training(self, generator: torch.Generator) -> Iterator[None]:
        """Dropout on, drawn from `generator`. Outside, embeddings are the same in every pass."""
        with dropping(self.module, generator):
            yield

    @contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients, deltas merged into the weights."""
        with torch.no_grad():
            if self.tuning.kind == "lora":
                with merged(self.module):
                    yield
            else:
                yield


def _keep_as_computed(module: nn.Module, dtype: torch.dtype) -> None:
    """Weights of linear layers that stand still in the precision they are computed in, which autocast gave them in every pass: the
    same bits, half of the bytes, and no casts. What deltas are merged into stays as it is, or the sum would be rounded twice."""
    merged_into = {layer.base_layer for layer in module.modules() if isinstance(layer, LowRank)}
    plain = [layer for layer in module.modules() if type(layer) is nn.Linear and layer not in merged_into]
    for layer in plain:
        if not any(parameter.requires_grad for parameter in layer.parameters()):
            layer.to(dtype)


class _Frozen(nn.Module):
    """The towers' own image side, without a copy."""

    def __init__(self, towers: Towers):
        super().__init__()
        self._image = towers.image

    def forward(self, pixels: Pixels) -> Features:
        return self._image(pixels)
