"""Runs on images that show several classes: every method learns them, and average precision is what is measured."""

import json

import numpy as np
import pytest
import torch
from cutting import Cut, Cutting
from sklearn.metrics import average_precision_score, f1_score
from typer.testing import CliRunner

from cairn import IncrementalClassifier
from cairn.cli.app import app
from cairn.config import settings as every_setting
from cairn.data.embeddings import save_features
from cairn.data.feature_store import FeatureStore
from cairn.embed import EmbedConfig, embed_dataset
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig, RunResult
from cairn.methods.catalogue import METHODS
from cairn.storage.archive import Archive

K, D = 6, 8


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Rows that are sums of one to three class directions, classes of unequal size."""
    rng = np.random.default_rng(5)
    centres = np.linalg.qr(rng.normal(size=(D, D)))[0][:K] + 0.3

    def part(n):
        targets = rng.random((n, K)) < np.linspace(0.5, 0.15, K)
        targets[np.arange(K), np.arange(K)] = True
        targets[~targets.any(1), 0] = True
        rows = targets @ centres + 0.15 * rng.normal(size=(n, D))
        return (rows * rng.uniform(0.5, 2, (n, 1))).astype(np.float32), targets.astype(np.uint8)

    (train, shows), (test, tested) = part(90), part(60)
    file = tmp_path_factory.mktemp("sets") / "sets.safetensors"
    names = [f"thing {c}" for c in range(K)]
    save_features(file, train_features=train, train_labels=shows, test_features=test, test_labels=tested, class_names=names,
                  text_features=centres.astype(np.float32), logit_scale=20.0)  # fmt: skip
    return file


def call(path, method="simplecil", **changes):
    return RunConfig(**({"method": method, "data": str(path), "step": 2} | changes))


def test_the_table_is_scikit_learns_average_precision(path):
    outcome = []
    found = run_stream(call(path), learned=outcome.append)
    stream, method = outcome[0].stream, outcome[0].method
    rows = np.concatenate([[test[i] for i in range(len(test))] for test in stream.tests])
    shows = np.concatenate([test.targets for test in stream.tests])
    scores = method.scores(method.embed(torch.from_numpy(rows))).double().numpy()
    scores -= scores.mean(1, keepdims=True)
    expected = [average_precision_score(shows[:, c], scores[:, c]) for c in range(K)]
    assert found.metric == "mAP"
    assert found.precision_by_class == pytest.approx(expected, abs=1e-12)
    assert found.accuracy[-1] == pytest.approx([np.mean(expected[c : c + 2]) for c in (0, 2, 4)])
    assert found.last == found.seen_accuracy_by_class[-1] == pytest.approx(np.mean(expected))
    assert found.average == pytest.approx(np.mean(found.seen_accuracy))
    assert found.train_sizes == [
        int(task.label_sets.targets[:, c].sum()) for task in stream.tasks for c in task.classes
    ]
    assert found.ece == [None] * 3


@pytest.mark.parametrize("name", ["simplecil", "capnet"])
def test_f1_is_scikit_learns_with_thresholds_from_training_images(path, name):
    outcome = []
    quick = {"schedule.epochs": 2} if name == "capnet" else {}
    found = run_stream(call(path, name, settings=quick), learned=outcome.append)
    stream, method, sets = outcome[0].stream, outcome[0].method, outcome[0].sets
    rows = np.concatenate([[test[i] for i in range(len(test))] for test in stream.tests])
    shows = np.concatenate([test.targets for test in stream.tests])
    p = sets.rule.probabilities(method.scores(method.embed(torch.from_numpy(rows)))).numpy()
    said = p >= np.array(found.thresholds)
    assert sets.rule.images > 0
    assert sets.rule.learned == 0
    assert found.thresholds == sets.rule.thresholds

    def scikit(kind, columns=slice(None)):
        return f1_score(shows[:, columns], said[:, columns], average=kind, zero_division=0)

    assert found.macro_f1 == pytest.approx(scikit("macro"), abs=1e-12)
    assert found.micro_f1 == pytest.approx(scikit("micro"), abs=1e-12)
    assert found.f1_by_class == pytest.approx(scikit(None).tolist(), abs=1e-12)
    tasks = [slice(c, c + 2) for c in (0, 2, 4)]
    assert found.macro_f1_by_task[-1] == pytest.approx([scikit("macro", own) for own in tasks], abs=1e-12)
    assert found.micro_f1_by_task[-1] == pytest.approx([scikit("micro", own) for own in tasks], abs=1e-12)
    assert found.macro_f1_by_task[0][1:] == found.micro_f1_by_task[0][1:] == [None, None]
    assert found.seen_macro_f1[0] == found.macro_f1_by_task[0][0]
    assert (found.seen_macro_f1[-1], found.seen_micro_f1[-1]) == (found.macro_f1, found.micro_f1)


def test_a_run_has_the_thresholds_of_a_learner_that_is_given_the_same(path):
    outcome = []
    found = run_stream(call(path, seed=1), learned=outcome.append)
    learner = IncrementalClassifier("simplecil", str(path), seed=1)
    for task in outcome[0].stream.tasks:
        own, names = task.label_sets, outcome[0].stream.class_names
        learner.partial_fit(
            [own[i] for i in range(len(own))], [[names[c] for c in np.flatnonzero(row)] for row in own.targets]
        )
    assert learner.thresholds_ == pytest.approx(found.thresholds, abs=1e-5)  # images are added up in another order


def test_a_run_keeps_a_learner_of_sets(path, tmp_path):
    words = ["run", "lda", "--data", str(path), "--step", "2", "--keep-learner", "--out", str(tmp_path / "run")]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"{100 * result['macro_f1']:.2f} % over classes (macro)" in ended.output
    learner = IncrementalClassifier.load(tmp_path / "run" / "learner")
    assert learner.thresholds_.tolist() == result["thresholds"]
    assert isinstance(learner.predict([np.ones(D, dtype=np.float32)])[0], tuple)


def test_after_a_task_images_of_classes_to_come_are_not_ranked(path):
    outcome = []
    found = run_stream(call(path, "zero-shot"), learned=outcome.append)
    stream, method = outcome[0].stream, outcome[0].method
    rows = np.stack([stream.tests[0][i] for i in range(len(stream.tests[0]))])
    scores = method.scores(method.embed(torch.from_numpy(rows)))[:, :2].double().numpy()
    scores -= scores.mean(1, keepdims=True)
    shows = stream.tests[0].targets[:, :2]
    assert shows.any(1).all()
    assert found.accuracy[0][0] == pytest.approx(
        np.mean([average_precision_score(shows[:, c], scores[:, c]) for c in (0, 1)])
    )
    assert found.zero_shot_accuracy == found.seen_accuracy
    assert found.future_accuracy[-1] is None
    assert 0 < found.future_accuracy[0] <= 1


@pytest.mark.parametrize("name", METHODS)
def test_every_method_ranks_better_than_chance(path, name):
    """By chance, average precision is the share of images that show the class."""
    entry = METHODS[name]
    known = {key for key, _, _ in every_setting(entry.config.embedding())}
    quick = {key: value for key, value in entry.card.quick.items() if key in known}
    found = run_stream(call(path, name, settings=quick))
    assert found.metric == "mAP"
    assert found.last > 0.45


def test_a_run_that_was_cut_off_is_gone_on_with_to_the_bit(path, tmp_path):
    config = call(path, "dmc", settings={"stage1.schedule.epochs": 1, "stage2.schedule.epochs": 2})
    whole, archive = run_stream(config), Archive(tmp_path, "run")
    with pytest.raises(Cut):
        run_stream(config, checkpoint=Cutting(8), archive=archive)
    resumed = run_stream(config, checkpoint=Cutting(), archive=archive)
    assert resumed.resumed == 1
    assert resumed.accuracy == whole.accuracy
    assert resumed.precision_by_class == whole.precision_by_class
    assert resumed.macro_f1_by_task == whole.macro_f1_by_task
    assert resumed.thresholds == whole.thresholds


def test_a_run_that_an_earlier_version_began_has_no_f1(path, tmp_path):
    settings = {"stage1.schedule.epochs": 1, "stage2.schedule.epochs": 2}
    config, archive = call(path, "dmc", settings=settings), Archive(tmp_path, "run")
    with pytest.raises(Cut):
        run_stream(config, checkpoint=Cutting(8), archive=archive)
    held = archive.read()
    assert held is not None
    assert held.record["evaluations"]
    kept = {key: value for key, value in held.parts.items() if key != "decisions"}
    archive.write({key: value for key, value in held.record.items() if key != "label_sets"}, kept)
    resumed = run_stream(config, checkpoint=Cutting(), archive=archive)
    assert resumed.last == run_stream(config).last
    assert resumed.macro_f1 is None
    assert resumed.seen_macro_f1 == []


def test_an_image_is_embedded_once_whatever_it_shows(tmp_path):
    config = RunConfig(method="simplecil", data="attributes", step=16, limit_train=2, limit_test=2)
    outcome = []
    found = run_stream(config, store=FeatureStore(tmp_path), learned=outcome.append)
    tasks = outcome[0].stream.tasks
    images = {task.label_sets.identity(i) for task in tasks for i in range(len(task.label_sets))}
    assert len(images) < sum(len(task.label_sets) for task in tasks) < sum(len(task.train) for task in tasks)
    assert found.tower_passes.stored == sum(len(task.label_sets) for task in tasks) - len(images)
    plain = run_stream(config)
    for row, other in zip(plain.accuracy, found.accuracy, strict=True):
        assert [value for value in row if value is not None] == pytest.approx(
            [v for v in other if v is not None], abs=1e-3
        )


def test_embedded_beforehand_the_same_is_learned(tmp_path):
    file = tmp_path / "embedded.safetensors"
    embed_dataset(EmbedConfig(data="attributes", limit_train=2, limit_test=2), file)
    config = RunConfig(method="simplecil", data="attributes", step=16, limit_train=2, limit_test=2)
    straight, from_file = run_stream(config), run_stream(config.model_copy(update={"data": str(file)}))
    assert from_file.train_sizes == straight.train_sizes
    assert from_file.precision_by_class == pytest.approx(straight.precision_by_class, abs=1e-3)


def test_a_report_says_what_was_measured(path, tmp_path):
    folder = tmp_path / "run" / "seed-1"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(run_stream(call(path)).model_dump_json())
    page = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["report", str(tmp_path / "run"), "-o", str(page)]).exit_code == 0
    text = page.read_text()
    assert "mAP over the classes seen" in text
    assert "the mean over classes of the average precision" in text
    assert "Accuracy over" not in text
    assert "macro F1 %" in text
    assert "Micro F1 over the classes seen" in text


def test_results_of_before_say_accuracy(path):
    stored = json.loads(run_stream(call(path)).model_dump_json())
    for key in [key for key in stored if "f1" in key]:
        del stored[key]
    del stored["metric"], stored["precision_by_class"], stored["thresholds"]
    found = RunResult.model_validate(stored)
    assert (found.metric, found.macro_f1, found.seen_micro_f1) == ("accuracy", None, [])
