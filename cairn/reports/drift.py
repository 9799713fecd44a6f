"""Tables and figures of the drift laboratory, from its JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cairn.errors import ConfigError
from cairn.reports.formats import Column, Table, estimate
from cairn.reports.patches import write_figure
from cairn.reports.tables import stored_below
from cairn.storage.distribution import extra_remedy

COLUMNS = (
    ("mean_error", "mean error", 1, 3),
    ("covariance_error", "covariance error", 1, 3),
    ("bures_error", "Bures error", 1, 3),
    ("average", "average %", 100, 2),
    ("last", "last %", 100, 2),
)


def _estimators(report: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(entry["estimator"] for entry in report["relative"]))


def drift_reports_below(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Every drift.json at or below the folders, possibly none. Raises ResultError if one is not JSON."""
    return stored_below(folders, "drift.json")


def drift_table(reports: Sequence[dict[str, Any]]) -> str:
    """The estimators of every report, as Markdown."""
    return estimator_table(reports).markdown()


def estimator_table(reports: Sequence[dict[str, Any]]) -> Table:
    """A row per stream and estimator; errors relative to `none`, mean ± deviation over seeds."""
    rows = [
        [
            report["data"],
            name,
            *(
                estimate([e[key] for e in report["relative"] if e["estimator"] == name], by)
                for key, _, by, _ in COLUMNS
            ),
        ]
        for report in reports
        for name in _estimators(report)
    ]
    return Table(
        [Column("stream"), Column("estimator"), *(Column(title, digits) for _, title, _, digits in COLUMNS)], rows
    )


def errors_by_task(report: dict[str, Any], key: str) -> dict[str, dict[int, list[float]]]:
    """Per estimator and task the error over old classes, summed, one value per seed. Without `truth`, whose errors are
    rounding."""
    totals: dict[tuple[str, int, int], float] = {}
    for row in report["rows"]:
        place = row["estimator"], row["task"], row["seed"]
        totals[place] = totals.get(place, 0.0) + row[key]
    found: dict[str, dict[int, list[float]]] = {name: {} for name in _estimators(report) if name != "truth"}
    for (name, task, _), total in sorted(totals.items()):
        if name in found:
            found[name].setdefault(task, []).append(total)
    return found


def drift_figure(report: dict[str, Any], path: Path) -> None:
    """Error after each task, summed over old classes and averaged over seeds: means on the left, covariances right."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(f"drift figure: matplotlib is missing; {extra_remedy('report')}") from None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, key, title in zip(
        figure.subplots(1, 2),
        ("mean_error", "bures_error"),
        ("error of the means", "Bures error of the covariances"),
        strict=True,
    ):
        for name, totals in errors_by_task(report, key).items():
            style = {"color": "black", "linestyle": "--"} if name == "none" else {}
            means = [sum(values) / len(report["seeds"]) for values in totals.values()]
            axis.plot(list(totals), means, marker="o", markersize=3, label=name, **style)
        axis.set_yscale("log")
        axis.set_xlabel("after task")
        axis.set_title(f"{title}, {report['data']}", fontsize=10)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    write_figure(figure, path, dpi=150)
