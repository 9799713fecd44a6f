"""The processes that make one run together, as `torchrun` starts them: data parallel, each with its share of the images.

Everything random is derived from seeds, so all of them draw the same orders, and what is done with features that each of
them has is simply done by each. What they say to one another is here: sums, rows, and what the first of them found on disk.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from cairn.errors import CairnError, ConfigError, counted
from cairn.storage.distribution import extra_remedy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Value = TypeVar("Value")

REMEDY = "use torchrun --nproc_per_node N -m cairn run ..."

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""How many processes a launcher of another kind has started, each of which would be a whole run."""

GRACE = 5.0
"""Seconds that a process which lost another one waits for that one to say why it ended."""

_TOLD = "told"


class ProcessLost(CairnError):
    """Another process of the run ended, so this one cannot go on."""


@dataclass
class World:
    """Process `rank` of `world_size`. One alone says nothing to anybody, and needs nothing for it."""

    world_size: int = 1
    rank: int = 0
    local_size: int = 1
    """Those on this machine."""
    device: torch.device | None = None
    """Where sums are made."""
    _store: Any = field(default=None, repr=False)

    @classmethod
    def launched(cls, environment: Mapping[str, str] = os.environ) -> World:
        """What the launcher says. Raises ConfigError where one was asked for several processes that do not know of one another."""
        if "WORLD_SIZE" not in environment:
            # Without a GPU `accelerate launch --num_processes 2` starts one process, and leaves this
            if "MASTER_PORT" in environment and any(key.startswith("ACCELERATE_") for key in environment):
                raise ConfigError(f"accelerate launch: asked for several processes, but started one; {REMEDY}")
            for key in SIZES:
                if environment.get(key, "1") != "1":
                    raise ConfigError(
                        f"{key} {environment[key]}: set by a launcher whose processes would not work together; {REMEDY}"
                    )
            return cls()
        world_size, rank, local_size = (
            _whole(environment, key, default)
            for key, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_WORLD_SIZE", 1))
        )
        missing = [key for key in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if key not in environment]
        if world_size > 1 and missing:
            raise ConfigError(
                f"WORLD_SIZE {world_size} without {' and '.join(missing)}: the launcher set not all; {REMEDY}"
            )
        return cls(world_size, rank, local_size) if world_size > 1 else cls()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @contextmanager
    def connected(self, device: str) -> Iterator[None]:
        """In touch with one another: on GPUs, each with its own, if `device` is auto and there are any, else on the CPU.

        Raises ConfigError for a device that several processes cannot share out, ProcessLost if not all of them come.
        """
        if self.world_size == 1:
            yield
            return
        import torch
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        try:
            from accelerate import PartialState
        except ImportError:
            raise ConfigError(f"several processes: accelerate is missing; {extra_remedy('parallel')}") from None

        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"device '{device}': of several processes each takes the GPU of its own number; leave --device out"
            )
        gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
        if gpus and self.local_size > gpus:
            raise ConfigError(
                f"{counted(self.local_size, 'process')} on a machine with {counted(gpus, 'GPU')}: start {gpus}, or add --device cpu"
            )
        with _in_touch():
            self._store, *_ = next(rendezvous("env://"))
            state = PartialState(cpu=not gpus, store=self._store, rank=self.rank, world_size=self.world_size)
        if state.num_processes != self.world_size:
            raise ConfigError(f"{self.world_size} processes were asked for, {state.num_processes} are there; {REMEDY}")
        self.device = state.device
        yield
        # Left undone after an error: that others lose this process is how they get to know
        with _in_touch():
            dist.barrier()
        state.destroy_process_group()
        self.device = self._store = None

    def should_report(self, error: BaseException) -> bool:
        """Whether it is this process that tells of an error. Of several it is the first that asks, and one that has lost
        another lets that one go first; before they are in touch it is the first of them."""
        if self.world_size == 1 or self._store is None:
            return self.is_main
        try:
            end = time.monotonic() + (GRACE if isinstance(error, ProcessLost) else 0)
            while time.monotonic() < end and not self._store.check([_TOLD]):  # it may have been killed, and say nothing
                time.sleep(0.1)
            return self._store.compare_set(_TOLD, "", str(self.rank)) == str(self.rank).encode()
        except RuntimeError:  # where it was kept is gone, and so is who spoke
            return False

    # what they say to one another; every process must say it at the same place

    def broadcast_from_main(self, act: Callable[[], Value]) -> Value:
        """What `act` gives in the first process, where alone it is called. Raises ProcessLost in the others if it fails."""
        if self.world_size == 1:
            return act()
        import torch.distributed as dist

        said: list[Any] = [False, None]
        try:
            if self.is_main:
                said = [True, act()]
        finally:
            with _in_touch():
                dist.broadcast_object_list(said)
        if not said[0]:
            raise ProcessLost(f"process {self.rank} of {self.world_size}: the first one failed")
        return said[1]

    def all_gather(self, value: Value) -> list[Value]:
        """The values of all processes, in their order. Tensors must be on the CPU."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        with _in_touch():
            dist.all_gather_object(values, value)
        return values

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Their sum over all processes, the same bits in each."""
        return self._all_reduce(values, "SUM")

    def all_reduce_max(self, *values: int) -> list[int]:
        """Of each the largest in any process."""
        if self.world_size == 1:
            return list(values)
        import torch

        return self._all_reduce(torch.tensor(values, dtype=torch.int64), "MAX").tolist()

    def _all_reduce(self, values: Tensor, how: str) -> Tensor:
        if self.world_size == 1:
            return values
        import torch.distributed as dist

        whole = values.to(self.device, copy=True)
        with _in_touch():
            dist.all_reduce(whole, getattr(dist.ReduceOp, how))
        return whole.to(values.device)

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes what it is in the first process."""
        if self.world_size == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            whole = tensor.detach().to(self.device, copy=True).contiguous()
            with _in_touch():
                dist.broadcast(whole, src=0)
            tensor.detach().copy_(whole)


def _whole(environment: Mapping[str, str], key: str, default: int) -> int:
    text = environment.get(key, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{key} '{text}': must be a whole number; {REMEDY}")
    return int(text)


@contextmanager
def _in_touch() -> Iterator[None]:
    """What goes wrong between processes is that one of them is gone."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        first = re.sub(r"^(\[[^\]]*\] *)+", "", str(error) or type(error).__name__).partition("\n")[0]  # no source file
        reason = first.partition(". ")[0][:200]
        raise ProcessLost(f"another process of the run is gone ({reason}); start all of them again to go on") from None


ALONE = World()
"""A run of one process."""
