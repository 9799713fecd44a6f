"""A person's pictures that show several things: learned in two weeks from CSVs, told, judged and mended on the command line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cairn import IncrementalClassifier
from cairn.cli.app import main
from cairn.data.attributes import attributes_dataset
from cairn.data.given_pictures import given_pictures
from cairn.errors import CairnError, DataError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """week1.csv and kept.csv, and week2.json in COCO's form, with the pictures that they list."""
    root, data = tmp_path_factory.mktemp("several"), attributes_dataset("dev")
    words = np.argsort(-data.train.targets.sum(0))[:5]

    def written(name, images, rows, columns):
        (root / name).mkdir()
        for row in rows:
            Image.fromarray(images[row]).save(root / name / f"{row}.png")
        return {f"{row}.png": [data.classes[c] for c in words[columns] if images.targets[row, c]] for row in rows}

    for name, images, columns in (("week1", data.train, slice(3)), ("kept", data.test, slice(5))):
        with (root / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", "labels"])
            for shown, own in written(name, images, range(24), columns).items():
                writer.writerow([f"{name}/{shown}", ";".join(own)])
    shown = written("week2", data.train, range(24, 44), slice(5))
    classes = sorted({name for own in shown.values() for name in own})
    coco = {
        "images": [{"id": i, "file_name": f"week2/{name}"} for i, name in enumerate(shown)],
        "annotations": [
            {"image_id": i, "category_id": classes.index(name)} for i, own in enumerate(shown.values()) for name in own
        ],
        "categories": [{"id": c, "name": name} for c, name in enumerate(classes)],
    }
    (root / "week2.json").write_text(json.dumps(coco))
    return root


@pytest.fixture
def cairn(monkeypatch, capsys):
    def call(*words, device=True):
        monkeypatch.setattr("sys.argv", ["cairn", *map(str, words), *(("--device", "cpu") if device else ())])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def shop(pictures, tmp_path_factory):
    """The learner after both weeks."""
    folder, monkeypatch = tmp_path_factory.mktemp("shop") / "shop", pytest.MonkeyPatch()
    for words in (("week1.csv", "--towers", "tiny", "--method", "simplecil"), ("week2.json",)):
        monkeypatch.setattr(
            "sys.argv", ["cairn", "learn", str(folder), str(pictures / words[0]), *words[1:], "--device", "cpu"]
        )
        main()
    monkeypatch.undo()
    return folder


def test_two_weeks_are_learned_from_a_csv_and_coco(shop, pictures, cairn):
    held = IncrementalClassifier.load(shop, device="cpu")
    first, second = given_pictures(pictures / "week1.csv"), given_pictures(pictures / "week2.json")
    labels = sum(map(len, [*first.sets, *second.sets]))
    assert held.counts_.sum() == labels
    assert len(held.classes_) == 5
    status, out, _ = cairn("inspect", shop, device=False)
    assert status == 0
    assert f"5 classes from {labels} labels" in out
    assert "said to be shown from a probability of" in out
    assert f"with {labels - sum(map(len, first.sets))} labels" in cairn("history", shop, device=False)[1]
    status, out, _ = cairn("learn", shop, pictures / "week1.csv")
    assert status == 0
    assert "nothing new" in out


def test_it_tells_sets_of_names(shop, pictures, cairn, tmp_path):
    files = sorted((pictures / "kept").glob("*.png"))[:6]
    held = IncrementalClassifier.load(shop, device="cpu")
    expected = held.predictions(files).sets()
    status, out, _ = cairn("predict", shop, *files, "--json")
    assert status == 0
    told = json.loads(out)
    assert [[one["name"] for one in row["labels"]] for row in told] == [[name for name, _ in own] for own in expected]
    _, out, _ = cairn("predict", shop, *files, "--csv", "--threshold", "0")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 6 * 5
    assert {row["image"] for row in rows} == set(map(str, files))
    _, out, _ = cairn("predict", shop, *files, "--csv", "--threshold", "1")
    assert [row["label"] for row in csv.DictReader(io.StringIO(out))] == [""] * 6
    _, out, _ = cairn("predict", shop, files[0], "--threshold", "1", "--sort-into", tmp_path / "sorted")
    assert "no class (likeliest:" in out
    assert [path.name for path in (tmp_path / "sorted").glob("*/*")] == [files[0].name]
    cairn("predict", shop, files[0], "--threshold", "0", "--sort-into", tmp_path / "all")
    assert len(list((tmp_path / "all").glob("*/*"))) == 5


def test_it_is_judged_on_pictures_kept_aside(shop, pictures, cairn, tmp_path):
    given = given_pictures(pictures / "kept.csv", "test")
    found = IncrementalClassifier.load(shop, device="cpu").evaluate(given.files, given.sets)
    status, out, _ = cairn("evaluate", shop, pictures / "kept.csv", "--json", "--html", tmp_path / "page.html")
    assert status == 0
    assert json.loads(out) == json.loads(json.dumps(found.report()))
    page = (tmp_path / "page.html").read_text()
    assert f"{100 * found.mean_average_precision:.1f} %" in page
    assert "http" not in page
    assert "data:image/jpeg" in page
    _, out, _ = cairn("evaluate", shop, pictures / "kept.csv", "--csv", "--threshold", "0")
    assert [row["recall"] for row in csv.DictReader(io.StringIO(out))] == ["1.000000"] * 5
    _, out, _ = cairn("evaluate", shop, pictures / "kept.csv")
    assert f"mAP {100 * found.mean_average_precision:.1f} %" in out
    assert f"{100 * found.macro_f1:.1f} % over classes (macro)" in out


def test_what_is_for_the_other_kind_is_refused_in_one_line(shop, pictures, cairn, tmp_path):
    for own in range(2):
        folder = tmp_path / "plain" / f"class {own}"
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (20, 20), (100 * own, 40 * i, 9)).save(folder / f"{i}.png")
    one = pictures / "kept" / "0.png"
    assert cairn("learn", tmp_path / "other", tmp_path / "plain", "--towers", "tiny", "--method", "simplecil")[0] == 0
    asked = (
        (("predict", shop, one, "--unknown-below", "0.1"), "give --threshold"),
        (("predict", shop, one, "--threshold", "2"), "--threshold 2.0: must be a number from 0 to 1"),
        (("predict", tmp_path / "other", one, "--threshold", "0.2"), "show one class each"),
        (("evaluate", tmp_path / "other", tmp_path / "plain", "--threshold", "0.2"), "show one class each"),
        (("evaluate", shop, tmp_path / "plain"), "give a list of class names"),
        (("learn", shop, tmp_path / "plain"), "in a CSV a column 'labels'"),
        (("learn", tmp_path / "other", pictures / "week1.csv"), "show one class each"),
        (("learn", shop, pictures / "week1.csv", "--recursive"), "--recursive"),
        (("monitor", shop, one), "may show several classes"),
        (("merge", shop, *IncrementalClassifier.load(shop, device="cpu").classes_[:2]), "may show several classes"),
    )  # fmt: skip
    for words, said in asked:
        status, _, err = cairn(*words)
        assert status == 2, words
        assert said in err, err
        assert len(err.strip().splitlines()) == 1, err


def test_pictures_are_relabelled_and_a_folder_of_both_parts_is_read(shop, pictures, cairn, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(shop, copy)
    names = IncrementalClassifier.load(copy, device="cpu").classes_
    status, out, _ = cairn("relabel", copy, pictures / "week1" / "0.png", f"{names[0]};{names[1]}")
    assert status == 0
    assert "labels" in out
    for name in ("train", "test"):
        shutil.copy(pictures / ("week1.csv" if name == "train" else "kept.csv"), pictures / f"{name}.csv")
    assert len(given_pictures(pictures, "train").files) == 24
    assert given_pictures(pictures, "test").files[0] == pictures / "kept" / "0.png"
    (tmp_path / "labels.csv").write_text("file_name,labels\n../x.png,a\n")
    with pytest.raises(DataError, match="inside it"):
        given_pictures(tmp_path / "labels.csv")
    (tmp_path / "two.csv").write_text("file_name,label,labels\nx.png,a,b;c\n")
    with pytest.raises(DataError, match="columns label and labels; leave the one"):
        given_pictures(tmp_path / "two.csv")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(CairnError, match="COCO"):
        given_pictures(tmp_path / "bad.json")
    assert given_pictures(pictures / "week1.csv").files[0] == Path(pictures, "week1", "0.png")
