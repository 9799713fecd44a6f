"""One pass over a collection: what a tower makes of it, in the collection's order. Several processes share the batches out,
whole ones, so that each row is what one process makes of it; then each of them has all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from cairn.training.checkpoint import Checkpoint, State
from cairn.training.context import Context


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
) -> tuple[Tensor, ...]:
    """Rows of every item, as `rows(pixels, labels)` gives them, one tensor or several, and its label; on the CPU.

    What the checkpoint of `ctx` knows of the pass called `name` is not computed again. Without `ctx` this process makes it alone.
    """
    checkpoint = ctx.checkpoint if ctx else Checkpoint()
    held = checkpoint.work(name)
    columns: list[list[Tensor]] = [] if held is None else [[held[f"column-{i}"]] for i in range(len(held) - 1)]
    done = 0 if held is None else int(held["batches"])
    if done < 0:
        raise ValueError(f"{name}: {done} batches")

    def state() -> State:
        for i, column in enumerate(columns):
            columns[i] = [torch.cat(column)]
        return {"batches": torch.tensor(done)} | {f"column-{i}": column[0] for i, column in enumerate(columns)}

    def values(pixels: Tensor, labels: Tensor) -> list[Tensor]:
        made = rows(pixels, labels)
        return [value.cpu() for value in (made if isinstance(made, tuple) else (made,))] + [labels]

    # Batch b is made by process b modulo their number: in every round, one by each.
    world, turn = checkpoint.world, done % checkpoint.world.world_size
    own = batches.ordered(done + (world.rank - turn) % world.world_size, world.world_size)
    while True:
        batch = next(own, None)
        made = world.all_gather(None if batch is None else values(*batch))
        found = [batch for batch in made[turn:] + made[:turn] if batch is not None]
        for batch in found:
            columns = columns or [[] for _ in batch]
            for column, value in zip(columns, batch, strict=True):
                column.append(value)
        done += len(found)
        if found:
            checkpoint.step(name, state)
        if len(found) < world.world_size:
            break
    if held is None or done > int(held["batches"]):
        checkpoint.finish(name, state)
    else:
        checkpoint.found_finished(name, state())
    return tuple(torch.cat(column) for column in columns)
