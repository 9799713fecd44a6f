"""What a reader must know before comparing the runs of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cairn.reports.runs import Line, Stream, differing
from cairn.reports.tables import comparable

NAMED = 12
"""Names in a list at most."""


@dataclass(frozen=True)
class Caution:
    title: str
    text: str


def warnings(streams: Sequence[Stream]) -> list[Caution]:
    """What keeps numbers from being compared: other images, weights, precision or versions, kept images, broken times."""
    runs = [run for stream in streams for run in stream.runs]
    lines = [line for stream in streams for line in stream.lines]
    found = []
    if len(streams) > 1:
        what = comparable(runs) or ["task sizes"]
        found.append(
            Caution(
                f"These runs differ in {' and '.join(what)}.",
                f"They are {len(streams)} streams, drawn apart below. Numbers of one do not compare with those of another.",
            )
        )
    if keeping := [line.label for line in lines if not line.first["exemplar_free"]]:
        found.append(
            Caution(
                f"Images of old classes are kept by {_listed(keeping)}.",
                "Read such a method as a bound: it does not compare with those that keep none.",
            )
        )
    if resumed := [
        f"{line.label}, seed {run['seed']} ({run['resumed']} times)"
        for line in lines
        for run in line.runs
        if run["resumed"]
    ]:
        found.append(
            Caution(
                f"Cut off and gone on with: {_listed(resumed)}.", "Their times and passes include what was done twice."
            )
        )
    versions = [run["versions"] for run in runs]
    if keys := differing(versions):
        values = [f"{key} {' / '.join(sorted({held[key] for held in versions if key in held}))}" for key in keys]
        found.append(
            Caution(f"These runs differ in versions: {_listed(values)}.", "Figures may differ for that reason alone.")
        )
    return found


def remarks(streams: Sequence[Stream]) -> list[Caution]:
    """What is good to know besides: few seeds, other seeds, the same run twice, other devices, worse than doing nothing."""
    found = []
    for stream in streams:
        lines, where = stream.lines, f" on stream {stream.number}" if len(streams) > 1 else ""
        if twice := [f"{line.label}, seed {seed}" for line in lines for seed, n in _seeds(line).items() if n > 1]:
            found.append(
                Caution(f"The same run more than once{where}: {_listed(twice)}.", "It counts that often in means.")
            )
        by_seeds: dict[str, list[str]] = {}
        for line in lines:
            by_seeds.setdefault(", ".join(map(str, sorted(_seeds(line)))), []).append(line.label)
        if len(by_seeds) > 1:
            told = "; ".join(f"{_listed(names)}: {seeds}" for seeds, names in by_seeds.items())
            found.append(Caution(f"Not all means are over the same seeds{where}.", f"{told}."))
        if single := [line.label for line in lines if len(line.runs) == 1]:
            found.append(Caution(f"One seed only{where}: {_listed(single)}.", "There is no deviation to tell."))
        if below := [f"{line.label} ({tasks})" for line in lines if (tasks := _below_zero_shot(line))]:
            found.append(
                Caution(
                    f"Worse than the towers as they came{where}: {_listed(below)}.",
                    "In brackets the tasks after which it was so.",
                )
            )
    lines = [line for stream in streams for line in stream.lines]
    if len(devices := {run["device"] for line in lines for run in line.runs}) > 1:
        found.append(Caution(f"Not all ran on the same device: {_listed(sorted(devices))}.", "Times do not compare."))
    if len(prompts := {str(run["run"].get("template")) for line in lines for run in line.runs}) > 1:
        found.append(
            Caution(f"Not all had the same prompt ({_listed(sorted(prompts))}).", "None means the data set's own.")
        )
    if part := sorted({line.label for line in lines if line.first["run"].get("validation")}):
        found.append(
            Caution(f"Tested on a share of the training images: {_listed(part)}.", "The test split was set aside.")
        )
    return found


def _seeds(line: Line) -> Counter[int]:
    return Counter(run["seed"] for run in line.runs)


def _below_zero_shot(line: Line) -> str:
    """The numbers of the tasks after which the mean is below that of the untouched towers, as ranges."""
    seen, zero = line.over_tasks("seen_accuracy"), line.over_tasks("zero_shot_accuracy")
    numbers = [
        i
        for i, (own, bare) in enumerate(zip(seen, zero, strict=False), 1)
        if own and bare and own.mean < bare.mean - 1e-6
    ]
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ranges)


def _listed(names: Iterable[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
