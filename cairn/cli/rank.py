"""`cairn rank`: methods over several streams. Parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cairn.errors import ConfigError, counted
from cairn.reports.console import Console


def register(app: typer.Typer) -> None:
    app.command()(rank)


def rank(
    runs: Annotated[list[Path], typer.Argument(help="folders that hold results, at any depth")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the page, one HTML file")] = Path("ranking.html"),
    metric: Annotated[str, typer.Option(help="last or average accuracy")] = "last",
    bounds: Annotated[str, typer.Option(help="methods that take no place, comma between")] = "joint",
    variants: Annotated[bool, typer.Option("--variants", help="also runs with changed settings")] = False,
    figures: Annotated[
        Path | None, typer.Option(help="a folder for figures (PNG, SVG) and tables (Markdown, LaTeX, CSV)")
    ] = None,
) -> None:
    """Rank methods over several streams. Mean ranks with Friedman's and Nemenyi's test, the best of each stream, accuracy by images
    per class, and every result on a page that sorts and filters."""
    from cairn.reports.formats import FORMS
    from cairn.reports.ranking import (
        best_table,
        critical_difference_chart,
        few_images_charts,
        ranking_page,
        ranking_table,
        standings,
    )
    from cairn.storage.files import make_folder, write_chunks

    if metric not in ("last", "average"):
        raise ConfigError(f"--metric {metric}: must be last or average")
    found = standings(runs, metric, [name.strip() for name in bounds.split(",")], variants)
    page = ranking_page(found)
    make_folder(out.parent)
    write_chunks(out, [page.encode()])
    console, written = Console(), 0
    if figures is not None:
        make_folder(figures)
        differences = critical_difference_chart(found)
        for chart in (*([differences] if differences else []), *few_images_charts(found)):
            written += len(chart.write(figures))
        for name, table in (("best", best_table(found)), ("ranking", ranking_table(found))):
            for suffix, form in FORMS.items():
                write_chunks(figures / f"{name}.{suffix}", [f"{form(table)}\n".encode()])
                written += 1
    console.note(best_table(found).markdown())
    console.note(f"-> {out}" + (f", {counted(written, 'file')} in {figures}" if figures is not None else ""))
