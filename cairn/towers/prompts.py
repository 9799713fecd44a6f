"""The text side of a method: class embeddings that can be trained while the text tower stays frozen.

`SoftPrompts` learns context vectors, "[v_1 .. v_M] name." [P: stage 2 learns prompts; K: CoOp for their form].
`ResidualTexts` adds a vector to each class text and needs no text tower [I]: the embedding form.
Both grow with the classes, and both are called without arguments for the texts of all classes so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize

from cairn.data.templates import spoken
from cairn.errors import ConfigError
from cairn.maths.rows import replaced, without
from cairn.settings import Given
from cairn.towers.protocol import TextTower, Towers
from cairn.types import State, spelled, words

if TYPE_CHECKING:
    from cairn.towers.prefix import PromptTree


def name_tokens(towers: TextTower, names: Sequence[str], context: int) -> list[list[int]]:
    """Token ids of "name." and the end, for every name.

    Raises ConfigError naming the first class that does not fit the text tower behind `context` vectors.
    """
    rows = [[*towers.tokens(spoken(name) + "."), towers.eos] for name in names]
    for name, row in zip(names, rows, strict=True):
        if (needed := 1 + context + len(row)) > towers.context_length:
            raise ConfigError(
                f"class '{name}': {context} context vectors and the name need {needed} tokens, the text tower takes "
                f"{towers.context_length}; lower stage2.text.shared (or task, per_class) or shorten the name"
            )
    return rows


def prompt_embeddings(
    towers: TextTower, contexts: Float[Tensor, "k M w"], names: Sequence[str], length: int = 0
) -> Float[Tensor, "k d"]:
    """Text embeddings (k x d, not normalised) of "[contexts[c]] names[c]." for every class c, each run whole.

    The sequence is start, the M context vectors, the tokens of "name.", end; it is padded to the longest, or to `length`
    tokens. Differentiable in `contexts`. `SoftPrompts` gives the same at less cost; this is what it is held against.
    Raises ConfigError as `name_tokens`.
    """
    k, M, _ = contexts.shape
    rows = name_tokens(towers, names, M)
    behind = max(max(map(len, rows)), length - 1 - M)
    ids = torch.tensor([row + [towers.eos] * (behind - len(row)) for row in rows])
    start = towers.token_embeddings(torch.tensor([[towers.bos]])).expand(k, 1, -1)
    tokens = torch.cat([start, contexts, towers.token_embeddings(ids)], dim=1)
    return towers.encode(tokens, torch.tensor([M + len(row) for row in rows]))


class Prompts(Given):
    """Soft prompts "[shared][task][class] name." through the frozen text tower [P]; the blocks are ours [I].

    Lengths follow CoOp [K]; blocks side by side follow MPA [K]. A length of 0 leaves a block out. With a residual, t_c =
    unit(p_c + residual r_c / s), p_c the unit text of c's prompt: what is frozen of a prompt keeps its place, and the text
    can still give way to classes that came later [I]. Under Adam the weight is how much faster r moves than the prompt.
    """

    kind: Literal["prompts"] = "prompts"
    shared: int = Field(
        default=0, ge=0, description="context vectors shared by all classes (4 to 30 in the literature)"
    )
    task: int = Field(default=0, ge=0, description="context vectors of each task")
    per_class: int = Field(default=4, ge=0, description="context vectors of each class")
    init: str | None = Field(
        default="a photo of a", description="words that start the first block, e.g. 'a photo of a'; null: N(0, 0.02^2)"
    )
    freeze_old: bool = Field(default=False, description="texts of finished tasks are cached and no longer move")
    residual: float = Field(
        default=0.0,
        ge=0,
        description="weight of a residual vector on each class text, in units of 1/s; those of old classes train on; 0: none",
    )
    lr: float = Field(default=1e-2, gt=0, description="peak learning rate, in place of the schedule's [K: CoOp, 2e-3]")

    @model_validator(mode="after")
    def _some_context(self) -> Prompts:
        if self.shared + self.task + self.per_class == 0:
            raise ValueError(
                "shared, task and per_class are all 0, nothing to learn; set task or per_class first, or take templates"
            )
        return self

    def build(self, towers: Towers) -> SoftPrompts:
        if towers.text_tower is None:
            raise ConfigError("stage2.text 'prompts': a features file has no text tower; take stage2.text=residual")
        return SoftPrompts(towers.text_tower, self)


class Residual(Given):
    """A residual vector on each class text, zero at first [I]. Without class texts, class means stand in for them."""

    kind: Literal["residual"] = "residual"
    freeze_old: bool = Field(default=False, description="residuals of finished tasks no longer train")

    def build(self, towers: Towers) -> ResidualTexts:
        return ResidualTexts(self, towers.logit_scale)


class Templates(Given):
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

    def forget(self, c: int) -> None:
        """Without class number c."""
        self.anchors = without(self.anchors, c)

    def rename(self, c: int, name: str, anchor: Float[Tensor, " d"]) -> bool:
        """Class number c is called `name` and starts from another text; False where its text does not depend on that any more."""
        self.anchors = replaced(self.anchors, c, anchor)
        return True

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
    """t_c = unit(anchor_c + r_c / s). In units of 1 / s one learning rate fits every temperature s."""

    def __init__(self, choice: Residual, s: float):
        super().__init__()
        self.choice, self.s = choice, s
        self.residuals = nn.ParameterList()

    def grow(self, names: Sequence[str], anchors: Float[Tensor, "k d"], rng: torch.Generator) -> None:
        super().grow(names, anchors, rng)
        self.residuals.append(nn.Parameter(torch.zeros_like(anchors)))

    def forget(self, c: int) -> None:
        super().forget(c)
        self.residuals = _without(self.residuals, c)

    def trainable(self) -> list[nn.Parameter]:
        return list(self.residuals)[-1:] if self.choice.freeze_old else list(self.residuals)

    def forward(self) -> Float[Tensor, "k d"]:
        return normalize(self.anchors + torch.cat(list(self.residuals)) / self.s, dim=-1)

    def state(self) -> State:
        return super().state() | _numbered("residual", self.residuals)

    def restore(self, state: State) -> None:
        super().restore(state)
        self.residuals = _parameters("residual", state, self.anchors.device)


class SoftPrompts(nn.Module):
    """t_c = unit(p_c + residual r_c / s),  p_c = unit(text tower("[shared][block of c's task][block of c] name_c.")).

    Blocks that prompts share run through the tower once.
    """

    cached: Tensor

    def __init__(self, towers: TextTower, choice: Prompts):
        super().__init__()
        self.choice = choice
        self._towers = towers
        self.names: list[str] = []
        self.sizes: list[int] = []  # classes per task
        self._since: int  # the first task whose prompts are computed
        self._ids: Int[Tensor, " m"]  # start, then every name with its end
        self._tree: PromptTree
        self.shared = nn.Parameter(torch.zeros(choice.shared, towers.width))
        self.task = nn.ParameterList()  # M x w each
        self.per_class = nn.ParameterList()  # k x M x w each
        self.residuals = nn.ParameterList()  # k x d each, if any
        self.register_buffer("cached", torch.zeros(0, towers.dim))  # texts of finished tasks, where those are frozen

    def grow(self, names: Sequence[str], anchors: Float[Tensor, "k d"], rng: torch.Generator) -> None:
        """A task's classes, with new blocks from `rng`; what is frozen of the tasks before is cached."""
        choice = self.choice
        if choice.freeze_old and self.names:
            self.cached = self._prompted().detach()
        if not self.names:
            self.shared.data.copy_(self._start(rng, choice.shared, words=True))
        self.names += names
        self.sizes.append(len(names))
        self.task.append(nn.Parameter(self._start(rng, choice.task, words=not choice.shared)))
        blocks = [self._start(rng, choice.per_class, words=not choice.shared + choice.task) for _ in names]
        self.per_class.append(nn.Parameter(torch.stack(blocks)))
        if choice.residual:
            self.residuals.append(nn.Parameter(torch.zeros(len(names), self._towers.dim, device=self._towers.device)))
        self._plan()

    def forget(self, c: int) -> None:
        """Without class number c; the block of a task that has no class left goes too."""
        ends = list(accumulate(self.sizes))
        task = next(i for i, end in enumerate(ends) if c < end)
        del self.names[c]
        if c < len(self.cached):  # of classes that still move nothing is cached
            self.cached = without(self.cached, c)
        self.per_class, self.residuals = _without(self.per_class, c), _without(self.residuals, c)
        self.sizes[task] -= 1
        if not self.sizes[task]:
            del self.sizes[task]
            self.task = nn.ParameterList([block for i, block in enumerate(self.task) if i != task])
        if self.names:
            self._plan()

    def rename(self, c: int, name: str, anchor: Float[Tensor, " d"]) -> bool:
        """Class number c is called `name` behind its context vectors, which stay; False where its text is of a finished task."""
        self.names[c] = name
        self._plan()
        return c >= len(self.cached)

    def _start(self, rng: torch.Generator, length: int, *, words: bool) -> Float[Tensor, "M w"]:
        values = 0.02 * torch.randn(length, self._towers.width, generator=rng)
        if words and self.choice.init and length:
            ids = self._towers.tokens(self.choice.init)[:length]
            values[length - len(ids) :] = self._towers.token_embeddings(torch.tensor(ids)).cpu()
        return values.to(self._towers.device)

    def trainable(self) -> list[nn.Parameter]:
        since = max(len(self.sizes) - 1, self._since) if self.choice.freeze_old else 0
        blocks = [self.shared, *list(self.task)[since:], *list(self.per_class)[since:], *self.residuals]
        return [block for block in blocks if block.numel()]

    def forward(self) -> Float[Tensor, "k d"]:
        """Unit text embeddings of all classes so far."""
        texts = self._prompted()
        if not self.residuals:
            return texts
        step = self.choice.residual / self._towers.logit_scale
        return normalize(texts + step * torch.cat(list(self.residuals)), dim=-1)

    def _prompted(self) -> Float[Tensor, "k d"]:
        """Unit embeddings of the prompts, those of the tasks since number `_since` computed."""
        if self._since == len(self.sizes):
            return self.cached
        blocks = [self.shared, *list(self.task)[self._since :]]
        blocks += [own.flatten(0, 1) for own in list(self.per_class)[self._since :]]
        start, named = self._towers.token_embeddings(self._ids).split([1, len(self._ids) - 1])
        texts = normalize(self._towers.encoded_tree(torch.cat([start, *blocks, named]), self._tree), dim=-1)
        return torch.cat([self.cached, texts])

    def _plan(self) -> None:
        """Which prompts are computed, and where their tokens stand. Neither changes until the classes do."""
        done, since = len(self.cached), 0
        while sum(self.sizes[:since]) < done:
            since += 1
        choice, towers = self.choice, self._towers
        rows = name_tokens(towers, self.names[done:], choice.shared + choice.task + choice.per_class)
        self._since = since
        if not rows:
            return
        self._ids = torch.tensor([towers.bos, *chain.from_iterable(rows)], device=towers.device)
        self._tree = towers.prompt_tree(
            choice.shared, choice.task, choice.per_class, self.sizes[since:], [len(row) for row in rows]
        )

    def state(self) -> State:
        parts = {"shared": self.shared.detach().cpu().clone(), "cached": self.cached.cpu()}
        parts |= _numbered("task", self.task) | _numbered("per_class", self.per_class)
        parts |= _numbered("residual", self.residuals)
        return parts | {"names": words(self.names), "sizes": torch.tensor(self.sizes)}

    def restore(self, state: State) -> None:
        device = self._towers.device
        self.names, self.sizes = spelled(state["names"]), state["sizes"].tolist()
        self.shared.data.copy_(state["shared"])
        self.cached = state["cached"].to(device)
        self.task = _parameters("task", state, device)
        self.per_class = _parameters("per_class", state, device)
        self.residuals = _parameters("residual", state, device)
        if self.names:
            self._plan()


def _without(blocks: nn.ParameterList, c: int) -> nn.ParameterList:
    """Blocks of rows, one row per class, without row c of all; an empty block goes."""
    kept, start = [], 0
    for block in blocks:
        rows = [i for i in range(len(block)) if start + i != c]
        start += len(block)
        if rows:
            kept.append(nn.Parameter(block.detach()[rows]))
    return nn.ParameterList(kept)


def _numbered(name: str, parameters: nn.ParameterList) -> State:
    return {f"{name}{i}": p.detach().cpu().clone() for i, p in enumerate(parameters)}


def _parameters(name: str, state: State, device: torch.device) -> nn.ParameterList:
    return nn.ParameterList(
        state[f"{name}{i}"].clone().to(device) for i in range(sum(k.startswith(name) for k in state))
    )
