"""What a terminal shows: live progress where there is one, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.console
from rich.cells import cell_len
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cairn.errors import counted, printable

SPARKS = "▁▂▃▄▅▆▇█"

MOST_BLOCKS = 60
"""In a row that tells of chunks: of more, every so many are shown."""

GAP = 2
"""Spaces between the columns of a table."""


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def sparkline(values: Sequence[float]) -> str:
    """Accuracies in [0, 1] as a row of blocks."""
    return "".join(SPARKS[min(7, max(0, int(8 * v)))] for v in values)


def word_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int, title: str | None = None) -> Table:
    """A table that is as wide as it may be, at most, and breaks lines between words as long as there is room for these."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    rows = [[printable(cell) for cell in row] for row in rows]
    for name, own in zip(header, column_widths([header, *rows], width), strict=True):
        table.add_column(name, overflow="fold", width=own)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def column_widths(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Widths of columns that fit into a line of that width: the widest column gives way first, down to its longest word.
    Where there is no room for whole words, the longest words are broken."""
    columns = list(zip(*rows, strict=True))
    longest_words = [max((cell_len(word) for cell in column for word in cell.split()), default=1) for column in columns]
    widths = [max(1, *map(cell_len, column)) for column in columns]
    for least in (longest_words, [1] * len(columns)):
        while sum(widths) + GAP * (len(columns) - 1) > width:
            wide = [i for i, own in enumerate(widths) if own > least[i]]
            if not wide:
                break
            widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


class Console:
    """Prints events and results. On a terminal the running step is one live line; elsewhere a line at most every 10 s."""

    def __init__(self, file: Any = None):
        self._rich = rich.console.Console(file=file, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._said = 0.0

    def note(self, text: str) -> None:
        self._rich.print(Text(printable(text)))

    @contextmanager
    def live(self) -> Iterator[None]:
        if not self._rich.is_terminal:
            yield
            return
        with Live(console=self._rich, refresh_per_second=8, transient=True) as self._live:
            yield
        self._live = None

    def progress(self, state: dict[str, Any]) -> None:
        self.line(
            f"task {state.get('task', 0)}  stage {state.get('stage', '-')}  epoch {state['epoch'] + 1}/{state['epochs']}  "
            f"step {state['step']}/{state['steps']}  loss {state['loss']:.3f}  {state['rate']:.0f} rows/s  "
            f"{state['remaining']:.0f} s left"
        )

    def line(self, text: str) -> None:
        """What is going on: in place of the line before, or now and then."""
        if self._live is not None:
            self._live.update(Text(printable(text)))
        elif time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            self.note(f"  {text}")

    def event(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "start":
                stream = f"{counted(event['classes'], 'class')} in {counted(event['tasks'], 'task')}"
                self.note(f"{event['method']} on {event['data']}: {stream}, seed {event['seed']}")
            case "notice" | "warning" as kind:
                self.note(f"{'note' if kind == 'notice' else 'WARNING'}: {event['text']}")
            case "laboratory":
                self.note(f"  task {event['task'] + 1} of {event['tasks']} measured")
            case "chunk":
                self.line(f"task {event['task']}  chunk {event['chunk']}  seen {percent(event['seen'])} %")
            case "task":
                accuracies = " ".join(f"{100 * a:5.1f}" for a in event["accuracy"])
                self.note(
                    f"  task {event['task']:>2}  {event['seconds']:5.1f} s  seen {percent(event['seen']):>6} %  | by task {accuracies}"
                )

    def result(self, result: Any, path: Path) -> None:
        unit = "mAP: " if result.metric == "mAP" else ""
        forgetting = "none yet" if result.forgetting is None else f"{percent(result.forgetting)} %"
        self.note(
            f"{result.method}: {unit}average {percent(result.average)} %, last {percent(result.last)} %, "
            f"forgetting {forgetting}, {result.seconds:.0f} s -> {path}\n"
        )
        if result.mIoU is not None:
            self.note(f"mIoU {percent(result.mIoU)} %, background {percent((result.iou_by_class or [0])[0] or 0)} %\n")
        if result.macro_f1 is not None:
            self.note(
                f"F1 after the last task: {percent(result.macro_f1)} % over classes (macro), {percent(result.micro_f1)} % over all "
                "decisions (micro)\n"
            )
        if result.any_time is not None:
            chunks = len(result.chunk_accuracy)
            curve = f"after each of {counted(chunks, 'chunk')}: {sparkline(result.chunk_accuracy[:: -(-chunks // MOST_BLOCKS)])}"
            self.note(f"any-time accuracy {percent(result.any_time)} %; {curve}\n")
        if result.last_by_frequency:
            groups = ", ".join(f"{group} {percent(share)} %" for group, share in result.last_by_frequency.items())
            terciles = " (thirds of the classes)" if result.frequency_terciles else ""
            self.note(f"last, by how many training images a class has: {groups}{terciles}\n")

    def summary(self, results: Sequence[Any], path: Path) -> None:
        from cairn.experiment.metrics import mean_and_deviation

        parts = []
        for key in ("average", "last"):
            mean, deviation = mean_and_deviation([getattr(result, key) for result in results])
            parts.append(f"{key} {100 * mean:.2f} ± {100 * deviation:.2f} %")
        self.note(f"{results[0].method} over {counted(len(results), 'seed')}: {', '.join(parts)} -> {path}")

    def table(self, title: str | None, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._rich.print(word_table(header, rows, self._rich.width, title), soft_wrap=False)
        self._rich.print()

    def curves(self, results: Sequence[Any]) -> None:
        rows = [
            (
                r.method,
                sparkline(r.seen_accuracy),
                percent(r.average),
                percent(r.last),
                percent(r.forgetting),
                f"{r.seconds:.0f}",
            )
            for r in results
        ]
        self.table(
            f"{'mAP' if results[0].metric == 'mAP' else 'Accuracy'} over all classes seen, after each task",
            ("method", "curve", "average %", "last %", "forgetting", "seconds"),
            rows,
        )
