"""The command for many runs: sweep. Parse, call, print."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cairn.cli.run import checked, of_fields
from cairn.errors import ConfigError, Interrupted, counted


class Where(StrEnum):
    ray = "ray"
    serial = "serial"


def register(app: typer.Typer) -> None:
    app.command()(sweep)


def sweep(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="a run file with lists of values in [grid], or a [search], or both")],
    out: Annotated[
        Path | None, typer.Option(help="the sweep's folder  [default: the file's out, else runs/FILE]")
    ] = None,
    engine: Annotated[Where, typer.Option(help="ray, or serial: one run after the other in this process")] = Where.ray,
    address: Annotated[
        str | None, typer.Option(help="a Ray cluster, HOST:PORT or auto  [default: the cores of this machine]")
    ] = None,
    cpus: Annotated[int | None, typer.Option(help="cores and threads of a run  [default: 1]")] = None,
    gpus: Annotated[
        float | None, typer.Option(help="GPUs of a run, or a share  [default: 1 where there are any]")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="memory set aside for a run, such as '4 GB'")] = None,
    parallel: Annotated[int | None, typer.Option(help="runs at once  [default: as many as there is room for]")] = None,
    attempts: Annotated[
        int | None, typer.Option(help="how often a run is begun if its worker is lost  [default: 3]")
    ] = None,
    checkpoint_seconds: Annotated[
        float | None, typer.Option(help="work of a run that is lost at most  [default: 60]")
    ] = None,
    cache: Annotated[bool | None, typer.Option("--cache", help="as `cairn run --cache`")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="find every run good, list them, and run none")] = False,
) -> None:
    """Make every run that a file asks for, and one table. The same call again goes on where it was cut off, and does what is
    new."""
    if engine is Where.serial and address is not None:
        raise ConfigError(f"--address {address}: --engine serial runs here; leave one out")
    if dry_run or engine is Where.serial:
        _sweep(context, file, out, None, dry_run)
        return
    from cairn.training.ray_cluster import Cluster

    # Before anything heavy is imported: both take seconds, and can take the same ones
    with closing(Cluster(address, instead="--engine serial")) as cluster:
        _sweep(context, file, out, cluster)


def _sweep(context: typer.Context, file: Path, out: Path | None, cluster: Any, dry_run: bool = False) -> None:
    """On the cluster, or without one here."""
    from cairn.errors import one_line
    from cairn.sweep.file import Resources, read_sweep_file
    from cairn.sweep.ledger import SWEEP, TABLE, View
    from cairn.sweep.runner import Serial, Sweep, problem

    read = read_sweep_file(file)
    own = {key: value for key, value in of_fields(context, Resources).items() if value is not None}
    read = read.model_copy(update=checked(Resources, **own).model_dump(include=set(own)))
    folder, view = out or read.out or Path("runs") / file.stem, View()
    held = Sweep(read, folder, view)
    if dry_run:
        points = held.plan()
        for job in held.ledger.jobs:
            view.note(f"{job.state:<9} {job.name}")
        if read.search is None:
            view.note(f"{counted(len(held.ledger.jobs), 'run')}: {held.ledger.counts}{_same(held.same)}")
        else:
            for point in points:
                view.note(
                    f"{counted(read.search.trials, 'trial')} below {point.name}, runs of each: {len(point.seeds)}"
                )
        return
    try:
        ledger = held.run(Serial if cluster is None else _on(cluster, read))
    except Interrupted:
        view.note(held.ledger.counts)
        raise
    table = ledger.table()
    view.note("")
    view.table(None, table.titles, table.texts())
    for best in ledger.best:
        view.note(
            f"\nbest {best['metric']} on held-out training images: {100 * best['value']:.2f} % of {best['trial']}\n"
            f"to test it: cairn run --config {one_line(folder / best['file'])}"
        )
    view.note(f"\n{ledger.counts}{_same(held.same)} -> {folder / SWEEP}, {TABLE}.md, {TABLE}.csv")
    if (bad := problem(ledger)) is not None:
        raise bad


def _same(number: int) -> str:
    return f" ({number} more the same as one of these)" if number else ""


def _on(cluster: Any, file: Any) -> Callable[[Any], Any]:
    """How the pool is made, once every run was checked. Raises ConfigError for a device that Ray is to hand out."""
    from cairn.sweep.plan import points_of
    from cairn.sweep.runner import OnRay

    devices = {point.config.device for point in points_of(file)}
    for name in devices:
        kind, colon, _ = name.partition(":")
        if colon:
            raise ConfigError(f"device '{name}': Ray says which one a run gets; give device = \"{kind}\"")
    gpus = 0 if file.gpus is None and devices == {"cpu"} else file.gpus
    return lambda stop: OnRay(cluster, file, gpus)
