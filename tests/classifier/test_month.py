"""A person's month: pictures that grow, repeat, are damaged and mistaken; what is mended equals what never was wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cairn import IncrementalClassifier

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
PICTURES, TOWERS = SHARED / "cifar100" / "train", SHARED / "mini-clip"
COUNTS = {"apple": 14, "beaver": 22, "bottle": 12, "couch": 16, "otter": 18}
"""Unequal, and in the order of the weeks' new classes."""

pytestmark = pytest.mark.skipif(not PICTURES.is_dir(), reason="needs the pictures and towers beside the repository")


def pictures(name, start, stop):
    """Some of a class, shuffled: sorted by name, the last are of another kind than the first."""
    files = sorted((PICTURES / name).iterdir())
    return [files[i] for i in np.random.default_rng(len(name)).permutation(len(files))[start:stop]]


def put(folder, name, files):
    """The files in a folder of that class."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, folder / name)


@pytest.mark.parametrize("method", ["lda"])
def test_a_month_with_mistakes_ends_as_one_without(method, cairn, tmp_path):
    def asked(*arguments):
        status, out, err = cairn(*arguments)
        assert status == 0, err
        return " ".join((out + err).split())

    where = ("--device", "cpu")

    # Week 1: one file is damaged.
    for name in ("apple", "beaver"):
        put(tmp_path / "week-1", name, pictures(name, 0, COUNTS[name] - 4))
    (tmp_path / "week-1" / "apple" / "damaged.png").write_bytes(b"no picture")
    options = ("--method", method, "--towers", TOWERS, "--on-bad-image", "skip")
    said = asked("learn", "shop", "week-1", *options, *where)
    assert "damaged.png" in said
    assert "estimated accuracy" in said
    assert "28 pictures learned" in said

    # Week 2: the folders of week 1 have grown, and there are new ones.
    shutil.copytree(tmp_path / "week-1", tmp_path / "week-2")
    (tmp_path / "week-2" / "apple" / "damaged.png").unlink()
    for name in ("apple", "beaver"):
        put(tmp_path / "week-2", name, pictures(name, COUNTS[name] - 4, COUNTS[name]))
    put(tmp_path / "week-2", "bottle", pictures("bottle", 0, COUNTS["bottle"]))
    assert "20 pictures learned, 1 new class" in asked("learn", "shop", "week-2", *where)

    # Week 3: five otters lie among the beavers, which is noticed afterwards.
    wrong = pictures("otter", 0, 5)
    put(tmp_path / "week-3", "beaver", wrong)
    put(tmp_path / "week-3", "otter", pictures("otter", 5, COUNTS["otter"]))
    asked("learn", "shop", "week-3", *where)
    assert "5 pictures learned as 'otter'" in asked("relabel", "shop", *wrong, "otter", *where)

    # Week 4: a class under two names, a name that is not liked, pictures that should not be there, and a wrong folder.
    put(tmp_path / "week-4", "couch", pictures("couch", 0, 9))
    put(tmp_path / "week-4", "sofa", pictures("couch", 9, COUNTS["couch"]))
    asked("learn", "shop", "week-4", *where)
    asked("merge", "shop", "couch", "sofa", *where)
    asked("rename", "shop", "bottle", "glass bottle", *where)
    asked("unlearn", "shop", *pictures("apple", 0, 3), *where)
    before = IncrementalClassifier.load(tmp_path / "shop")
    put(tmp_path / "holiday", "sea", pictures("sea", 0, 6))
    asked("learn", "shop", "holiday", *where)
    asked("undo", "shop")

    held_out = [file for name in COUNTS for file in pictures(name, 60, 80)]
    learner = IncrementalClassifier.load(tmp_path / "shop")
    np.testing.assert_array_equal(learner.predict_proba(held_out), before.predict_proba(held_out))

    # One that never saw a mistake, and learned everything at once.
    called = {"bottle": "glass bottle"}
    right = [(file, called.get(name, name)) for name, n in COUNTS.items() for file in pictures(name, 0, n)]
    right = [(file, name) for file, name in right if file not in pictures("apple", 0, 3)]
    twin = IncrementalClassifier(method, str(TOWERS), device="cpu").fit(*map(list, zip(*right, strict=True)))
    order = [list(twin.classes_).index(name) for name in learner.classes_]
    assert learner.counts_.tolist() == twin.counts_[order].tolist()
    scores, expected = learner.predictions(held_out).scores, twin.predictions(held_out).scores[:, order]
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-2)
    assert scores.argmax(1).tolist() == expected.argmax(1).tolist()

    # The estimate and the truth, each as sure as its numbers: a wide interval of few pictures must hold the truth.
    names = [called.get(file.parent.name, file.parent.name) for file in held_out]
    truth = learner.evaluate(held_out, names).class_mean_accuracy
    low, high = learner.estimate_.interval
    doubt = 2 * (truth * (1 - truth) / len(held_out)) ** 0.5
    assert low - doubt <= truth <= high + doubt

    done = asked("history", "shop")
    for change in ("taken out again, then", "two classes became one", "a class was renamed", "undone: learning"):
        assert change in done
    assert "no drift found" in asked("monitor", "shop", *held_out, *where)
