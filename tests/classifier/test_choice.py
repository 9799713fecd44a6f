"""`method="auto"`: what is compared, when another method is taken, and that it is then as if that had been asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cairn import IncrementalClassifier
from cairn.classifier.calibration import UNCALIBRATED, LeftOut
from cairn.classifier.choice import CHEAP, Choice, Compared, choice, comparable, untold
from cairn.data.in_memory import InMemoryImages
from cairn.data.shapes import shapes_dataset
from cairn.data.stream import Task
from cairn.errors import UnknownName
from cairn.methods.catalogue import METHODS
from cairn.training.context import Context
from cairn.training.seeds import Seeds

PICKED = "cairn.classifier.learning.choice"


def rows(counts, seed=0, d=16):
    """Embeddings of classes that overlap, of unequal sizes, with one scatter that is neither diagonal nor isotropic."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(counts)), counts)
    mixing = rng.normal(size=(d, d)) @ np.diag(np.geomspace(12, 1, d)) / d**0.5
    x = rng.normal(size=(len(counts), d))[y] + rng.normal(size=(len(y), d)) @ mixing
    return x.astype(np.float32), y


def first_task(flat, counts=(12, 30)):
    x, y = rows(counts)
    x = 0.3 * x + flat.class_texts(("class_0", "class_1"), ()).numpy()[y]
    return Task(0, range(2), ("class_0", "class_1"), ("a photo of a {}.",), InMemoryImages(list(x), y, flat.dim))


def test_what_is_compared_is_the_likelihood_of_images_left_out(flat):
    task = first_task(flat)
    entry = METHODS["blend"]
    blend = entry.build(flat, entry.default_config(flat), seed=1)
    ctx = Context(Seeds(1))
    blend.learn(task, ctx)
    found = choice(blend, task, ctx)
    assert [one.method for one in found.compared] == ["blend", *CHEAP]
    first, zero_shot = found.compared[0], found.compared[-1]

    scores, y = blend.left_out
    assert first.images == 42
    assert first.accuracy == pytest.approx((scores.argmax(1) == y).double().mean().item())

    # Texts do not depend on the images: left out or not, s z . t
    x = torch.stack([torch.as_tensor(task.train[i]) for i in range(42)]).double()
    s = flat.logit_scale * torch.nn.functional.normalize(x) @ flat.class_texts(task.names, ()).double().T
    y = torch.as_tensor(task.train.labels)
    spread = (s.amax(1) - s.mean(1)).clamp(min=1e-12).sqrt()[:, None]
    losses = torch.stack(
        [
            torch.nn.functional.cross_entropy(s / (t * spread), y, reduction="none")
            for t in np.geomspace(0.02, 200, 2000)
        ]
    )
    best = losses[losses.mean(1).argmin()]
    assert zero_shot.images == 42
    assert zero_shot.accuracy == pytest.approx((s.argmax(1) == y).double().mean().item())
    assert zero_shot.likelihood == pytest.approx(-best.mean().item(), abs=0.01)
    assert zero_shot.error == pytest.approx(best.std().item() / math.sqrt(42), rel=0.1)


def test_another_is_better_only_by_more_than_chance():
    blend = Compared("blend", -0.50, 0.03, 0.8, 100)
    assert not Compared("lda", -0.41, 0.04, 0.9, 100).better_than(blend)  # .09 of .1
    assert Compared("lda", -0.39, 0.04, 0.9, 100).better_than(blend)
    assert "no other is better" in Choice("blend", (blend, Compared("lda", -0.41, 0.04, 0.9, 100))).reason


def test_by_default_blend_is_taken_and_it_is_said_why(flat):
    x, y = rows((12, 30))
    names = [f"class_{c}" for c in y]
    auto = IncrementalClassifier(towers=flat).partial_fit(list(x), names)
    asked = IncrementalClassifier("blend", flat).partial_fit(list(x), names)
    assert auto.chosen_ == asked.chosen_ == "blend"
    assert [text for text in auto.notices_ if text.startswith("method blend: no other is better")]
    assert not [text for text in asked.notices_ if text.startswith("method")]
    np.testing.assert_array_equal(auto.predict_proba(list(x)), asked.predict_proba(list(x)))


@pytest.mark.parametrize("counts", [(20,), (9, 1)])
def test_where_images_tell_nothing_blend_is_taken_without_a_word(flat, counts):
    x, y = rows(counts)
    auto = IncrementalClassifier(towers=flat).partial_fit(list(x), [f"class_{c}" for c in y])
    assert auto.chosen_ == "blend"
    assert not auto.notices_


def test_settings_are_those_of_blend(flat):
    x, y = rows((12, 30))
    auto = IncrementalClassifier(towers=flat, settings={"features": 0}).partial_fit(list(x), [f"class_{c}" for c in y])
    assert auto.chosen_ == "blend"
    assert not auto.notices_
    with pytest.raises(UnknownName, match="epochs"):
        IncrementalClassifier(towers=flat, settings={"epochs": 3}).partial_fit(list(x), ["a"] * len(x))


def test_a_method_that_is_better_is_taken_for_good(flat, tmp_path, monkeypatch):
    x, y = rows((12, 30, 9, 14))
    names, first = np.array([f"class_{c}" for c in y]), y < 2
    compared = (Compared("blend", -0.9, 0.01, 0.6, 42), Compared("lda", -0.3, 0.01, 0.9, 42))
    monkeypatch.setattr(PICKED, lambda *_: Choice("lda", compared))
    auto = IncrementalClassifier(towers=flat).partial_fit(list(x[first]), list(names[first]))
    monkeypatch.setattr(PICKED, lambda *_: pytest.fail("chosen twice"))
    assert auto.notices_ == [Choice("lda", compared).reason]
    assert "lda: better than blend by more than chance on 42 images" in auto.notices_[0]

    auto.save(tmp_path / "learner")
    auto = IncrementalClassifier.load(tmp_path / "learner", flat)
    asked = IncrementalClassifier("lda", flat).partial_fit(list(x[first]), list(names[first]))
    for learner in (auto, asked):
        learner.partial_fit(list(x[~first]), list(names[~first]))
    assert auto.chosen_ == auto.method == "lda"
    assert auto.estimate_ == asked.estimate_
    np.testing.assert_array_equal(auto.predict_proba(list(x)), asked.predict_proba(list(x)))


def test_a_method_set_later_is_for_the_next_fit(flat):
    """It was built from the arguments at the next `partial_fit`, of a state that was another's."""
    x, y = rows((12, 30, 9))
    names, first = np.array([f"class_{c}" for c in y]), y < 2
    learner = IncrementalClassifier("simplecil", flat).partial_fit(list(x[first]), list(names[first]))
    learner.set_params(method="lda").partial_fit(list(x[~first]), list(names[~first]))
    assert learner.chosen_ == "simplecil"
    assert learner.fit(list(x), list(names)).chosen_ == "lda"


def test_pictures_are_embedded_once_although_methods_are_compared(towers):
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 255, (12, 32, 32, 3), dtype=np.uint8))
    learner = IncrementalClassifier(towers=towers)
    before = towers.passes["images"]
    learner.partial_fit(pictures, ["circle", "square"] * 6)
    assert towers.passes["images"] - before == 12
    assert any(text.startswith("method blend") for text in learner.notices_)


def test_of_very_many_images_nothing_is_compared(flat, monkeypatch):
    task = first_task(flat)
    assert comparable(task)
    monkeypatch.setattr("cairn.classifier.choice.MOST", 41)
    assert not comparable(task)


def drawn(number, each, split="train"):
    world = shapes_dataset()
    images = world.train if split == "train" else world.test
    picked = [row for c in range(number) for row in np.flatnonzero(images.labels == c)[:each]]
    return [images[row] for row in picked], [int(images.labels[row]) for row in picked], world.classes


@pytest.mark.parametrize(("names", "texts"), [("numbers", False), ("words", True)])
def test_with_one_image_per_class_names_that_tell_nothing_are_not_used(names, texts, tmp_path):
    """Blend looked for the classes where their names are: 1 in 2 of these was right where names were article numbers."""
    images, labels, words = drawn(10, 1)
    called = [f"article {937 * (c + 3) % 1000:03d}" if names == "numbers" else words[c] for c in range(10)]
    learner = IncrementalClassifier(towers="tiny", device="cpu").partial_fit(images, [called[c] for c in labels])
    assert learner.chosen_ == "blend"
    assert learner.method_.config.text is texts
    assert any("tell no more than chance" in notice for notice in learner.notices_) is not texts
    tests, truth, _ = drawn(10, 6, "test")
    assert learner.score(tests, [called[c] for c in truth]) > 0.85
    confidence = learner.predict_proba(tests).max(1)
    assert (confidence > 0.11).all()  # not alike for all ten
    if texts:
        return
    assert learner.calibration_ == UNCALIBRATED
    learner.save(tmp_path / "learner")
    again = IncrementalClassifier.load(tmp_path / "learner", device="cpu")
    more, labels, _ = drawn(10, 4)
    for one in (learner, again):
        one.partial_fit(more, [called[c] for c in labels])
    np.testing.assert_array_equal(again.predict_proba(tests), learner.predict_proba(tests))
    assert learner.score(tests, [called[c] for c in truth]) > 0.9


def test_images_alone_in_their_class_are_untold_where_they_say_no_more_than_chance():
    task = Task(1, range(2, 4), ("c", "d"), ("a {}.",), InMemoryImages([0] * 4, np.array([0, 0, 2, 3])))
    y = torch.tensor([0, 0, 2, 3])
    right, wrong = 4 * torch.eye(4)[y], 4 * torch.eye(4)[(y + 1) % 4]
    assert untold(LeftOut(right, y), task).tolist() == [False] * 4
    assert untold(LeftOut(wrong, y), task).tolist() == [False, False, True, True]
    known = Task(
        1, range(4, 4), (), ("a {}.",), InMemoryImages([0] * 2, np.array([0, 1]))
    )  # of known classes there are others
    assert not untold(LeftOut(wrong[:2], y[:2]), known).any()
