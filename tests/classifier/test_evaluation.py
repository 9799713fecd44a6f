"""Evaluations, against scikit-learn; labelled pictures as people have them; the command and its page."""

from __future__ import annotations

import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import classification_report, confusion_matrix, log_loss, top_k_accuracy_score

from cairn import IncrementalClassifier
from cairn.classifier.evaluation import Evaluation
from cairn.classifier.predictions import Predictions
from cairn.cli.app import main
from cairn.data.given_pictures import given_pictures
from cairn.data.labelled import labelled_pictures
from cairn.data.shapes import shapes_dataset
from cairn.errors import DataError, InvalidInput

NAMES = ["owl", "fox", "bear", "elk"]


def made(seed=0, counts=(30, 5, 12, 0), foreign=7):
    """An evaluation of random predictions, right for about half of the images; classes of unequal size, one without images."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(4), counts)
    n = len(y) + foreign
    scores = rng.normal(size=(n, 4)) + 2 * np.eye(4)[np.concatenate([y, np.zeros(foreign, int)])] * rng.random((n, 1))
    scores = torch.tensor(scores)
    known = np.concatenate([rng.uniform(0, 1, len(y)), rng.uniform(0, 0.2, foreign)])
    names = [NAMES[c] for c in y] + ["newt"] * foreign
    order = rng.permutation(n)
    found = Predictions(
        np.array(NAMES, dtype=object),
        scores[order],
        torch.softmax(scores, 1)[order],
        known[order],
        positions=np.arange(n),
    )
    return Evaluation(found, [names[i] for i in order], [f"{i}.png" for i in range(n)], 0.05)


@pytest.mark.parametrize("seed", [0, 1])
def test_figures_are_scikit_learns(seed):
    found = made(seed)
    rows = found.known
    y, p = [found.names[i] for i in rows], found.predictions.probabilities[rows].numpy()
    said = [NAMES[c] for c in found.predicted[rows]]
    report = classification_report(y, said, labels=NAMES, output_dict=True, zero_division=0)
    for one in found.by_class:
        theirs = report[one.name]
        assert (one.precision, one.recall, one.f1, one.support) == pytest.approx(
            (theirs["precision"], theirs["recall"], theirs["f1-score"], theirs["support"])
        )
    assert found.confusion.tolist() == confusion_matrix(y, said, labels=NAMES).tolist()
    numbers = found.labels[rows]
    assert found.accuracy == pytest.approx(np.mean(numbers == found.predicted[rows]))
    assert found.topk(2) == pytest.approx(top_k_accuracy_score(numbers, p, k=2, labels=range(4)))
    assert found.topk(9) == 1.0
    assert found.nll == pytest.approx(log_loss(numbers, p, labels=range(4)))
    recalls = [report[name]["recall"] for name in NAMES[:3]]
    assert found.class_mean_accuracy == pytest.approx(np.mean(recalls))


def test_images_of_other_classes_count_as_unknown_alone():
    found = made()
    assert len(found.known) == 47
    assert found.foreign == {"newt": 7}
    scores = found.predictions.known_scores()
    assert found.found_unknown == pytest.approx(np.mean(scores[found.labels < 0] < 0.05))
    assert found.lost == pytest.approx(np.mean(scores[found.known] < 0.05))
    assert made(foreign=0).found_unknown is None
    with pytest.raises(InvalidInput, match="nothing can be evaluated"):
        _ = made(counts=(0, 0, 0, 0)).accuracy


def test_pairs_name_images_that_are_mixed_up_the_surest_first():
    found = made()
    pairs = found.confused
    assert [pair.images for pair in pairs] == sorted((pair.images for pair in pairs), reverse=True)
    for pair in pairs:
        assert pair.a_as_b == found.confusion[pair.a, pair.b]
        rows = found.examples(pair)
        assert 1 <= len(rows) <= 4
        assert {tuple(sorted((found.labels[i], found.predicted[i]))) for i in rows} == {(pair.a, pair.b)}
        sure = found.predictions.probabilities[rows].amax(1).tolist()
        assert sure == sorted(sure, reverse=True)
    report = json.loads(json.dumps(found.report(2, ["look"])))
    assert report["top2"] == found.topk(2)
    assert report["confused"][0]["advice"] == "look"
    assert "advice" not in report["confused"][1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures of three classes to learn, and others to evaluate on: one damaged, one of a class that is not learned."""
    root, data = tmp_path_factory.mktemp("evaluate"), shapes_dataset()
    for part, images, classes in (("train", data.train, 3), ("test", data.test, 4)):
        for c in range(classes):
            (root / part / data.classes[c]).mkdir(parents=True)
            for i, row in enumerate(np.flatnonzero(images.labels == c)[: 6 - c]):
                Image.fromarray(images[row]).save(root / part / data.classes[c] / f"{i}.png")
    (root / "test" / data.classes[0] / "bad.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def shop(pictures, tmp_path_factory):
    given = labelled_pictures(pictures)
    learner = IncrementalClassifier(towers="tiny", device="cpu").partial_fit(given.files, given.names)
    folder = tmp_path_factory.mktemp("shop") / "shop"
    learner.save(folder)
    return folder


def called(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["cairn", *map(str, words)])
    main()


def test_the_command_tells_what_the_learner_does(shop, pictures, tmp_path, monkeypatch, capsys):
    given = labelled_pictures(pictures, "test")
    found = IncrementalClassifier.load(shop, device="cpu").evaluate(given.files, given.names, on_bad_image="skip")
    called(monkeypatch, "evaluate", shop, pictures, "--json", "--html", tmp_path / "page.html", "--device", "cpu")
    out, err = capsys.readouterr()
    assert json.loads(out)["accuracy"] == pytest.approx(found.accuracy)
    assert json.loads(out)["unknown"]["foreign_labels"] == found.foreign == {shapes_dataset().classes[3]: 3}
    assert "bad.png (not an image)" in err
    page = (tmp_path / "page.html").read_text()
    assert f"{100 * found.accuracy:.1f} %" in page
    assert "http" not in page
    called(monkeypatch, "evaluate", shop, pictures / "test", "--csv", "--device", "cpu")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(row["recall"]) for row in rows] == pytest.approx([one.recall for one in found.by_class])
    called(monkeypatch, "evaluate", shop, pictures, "--device", "cpu")
    out = capsys.readouterr().out
    assert f"accuracy {100 * found.accuracy:.1f} % of 15 pictures" in out
    assert "of classes that were not learned: 3 pictures of 1 label" in out


def test_pictures_that_were_learned_are_told(shop, pictures, tmp_path, monkeypatch, capsys):
    """Figures of them are no figures of new pictures. A copy under another name and label is known, too."""
    called(monkeypatch, "evaluate", shop, pictures / "test", "--device", "cpu")
    assert "WARNING" not in capsys.readouterr().err
    called(monkeypatch, "evaluate", shop, pictures / "train", "--json", "--device", "cpu")
    out, err = capsys.readouterr()
    assert json.loads(out)["learned"] == 15
    assert "WARNING: learned by this learner: 15 of 15 pictures; figures of these say nothing of new ones" in err
    shutil.copytree(pictures / "test", tmp_path / "mixed")
    first, second, *_ = sorted((tmp_path / "mixed").iterdir())
    Image.open(pictures / "train" / first.name / "0.png").save(second / "copy.bmp")
    called(monkeypatch, "evaluate", shop, tmp_path / "mixed", "--device", "cpu")
    assert "WARNING: learned by this learner: 1 of 19 pictures" in capsys.readouterr().err
    given = labelled_pictures(tmp_path / "mixed")
    learner = IncrementalClassifier.load(shop, device="cpu").forget(first.name)
    assert learner.evaluate(given.files, given.names, on_bad_image="skip").learned == 0


def test_a_csv_is_learned_and_evaluated(pictures, tmp_path, monkeypatch, capsys):
    files = sorted((pictures / "train").glob("*/*.png"))
    for name in ("list.csv", "metadata.csv"):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["label", "file_name"])
            writer.writerows([path.parent.name, path] for path in files)
    called(monkeypatch, "learn", tmp_path / "shop", tmp_path / "list.csv", "--towers", "tiny", "--device", "cpu")
    assert "15 pictures learned, 3 new classes" in capsys.readouterr().out.replace("\n", " ")
    called(monkeypatch, "learn", tmp_path / "shop", tmp_path, "--device", "cpu")
    assert "nothing new: 15 pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("file,label\na,b\n", "no column file_name"),
        ("file_name,label\n", "lists no picture"),
        ("file_name,label\na.png,\n", "line 2: a file_name and a label must be there"),
        ("", "no column file_name or label"),
        ("file_name,label\na.png,cat\nb.png,tea, green\n", "line 3: more cells than columns"),
        (
            "file_name;label\na.png;cat\n",
            "no column file_name or label; semicolons stand between its cells: save it with commas",
        ),
        ("label\tfile_name\ncat\ta.png\n", "tabs stand between its cells"),
        ("file,label,x;y\na,b\n", "a first line 'file_name,label' names them"),
        ("file_name,label,label\na.png,cat,dog\n", "2 columns called label; leave one"),
    ],
)
def test_a_csv_that_is_none_is_one_line(text, error, tmp_path):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=error):
        labelled_pictures(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00")
    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    with pytest.raises(DataError, match=r"one.png': a picture, which says not of which class; give a folder"):
        labelled_pictures(tmp_path / "one.png")
    with pytest.raises(DataError, match="not a CSV in UTF-8"):
        labelled_pictures(tmp_path / "list.csv")


def test_a_folder_of_both_parts_gives_the_one_that_is_asked_for(pictures, tmp_path):
    """The test pictures, whatever their folder is called: to be measured on what was learned would flatter."""
    for held in ("test", "val", "validation"):
        root = tmp_path / held
        shutil.copytree(pictures / "train", root / "train")
        shutil.copytree(pictures / "test", root / held)
        files = {part: labelled_pictures(root, part).files for part in ("train", "test")}
        assert {part: {file.relative_to(root).parts[0] for file in files[part]} for part in files} == {
            "train": {"train"},
            "test": {held},
        }
    (tmp_path / "test" / "oak").mkdir()
    found = labelled_pictures(tmp_path / "test")
    assert found.notices == ("not used, beside train/ and test/: oak/",)
    shutil.rmtree(tmp_path / "test" / "test")
    found = labelled_pictures(tmp_path / "test", "test")
    assert "has train/ and no test/ or val/: the pictures of train/ are taken" in found.notices[0]


def test_classes_called_train_and_test_are_classes(pictures, tmp_path):
    for name, source in zip(("bus", "train", "test"), sorted((pictures / "train").iterdir()), strict=True):
        shutil.copytree(source, tmp_path / name)
    for part in ("train", "test"):
        assert {*labelled_pictures(tmp_path, part).names} == {"bus", "train", "test"}


def test_both_parts_with_one_label_beside_each_are_learned_and_evaluated(pictures, tmp_path):
    """Hugging Face's imagefolder: its folders are no classes."""
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        rows = ["file_name,label"]
        for file in sorted((pictures / part).glob("*/*.png")):
            name = f"{file.parent.name} {file.name}"
            shutil.copy(file, tmp_path / part / name)
            rows.append(f"{name},{file.parent.name}")
        (tmp_path / part / "metadata.csv").write_text("\n".join(rows))
    for part in ("train", "test"):
        given, apart = given_pictures(tmp_path, part), labelled_pictures(pictures, part)
        assert given.sets is None
        assert given.names == apart.names
        assert {file.parent for file in given.files} == {tmp_path / part}
