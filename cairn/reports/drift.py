"""Tables and figures of the drift laboratory, from its JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cairn.errors import ConfigError
from cairn.evaluation.metrics import mean_and_deviation
from cairn.reports.tables import stored_below

COLUMNS = (
    ("mean_error", "mean error", 1, 3), ("covariance_error", "covariance error", 1, 3), ("bures_error", "Bures error", 1, 3),
    ("average", "average %", 100, 2), ("last", "last %", 100, 2),
)  # fmt: skip


def _estimators(report: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(entry["estimator"] for entry in report["relative"]))


def drift_reports_below(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Every drift.json at or below the folders, possibly none. Raises ResultError if one is not JSON."""
    return stored_below(folders, "drift.json")


def drift_table(reports: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a row per stream and estimator; errors relative to `none`, mean ± deviation over seeds."""
    lines = [
        f"| stream | estimator | {' | '.join(title for _, title, _, _ in COLUMNS)} |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for report in reports:
        for name in _estimators(report):
            cells = []
            for key, _, factor, digits in COLUMNS:
                values = [e[key] for e in report["relative"] if e["estimator"] == name]
                mean, deviation = (factor * figure for figure in mean_and_deviation(values))
                cells.append(f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else ""))
            lines.append(f"| {report['data']} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def drift_figure(report: dict[str, Any], path: Path) -> None:
    """Error after each task, summed over old classes and averaged over seeds: means on the left, covariances right."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('drift figure: matplotlib is missing; pip install "cairn[report]"') from None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, key, title in zip(
        figure.subplots(1, 2),
        ("mean_error", "bures_error"),
        ("error of the means", "Bures error of the covariances"),
        strict=True,
    ):
        for name in _estimators(report):
            if name == "truth":
                continue  # its errors are rounding
            rows = [row for row in report["rows"] if row["estimator"] == name]
            tasks = sorted({row["task"] for row in rows})
            totals = [sum(row[key] for row in rows if row["task"] == task) / len(report["seeds"]) for task in tasks]
            style = {"color": "black", "linestyle": "--"} if name == "none" else {}
            axis.plot(tasks, totals, marker="o", markersize=3, label=name, **style)
        axis.set_yscale("log")
        axis.set_xlabel("after task")
        axis.set_title(f"{title}, {report['data']}", fontsize=10)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
