"""Attempts on Ray: on the cores of this machine, or on the nodes of a cluster that share its files.

Nothing heavy is imported here, since workers import this before they set their threads.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from cairn.errors import ConfigError, one_line
from cairn.storage.files import open_append
from cairn.sweep.order import Ended, Order
from cairn.training.ray_cluster import Cluster

THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
LOOK = 5.0
"""Seconds between looks at which nodes there are."""


class OnRay:
    """Every attempt is a task of Ray, which Ray itself never repeats: who counts attempts, repeats them."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        cpus: int,
        gpus: float | None,
        memory: int | None,
        parallel: int | None = None,
        log: Path,
    ):
        """With gpus=None a run gets a GPU where there are any. What Ray has to say of its nodes goes to the file `log`.

        Raises ConfigError if there is no such cluster, or none of its nodes has room for a run.
        """
        self._ray = ray = cluster.ready()
        if gpus is None:
            gpus = 1 if any(node["Resources"].get("GPU", 0) >= 1 for node in self._nodes()) else 0
        self._needs = {"CPU": cpus, "GPU": gpus, "memory": memory or 0}
        if not self._room():
            raise ConfigError(f"{self._asked()}: no node has that much ({self._largest()}); ask for less")
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 0} | ({"memory": memory} if memory else {})
        self._task = ray.remote(**options)(in_worker)
        self._parallel = parallel
        self._running: dict[Any, Order] = {}
        self._looked, self._slots = -LOOK, 0
        self._log = log
        self._said = open_append(log, append=True)
        # Ray prints what befalls nodes and workers, a page at a time, and cannot be told where to
        self._redirected = redirect_stdout(self._said)
        self._redirected.__enter__()

    def slots(self) -> int:
        """Grows and shrinks with the cluster. One at least: a node may come back."""
        if time.monotonic() - self._looked >= LOOK:
            self._looked, self._slots = time.monotonic(), max(1, self._room())
        return min(self._slots, self._parallel or self._slots)

    def submit(self, order: Order) -> None:
        self._running[self._task.remote(order, self._needs["GPU"] > 0)] = order

    def next(self, seconds: float) -> Ended | None:
        if not self._running:
            time.sleep(seconds)
            return None
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        if not ready:
            return None
        order, errors = self._running.pop(ready[0]), self._ray.exceptions
        try:
            return self._ray.get(ready[0])
        except errors.TaskCancelledError:
            return Ended(order.name, "stopped")
        except (errors.RayTaskError, errors.RuntimeEnvSetupError) as error:
            cause = getattr(error, "cause", None) or error
            return Ended(order.name, "failed", one_line(f"{type(cause).__name__}: {cause}")[:500])
        except errors.RayError as error:  # its process or its node is gone
            self._looked = -LOOK
            return Ended(order.name, "lost", f"{type(error).__name__}")

    def stop(self) -> None:
        for task in self._running:
            self._ray.cancel(task)

    def close(self) -> None:
        """Attempts that are under way end with the cluster."""
        self._redirected.__exit__(None, None, None)
        self._said.close()
        with suppress(OSError):
            if not self._log.stat().st_size:
                self._log.unlink()

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _room(self) -> int:
        """Runs that fit at once."""
        needs = {key: amount for key, amount in self._needs.items() if amount}
        return sum(
            min(int(node["Resources"].get(key, 0) / amount + 1e-9) for key, amount in needs.items())
            for node in self._nodes()
        )

    def _asked(self) -> str:
        words = {"CPU": "cpus", "GPU": "gpus", "memory": "memory"}
        return ", ".join(f"{words[key]} {amount:g}" for key, amount in self._needs.items() if amount)

    def _largest(self) -> str:
        found = [node["Resources"] for node in self._nodes()]
        return ", ".join(f"{key} {max((node.get(key, 0) for node in found), default=0):g}" for key in self._needs)


def in_worker(order: Order, accelerator: bool) -> Ended:
    """An attempt in a process of Ray, with as many threads as it has cores. To be cancelled or terminated is to be asked to
    stop."""
    os.environ.update(dict.fromkeys(THREADS, str(order.cpus)))
    if not accelerator:  # Ray hides none from who asked for none
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not Path(order.directory).is_dir():
        return Ended(
            order.name, "failed", f"'{order.directory}': not there on {os.uname().nodename}; nodes must share files"
        )
    os.chdir(order.directory)
    import torch

    from cairn.sweep.attempt import attempted
    from cairn.training.checkpoint import Checkpoint, stopped_by_signals

    torch.set_num_threads(order.cpus)
    forget_peak()
    checkpoint = Checkpoint(order.call["checkpoint_seconds"])
    with stopped_by_signals(checkpoint):
        return attempted(order, checkpoint)


def forget_peak() -> None:
    """A worker carries out many runs, and each tells the largest memory of its process. Linux alone can forget it."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
