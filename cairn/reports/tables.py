"""Tables from stored results. JSON in, Markdown out; torch is not needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cairn.errors import ConfigError, ResultError
from cairn.evaluation.metrics import mean_and_deviation

Result = dict[str, Any]


def stored_below(folders: Iterable[Path], name: str) -> list[dict[str, Any]]:
    """Every JSON file of that name at or below the folders, possibly none. Raises ResultError if one is not JSON."""
    found = []
    for folder in folders:
        for path in sorted(folder.rglob(name)):
            try:
                found.append(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise ResultError(f"'{path}': not JSON: {error}") from None
    return found


def results_below(folders: Iterable[Path]) -> list[Result]:
    """Every result.json at or below the folders. Raises ResultError if there is none, or one is not JSON."""
    folders = list(folders)
    if found := stored_below(folders, "result.json"):
        return found
    raise ResultError(f"'{' '.join(map(str, folders))}': no result.json there; run `cairn run` first")


def comparable(results: Sequence[Result]) -> list[str]:
    """What differs between runs that a table puts side by side: weights, split, or protocol. Empty if all is alike."""
    problems = []
    for what, key in (
        ("towers", lambda r: r["towers"]["fingerprint"]),
        ("split or class order", lambda r: r["split"]),
        ("precision", lambda r: r["run"]["precision"]),
    ):
        if len({key(result) for result in results}) > 1:
            problems.append(what)
    return problems


def _cell(values: Sequence[float | None], factor: float = 100, digits: int = 2) -> str:
    if None in values:
        return "-"
    mean, deviation = mean_and_deviation(values)
    if len(values) == 1:
        return f"{factor * mean:.{digits}f}"
    return f"{factor * mean:.{digits}f} ± {factor * deviation:.{digits}f}"


def _label(result: Result) -> str:
    """The method and what was changed of its settings."""
    changed = ", ".join(result["run"]["settings"])
    return f"{result['method']} ({changed})" if changed else result["method"]


def markdown_table(results: Sequence[Result]) -> str:
    """One row per method and settings, in the order found: mean ± sample standard deviation over seeds, in percent.

    Raises ResultError if the runs cannot stand in one table: other weights, split or class order.
    """
    if problems := comparable(results):
        raise ResultError(
            f"these runs differ in {' and '.join(problems)}: they cannot stand in one table; name fewer folders"
        )
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(_label(result), []).append(result)
    lines = [
        "| method | average % | last % | forgetting | keeps, kB | seconds | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, group in sorted(groups.items(), key=lambda item: mean_and_deviation([r["average"] for r in item[1]])):
        star = "" if group[0]["exemplar_free"] else " (keeps images)"
        cells = [
            f"{label}{star}",
            _cell([r["average"] for r in group]),
            _cell([r["last"] for r in group]),
            _cell([r["forgetting"] for r in group]),
            f"{group[0]['memory_bytes'] / 1000:.0f}",
            _cell([r["seconds"] for r in group], 1, 0),
            ", ".join(str(r["seed"]) for r in group),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference_table(first: Sequence[Result], second: Sequence[Result]) -> str:
    """What the first method gains over the second, paired by seed: mean difference in points, and in brackets the
    interval that holds the true mean with 95 % confidence (Student's t over the paired differences).

    Raises ResultError if the runs cannot be compared, or fewer than two seeds are in both; ConfigError if scipy is missing.
    """
    try:
        from scipy.stats import t
    except ImportError:
        raise ConfigError('comparison: scipy is missing; pip install "cairn[report]"') from None

    if problems := comparable([*first, *second]):
        raise ResultError(f"these runs differ in {' and '.join(problems)}: they cannot be compared")
    of_first, of_second = ({result["seed"]: result for result in runs} for runs in (first, second))
    seeds = sorted(of_first.keys() & of_second.keys())
    if len(seeds) < 2:
        raise ResultError(f"{len(seeds)} seeds are in both folders: an interval needs two or more; run more --seeds")
    cells = []
    for key in ("average", "last", "forgetting"):
        mean, deviation = mean_and_deviation([100 * (of_first[s][key] - of_second[s][key]) for s in seeds])
        half = t.ppf(0.975, len(seeds) - 1) * deviation / len(seeds) ** 0.5
        cells.append(f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]")
    names = f"{_label(first[0])} - {_label(second[0])}"
    return "\n".join(
        [
            "| difference | average | last | forgetting | seeds |",
            "|---|---|---|---|---|",
            f"| {names} | {' | '.join(cells)} | {', '.join(map(str, seeds))} |",
        ]
    )


def replaced_block(text: str, name: str, content: str) -> str:
    """The text with what stands between `<!-- cairn NAME -->` and `<!-- end -->` replaced.

    Raises ResultError if there is no such block.
    """
    pattern = re.compile(rf"(<!-- cairn {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ResultError(f"no block '<!-- cairn {name} -->' to replace; add it, closed by '<!-- end -->'")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)
