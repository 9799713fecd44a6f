"""The two towers of a CLIP checkpoint, on transformers' `CLIPModel`."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from cairn.data.templates import filled, prompt_templates
from cairn.errors import ConfigError, TowersError, counted
from cairn.towers.adapter import require_unadapted
from cairn.towers.fingerprint import full_fingerprint
from cairn.towers.patches import embedded_tokens
from cairn.towers.portions import Made, Portions
from cairn.towers.precision import usable_precision
from cairn.towers.prefix import FrozenBlock, PromptTree, last_hidden, prompt_tree
from cairn.towers.preprocessing import Preprocessing
from cairn.towers.protocol import WHOLE, TrunkOutput
from cairn.towers.tokenizer import start_and_end, tokenizer_fingerprint
from cairn.towers.trunk import LEAST, frozen_parts, passed
from cairn.types import Attention, Features, Pixels, Precision


def device_named(choice: str) -> torch.device:
    """`auto` takes the accelerator there is; anything else is a torch device. Raises ConfigError if it is not there."""
    if choice == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(choice)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{choice}': {str(error).splitlines()[0]}; try auto or cpu") from None
    return device


class VisionTower(nn.Module):
    """Pixels (n, 3, h, w) to embeddings (n, d), float32; in bfloat16 inside where that was asked for."""

    def __init__(self, model: CLIPModel, precision: torch.dtype, passes: dict[str, int]):
        super().__init__()
        self.vision_model = model.vision_model
        self.visual_projection = model.visual_projection
        self.precision = precision
        self.passes = passes
        self._portions = Portions()

    def _made(self, make: Callable[[Tensor], Made], rows: Tensor) -> Made:
        """In portions where there are no gradients, whose batches are nobody's choice."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make(rows)
        return self._portions(make, rows)

    def __deepcopy__(self, memo: dict) -> VisionTower:
        memo[id(self.passes)] = self.passes  # a copy's passes count as the towers' own
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return twin

    def _autocast(self, pixels: Tensor):
        reduced = self.precision != torch.float32
        return torch.autocast(pixels.device.type, self.precision) if reduced else nullcontext()

    def forward(self, pixels: Pixels) -> Features:
        """Of pixels, or of what the first parts made of them: then the pass goes on from there, to the same bits."""
        if not isinstance(pixels, TrunkOutput):
            return self.with_hidden(pixels)[0]
        if pixels.parts == WHOLE:
            return pixels.rows
        if pixels.parts > frozen_parts(self.vision_model, self.visual_projection):
            raise ValueError(f"rows behind part {pixels.parts - 1} of a tower, of which an earlier one is trained")
        self.passes["continued"] += len(pixels)
        begun = pixels.parts

        def continued(rows: Tensor) -> Features:
            return passed(self.vision_model, self.visual_projection, rows, begun).float()

        with self._autocast(pixels):
            return self._made(continued, pixels.rows)

    @property
    def has_trunk(self) -> bool:
        """Whether LEAST parts stand below the first trained one."""
        return frozen_parts(self.vision_model, self.visual_projection) >= LEAST

    @torch.no_grad()
    def trunk(self, pixels: Pixels) -> TrunkOutput:
        """What the parts below the first trained one make of images."""
        parts = frozen_parts(self.vision_model, self.visual_projection)
        self.passes["images"] += len(pixels)
        with self._autocast(pixels):
            rows = self._made(lambda some: passed(self.vision_model, self.visual_projection, some, end=parts), pixels)
        return TrunkOutput.of(rows, parts)

    def with_hidden(self, pixels: Pixels) -> tuple[Features, Float[Tensor, "n w"]]:
        """The embedding of each image and what the projection makes it of, from one pass."""
        if not torch.compiler.is_compiling():  # an export would take the number of images for a constant
            self.passes["images"] += len(pixels)

        def embedded(some: Tensor) -> tuple[Features, Tensor]:
            hidden = self.vision_model(pixel_values=some).pooler_output
            return self.visual_projection(hidden).float(), hidden.float()

        with self._autocast(pixels):
            return self._made(embedded, pixels)

    def tokens(self, pixels: Pixels, attention: Attention = "native") -> tuple[Features, Float[Tensor, "n p d"]]:
        """The embedding of each image and those of its patches, from one pass."""
        if not torch.compiler.is_compiling():
            self.passes["images"] += len(pixels)

        def embedded(some: Tensor) -> tuple[Features, Tensor]:
            image, patches = embedded_tokens(self.vision_model, self.visual_projection, some, attention)
            return image.float(), patches.float()

        with self._autocast(pixels):
            return self._made(embedded, pixels)


class VisionAndPatches(nn.Module):
    """Pixels to the embedding of each image (n, d) and those of its patches (n, p, d)."""

    def __init__(self, vision: VisionTower):
        super().__init__()
        self.vision = vision

    def forward(self, pixels: Pixels) -> tuple[Features, Float[Tensor, "n p d"]]:
        return self.vision.tokens(pixels)


class ClipTowers:
    """`Towers` over a `CLIPModel`, frozen, in evaluation mode.

    `precision` is `float32`, `bfloat16` or `auto`, which is the faster of the two; afterwards it is the one that is used. In
    bfloat16 the towers compute under autocast and hand out float32, so statistics, losses and transport never see half
    precision. Where bfloat16 is much slower than float32, which is measured, float32 is taken. `source` names them from any
    folder, `notices` is what a user should know of how they were loaded.
    """

    has_images = True
    has_text = True

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerFast,
        preprocessing: Preprocessing,
        *,
        name: str,
        device: str = "auto",
        precision: str = "float32",
        revision: str | None = None,
        source: str | None = None,
        notices: Sequence[str] = (),
    ):
        if precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"precision '{precision}': must be auto, float32 or bfloat16")
        text = model.text_model.config
        self.name, self.revision, self.source = name, revision, source or name
        self.device = device_named(device)
        self.precision: Precision
        self.precision, slow = usable_precision(precision, self.device)
        self.notices = (*notices, *slow)
        require_unadapted(model, f"towers '{name}'")
        self.preprocessing, self.tokenizer = preprocessing, tokenizer
        self.passes = {"images": 0, "text_tokens": 0, "continued": 0}
        self.dim = model.text_projection.out_features
        self.hidden_dim = model.vision_model.config.hidden_size
        self.context_length = text.max_position_embeddings
        self.width = text.hidden_size
        # Older configs carry the wrong id 2; the tokenizer knows (transformers then looks for the largest id).
        self.bos, self.eos = start_and_end(tokenizer)
        _require_finite(model, name)
        self.fingerprint = full_fingerprint(
            _weights_fingerprint(model, preprocessing), tokenizer_fingerprint(tokenizer)
        )
        self._model = model.float().eval().requires_grad_(False)
        nn.Module.to(self._model, self.device)  # the model's own wraps it
        self.logit_scale = float(model.logit_scale.detach().exp())
        self._frozen: tuple[list[tuple], list[FrozenBlock]] | None = None
        self._vision = VisionTower(self._model, getattr(torch, self.precision), self.passes)

    @property
    def activation(self) -> str:
        """Of the vision tower, by the name that transformers has for it: `gelu`, `quick_gelu`."""
        return str(self._model.vision_model.config.hidden_act)

    def varied(self, *, activation: str | None = None, preprocessing: Preprocessing | None = None) -> ClipTowers:
        """The same weights with another activation in both towers, or another preprocessing: other towers, with a fingerprint of
        their own. What a checkpoint would be if it said otherwise of itself."""
        from transformers.activations import ACT2FN
        from transformers.models.clip.modeling_clip import CLIPMLP

        model = self._model
        if activation is not None:
            model = copy.deepcopy(model)
            for tower in (model.vision_model, model.text_model):
                tower.config.hidden_act = activation
            for module in model.modules():
                if isinstance(module, CLIPMLP):
                    module.activation_fn = ACT2FN[activation]
        return ClipTowers(
            model,
            self.tokenizer,
            preprocessing or self.preprocessing,
            name=self.name,
            device=str(self.device),
            precision=self.precision,
            revision=self.revision,
            source=self.source,
        )

    @property
    def text_tower(self) -> ClipTowers:
        return self

    # image side

    def prepare(self, item: Any) -> Tensor:
        return self.preprocessing.prepare(item)

    def pixels(self, prepared: Tensor) -> Pixels:
        return self.preprocessing.pixels(prepared.to(self.device, non_blocking=True))

    @torch.no_grad()
    def image(self, pixels: Pixels) -> Features:
        return self._vision(pixels)

    @torch.no_grad()
    def image_and_hidden(self, pixels: Pixels) -> tuple[Features, Float[Tensor, "n w"]]:
        return self._vision.with_hidden(pixels)

    @torch.no_grad()
    def image_and_patches(
        self, pixels: Pixels, attention: Attention = "native"
    ) -> tuple[Features, Float[Tensor, "n p d"]]:
        return self._vision.tokens(pixels, attention)

    def patches(self, pixels: Pixels) -> Float[Tensor, "n p d"]:
        return self.image_and_patches(pixels)[1]

    def vision(self) -> VisionTower:
        return copy.deepcopy(self._vision)

    def vision_and_patches(self) -> VisionAndPatches:
        return VisionAndPatches(self.vision())

    # text side

    def tokens(self, text: str) -> list[int]:
        """Token ids of the text, without start and end."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def token_embeddings(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... w"]:
        """Rows of the token table, without positions."""
        return self._model.text_model.embeddings.token_embedding(ids.to(self.device))

    def encode(self, tokens: Float[Tensor, "m l w"], end: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """Sequences of token embeddings through the text tower; the row at position `end` is projected.

        What stands after `end` does not matter: the tower is causal. Differentiable in `tokens`.
        """
        return self._encoded(tokens, lambda hidden: hidden[torch.arange(len(hidden)), end])

    def _encoded(self, tokens: Float[Tensor, "m l w"], picked: Callable[[Tensor], Tensor]) -> Float[Tensor, "... d"]:
        """The positions that `picked` takes of the last block's output, through norm and projection."""
        tower = self._model.text_model
        self.passes["text_tokens"] += tokens.shape[0] * tokens.shape[1]
        with self._autocast():
            hidden = tokens + tower.embeddings.position_embedding.weight[: tokens.shape[1]]
            hidden = tower.encoder(inputs_embeds=hidden, attention_mask=None, is_causal=True).last_hidden_state
            projected = self._model.text_projection(tower.final_layer_norm(picked(hidden)))
        return projected.to(tokens.dtype)

    def prompt_tree(
        self, shared: int, task: int, per_class: int, sizes: Sequence[int], names: Sequence[int]
    ) -> PromptTree:
        return prompt_tree(shared, task, per_class, sizes, names, self.device)

    def encoded_tree(self, tokens: Float[Tensor, "N w"], tree: PromptTree) -> Float[Tensor, "k d"]:
        """As `encoded`, for prompts that begin alike: each token of the tree is run once. Differentiable in `tokens`."""
        tower = self._model.text_model
        self.passes["text_tokens"] += len(tokens)
        with self._autocast():
            hidden = last_hidden(tower, self._text_blocks(), tokens, tree)
            projected = self._model.text_projection(tower.final_layer_norm(hidden))
        return projected.to(tokens.dtype)

    def _text_blocks(self) -> list[FrozenBlock]:
        """Made once, and again where the weights are others."""
        layers = cast(list[CLIPEncoderLayer], list(self._model.text_model.encoder.layers))
        weights = [(p.data_ptr(), p._version, p.dtype, p.device) for layer in layers for p in layer.parameters()]
        if self._frozen is None or self._frozen[0] != weights:
            dtype = weights[0][2] if self.precision == "float32" else getattr(torch, self.precision)
            blocks = [FrozenBlock.of(layer, dtype, last=layer is layers[-1]) for layer in layers]
            self._frozen = weights, blocks
        return self._frozen[1]

    def _autocast(self):
        reduced = self.precision != "float32"
        return torch.autocast(self.device.type, torch.bfloat16) if reduced else nullcontext()

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Float[Tensor, "m d"]:
        """Raises TowersError for a prompt that does not fit the context."""
        return torch.cat([self.encode(tokens, lengths - 1) for tokens, lengths in self._batches(prompts)])

    @torch.no_grad()
    def word_tokens(self, prompts: Sequence[str]) -> list[Float[Tensor, "_ d"]]:
        """Every token of each prompt, start and end left out, through norm and projection: what was read up to there."""
        rows = []
        for tokens, lengths in self._batches(prompts):
            projected = self._encoded(tokens, lambda hidden: hidden)
            rows += [row[1 : length - 1] for row, length in zip(projected, lengths.tolist(), strict=True)]
        return rows

    def _batches(self, prompts: Sequence[str]) -> Iterator[tuple[Float[Tensor, "m l w"], Int[Tensor, " m"]]]:
        """Token embeddings, cut at the longest prompt of the batch, and lengths with start and end."""
        rows = [[self.bos, *self.tokens(prompt), self.eos] for prompt in prompts]
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > self.context_length:
                raise TowersError(
                    f"prompt '{prompt}': {counted(len(row), 'token')}, but the text tower takes {self.context_length}; shorten it"
                )
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            longest = max(map(len, part))
            ids = torch.tensor([row + [self.eos] * (longest - len(row)) for row in part])
            yield self.token_embeddings(ids), torch.tensor([len(row) for row in part])

    def class_texts(self, names: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "k d"]:
        templates = prompt_templates(templates)
        prompts = [filled(template, name) for name in names for template in templates]
        texts = normalize(self.text(prompts), dim=-1).view(len(names), len(templates), -1)
        return normalize(texts.mean(1), dim=-1)


def _require_finite(model: CLIPModel, name: str) -> None:
    """Raises TowersError naming a weight that holds NaN or an infinity, or a logit scale whose exponential does."""
    weights = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    weights["exp(logit_scale)"] = model.logit_scale.detach().float().exp()
    wrong = [key for key, value in weights.items() if not value.isfinite().all()]
    if wrong:
        raise TowersError(
            f"towers '{name}': not finite in {counted(len(wrong), 'weight')}, first '{wrong[0]}'; "
            "the training diverged or the file is damaged: take an earlier checkpoint, or fetch it again"
        )


def _weights_fingerprint(model: CLIPModel, preprocessing: Preprocessing) -> str:
    """16 hex digits over weights (float32, by name), activations and preprocessing."""
    digest = hashlib.sha256(preprocessing.identity().encode())
    digest.update(f"{model.vision_model.config.hidden_act} {model.text_model.config.hidden_act}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.endswith("position_ids"):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]
