"""The commands that learn class streams: run, import, demo, drift. Parse, call, print."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from cairn.cli.collector import importing
from cairn.errors import ConfigError, Interrupted, printable
from cairn.reports.console import Console
from cairn.training.distributed import ALONE, World

if TYPE_CHECKING:
    from pydantic import BaseModel

Settings = TypeVar("Settings")
Data = Annotated[str, typer.Option("--data", help="shapes, a folder, a features file (.safetensors) or a hub data set")]
Towers = Annotated[str, typer.Option(help="tiny, a hub id, a folder, or open_clip:<either>; auto picks")]
Base = Annotated[int, typer.Option(help="classes of the first task; 0: like the others")]
Step = Annotated[int | None, typer.Option(help="classes per task  [default: 5 for shapes, else 10]")]
Order = Annotated[str, typer.Option(help="natural, seed:N, or a file of class names")]
Validation = Annotated[float, typer.Option(help="test on this share of the training images instead")]
AnyDevice = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
Set = Annotated[list[str] | None, typer.Option("--set", help="a setting of the method, key=value; may be repeated")]
LimitTrain = Annotated[int | None, typer.Option(help="training images per class at most")]
Imbalance = Annotated[
    float, typer.Option(help="long tail: images of the most frequent class over those of the rarest; 1: as they are")
]
Stream = Annotated[str, typer.Option(help="tasks, learned whole, or online: chunk by chunk, each image seen once")]
Chunk = Annotated[int | None, typer.Option(help="images in a chunk of an online stream  [default: 100]")]
Blurry = Annotated[float, typer.Option(help="share of each class's images that comes with later tasks")]
Labelled = Annotated[
    float, typer.Option(help="share of each class's training images that keep their label, one at least")
]
LooseFolder = Annotated[
    str | None, typer.Option("--unlabelled", help="a folder of pictures without labels, for every task")
]
PseudoLabels = Annotated[
    float | None, typer.Option(help="share of the images without labels that are learned as what they are taken for")
]
LimitTest = Annotated[int | None, typer.Option(help="test images per class at most")]
Precision = Annotated[str, typer.Option(help="float32 or bfloat16, inside the towers")]
Revision = Annotated[str | None, typer.Option(help="revision of the towers on the hub")]
Preprocess = Annotated[
    str | None, typer.Option(help="crop (CLIP's) or squash (all of the image); unset: as the checkpoint says")
]
Decode = Annotated[
    str, typer.Option(help="JPEGs whole, or reduced: at a fraction, no less than twice the tower's side")
]
Template = Annotated[str | None, typer.Option(help="one prompt, {} for the class name  [default: the data's]")]
BadImages = Annotated[
    str,
    typer.Option("--on-bad-image", help="image files that cannot be read: stop before anything is done, or skip them"),
]

FILE = "cairn.run_file"
"""Where a context holds what --config read."""


def register(app: typer.Typer) -> None:
    app.command()(run)
    app.command(name="import")(import_)
    app.command()(demo)
    app.command()(drift)


def _read_file(context: typer.Context, path: Path | None) -> Path | None:
    """What the file says stands in for the options' defaults, so that the command line goes before it."""
    if path is not None:
        context.meta[FILE] = _run_file(path)
        context.default_map = context.meta[FILE].options
    return path


def _run_file(path: Path):
    """What a file asks for, one of ours or another toolbox's."""
    from cairn.contrib.pycil import read_config
    from cairn.experiment.config_file import read_run_file

    return read_config(path) if path.suffix.lower() == ".json" else read_run_file(path)


def run(
    context: typer.Context,
    method: Annotated[str | None, typer.Argument(help="a method of `cairn list`; none with --resume")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            callback=_read_file,
            is_eager=True,
            help="a run file (TOML), or a config of PyCIL, PILOT or C3Box (JSON); options given here override it",
        ),
    ] = None,
    data: Data = "shapes",
    towers: Towers = "auto",
    base: Base = 0,
    step: Step = None,
    order: Order = "natural",
    seed: Annotated[int, typer.Option(help="moves every random choice but the class order")] = 1,
    seeds: Annotated[str | None, typer.Option(help="several seeds, 1,2,3: one folder each and a summary")] = None,
    out: Annotated[Path | None, typer.Option(help="output folder  [default: runs/METHOD-DATA]")] = None,
    set_: Set = None,
    limit_train: LimitTrain = None,
    limit_test: LimitTest = None,
    validation: Validation = 0.0,
    imbalance: Imbalance = 1.0,
    stream: Stream = "tasks",
    chunk: Chunk = None,
    blurry: Blurry = 0.0,
    labelled: Labelled = 1.0,
    unlabelled: LooseFolder = None,
    pseudo_labels: PseudoLabels = None,
    device: AnyDevice = "auto",
    precision: Precision = "float32",
    preprocess: Preprocess = None,
    decode: Decode = "whole",
    template: Template = None,
    revision: Revision = None,
    on_bad_image: BadImages = "stop",
    resume: Annotated[
        Path | None, typer.Option(help="go on with the run that was begun in this folder; no other option")
    ] = None,
    checkpoint_seconds: Annotated[float, typer.Option(help="work that is lost at most if the run is killed")] = 60.0,
    checkpoint_steps: Annotated[int | None, typer.Option(help="the same in steps of training")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="begin again, whatever result or unfinished run is there")
    ] = False,
    keep_learner: Annotated[
        bool, typer.Option("--keep-learner", help="keep what was learned in DIR/learner, a learner as of `cairn learn`")
    ] = False,
    cache: Annotated[
        bool, typer.Option("--cache", help="embeddings of a frozen tower come from `cairn cache`, and are kept there")
    ] = False,
    track: Annotated[
        list[str] | None, typer.Option(help="tell tensorboard, wandb, trackio or mlflow as well; may be repeated")
    ] = None,
    log_lines: Annotated[
        bool, typer.Option("--log-lines", help="after each task also print the accuracy lines of PyCIL and C3Box")
    ] = False,
) -> None:
    """Learn a class stream with one method. The result is DIR/result.json. The same call again goes on where it was cut
    off. Several processes that torchrun starts share the images out."""
    with importing():
        from cairn.config import merged, parsed
        from cairn.experiment.config_file import RunFile
        from cairn.experiment.folder import Call, read_call
        from cairn.experiment.schema import RunConfig, usual_step
        from cairn.methods.catalogue import method_named

    world = context.obj or ALONE
    if resume is not None:
        if method is not None:
            raise ConfigError(f"--resume {resume}: the folder says what to run; leave '{method}' out")
        for parameter in context.command.params:
            if parameter.name != "resume" and _is_given(context, parameter.name):
                raise ConfigError(f"--resume {resume}: the folder says what to run; leave {parameter.opts[0]} out")
        run_all(read_call(resume), resume, world=world)
        return
    asked = context.meta.get(FILE) or RunFile()
    if method is None:
        raise ConfigError(asked.problem or "no method given; see `cairn list`")
    entry = method_named(method)
    if keep_learner and entry.card.keeps == "images":
        raise ConfigError(f"--keep-learner: method '{entry.name}' keeps images, so it cannot be saved; leave it out")
    step = usual_step(data) if step is None else step
    folder = out or Path("runs") / f"{entry.name}-{_data_name(data)}"
    several = seed_numbers(seeds) if seeds is not None else None
    alone = _is_given(context, "seed")
    if several is not None and alone:
        raise ConfigError(f"--seed {seed} and --seeds {seeds}: give only one of them")
    if several is None and not alone:
        several = asked.seeds
    own = {"method": entry.name, "step": step, "seed": several[0] if several else seed}
    own |= {"settings": merged(asked.settings, parsed(set_ or ())), "stream": checked_stream(stream)}
    config = checked(RunConfig, **of_fields(context, RunConfig) | own)
    own = {"run": config, "seeds": several, "track": track or [], "notices": asked.notices}
    call = checked(Call, **of_fields(context, Call) | own)
    run_all(call, folder, overwrite, world)


def _is_given(context: typer.Context, name: str | None) -> bool:
    """Whether an option stands on the command line, and is no default or what --config read."""
    source = None if name is None else context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def checked(kind: type[Settings], **values: Any) -> Settings:
    """Settings from options; one that does not fit is named as the option it came from."""
    from pydantic import ValidationError

    from cairn.storage.schema import reason_of

    try:
        return kind(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option} {problem['input']}: {reason_of(problem)}") from None


def of_fields(context: typer.Context, kind: type[BaseModel]) -> dict[str, Any]:
    """The options of a call that are fields of a schema, by their names."""
    return {key: value for key, value in context.params.items() if key in kind.model_fields}


def checked_bad_image(choice: str) -> Literal["stop", "skip"]:
    """Raises ConfigError for another value of --on-bad-image than stop and skip."""
    if choice not in ("stop", "skip"):
        raise ConfigError(f"--on-bad-image {choice}: must be stop or skip")
    return choice


def checked_stream(choice: str) -> Literal["tasks", "online"]:
    """Raises ConfigError for another value of --stream than tasks and online."""
    if choice not in ("tasks", "online"):
        raise ConfigError(f"--stream {choice}: must be tasks or online")
    return choice


def _data_name(data: str) -> str:
    """What a default output folder is called after."""
    return Path(data).stem if os.path.exists(data) else data.partition("=")[0].replace(":", "-")


def seed_numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"--seeds {text}: must be different whole numbers, e.g. 1,2,3")
    return [int(part) for part in parts]


def run_all(call, folder: Path, overwrite: bool = False, world: World = ALONE) -> list:
    """One run into `folder`, or one per seed into `folder/seed-N` and a summary. Of several processes the first writes."""
    with world.connected(call.run.device):
        return _runs(call, folder, overwrite, world)


def _runs(call, folder: Path, overwrite: bool, world: World) -> list:
    from cairn.experiment.folder import CALL, SUMMARY, require_one_stream, summary
    from cairn.storage.files import write_json

    console = Console() if world.is_main else Console(io.StringIO())
    if call.seeds is None:
        return [_run_one(call, folder, overwrite, console, world)]
    results = []

    def opened() -> None:
        write_json(folder / CALL, call.model_dump(mode="json"))

    for number in call.seeds:
        own = call.model_copy(update={"run": call.run.model_copy(update={"seed": number}), "seeds": None})
        results.append(_run_one(own, folder / f"seed-{number}", overwrite, console, world, opened))
        require_one_stream(results)
    if world.is_main:
        write_json(folder / SUMMARY, summary(results))
        (folder / CALL).unlink(missing_ok=True)
    console.summary(results, folder / SUMMARY)
    return results


def _run_one(
    call, folder: Path, overwrite: bool, console: Console, world: World, opened: Callable[[], Any] = lambda: None
):
    """`opened` is called when the folder is there: when all input was found good."""
    with importing():
        from cairn.contrib.pycil import curve_lines
        from cairn.data.feature_store import FeatureStore
        from cairn.experiment.folder import RESULT, RunFolder, events_in, write_learner
        from cairn.experiment.run import Outcome, run_stream
        from cairn.experiment.segmented import write_segmented
        from cairn.experiment.trackers import Tracking
        from cairn.training.checkpoint import stopped_by_signals
        from cairn.training.context import Checkpoint, Log

    output = RunFolder(folder, call)
    trackers = call.track if world.is_main else []
    tracking = Tracking(trackers, folder, call.run, warn=lambda text: tell({"event": "warning", "text": text}))
    if not overwrite and (done := world.broadcast_from_main(output.finished)) is not None:
        console.note(f"already finished: {folder / RESULT} (--overwrite to run again)")
        console.result(done, folder / RESULT)
        return done

    # The folder is opened with the first event, after all input was found good: a bad call leaves nothing behind.
    def keep(event: dict) -> None:
        if output.closed:
            held = output.open(overwrite)
            if held is not None:
                console.note(f"{folder}: {held} did not finish; taking over")
            opened()
            tracking.begin(events_in(output.path))
            for text in call.notices:
                tell({"event": "notice", "text": text})
        tell(event)

    def tell(event: dict) -> None:
        output.keep(event)
        console.event(event)
        tracking(event)
        if call.log_lines and event["event"] == "task":
            seen = {past["task"]: past["seen"] for past in events_in(output.path) if past["event"] == "task"}
            for line in curve_lines(list(seen.values())):
                console.note(line)

    def learned(outcome: Outcome) -> None:
        if call.keep_learner:
            write_learner(folder, outcome)
        write_segmented(folder, outcome)

    checkpoint = Checkpoint(call.checkpoint_seconds, call.checkpoint_steps, world)
    store = FeatureStore.configured() if call.cache else None
    try:
        with stopped_by_signals(checkpoint), console.live():
            log = Log(keep=keep, show=console.progress) if world.is_main else Log()
            result = run_stream(call.run, log, learned, store, checkpoint, output.archive)
        if world.is_main:
            output.write(result)
            tracking.result(result)
    except Interrupted as stopped:
        raise Interrupted(stopped.signal, f"to go on: cairn run --resume {folder}") from None
    finally:
        tracking.close()
        output.close()
    console.result(result, folder / RESULT)
    return result


def import_(
    config: Annotated[Path, typer.Argument(help="a config of PyCIL, PILOT or C3Box (JSON)")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the run file to write  [default: print it]")] = None,
) -> None:
    """Turn another toolbox's config into a run file. What has no counterpart here is told in comments."""
    from cairn.contrib.pycil import read_config
    from cairn.experiment.config_file import run_file_text
    from cairn.storage.files import write_chunks

    file = read_config(config)
    if file.problem:
        raise ConfigError(file.problem)
    text = run_file_text(file, f"from {config.name}")
    if out is None:
        typer.echo(printable(text), nl=False)
    else:
        write_chunks(out, [text.encode()])


def demo(
    out: Annotated[Path, typer.Option(help="output folder")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="moves every random choice")] = 1,
) -> None:
    """Compare three methods on drawn pictures, in a minute. Forty classes in eight tasks: zero-shot, class means and DMC."""
    from cairn.experiment.folder import Call
    from cairn.experiment.schema import RunConfig

    console = Console()
    console.note(
        "A small CLIP meets 8 tasks of 5 classes it has never seen, in a style it has never seen.\n"
        "After each task it is tested on every class so far; no old image is kept.\n"
    )
    results = []
    for method in ("zero-shot", "simplecil", "dmc"):
        config = RunConfig(method=method, data="shapes", step=5, seed=seed, limit_train=60)
        results += run_all(Call(run=config, checkpoint_seconds=60.0), out / method, overwrite=True)
    console.curves(results)


def drift(
    context: typer.Context,
    data: Data = "shapes",
    towers: Annotated[str, typer.Option(help="as in `cairn run`")] = "auto",
    base: Base = 0,
    step: Step = None,
    order: Order = "natural",
    seeds: Annotated[str, typer.Option(help="seeds, 1,2,3")] = "1",
    estimators: Annotated[
        str, typer.Option(help="which of the family, by name")
    ] = "mean,sdc,bures,sinkhorn,paired,local",
    out: Annotated[Path | None, typer.Option(help="output folder  [default: runs/drift-DATA]")] = None,
    set_: Set = None,
    limit_train: LimitTrain = None,
    limit_test: LimitTest = None,
    validation: Validation = 0.0,
    imbalance: Imbalance = 1.0,
    on_bad_image: BadImages = "stop",
) -> None:
    """Measure how stored statistics drift, for research. Compares the estimators of drift with the truth, for which it opens
    the images of old tasks."""
    with importing():
        from cairn.config import merged, parsed
        from cairn.experiment.drift_lab import drift_report
        from cairn.experiment.schema import RunConfig, usual_step
        from cairn.reports.drift import drift_figure, drift_table
        from cairn.storage.files import folder_to_fill, write_json
        from cairn.training.context import Log

    console = Console()
    folder = out or Path("runs") / f"drift-{_data_name(data)}"
    own = {"method": "dmc-ot", "step": usual_step(data) if step is None else step}
    config = checked(RunConfig, **of_fields(context, RunConfig) | own | {"settings": merged({}, parsed(set_ or ()))})
    with folder_to_fill(folder), console.live():
        log = Log(keep=console.event, show=console.progress)
        report = drift_report(config, [name.strip() for name in estimators.split(",")], seed_numbers(seeds), log)
    write_json(folder / "drift.json", report)
    drift_figure(report, folder / "drift.png")
    console.note(drift_table([report]))
    console.note(f"-> {folder / 'drift.json'}, {folder / 'drift.png'}")
