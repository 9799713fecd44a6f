"""One run of a sweep, in this process or in a worker of Ray.

Workers import this module before they set their number of threads: it imports nothing heavy at its top.
"""

from __future__ import annotations

import os
import socket
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cairn.errors import CairnError, Interrupted, one_line

if TYPE_CHECKING:
    from cairn.experiment.folder import RunFolder
    from cairn.experiment.schema import RunResult
    from cairn.training.checkpoint import Checkpoint

PATIENCE = 60.0
"""Seconds to wait for the lock of a run's folder: a worker that was given up may take a moment to die."""

FIGURES = ("average", "last", "forgetting", "bwt", "seconds", "memory_bytes", "resumed")


class Outcome(NamedTuple):
    """How an attempt at a run ended. `stopped`: it was asked to, and kept its state; `lost`: its worker is gone."""

    state: Literal["finished", "failed", "stopped", "lost"]
    reason: str | None = None
    figures: dict[str, Any] | None = None


def figures(result: RunResult) -> dict[str, Any]:
    return {key: getattr(result, key) for key in FIGURES}


def attempt(path: Path, call: dict[str, Any], checkpoint: Checkpoint) -> Outcome:
    """Begin the run of a folder, or go on with it. `call` is what stands in `call.json`. Errors are reported, not raised."""
    from cairn.experiment.folder import Call, RunFolder, locked

    try:
        # Held before one looks whether the run is finished: a second attempt finds what the first has done
        with locked(path, PATIENCE) as lock:
            folder = RunFolder(path, Call.model_validate(call), lock)
            return Outcome("finished", figures=figures(folder.finished() or _run(folder, checkpoint)))
    except Interrupted:
        return Outcome("stopped")
    except Exception as error:  # also a fault of the method's code: it ends this run and no other
        return Outcome("failed", reason_of(error))


def _run(folder: RunFolder, checkpoint: Checkpoint) -> RunResult:
    from cairn.data.feature_store import FeatureStore
    from cairn.experiment.run import run_stream
    from cairn.training.log import Log

    number = attempts_in(folder.path) + 1
    folder.open()
    try:
        folder.keep({"event": "attempt", "number": number, "host": socket.gethostname(), "process": os.getpid()})
        store = FeatureStore.configured() if folder.call.cache else None
        log = Log(keep=folder.keep)
        result = run_stream(folder.call.run, log, store=store, checkpoint=checkpoint, archive=folder.archive)
        folder.write(result)
    except Interrupted:
        raise
    except Exception as error:
        folder.keep({"event": "error", "text": reason_of(error), "traceback": traceback.format_exc()})
        raise
    finally:
        folder.close()
    return result


def attempts_in(folder: Path) -> int:
    """How often the run of a folder was begun."""
    from cairn.experiment.folder import events_in

    return max((event["number"] for event in events_in(folder) if event["event"] == "attempt"), default=0)


def reason_of(error: BaseException) -> str:
    reason = one_line(str(error))[:500]
    if isinstance(error, CairnError):
        return reason
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def attempt_in_ray(path: Path, call: dict[str, Any], directory: str, cpus: int, accelerator: bool) -> Outcome:
    """The same in a process of Ray, with as many threads as it has cores; relative paths are meant from `directory`.
    Cancelled or terminated, it keeps its state and stops."""
    os.environ |= {"OMP_NUM_THREADS": str(cpus), "MKL_NUM_THREADS": str(cpus)}
    if not accelerator:  # Ray does not hide accelerators from a task that asked for none
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not Path(directory).is_dir():
        return Outcome("failed", f"'{directory}': not there on {socket.gethostname()}; nodes must share files")
    os.chdir(directory)
    import torch

    from cairn.training.checkpoint import Checkpoint, stopped_by_signals

    torch.set_num_threads(cpus)
    # A worker carries out many runs: each reports its own peak of memory, where Linux can forget it
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    checkpoint = Checkpoint(call["checkpoint_seconds"])
    with stopped_by_signals(checkpoint):
        return attempt(path, call, checkpoint)
