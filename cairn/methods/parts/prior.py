"""A prior that keeps what is trained near the towers as they came, where classes have few images.

Trained on few images, and on draws from Gaussians of as few, class texts move to the means of those images, which classify
worse than the texts of the templates. Against that a loss gets a penalty on unit rows X, X0 what the same rows were before
any training:

loss + weight mean_i |x_i - x0_i|^2

X are class texts and X0 those of the templates [K: KgCoOp, equation 5, weight 8], or X are embeddings and X0 what the towers
alone make of the same images [I]. Where no weight is given it is chosen on training images [I]. In each task half of every
class is left out, and one fit on the other half is made for each of WEIGHTS; the weight is the one under which the images
left out in all tasks so far are likeliest:

weight = argmin_w sum_t sum_(i left out of task t) -log p_w(y_i | x_i)

The images of one task are too few to tell weights apart.

Source: Yao et al. 2023, Visual-Language Prompt Tuning with Knowledge-guided Context Optimization (CVPR), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cairn.errors import ResultError
from cairn.training.context import Checkpoint, Context, Log
from cairn.types import State

FEW = 8
"""Images per class, on average over all classes seen, from which on there is no prior unless its weight is given. On `shapes:dev`
it costs DMC nothing with 4 images and 3 points of average accuracy with 8."""

WEIGHTS = (0.0, 8.0, 64.0, 512.0)
"""Those that are chosen from: none, KgCoOp's, and two that keep rows ever nearer."""

UNTRIED = 64.0
"""The weight for few images as long as none was tried."""


class PriorWeight:
    """The weight of a prior over the tasks of a learner: `given`, or chosen where images are few."""

    def __init__(self, given: float | None):
        self.given = given
        self.losses = torch.zeros(len(WEIGHTS), dtype=torch.float64)
        """For each of WEIGHTS, the negative log-likelihood of all images left out so far, a sum."""

    def so_far(self, labels: Int[Tensor, " n"], old: Int[Tensor, " k"]) -> float:
        """That for a task with these labels, by the trials so far: 0 where images are not few (see `are_few`); of equally
        likely ones the smallest."""
        if self.given is not None:
            return self.given
        if not are_few(labels, old):
            return 0.0
        return WEIGHTS[int(self.losses.argmin())] if self.losses.any() else UNTRIED

    def chosen(
        self,
        labels: Int[Tensor, " n"],
        old: Int[Tensor, " k"],
        parameters: Sequence[nn.Parameter],
        train: Callable[[Int[Tensor, " m"], float, Context], None],
        loss: Callable[[Int[Tensor, " m"]], Float[Tensor, ""]],
        ctx: Context,
    ) -> float:
        """The same after the trials of this task, which are made where there is something to choose.

        `train(rows, weight, ctx)` fits `parameters` to some of the task's rows; they are put back after each trial. `loss(rows)`
        is the mean negative log-likelihood. Trials draw what the stage itself draws, log nothing and leave nothing in the
        checkpoint: a stage that is resumed makes them again.
        """
        out = half_left_out(labels.cpu(), ctx.seeds.generator("left-out"))
        if self.given is None and are_few(labels, old) and out.any() and parameters:
            kept, rows = (~out).nonzero()[:, 0], out.nonzero()[:, 0]
            quiet = replace(ctx, log=Log(where=ctx.log.where), checkpoint=Checkpoint(world=ctx.world))
            losses = []
            for weight in WEIGHTS:
                ctx.checkpoint.poll()
                with _put_back(parameters):
                    train(kept, weight, quiet)
                    with torch.no_grad():
                        losses.append(len(rows) * loss(rows).item())
            self.losses = self.losses + torch.tensor(losses, dtype=torch.float64)
            ctx.log("prior", weight=self.so_far(labels, old), losses=losses)
        return self.so_far(labels, old)

    def state_dict(self) -> State:
        return {"losses": self.losses}

    def load_state_dict(self, state: State) -> None:
        """Raises ResultError if it does not fit."""
        # Earlier versions made no trials
        losses = state.get("losses", torch.zeros(len(WEIGHTS), dtype=torch.float64))
        if losses.shape != (len(WEIGHTS),) or losses.dtype != torch.float64:
            raise ResultError(
                f"prior state 'losses' is {losses.dtype} {tuple(losses.shape)}: it is float64, one for each of {WEIGHTS}"
            )
        self.losses = losses


def are_few(labels: Int[Tensor, " n"], old: Int[Tensor, " k"]) -> bool:
    """Whether classes have fewer than FEW images on average: `labels` of the task, `old` images behind each class before."""
    seen = max([len(old), *(labels + 1).tolist()])
    return int(old.sum()) + len(labels) < FEW * seen


def half_left_out(labels: Int[Tensor, " n"], generator: torch.Generator) -> Bool[Tensor, " n"]:
    """For each row, whether it is left out: half of every class, rounded down."""
    out = torch.zeros(len(labels), dtype=torch.bool)
    for c in labels.unique():
        own = (labels == c).nonzero()[:, 0]
        out[own[torch.randperm(len(own), generator=generator)[: len(own) // 2]]] = True
    return out


@contextmanager
def _put_back(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    values = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data.copy_(value)
