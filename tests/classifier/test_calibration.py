"""Temperatures: what they are fitted on, that they make probabilities true, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cairn import IncrementalClassifier
from cairn.classifier.calibration import MOST, Calibration, LeftOut, left_out, rehearsed, unlearned
from cairn.data.images import Subset
from cairn.data.loading import Loader
from cairn.data.opening import open_dataset
from cairn.data.stream import task_stream
from cairn.experiment.inputs import towers_for
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.maths.calibration import INVERSE_TEMPERATURES, loss_curve
from cairn.maths.calibration_error import calibration_error
from cairn.methods.catalogue import METHODS
from cairn.training.checkpoint import Checkpoint
from cairn.training.context import Context
from cairn.training.seeds import Seeds


def built(method, towers, settings=None):
    entry = METHODS[method]
    return entry.build(towers, settings or entry.default_config(towers), seed=1)


def test_left_out_are_a_fifth_of_each_class_and_never_all_of_one():
    labels = np.repeat([4, 1, 2, 3], [10, 2, 1, 5])
    rows = left_out(labels, torch.Generator().manual_seed(0))
    assert (np.diff(rows) > 0).all()
    assert np.bincount(labels[rows], minlength=5).tolist() == [0, 1, 0, 1, 2]
    assert len(left_out(np.repeat(np.arange(100), 100), torch.Generator().manual_seed(0))) == MOST


def test_losses_of_fewer_classes_weigh_less():
    rng = torch.Generator().manual_seed(0)
    few, many = torch.randn(6, 2, generator=rng), torch.randn(3, 8, generator=rng)
    y, z = torch.tensor([0, 1, 1, 0, 0, 1]), torch.tensor([7, 0, 3])
    found = Calibration().with_images(LeftOut(few, y)).with_images(LeftOut(many, z))
    expected = loss_curve(many, z, 0.5) + loss_curve(few, y, 0.5) * (2 / 8) ** 2
    np.testing.assert_allclose(found.loss, expected.numpy())
    assert (found.rows, found.classes) == (9, 8)
    assert Calibration().temperature == 1.0


def test_what_was_fitted_with_one_temperature_for_all_images_stays_so():
    """Records of before there was a power, and what is added to them."""
    rng = torch.Generator().manual_seed(0)
    s, y = torch.randn(30, 4, generator=rng), torch.randint(4, (30,), generator=rng)
    old = Calibration.model_validate({"rows": 30, "classes": 4, "loss": loss_curve(s, y).tolist()})
    T = old.temperature
    torch.testing.assert_close(old.log_probabilities(s), torch.log_softmax(s.double() / T, 1))
    wider = torch.randn(30, 8, generator=rng)
    more = old.with_images(LeftOut(wider, y))
    np.testing.assert_allclose(more.loss, (loss_curve(s, y) * 4 / 8 + loss_curve(wider, y)).numpy())
    torch.testing.assert_close(more.log_probabilities(s), torch.log_softmax(s.double() / more.temperature, 1))
    torch.testing.assert_close(Calibration().log_probabilities(s), torch.log_softmax(s.double(), 1))


@pytest.mark.parametrize("method", ["lda", "acil", "simplecil", "dmc", "proof"])
def test_left_out_images_were_not_learned_from(method, features):
    """The scores are those of a method that never saw them, to the bit: it learns the rest of the task alone."""
    dataset = open_dataset(features)
    towers = towers_for(RunConfig(method=method, data=features), dataset)
    stream = task_stream(dataset, step=3, order="seed:1")
    learned, alone = built(method, towers), built(method, towers)
    calibration = expected = Calibration()
    for task in stream.tasks:
        state, checkpoint = learned.state_dict(), Checkpoint()

        def before(state=state, first=task.index == 0):
            other = built(method, towers)
            if not first:
                other.load_state_dict(state)
            return other

        alone = before()
        learned.learn(task, Context(Seeds(1), checkpoint=checkpoint))
        calibration = calibration.with_images(
            unlearned(learned, before, task, Context(Seeds(1), checkpoint=checkpoint))
        )
        out = left_out(task.train.labels, Seeds(1).at(task=task.index).generator("calibration"))
        kept = np.setdiff1d(np.arange(len(task.train)), out)
        alone.learn(replace(task, train=Subset(task.train, kept, task.train.labels[kept])), Context(Seeds(1)))
        rows = next(iter(Loader(Subset(task.train, out, task.train.labels[out]), towers.prepare, towers.pixels)))
        expected = expected.with_images(LeftOut(alone.scores(alone.embed(rows[0])), rows[1]))
    assert calibration == expected
    assert calibration.rows == sum(len(left_out(t.train.labels, torch.Generator())) for t in stream.tasks)


def test_ranpac_gives_what_it_holds_out_itself(features):
    dataset = open_dataset(features)
    towers = towers_for(RunConfig(method="ranpac", data=features), dataset)
    stream, method = task_stream(dataset, step=3, order="seed:1"), built("ranpac", towers)
    method.learn(stream.tasks[0], Context(Seeds(1)))
    scores, labels = method.held_out
    assert scores.shape == (len(labels), 3)
    assert len(labels) == round(method.config.held_out * len(stream.tasks[0].train))
    found = Calibration().with_images(
        unlearned(method, lambda: pytest.fail("needs no rehearsal"), stream.tasks[0], Context(Seeds(1)))
    )
    np.testing.assert_allclose(found.loss, loss_curve(scores, labels, 0.5))


def test_blend_is_calibrated_on_the_images_that_it_leaves_out_one_by_one(features, monkeypatch):
    """In a run without a rehearsal; a learner has the same temperature."""
    dataset, config = open_dataset(features), RunConfig(method="blend", data=features, step=3, order="seed:1")
    towers, expected = towers_for(config, dataset), Calibration()
    stream, method = task_stream(dataset, step=3, order="seed:1"), built("blend", towers)
    for task in stream.tasks:
        method.learn(task, Context(Seeds(config.seed)))
        expected = expected.with_images(LeftOut(*method.left_out))
    learner = IncrementalClassifier("blend", towers, seed=config.seed)
    for task in stream.tasks:
        images = [task.train[i] for i in range(len(task.train))]
        learner.partial_fit(images, [stream.class_names[c] for c in task.train.labels])
    assert learner.calibration_ == expected
    assert expected.rows == sum(len(task.train) for task in stream.tasks)
    monkeypatch.setattr("cairn.classifier.calibration.rehearsed", lambda *_: pytest.fail("needs no rehearsal"))
    assert run_stream(config).temperature[-1] == expected.temperature


def test_a_class_that_is_held_out_whole_tells_ranpac_nothing(features):
    dataset = open_dataset(features)
    towers = towers_for(RunConfig(method="ranpac", data=features), dataset)
    (task, *_), method = task_stream(dataset, step=6, order="seed:1").tasks, built("ranpac", towers)
    one_each = np.array([int(np.flatnonzero(task.train.labels == c)[0]) for c in range(6)])
    method.learn(replace(task, train=Subset(task.train, one_each, np.arange(6))), Context(Seeds(1)))
    assert len(method.held_out[1]) == 0


def test_a_tower_that_was_trained_is_not_trained_again(towers, small_stream):
    """Of the rehearsal's images only those left out pass the tower, however often the method's own did."""
    config = METHODS["dmc"].default_config(towers)
    stage2 = config.stage2.model_copy(update={"schedule": config.stage2.schedule.model_copy(update={"epochs": 1})})
    config = config.model_copy(update={"stage2": stage2})
    method, task, checkpoint = built("dmc", towers, config), small_stream.tasks[0], Checkpoint()
    rehearsals = []

    def before():
        rehearsals.append(built("dmc", towers, config))
        return rehearsals[-1]

    method.learn(task, Context(Seeds(1), checkpoint=checkpoint))
    state, passes = {k: v.clone() for k, v in method.state_dict().items()}, towers.passes["images"]
    rehearsed(before, task, Context(Seeds(1), checkpoint=checkpoint))
    assert towers.passes["images"] - passes <= len(left_out(task.train.labels, torch.Generator()))
    own, other = method.image.state_dict(), rehearsals[0].image.state_dict()
    assert all(torch.equal(own[key], other[key]) for key in own)
    assert rehearsals[0].memory.counts.tolist() == [8, 6]  # of 10 and 8
    assert all(torch.equal(value, method.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize("method", ["lda", "simplecil", "acil"])
def test_temperature_changes_no_class_and_no_accuracy(method, features, monkeypatch):
    config = RunConfig(method=method, data=features, step=2)
    result = run_stream(config)
    monkeypatch.setattr("cairn.experiment.run.unlearned", lambda *_: None)
    plain = run_stream(config)
    assert result.accuracy == plain.accuracy
    assert plain.temperature == [1.0] * 3
    assert all(T not in (None, 1.0) for T in result.temperature)
    assert all(a != b for a, b in zip(result.nll, plain.nll, strict=True))


@pytest.mark.parametrize("method", ["lda", "simplecil", "acil"])
def test_probabilities_hold_on_photographs_embedded_by_clip(method, shared):
    """As they come out of these methods they are 8 to 21 points off."""
    path = str(shared / "clip-vit-b32-features" / "ucf101.safetensors")
    settings = ("width=1000",) if method == "acil" else ()
    result = run_stream(RunConfig(method=method, data=path, step=25, order="seed:1993", settings=settings))
    assert result.ece[-1] < 0.05
    assert sum(result.ece) / len(result.ece) < 0.05


def test_probabilities_hold_where_images_stand_out_unequally(shared):
    """With one temperature for all images they are 7 points off."""
    found = run_stream(
        RunConfig(
            method="acil",
            data=str(shared / "cifar100"),
            towers=str(shared / "mini-clip"),
            step=50,
            order="seed:1993",
            limit_train=30,
            limit_test=10,
        )
    )
    assert found.ece[-1] < 0.05


def test_a_learner_and_a_run_have_the_same_temperature(features, tmp_path):
    dataset = open_dataset(features)
    config = RunConfig(method="lda", data=features, step=2, seed=3)
    result = run_stream(config)
    stream, towers = task_stream(dataset, step=2), towers_for(config, dataset)
    learner = IncrementalClassifier("lda", towers, seed=3)
    for task in stream.tasks:
        images = [task.train[i] for i in range(len(task.train))]
        learner.partial_fit(images, [stream.class_names[c] for c in task.train.labels])
    assert learner.calibration_.temperature == result.temperature[-1]
    images = [test[i] for test in stream.tests for i in range(len(test))]
    truth = [stream.class_names[c] for test in stream.tests for c in test.labels]
    p, predicted = learner.predict_proba(images), learner.predict(images)
    right = [a == b for a, b in zip(predicted, truth, strict=True)]
    assert calibration_error(p.max(1).tolist(), right) == pytest.approx(result.ece[-1])
    of_truth = [row[list(learner.classes_).index(name)] for row, name in zip(p, truth, strict=True)]
    assert -np.log(of_truth).mean() == pytest.approx(result.nll[-1])
    learner.save(tmp_path)
    again = IncrementalClassifier.load(tmp_path, towers)
    assert again.calibration_ == learner.calibration_
    np.testing.assert_array_equal(again.predict_proba(images), p)


def test_losses_on_disk_must_fit_the_grid():
    whole = Calibration().with_images(LeftOut(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))).model_dump(mode="json")
    assert len(whole["loss"]) == len(INVERSE_TEMPERATURES)
    for wrong in ({"loss": [1.0]}, {"rows": 0}, {"loss": []}, {"loss": [float("nan")] * 161}):
        with pytest.raises(ValueError, match="loss"):
            Calibration.model_validate(whole | wrong)
