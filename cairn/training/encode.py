"""One pass over a collection: what a tower makes of it, in the collection's order. Several processes share the batches out,
whole ones, so that each row is what one process makes of it; then each of them has all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cairn.data.loading import Loader
from cairn.training.context import BESIDE, Checkpoint, Context
from cairn.types import State


@runtime_checkable
class Ordered(Protocol):
    """Batches in the collection's own order."""

    def ordered(self, skip: int = 0, step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Of all but the first `skip` batches every `step`-th."""
        ...


@torch.no_grad()
def encode(
    batches: Ordered,
    rows: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]],
    ctx: Context | None = None,
    name: str = "",
    embed: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Rows of every item, as `rows(pixels, labels)` gives them, one tensor or several, and its label; on the CPU.

    With `embed`, a method's own, it is `rows(embed(pixels), labels)`, and the features of images that were asked for are left
    with the checkpoint (see `Checkpoint.keep_features`). What the checkpoint of `ctx` knows of the pass called `name` is not
    computed again. Without `ctx` this process makes it alone.
    """
    checkpoint = ctx.checkpoint if ctx else Checkpoint()
    held = checkpoint.work(name)
    columns: list[list[Tensor]] = []
    while held is not None and f"column-{len(columns)}" in held:
        columns.append([held[f"column-{len(columns)}"]])
    done = 0 if held is None else int(held["batches"])
    if done < 0:
        raise ValueError(f"{name}: {done} batches")
    sample = checkpoint.sample(len(batches.labels)) if isinstance(batches, Loader) else None
    kept: list[Tensor] = [] if held is None or "features" not in held else [held["features"]]
    if embed is None or name.startswith(BESIDE) or (held is not None and not kept):
        sample = None  # nothing to keep, or not all of it, or other images

    def state() -> State:
        for i, column in enumerate(columns):
            columns[i] = [torch.cat(column)]
        found = {"batches": torch.tensor(done)} | {f"column-{i}": column[0] for i, column in enumerate(columns)}
        return found | ({"features": torch.cat(kept)} if kept else {})

    def values(number: int, pixels: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor | None]:
        features = pixels if embed is None else embed(pixels)
        made = rows(features, labels)
        found = [value.cpu() for value in (made if isinstance(made, tuple) else (made,))] + [labels]
        if sample is None or not isinstance(batches, Loader):
            return found, None
        start = number * batches.batch
        return found, features[sample[start : start + len(labels)].to(features.device)].cpu()

    # Batch b is made by process b modulo their number: in every round, one by each.
    world, turn = checkpoint.world, done % checkpoint.world.world_size
    first = done + (world.rank - turn) % world.world_size
    own = enumerate(batches.ordered(first, world.world_size))
    while True:
        turns, batch = next(own, (0, None))
        made = world.all_gather(None if batch is None else values(first + turns * world.world_size, *batch))
        found = [batch for batch in made[turn:] + made[:turn] if batch is not None]
        for batch, features in found:
            columns = columns or [[] for _ in batch]
            for column, value in zip(columns, batch, strict=True):
                column.append(value)
            if features is not None:
                kept.append(features)
        done += len(found)
        if found:
            checkpoint.step(name, state)
        if len(found) < world.world_size:
            break
    if held is None or done > int(held["batches"]):
        checkpoint.finish(name, state)
    else:
        checkpoint.found_finished(name, state())
    if sample is not None and kept:
        checkpoint.sampled = torch.cat(kept)
    return tuple(torch.cat(column) for column in columns)
