"""The page that compares runs: what stands in it, what it warns of, and that no file can speak through it."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from xml.etree import ElementTree

import pytest
from scipy.stats import ttest_1samp

from cairn.errors import ConfigError, ResultError, UnknownName
from cairn.experiment import schema as runs_of_today
from cairn.experiment.metrics import forgetting, seen_accuracy
from cairn.reports.page import MATRICES, page_of
from cairn.reports.runs import SCHEMA_VERSION, read_results, streams_of

A = [[0.9, None, None], [0.7, 0.8, None], [0.5, 0.7, 0.6]]
SIZES = [20, 20, 10]
MARKUP = "<script>alert(1)</script>"


def result(method="dmc", seed=1, table=A, **changes) -> dict:
    """A result as a run writes it, its figures made from the table of accuracies."""
    tasks = len(table)
    seen = seen_accuracy(table, SIZES)
    made = {
        "schema_version": 1,
        "method": method,
        "exemplar_free": method != "joint",
        "config": {"lr": 0.1, "text": {"kind": "x"}},
        "run": {"method": method, "settings": [], "precision": "float32", "order": "natural", "seed": seed},
        "data": "made",
        "split": "s",
        "towers": {"name": "tiny", "fingerprint": "t", "revision": None},
        "class_order": [f"class {i}" for i in range(2 * tasks)],
        "task_sizes": [2] * tasks,
        "test_sizes": SIZES[:tasks],
        "base": 0,
        "step": 2,
        "seed": seed,
        "accuracy": table,
        "seen_accuracy": seen,
        "seen_accuracy_by_class": seen,
        "future_accuracy": [0.4] * (tasks - 1) + [None],
        "zero_shot_accuracy": [0.3] * tasks,
        "average": mean(seen),
        "last": seen[-1],
        "forgetting": forgetting(table),
        "bwt": None if tasks < 2 else -0.25,
        "seconds": 12.5,
        "seconds_per_task": [4.0] * tasks,
        "resumed": 0,
        "peak_rss_bytes": 5 * 10**8,
        "memory_bytes": 2000,
        "tower_passes": {"images": 100, "text_tokens": 40, "stored": 0},
        "evaluation_passes": {"images": 50, "text_tokens": 9},
        "device": "cpu",
        "versions": {"cairn": "0.1.0", "torch": "2.13"},
    }
    return made | changes


def moved(by: float) -> list:
    return [[None if a is None else a + by for a in row] for row in A]


@pytest.fixture
def stored(tmp_path):
    """Writes results, each to a folder of its own, and returns the folder that holds them."""

    def store(*results: dict, name: str = "result.json") -> Path:
        for content in results:
            number = len(list(tmp_path.glob("runs/*")))
            folder = tmp_path / "runs" / f"{number:02}"
            folder.mkdir(parents=True)
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        return tmp_path / "runs"

    return store


@pytest.fixture
def shown(stored):
    """The page of results, as HTML."""
    return lambda *results: page_of([stored(*results)]).html()


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)))


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


# --- figures and numbers ----------------------------------------------------------------------------------------------


def test_tables_carry_mean_and_deviation_over_seeds(stored, tmp_path):
    shifts = (0.0, 0.02, 0.07)
    page = page_of([stored(*(result(seed=seed, table=moved(by)) for seed, by in enumerate(shifts)))])
    page.write_files(tmp_path / "out")
    # By hand: after each task (0.9), (0.7 + 0.8) / 2, (20 0.5 + 20 0.7 + 10 0.6) / 50
    averages = [100 * ((0.9 + 0.75 + 0.6) / 3 + by) for by in shifts]
    lasts = [100 * (0.6 + by) for by in shifts]
    (row,) = rows_of(tmp_path / "out" / "summary.csv")
    assert float(row["average %"]) == pytest.approx(mean(averages))
    assert float(row["average %, deviation"]) == pytest.approx(stdev(averages))
    assert float(row["last %"]) == pytest.approx(mean(lasts))
    assert float(row["forgetting"]) == pytest.approx(100 * ((0.9 - 0.5) + (0.8 - 0.7)) / 2)
    assert float(row["keeps, kB"]) == 2
    cells = [rf"${mean(values):.2f} \pm {stdev(values):.2f}$" for values in (averages, lasts)]
    assert f"dmc & {' & '.join(cells)} & " in (tmp_path / "out" / "summary.tex").read_text()
    assert f"{mean(averages):.2f} ± {stdev(averages):.2f}" in page.html()


def test_curves_are_given_as_numbers_too(stored, tmp_path):
    page_of([stored(result(), result(seed=2, table=moved(0.02)))]).write_files(tmp_path / "out")
    seen = rows_of(tmp_path / "out" / "seen-accuracy.csv")
    assert [row["by classes seen"] for row in seen] == ["dmc", "towers as they came"]
    assert [float(seen[0][classes]) for classes in "246"] == pytest.approx([91, 76, 61])
    assert [float(seen[1][classes]) for classes in "246"] == pytest.approx([30, 30, 30])
    (future,) = rows_of(tmp_path / "out" / "future-accuracy.csv")
    assert (float(future["2"]), float(future["4"]), future["6"]) == (40, 40, "")
    (cost,) = rows_of(tmp_path / "out" / "cost.csv")
    assert (float(cost["seconds per task"]), float(cost["peak memory, MB"])) == (4, 500)
    assert (float(cost["images learning"]), float(cost["text tokens testing"])) == (100, 9)


def test_the_towers_as_they_came_are_a_line_unless_zero_shot_was_run(shown):
    name = "towers as they came"
    assert text_of(shown(result())).count(name) == 3  # in the legend, on the line, among the numbers
    assert name not in shown(result("zero-shot"))


def test_forgetting_of_tasks_has_forgetting_as_its_mean(stored):
    (stream,) = streams_of(read_results([stored(result(), result(seed=2, table=moved(0.1)))]))
    points = stream.lines[0].forgetting_of_tasks()
    assert [point.mean for point in points] == pytest.approx([0.4, 0.1])
    assert mean(point.mean for point in points) == pytest.approx(forgetting(A))


SECONDS = {"a tenth and more": [0.05, 0.3, 0.4], "less than a tenth": [0.04, 0.03, 0.05], "none": [0.0, 0.0, 0.0]}


@pytest.mark.parametrize("seconds", SECONDS.values(), ids=SECONDS)
def test_seconds_per_task_are_drawn_however_few(seconds, stored, tmp_path):
    """What a run over embeddings made beforehand takes. The line has a point for each task that the caption speaks of."""
    page = page_of([stored(result(seconds_per_task=seconds))])
    page.write_files(tmp_path / "out")
    (row,) = rows_of(tmp_path / "out" / "seconds.csv")
    assert [float(row[task]) for task in "123"] == seconds
    drawn = (tmp_path / "out" / "seconds.svg").read_text()
    line = drawn[drawn.index('<g id="line-') :]
    assert line[: line.index("</g>")].count("<use") == (2 if max(seconds) >= 0.1 else 3)
    assert ("every task took less than a tenth" in text_of(page.html())) == (max(seconds) < 0.1)


def test_a_matrix_is_the_mean_over_seeds(stored):
    (stream,) = streams_of(read_results([stored(result(), result(seed=2, table=moved(0.1)))]))
    assert stream.lines[0].accuracy()[1] == pytest.approx([0.75, 0.85])


def test_differences_are_paired_and_to_the_first_unless_named(stored, tmp_path):
    shifts = (0.010, 0.013, 0.022)
    folder = stored(
        *(result("dmc", seed) for seed in range(3)),
        *(result("spa", seed, moved(by)) for seed, by in enumerate(shifts)),
        result("spa", 9),
    )
    low, high = ttest_1samp([100 * by for by in shifts], 0).confidence_interval(0.95)
    assert f"spa - dmc {1.5:+.2f} [{low:+.2f}, {high:+.2f}]" in text_of(page_of([folder]).html())
    assert f"dmc - spa {-1.5:+.2f} [{-high:+.2f}, {-low:+.2f}]" in text_of(page_of([folder], "spa").html())
    with pytest.raises(UnknownName, match="unknown reference 'spaa': did you mean spa"):
        page_of([folder], "spaa")


def test_without_seeds_in_common_there_is_no_difference(shown):
    assert "Difference to" not in shown(result("dmc", 1), result("dmc", 2), result("spa", 3), result("spa", 4))


def test_the_share_of_waiting_is_read_from_events(stored):
    folder = stored(result())
    epochs = [{"event": "epoch", "seconds": s, "waited": w} for s, w in ((3.0, 1.0), (1.0, 0.0))]
    lines = [*map(json.dumps, epochs), '{"event": "task"}', '{"event": "epoch", "sec', "[]", '{"event": "epoch"}']
    (folder / "00" / "events.jsonl").write_text("\n".join(lines))
    assert read_results([folder])[0]["waiting"] == 0.25
    assert "waiting for data %" in page_of([folder]).html()


def test_one_seed_has_no_deviation_and_one_task_no_forgetting(shown):
    page = text_of(shown(result(table=[[0.9]])))
    assert "One seed only: dmc." in page
    assert "dmc 90.00 90.00 - 2 12 1" in page
    assert "Forgetting of each task" not in page


def test_settings_that_differ_are_marked_and_all_are_listed(shown):
    page = shown(result(), result("spa", config={"lr": 0.2, "text": {"kind": "x"}, "own": 1}))
    assert re.findall(r'<tr class="differs">\s*<th [^>]*>([^<]*)</th>', page)[0] == "lr"
    assert "of 3." in page
    assert "All 3 settings" in page


def test_the_same_call_with_other_settings_is_a_line_of_its_own(stored):
    (stream,) = streams_of(read_results([stored(result(), result(config={"lr": 0.2, "text": {"kind": "x"}}))]))
    assert [line.label for line in stream.lines] == ["dmc [lr=0.1]", "dmc [lr=0.2]"]


def test_two_lines_never_share_a_name(stored):
    changed = {"settings": ["x"], "precision": "float32"}
    (stream,) = streams_of(read_results([stored(result("dmc (x)"), result("dmc", run=changed))]))
    assert [line.label for line in stream.lines] == ["dmc (x)", "dmc (x) (2)"]


def test_many_matrices_are_folded_away(shown):
    assert "matrices</summary>" not in shown(*(result(f"m{i}", table=[[0.5]]) for i in range(MATRICES)))
    assert f"{MATRICES + 1} matrices</summary>" in shown(result("one-more", table=[[0.5]]))


def test_the_same_results_give_the_same_bytes_however_often_they_are_named(stored):
    folder = stored(result(), result(seed=2))
    pages = {page_of(folders).html() for folders in ([folder], [folder, folder / "00"], [folder / "00", folder])}
    assert len(pages) == 1


# --- what it warns of -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"towers": {"fingerprint": "other"}}, "towers"),
        ({"split": "other"}, "split or class order"),
        ({"class_order": [f"class {i}" for i in (1, 0, 2, 3, 4, 5)]}, "split or class order"),
        ({"run": {"settings": [], "precision": "bfloat16"}}, "precision"),
    ],
)
def test_streams_are_told_apart(shown, changes, what):
    page = shown(result("dmc"), result("spa"), result("dmc", **changes))
    assert f"These runs differ in {what}. They are 2 streams" in text_of(page)
    assert [page.count(f'id="part-{number}"') for number in (1, 2, 3)] == [1, 1, 0]


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"method": "joint", "exemplar_free": False}, "Images of old classes are kept by joint."),
        ({"seed": 2, "resumed": 3}, "Cut off and gone on with: dmc, seed 2 (3 times)."),
        ({"seed": 2, "versions": {"cairn": "0.1.0", "torch": "2.14"}}, "differ in versions: torch 2.13 / 2.14."),
    ],
)
def test_what_keeps_numbers_from_being_compared_is_said_loudly(shown, changes, warning):
    assert 'class="warnings"' not in shown(result())
    page = shown(result(**changes))
    assert warning in text_of(page.partition('class="warnings"')[2].partition("</aside>")[0])


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({}, "The same run more than once: dmc, seed 1."),
        ({"method": "spa", "seed": 2}, "Not all means are over the same seeds. dmc: 1; spa: 2."),
        ({"device": "cuda"}, "Not all ran on the same device: cpu, cuda."),
        ({"run": {"template": "a {}."}}, "Not all had the same prompt (None, a {}.)."),
        ({"zero_shot_accuracy": [0.5, 1.0, 1.0], "seed": 2}, "Worse than the towers as they came: dmc (3)."),
    ],
)
def test_what_is_good_to_know_is_said_too(shown, changes, remark):
    assert remark in text_of(shown(result(), result(**changes)))


# --- what it reads ----------------------------------------------------------------------------------------------------


def test_a_result_may_lack_what_older_versions_did_not_write_and_have_more(shown):
    keys = ("method", "data", "split", "towers", "task_sizes", "seed", "seen_accuracy", "average", "last")
    bare = {key: value for key, value in result().items() if key in keys}
    for few in (bare, bare | {"zero_shot_accuracy": [], "future_accuracy": [None] * 3}):
        page = text_of(shown(few | {"invented": {"later": [1]}}))
        assert "dmc 75.00" in page
        assert "classes to come" not in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version 2, this report reads up to 1; use the version that wrote it"),
        ({"seen_accuracy": ["<b>"] * 3}, "seen_accuracy.0: must be a valid number"),
        ({"seen_accuracy": [0.5]}, "seen_accuracy has 1 values for 3 tasks"),
        ({"accuracy": [[0.5]] * 3}, "accuracy, row 0"),
        ({"accuracy": [[None] * 3] * 3}, "accuracy, row 0"),
        ({"future_accuracy": [0.5]}, "future_accuracy has 1 values"),
        ({"average": 1e300}, "average: must be less"),
        ({"task_sizes": []}, "task_sizes: "),
        ({"towers": {}}, "towers.fingerprint: field required"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_file(stored, changes, message):
    folder = stored(result(**changes))
    with pytest.raises(ResultError) as refused:
        page_of([folder])
    assert str(refused.value).startswith(f"'{folder / '00' / 'result.json'}': ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["[]", "1", '"x"', "null", "{", '{"average": NaN}'])
def test_a_file_that_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ResultError, match=r"result\.json': "):
        page_of([tmp_path])


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_what_is_not_installed_is_named(stored, monkeypatch, package):
    folder = stored(result())
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package} is missing; pip install"):
        page_of([folder]).html()


def test_a_folder_without_anything_is_refused(tmp_path):
    with pytest.raises(ResultError, match=r"no result\.json or drift\.json there"):
        page_of([tmp_path])


def test_the_version_that_is_read_is_the_one_that_is_written():
    assert runs_of_today.SCHEMA_VERSION == SCHEMA_VERSION


def drift(**changes) -> dict:
    errors = {"none": 1.0, "local": 0.25, MARKUP: 0.5}
    rows = [
        {
            "estimator": name,
            "task": task,
            "seed": seed,
            "class": label,
            "mean_error": error * task * seed,
            "covariance_error": error,
            "bures_error": error,
        }
        for name, error in errors.items()
        for task in (1, 2)
        for seed in (1, 2)
        for label in (0, 1)
    ]
    relative = [
        {
            "estimator": name,
            "seed": seed,
            "average": 0.75,
            "last": 0.5,
            "mean_error": error,
            "covariance_error": error,
            "bures_error": error,
        }
        for name, error in errors.items()
        for seed in (1, 2)
    ]
    made = {"schema_version": 1, "data": "made:dev", "split": "d", "towers": {"name": "tiny", "fingerprint": "t"}}
    return made | {"seeds": [1, 2], "relative": relative, "rows": rows} | changes


def test_drift_reports_are_drawn_with_or_without_runs(stored, tmp_path):
    folder = stored(drift(), name="drift.json")
    page = page_of([folder])
    assert "Drift on made:dev" in page.html()
    page.write_files(tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "drift-1-made-dev-mean-error.csv")
    # Two classes each, seeds 1 and 2: after task 1 errors 2 and 4, after task 2 errors 4 and 8
    assert [(float(row["1"]), float(row["2"])) for row in rows] == [(3, 6), (0.75, 1.5), (1.5, 3)]
    assert page_of([stored(result())]).html().count("<section") == 2


def test_drift_errors_of_zero_are_drawn(stored, tmp_path):
    """A logarithmic axis has no place for zero."""
    exact = drift()
    for row in exact["rows"]:
        row |= dict.fromkeys(("mean_error", "covariance_error", "bures_error"), 0.0)
    page_of([stored(exact, name="drift.json")]).write_files(tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "drift-1-made-dev-mean-error.csv")
    assert {(float(row["1"]), float(row["2"])) for row in rows} == {(0, 0)}


def test_a_newer_or_damaged_drift_report_is_refused(stored):
    for changes in ({"schema_version": 2}, {"rows": [{"estimator": "none"}]}):
        with pytest.raises(ResultError, match=r"drift\.json': "):
            page_of([stored(drift(**changes), name="drift.json")])


# --- words from files -------------------------------------------------------------------------------------------------


def hostile() -> dict:
    words = f"{MARKUP}\"'><img src=x onerror=alert(1)>$x_1$</title></style>\u202e\x07"
    return result(
        method=f"_{words}",
        exemplar_free=False,
        data=words,
        split=words,
        class_order=[words] * 6,
        device=words,
        towers={"name": words, "fingerprint": words, "revision": words},
        versions={words: words},
        resumed=1,
        config={words: {words: words}},
        run={"settings": [f"a={words}"], "precision": words, "order": words, words: words},
    )


class Tags(HTMLParser):
    """The tags of a page, and the attributes that could run or ask for something."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.suspect = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            asks = name in ("src", "href", "xlink:href") and not (value or "").startswith(
                ("#", "data:image/png;base64,")
            )
            if name.startswith("on") or asks:
                self.suspect.append((tag, name, value))


def test_no_file_speaks_through_the_page(shown):
    page = shown(hostile(), result("joint", exemplar_free=False))
    found = Tags(page)
    assert not found.tags & {"script", "img", "iframe", "object", "link", "base", "form"}
    assert not found.suspect
    assert MARKUP not in page
    assert MARKUP in text_of(page)


def test_names_are_drawn_as_they_are(stored, tmp_path):
    written = page_of([stored(hostile(), result("a$b$"))]).write_files(tmp_path / "out")
    assert {path.parent for path in written} == {tmp_path / "out"}
    drawn = ElementTree.parse(next(path for path in written if path.name.endswith("seen-accuracy.svg")))
    words = "".join(drawn.getroot().itertext())
    assert "_<script>" in words
    assert all(path.stat().st_size > 0 for path in written)
    assert {path.suffix for path in written} == {".png", ".svg", ".md", ".tex", ".csv"}


def test_what_a_font_lacks_is_no_warning(stored, tmp_path):
    """Which would be an error here."""
    page_of([stored(result("方法"), result("метод"))]).write_files(tmp_path / "out")
    assert {*(path.suffix for path in (tmp_path / "out").iterdir())} >= {".png", ".svg"}


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_needs_no_torch(stored, tmp_path):
    folder = stored(result(), result("joint", seed=2))
    code = (
        "import sys\n"
        f"sys.argv = ['cairn', 'report', {str(folder)!r}, '-o', {str(tmp_path / 'sub' / 'r.html')!r}, "
        f"'--figures', {str(tmp_path / 'figures')!r}]\n"
        "from cairn.cli.app import main\n"
        "main()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "sub" / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "figures" / "summary.tex").is_file()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is missing")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_asks_for_nothing_and_nothing_overflows(stored, tmp_path, width):
    browsers = pytest.importorskip("playwright.sync_api")
    long = result(run={"settings": [f"{'very.' * 30}long={'x' * 300}", "lr=0.002"], "precision": "float32"}, seed=2)
    stored(drift(), name="drift.json")
    file = tmp_path / "report.html"
    file.write_text(
        page_of([stored(result(), result(seed=2), result("joint"), long, hostile())]).html(), encoding="utf-8"
    )
    said, asked = [], []
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(file.as_uri())
            page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            heights = page.evaluate(
                "[...document.querySelectorAll('figure > svg')].map(s => s.getBoundingClientRect().height)"
            )
            assert len(heights) > 8
            assert min(heights) > 100
        finally:
            browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
