"""`cairn reproduce`: published figures, made again. Parse, call, print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cairn.cli.run import AnyDevice, Precision, run_all, seed_numbers
from cairn.errors import ConfigError, counted
from cairn.reports.console import Console

if TYPE_CHECKING:
    from cairn.reports.reproduction import Row
    from cairn.reproduce.plan import Reproduction

PAGE, RECORD, TABLE = "reproduction.html", "reproduction.json", "reproduction.md"


def register(app: typer.Typer) -> None:
    app.command()(reproduce)


def reproduce(
    data: Annotated[str, typer.Argument(help="a data set of the figures: cifar100, or cifar100=PATH for a copy")],
    towers: Annotated[str, typer.Option(help="the weights that the figures were made with, as in `cairn run`")],
    setting: Annotated[
        str | None, typer.Option(help="A or B, a setting of the figures  [default: the towers']")
    ] = None,
    base: Annotated[
        int | None, typer.Option(help="classes of the first task  [default: the first with figures]")
    ] = None,
    step: Annotated[int | None, typer.Option(help="classes per task")] = None,
    methods: Annotated[str | None, typer.Option(help="some methods only, by name, comma between")] = None,
    seeds: Annotated[str, typer.Option(help="seeds, 1,2,3")] = "1,2,3",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="METHOD.setting=value, as in `cairn run`; may be repeated")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="a file of figures and settings in place of the field's  (docs/reproduce.md)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="output folder  [default: runs/reproduce-DATA-SETTING]")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="say what would be run, how long it takes, and stop")] = False,
    price: Annotated[float | None, typer.Option(help="of an hour of this machine, for the plan")] = None,
    shard: Annotated[str | None, typer.Option(help="K/N: every N-th run from the K-th, for N machines")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="go on though the first figures are not reached")] = False,
    device: AnyDevice = "auto",
    precision: Precision = "float32",
) -> None:
    """Make published figures again, on one page: ours and theirs. Methods that need one pass come first; if they are off, it
    stops and says what is likely wrong. The same call again goes on."""
    from cairn.config import merged, parsed
    from cairn.data.opening import open_dataset
    from cairn.experiment.folder import Call
    from cairn.experiment.inputs import prompted, towers_for
    from cairn.reproduce.checks import copy_differences
    from cairn.reproduce.figures import published
    from cairn.reproduce.plan import reproduction

    console = Console()
    part = _shard(shard)
    asked = reproduction(
        data,
        towers,
        published(figures),
        setting=setting,
        base=base,
        step=step,
        seeds=seed_numbers(seeds),
        methods=None if methods is None else [name.strip() for name in methods.split(",")],
        settings=dict(merged({}, parsed(set_ or ()))),
        device=device,
        precision=precision,
        where="the figures" if figures is None else f"'{figures}'",
    )
    folder = out or Path("runs") / f"reproduce-{asked.key}-{asked.setting_name}"
    first = asked.runs()[0].config
    whole = open_dataset(first.data)
    dataset = prompted(whole, first.template)
    used = towers_for(first, dataset)
    findings = copy_differences(asked.published.copy_of(asked.key), dataset)
    for finding in findings:
        console.note(f"! {finding}")
    _tell_plan(console, asked, dataset, used, price, plan)
    if plan:
        return
    facts = _facts(asked, used, figures)
    runs = asked.runs()
    for number, run in enumerate(runs):
        if number % part[1] == part[0]:
            run_all(Call(run=run.config, cache=used.has_images, checkpoint_seconds=60.0), folder / run.place)
        last_of_method = number + 1 == len(runs) or runs[number + 1].method != run.method
        if last_of_method:
            found, far = _off(asked, folder, run.method, dataset, used, whole.templates)
            findings += found
            _write(asked, folder, facts, findings)
            for finding in found:
                console.note(f"! {finding}")
            if far and not anyway:
                raise ConfigError(
                    f"{run.method} is not as published; mend what {folder / PAGE} names, or go on with --anyway"
                )
    console.note(_write(asked, folder, facts, findings))
    console.note(f"-> {folder / PAGE}")


def _shard(text: str | None) -> tuple[int, int]:
    """Its number, from 0, and how many there are."""
    if text is None:
        return 0, 1
    number, slash, total = text.partition("/")
    if not (slash and number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise ConfigError(f"--shard {text}: must be K/N, such as 1/4")
    return int(number) - 1, int(total)


def _tell_plan(
    console: Console, asked: Reproduction, dataset: Any, towers: Any, price: float | None, whole: bool
) -> None:
    from cairn.reproduce.plan import costs

    title = (
        f"{asked.data}, {counted(len(dataset.classes), 'class')}, first task {asked.base or asked.step}, step {asked.step}, "
        f"setting {asked.setting_name}, seeds {', '.join(map(str, asked.seeds))}"
    )
    found = costs(asked, dataset, towers)
    seconds = (
        None if any(cost.seconds is None for cost in found.values()) else sum(c.seconds or 0 for c in found.values())
    )
    if whole:
        rows = []
        for method, cost in found.items():
            figures = [
                " / ".join("?" if value is None else f"{100 * value:.2f}" for value in (figure.average, figure.last))
                for figure in asked.figures_of(method)
            ]
            needs = asked.published.approach(method).needs
            missing = needs is not None and f"{method}.{needs}" not in asked.settings
            rows.append(
                (
                    method,
                    ", ".join(figures) or "-",
                    f"{cost.passes:,.0f}" if cost.passes else "as above",
                    "-" if cost.seconds is None else _time(cost.seconds),
                    f"--set {method}.{needs}=FILE" if missing else "",
                )
            )
        console.table(
            title, ("method", "published, average / last", "images through the tower", "about", "is missing"), rows
        )
    else:
        console.note(title)
    if seconds is None:
        console.note("embeddings are given: no tower passes")
    else:
        cost = "" if price is None else f", {price * seconds / 3600:,.2f} at {price:g} an hour"
        console.note(f"about {_time(seconds)} of tower passes in all, timed on a few images here{cost}")


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _facts(asked: Reproduction, towers: Any, figures: Path | None) -> dict[str, str]:
    return {
        "data": asked.data,
        "setting": f"{asked.setting_name}, {asked.setting.title}",
        "towers": f"{towers.name}, fingerprint {towers.fingerprint}",
        "class order": asked.setting.order,
        "tasks": f"first {asked.base or asked.step} classes, then {asked.step}",
        "seeds": ", ".join(map(str, asked.seeds)),
        "again": f"cairn reproduce {asked.data} --towers {asked.towers} --setting {asked.setting_name} "
        f"--base {asked.base} --step {asked.step}{f' --figures {figures}' if figures else ''}",
    }


def _stored(folder: Path, method: str) -> list[dict[str, Any]]:
    from cairn.reports.tables import results_below

    place = folder / method
    return sorted(results_below([place]), key=lambda one: one["seed"]) if place.is_dir() else []


def _off(
    asked: Reproduction, folder: Path, method: str, dataset: Any, towers: Any, templates: Sequence[str]
) -> tuple[list[str], bool]:
    """What does not fit, if a method of the first does not reach its figures to the digit, and whether it is so far off that nothing
    else should be run."""
    from cairn.experiment.metrics import mean_and_deviation
    from cairn.reproduce.checks import EXACT, TOLERANCE, Curve, distance, likely_causes
    from cairn.reproduce.plan import FIRST

    results, figures = _stored(folder, method), asked.figures_of(method)
    if method not in FIRST or not results or not figures:
        return [], False
    (average, spread), (last, more) = (mean_and_deviation([one[key] for one in results]) for key in ("average", "last"))
    found = Curve(average, last)
    nearest = min(figures, key=lambda figure: distance(figure, found))
    away = distance(nearest, found)
    if away <= max(EXACT, 2 * spread, 2 * more):
        return [], False
    shown = " / ".join("?" if value is None else f"{100 * value:.2f}" for value in (nearest.average, nearest.last))
    said = f"{method}: {100 * average:.2f} / {100 * last:.2f}, published {shown} ({nearest.source.name})"
    far = away > max(TOLERANCE, 2 * spread, 2 * more)
    if not far:
        said += ", no more than copies of a data set differ by"
    if method != FIRST[0]:
        return [f"{said}; training images are in it that zero-shot does not have"], far
    causes = likely_causes(asked, dataset, towers, nearest, found, templates)
    if not causes:
        said += "; no other activation, prompts, preprocessing or class order explains it: other weights or other test images"
    else:
        said += f"; likely {'; or '.join(map(str, causes[:3]))}"
    return [said], far


def _rows(asked: Reproduction, folder: Path) -> list[Row]:
    from cairn.reports.reproduction import Row

    copy = asked.published.copy_of(asked.key)
    rows = []
    for method in dict.fromkeys(run.method for run in asked.runs()):
        results = _stored(folder, method)
        measured = ([r["average"] for r in results], [r["last"] for r in results], [r["seed"] for r in results])
        approach = asked.published.approach(method)
        figures = asked.figures_of(method)
        for figure in figures:
            said = (approach.differs, figure.source.differs, copy.note if copy else "", _seen(figure.source.seen))
            differs = "; ".join(part for part in said if part)
            rows.append(
                Row(
                    method,
                    *measured,
                    figure.average,
                    figure.last,
                    f"{figure.source.name}, {figure.source.cite}",
                    differs,
                )
            )
        if not figures:
            rows.append(Row(method, *measured))
    return rows


def _seen(how: str) -> str:
    return f"figure read: {how}" if how else ""


def _write(asked: Reproduction, folder: Path, facts: dict[str, str], findings: list[str]) -> str:
    """The page, the same as data, and the table, which is given back."""
    from cairn.reports.reproduction import comparison_table, record, reproduction_page
    from cairn.storage.files import make_folder, write_chunks, write_json

    make_folder(folder)
    rows = _rows(asked, folder)
    table = comparison_table(rows).markdown()
    write_json(folder / RECORD, record(facts, findings, rows))
    write_chunks(folder / TABLE, [f"{table}\n".encode()])
    write_chunks(
        folder / PAGE,
        [reproduction_page(f"Published figures of {asked.key}, made again", facts, findings, rows).encode()],
    )
    return table
