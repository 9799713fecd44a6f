"""Time, memory and the machine: what every benchmark measures with, and the rows of their one table."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from cairn.reports.tables import replaced_block
from cairn.storage.files import write_json
from cairn.storage.versions import versions

Key = TypeVar("Key", bound=Hashable)


@dataclass
class Measured:
    """One way of doing a thing: seconds of every call, growth of memory over a call, and what the last call gave."""

    all_seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    """Peak of the resident set over the call, above what it was before. None where the system does not tell (not Linux)."""
    value: Any = None

    @property
    def seconds(self) -> float:
        return median(self.all_seconds)

    def call(self, way: Callable[[], Any], *, timed: bool, memory: bool) -> None:
        before = _begin_peak() if memory else None
        mark = time.perf_counter()
        value = way()
        seconds = time.perf_counter() - mark
        if before is not None:
            self.extra_bytes = max(self.extra_bytes or 0, resident("VmHWM") - before)
        if timed:
            self.all_seconds.append(seconds)
        self.value = value


def in_turns(ways: Mapping[Key, Callable[[], Any]], repeats: int, *, warm: bool = True) -> dict[Key, Measured]:
    """Call each way in turn, `repeats` times around, so that other work on the machine slows all of them alike.

    A first round, not timed, warms up and measures memory. With warm=False there is none, and memory is measured in the
    timed calls: for what is long, or must be seen cold.
    """
    found = {key: Measured() for key in ways}
    if warm:
        for key, way in ways.items():
            found[key].call(way, timed=False, memory=True)
    for _ in range(repeats):
        for key, way in ways.items():
            found[key].call(way, timed=True, memory=not warm)
    return found


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (peak since it was last cleared), bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(key)


def _begin_peak() -> int | None:
    """Forget the peak; bytes resident now. What earlier calls freed goes back first: else it hides what the next one takes."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    except OSError:
        return None


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Launches(TorchDispatchMode):
    """Counts operators that compute: those that only look at memory another way, or take some, are none."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looks = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not looks and func.overloadpacket.__name__ not in ("detach", "empty", "empty_like", "empty_strided"):
            self.number += 1
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Kernels that a call launches on an accelerator; on the processor, operators that would be one there."""
    if torch.device(device).type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize(device)
        return sum(event.device_type == DeviceType.CUDA for event in seen.events())
    with _Launches() as counted:
        call()
    return counted.number


# The table


@dataclass(frozen=True)
class Row:
    """One comparison. Both amounts are seconds or bytes; the ratio says how many times less ours is."""

    item: str
    plain: str
    plain_amount: float
    ours: str
    amount: float
    unit: Literal["s", "B"] = "s"
    target: float | None = None
    """Least ratio asked for."""
    extra_bytes: int | None = None
    plain_extra_bytes: int | None = None
    equal: str = ""
    """In which sense, and how nearly, both give the same."""

    @property
    def ratio(self) -> float:
        return self.plain_amount / self.amount

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio, "met": None if self.target is None else self.ratio >= self.target}


def row_table(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table of stored rows."""
    lines = [
        "| item | plain form | ours | ratio | target | extra memory (plain form) | equal to the plain form |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        show = seconds_cell if row["unit"] == "s" else bytes_cell
        met = "" if row["target"] is None else f"≥ {row['target']:.3g}: {'met' if row['met'] else 'missed'}"
        memory = [bytes_cell(row[key]) for key in ("extra_bytes", "plain_extra_bytes") if row[key] is not None]
        cells = [
            row["item"],
            f"{row['plain']}: {show(row['plain_amount'])}",
            f"{row['ours']}: {show(row['amount'])}",
            f"{row['ratio']:.3g}" if row["ratio"] < 100 else f"{row['ratio']:.0f}",
            met,
            memory[0] + "".join(f" ({text})" for text in memory[1:]) if memory else "",
            row["equal"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seconds_cell(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} µs"


def bytes_cell(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 100 * size else f"{number / size:.0f} {unit}"
    return f"{number:.0f} B"


# What is stored


def surroundings() -> dict[str, Any]:
    """Machine, versions and date: without them a figure of seconds means nothing."""
    return {"machine": machine(), "versions": versions() | {"POT": metadata.version("POT")}, "date": str(date.today())}


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": _first("/proc/cpuinfo", "model name"),
        "memory_bytes": int(_first("/proc/meminfo", "MemTotal", "0 kB").split()[0]) * 1024,
    }


def machine_line(stored: dict[str, Any]) -> str:
    """The machine of a report in one sentence."""
    m = stored["machine"]
    return (
        f"{m['processor']}, {m['cores']} cores, {m['threads']} threads, {m['memory_bytes'] / 1e9:.0f} GB of memory; torch "
        f"{stored['versions']['torch']}, POT {stored['versions']['POT']}; {stored['date']}."
    )


def _first(file: str, key: str, absent: str = "unknown") -> str:
    with suppress(OSError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return absent


def stored(path: Path, report: dict[str, Any]) -> None:
    """Write the report with its surroundings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, surroundings() | report)


def written(page: Path, block: str, content: str) -> None:
    """Put the content between `<!-- cairn BLOCK -->` and `<!-- end -->` of the page."""
    page.write_text(replaced_block(page.read_text(encoding="utf-8"), block, content), encoding="utf-8")


def handed_out(report: dict[str, Any], text: str, block: str, out: Path | None, into: Path | None) -> None:
    """Print a benchmark's table; store its report and put the table into a page, where those are asked for."""
    print(text)
    if out:
        stored(out, report)
    if into:
        written(into, block, text)
