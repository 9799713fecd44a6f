"""The text side of a method: class embeddings that can be trained while the text tower stays frozen.

`SoftPrompts` learns context vectors, "[v_1 .. v_M] name." [P: stage 2 learns prompts; K: CoOp for their form].
`ResidualTexts` adds a vector to each class text and needs no text tower [I]: the embedding form.
Both grow with the classes, and both are called without arguments for the texts of all classes so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from cairn.errors import ConfigError
from cairn.towers.clip import ClipTowers, spoken
from cairn.towers.protocol import Towers
from cairn.towers.state import State, spelled, words


def prompt_embeddings(
    towers: ClipTowers, contexts: Float[Tensor, "b M w"], names: Sequence[str], block: Sequence[int]
) -> Float[Tensor, "k d"]:
    """Text embeddings (k x d, not normalised) of "[contexts[block[c]]] names[c]." for every class c.

    The sequence is start, the M context vectors, the tokens of "name.", end; everything after the end is cut. The
    result is differentiable in `contexts`. Raises ConfigError naming the first class that does not fit the context.
    """
    length = contexts.shape[1]
    rows = [towers.tokens(spoken(name) + ".") for name in names]
    for name, row in zip(names, rows, strict=True):
        if (needed := 1 + length + len(row) + 1) > towers.context_length:
            raise ConfigError(
                f"class '{name}': {length} context vectors and the name need {needed} tokens, "
                f"the text tower takes {towers.context_length}; lower stage2.text.length or shorten the name"
            )
    longest = max(map(len, rows)) + 1
    ids = torch.tensor([row + [towers.eos] * (longest - len(row)) for row in rows])
    suffix = towers.token_embeddings(ids)
    start = towers.token_embeddings(torch.tensor([[towers.bos]])).expand(len(rows), 1, -1)
    tokens = torch.cat([start, contexts[torch.as_tensor(block)], suffix], dim=1)
    return towers.encoded(tokens, torch.tensor([1 + length + len(row) for row in rows]))


class _Choice(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prompts(_Choice):
    """Soft prompts through the frozen text tower [P]; length, start and scope are ours [I], after CoOp [K]."""

    kind: Literal["prompts"] = "prompts"
    length: int = Field(16, ge=1, description="M, context vectors per block (4 to 30 in the literature)")
    scope: Literal["shared", "task", "class"] = Field("shared", description="who shares a context block")
    init: str | None = Field(
        None, description="words whose embedding starts a block, e.g. 'a photo of a'; null: N(0, 0.02^2)"
    )
    freeze_old: bool = Field(False, description="blocks of finished tasks no longer train (scopes task and class)")

    def build(self, towers: Towers) -> SoftPrompts:
        if not isinstance(towers, ClipTowers):
            raise ConfigError("stage2.text 'prompts': a features file has no text tower; take stage2.text=residual")
        return SoftPrompts(towers, self)


class Residual(_Choice):
    """A residual vector on each class text, zero at first [I]. Without class texts, class means stand in for them."""

    kind: Literal["residual"] = "residual"
    freeze_old: bool = Field(False, description="residuals of finished tasks no longer train")

    def build(self, towers: Towers) -> ResidualTexts:
        return ResidualTexts(self)


class Templates(_Choice):
    """Hand-written templates, nothing learned."""

    kind: Literal["templates"] = "templates"

    def build(self, towers: Towers) -> FixedTexts:
        return FixedTexts()


ClassText = Annotated[Prompts | Residual | Templates, Field(discriminator="kind")]


class FixedTexts(nn.Module):
    """The class texts that were given, unchanged. `state` and `restore` carry what has grown."""

    def __init__(self):
        super().__init__()
        self.register_buffer("anchors", torch.zeros(0, 0))

    def grow(self, names: Sequence[str], anchors: Float[Tensor, "k d"], rng: torch.Generator) -> None:
        """New classes with the texts they start from (unit rows)."""
        self.anchors = anchors.clone() if self.anchors.numel() == 0 else torch.cat([self.anchors, anchors])

    def trainable(self) -> list[nn.Parameter]:
        return []

    def forward(self) -> Float[Tensor, "k d"]:
        """Unit text embeddings of all classes so far."""
        return self.anchors

    def state(self) -> State:
        return {"anchors": self.anchors.cpu()}

    def restore(self, state: State) -> None:
        self.anchors = state["anchors"].to(self.anchors.device)


class ResidualTexts(FixedTexts):
    """t_c = unit(anchor_c + r_c)."""

    def __init__(self, choice: Residual):
        super().__init__()
        self.choice = choice
        self.residuals = nn.ParameterList()

    def grow(self, names: Sequence[str], anchors: Float[Tensor, "k d"], rng: torch.Generator) -> None:
        super().grow(names, anchors, rng)
        self.residuals.append(nn.Parameter(torch.zeros_like(anchors)))

    def trainable(self) -> list[nn.Parameter]:
        return list(self.residuals)[-1:] if self.choice.freeze_old else list(self.residuals)

    def forward(self) -> Float[Tensor, "k d"]:
        return normalize(self.anchors + torch.cat(list(self.residuals)), dim=-1)

    def state(self) -> State:
        return super().state() | _numbered("residual", self.residuals)

    def restore(self, state: State) -> None:
        super().restore(state)
        self.residuals = _parameters("residual", state, self.anchors.device)


class SoftPrompts(nn.Module):
    """t_c = unit(text tower("[block of c] name_c.")). One block for all, one per task, or one per class."""

    def __init__(self, towers: ClipTowers, choice: Prompts):
        super().__init__()
        self.choice = choice
        self._towers = towers
        self.names: list[str] = []
        self.block: list[int] = []
        self.blocks = nn.ParameterList()  # one entry per growth: (blocks born then) x M x w

    def grow(self, names: Sequence[str], anchors: Float[Tensor, "k d"], rng: torch.Generator) -> None:
        """New classes; what blocks their scope asks for are born, from `rng` or from the words of `init`."""
        born = {"shared": 0 if self.names else 1, "task": 1, "class": len(names)}[self.choice.scope]
        existing = sum(len(blocks) for blocks in self.blocks)
        if born:
            self.blocks.append(nn.Parameter(self._start(rng).expand(born, -1, -1).clone()))
        first = 0 if self.choice.scope == "shared" else existing
        self.block += [first + (i if self.choice.scope == "class" else 0) for i in range(len(names))]
        self.names += names

    def _start(self, rng: torch.Generator) -> Float[Tensor, "1 M w"]:
        values = 0.02 * torch.randn(1, self.choice.length, self._towers.width, generator=rng)
        if self.choice.init:
            ids = self._towers.tokens(self.choice.init)[: self.choice.length]
            values[0, len(values[0]) - len(ids) :] = self._towers.token_embeddings(torch.tensor(ids)).cpu()
        return values.to(self._towers.device)

    def trainable(self) -> list[nn.Parameter]:
        return list(self.blocks)[-1:] if self.choice.freeze_old else list(self.blocks)

    def forward(self) -> Float[Tensor, "k d"]:
        contexts = torch.cat(list(self.blocks))
        return normalize(prompt_embeddings(self._towers, contexts, self.names, self.block), dim=-1)

    def state(self) -> State:
        return _numbered("block", self.blocks) | {"names": words(self.names), "of_class": torch.tensor(self.block)}

    def restore(self, state: State) -> None:
        self.names, self.block = spelled(state["names"]), state["of_class"].tolist()
        self.blocks = _parameters("block", state, self._towers.device)


def _numbered(name: str, parameters: nn.ParameterList) -> State:
    return {f"{name}{i}": p.detach().cpu().clone() for i, p in enumerate(parameters)}


def _parameters(name: str, state: State, device: torch.device) -> nn.ParameterList:
    return nn.ParameterList(
        state[f"{name}{i}"].clone().to(device) for i in range(sum(k.startswith(name) for k in state))
    )
