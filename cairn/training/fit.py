"""The one training loop, and its schedule: optimiser, learning rate, and the average of the weights along the way.

Several processes go through it side by side. Batches of images are those of one process, and each process has a part of the
rows: gradients are summed, so that a step is what one process makes of the whole batch, up to the order of sums. Batches of
features, which all of them have, each goes through as if it were alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from cairn.data.loading import Loader
from cairn.errors import NotFinite, OutOfMemory, counted
from cairn.settings import Given
from cairn.training.context import Context, Processes
from cairn.types import State


class Schedule(Given):
    """A stage's optimisation. The learning rate rises linearly, then falls by a half cosine, or in steps, or stays."""

    epochs: int = Field(default=1, ge=0, description="passes over the task's images")
    batch: int = Field(default=128, ge=1, description="rows per step")
    lr: float = Field(default=1e-3, gt=0, description="peak learning rate")
    optimizer: Literal["adamw", "adam", "sgd"] = Field(default="adamw", description="adamw, adam or sgd (momentum 0.9)")
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    cosine: bool = Field(default=True, description="half-cosine decay to zero")
    milestones: tuple[int, ...] = Field(
        default=(), description="epochs after which the learning rate falls to a tenth, in place of the cosine"
    )
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")

    def optimiser(self, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """One kernel for all parameters where they lie on a CUDA device; a fused step on a processor would round otherwise."""
        fused = True if parameters[0].device.type == "cuda" else None
        match self.optimizer:
            case "adamw":
                return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=fused)
            case "adam":
                return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=fused)
            case "sgd":
                momentum, decay = 0.9, self.weight_decay
                return torch.optim.SGD(parameters, lr=self.lr, momentum=momentum, weight_decay=decay, fused=fused)

    def factor(self, step: int, steps: int) -> float:
        """Learning rate at `step` of `steps`, as a share of the peak, in (0, 1]."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        if self.milestones:
            return 0.1 ** sum(step * self.epochs >= steps * epoch for epoch in self.milestones)
        if not self.cosine:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class BetaAverage:
    """theta_bar = sum_t a_t theta_t / sum_t a_t with a_t = Beta(beta, beta) at (t + .5) / (T + 1), t = 0 the start.

    With beta < 1 the first and the last weights count most: the pretrained model and the tuned one.
    Source: Shu et al., CLIPood (2023), section 3.3.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], beta: float):
        self.parameters, self.beta = list(parameters), beta
        self.sum = [torch.zeros_like(p) for p in self.parameters]
        self.start = [p.detach().clone() for p in self.parameters]
        self.weight = 0.0

    def update(self, step: int, steps: int) -> None:
        """After the step with index `step` of `steps`."""
        if step == 0:
            self._add(self.start, 0, steps)
        self._add(self.parameters, step + 1, steps)

    def _add(self, values: Sequence[torch.Tensor], t: int, steps: int) -> None:
        x = (t + 0.5) / (steps + 1)
        density = (x * (1 - x)) ** (self.beta - 1)
        self.weight += density
        for total, value in zip(self.sum, values, strict=True):
            total.add_(value.detach(), alpha=density)

    def apply(self) -> None:
        """Put the average into the parameters. There must have been a step."""
        for parameter, total in zip(self.parameters, self.sum, strict=True):
            parameter.data.copy_(total / self.weight)

    def state(self) -> dict[str, torch.Tensor]:
        sums = {f"sum-{i}": total.cpu() for i, total in enumerate(self.sum)}
        return {"weight": torch.tensor(self.weight, dtype=torch.float64)} | sums

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.weight = float(state["weight"])
        for i, total in enumerate(self.sum):
            total.copy_(state[f"sum-{i}"])


Inputs = TypeVar("Inputs")
Inputs_co = TypeVar("Inputs_co", covariant=True)


class Batches(Protocol[Inputs_co]):
    """A source of batches: `(inputs, labels)` pairs. Those of a `Loader` can be shared out between processes."""

    def __len__(self) -> int:
        """Steps per epoch."""
        ...

    def epochs(self, rngs: Sequence[torch.Generator], skip: int = 0) -> Iterator[Iterator[tuple[Inputs_co, Tensor]]]:
        """One pass for each generator, which alone decides its order and draws. Of the first one, `skip` batches are left
        out."""
        ...


class Stochastic(Protocol):
    """What draws random numbers in training, such as a model with dropout, and none otherwise."""

    device: torch.device

    def training(self, generator: torch.Generator) -> AbstractContextManager[None]:
        """Training mode, with everything random drawn from `generator`."""
        ...


def fit(
    loss: Callable[[Inputs, Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    batches: Batches[Inputs],
    schedule: Schedule,
    ctx: Context,
    *,
    rates: Sequence[float] | None = None,
    average: BetaAverage | None = None,
    model: Stochastic | None = None,
) -> None:
    """Minimise the mean of `loss(inputs, labels)` over the batches; with `average`, its parameters end as their average.

    `loss` is computed with `model` in training mode; what it draws in step i comes from `ctx.seeds.at(step=i)`, in each process
    apart where batches are shared out.
    Where batches are shared out between processes, the loss must be a mean over rows, none of which depends on another.

    `rates` are multiples of the schedule's learning rate, one for each parameter; 1 for all of them if None.
    Epoch e draws its order from `ctx.seeds.at(epoch=e)`. What the checkpoint knows of this stage, named by the seeds, is taken up
    where it stood.
    Raises NotFinite, naming the step, if a loss is not a number; the parameters then are those of the step before.
    """
    parameters, checkpoint = list(parameters), ctx.checkpoint
    steps = schedule.epochs * len(batches)
    if not parameters or not steps:
        return
    name = "fit-" + "-".join(ctx.seeds.path)
    course = _Course(parameters, _optimiser(schedule, parameters, rates or [1.0] * len(parameters)), average)
    opens_images = isinstance(batches, Loader)
    if opens_images and (trained := checkpoint.trained(name)) is not None:
        return course.restore(trained)
    if (held := checkpoint.work(name)) is not None:
        course.restore(held)
        if not 0 <= course.step <= steps:
            raise ValueError(f"{name}: step {course.step} of {steps}")
        if course.step == steps:
            return checkpoint.found_finished(name, course.finished())
    world = ctx.world
    shared = world.world_size > 1 and opens_images
    part = {"rank": world.rank} if shared else {}

    def training(step: int) -> AbstractContextManager[None]:
        if model is None:
            return nullcontext()
        return model.training(ctx.seeds.at(step=step, **part).generator("dropout", model.device))

    waited, start, begun = 0.0, time.perf_counter(), course.step
    done, skip = divmod(course.step, len(batches))
    rngs = [ctx.seeds.at(epoch=epoch).generator("batches") for epoch in range(done, schedule.epochs)]
    epochs: Iterator[Iterator[tuple[Any, Tensor]]] = batches.epochs(rngs, skip)
    if shared and isinstance(batches, Loader):
        epochs = batches.epochs(rngs, skip, (world.rank, world.world_size))
    for epoch, source in enumerate(epochs, start=done):
        mark = began = time.perf_counter()
        rows = course.rows
        for inputs, labels in source:
            waited += time.perf_counter() - mark
            for group in course.optimiser.param_groups:
                group["lr"] = group["rate"] * schedule.lr * schedule.factor(course.step, steps)
            course.optimiser.zero_grad()
            value, number = 0.0, len(labels)
            if number:
                with training(course.step), _told_of_memory(ctx.log.place, number):
                    whole = loss(inputs, labels)
                    value = whole.item()
                    if math.isfinite(value):
                        whole.backward()
            if shared:
                value, number = _summed(parameters, value, number, world)
            if not math.isfinite(value):
                raise NotFinite(
                    f"{ctx.log.place}, epoch {epoch}, step {course.step}: the loss is {value}; lower the learning rate"
                )
            clip_grad_norm_(parameters, schedule.clip)
            course.optimiser.step()
            if average is not None:
                average.update(course.step, steps)
            course.count(number, value)
            mark = time.perf_counter()
            ctx.log.progress(
                epoch=epoch,
                epochs=schedule.epochs,
                step=course.step,
                steps=steps,
                loss=course.loss / course.rows,
                rate=(course.rows - rows) / (mark - began),
                remaining=(mark - start) / (course.step - begun) * (steps - course.step),
            )
            if course.step % len(batches):
                checkpoint.step(name, course.state)
        ctx.log(
            "epoch",
            epoch=epoch,
            loss=course.loss / max(1, course.rows),
            rows=course.rows,
            seconds=time.perf_counter() - began,
            waited=waited,
            parameters=sum(p.numel() for p in parameters),
        )
        waited, course.rows, course.loss = 0.0, 0, 0.0
        if epoch + 1 < schedule.epochs:
            checkpoint.step(name, course.state)
    if average is not None:
        average.apply()
    world.broadcast_(parameters)
    checkpoint.finish(name, course.finished)


@contextmanager
def _told_of_memory(place: str, rows: int) -> Iterator[None]:
    """Raises OutOfMemory in place of torch's own."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise OutOfMemory(
            f"{place}: the device's memory does not hold a step with {counted(rows, 'row')}; give a smaller schedule.batch, or "
            "--precision bfloat16"
        ) from None


def _summed(parameters: Sequence[nn.Parameter], value: float, rows: int, world: Processes) -> tuple[float, int]:
    """Loss and number of rows of a batch whose parts the processes have. Its gradient takes the place of the part's.

    g = sum_r n_r g_r / sum_r n_r, where process r has n_r rows; the loss alike. A parameter without a gradient keeps none.
    """
    grads = [p.grad for p in parameters]
    there = [float(grad is not None) for grad in grads]
    parts = [
        p.new_zeros(p.numel()) if g is None else rows * g.flatten() for p, g in zip(parameters, grads, strict=True)
    ]
    *sums, figures = world.all_reduce_sum(torch.cat([*parts, parts[0].new_tensor([*there, rows * value, rows])])).split(
        [*map(len, parts), len(there) + 2]
    )
    *there, value, rows = figures.tolist()
    for parameter, total, some in zip(parameters, sums, there, strict=True):
        parameter.grad = (total / rows).view_as(parameter) if some else None
    return value / rows, round(rows)


def _optimiser(schedule: Schedule, parameters: Sequence[nn.Parameter], rates: Sequence[float]) -> torch.optim.Optimizer:
    """One group of parameters for each rate, in order of appearance."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, rate in zip(parameters, rates, strict=True):
        groups.setdefault(rate, []).append(parameter)
    (rate, own), *others = groups.items()
    optimiser = schedule.optimiser(own)
    optimiser.param_groups[0]["rate"] = rate
    for rate, own in others:
        optimiser.add_param_group({"params": own, "rate": rate})
    return optimiser


class _Course:
    """How far a stage is: everything that its next step depends on."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer, average: BetaAverage | None
    ):
        self.parameters, self.optimiser, self.average = parameters, optimiser, average
        self.step = self.rows = 0
        self.loss = 0.0
        """Sums over the rows of the epoch so far."""

    def count(self, rows: int, loss: float) -> None:
        self.step, self.rows, self.loss = self.step + 1, self.rows + rows, self.loss + loss * rows

    def finished(self) -> State:
        """Step and parameters: what remains of a stage that is done."""
        parameters = {f"parameter-{i}": p.detach().cpu().clone() for i, p in enumerate(self.parameters)}
        return {"step": torch.tensor(self.step)} | parameters

    def state(self) -> State:
        moments = {
            f"moment-{i}-{key}": torch.as_tensor(value).cpu()
            for i, own in self.optimiser.state_dict()["state"].items()
            for key, value in own.items()
            if value is not None
        }
        epoch = {"rows": torch.tensor(self.rows), "loss": torch.tensor(self.loss, dtype=torch.float64)}
        averages = {} if self.average is None else self.average.state()
        return self.finished() | epoch | moments | {f"average-{key}": value for key, value in averages.items()}

    def restore(self, state: State) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(state[f"parameter-{i}"])
        self.step = int(state["step"])
        if "rows" not in state:
            return
        self.rows, self.loss = int(state["rows"]), float(state["loss"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("moment-"):
                _, i, name = key.split("-", 2)
                moments.setdefault(int(i), {})[name] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        if self.average is not None:
            prefix = "average-"
            self.average.restore({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
