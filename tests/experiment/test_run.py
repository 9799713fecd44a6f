"""Whole runs: the result, its numbers, and what a bad call says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cairn.data.stream import class_order
from cairn.errors import CairnError, ResultError
from cairn.experiment.folder import Call, RunFolder, read_result
from cairn.experiment.metrics import average_incremental, seen_accuracy
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig, RunResult, comparable_call
from cairn.maths.frequency import by_frequency
from cairn.training.log import Log

QUICK = ("stage1.schedule.epochs=1", "stage2.schedule.epochs=1")


def told_right(method, file) -> list[list[bool]]:
    """Of each class in its natural order, which of its test images the method tells right."""
    tensors = load_file(file)
    x, y = tensors["test_features"].float(), tensors["test_labels"]
    arrival = torch.as_tensor(class_order("seed:1993", [str(c) for c in range(6)]))
    with torch.no_grad():
        found = arrival[method.scores(method.embed(x)).argmax(1)]
    return [(found[y == c] == c).tolist() for c in range(6)]


def test_a_result_is_consistent_with_itself(features_file, blurred_dataset):
    features = features_file(test_features=blurred_dataset.test.values)
    config, learned = RunConfig(method="dmc", data=features, step=2, order="seed:1993", seed=3), []
    result = run_stream(config, learned=learned.append)
    assert result.exemplar_free
    assert [len(row) for row in result.accuracy] == [3, 3, 3]
    assert result.accuracy[0][1:] == [None, None]
    assert result.seen_accuracy == pytest.approx(seen_accuracy(result.accuracy, result.test_sizes))
    assert result.average == pytest.approx(average_incremental(result.seen_accuracy))
    assert result.last == result.seen_accuracy[-1]
    right = told_right(learned[-1].method, features)
    assert result.seen_accuracy[-1] == pytest.approx(sum(map(sum, right)) / sum(map(len, right)))
    assert result.seen_accuracy_by_class[-1] == pytest.approx(sum(sum(own) / len(own) for own in right) / len(right))
    assert abs(result.seen_accuracy_by_class[-1] - result.seen_accuracy[-1]) > 1e-3  # classes are of unequal size
    right = [right[int(name.removeprefix("class_"))] for name in result.class_order]
    values = [sum(own) / len(own) for own in right]
    grouped = by_frequency(values, result.train_sizes)
    assert len(set(result.train_sizes)) > 1
    assert result.last_by_frequency == pytest.approx(grouped.means)
    assert result.frequency_terciles
    assert result.future_accuracy[-1] is None
    assert all(0 <= a <= 1 for a in result.future_accuracy[:-1])
    assert result.config["stage1"]["tuning"]["kind"] == "adapter"
    assert result.seconds > sum(result.seconds_per_task) > 0
    assert result.peak_rss_bytes > 10_000_000
    assert result.memory_bytes > 0
    assert set(result.versions) >= {"cairn", "torch", "transformers", "peft", "python"}
    assert RunResult.model_validate_json(result.model_dump_json()) == result


def test_the_seed_moves_training_but_not_the_order(features):
    def table(seed):
        result = run_stream(RunConfig(method="dmc", data=features, step=2, order="seed:5", seed=seed))
        return result.class_order, result.config, [round(a, 6) for a in result.seen_accuracy]

    assert table(1) == table(1)
    assert table(1)[:2] == table(2)[:2]


def test_images_go_through_a_frozen_tower_once(tmp_path):
    config = RunConfig(method="simplecil", data="shapes", step=20, limit_train=2, limit_test=1, device="cpu")
    result = run_stream(config)
    assert result.tower_passes.images == 80
    assert result.evaluation_passes.images == 40
    assert result.tower_passes.text_tokens == 0


def test_a_tower_that_moves_once_sees_the_test_images_twice(tmp_path):
    """As it came and as it became, whatever the number of tasks after that."""
    settings = {"tuning": "bottleneck", "width": 30, "schedule.epochs": 1}
    config = RunConfig(
        method="ranpac", data="shapes", step=10, limit_train=2, limit_test=1, device="cpu", settings=settings
    )
    assert run_stream(config).evaluation_passes.images == 2 * 40


def test_events_tell_the_run_in_order(features):
    events = []
    run_stream(RunConfig(method="dmc", data=features, step=3), Log(keep=events.append))
    kinds = [event["event"] for event in events]
    assert kinds[0] == "notice"
    assert "embedding form" in events[0]["text"]
    assert kinds.count("start") == 1
    assert kinds.count("task") == 2
    assert kinds.index("start") < kinds.index("epoch") < kinds.index("task")
    json.dumps(events, allow_nan=False)


TOO_MANY = (
    "6 classes, 16 numbers wide, are too many for full covariances (96.00 GB): from 6 on they are kept as low_rank of rank 32 "
    "(0.00 GB); covariance=full keeps them all"
)
WILL_TAKE = (
    "full covariances of 6 classes, 16 numbers wide, will take 96.00 GB, and as much again while a task is learned; "
    "covariances of kind low_rank (rank 32) 0.00 GB"
)


@pytest.mark.parametrize(
    ("settings", "said"), [({}, [TOO_MANY]), ({"covariance": "full"}, [WILL_TAKE]), ({"covariance": "low_rank"}, [])]
)
def test_full_covariances_that_will_be_large_are_told_with_their_size(features, settings, said, monkeypatch):
    """Of 6 classes, 16 wide: 2 d (d + 1) + 4 d + 8 bytes each, of low rank 4 (d r + r + d) in place of the first; r is d at most."""
    notices = []

    def told(limit):
        monkeypatch.setattr("cairn.memory.gaussians.CACHE_BYTES", limit)
        monkeypatch.setattr("cairn.memory.gaussians.full_bytes", lambda d: 1e9 * d)
        quick = {"stage1.schedule.epochs": 0, "stage2.schedule.epochs": 0} | settings
        run_stream(RunConfig(method="dmc", data=features, step=2, settings=quick), Log(keep=notices.append))
        found = [event["text"] for event in notices if "full covariances" in event.get("text", "")]
        notices.clear()
        return found

    assert told(4 * 6 * 16**2) == []
    assert told(4 * 6 * 16**2 - 1) == said


def test_class_means_stand_in_where_a_features_file_has_no_texts(features_file):
    path = features_file(text_features=None)
    notices = []
    result = run_stream(RunConfig(method="dmc", data=path, step=2), Log(keep=notices.append))
    assert any("class means" in event.get("text", "") for event in notices)
    assert result.last > 0.5
    assert result.future_accuracy == [None, None, None]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "dmcc"}, "unknown method 'dmcc': did you mean dmc"),
        ({"data": "shape"}, "did you mean shapes"),
        ({"data": "./no/such/folder"}, "no/such/folder"),
        ({"step": 7}, "step 7 is larger than the number of classes, 6"),
        ({"step": 0}, "step 0"),
        ({"base": 9}, "base 9 is larger"),
        ({"order": "reversed"}, "order 'reversed': neither natural, seed:N nor a file"),
        ({"settings": ("stage1.epochs=2",)}, "unknown setting 'stage1.epochs'"),
        ({"settings": ("stage1.tuning=lora",)}, "take adapter or none"),
        ({"settings": ("stage2.text=prompts",)}, "take stage2.text=residual"),
        ({"towers": "tiny"}, "leave --towers out"),
        ({"validation": 1.5}, "validation 1.5"),
        ({"limit_train": 0}, "limit-train 0"),
    ],
)
def test_bad_input_is_one_line_with_the_value(features, changes, says):
    with pytest.raises(CairnError) as caught:
        run_stream(RunConfig(**({"method": "dmc", "data": features, "step": 2} | changes)))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["zero-shot", "simplecil", "finetune", "joint", "dmc"])
def test_every_method_runs_on_images(method):
    settings = {"finetune": QUICK[:1], "joint": QUICK, "dmc": QUICK}.get(method, ())
    result = run_stream(
        RunConfig(method=method, data="shapes", step=20, limit_train=1, limit_test=1, settings=settings, device="cpu")
    )
    assert len(result.seen_accuracy) == 2
    assert result.exemplar_free == (method != "joint")


def test_published_figures_on_real_clip_embeddings(shared):
    folder = shared / "clip-vit-b32-features"
    ucf = run_stream(RunConfig(method="simplecil", data=str(folder / "ucf101.safetensors"), step=10, order="seed:1993"))
    assert (100 * ucf.average, 100 * ucf.last) == pytest.approx((82.20, 74.78), abs=0.02)
    caltech = str(folder / "caltech51.safetensors")
    zero = run_stream(RunConfig(method="zero-shot", data=caltech, step=10, order="seed:1993"))
    assert (100 * zero.average, 100 * zero.last) == pytest.approx((97.55, 95.96), abs=0.02)
    means = run_stream(RunConfig(method="simplecil", data=caltech, step=10, order="seed:1993"))
    assert (100 * means.average, 100 * means.last) == pytest.approx((97.54, 95.21), abs=0.02)


@pytest.mark.parametrize(
    ("then", "now", "towers", "same"),
    [
        ("crop", None, "tiny", True),  # of before it could be unset
        ("crop", "crop", "tiny", True),
        ("squash", None, "tiny", False),
        ("squash", "crop", "tiny", False),
        ("crop", None, "open_clip:copies/vit", False),  # such a checkpoint may say otherwise
        (None, None, "open_clip:copies/vit", True),
    ],
)
def test_calls_of_before_preprocessing_could_be_unset_are_the_same(then, now, towers, same):
    stored, asked = (RunConfig(method="dmc", towers=towers, preprocess=value) for value in (then, now))
    assert (comparable_call(stored.model_dump()) == comparable_call(asked.model_dump())) is same


def test_stored_results_of_the_repository_are_still_those_of_their_calls(tmp_path):
    """`cairn run` with the call as it is written today takes them for finished."""
    stored = Path(__file__).parents[2] / "results" / "shapes" / "dmc" / "seed-1"
    shutil.copytree(stored, tmp_path / "x")
    call = read_result(stored).run
    assert call.preprocess == "crop"
    today = Call(run=call.model_copy(update={"preprocess": None}), checkpoint_seconds=60)
    assert RunFolder(tmp_path / "x", today).finished() is not None
    today = Call(run=call.model_copy(update={"preprocess": "squash"}), checkpoint_seconds=60)
    with pytest.raises(ResultError, match="preprocess crop, not squash"):
        RunFolder(tmp_path / "x", today).finished()
