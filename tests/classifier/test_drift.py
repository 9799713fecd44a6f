"""Drift of new pictures: rates where nothing has changed, what is found where something has, and what the history keeps of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from cairn import IncrementalClassifier
from cairn.classifier.drift import ClassShift, Drift
from cairn.data.shapes import shapes_dataset
from cairn.errors import ConfigError, InvalidInput, ResultError
from cairn.maths.shrinkage import Oas

NAMES = ["owl", "fox", "bear", "elk"]


def rows_of(seed, counts, shift=0.0, scale=1.0, d=24):
    """Four classes on the sphere, scattering alike; with `shift` all classes move along one direction."""
    means = np.random.default_rng(0).normal(size=(4, d)) * 1.5
    mixing = np.random.default_rng(1).normal(size=(d, d)) * 0.25
    rng = np.random.default_rng(seed + 100)
    y = np.repeat(np.arange(4), counts)
    x = means[y] + scale * rng.normal(size=(len(y), d)) @ mixing.T
    x[:, 0] += shift
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), [NAMES[c] for c in y]


def learned(seed=0, method="lda", counts=(60, 25, 40, 80)):
    return IncrementalClassifier(method, "rows").fit(*rows_of(seed, counts))


def test_values_from_their_definitions():
    learner = learned()
    x, _names = rows_of(1, (30, 4, 20, 50), shift=0.4)
    found = learner.drift(x)
    predictions = learner.predictions(x, known=True)
    known, said = predictions.known_scores(), predictions.labels(None)
    assert (found.images, found.below) == (len(x), int((known < 0.05).sum()))
    m = len(learner.references_)
    r = int(np.ceil(0.05 * m))
    assert found.p_below == pytest.approx(stats.betabinom.sf(found.below - 1, len(x), r, m + 1 - r))
    low, high = stats.binomtest(found.below, len(x)).proportion_ci(method="wilson")
    assert found.interval == pytest.approx((low, high), abs=1e-3)
    counts = {name: int((said == name).sum()) for name in NAMES}
    assert {one.name: one.images for one in found.shifts} == {name: n for name, n in counts.items() if n >= 5}
    memory = learner.method_.memory
    bear = next(one for one in found.shifts if one.name == "bear")
    gap = torch.tensor(x[said == "bear"]).double().mean(0) - memory.means[2]
    N, d = int((memory.counts - 1).sum()), 24
    V, r = Oas()(memory.scatter / N, torch.tensor(N)), 1 / (1 + (N / d) ** 2)
    W = (1 - r) * V + r * V.trace() / d * torch.eye(d).double()
    assert bear.shift == pytest.approx(float(gap @ torch.linalg.solve(W, gap)) ** 0.5)


@pytest.mark.parametrize("method", ["lda", "blend"])
def test_it_is_told_where_something_has_changed_and_seldom_where_nothing_has(method):
    learner = learned(method=method)
    same = [learner.drift(rows_of(seed, (30, 20, 25, 40))[0]).drifted for seed in range(1, 21)]
    assert sum(same) <= 2
    moved = [learner.drift(rows_of(seed, (30, 20, 25, 40), shift=2.5)[0]) for seed in range(1, 6)]
    assert all(found.shifted for found in moved)
    wider = [learner.drift(rows_of(seed, (30, 20, 25, 40), scale=2.5)[0]) for seed in range(1, 6)]
    assert all(found.p_below < 0.01 for found in wider)


def test_the_decision():
    shift = lambda name, p: ClassShift(name=name, images=9, shift=1.0, by_chance=0.5, p=p)  # noqa: E731
    quiet = Drift(images=100, below=5, p_below=0.5, shifts=[shift("a", 0.0051), shift("b", 0.9)])
    assert not quiet.drifted
    assert quiet.told == "5 % of 100 below 0.05, 0 of 2 classes shifted"
    moved = Drift(images=100, below=5, p_below=0.5, shifts=[shift("a", 0.0049), shift("b", 0.9), shift("c", 0.003)])
    assert [one.name for one in moved.shifted] == ["c"]
    assert moved.drifted
    assert Drift(images=100, below=15, p_below=0.001).drifted


def test_refused_where_nothing_is_kept_that_tells():
    learner = learned(method="simplecil")
    with pytest.raises(
        ConfigError, match=r"keeps no means and covariances of its classes; those that do: .*blend.*lda"
    ):
        learner.drift(rows_of(1, (5, 5, 5, 5))[0])
    with pytest.raises(InvalidInput, match="no image given"):
        learned().drift([])


@pytest.fixture(scope="module")
def world():
    """Pictures of three classes and their names, in three parts."""
    data = shapes_dataset()
    rows = [np.flatnonzero(data.train.labels == c) for c in range(3)]
    part = lambda a, b: [(data.train[i], data.classes[c]) for c in range(3) for i in rows[c][a:b]]  # noqa: E731
    return part(0, 20), part(20, 35), part(35, 45)


def learn(learner, pairs):
    return learner.partial_fit(*map(list, zip(*pairs, strict=True)))


@pytest.mark.parametrize("method", ["lda", "blend"])
def test_what_is_learned_of_known_classes_is_compared_with_what_was(world, method, tmp_path):
    first, second, third = world
    learner = learn(IncrementalClassifier(method, "tiny"), first)
    names = list(map(str, learner.classes_))
    assert "drift" not in learner.history_[-1]
    images, labels = map(list, zip(*second, strict=True))
    known = learner.known_score(images)
    learn(learner, [*second, *[(255 - image, "dark") for image, _ in third]])
    found = Drift.model_validate(learner.history_[-1]["drift"])
    assert (found.images, found.below) == (len(second), int((known < 0.05).sum()))
    assert [(one.name, one.images) for one in found.shifts] == [(name, labels.count(name)) for name in names]
    assert not found.drifted
    learn(learner, [(image // 2 + 100, name) for image, name in third])
    assert Drift.model_validate(learner.history_[-1]["drift"]).shifted
    assert "classes shifted" in learner_told(learner, tmp_path)

    # a class's name goes and changes there too
    learner.rename(names[0], "renamed")
    learner.merge(names[1], "dark")
    learner.forget(names[2])
    left = {one["name"] for entry in learner.history_ if "drift" in entry for one in entry["drift"]["shifts"]}
    assert left == {"renamed", names[1]}
    learner.save(tmp_path / "again")
    assert IncrementalClassifier.load(tmp_path / "again").history_ == learner.history_
    assert names[2] not in (tmp_path / "again" / "CARD.md").read_text()


def learner_told(learner, tmp_path):
    learner.save(tmp_path / "told")
    return (tmp_path / "told" / "CARD.md").read_text()


def test_where_the_image_tower_is_trained_nothing_is_compared(world):
    first, second, _ = world
    learner = learn(
        IncrementalClassifier("slca", "tiny", settings={"stage1.schedule.epochs": 1, "stage2.schedule.epochs": 1}),
        first,
    )
    learn(learner, second)
    assert all("drift" not in entry for entry in learner.history_)


def test_the_command(world, tmp_path, cairn):
    first, second, _ = world
    learn(IncrementalClassifier("lda", "tiny", device="cpu"), first).save(tmp_path / "shop")
    before = {file.name: file.read_bytes() for file in (tmp_path / "shop").iterdir()}
    (tmp_path / "new").mkdir()
    for i, (image, _) in enumerate(second):
        Image.fromarray(image // 2 + 100).save(tmp_path / "new" / f"{i}.png")
    (tmp_path / "new" / "broken.png").write_bytes(b"no image")
    status, out, err = cairn("monitor", "shop", "new", "--json", "--device", "cpu")
    report = json.loads(out)
    assert status == 0
    assert "broken.png" in err
    images = [image // 2 + 100 for image, _ in second]
    found = IncrementalClassifier.load(tmp_path / "shop").drift(images)
    assert (report["images"], report["below"], report["drifted"]) == (len(images), found.below, True)
    assert report["shifted"] == [one.name for one in found.shifted]
    status, out, _ = cairn("monitor", "shop", "new", "--device", "cpu")
    assert status == 0
    assert "drifted: " in " ".join(out.split())
    assert {file.name: file.read_bytes() for file in (tmp_path / "shop").iterdir()} == before


def test_other_towers_are_refused_with_what_to_do(world, tmp_path):
    learn(IncrementalClassifier("lda", "tiny"), world[0]).save(tmp_path / "shop")
    other = IncrementalClassifier("lda", "tiny", preprocess="squash").open_towers()
    with pytest.raises(ResultError, match="to change them, learn its pictures again in another folder"):
        IncrementalClassifier.load(tmp_path / "shop", other)
