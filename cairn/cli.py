"""The command: parse, call, print. Bad input is one line on standard error and exit status 2."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from cairn import learner_commands
from cairn.errors import CairnError, ConfigError, DataError, Stopped
from cairn.reports.console import Console

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="A CLIP model learns new classes, task after task, without keeping old images.",
)  # fmt: skip

Settings = TypeVar("Settings")
Data = Annotated[str, typer.Option("--data", help="shapes, a folder, a features file (.safetensors) or a hub data set")]
Into = Annotated[Path | None, typer.Option(help="a Markdown file; its block 'cairn COMMAND NAME' is replaced")]
Block = Annotated[str, typer.Option(help="name of the block")]
Set = Annotated[list[str] | None, typer.Option("--set", help="a setting of the method, key=value; may be repeated")]


def main() -> None:
    """Entry point of the `cairn` command."""
    try:
        status = app(standalone_mode=False)
        if isinstance(status, int):  # what an interrupt is turned into
            sys.exit(status)
    except Stopped as error:
        print(f"cairn: {error}", file=sys.stderr)
        sys.exit(128 + error.signal)
    except CairnError as error:
        print(f"cairn: {error}", file=sys.stderr)
        sys.exit(2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command line itself
            print(f"cairn: {error.format_message()}; see cairn --help", file=sys.stderr)
            sys.exit(2)
        raise


def _read_file(context: typer.Context, path: Path | None) -> Path | None:
    """What the file says stands in for the options' defaults, so that the command line goes before it."""
    if path is not None:
        context.obj = _run_file(path)
        context.default_map = context.obj.options
    return path


def _run_file(path: Path):
    """What a file asks for, one of ours or another toolbox's."""
    from cairn.pycil import read_config
    from cairn.runfile import read_run_file

    return read_config(path) if path.suffix.lower() == ".json" else read_run_file(path)


@app.command()
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
    towers: Annotated[str, typer.Option(help="tiny, a hub id, a folder, or open_clip:<either>; auto picks")] = "auto",
    base: Annotated[int, typer.Option(help="classes of the first task; 0: like the others")] = 0,
    step: Annotated[int | None, typer.Option(help="classes per task  [default: 5 for shapes, else 10]")] = None,
    order: Annotated[str, typer.Option(help="natural, seed:N, or a file of class names")] = "natural",
    seed: Annotated[int, typer.Option(help="moves every random choice but the class order")] = 1,
    seeds: Annotated[str | None, typer.Option(help="several seeds, 1,2,3: one folder each and a summary")] = None,
    out: Annotated[Path | None, typer.Option(help="output folder  [default: runs/METHOD-DATA]")] = None,
    set_: Set = None,
    limit_train: Annotated[int | None, typer.Option(help="training images per class at most")] = None,
    limit_test: Annotated[int | None, typer.Option(help="test images per class at most")] = None,
    validation: Annotated[float, typer.Option(help="test on this share of the training images instead")] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16, inside the towers")] = "float32",
    preprocess: Annotated[str, typer.Option(help="crop (CLIP's) or squash")] = "crop",
    template: Annotated[
        str | None, typer.Option(help="one prompt, {} for the class name  [default: the data's]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="revision of the towers on the hub")] = None,
    on_bad_image: Annotated[str, typer.Option(help="image files that cannot be read: error or skip")] = "error",
    resume: Annotated[
        Path | None, typer.Option(help="go on with the run that was begun in this folder; no other option")
    ] = None,
    checkpoint_seconds: Annotated[float, typer.Option(help="work that is lost at most if the run is killed")] = 60.0,
    checkpoint_steps: Annotated[int | None, typer.Option(help="the same in steps of training")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="begin again, whatever result or unfinished run is there")
    ] = False,
    keep_learner: Annotated[
        bool, typer.Option("--keep-learner", help="keep what was learned, for `cairn explain-image`")
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
    """Learn a class stream with a method and write DIR/result.json. The same call again goes on where it was cut off."""
    from cairn.methods.catalogue import method_named
    from cairn.run import RunConfig
    from cairn.runfile import RunFile
    from cairn.store import Call, read_call

    if resume is not None:
        if method is not None:
            raise ConfigError(f"--resume {resume}: the folder says what to run; leave '{method}' out")
        _run_all(read_call(resume), resume)
        return
    asked = context.obj or RunFile()
    if method is None:
        raise ConfigError(asked.problem or "no method given; see `cairn list`")
    entry = method_named(method)
    step = _step(step, data)
    folder = out or Path("runs") / f"{entry.name}-{_data_name(data)}"
    several = _seeds(seeds) if seeds is not None else None
    if several is None and context.get_parameter_source("seed").name != "COMMANDLINE":
        several = asked.seeds
    config = _checked(
        RunConfig, method=entry.name, data=data, towers=towers, base=base, step=step, order=order,
        seed=several[0] if several else seed, settings=(*asked.settings, *(set_ or ())), limit_train=limit_train,
        limit_test=limit_test, validation=validation, device=device, precision=precision, preprocess=preprocess,
        template=template, revision=revision, on_bad_image=on_bad_image,
    )  # fmt: skip
    call = _checked(
        Call, run=config, seeds=several, keep_learner=keep_learner, cache=cache, checkpoint_seconds=checkpoint_seconds,
        checkpoint_steps=checkpoint_steps, track=track or [], log_lines=log_lines, notices=asked.notices,
    )  # fmt: skip
    _run_all(call, folder, overwrite)


def _checked(kind: type[Settings], **values: Any) -> Settings:
    """Settings from options; one that does not fit is named as the option it came from."""
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option} {problem['input']}: {problem['msg'].lower()}") from None


def _step(step: int | None, data: str) -> int:
    """The stream's usual step where none is given."""
    return step if step is not None else 5 if data.partition(":")[0] == "shapes" else 10


def _data_name(data: str) -> str:
    """What a default output folder is called after."""
    return Path(data).stem if os.path.exists(data) else data.partition("=")[0].replace(":", "-")


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"--seeds {text}: must be different whole numbers, e.g. 1,2,3")
    return [int(part) for part in parts]


def _run_all(call, folder: Path, overwrite: bool = False) -> list:
    """One run into `folder`, or one per seed into `folder/seed-N` and a summary."""
    from cairn.files import write_json
    from cairn.store import CALL, SUMMARY, summary

    console = Console()
    if call.seeds is None:
        return [_run_one(call, folder, overwrite, console)]
    results = []

    def opened() -> None:
        write_json(folder / CALL, call.model_dump(mode="json"))

    for number in call.seeds:
        own = call.model_copy(update={"run": call.run.model_copy(update={"seed": number}), "seeds": None})
        results.append(_run_one(own, folder / f"seed-{number}", overwrite, console, opened))
    write_json(folder / SUMMARY, summary(results))
    (folder / CALL).unlink(missing_ok=True)
    console.summary(results, folder / SUMMARY)
    return results


def _run_one(
    call, folder: Path, overwrite: bool, console: Console, opened: Callable[[], Any] = lambda: None
):  # fmt: skip
    """`opened` is called when the folder is there: when all input was found good."""
    from cairn.data.feature_store import FeatureStore
    from cairn.pycil import curve_lines
    from cairn.run import run_stream
    from cairn.store import RESULT, RunFolder, write_learner
    from cairn.tracking import Tracking
    from cairn.training.checkpoint import Checkpoint, stopped_by_signals
    from cairn.training.log import Log

    output = RunFolder(folder, call)
    tracking = Tracking(call.track, folder, call.run, warn=lambda text: tell({"event": "warning", "text": text}))
    if not overwrite and (done := output.finished()) is not None:
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
            tracking.begin(output.happened())
            for text in call.notices:
                tell({"event": "notice", "text": text})
        tell(event)

    def tell(event: dict) -> None:
        output.keep(event)
        console.event(event)
        tracking(event)
        if call.log_lines and event["event"] == "task":
            seen = {past["task"]: past["seen"] for past in output.happened() if past["event"] == "task"}
            for line in curve_lines(list(seen.values())):
                console.note(line)

    checkpoint = Checkpoint(call.checkpoint_seconds, call.checkpoint_steps)
    store = FeatureStore.configured() if call.cache else None
    try:
        with stopped_by_signals(checkpoint), console.live():
            learned = (lambda method: write_learner(folder, method)) if call.keep_learner else None
            log = Log(keep=keep, show=console.progress)
            result = run_stream(call.run, log, learned, store, checkpoint, output.archive)
        output.write(result)
        tracking.result(result)
    except Stopped:
        console.note(f"stopped; the state is kept. To go on: cairn run --resume {folder}")
        raise
    finally:
        tracking.close()
        output.close()
    console.result(result, folder / RESULT)
    return result


@app.command(name="import")
def import_(
    config: Annotated[Path, typer.Argument(help="a config of PyCIL, PILOT or C3Box (JSON)")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the run file to write  [default: print it]")] = None,
) -> None:
    """Another toolbox's config as a run file; what it says that has no counterpart here is told in comments."""
    from cairn.files import write_chunks
    from cairn.pycil import read_config
    from cairn.runfile import run_file_text

    file = read_config(config)
    if file.problem:
        raise ConfigError(file.problem)
    text = run_file_text(file, f"from {config.name}")
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_chunks(out, [text.encode()])


@app.command(name="list")
def list_() -> None:
    """Methods, data sets and towers."""
    from cairn.data.catalogue import CATALOGUE
    from cairn.methods.catalogue import METHODS
    from cairn.towers.catalogue import KNOWN

    console = Console()
    rows = [
        (m.name, m.title, m.trains, m.keeps, "yes" if m.exemplar_free else "NO", m.source) for m in METHODS.values()
    ]
    console.table("Methods", ("name", "what", "trains", "keeps of old classes", "exemplar-free", "source"), rows)
    own = [
        ("shapes", "the drawn world: 40 compositions (embedded)"),
        ("FOLDER", "train/<class>/* and test/<class>/*, or <class>/*"),
        ("FILE.safetensors", "precomputed embeddings"),
    ]
    console.table("Data", ("name", "what"), own + [(row.key, row.title) for row in CATALOGUE.values()])
    console.table("Towers", ("name", "what"), list(KNOWN.items()))


@app.command()
def explain(method: Annotated[str, typer.Argument(help="a method of `cairn list`")]) -> None:
    """A method's source, stages and settings with their defaults."""
    from cairn.methods.catalogue import method_named
    from cairn.methods.settings import settings

    entry = method_named(method)
    console = Console()
    console.note(f"{entry.title}\n\n{entry.citation}\n")
    for number, stage in enumerate(entry.stages, 1):
        console.note(f"  {number}. {stage}")
    console.note(f"\ntrains: {entry.trains}; keeps of old classes: {entry.keeps}; exemplar-free: "
        f"{'yes' if entry.exemplar_free else 'no'}\nfile: {entry.build.__module__.replace('.', '/')}.py\n")  # fmt: skip
    forms = [("Settings (--set key=value)", entry.config())]
    if hasattr(entry.config, "embedding"):
        forms.append(("Settings on a features file (embedding form)", entry.config.embedding()))
    for title, config in forms:
        rows = [(path, json.dumps(value), text) for path, value, text in settings(config)]
        if rows:
            console.table(title, ("setting", "default", "meaning"), rows)
    console.note("[P] stated by the paper, [K] nearest published practice, [I] ours: see docs/deviations.md")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="output folder")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="moves every random choice")] = 1,
) -> None:
    """Forty classes of the drawn world in eight tasks: zero-shot, class means and DMC side by side."""
    from cairn.run import RunConfig
    from cairn.store import Call

    console = Console()
    console.note(
        "A small CLIP meets 8 tasks of 5 classes it has never seen, in a style it has never seen.\n"
        "After each task it is tested on every class so far; no old image is kept.\n"
    )
    results = []
    for method in ("zero-shot", "simplecil", "dmc"):
        config = RunConfig(method=method, data="shapes", step=5, seed=seed, limit_train=60)
        results += _run_all(Call(run=config, checkpoint_seconds=60.0), out / method, overwrite=True)
    console.curves(results)


@app.command()
def drift(
    data: Data = "shapes",
    towers: Annotated[str, typer.Option(help="as in `cairn run`")] = "auto",
    base: Annotated[int, typer.Option(help="classes of the first task; 0: like the others")] = 0,
    step: Annotated[int | None, typer.Option(help="classes per task  [default: 5 for shapes, else 10]")] = None,
    order: Annotated[str, typer.Option(help="natural, seed:N, or a file of class names")] = "natural",
    seeds: Annotated[str, typer.Option(help="seeds, 1,2,3")] = "1",
    estimators: Annotated[
        str, typer.Option(help="which of the family, by name")
    ] = "mean,sdc,bures,sinkhorn,paired,local",
    out: Annotated[Path | None, typer.Option(help="output folder  [default: runs/drift-DATA]")] = None,
    set_: Set = None,
    limit_train: Annotated[int | None, typer.Option(help="training images per class at most")] = None,
    limit_test: Annotated[int | None, typer.Option(help="test images per class at most")] = None,
    validation: Annotated[float, typer.Option(help="test on this share of the training images instead")] = 0.0,
) -> None:
    """The drift laboratory: stored Gaussians against the truth, for research (it opens the images of old tasks)."""
    from cairn.files import make_folder, write_json
    from cairn.reports.drift import drift_figure, drift_table
    from cairn.run import RunConfig, drift_report
    from cairn.training.log import Log

    console = Console()
    folder = out or Path("runs") / f"drift-{_data_name(data)}"
    config = RunConfig(
        method="dmc-ot", data=data, towers=towers, base=base, step=_step(step, data), order=order,
        settings=tuple(set_ or ()), limit_train=limit_train, limit_test=limit_test, validation=validation,
    )  # fmt: skip
    with console.live():
        log = Log(keep=console.event, show=console.progress)
        report = drift_report(config, [name.strip() for name in estimators.split(",")], _seeds(seeds), log)
    make_folder(folder)
    write_json(folder / "drift.json", report)
    drift_figure(report, folder / "drift.png")
    console.note(drift_table([report]))
    console.note(f"-> {folder / 'drift.json'}, {folder / 'drift.png'}")


@app.command()
def describe(
    data: Data = "shapes",
    towers: Annotated[str, typer.Option(help="towers that choose the guide images")] = "tiny",
    out: Annotated[Path, typer.Option(help="the file; classes that it holds are not asked about again")] = Path(
        "descriptions.json"
    ),
    model: Annotated[str, typer.Option(help="a vision language model")] = "gpt-5",
    sentences: Annotated[int, typer.Option(help="phrases per class")] = 6,
    words: Annotated[int, typer.Option(help="words per phrase at most")] = 15,
    guides: Annotated[str, typer.Option(help="guide images: representative+diverse")] = "4+4",
    allow_name: Annotated[bool, typer.Option("--allow-name", help="phrases may contain the class name")] = False,
    base_url: Annotated[str | None, typer.Option(help="server; default: OPENAI_BASE_URL, or OpenAI's")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be sent, send nothing")] = False,
) -> None:
    """Ask a vision language model for visual descriptions of the classes; key from OPENAI_API_KEY."""
    from cairn.data.catalogue import open_dataset
    from cairn.data.descriptions import Descriptions, read_descriptions
    from cairn.describe import DescribeConfig, described, guide_images, request
    from cairn.files import make_folder, write_json
    from cairn.towers.catalogue import load_towers
    from cairn.training.log import Log

    near, plus, far = guides.partition("+")
    if not (plus and near.isdigit() and far.isdigit()):
        raise ConfigError(f"guides '{guides}': two whole numbers, such as 4+4")
    config = _checked(
        DescribeConfig, model=model, sentences=sentences, words=words, name_free=not allow_name,
        representative=int(near), diverse=int(far),
    )  # fmt: skip
    console = Console()
    dataset = open_dataset(data)
    if dataset.embeddings is not None:
        raise ConfigError(f"data '{data}': embeddings, not images: there is nothing to show")
    held = read_descriptions(out) if out.is_file() else Descriptions()
    missing = [name for name in dataset.classes if name not in held.classes]
    console.note(f"{len(dataset.classes) - len(missing)} of {len(dataset.classes)} classes are described in {out}")
    if not missing:
        return
    chosen = guide_images(dataset, load_towers(towers), missing, config)
    if dry_run:
        for name in missing:
            shown = ", ".join(dataset.train.describe(row) for row in chosen[name])
            size = len(json.dumps(request(dataset, name, chosen[name], config)))
            text = request(dataset, name, [], config)["messages"][0]["content"][0]["text"]
            console.note(f"{name}: {len(chosen[name])} images ({shown}), {size / 1000:.0f} kB\n  {text}")
        return
    make_folder(out.parent)
    tokens = [0, 0]
    log = Log(keep=console.event)
    for done, found in enumerate(described(dataset, chosen, missing, config, log, base_url=base_url), start=1):
        held = held.model_copy(update={"classes": {**held.classes, found.name: found.description}})
        write_json(out, held.model_dump(mode="json"))
        tokens = [tokens[0] + found.tokens_in, tokens[1] + found.tokens_out]
        console.note(f"  {done}/{len(missing)} {found.name}: {found.description.sentences[0]}  [{sum(tokens)} tokens]")
    left = [name for name in missing if name not in held.classes]
    console.note(f"{len(held.classes)} classes in {out}; {tokens[0]} tokens in, {tokens[1]} out")
    if left:
        raise CairnError(f"describe: {len(left)} classes have no description: {', '.join(left[:5])}; run it again")


@app.command()
def explain_image(
    run: Annotated[Path, typer.Argument(help="output folder of `cairn run spa --keep-learner`")],
    image: Annotated[Path, typer.Argument(help="an image file")],
    best: Annotated[int, typer.Option(help="classes to explain, the likeliest first")] = 3,
    out: Annotated[Path | None, typer.Option(help="PNG to write, JSON beside it  [default: IMAGE-reasons.png]")] = None,
) -> None:
    """Which patches of an image speak for its best classes, and for which words: a picture and JSON."""
    import numpy as np

    from cairn.data.folders import decoded
    from cairn.files import write_json
    from cairn.reports.patches import patch_figure
    from cairn.store import read_learner

    try:
        picture = decoded(image)
    except Exception as error:  # a decoder fed with damaged bytes may raise anything
        raise DataError(f"image '{image}': cannot be read: {(str(error) or 'empty').splitlines()[0]}") from None
    result, method = read_learner(run)
    if not hasattr(method, "reasons"):
        raise ConfigError(f"'{run}': {result.method} has no patches to show; spa has")
    prepared = method.towers.prepare(picture)
    reasons = method.reasons(method.towers.pixels(prepared[None]), best)
    for reason in reasons:
        reason["name"] = result.class_order[reason["class"]]
    target = out or Path(f"{image.stem}-reasons.png")
    grid = round(method.towers.patches(method.towers.pixels(prepared[None])).shape[1] ** 0.5)
    patch_figure(np.asarray(prepared.permute(1, 2, 0)), grid, reasons, target)
    write_json(target.with_suffix(".json"), {"image": image.name, "grid": grid, "classes": reasons})
    console = Console()
    for reason in reasons:
        console.note(
            f"{reason['name']}: score {reason['score']:.2f}, class token {reason['global']:.3f}, local {reason['local']:.3f}"
        )
    console.note(f"-> {target}, {target.with_suffix('.json')}")


@app.command()
def table(
    folders: Annotated[list[Path], typer.Argument(help="folders that hold results, at any depth")],
    into: Into = None,
    name: Block = "results",
) -> None:
    """Results (of runs, or of the drift laboratory) as a Markdown table, mean and standard deviation over seeds."""
    from cairn.reports.drift import drift_reports_below, drift_table
    from cairn.reports.tables import markdown_table, results_below

    drifts = drift_reports_below(folders)
    _put(drift_table(drifts) if drifts else markdown_table(results_below(folders)), into, f"table {name}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="folder that holds the results of one method, several seeds")],
    second: Annotated[Path, typer.Argument(help="the same of another, on the same stream")],
    into: Into = None,
    name: Block = "results",
) -> None:
    """What one method gains over another, paired by seed, with a 95 % confidence interval."""
    from cairn.reports.tables import difference_table, results_below

    _put(difference_table(results_below([first]), results_below([second])), into, f"compare {name}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="folders that hold results or drift reports, at any depth")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the page, one HTML file")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="a folder for figures (PNG, SVG) and tables (Markdown, LaTeX, CSV)")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="the method that differences are to  [default: the first found]")
    ] = None,
) -> None:
    """Runs side by side on one page: tables, curves, matrices, costs, settings, and what keeps them from being compared."""
    from cairn.files import make_folder, write_chunks
    from cairn.reports.page import page_of

    page = page_of(runs, reference)
    make_folder(out.parent)
    write_chunks(out, [page.html().encode()])
    written = [] if figures is None else page.write_files(figures)
    Console().note(f"-> {out}" + (f", {len(written)} files in {figures}" if written else ""))


learner_commands.register(app)


def _put(text: str, into: Path | None, block: str) -> None:
    """The text on standard output, or in place of a Markdown file's block."""
    from cairn.reports.tables import replaced_block

    if into is None:
        typer.echo(text)
    else:
        into.write_text(replaced_block(into.read_text(encoding="utf-8"), block, text), encoding="utf-8")


cache_app = typer.Typer(no_args_is_help=True, help="Embeddings of frozen towers, kept by `cairn run --cache`.")
app.add_typer(cache_app, name="cache")


@cache_app.command()
def info() -> None:
    """Where the cache is, what it holds and when that was last used."""
    from datetime import datetime

    from cairn.data.feature_store import FeatureStore

    console, store = Console(), FeatureStore.configured()
    listed = store.listed()
    total, limit = sum(held.bytes for held in listed) / 1e6, store.limit / 1e6
    console.note(f"{store.folder}: {total:.1f} of {limit:.1f} MB")
    if listed:
        rows = [
            (held.data, held.towers, held.kind, str(held.rows), f"{held.bytes / 1e6:.1f}",
             f"{datetime.fromtimestamp(held.used):%Y-%m-%d %H:%M}")
            for held in listed
        ]  # fmt: skip
        console.table("Sets", ("data", "towers", "kind", "rows", "MB", "last used"), rows)


@cache_app.command()
def clear(yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False) -> None:
    """Remove everything that the cache holds."""
    from cairn.data.feature_store import FeatureStore

    store = FeatureStore.configured()
    if not yes:
        typer.confirm(f"remove every set below {store.folder}?", abort=True)
    Console().note(f"{store.folder}: {store.clear() / 1e6:.1f} MB freed")


@app.command()
def serve(
    learner: Annotated[Path, typer.Argument(help="the folder of a learner; what is taught goes there")],
    host: Annotated[str, typer.Option(help="address to listen on; another than this machine's own needs --token")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(envvar="CAIRN_TOKEN", help="what clients have to know to teach  [default: made and printed]"),
    ] = None,
    max_bytes: Annotated[int, typer.Option(min=1000, help="largest picture")] = 10_000_000,
    rate: Annotated[int, typer.Option(min=1, help="requests of one client in a minute")] = 60,
) -> None:
    """A page and an HTTP service: look at pictures, teach new classes, forget old ones."""
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'serve: {error.name} is missing; pip install "cairn[serve]"') from None
    from cairn.serve.app import serve

    console = Console()

    def ready(where: str) -> None:
        console.note(f"open {where}  (to stop: Ctrl-C)")

    serve(learner, host, port, token=token, max_bytes=max_bytes, rate=rate, ready=ready)


@app.command()
def version() -> None:
    """The version of cairn and of what it stands on."""
    from cairn.run import versions

    for package, number in versions().items():
        typer.echo(f"{package} {number}")
