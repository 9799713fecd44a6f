"""The command: parse, call, print. Bad input is one line on standard error and exit status 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from signal import SIGINT
from typing import Annotated, Any

import typer

from cairn.cli import classifier, embed, evaluate, mend, monitor, predict, rank, reproduce, run, sweep
from cairn.cli.collector import end_without_collection, importing
from cairn.cli.output import standard_output
from cairn.cli.run import BadImages, Data, checked, checked_bad_image
from cairn.errors import CairnError, ConfigError, Interrupted, counted, one_line, out_of_memory, printable
from cairn.reports.console import Console
from cairn.storage.distribution import extra_remedy
from cairn.training.distributed import ALONE, World

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A CLIP model learns new classes, task after task, without keeping old images.",
)
for commands in (run, classifier, predict, evaluate, monitor, mend, embed, sweep, reproduce, rank):
    commands.register(app)

Into = Annotated[Path | None, typer.Option(help="a Markdown file; its block 'cairn COMMAND NAME' is replaced")]
Block = Annotated[str, typer.Option(help="name of the block")]


def main() -> None:
    """Entry point of the `cairn` command. Of several processes one tells what went wrong."""
    world = ALONE
    end_without_collection()
    try:
        world = World.launched()
        with standard_output():
            status = app(standalone_mode=False, obj=world)
        if isinstance(status, int):  # what an interrupt is turned into
            if status == 128 + SIGINT:
                raise Interrupted(SIGINT)
            sys.exit(status)
    except Interrupted as error:
        if world.should_report(error):
            print(f"cairn: {error}", file=sys.stderr)
        sys.exit(128 + error.signal)
    except CairnError as error:
        if world.should_report(error):
            print(f"cairn: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # nobody reads on
        sys.exit(1)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        print("cairn: not confirmed; nothing was changed", file=sys.stderr)
        sys.exit(128 + SIGINT)
    except Exception as error:
        told = world.should_report(error)
        if (text := out_of_memory(error)) is not None:
            if told:
                print(f"cairn: {text}", file=sys.stderr)
            sys.exit(2)
        if hasattr(error, "format_message"):  # a usage error of the command line itself
            if told:
                print(f"cairn: {_usage(error)}", file=sys.stderr)
            sys.exit(2)
        if told:
            raise
        sys.exit(1)


def _usage(error: Any) -> str:
    """What is wrong with a command line: the value that does not fit, why, and where the help is."""
    message = error.format_message().rstrip(".").replace("Value error, ", "")
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    given = _given(getattr(parameter, "opts", ()))
    if message.startswith("Invalid value for ") and given is not None:
        reason = message.partition(": ")[2]
        for long, plain in PARSING.items():
            reason = reason.replace(long, plain)
        message = f"{given}: {reason.replace('Input should be', 'must be')}"
    words = context.command_path.split()[1:] if context is not None else []
    if context is not None and context.command_path.startswith("python -m"):
        words = words[2:]
    return one_line(f"{message}; see `{' '.join(['cairn', *words, '--help'])}`")


PARSING = {
    "Input should be a valid integer, unable to parse string as an integer": "must be a whole number",
    "Input should be a valid number, unable to parse string as a number": "must be a number",
}
"""What the parser of the command line says of a value, and what that means."""


def _given(options: Sequence[str]) -> str | None:
    """One of these options with its value, as it was given."""
    words = sys.argv[1:]
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in options:
            return f"{option} {value if equals else words[place + 1]}"
    return None


@app.callback()
def _started(context: typer.Context) -> None:
    if context.obj is not None and context.obj.world_size > 1 and context.invoked_subcommand not in ("run", "embed"):
        raise ConfigError(
            f"cairn {context.invoked_subcommand}: for one process, not for {context.obj.world_size}; start it without torchrun"
        )


SOME = (100, 512, 5000, 3 * 224**2, 768)
"""Classes, numbers per embedding, images and bytes of an image, for which a method's memory is shown."""


def _yes(claim: bool) -> str:
    return "yes" if claim else "no"


@app.command(name="list")
def list_() -> None:
    """List methods, data sets and towers."""
    from cairn.data.catalogue import CATALOGUE
    from cairn.methods.catalogue import METHODS
    from cairn.towers.catalogue import KNOWN

    console = Console()
    columns = ("name", "trains", "keeps", "MB", "exemplars", "uses", "source")
    rows = [
        (
            name,
            entry.card.trains,
            entry.card.keeps,
            f"{entry.card.bytes(*SOME) / 1e6:.1f}",
            _yes(not entry.card.exemplar_free),
            ", ".join(entry.uses),
            entry.card.source,
        )
        for name, entry in METHODS.items()
    ]
    console.table("Methods (MB kept of 100 classes with 50 images each, 512 numbers per embedding)", columns, rows)
    own = [
        ("shapes", "the drawn world: 40 compositions (embedded)"),
        ("attributes", "the drawn world, several classes in an image"),
        ("mosaic=DATA", "2 x 2 grids of a data set's pictures, several classes in an image"),
        ("FOLDER", "train/<class>/* and test/<class>/*, or <class>/*"),
        ("FILE.safetensors", "precomputed embeddings"),
    ]
    console.table("Data", ("name", "what"), own + [(row.key, row.title) for row in CATALOGUE.values()])
    console.table("Towers", ("name", "what"), list(KNOWN.items()))


@app.command()
def explain(method: Annotated[str, typer.Argument(help="a method of `cairn list`")]) -> None:
    """Show a method's source, stages and settings."""
    from cairn.config import settings
    from cairn.methods.catalogue import method_named

    entry, console = method_named(method), Console()
    card = entry.card
    console.note("".join(f"{text}\n\n" for text in (card.title, card.citation) if text).removesuffix("\n"))
    for number, stage in enumerate(card.stages, 1):
        console.note(f"  {number}. {stage}")
    console.note(
        f"\ntrains: {card.trains}; keeps of old classes: {card.keeps}; exemplar-free: {_yes(card.exemplar_free)}"
    )
    console.note(f"uses: {', '.join(entry.uses) or 'images alone'}")
    console.note(
        f"bytes kept: {card.bytes(*SOME) / 1e6:.1f} MB of 100 classes, 50 images each, 512 numbers per embedding"
    )
    console.note(f"file: {entry.build.__module__.replace('.', '/')}.py\n")
    forms = [("Settings (--set key=value)", entry.config())]
    if entry.has_embedding_form:
        forms.append(("Settings on a features file (embedding form)", entry.config.embedding()))
    for title, config in forms:
        rows = [(path, json.dumps(value), text) for path, value, text in settings(config)]
        if rows:
            console.table(title, ("setting", "default", "meaning"), rows)
    console.note("[P] stated by the paper, [K] nearest published practice, [I] ours: see docs/methods.md")


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
    on_bad_image: BadImages = "stop",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be sent, send nothing")] = False,
) -> None:
    """Have a vision language model describe the classes. The key is taken from OPENAI_API_KEY."""
    from cairn.data.descriptions import Descriptions, read_descriptions
    from cairn.data.opening import open_dataset
    from cairn.experiment.describe import DescribeConfig, described, guide_images, request, with_readable
    from cairn.storage.files import make_folder, write_json
    from cairn.towers.catalogue import load_towers
    from cairn.training.context import Log

    near, plus, far = guides.partition("+")
    if not (plus and near.isdecimal() and far.isdecimal()):
        raise ConfigError(f"guides '{guides}': two whole numbers, such as 4+4")
    config = checked(
        DescribeConfig,
        model=model,
        sentences=sentences,
        words=words,
        name_free=not allow_name,
        representative=int(near),
        diverse=int(far),
    )
    checked_bad_image(on_bad_image)
    console = Console()
    dataset = open_dataset(data)
    if dataset.embeddings is not None:
        raise ConfigError(f"data '{data}': holds embeddings, but describe needs images; give a folder of images")
    held = read_descriptions(out) if out.is_file() else Descriptions()
    missing = [name for name in dataset.classes if name not in held.classes]
    console.note(
        f"described in {out}: {len(dataset.classes) - len(missing)} of {counted(len(dataset.classes), 'class')}"
    )
    if not missing:
        return
    dataset = with_readable(dataset, missing, skip=on_bad_image == "skip")
    for notice in dataset.notices:
        console.note(f"note: {notice}")
    chosen = guide_images(dataset, load_towers(towers), missing, config)
    if dry_run:
        for name in missing:
            shown = ", ".join(dataset.train.describe(row) for row in chosen[name])
            size = len(json.dumps(request(dataset, name, chosen[name], config)))
            text = request(dataset, name, [], config)["messages"][0]["content"][0]["text"]
            console.note(f"{name}: {counted(len(chosen[name]), 'image')} ({shown}), {size / 1000:.0f} kB\n  {text}")
        return
    make_folder(out.parent)
    tokens = [0, 0]
    log = Log(keep=console.event)
    for done, found in enumerate(described(dataset, chosen, missing, config, log, base_url=base_url), start=1):
        held = held.model_copy(update={"classes": {**held.classes, found.name: found.description}})
        write_json(out, held.model_dump(mode="json"))
        tokens = [tokens[0] + found.tokens_in, tokens[1] + found.tokens_out]
        console.note(
            f"  {done}/{len(missing)} {found.name}: {found.description.sentences[0]}  [{counted(sum(tokens), 'token')}]"
        )
    left = [name for name in missing if name not in held.classes]
    console.note(f"{counted(len(held.classes), 'class')} in {out}; {counted(tokens[0], 'token')} in, {tokens[1]} out")
    if left:
        raise CairnError(
            f"describe: no description of {counted(len(left), 'class')}: {', '.join(left[:5])}; run it again"
        )


@app.command(hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def explain_image() -> None:
    """Replaced by `cairn predict --explain`."""
    raise ConfigError(
        "explain-image: use `cairn predict RUN/learner IMAGE --explain FOLDER`, which writes the same picture"
    )


@app.command()
def table(
    folders: Annotated[list[Path], typer.Argument(help="folders that hold results, at any depth")],
    into: Into = None,
    name: Block = "results",
) -> None:
    """Print results as a Markdown table. Of runs or of the drift laboratory: mean and standard deviation over seeds."""
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
    """Compare two methods, paired by seed and class order. Prints what one gains over the other, with a 95 % confidence
    interval."""
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
    """Show runs side by side on one page. Tables, curves, matrices, costs, settings, and what keeps them from being
    compared."""
    from cairn.reports.page import page_of
    from cairn.storage.files import make_folder, write_chunks

    page = page_of(runs, reference)
    make_folder(out.parent)
    write_chunks(out, [page.html().encode()])
    written = [] if figures is None else page.write_files(figures)
    Console().note(f"-> {out}" + (f", {counted(len(written), 'file')} in {figures}" if written else ""))


def _put(text: str, into: Path | None, block: str) -> None:
    """The text on standard output, or in place of a Markdown file's block."""
    from cairn.reports.tables import replaced_block
    from cairn.storage.files import read_bytes, write_chunks

    if into is None:
        typer.echo(printable(text))
        return
    try:
        held = read_bytes(into).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--into {into}: not UTF-8 ({error.reason}); save it as such") from None
    write_chunks(into, [replaced_block(held, block, text).encode()])


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
            (
                held.data,
                held.towers,
                held.kind,
                str(held.rows),
                f"{held.bytes / 1e6:.1f}",
                f"{datetime.fromtimestamp(held.used):%Y-%m-%d %H:%M}",
            )
            for held in listed
        ]
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
    max_pixels: Annotated[
        int, typer.Option(min=10_000, help="largest picture of a kind that cannot be decoded at a smaller size")
    ] = 2**24,
    public_url: Annotated[
        str | None, typer.Option(help="where a proxy in front of it is reached, https://...; needs --token")
    ] = None,
    towers: Annotated[str | None, typer.Option(help="where the learner's weights are now, if they moved")] = None,
) -> None:
    """Serve a learner as a page and over HTTP. Look at pictures, teach new classes, forget old ones."""
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"serve: {error.name} is missing; {extra_remedy('serve')}") from None
    with importing():
        from cairn.serve.app import serve

    console = Console()

    def ready(where: str) -> None:
        console.note(f"open {where}  (to stop: Ctrl-C)")

    serve(
        learner,
        host,
        port,
        token=token,
        max_bytes=max_bytes,
        max_pixels=max_pixels,
        public_url=public_url,
        ready=ready,
        towers=towers,
    )


@app.command()
def version() -> None:
    """Print the versions of cairn and its libraries."""
    from cairn.storage.versions import versions

    for package, number in versions().items():
        typer.echo(f"{package} {number}")
