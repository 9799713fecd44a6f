"""A classifier whose images may show several classes."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support

from cairn import IncrementalClassifier
from cairn.classifier.label_sets import MOST_OTHERS, MOST_SHOWN, before_any
from cairn.data.attributes import attributes_dataset
from cairn.errors import CairnError, ConfigError, DataError, InvalidInput, ResultError
from cairn.methods.catalogue import METHODS


@pytest.fixture(scope="module")
def scenes():
    """(images, sets of names) to learn in two calls, and to test on: words of the drawn world, of unequal frequency."""
    data = attributes_dataset("dev")
    words = np.argsort(-data.train.targets.sum(0))[:6]

    def some(images, rows, columns):
        shown = [[data.classes[c] for c in words[columns] if images.targets[row, c]] for row in rows]
        return [images[row] for row, own in zip(rows, shown, strict=True) if own], [own for own in shown if own]

    first, second = some(data.train, range(60), slice(4)), some(data.train, range(60, 110), slice(6))
    return first, second, some(data.test, range(60), slice(6))


def learner(towers, method="simplecil", **changes):
    return IncrementalClassifier(method, towers=towers, device="cpu", **changes)


@pytest.fixture(scope="module")
def learned(scenes, towers):
    return learner(towers).partial_fit(*scenes[0]).partial_fit(*scenes[1])


def test_it_learns_sets_of_names_and_predicts_them(scenes, learned):
    first, second, (test, truth) = scenes
    assert len(learned.classes_) == 6
    assert learned.counts_.sum() == sum(map(len, first[1] + second[1]))
    assert [entry["images"] for entry in learned.history_] == [len(first[0]), len(second[0])]
    assert any("several classes" in notice for notice in learned.notices_)
    p, found = learned.predict_proba(test), learned.predict(test)
    assert p.shape == (len(test), 6)
    assert ((p > 0) & (p < 1)).all()
    assert len(found) == len(test)
    for row, own in enumerate(found):
        assert isinstance(own, tuple)
        assert {*own} == {*learned.classes_[p[row] >= learned.thresholds_]}
        assert [*own] == sorted(own, key=lambda name: -p[row, list(learned.classes_).index(name)])
    assert {len(own) for own in learned.predict(test, threshold=0.0)} == {6}
    assert {len(own) for own in learned.predict(test, threshold=1.0)} == {0}
    assert learned.predict_topk(test[:1], 2)[0][0][1] == pytest.approx(p[0].max())
    exact = np.mean([{*own} == {*names} for own, names in zip(found, truth, strict=True)])
    assert learned.score(test, truth) == pytest.approx(exact)
    assert learned.explain(test[0], best=2)[0]["probability"] == pytest.approx(p[0].max())


def test_probabilities_are_those_of_images_left_out(scenes, towers):
    """Naive twin: the probabilities of the rule are a sigmoid of centred scores, and what they say happens."""
    first, second, (test, _) = scenes
    held = learner(towers, "zero-shot").partial_fit(first[0] + second[0], first[1] + second[1])
    rule, scores = held._learned.sets.rule, held.predictions(test).scores.double().numpy()
    centred = scores - scores.mean(1, keepdims=True)
    p = 1 / (1 + np.exp(-(rule.slope * centred / rule.scale + np.array(rule.offsets))))
    np.testing.assert_allclose(held.predict_proba(test), p, atol=1e-9)
    told = held._learned.sets.decisions
    said = 1 / (1 + np.exp(-(rule.slope * told.values.numpy() + np.array(rule.offsets)[told.classes])))
    assert said.mean() == pytest.approx(told.shown.mean().item(), abs=0.02)
    assert len(told.values) == 6 * rule.images


@pytest.mark.parametrize("method", ["lda", "capnet"])
def test_other_methods_tell_of_classes_by_themselves_too(method, scenes, towers):
    first, second, (test, truth) = scenes
    held = learner(towers, method, settings=METHODS[method].card.quick).partial_fit(*first).partial_fit(*second)
    found = held.evaluate(test, truth)
    chance = np.mean([one.support for one in found.by_class]) / len(test)
    assert found.mean_average_precision > chance + 0.1
    assert found.macro_f1 > 0.3
    assert held._learned.sets.rule.centred == (method != "capnet")


def test_evaluation_is_scikit_learns(scenes, learned):
    test, truth = scenes[2]
    found = learned.evaluate(test, truth)
    y = np.array([[name in own for name in learned.classes_] for own in truth])
    p, said = learned.predict_proba(test), learned.predict_proba(test) >= learned.thresholds_
    for c, value in enumerate(found.average_precision):
        assert value == pytest.approx(average_precision_score(y[:, c], p[:, c]), abs=1e-12)
    theirs = precision_recall_fscore_support(y, said, zero_division=0)
    ours = [[one.precision, one.recall, one.f1, one.support] for one in found.by_class]
    np.testing.assert_allclose(np.array(ours).T, np.array(theirs))
    assert found.macro_f1 == pytest.approx(f1_score(y, said, average="macro", zero_division=0))
    assert found.micro_f1 == pytest.approx(f1_score(y, said, average="micro"))
    assert found.exact == pytest.approx((y == said).all(1).mean())
    everything = learned.evaluate(test, [[*own, "unheard of"] for own in truth], threshold=0.0)
    assert everything.foreign == {"unheard of": len(test)}
    assert {one.recall for one in everything.by_class} == {1.0}
    report = json.loads(json.dumps(everything.report()))
    assert report["mAP"] == found.mean_average_precision
    assert set(report["mAP_by_frequency"]) == {"head", "medium", "tail"}
    with pytest.raises(InvalidInput, match="no image shows a class that the learner knows"):
        learned.evaluate(test[:1], [["unheard of"]])


def test_it_comes_back_from_a_folder_from_pickle_and_from_a_copy(scenes, learned, towers, tmp_path):
    test = scenes[2][0][:9]
    learned.save(tmp_path / "sets")
    for other in (
        IncrementalClassifier.load(tmp_path / "sets", towers),
        pickle.loads(pickle.dumps(learned)),
        copy.deepcopy(learned),
    ):
        np.testing.assert_array_equal(other.predict_proba(test), learned.predict_proba(test))
        np.testing.assert_array_equal(other.thresholds_, learned.thresholds_)
        other.partial_fit(scenes[2][0][10:30], scenes[2][1][10:30])
        other.save(tmp_path / "more")
    assert other._learned.sets.rule.images > learned._learned.sets.rule.images
    with pytest.raises(InvalidInput, match="images of this learner may show several classes"):
        IncrementalClassifier.load(tmp_path / "sets", towers).partial_fit(test[:2], ["a", "b"])
    manifest = next((tmp_path / "sets").glob("learner-0*.json"))
    assert "decisions" in manifest.read_text()


def test_damaged_decisions_are_refused_in_one_line(learned):
    rule, state = learned._learned.sets.rule, learned._learned.sets.state_dict()
    broken = (
        None,
        {key: value for key, value in state.items() if key != "shown"},
        state | {"classes": state["classes"] + 6},
        state | {"weights": -state["weights"]},
        state | {"values": state["values"].double()},
    )
    for one in broken:
        with pytest.raises(ValueError, match=r"in place of|types|out of range"):
            type(learned._learned.sets).from_state(rule, one)


def test_a_saved_learner_without_its_decisions_is_refused(learned, towers, tmp_path):
    from cairn.storage.archive import Archive

    learned.save(tmp_path)
    held = Archive(tmp_path, "learner").read()
    del held.parts["decisions"]
    Archive(tmp_path, "learner").write(held.record, held.parts)
    with pytest.raises(ResultError, match="decisions") as caught:
        IncrementalClassifier.load(tmp_path, towers)
    assert "\n" not in str(caught.value)


def test_which_kind_of_labels_is_said_once(scenes, learned, towers):
    images, test = scenes[0][0], scenes[2][0]
    declared = learner(towers, targets="sets")
    with pytest.raises(InvalidInput, match="may show several classes; give a list"):
        declared.partial_fit(images[:2], ["a", "b"])
    declared.partial_fit(images[0], ["a", "b"])  # one image, its names
    assert [*declared.classes_] == ["a", "b"]
    assert not any("lists of labels" in notice for notice in declared.notices_)
    plain = learner(towers).partial_fit(images[:4], ["a", "b", "a", "b"])
    with pytest.raises(InvalidInput, match="show one class each"):
        plain.partial_fit(images[:2], [["a", "b"], ["a"]])
    with pytest.raises(InvalidInput, match="show one class each"):
        learner(towers, targets="one").partial_fit(images[:2], [["a", "b"], ["a"]])
    with pytest.raises(ConfigError, match="targets 'several': must be"):
        learner(towers, targets="several").partial_fit(images[:2], ["a", "b"])
    with pytest.raises(ConfigError, match="no threshold"):
        plain.predict(test[:1], threshold=0.5)
    with pytest.raises(AttributeError, match="no thresholds"):
        _ = plain.thresholds_
    for labels in (None, "a", 3, [[1]], [["a"], [2]], [["a"]]):
        with pytest.raises(InvalidInput) as caught:
            learned.partial_fit(images[:2], labels)
        assert "\n" not in str(caught.value)
    assert len(learned.history_) == 2


def test_what_has_no_meaning_for_sets_is_refused_in_one_line(scenes, learned):
    test = scenes[2][0][:2]
    asked = (
        lambda: learned.known_score(test),
        lambda: learned.predict(test, unknown_below=0.1),
        lambda: learned.drift(test),
        lambda: learned.merge(*learned.classes_[:2]),
    )
    for ask in asked:
        with pytest.raises(ConfigError, match="may show several classes") as caught:
            ask()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="threshold 2"):
        learned.predict(test, threshold=2)


def test_a_name_that_would_read_as_several_is_refused(scenes, learned):
    """Where sets are written, semicolons stand between names."""
    images, labels = scenes[0]
    with pytest.raises(DataError, match=r"class 'a;b': semicolons stand between the names"):
        copy.copy(learned).partial_fit(images[:2], [[*labels[0], "a;b"], labels[1]])
    with pytest.raises(DataError, match=r"class 'a;b': semicolons"):
        copy.copy(learned).rename(learned.classes_[0], "a;b")


def test_labels_that_are_known_are_left_out_and_further_ones_learned(scenes, towers):
    images, sets = scenes[0]
    held = learner(towers).partial_fit(images, sets)
    counts = held.counts_.copy()
    held.partial_fit(images, sets)
    assert len(held.history_) == 1
    assert any("already learned with these labels" in notice for notice in held.notices_)
    held.partial_fit([images[0], images[0], images[1]], [[*sets[0], "further"], ["other"], []])
    assert held.counts_.tolist() == [*counts, 1, 1]
    assert held.history_[-1]["images"] == 1
    told = " ".join(held.notices_)
    for said in ("without a label", "given twice", "only the further labels"):
        assert said in told
    np.testing.assert_allclose(held.method_.state_dict()["counts"], held.counts_)
    with pytest.raises(DataError, match="no image has one"):
        held.partial_fit(images[:2], [[], []])


def test_changes_are_made_to_sets_too(scenes, towers, tmp_path):
    first, second, (test, _) = scenes
    held = learner(towers).partial_fit(*first).partial_fit(*second)
    names = [str(name) for name in held.classes_]
    before = held.predict_proba(test)
    held.save(tmp_path)
    held.rename(names[0], "called otherwise")
    np.testing.assert_array_equal(held.predict_proba(test), before)
    held.forget("called otherwise")
    assert [*held.classes_] == names[1:]
    assert held.thresholds_.shape == (5,)
    assert held.predict_proba(test).shape == (len(test), 5)
    held.relabel(first[0][:1], [names[1], names[2]])
    held.unlearn(first[0][:1])
    with pytest.raises(DataError, match="class each"):
        held.relabel(first[0][:1], [])
    held.save(tmp_path)
    with pytest.raises(CairnError):
        IncrementalClassifier.undo(tmp_path, towers)
    again = learner(towers).partial_fit(*first)
    again.save(tmp_path / "two")
    again.partial_fit(*second).save(tmp_path / "two")
    back = IncrementalClassifier.undo(tmp_path / "two", towers)
    assert len(back.classes_) == len(back.thresholds_) == 4


def test_too_few_images_to_leave_any_out_stand_in_for_those(scenes, towers):
    held = learner(towers).partial_fit(scenes[0][0][:2], [["a", "b"], ["b", "c"]])
    rule = held._learned.sets.rule
    assert (rule.images, rule.learned) == (0, 2)
    assert np.isfinite(held.predict_proba(scenes[2][0][:3])).all()


def test_embeddings_with_sets(scenes):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 8)) * 2
    y = rng.random((60, 3)) < [0.6, 0.3, 0.2]
    y[~y.any(1), 0] = True
    rows = (y @ centres + rng.normal(size=(60, 8))).astype("float32")
    sets = [[f"c{c}" for c in np.flatnonzero(own)] for own in y]
    held = IncrementalClassifier("lda", towers="rows").fit(rows[:40], sets[:40])
    assert held.evaluate(rows[40:], sets[40:]).mean_average_precision > 0.6


def test_what_is_kept_of_left_out_images_is_bounded_and_weighs_as_much():
    rng = torch.Generator().manual_seed(0)
    held, n = before_any(centred=True), 0
    for _ in range(3):
        scores, shown = torch.randn(700, 2, generator=rng), torch.rand(700, 2, generator=rng) < 0.4
        held, n = held.with_images(scores + shown, shown, torch.tensor([True, False])), n + int(shown[:, 0].sum())
    own = held.decisions
    assert own.classes.unique().tolist() == [0]
    assert int((own.shown > 0).sum()) == MOST_SHOWN
    assert int((own.shown == 0).sum()) == MOST_OTHERS
    assert float(own.weights.sum()) == pytest.approx(2100)
    assert float(own.weights[own.shown > 0].sum()) == pytest.approx(n, rel=1e-5)
    assert held.without_class(0).decisions.classes.numel() == 0
    assert held.without_class(1).rule.offsets == held.rule.offsets[:1]


def test_it_is_exported_with_probabilities_by_themselves(scenes, learned, tmp_path):
    import onnxruntime

    from cairn.classifier.onnx import export_onnx

    made = export_onnx(learned, tmp_path / "sets.onnx", images=scenes[2][0][:4])
    assert made.probability < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "sets.onnx"), providers=["CPUExecutionProvider"])
    held = json.loads(session.get_modelmeta().custom_metadata_map["cairn.thresholds"])
    np.testing.assert_allclose(held, learned.thresholds_)


def test_a_class_taught_alone_is_not_said_of_every_image(scenes, towers):
    first, second, (test, _) = scenes
    held = learner(towers).partial_fit(*first)
    before = held._learned.sets.rule
    held.partial_fit([*second[0][:6]], [["taught alone"]] * 6)
    rule = held._learned.sets.rule
    assert rule.thresholds[-1] == 0.5
    assert rule.offsets[:4] == pytest.approx(before.offsets, abs=1e-6)
    assert held.predict_proba(test)[:, -1].mean() < 0.7
