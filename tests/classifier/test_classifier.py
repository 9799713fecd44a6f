"""The classifier that people hold."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from cairn import IncrementalClassifier
from cairn.data.shapes import shapes_dataset
from cairn.errors import CairnError, ConfigError, DataError, NotFinite, ResultError, TowersError
from cairn.methods.catalogue import METHODS
from cairn.storage.archive import Archive
from cairn.training.checkpoint import Checkpoint

QUICK = {
    "stage1.schedule.epochs": 1,
    "stage2.schedule.epochs": 2,
    "schedule.epochs": 2,
    "shifts.number": 2,
    "replayed": 4,
}


@pytest.fixture(scope="module")
def pictures():
    """Images and names of the first four classes: (train, test)."""
    data = shapes_dataset()

    def some(images, per_class):
        rows = [i for c in range(4) for i in np.flatnonzero(images.labels == c)[:per_class]]
        return [images[i] for i in rows], [data.classes[images.labels[i]] for i in rows]

    return some(data.train, 8), some(data.test, 3)


def quick(method="dmc-ot", towers="tiny", **changes):
    config = METHODS[method].config()
    settings = {key: value for key, value in QUICK.items() if hasattr(config, key.split(".")[0])}
    return IncrementalClassifier(method, towers, settings=settings, device="cpu", **changes)


def halves(images, names):
    first = [i for i, name in enumerate(names) if name in list(dict.fromkeys(names))[:2]]
    rest = [i for i in range(len(names)) if i not in first]
    return [([images[i] for i in part], [names[i] for i in part]) for part in (first, rest)]


@pytest.fixture(scope="module")
def learned(pictures, towers_once):
    learner = quick(towers=towers_once)
    for images, names in halves(*pictures[0]):
        learner.partial_fit(images, names)
    return learner


@pytest.fixture(scope="module")
def towers_once():
    from cairn.towers.catalogue import load_towers

    return load_towers("tiny", device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_predicts_and_comes_back(method, pictures, towers_once, tmp_path):
    (images, names), (test, truth) = pictures
    learner = quick(method, towers_once)
    sizes = []
    for part in halves(images, names):
        assert learner.partial_fit(*part) is learner
        sizes.append(len(learner.classes_))
    assert sizes == [2, 4]
    assert list(learner.classes_) == list(dict.fromkeys(names))
    assert learner.counts_.tolist() == [8, 8, 8, 8]
    p = learner.predict_proba(test)
    assert p.shape == (len(test), 4)
    np.testing.assert_allclose(p.sum(1), 1)
    predicted = learner.predict(test)
    assert [learner.classes_[row.argmax()] for row in p] == list(predicted)
    assert learner.score(test, truth) == np.mean([a == b for a, b in zip(predicted, truth, strict=True)])
    best = learner.predict_topk(test, k=9)
    assert [row[0][0] for row in best] == list(predicted)
    assert all(len(row) == 4 and row[0][1] >= row[-1][1] for row in best)
    known = learner.known_score(test)
    assert known.shape == (len(test),)
    assert ((known >= 0) & (known <= 1)).all()
    refused = learner.predict(test, unknown_below=1.0)
    assert [name is None for name in refused] == (known < 1).tolist()
    assert None not in learner.predict(test, unknown_below=0.0)
    if METHODS[method].card.keeps == "images":
        with pytest.raises(ConfigError, match="keeps images"):
            learner.save(tmp_path)
        return
    learner.save(tmp_path)
    again = IncrementalClassifier.load(tmp_path, towers_once)
    np.testing.assert_array_equal(again.predict_proba(test), p)
    np.testing.assert_array_equal(again.known_score(test), known)
    assert list(again.classes_) == list(learner.classes_)
    assert again.history_ == learner.history_
    more = [images[:4], names[:4]]
    for one in (learner, again):
        one.partial_fit(*more, again=True)
    np.testing.assert_array_equal(again.predict_proba(test), learner.predict_proba(test))


def test_a_known_class_is_learned_on(pictures, towers_once):
    (images, names), _ = pictures
    learner = quick("simplecil", towers_once).partial_fit(images, names)
    before = learner.method_.means.means.clone()
    learner.partial_fit(images[:3], names[:3], again=True)
    assert len(learner.classes_) == 4
    assert learner.counts_.tolist() == [11, 8, 8, 8]
    assert not torch.equal(before[0], learner.method_.means.means[0])
    assert torch.equal(before[1:], learner.method_.means.means[1:])
    assert learner.history_[-1]["again"] == [names[0]]


def test_paths_pil_images_arrays_and_generators_are_the_same(pictures, learned, tmp_path):
    _, (test, _) = pictures
    paths = []
    for i, image in enumerate(test[:4]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    reference = learned.predict_proba(test[:4])
    for given in (
        paths,
        map(str, paths),
        [Image.open(p) for p in paths],
        (image for image in test[:4]),
        np.stack(test[:4]),
    ):
        np.testing.assert_array_equal(learned.predict_proba(given), reference)
    assert learned.predict([]).shape == (0,)
    assert learned.predict_proba([]).shape == (0, 4)


def test_one_image_is_one_image(pictures, learned, tmp_path):
    _, (test, truth) = pictures
    path = tmp_path / "one.png"
    Image.fromarray(test[0]).save(path)
    grey = np.asarray(Image.fromarray(test[0]).convert("L"))
    reference = learned.predict_proba([test[0]])
    for one in (test[0], path, str(path), Image.open(path), torch.tensor(test[0])):
        np.testing.assert_array_equal(learned.predict_proba(one), reference)
        np.testing.assert_array_equal(learned.known_score(one), learned.known_score([test[0]]))
        assert learned.predict(one).tolist() == learned.predict([test[0]]).tolist()
        assert learned.predict_topk(one) == learned.predict_topk([test[0]])
        assert learned.explain(one) == learned.explain(test[0])
        assert learned.score(one, truth[0]) == learned.score([test[0]], [truth[0]])
    np.testing.assert_array_equal(learned.predict_proba(grey), learned.predict_proba([grey]))
    np.testing.assert_array_equal(learned.predict_proba(np.array([str(path)] * 2)), learned.predict_proba([path] * 2))
    for wrong, part in (
        (torch.tensor(test[0]).permute(2, 0, 1), "channels last"),
        (test[0].transpose(2, 0, 1), "channels last"),
        (test[0].astype("float32") / 255, "an array of float32"),
        (np.zeros((2, 3, 8, 8, 3), np.uint8), r"shape \(2, 3, 8, 8, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), "an array of uint8"),
        (np.zeros(64, np.float32), r"images: an array of shape \(\d+,\)"),
        (b"bytes", "image 0: bytes"),
        (None, "images: NoneType None"),
    ):
        with pytest.raises(DataError, match=part) as caught:
            learned.predict(wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="2 images: explain takes one"):
        learned.explain(test[:2])


def test_score_takes_a_label_a_text_for_each_image(pictures, learned):
    _, (test, truth) = pictures
    expected = np.mean([a == b for a, b in zip(learned.predict(test), truth, strict=True)])
    assert learned.score(test, truth) == learned.score(np.stack(test), np.array(truth)) == expected
    for images, labels, part in (
        (test, truth[:1], "12 images with 1 label:"),
        (test, truth[0], "12 images with 1 label:"),
        (test[:4], [0, 1, 2, 3], "called by a text"),
        ([], [], "no image"),
    ):
        with pytest.raises(DataError, match=part):
            learned.score(images, labels)
    for wrong in (5, -0.1, 1.1, float("nan"), "0.5", True):
        with pytest.raises(ConfigError, match="must be a number from 0 to 1"):
            learned.predict(test, unknown_below=wrong)
    with pytest.raises(ConfigError, match="at least 1"):
        learned.predict_topk(test, k=0)


def test_rows_of_embeddings_are_no_pictures():
    from cairn.towers.features import FeatureTowers

    rng = np.random.default_rng(0)
    rows, names = rng.normal(size=(12, 8)).astype("float32"), ["a", "b"] * 6
    towers = FeatureTowers(name="made", dim=8, logit_scale=20.0, fingerprint="made", names=("a", "b"), text=None)
    learner = IncrementalClassifier("simplecil", towers).partial_fit(rows, names)
    reference = learner.predict_proba(rows[:1])
    for one in (rows[0], rows[0].astype("float64"), torch.tensor(rows[0]), [rows[0].tolist()], torch.tensor(rows[:1])):
        np.testing.assert_array_equal(learner.predict_proba(one), reference)
    assert learner.predict_proba(rows).shape == (12, 2)
    for wrong, part in (
        (rows[:, :4], r"row 0: shape \(4,\); this learner takes embeddings, rows of 8 numbers"),
        (np.zeros((2, 8, 8), "float32"), "rows of 8 numbers"),
        ("a.png", "row 0: str 'a.png'"),
        (["a.png"], "row 0: str 'a.png'"),
        (np.full(8, np.nan), "row 0: an embedding that is not finite"),
    ):
        with pytest.raises(DataError, match=part):
            learner.predict(wrong)
        with pytest.raises(DataError, match=part):
            learner.partial_fit(wrong, ["a"] * len(wrong) if np.ndim(wrong) == 2 else "a")


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("engine", {"replay": None}),
        ("dmc", {"stage1.average": None, "stage1.classes": "seen", "stage1.schedule.lr": np.float32(0.5)}),
        ("dmc", {"stage1.schedule.epochs": np.int64(3), "stage1.tuning": "none"}),
        ("cgil", {"stage2.text.init": "no"}),
    ],
)
def test_settings_are_values_of_python(method, given, towers_once):
    settings = IncrementalClassifier(method, towers_once, settings=given)._settings()
    for path, value in given.items():
        found = settings
        for key in path.split("."):
            found = getattr(found, key)
        assert getattr(found, "kind", found) == value


def test_order_within_a_task_does_not_matter_beyond_that_of_classes(pictures, towers_once):
    (images, names), (test, _) = pictures
    order = [0, 8, 16, 24, *[i for i in range(32) if i % 8]]
    one = quick("dmc", towers_once).partial_fit(images, names)
    other = quick("dmc", towers_once).partial_fit([images[i] for i in order], [names[i] for i in order])
    np.testing.assert_array_equal(one.predict_proba(test), other.predict_proba(test))


def test_forget(pictures, towers_once, tmp_path):
    (images, names), (test, _) = pictures
    learner = quick("dmc-ot", towers_once).partial_fit(images, names)
    gone = learner.classes_[1]
    learner.save(tmp_path)
    learner.forget(gone)
    assert gone not in learner.classes_
    assert gone not in learner.predict(test)
    learner.save(tmp_path)
    assert len(list(tmp_path.glob("learner-*.json"))) == 1  # the state before knew the class
    for file in tmp_path.iterdir():  # nothing in the folder has the name
        assert gone.encode() not in file.read_bytes()
    assert len(IncrementalClassifier.load(tmp_path, towers_once).method_.memory.counts) == 3
    with pytest.raises(DataError, match="is not known"):
        learner.forget(gone)
    learner.partial_fit(images[8:16], names[8:16])
    assert learner.classes_[-1] == gone


def test_descriptions_reach_spa(pictures, towers_once, tmp_path):
    (images, names), _ = pictures
    said = {
        name: [f"something {name.split()[0]}", f"a thing like a {name.split()[-1]}"] for name in dict.fromkeys(names)
    }
    learner = quick("spa", towers_once, descriptions=said).partial_fit(images, names)
    assert learner.method_.sentences[0] == tuple(said[names[0]])
    reasons = learner.explain(images[0])
    assert reasons[0]["name"] in learner.classes_
    assert reasons[0]["patches"][0]["sentence"] in {s for own in said.values() for s in own}
    learner.save(tmp_path)
    assert IncrementalClassifier.load(tmp_path, towers_once).descriptions == said


def test_without_patches_reasons_are_scores(learned, pictures):
    reasons = learned.explain(pictures[1][0][0], best=2)
    assert [set(reason) for reason in reasons] == [{"class", "score", "name", "probability"}] * 2
    assert reasons[0]["probability"] >= reasons[1]["probability"]


@pytest.mark.parametrize(
    ("images", "labels", "error"),
    [
        ([], [], "no image"),
        (np.zeros((4, 4, 3), np.uint8), ["a", "b"], "1 image with 2 labels"),
        ([np.zeros((4, 4, 3), np.uint8)] * 4, "bear", "4 images with 1 label"),
        ([np.zeros(32, np.float32)], ["a"], r"image 0: an array of float32 \(32,\)"),
        ([3], ["a"], "image 0: int 3; give a file"),
        (3, ["a"], "images: int 3; give a file"),
        ([np.zeros((4, 4, 3), np.uint8)], [], "1 image with 0 labels"),
        ([np.zeros((4, 4, 3), np.uint8)], [3], "called by a text"),
        ([np.zeros((4, 4, 3), np.uint8)], ["a\nb"], "control character"),
        (["nowhere.png", "neither.png"], ["a", "b"], r"2 images that cannot be read: nowhere.png"),
        ([np.zeros((4, 4, 3))], ["a"], "an array of float64"),
        ([np.zeros((4, 4, 2), np.uint8)], ["a"], "an array of uint8"),
    ],
)
def test_what_cannot_be_learned_is_one_line_and_changes_nothing(images, labels, error, learned, pictures):
    before = learned.predict_proba(pictures[1][0])
    with pytest.raises(DataError, match=error) as caught:
        learned.partial_fit(images, labels)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(learned.predict_proba(pictures[1][0]), before)
    assert len(learned.history_) == 2


def test_a_failure_while_learning_leaves_the_classifier_as_it_was(pictures, towers_once, monkeypatch):
    (images, names), (test, _) = pictures
    learner = quick("dmc", towers_once).partial_fit(images[:16], names[:16])
    before = learner.predict_proba(test)
    monkeypatch.setattr("cairn.methods.dmc.class_cross_entropy", lambda z, *_: z.sum() * float("nan"))
    with pytest.raises(NotFinite):
        learner.partial_fit(images[16:], names[16:])
    np.testing.assert_array_equal(learner.predict_proba(test), before)
    assert list(learner.classes_) == list(dict.fromkeys(names[:16]))


def test_unfinished_learning_goes_on_to_the_same_bits(pictures, towers_once, tmp_path):
    (images, names), (test, _) = pictures
    settings = {"stage1.schedule.batch": 8, "stage2.schedule.batch": 8, "stage2.schedule.epochs": 2}

    def fresh():
        return IncrementalClassifier("dmc-ot", towers_once, settings=settings)

    reference = fresh().partial_fit(images, names).predict_proba(test)

    class Cut(BaseException):
        pass

    class Cutting(Checkpoint):
        def step(self, name, state):
            super().step(name, state)
            self.units = getattr(self, "units", 0) + 1
            if self.units == 3:
                raise Cut

    learner, cuts = fresh(), 0
    while not hasattr(learner, "classes_"):
        try:
            learner.partial_fit(images, names, checkpoint=Cutting(steps=1), archive=Archive(tmp_path, "work"))
        except Cut:
            cuts += 1
            learner = fresh()  # as after a kill
    assert cuts > 1
    np.testing.assert_array_equal(learner.predict_proba(test), reference)
    # Other images are another task: what is kept of this one is not taken for it
    other = quick("dmc-ot", towers_once).partial_fit(images[8:], names[8:], archive=Archive(tmp_path, "work"))
    plain = quick("dmc-ot", towers_once).partial_fit(images[8:], names[8:])
    np.testing.assert_array_equal(other.predict_proba(test), plain.predict_proba(test))


def test_many_threads_predict_while_one_learns(pictures, towers_once):
    (images, names), (test, _) = pictures
    learner = quick("dmc", towers_once).partial_fit(images[:16], names[:16])
    found, problems = [], []

    def asked():
        try:
            found.extend(learner.predict_proba(test[:2]).shape[1] for _ in range(5))
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=asked) for _ in range(4)]
    for thread in threads:
        thread.start()
    learner.partial_fit(images[16:], names[16:])
    for thread in threads:
        thread.join()
    assert not problems
    assert set(found) <= {2, 4}
    assert learner.predict_proba(test[:1]).shape == (1, 4)


def test_what_is_asked_too_early_or_wrongly(tmp_path, towers_once):
    with pytest.raises(ConfigError, match="nothing was learned yet"):
        quick(towers=towers_once).predict([np.zeros((4, 4, 3), np.uint8)])
    with pytest.raises(ResultError, match="no learner there"):
        IncrementalClassifier.load(tmp_path)
    with pytest.raises(CairnError, match="unknown method"):
        IncrementalClassifier("dmcc", towers_once).partial_fit([np.zeros((4, 4, 3), np.uint8)], ["a"])
    with pytest.raises(CairnError, match="unknown setting"):
        IncrementalClassifier("dmc", towers_once, settings={"stage1.epochs": 2}).partial_fit(
            [np.zeros((4, 4, 3), np.uint8)], ["a"]
        )


def test_what_to_do_about_bad_images_is_stop_or_skip(learned, pictures):
    """Another word would be taken for skip, and answers would be missing."""
    (images, names), _ = pictures
    for call in (
        lambda: learned.predictions(images, on_bad_image="error"),
        lambda: next(learned.stream(images, on_bad_image="error")),
        lambda: learned.evaluate(images, names, on_bad_image="error"),
        lambda: quick("lda").partial_fit(images, names, on_bad_image="error"),
        lambda: quick("lda").partial_fit(images, [[name] for name in names], on_bad_image="error"),
        lambda: quick("lda").partial_fit(images, names).unlearn(images[:1], on_bad_image="error"),
    ):
        with pytest.raises(ConfigError, match="on_bad_image 'error': must be stop or skip"):
            call()


def test_towers_that_are_handed_over_prepare_images_as_the_arguments_say(pictures, tmp_path):
    from cairn.towers.catalogue import load_towers

    towers = load_towers("tiny", device="cpu", preprocess="squash")
    for changes, says in (
        ({"preprocess": "crop"}, "preprocess 'crop'"),
        ({"decode": "reduced"}, "decode 'reduced'"),
        ({"precision": "bfloat16"}, "precision 'bfloat16'"),
    ):
        with pytest.raises(ConfigError, match=f"{says}: the towers 'tiny' that are given were loaded with"):
            quick("lda", towers, **changes).partial_fit(*pictures[0])
    learner = quick("lda", towers).partial_fit(*pictures[0])
    learner.save(tmp_path / "squashed")
    again = IncrementalClassifier.load(tmp_path / "squashed", device="cpu")
    assert again.open_towers().fingerprint == towers.fingerprint
    np.testing.assert_array_equal(again.predict_proba(pictures[1][0]), learner.predict_proba(pictures[1][0]))


def test_a_learner_of_no_class_tells_nothing(pictures, tmp_path):
    from cairn.classifier.onnx import export_onnx

    (images, names), _ = pictures
    learner = quick("lda").partial_fit(images[:8], names[:8])
    learner.forget(names[0])
    for call in (learner.predict, learner.drift, lambda images: learner.evaluate(images, names[:1])):
        with pytest.raises(DataError, match="no class is left"):
            call(images[:1])
    with pytest.raises(DataError, match="no class is left"):
        export_onnx(learner, tmp_path / "none.onnx")
    learner.partial_fit(images[:8], names[:8])
    assert list(learner.predict(images[:1])) == names[:1]


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "1", None])
def test_a_seed_that_is_none_is_refused_before_anything_is_learned(pictures, seed):
    with pytest.raises(ConfigError, match=f"seed {seed}: must be a whole number from 0"):
        quick("lda", seed=seed).partial_fit(*pictures[0])


def test_a_picture_that_cannot_be_decoded_any_more_is_one_line(learned, pictures, tmp_path):
    Image.fromarray(pictures[0][0][0]).save(tmp_path / "a.png")
    closed = Image.open(tmp_path / "a.png")
    closed.close()
    for image in (closed, Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32))):
        with pytest.raises(DataError, match="cannot be read"):
            learned.predict(image)


@pytest.mark.parametrize(("changes", "says"), [({"seconds": float("nan")}, "seconds nan"), ({"steps": 0}, "steps 0")])
def test_a_checkpoint_that_would_never_be_kept_is_refused(changes, says):
    with pytest.raises(ConfigError, match=f"checkpoint-{says}: must be"):
        Checkpoint(**changes)


def test_other_weights_are_refused(learned, tmp_path, towers_once):
    learned.save(tmp_path)

    class Other:
        def __getattr__(self, name):
            return getattr(towers_once, name)

    other = Other()
    other.fingerprint = "0" * 16
    with pytest.raises(ResultError, match="give the weights and the tokenizer that it was learned on"):
        IncrementalClassifier.load(tmp_path, other)


def test_the_card_tells_people_what_is_there(learned, tmp_path):
    learned.save(tmp_path)
    card = (tmp_path / "CARD.md").read_text()
    assert learned.method_.towers.fingerprint in card
    assert "4 classes from 32 images, none of which is kept" in card
    assert all(name in card for name in learned.classes_)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("sda", "from 8 images, some of which are kept as the tower sees them: they are in this folder"),
        ("reco", "from 8 images, none of which is kept, but embeddings of some"),
    ],
)
def test_the_card_tells_what_is_kept_of_single_images(method, told, pictures, towers_once, tmp_path):
    (images, names), _ = pictures
    settings = {"tuning": "none", "contrast": 0.0} if method == "sda" else {"schedule.epochs": 1}
    learner = IncrementalClassifier(method, towers_once, settings=settings).partial_fit(images[:8], names[:8])
    learner.save(tmp_path)
    card = (tmp_path / "CARD.md").read_text()
    assert told in card
    assert (f"of which {learner.method_.memory_bytes:,} are images" in card) == (method == "sda")


def test_a_name_is_text_whatever_its_signs(pictures, towers_once, tmp_path):
    (images, _), _ = pictures
    names = ["<script>alert(1)</script>", "../../x", "{0} | b"]
    learner = quick("simplecil", towers_once).partial_fit(images[:3], names)
    learner.save(tmp_path / "deep" / "er")
    assert list(IncrementalClassifier.load(tmp_path / "deep" / "er", towers_once).classes_) == names
    assert "<script>" not in (tmp_path / "deep" / "er" / "CARD.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


def test_novelty_tells_new_classes_from_known_ones():
    """Half of sixteen clusters learned: better than the largest probability, and about t of the known fall below t."""
    from cairn.towers.features import FeatureTowers

    rng = np.random.default_rng(0)
    d, k = 24, 16
    mixing = rng.normal(size=(d, d)) * np.geomspace(2, 0.1, d)
    centres = 3 * rng.normal(size=(k, d))
    names = tuple(f"c{c}" for c in range(k))

    def rows(n):
        x = centres[:, None] + rng.normal(size=(k, n, d)) @ mixing.T
        return x.reshape(-1, d).astype("float32"), np.repeat(np.arange(k), n)

    towers = FeatureTowers(
        name="made", dim=d, logit_scale=20.0, fingerprint="made", names=names, text=centres.astype("float32")
    )
    learner = IncrementalClassifier("dmc", towers)
    x, y = rows(60)
    for part in (range(4), range(4, 8)):
        own = np.isin(y, list(part))
        learner.partial_fit(x[own], [names[c] for c in y[own]])
    x, y = rows(100)
    known, is_known = learner.known_score(x), y < 8
    assert roc_auc_score(is_known, known) > max(0.85, roc_auc_score(is_known, learner.predict_proba(x).max(1)))
    for t in (0.05, 0.2):
        assert abs((known[is_known] < t).mean() - t) < 0.06


def test_in_a_fresh_process_predictions_are_identical(learned, pictures, tmp_path):
    learned.save(tmp_path)
    np.save(tmp_path / "images.npy", np.stack(pictures[1][0]))
    code = (
        "import sys, numpy as np, torch; torch.set_num_threads(1); from cairn import IncrementalClassifier; "
        "p = IncrementalClassifier.load(sys.argv[1], device='cpu').predict_proba(np.load(sys.argv[1] + '/images.npy')); "
        "np.save(sys.argv[1] + '/p.npy', p)"
    )
    # The towers of the fixture are an object; their name is that of the weights the package carries
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    np.testing.assert_array_equal(np.load(tmp_path / "p.npy"), learned.predict_proba(pictures[1][0]))


# --- numbers that are none --------------------------------------------------------------------------------------------


def clusters(towers="made"):
    """Towers over embeddings, and rows of two classes with their names."""
    from cairn.towers.features import FeatureTowers

    x = np.repeat(np.eye(2, 8, dtype="float32"), 6, axis=0) + np.linspace(0, 0.1, 96, dtype="float32").reshape(12, 8)
    towers = FeatureTowers(
        name=towers, dim=8, logit_scale=20.0, fingerprint="f", names=("apple", "pear"), text=x[[0, 6]]
    )
    return towers, x, ["apple"] * 6 + ["pear"] * 6


@pytest.mark.parametrize("gone", range(4))
@pytest.mark.parametrize("method", ["simplecil", "lda"])
def test_counts_after_forgetting_are_those_of_the_classes_left(method, gone, embedded_dataset, tmp_path):
    """Of every class its own, in the learner, in what its method keeps, after a save, and after the class came back."""
    from cairn.towers.features import FeatureTowers

    data, counts = embedded_dataset, [5, 2, 4, 3]
    held = data.embeddings
    towers = FeatureTowers(
        name="made", dim=held.dim, logit_scale=held.logit_scale, fingerprint="made", names=data.classes, text=held.text
    )
    rows = [row for c, n in enumerate(counts) for row in np.flatnonzero(data.train.labels == c)[:n]]
    images = [data.train.values[row] for row in rows]
    names = [data.classes[data.train.labels[row]] for row in rows]
    learner = IncrementalClassifier(method, towers).partial_fit(images, names)
    assert learner.counts_.tolist() == counts
    name = data.classes[gone]
    left = counts[:gone] + counts[gone + 1 :]
    learner.forget(name)
    learner.save(tmp_path)
    for found in (learner, IncrementalClassifier.load(tmp_path, towers)):
        kept = found.method_.means if method == "simplecil" else found.method_.memory
        assert found.counts_.tolist() == kept.counts.tolist() == left
        back = [image for image, own in zip(images, names, strict=True) if own == name]
        found.partial_fit(back, [name] * len(back))
        assert found.classes_.tolist() == [*(own for own in data.classes[:4] if own != name), name]
        assert found.counts_.tolist() == [*left, counts[gone]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_embedding_that_is_not_finite_is_no_apple(value):
    """The largest of scores that are NaN is the first, for argmax."""
    towers, x, names = clusters()
    learner = IncrementalClassifier("simplecil", towers).partial_fit(x, names)
    spoiled = x.copy()
    spoiled[7, 3] = value
    for asked in (learner.predict, learner.predict_proba, learner.predict_topk, learner.known_score):
        with pytest.raises(DataError, match="row 7: an embedding that is not finite"):
            asked(spoiled)
    with pytest.raises(DataError, match="an embedding that is not finite"):
        learner.explain(spoiled[7])
    with pytest.raises(DataError, match=r"1 image that cannot be read: row 7 .*not finite"):
        learner.partial_fit(spoiled, names)
    assert learner.predict(x).tolist() == names
    assert learner.counts_.tolist() == [6, 6]


def test_scores_that_are_not_finite_are_no_answer(monkeypatch):
    towers, x, names = clusters()
    learner = IncrementalClassifier("simplecil", towers).partial_fit(x, names)
    sound = type(learner.method_).scores

    def spoiled(self, features):
        scores = sound(self, features)
        scores[features[:, 1] > 0.5, 0] = float("nan")
        return scores

    monkeypatch.setattr(type(learner.method_), "scores", spoiled)
    for asked in (learner.predict, learner.predict_proba, learner.predict_topk):
        with pytest.raises(NotFinite, match="row 6: scores that are not finite"):
            asked(x)
    with pytest.raises(NotFinite, match="scores that are not finite"):
        learner.explain(x[6])
    assert learner.predict(x[:6]).tolist() == names[:6]


# --- weights that moved -----------------------------------------------------------------------------------------------


@pytest.fixture
def moved(pictures, tmp_path, monkeypatch):
    """A learner on towers named by a relative path, and where these lie."""
    import shutil
    from importlib import resources

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(str(resources.files("cairn.towers").joinpath("tiny")), "copies/clip")
    learner = quick("simplecil", "copies/clip").partial_fit(*pictures[0])
    learner.save(tmp_path / "learner")
    monkeypatch.chdir(tmp_path)
    return learner, tmp_path / "here" / "copies" / "clip"


def test_a_relative_path_of_towers_is_found_from_another_folder(moved, pictures, tmp_path):
    learner, place = moved
    loaded = IncrementalClassifier.load(tmp_path / "learner")
    assert loaded.towers == str(place)
    np.testing.assert_array_equal(loaded.predict(pictures[1][0]), learner.predict(pictures[1][0]))


def test_weights_that_moved_are_told_and_can_be_given(moved, pictures, tmp_path):
    learner, place = moved
    place.rename(tmp_path / "there")
    with pytest.raises(
        TowersError, match=r"no such folder.*say where they are now with --towers, in Python with towers="
    ):
        IncrementalClassifier.load(tmp_path / "learner")
    loaded = IncrementalClassifier.load(tmp_path / "learner", towers="there")
    np.testing.assert_array_equal(loaded.predict(pictures[1][0]), learner.predict(pictures[1][0]))
    loaded.save(tmp_path / "learner")
    assert IncrementalClassifier.load(tmp_path / "learner").towers == str(tmp_path / "there")
    config = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5, 0.5, 0.5]}
    (tmp_path / "there" / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ResultError, match="learned on towers"):
        IncrementalClassifier.load(tmp_path / "learner", towers="there")


def test_what_there_is_to_say_of_the_towers_is_kept(moved):
    from safetensors.torch import load_file, save_file

    path = moved[1] / "model.safetensors"
    save_file({f"module.{name}": value for name, value in load_file(path).items()}, path)
    learner = quick("simplecil", str(moved[1]))
    (notice,) = learner.open_towers().notices
    assert "'module.'" in notice
    assert learner.partial_fit([np.zeros((8, 8, 3), np.uint8)], ["oak"]).notices_ == [notice]


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))])
@pytest.mark.parametrize("method", ["simplecil", "dmc", "joint"])
def test_a_copy_is_a_learner_of_its_own(copied, method, pictures, towers_once):
    (images, names), (test, _) = pictures
    learner = quick(method, towers_once).partial_fit(images[:16], names[:16])
    p, known = learner.predict_proba(test), learner.known_score(test)
    twin = copied(learner)
    np.testing.assert_array_equal(twin.predict_proba(test), p)
    np.testing.assert_array_equal(twin.known_score(test), known)
    twin.partial_fit(images[16:], names[16:])
    assert (len(twin.classes_), len(learner.classes_), len(learner.history_)) == (4, 2, 1)
    np.testing.assert_array_equal(learner.predict_proba(test), p)
    learner.partial_fit(images[16:], names[16:])
    np.testing.assert_array_equal(learner.predict_proba(test), twin.predict_proba(test))


def test_an_untrained_learner_is_copied_too():
    twin = pickle.loads(pickle.dumps(copy.deepcopy(IncrementalClassifier("dmc", "tiny", seed=3))))
    assert (twin.method, twin.towers, twin.seed, hasattr(twin, "method_")) == ("dmc", "tiny", 3, False)
