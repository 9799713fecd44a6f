"""The command that embeds a data set: embed. Parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cairn.cli.run import (
    AnyDevice,
    BadImages,
    Data,
    Decode,
    LimitTest,
    LimitTrain,
    Precision,
    Preprocess,
    Revision,
    Template,
    Towers,
    checked,
    of_fields,
)
from cairn.errors import counted
from cairn.reports.console import Console
from cairn.training.distributed import ALONE


def register(app: typer.Typer) -> None:
    app.command()(embed)


class _Console(Console):
    def progress(self, state: dict[str, Any]) -> None:
        self.line(
            f"{state['done']:,}/{state['images']:,} images  {state['rate']:.0f} images/s  {state['remaining']:.0f} s left"
        )

    def event(self, event: dict[str, Any]) -> None:
        if event["event"] == "begin":
            there = f", {event['there']} there already" if event["there"] else ""
            self.note(
                f"{event['data']} by {event['towers']}: {counted(event['train'], 'training image')} and "
                f"{counted(event['test'], 'test image')}, "
                f"{event['dim']} numbers each, in {counted(event['shards'], 'shard')}{there}"
            )
        else:
            super().event(event)


def embed(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="the features file to write (.safetensors)")],
    data: Data = "shapes",
    towers: Towers = "auto",
    limit_train: LimitTrain = None,
    limit_test: LimitTest = None,
    device: AnyDevice = "auto",
    precision: Precision = "float32",
    preprocess: Preprocess = None,
    decode: Decode = "whole",
    template: Template = None,
    revision: Revision = None,
    on_bad_image: BadImages = "stop",
    dtype: Annotated[str, typer.Option(help="float32 or float16, in the file")] = "float32",
    batch: Annotated[int, typer.Option(help="images in a pass through the tower")] = 128,
    shard_rows: Annotated[
        int, typer.Option(help="images per shard: what is lost at most if a process is killed")
    ] = 2048,
    workers: Annotated[int, typer.Option(help="processes that share the shards, by Ray; or use torchrun")] = 1,
    address: Annotated[
        str | None, typer.Option(help="a Ray cluster, HOST:PORT or auto  [default: this machine]")
    ] = None,
    keep_parts: Annotated[bool, typer.Option("--keep-parts", help="leave the shards beside the file")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="begin again, whatever file or shards are there")
    ] = False,
) -> None:
    """Embed every image of a data set into one file. `cairn run --data FILE` takes it. The same call again goes on where it
    was cut off."""
    from cairn.embed import EmbedConfig, embed_dataset
    from cairn.embed.runner import parts_folder
    from cairn.training.checkpoint import stopped_by_signals
    from cairn.training.context import Checkpoint, Log

    config = checked(EmbedConfig, **of_fields(context, EmbedConfig))
    world = context.obj or ALONE
    console, checkpoint = _Console(), Checkpoint()
    with stopped_by_signals(checkpoint), console.live():
        made = embed_dataset(
            config,
            out,
            workers=workers,
            address=address,
            world=world,
            keep_parts=keep_parts,
            overwrite=overwrite,
            log=Log(keep=console.event, show=console.progress),
            checkpoint=checkpoint,
        )
    if not world.is_main:
        return
    if made.finished:
        console.note(f"already there: {counted(made.images, 'image')} in {out} (--overwrite to embed again)")
        if (parts := parts_folder(out)).is_dir() and not keep_parts:
            console.note(f"'{parts}' is no longer needed: it was kept, or a kill came before it was removed")
        return
    console.note(
        f"{counted(made.images, 'image')}, {made.made:,} of them now ({made.made / made.seconds:.0f} rows/s), "
        f"{made.bytes:,} bytes -> {out}"
    )
