"""What a run of `segment` leaves is a learner that says where things are: asked, drawn, on the page and in the report."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cairn import IncrementalClassifier
from cairn.cli.app import app
from cairn.data.shapes import shapes_dataset
from cairn.errors import ConfigError, ResultError
from cairn.reports.runs import read_results
from cairn.serve.service import Service

CALL = ("--step", "20", "--limit-train", "4", "--limit-test", "1", "--device", "cpu")


def called(*words):
    ended = CliRunner().invoke(app, [*map(str, words)])
    assert ended.exit_code == 0, ended.output
    return ended.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmented") / "run"
    called("run", "segment", *CALL, "--keep-learner", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def learner(run):
    return IncrementalClassifier.load(run / "learner", device="cpu")


def test_a_learner_says_where_a_class_is(learner):
    scenes = shapes_dataset().test
    rows = range(0, len(scenes), 50)
    masks = learner.segment([scenes[row] for row in rows], side=56)
    assert masks.shape == (len(rows), 56, 56)
    assert masks.max() <= 40
    both = [((mask > 0) & scenes.mask(row)).sum() for mask, row in zip(masks, rows, strict=True)]
    either = [((mask > 0) | scenes.mask(row)).sum() for mask, row in zip(masks, rows, strict=True)]
    assert sum(both) / sum(either) > 0.4  # all of a picture: .21


def test_the_command_draws_it(run, tmp_path):
    Image.fromarray(shapes_dataset().test[0]).save(tmp_path / "scene.png")
    called("predict", run / "learner", tmp_path / "scene.png", "--explain", tmp_path / "why")
    told = json.loads((tmp_path / "why" / "scene.json").read_text())
    assert told["classes"][0]["name"]
    assert 0 < sum(one["share"] for one in told["regions"]) < 1
    with Image.open(tmp_path / "why" / "scene.png") as drawn:
        assert drawn.width > 600


def test_the_report_has_pictures_with_both_masks(run, tmp_path):
    pictures = json.loads((run / "segmented.json").read_text())["pictures"]
    assert len(pictures) == 8
    assert all([*one["panels"]] == ["picture", "found", "true"] for one in pictures)
    assert all(one["class"] in {region["name"] for region in one["regions"] if region["true"]} for one in pictures)
    called("report", run, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Where it finds what" in page
    assert page.count('<img src="data:image/png;base64,') == 24
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_bytes((run / "result.json").read_bytes())
    assert read_results([tmp_path / "run"])[0]["segmented"] == []
    pictures[0]["panels"]["found"] = "https://example.org/x.png"
    (tmp_path / "run" / "segmented.json").write_text(json.dumps({"schema_version": 1, "pictures": pictures}))
    with pytest.raises(ResultError, match="panels"):
        read_results([tmp_path / "run"])


def test_the_service_tells_where_it_is(run, learner, tmp_path):
    Image.fromarray(shapes_dataset().test[0]).save(tmp_path / "scene.png")
    with open(tmp_path / "scene.png", "rb") as file:
        told = Service(run / "learner", learner).predict(file, 3)
    assert told["objects"]["mask"].startswith("data:image/png;base64,")
    assert 0 < sum(one["share"] for one in told["objects"]["regions"]) < 1


def test_a_run_with_a_cache_keeps_the_same_pictures(run, tmp_path, monkeypatch):
    monkeypatch.setenv("CAIRN_CACHE", str(tmp_path / "cache"))
    called("run", "segment", *CALL, "--cache", "--out", tmp_path / "run")
    own, cached = (json.loads((folder / "segmented.json").read_text()) for folder in (run, tmp_path / "run"))
    assert [one["panels"]["true"] for one in own["pictures"]] == [one["panels"]["true"] for one in cached["pictures"]]


def test_evaluate_takes_masks(run, learner, tmp_path):
    scenes, names = shapes_dataset().test, learner.classes_
    for row in (0, 25, 500):
        for part, image in (("pictures", scenes[row]), ("masks", scenes.mask(row).astype(np.uint8) * 255)):
            folder = tmp_path / part / shapes_dataset().classes[scenes.labels[row]]
            folder.mkdir(parents=True)
            Image.fromarray(image).save(folder / f"{row}.png")
    words = ("evaluate", run / "learner", tmp_path / "pictures", "--masks", tmp_path / "masks")
    told = json.loads(called(*words, "--json", "--html", tmp_path / "page.html"))
    masks = learner.segment([scenes[row] for row in (0, 25, 500)], side=56)
    right = shown = 0
    for row, found in zip((0, 25, 500), masks, strict=True):
        right += int(((found == 0) & ~scenes.mask(row)).sum())
        shown += int(((found == 0) | ~scenes.mask(row)).sum())
    assert told["objects"]["images"] == 3
    assert told["objects"]["background"] == pytest.approx(right / shown)
    assert {*told["objects"]["classes"]} <= {*names}
    assert (tmp_path / "page.html").read_text().count("data:image/png;base64,") == 9
    one = tmp_path / "masks" / shapes_dataset().classes[scenes.labels[0]] / "0.png"
    with Image.open(one) as mask:
        mask.resize((112, 112)).save(one)
    assert json.loads(called(*words, "--json"))["objects"]["background"] == pytest.approx(right / shown, abs=0.02)
    with Image.open(one) as mask:
        mask.resize((112, 56)).save(one)  # of a picture that was turned, say
    ended = CliRunner().invoke(app, [*map(str, words)])
    assert "112 x 56 for a picture of 56 x 56" in str(ended.exception)
    one.unlink()
    ended = CliRunner().invoke(app, [*map(str, words)])
    assert "each picture needs one" in str(ended.exception)
    picture = next((tmp_path / "pictures").rglob("0.png"))
    (tmp_path / "list.csv").write_text(f"file_name,label\n{picture},{picture.parent.name}\n")
    (tmp_path / "lists").mkdir()
    (tmp_path / "list.csv").rename(tmp_path / "lists" / "list.csv")
    ended = CliRunner().invoke(app, [*map(str, (*words[:2], tmp_path / "lists" / "list.csv", *words[3:]))])
    assert "so no mask is called as it" in str(ended.exception)


def test_what_cannot_tell_says_so_in_one_line(towers):
    picture = np.zeros((56, 56, 3), dtype=np.uint8)
    for method in ("simplecil", "segment"):  # of pictures without masks every patch is the object's
        learner = IncrementalClassifier(method, towers)
        learner.partial_fit([picture, picture + 255], ["night", "day"])
        with pytest.raises(ConfigError, match="only one of method 'segment' that has learned from masks") as found:
            learner.segment(picture)
        assert "\n" not in str(found.value)
    with pytest.raises(ConfigError, match="were not asked for"):
        learner.predictions([picture]).masks(56)
    assert learner.segment([]).shape == (0, 224, 224)
