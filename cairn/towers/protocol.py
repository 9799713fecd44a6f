"""What a method may ask of the two encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cairn.types import Attention, Features, Pixels, Precision

if TYPE_CHECKING:
    from cairn.towers.prefix import PromptTree


@runtime_checkable
class TextTower(Protocol):
    """The text side token by token: what soft prompts are put together from and run through."""

    dim: int
    logit_scale: float
    device: torch.device
    width: int
    """Numbers per token."""
    context_length: int
    bos: int
    eos: int

    def tokens(self, text: str) -> list[int]:
        """Token ids of the text, without start and end."""
        ...

    def token_embeddings(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... w"]:
        """Rows of the token table, without positions."""
        ...

    def encode(self, tokens: Float[Tensor, "m l w"], end: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """Sequences of token embeddings through the text tower; the row at position `end` is projected."""
        ...

    def prompt_tree(
        self, shared: int, task: int, per_class: int, sizes: Sequence[int], names: Sequence[int]
    ) -> PromptTree:
        """How prompts that begin alike are run, by the lengths of their blocks, the classes per task and the tokens per name: see
        `cairn.towers.prefix.prompt_tree`."""
        ...

    def encoded_tree(self, tokens: Float[Tensor, "N w"], tree: PromptTree) -> Float[Tensor, "k d"]:
        """As `encode`, for prompts that begin alike: each token of the tree is run once."""
        ...


@runtime_checkable
class Towers(Protocol):
    """An image side and a text side in one embedding space.

    Embeddings come out as the projection leaves them: they are not normalised. The towers themselves never change;
    what trains is a copy (`vision`) or stands outside (contexts of soft prompts).
    """

    name: str
    dim: int
    hidden_dim: int
    """Numbers per image before the projection; `dim` where there is no image tower."""
    logit_scale: float
    """s = exp(logit_scale), the factor on cosines; about 100 for CLIP."""
    fingerprint: str
    """Names what the towers compute: weights, activation and preprocessing, and the tokenizer; see `cairn.towers.fingerprint`."""
    passes: dict[str, int]
    """Forward passes so far: `images` through the vision tower, `text_tokens` through the text tower."""
    device: torch.device
    precision: Precision
    """Arithmetic inside the towers, float32 or bfloat16; what comes out is float32."""
    revision: str | None
    """The commit of the weights, where they come from a hub."""
    source: str
    """Names them from any working directory."""
    notices: tuple[str, ...]
    """What a user should know of how they were loaded."""
    has_images: bool
    """Whether there is an image tower; without one, an image *is* its embedding."""
    has_text: bool
    """Whether classes have text embeddings."""

    @property
    def text_tower(self) -> TextTower | None:
        """None without one."""
        ...

    def prepare(self, item: Any) -> Tensor:
        """One opened image as it is kept in memory: uint8 (3, h, w) at the tower's resolution, or a row (d,)."""
        ...

    def pixels(self, prepared: Tensor) -> Pixels:
        """A stack of prepared images as the image tower takes it, on the towers' device."""
        ...

    def image(self, pixels: Pixels) -> Features:
        """Of pixels, or of a `TrunkOutput`."""
        ...

    def image_and_hidden(self, pixels: Pixels) -> tuple[Features, Float[Tensor, "n w"]]:
        """The embedding and what the projection makes it of, (n, hidden_dim), from one pass; without an image tower the
        embedding twice."""
        ...

    def patches(self, pixels: Pixels) -> Float[Tensor, "n p d"]: ...

    def image_and_patches(
        self, pixels: Pixels, attention: Attention = "native"
    ) -> tuple[Features, Float[Tensor, "n p d"]]:
        """Both from one pass of the tower."""
        ...

    def text(self, prompts: Sequence[str]) -> Float[Tensor, "m d"]: ...

    def tokens(self, text: str) -> list[int]:
        """Token ids of the text, without start and end."""
        ...

    def word_tokens(self, prompts: Sequence[str]) -> list[Float[Tensor, "_ d"]]:
        """The tokens of each prompt, one row each."""
        ...

    def class_texts(self, names: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "k d"]:
        """Unit text embeddings of classes: the mean over the templates of unit embeddings, normalised."""
        ...

    def vision(self) -> nn.Module:
        """A trainable copy of the image tower: pixels to embeddings, frozen until a tuning says otherwise."""
        ...

    def vision_and_patches(self) -> nn.Module:
        """The same with two results: embeddings of images and of their patches (n, p, d)."""
        ...


WHOLE = -1
"""In place of a number of parts: all of them, so that rows are embeddings."""


class TrunkOutput(Tensor):
    """What the first `parts` parts of an image tower made of images, in place of their pixels (see `cairn.towers.trunk`): rows of all
    tokens, behind the last block that of the class token alone."""

    parts: int

    # What is made of it is a plain tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def of(cls, rows: Tensor, parts: int) -> TrunkOutput:
        found = rows.detach().as_subclass(cls)
        found.parts = parts
        return found

    @property
    def rows(self) -> Tensor:
        return self.as_subclass(Tensor)


@runtime_checkable
class HasTrunk(Protocol):
    """An image tower that can be passed in two."""

    @property
    def has_trunk(self) -> bool:
        """Whether enough of it stands below the first trained part."""
        ...

    def trunk(self, pixels: Pixels) -> TrunkOutput:
        """What the parts below the first trained one make of images, which the tower takes in place of their pixels."""
        ...
