"""The commands for people with folders of pictures, and the file for places without Python."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import signal
from importlib import resources

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from cairn.classifier.classifier import IncrementalClassifier
from cairn.classifier.onnx import export_onnx
from cairn.cli.app import main
from cairn.data.picture_files import list_folder
from cairn.data.shapes import shapes_dataset
from cairn.errors import ConfigError, ResultError
from cairn.experiment.folder import LOCK, Lock
from cairn.reports import patches
from cairn.storage.archive import Archive
from cairn.training.checkpoint import Checkpoint

QUICK = [
    "--method",
    "dmc-ot",
    "--towers",
    "tiny",
    "--device",
    "cpu",
    "--set",
    "stage1.schedule.epochs=1",
    "--set",
    "stage2.schedule.epochs=1",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two folders with two classes each, and one of test images."""
    root, data = tmp_path_factory.mktemp("pictures"), shapes_dataset()
    for c in range(4):
        for i, row in enumerate(np.flatnonzero(data.train.labels == c)[:8]):
            place = root / ("second" if c > 1 else "first") / data.classes[c]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.train[row]).save(place / f"{i}.png")
        (root / "test").mkdir(exist_ok=True)
        Image.fromarray(data.test[np.flatnonzero(data.test.labels == c)[0]]).save(root / "test" / f"{c}.png")
    return root


def called(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["cairn", *map(str, words)])
    main()


def refused(monkeypatch, capsys, *words):
    with pytest.raises(SystemExit) as stop:
        called(monkeypatch, *words)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


@pytest.fixture
def learner(pictures, tmp_path, monkeypatch, capsys):
    called(monkeypatch, "learn", tmp_path / "shop", pictures / "first", *QUICK)
    called(monkeypatch, "learn", tmp_path / "shop", pictures / "second", "--device", "cpu")
    assert "2 new classes, 4 in all" in capsys.readouterr().out
    return tmp_path / "shop"


def test_learned_twice_predicted_inspected_and_forgotten(learner, pictures, tmp_path, monkeypatch, capsys):
    assert sorted(path.suffix for path in learner.iterdir() if path.name != LOCK)[0] == ".json"
    shutil.copytree(pictures / "second", tmp_path / "copy")
    monkeypatch.chdir(pictures)
    for folder in (pictures / "second", "second", tmp_path / "copy"):
        called(monkeypatch, "learn", learner, folder, "--device", "cpu")
        assert "nothing new: 16 pictures, learned already" in capsys.readouterr().out
    held = IncrementalClassifier.load(learner, device="cpu")
    assert held.counts_.tolist() == [8] * 4

    called(monkeypatch, "predict", learner, pictures / "test", "--topk", "2", "--json", "--device", "cpu")
    rows = json.loads(capsys.readouterr().out)
    held = IncrementalClassifier.load(learner, device="cpu")
    files = sorted((pictures / "test").iterdir())
    assert [row["image"] for row in rows] == [str(file) for file in files]
    assert [row["classes"][0]["name"] for row in rows] == list(held.predict(files))
    assert [len(row["classes"]) for row in rows] == [2] * 4

    called(monkeypatch, "predict", learner, *files, "--csv", "--unknown-below", "1", "--device", "cpu")
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["class"] for line in lines] == list(held.predict(files))
    assert {line["unknown"] for line in lines} == {"True"}

    called(
        monkeypatch,
        "predict",
        learner,
        files[0],
        "--unknown-below",
        "1",
        "--explain",
        tmp_path / "why",
        "--device",
        "cpu",
    )
    assert re.search(r", below 1\); nearest: [\w ]+ \d+\.\d %\n$", capsys.readouterr().out)
    assert json.loads((tmp_path / "why" / "0.json").read_text())["classes"][0]["name"] in held.classes_
    with Image.open(tmp_path / "why" / "0.png") as drawn:
        assert drawn.width > 300

    called(monkeypatch, "inspect", learner)
    card = capsys.readouterr().out
    assert "4 classes from 32 images" in card

    gone = str(held.classes_[0])
    called(monkeypatch, "forget", learner, gone)
    assert "left: 3 classes" in capsys.readouterr().out
    assert gone not in IncrementalClassifier.load(learner, device="cpu").classes_


def test_reasons_of_spa_are_pictures_with_patches(pictures, tmp_path, monkeypatch, capsys):
    words = [
        "--method",
        "spa",
        "--towers",
        "tiny",
        "--device",
        "cpu",
        "--set",
        "schedule.epochs=1",
        "--set",
        "local.patches=8",
    ]
    called(monkeypatch, "learn", tmp_path / "spa", pictures / "first", *words)
    called(
        monkeypatch,
        "predict",
        tmp_path / "spa",
        pictures / "test" / "0.png",
        "--explain",
        tmp_path / "why",
        "--device",
        "cpu",
    )
    told = json.loads((tmp_path / "why" / "0.json").read_text())
    assert len(told["classes"][0]["patches"]) == 8
    assert "a photo of a" in told["classes"][0]["patches"][0]["sentence"]
    assert (tmp_path / "why" / "0.png").stat().st_size > 5000


def test_a_learner_or_a_run_among_the_pictures_is_no_class(pictures, tmp_path, cairn):
    root = tmp_path / "pictures"
    shutil.copytree(pictures / "first", root)
    call = ["learn", root / "shop.cairn", root, "--method", "simplecil", "--towers", "tiny", "--device", "cpu"]
    assert cairn(*call)[0] == 0
    (root / "shop.cairn" / LOCK).write_text("")
    shutil.copytree(pictures / "second", root, dirs_exist_ok=True)
    status, out, err = cairn(*call)
    assert status == 0, err
    assert "16 pictures learned, 2 new classes, 4 in all" in out
    run = ["run", "simplecil", "--data", root, "--towers", "tiny", "--device", "cpu", "--step", 2]
    assert cairn(*run, "--out", root / "run")[0] == 0
    status, _, err = cairn(*run, "--out", tmp_path / "again")
    assert status == 0, err
    assert list_folder(root).folders == sorted(
        path.name for path in [*(pictures / "first").iterdir(), *(pictures / "second").iterdir()]
    )
    Image.new("RGB", (8, 8)).save(root / "run" / "0.png")  # what has pictures is a class, whatever it is called
    assert "run" in list_folder(root).folders


def test_learn_says_how_it_goes_on_and_what_is_stored(pictures, tmp_path, monkeypatch, capsys):
    words = ["learn", tmp_path / "learner", pictures / "first", *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "step", lambda self, name, state: (self.stop(signal.SIGINT), self.poll()))
        with pytest.raises(SystemExit) as stop:
            called(patch, *words)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "cairn: interrupted (Ctrl-C); the same call goes on where it was\n"
    called(monkeypatch, *words)
    assert re.search(
        r": 16 pictures learned, 2 new classes, 2 in all; [\d.]+ kB of statistics, no picture is stored",
        capsys.readouterr().out.replace("\n", " ").strip(),
    )


def test_work_that_a_kill_left_goes_with_the_next_call_and_unfinished_work_stays(pictures, tmp_path, monkeypatch):
    class Cut(BaseException): ...

    def cut(self, *words):
        raise Cut

    learner = tmp_path / "learner"
    words = ["learn", learner, pictures / "first", *QUICK, "--checkpoint-seconds", 0]
    with monkeypatch.context() as patch:
        patch.setattr(Archive, "clear", cut)
        with pytest.raises(Cut):
            called(patch, *words)
    assert list(learner.glob("work-*"))
    called(monkeypatch, *words)
    assert not list(learner.glob("work-*"))
    with monkeypatch.context() as patch:
        patch.setattr(IncrementalClassifier, "save", cut)
        with pytest.raises(Cut):
            called(patch, "learn", learner, pictures / "second", "--checkpoint-seconds", 0)
    unfinished = sorted(learner.glob("work-*"))
    assert unfinished
    called(monkeypatch, *words)
    assert sorted(learner.glob("work-*")) == unfinished


@pytest.mark.parametrize(("form", "printed"), [((), 2), (("--csv",), 2), (("--json",), 2), (("--jsonl",), 2)])
def test_an_interrupted_predict_says_how_far_it_came(learner, pictures, monkeypatch, capsys, form, printed):
    def third(text):
        if str(pictures / "test" / "2.png") in text:
            raise KeyboardInterrupt
        return text

    monkeypatch.setattr("cairn.cli.predict.one_line", third)
    monkeypatch.setattr("cairn.cli.predict._json", lambda row: third(json.dumps(row)))
    monkeypatch.setattr("cairn.cli.predict._ascii_where_unseen", third)
    with pytest.raises(SystemExit) as stop:
        called(monkeypatch, "predict", learner, pictures / "test", *form, "--device", "cpu")
    out, err = capsys.readouterr()
    assert stop.value.code == 130
    assert err == f"cairn: interrupted (Ctrl-C); answered: {printed} of 4 images\n"
    assert out.count(".png") == printed


def test_an_interrupt_while_reasons_are_written(learner, pictures, tmp_path, monkeypatch, capsys):
    bar_figure = patches.bar_figure

    def interrupted(image, reasons, path):
        if path.name == "3.png":
            raise KeyboardInterrupt
        bar_figure(image, reasons, path)

    monkeypatch.setattr(patches, "bar_figure", interrupted)
    why = tmp_path / "why"
    with pytest.raises(SystemExit) as stop:
        called(monkeypatch, "predict", learner, pictures / "test", "--explain", why, "--device", "cpu")
    assert stop.value.code == 130
    assert f"interrupted (Ctrl-C); answered: 4 of 4 images, explained in '{why}': 3" in capsys.readouterr().err
    assert len(list(why.glob("*.json"))) == 3


def test_an_interrupt_of_any_command_is_one_line(learner, monkeypatch, capsys):
    monkeypatch.setattr("cairn.classifier.card.card", lambda record: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stop:
        called(monkeypatch, "inspect", learner)
    assert stop.value.code == 130
    assert capsys.readouterr() == ("", "cairn: interrupted (Ctrl-C)\n")


def test_one_is_told_as_one(pictures, tmp_path, monkeypatch, capsys):
    name = next((pictures / "first").iterdir()).name
    (tmp_path / "new" / name).mkdir(parents=True)
    shutil.copy(pictures / "first" / name / "0.png", tmp_path / "new" / name)
    words = ("learn", tmp_path / "one", tmp_path / "new", *QUICK)
    called(monkeypatch, *words)
    assert "1 picture learned, 1 new class, 1 in all" in " ".join(capsys.readouterr().out.split())
    called(monkeypatch, *words)
    assert "nothing new: 1 picture, learned already" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "new" / name / "bad.png").write_bytes(b"no image")
    assert "--on-bad-image skip" in refused(monkeypatch, capsys, *words)


def test_bad_calls_are_one_line(learner, pictures, tmp_path, monkeypatch, capsys):
    for words, part in (
        (["learn", learner, pictures / "first", "--method", "spa"], "--method: spa is asked for, but"),
        (["learn", learner, pictures / "first", "--seed", "7"], "was made with 1; leave it out"),
        (["learn", learner, pictures / "first", "--template", "a {}"], "--template: 'a {}' is asked for"),
        (["learn", learner, pictures / "first", "--towers", "other/clip"], "'other/clip' is no folder"),
        (
            ["learn", learner, pictures / "first", "--set", "stage2.schedule.epochs=3"],
            "--set stage2.schedule.epochs: 3 is asked for, but the learner that is there was made with 1",
        ),
        (["learn", tmp_path / "new", pictures / "first", "--towers", "tiny", "--method", "joint"], "cannot be saved"),
        (["learn", tmp_path / "new", tmp_path / "nowhere"], "no such folder"),
        (["learn", tmp_path / "new", pictures / "test", *QUICK], "no class found"),
        (["learn", tmp_path / "new", pictures / "first", "--towers", "tiny", "--set", "epochs"], "must be key=value"),
        (["predict", learner, tmp_path / "nowhere.png"], "cannot be read"),
        (["predict", learner, pictures / "test", "--json", "--csv"], "--json and --csv: give only one of them"),
        (["predict", learner, pictures / "test", "--topk", "0"], "at least 1"),
        (
            ["predict", learner, pictures / "test", "--unknown-below", "5"],
            "--unknown-below 5.0: must be a number from 0",
        ),
        (["predict", learner, pictures / "test", "--unknown-below", "nan"], "must be a number from 0 to 1"),
        (["predict", learner, pictures / "test", "--unknown-below=-1"], "must be a number from 0 to 1"),
        (["predict", tmp_path / "new", pictures / "test"], "no learner there"),
        (["inspect", tmp_path / "new"], "no learner there"),
        (["forget", learner, "a unicorn"], "is not known"),
    ):
        assert part in refused(monkeypatch, capsys, *words)
    assert not (tmp_path / "new").exists()


def test_options_that_say_what_the_learner_has_are_taken(learner, pictures, monkeypatch, capsys):
    """The creating call may be repeated, with options that equal the defaults as well."""
    same = ["--method", "dmc-ot", "--seed", "1", "--template", "a photo of a {}.", "--set", "stage2.real_share=null"]
    called(monkeypatch, "learn", learner, pictures / "first", *QUICK, *same)
    assert "already" in capsys.readouterr().out


def test_what_is_learned_on_is_read_under_the_lock(learner, pictures, monkeypatch, capsys):
    """Read before, it could be what another process has changed since."""
    plain, held = IncrementalClassifier.load, []

    def load(folder, *rest, **how):
        held.append((folder / LOCK).read_text())
        return plain(folder, *rest, **how)

    monkeypatch.setattr(IncrementalClassifier, "load", load)
    called(monkeypatch, "learn", learner, pictures / "second", "--device", "cpu")
    called(monkeypatch, "forget", learner, plain(learner, device="cpu").classes_[0])
    assert all(text.startswith("process ") for text in held)
    assert len(held) == 2


def test_one_process_learns_at_a_time(learner, pictures, monkeypatch, capsys):
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from cairn.experiment.folder import Lock; "
        "held = Lock(Path(sys.argv[1])).take(); print(1, flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(learner)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "1\n"
        assert "is being written by" in refused(
            monkeypatch, capsys, "learn", learner, pictures / "first", "--again", "--device", "cpu"
        )
    finally:
        other.communicate("\n")
    Lock(learner).take().release()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dmc-ot", {"stage1.schedule.epochs": 1, "stage2.schedule.epochs": 1}),
        ("dmc", {"stage1.tuning": "adapter", "stage1.schedule.epochs": 1, "stage2.schedule.epochs": 1}),
        ("finetune", {"stage1.schedule.epochs": 1}),
        ("simplecil", {}),
        ("zero-shot", {}),
        ("spa", {"local.weight": 0, "schedule.epochs": 2}),
    ],
)
def test_onnx_scores_are_the_learners(method, settings, pictures, tmp_path, towers):
    """On a hundred images, within 1e-4 of the largest score; class names and preprocessing travel with the file."""
    data = shapes_dataset()
    rows = [row for c in range(4) for row in np.flatnonzero(data.train.labels == c)[:6]]
    learner = IncrementalClassifier(method, towers, settings=settings)
    learner.partial_fit([data.train[i] for i in rows], [data.classes[data.train.labels[i]] for i in rows])
    assert export_onnx(learner, tmp_path / "m.onnx").difference < 1e-4
    images = [data.test[i] for i in range(100)]
    pixels = towers.pixels(torch.stack([towers.prepare(image) for image in images]))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"pixels": pixels.numpy()})[0]
    expected = learner.predictions(images).scores.numpy()
    assert np.abs(found - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["cairn.classes"]) == list(learner.classes_)
    assert json.loads(about["cairn.preprocessing"])["size"] == pixels.shape[-1]


def test_what_is_not_exported_is_said(towers, tmp_path, monkeypatch):
    data = shapes_dataset()
    learner = IncrementalClassifier("spa", towers, settings={"schedule.epochs": 1})
    with pytest.raises(ConfigError, match="nothing was learned yet"):
        export_onnx(learner, tmp_path / "m.onnx")
    learner.partial_fit([data.train[0], data.train[200]], ["a", "b"])
    with pytest.raises(ConfigError, match=r"local\.weight: the scores of patches .*set local\.weight=0"):
        export_onnx(learner, tmp_path / "m.onnx")
    plain = IncrementalClassifier("simplecil", towers).partial_fit([data.train[0], data.train[200]], ["a", "b"])
    monkeypatch.setattr("cairn.classifier.onnx.TOLERANCE", -1.0)
    with pytest.raises(ResultError, match="nothing was kept"):
        export_onnx(plain, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_that_moved_can_be_given_to_every_command(pictures, tmp_path, monkeypatch, capsys):
    """As whatever was learned on a relative path and is asked from another folder."""
    tiny = resources.files("cairn.towers").joinpath("tiny")
    shutil.copytree(str(tiny), tmp_path / "here")
    learner, first = tmp_path / "learner", pictures / "first"
    called(
        monkeypatch, "learn", learner, first, "--method", "simplecil", "--towers", tmp_path / "here", "--device", "cpu"
    )
    (tmp_path / "here").rename(tmp_path / "there")
    name = next(first.iterdir()).name
    calls = [
        ("predict", learner, pictures / "test"),
        ("learn", learner, first),
        ("export", learner, "--onnx", tmp_path / "x.onnx"),
        ("serve", learner),
        ("forget", learner, name),
        ("rename", learner, name, "x"),
    ]
    for words in calls:
        assert "say where they are now with --towers" in refused(monkeypatch, capsys, *words)
    asked = []
    monkeypatch.setattr(IncrementalClassifier, "load", lambda *given: asked.append(given[1]) or pytest.fail("enough"))
    for words in calls:
        with pytest.raises(pytest.fail.Exception, match="enough"):
            called(monkeypatch, *words, "--towers", tmp_path / "there")
    assert asked == [str(tmp_path / "there")] * len(calls)
    monkeypatch.undo()
    called(monkeypatch, "forget", learner, name, "--towers", tmp_path / "there")
    capsys.readouterr()
    called(monkeypatch, "predict", learner, pictures / "test", "--device", "cpu")  # from now on it is known
    assert name not in capsys.readouterr().out


def test_pictures_without_labels_are_learned_from(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = shapes_dataset()
    (tmp_path / "unsorted" / "june").mkdir(parents=True)
    for c in range(2):
        for row in np.flatnonzero(data.train.labels == c)[7:10]:  # the first is in a folder of its class as well
            Image.fromarray(data.train[row]).save(tmp_path / "unsorted" / "june" / f"{row}.png")
    (tmp_path / "unsorted" / "notes.txt").write_text("no picture")
    call = ["learn", "held.cairn", pictures / "first", "--method", "blend", "--towers", "tiny", "--device", "cpu"]
    called(monkeypatch, *call, "--unlabelled", "unsorted")
    told = "".join(capsys.readouterr())
    assert "passed over: 1 .txt" in told
    assert "left out: 2 of 6 images without labels, known with one or given twice" in told
    called(monkeypatch, "history", "held.cairn")
    assert "4 images without label beside" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        called(monkeypatch, *call, "--unlabelled", "nowhere")
    assert "pictures without labels 'nowhere': no such folder" in "".join(capsys.readouterr())
