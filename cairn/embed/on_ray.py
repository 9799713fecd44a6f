"""Work shared out over Ray: a worker that dies loses what it was at, and another takes that up."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from math import ceil
from types import ModuleType
from typing import Any

from cairn.errors import CairnError, ResultError, counted
from cairn.training.log import Log
from cairn.training.ray_cluster import Cluster

INSTEAD = "torchrun"
"""What makes a file with several processes where there is no Ray."""

LOSSES = 3
"""Workers that may die over one piece of work, or while they start."""

SLOW = 60.0
"""Seconds without any worker after which it is looked why."""


def over_ray(
    opened: Callable[[], Callable[[str], Any]],
    names: Sequence[str],
    *,
    workers: int,
    address: str | None = None,
    accelerator: bool = False,
    log: Log,
    poll: Callable[[], Any] = lambda: None,
) -> Iterator[str]:
    """Each of `names` when a worker has made it, in the order in which that happens.

    A worker is a process that calls `opened` once and what that returns for every name. `address` is that of a cluster;
    without one, Ray is started on this machine and stopped at the end. With `accelerator` workers share the accelerators
    evenly. `poll` is called while waiting, and may raise. Raises ConfigError where Ray is missing or not reached, CairnError
    with a worker's own message, ResultError for a name over which workers keep dying.
    """
    with closing(Cluster(address, cpus=workers, instead=INSTEAD)) as cluster:
        yield from _shared_out(cluster.ready(), opened, names, min(workers, len(names)), accelerator, log, poll)


class _Worker:
    """Errors that a user can cause go back as text: not every exception can be sent."""

    def __init__(self, opened: Callable[[], Callable[[str], Any]], folder: str):
        self._opened, self._folder = opened, folder

    def ready(self) -> tuple[int, str | None]:
        """The process's number, and what is wrong."""
        with suppress(OSError):  # paths that were given are relative to where the command was called
            os.chdir(self._folder)
        try:
            self._make = self._opened()
        except CairnError as error:
            return os.getpid(), str(error)
        return os.getpid(), None

    def make(self, name: str) -> tuple[int, str | None]:
        try:
            self._make(name)
        except CairnError as error:
            return os.getpid(), str(error)
        return os.getpid(), None


def _shared_out(
    ray: ModuleType, opened: Callable, names: Sequence[str], workers: int, accelerator: bool, log: Log, poll: Callable
) -> Iterator[str]:
    queue, idle, losses, left = deque(names), [], Counter(), len(names)
    running: dict[Any, tuple[Any, str | None]] = {}
    devices = ray.cluster_resources().get("GPU", 0) if accelerator else 0
    share = 1 / ceil(workers / devices) if devices else 0  # as many as fit: a third of a device each, never 0.75
    kind = ray.remote(num_cpus=1, num_gpus=share, max_restarts=0)(_Worker)

    def start() -> None:
        worker = kind.remote(opened, os.getcwd())
        running[worker.ready.remote()] = worker, None

    idle_since, told = time.monotonic(), False
    for _ in range(workers):
        start()
    try:
        while left:
            poll()
            if any(name is not None for _, name in running.values()):
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > SLOW:
                if not _alive(ray):
                    raise ResultError("Ray has lost all its machines; the same call goes on where it was")
                if not told:
                    log("notice", text="no worker is there yet: the cluster has no room, or is slow to start them")
                    told = True
            done, _ = ray.wait(list(running), timeout=0.2)
            for reference in done:
                worker, name = running.pop(reference)
                try:
                    process, problem = ray.get(reference)
                except ray.exceptions.RayTaskError:
                    raise
                except ray.exceptions.RayError as error:
                    losses[name] += 1
                    what = "while it started" if name is None else f"at {name}"
                    if losses[name] >= LOSSES:
                        raise ResultError(
                            f"{counted(losses[name], 'worker')} died {what} ({_first_line(error)}); if memory was short, give less "
                            f"than --workers {workers}"
                        ) from None
                    log("warning", text=f"a worker died {what}; another takes its place")
                    if name is not None:
                        queue.appendleft(name)
                    if queue and not idle:
                        start()
                    continue
                if problem is not None:
                    raise CairnError(problem)
                idle.append(worker)
                if name is None:
                    log("worker", process=process)
                else:
                    left -= 1
                    yield name
            while queue and idle:
                worker, name = idle.pop(), queue.popleft()
                running[worker.make.remote(name)] = worker, name
    finally:
        for worker in [*idle, *(worker for worker, _ in running.values())]:
            ray.kill(worker)


def _alive(ray: ModuleType) -> bool:
    try:
        return any(node["Alive"] for node in ray.nodes())
    except ray.exceptions.RayError:
        return False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
