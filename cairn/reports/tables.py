"""Tables from stored results. JSON in, tables out; torch is not needed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cairn.config import texts
from cairn.errors import ConfigError, ResultError, counted
from cairn.experiment.metrics import mean_and_deviation
from cairn.reports.formats import Column, Estimate, Interval, Table, estimate
from cairn.storage.distribution import extra_remedy
from cairn.storage.files import read_json
from cairn.towers.fingerprint import completed

Result = dict[str, Any]

COMPARED = ("average", "last", "forgetting")
"""What is subtracted, seed by seed."""


def files_below(folders: Iterable[Path], name: str) -> list[Path]:
    """Every file of that name at or below the folders, once, however many of them lead to it."""
    found: dict[Path, Path] = {}
    for folder in folders:
        at = [folder] if folder.is_file() and folder.name == name else sorted(folder.rglob(name))
        for path in at:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def stored_below(folders: Iterable[Path], name: str) -> list[dict[str, Any]]:
    """Every JSON file of that name at or below the folders, possibly none. Raises ResultError if one is not JSON."""
    return [read_json(path, links=True) for path in files_below(folders, name)]


def results_below(folders: Iterable[Path]) -> list[Result]:
    """Every result.json at or below the folders. Raises ResultError if there is none, or one is not JSON."""
    folders = list(folders)
    if found := stored_below(folders, "result.json"):
        return found
    raise none_below(folders)


def none_below(folders: Iterable[Path], kinds: str = "result.json") -> ResultError:
    return ResultError(f"'{' '.join(map(str, folders))}': no {kinds} there; run `cairn run` first")


def used_precision(result: Result) -> str:
    """What a call asks for is not taken where the processor has no arithmetic for it."""
    return result.get("precision") or result["run"]["precision"]


def stream_keys(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Of each run what it has in common with those that a table may put side by side: equal for runs that saw the same
    images, in the same order, through the same towers."""
    towers = completed(result["towers"]["fingerprint"] for result in results)
    return [
        {
            "towers": towers[result["towers"]["fingerprint"]],
            "split or class order": (result["split"], *result.get("class_order", ())),
            "precision": used_precision(result),
        }
        for result in results
    ]


def comparable(results: Sequence[Result]) -> list[str]:
    """What differs between runs that a table puts side by side: weights, split, or protocol. Empty if all is alike."""
    keys = stream_keys(results)
    return [what for what in keys[0] if len({key[what] for key in keys}) > 1] if keys else []


def settings_of(result: Result) -> list[str]:
    """What was changed of the method and how it is taught, as texts: older results hold these themselves."""
    held, share = result["run"]["settings"], result["run"].get("pseudo_labels")
    changed = texts(held) if isinstance(held, dict) else list(held)
    return changed if share is None else [*changed, f"pseudo-labels={share:g}"]


def label(result: Result) -> str:
    """The method and what was changed of its settings."""
    changed = ", ".join(settings_of(result))
    return f"{result['method']} ({changed})" if changed else result["method"]


def seed_list(results: Iterable[Result]) -> str:
    return ", ".join(str(result["seed"]) for result in results)


def summary_table(groups: Mapping[str, Sequence[Result]]) -> Table:
    """One row per label, rising with its average: mean ± sample standard deviation over seeds, in percent. Where classes
    have unequal numbers of training images, the last accuracy also of frequent and of rare ones; of online streams the
    any-time accuracy first; where images may show several classes F1 behind the last mAP."""
    groups_of = [run["last_by_frequency"] for runs in groups.values() for run in runs if run.get("last_by_frequency")]
    frequencies = list(groups_of[0]) if groups_of else []
    unit = "mAP %" if any(run.get("metric") == "mAP" for runs in groups.values() for run in runs) else "%"
    online, segmented, decided = (
        any(run.get(key) is not None for runs in groups.values() for run in runs)
        for key in ("any_time", "mIoU", "macro_f1")
    )
    f1 = ("macro_f1", "micro_f1") if decided else ()
    columns = [
        Column("method"),
        *([Column("any-time %")] if online else []),
        *([Column("mIoU %")] if segmented else []),
        Column(f"average {unit}"),
        Column(f"last {unit}"),
        *(Column(f"{key.removesuffix('_f1')} F1 %") for key in f1),
        *(Column(f"{group} %") for group in frequencies),
        Column("forgetting"),
        Column("keeps, kB", 0),
        Column("seconds", 0),
        Column("seeds"),
    ]
    rows = []
    for name, group in sorted(groups.items(), key=lambda item: mean_and_deviation([r["average"] for r in item[1]])):
        memory = group[0]["memory_bytes"]
        rows.append(
            [
                name if group[0]["exemplar_free"] else f"{name} (keeps exemplars)",
                *([estimate([r.get("any_time") for r in group], 100)] if online else []),
                *([estimate([r.get("mIoU") for r in group], 100)] if segmented else []),
                *(estimate([r[key] for r in group], 100) for key in ("average", "last")),
                *(estimate([r.get(key) for r in group], 100) for key in f1),
                *(estimate([(r.get("last_by_frequency") or {}).get(at) for r in group], 100) for at in frequencies),
                estimate([r["forgetting"] for r in group], 100),
                None if memory is None else Estimate(memory / 1000),
                estimate([r["seconds"] for r in group]),
                seed_list(group),
            ]
        )
    return Table(columns, rows)


def require_once(results: Sequence[Result]) -> None:
    """Raises ResultError for two runs of one method with the same settings, seed and stream: a mean would count them as two."""
    streams = [tuple(key.values()) for key in stream_keys(results)]
    times = Counter((label(run), run["seed"], stream) for run, stream in zip(results, streams, strict=True))
    for (name, seed, _), number in times.items():
        if number > 1:
            raise ResultError(
                f"'{name}' with seed {seed}: {number} runs on the same stream, which would count as {number} seeds; name fewer folders"
            )


def markdown_table(results: Sequence[Result]) -> str:
    """The summary, a row per method and settings.

    Raises ResultError if the runs cannot stand in one table: other weights, split or class order, or one run twice.
    """
    if problems := comparable(results):
        raise ResultError(
            f"these runs differ in {' and '.join(problems)}: they cannot stand in one table; name fewer folders"
        )
    require_once(results)
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(label(result), []).append(result)
    return summary_table(groups).markdown()


def paired(first: Sequence[Result], second: Sequence[Result]) -> list[list[tuple[Result, Result]]]:
    """Runs of both with the same seed on the same stream in the same class order, each once, one list for each order."""
    keys = [tuple(key.values()) for key in stream_keys([*first, *second])]
    others = {(key, run["seed"]): run for key, run in zip(keys[len(first) :], second, strict=True)}
    found: dict[tuple, list[tuple[Result, Result]]] = {}
    for key, run in zip(keys, first, strict=False):
        if (other := others.pop((key, run["seed"]), None)) is not None:
            found.setdefault(key, []).append((run, other))
    return list(found.values())


def paired_seeds(first: Sequence[Result], second: Sequence[Result]) -> list[int]:
    return sorted({run["seed"] for pairs in paired(first, second) for run, _ in pairs})


def differences_known(first: Sequence[Result], second: Sequence[Result]) -> int:
    """How many independent differences there are: class orders, or seeds where there is one order. Seeds that move neither of the two
    give one difference again and again: it counts once."""
    orders = paired(first, second)
    if len(orders) != 1:
        return len(orders)
    figures = {tuple(run[key] for run in pair for key in COMPARED) for pair in orders[0]}
    return len(orders[0]) if len(figures) > 1 else 1


def gains(first: Sequence[Result], second: Sequence[Result]) -> list[Interval | None]:
    """What the first runs gain over the second in each of COMPARED: mean difference in points over pairs of the same seed and
    class order, and the interval that holds the true mean with 95 % confidence (Student's t).

    With several class orders the interval is over the orders, each with its mean over seeds: seeds of one order share its
    luck. With one it is over seeds. None where a run has no such figure. Two orders or seeds at least must be in both.
    Raises ConfigError if scipy is missing.
    """
    try:
        from scipy.stats import t
    except ImportError:
        raise ConfigError(f"comparison: scipy is missing; {extra_remedy('report')}") from None
    orders = paired(first, second)
    found: list[Interval | None] = []
    for key in COMPARED:
        if any(run[key] is None for pairs in orders for pair in pairs for run in pair):
            found.append(None)
            continue
        values = [[100 * (one[key] - other[key]) for one, other in pairs] for pairs in orders]
        means = values[0] if len(values) == 1 else [sum(over_seeds) / len(over_seeds) for over_seeds in values]
        mean, deviation = mean_and_deviation(means)
        half = t.ppf(0.975, len(means) - 1) * deviation / len(means) ** 0.5
        found.append(Interval(mean, mean - half, mean + half))
    return found


def gains_table(pairs: Mapping[str, tuple[Sequence[Result], Sequence[Result]]]) -> Table:
    """One row per pair: the gains of its first runs over its second, the seeds that are in both and, if a pair has several,
    the number of class orders."""
    orders = {name: len(paired(*pair)) for name, pair in pairs.items()}
    several = max(orders.values(), default=1) > 1
    rows = [
        [
            name,
            *gains(*pair),
            ", ".join(map(str, paired_seeds(*pair))),
            *([str(orders[name])] if several else []),
        ]
        for name, pair in pairs.items()
    ]
    more = [Column("class orders")] if several else []
    return Table([Column("difference"), *map(Column, COMPARED), Column("seeds"), *more], rows)


def difference_table(first: Sequence[Result], second: Sequence[Result]) -> str:
    """What the first method gains over the second, as Markdown. Each may have been run in several class orders.

    Raises ResultError if the runs cannot be compared, if either are of several methods or one of them is there twice, or if fewer
    than two seeds or orders are in both; ConfigError if scipy is missing.
    """
    for runs in (first, second):
        if len(names := list(dict.fromkeys(map(label, runs)))) > 1:
            raise ResultError(
                f"results of {' and '.join(map(repr, names[:3]))} in one folder: give the folder of one of them"
            )
        require_once(runs)
    if not paired(first, second) and (problems := comparable([*first, *second])):
        raise ResultError(f"these runs differ in {' and '.join(problems)}: they cannot be compared")
    if differences_known(first, second) < 2:
        seeds = paired_seeds(first, second)
        if len(seeds) > 1:
            raise ResultError(
                f"{counted(len(seeds), 'seed')} move neither method, so there is one difference and no interval; run both in several "
                "class orders, such as --order seed:1"
            )
        raise ResultError(
            f"in both folders: {counted(len(seeds), 'seed')}: an interval needs two or more; run more --seeds"
        )
    return gains_table({f"{label(first[0])} - {label(second[0])}": (first, second)}).markdown()


def replaced_block(text: str, name: str, content: str) -> str:
    """The text with what stands between `<!-- cairn NAME -->` and `<!-- end -->` replaced.

    Raises ResultError if there is no such block.
    """
    pattern = re.compile(rf"(<!-- cairn {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ResultError(f"no block '<!-- cairn {name} -->' to replace; add it, closed by '<!-- end -->'")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)
