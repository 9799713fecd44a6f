"""The commands that mend a learner."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from cairn.classifier.classifier import IncrementalClassifier
from cairn.cli.app import main
from cairn.data.shapes import shapes_dataset
from cairn.experiment.folder import Lock

DATA = shapes_dataset()


@pytest.fixture
def pictures(tmp_path):
    """Two folders of two classes each, with 5, 3, 4 and 6 pictures."""
    for c, number in enumerate((5, 3, 4, 6)):
        place = tmp_path / ("second" if c > 1 else "first") / f"class {c}"
        place.mkdir(parents=True)
        for i, row in enumerate(np.flatnonzero(DATA.train.labels == c)[:number]):
            Image.fromarray(DATA.train[row]).save(place / f"{i}.png")
    return tmp_path


@pytest.fixture
def cairn(monkeypatch, capsys):
    """A call of the command: what it prints, or as an error its one line on standard error."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["cairn", *map(str, words)])
        try:
            main()
        except SystemExit as stop:
            said = capsys.readouterr().err
            raise RuntimeError(said if (stop.code, said.count("\n")) == (2, 1) else "not one line") from None
        return capsys.readouterr().out

    return call


@pytest.fixture
def shop(pictures, cairn):
    """A learner of both folders, one after the other."""
    how = ["--method", "simplecil", "--towers", "tiny", "--device", "cpu"]
    cairn("learn", pictures / "shop", pictures / "first", *how)
    cairn("learn", pictures / "shop", pictures / "second", "--device", "cpu")
    return pictures / "shop"


def classes(shop):
    return [str(name) for name in IncrementalClassifier.load(shop, device="cpu").classes_]


def test_history_undo_and_rename(shop, cairn):
    shown = cairn("history", shop).splitlines()
    assert [line.split("  ")[-1] for line in shown[:2]] == [
        "2 new classes, 8 images: 'class 0', 'class 1'",
        "2 new classes, 10 images: 'class 2', 'class 3'",
    ]
    assert shown[0].startswith("   1  20")
    assert "`cairn undo` can take back 1 step: 1 earlier state of" in shown[2]
    assert "3 are kept at most" in shown[2]
    assert "'class 1' is called 'teapot' now" in cairn("rename", shop, "class 1", " teapot ", "--device", "cpu")
    assert classes(shop) == ["class 0", "teapot", "class 2", "class 3"]
    assert "undone: renaming a class; 4 classes from 18 images" in cairn("undo", shop)
    assert classes(shop) == ["class 0", "class 1", "class 2", "class 3"]
    assert "undone: learning; 2 classes from 8 images" in cairn("undo", shop)
    assert classes(shop) == ["class 0", "class 1"]
    assert "undone: learning" in cairn("inspect", shop)
    with pytest.raises(RuntimeError, match="no earlier state is there"):
        cairn("undo", shop)
    assert cairn("history", shop).splitlines()[1].endswith("  undone: learning")


def test_merge_unlearn_and_relabel(shop, pictures, cairn):
    first, second = pictures / "first", pictures / "second"
    said = cairn("unlearn", shop, first / "class 0" / "0.png", first / "class 1", "--device", "cpu")
    assert "4 pictures taken out; left: 3 classes from 14 images" in said
    assert "note: class 'class 1': all of its images are taken out, so it is gone" in said
    assert "0 pictures taken out" in cairn("unlearn", shop, first / "class 1", "--as", "class 2", "--device", "cpu")
    said = cairn(
        "relabel", shop, second / "class 2" / "0.png", second / "class 2" / "1.png", "class 3", "--device", "cpu"
    )
    assert "2 pictures learned as 'class 3'; 3 classes from 14 images" in said
    assert "are 'thing' now; left: 2 classes" in cairn(
        "merge", shop, "class 0", "class 3", "--into", "thing", "--device", "cpu"
    )
    held = IncrementalClassifier.load(shop, device="cpu")
    assert dict(zip(held.classes_, held.counts_.tolist(), strict=True)) == {"thing": 12, "class 2": 2}
    told = [line.split("  ")[-1] for line in cairn("history", shop).splitlines()[2:-1]]
    assert told == [
        "4 images taken out again",
        "2 images taken out again, then 0 new classes, more of 1 known one, 2 images: 'thing'",
        "two classes became one: 'class 0' and 'class 3' to 'thing'",
    ]
    assert "undone: merging two classes" in cairn("undo", shop)
    assert "undone: relabelling images" in cairn("undo", shop)
    with pytest.raises(RuntimeError, match="took pictures out, and nothing of them is kept"):
        cairn("undo", shop)


def test_keep_says_how_many_states_stay(shop, pictures, cairn):
    cairn("learn", shop, pictures / "second", "--again", "--keep", "1", "--device", "cpu")
    assert "can take back nothing: 0 earlier states" in cairn("history", shop)
    for words in (["undo", shop], ["learn", shop, pictures / "second", "--keep", "0"]):
        with pytest.raises(RuntimeError, match=r"no earlier state|--keep 0: must be at least 1"):
            cairn(*words)
    cairn("learn", shop, pictures / "second", "--again", "--keep", "2", "--device", "cpu")
    assert "can take back 1 step" in cairn("history", shop)


def test_what_cannot_be_is_one_line_and_changes_nothing(shop, pictures, cairn, tmp_path):
    shutil.copytree(shop, tmp_path / "before")
    for words, said in (
        (("history", pictures / "first"), "no learner there"),
        (("undo", pictures / "nowhere"), "nowhere': no learner there; `cairn learn "),
        (("forget", pictures / "nowhere", "class 1"), "nowhere': no learner there; `cairn learn "),
        (("undo", pictures / "first"), "no learner there"),
        (("rename", shop, "class 9", "x"), "class 'class 9' is not known"),
        (("rename", shop, "class 1", "class 2"), "is there already"),
        (("rename", shop, "class 1", "a\tb"), "control character"),
        (("merge", shop, "class 1", "class 9"), "is not known"),
        (("unlearn", shop, pictures / "nowhere.png"), "cannot be read"),
        (("relabel", shop, "class 1"), "give pictures and behind them"),
        (("unlearn", shop, pictures / "first", "--on-bad-image", "no"), "on-bad-image"),
    ):
        with pytest.raises(RuntimeError, match=said):
            cairn(*words)
    assert sorted(path.name for path in shop.iterdir()) == sorted(p.name for p in (tmp_path / "before").iterdir())


def test_another_process_that_writes_is_waited_for_by_nobody(shop, cairn, monkeypatch):
    """Each takes the lock before anything is read."""
    from filelock import Timeout

    def taken(self, patience=0):
        raise Timeout(str(self.folder))

    monkeypatch.setattr(Lock, "take", taken)
    monkeypatch.setattr(IncrementalClassifier, "load", lambda *_: pytest.fail("read without the lock"))
    for words in (("undo", shop), ("rename", shop, "class 1", "x"), ("merge", shop, "class 1", "class 2")):
        with pytest.raises(Timeout):
            cairn(*words)
