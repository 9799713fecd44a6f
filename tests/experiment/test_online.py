"""Runs of online streams: what they find, who may, and what the command says."""

from __future__ import annotations

import pytest
from pydantic import JsonValue

from cairn.errors import ConfigError
from cairn.experiment.folder import read_result
from cairn.experiment.metrics import any_time
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.methods.catalogue import METHODS
from cairn.methods.protocol import LearnsOnline
from cairn.training.log import Log

ABLE = [name for name in METHODS if LearnsOnline in METHODS[name].capabilities]
ONLINE = {"stream": "online", "chunk": 15, "step": 2}


def test_an_online_result_is_consistent_with_itself(features):
    events = []
    result = run_stream(RunConfig(method="lda", data=features, **ONLINE), Log(keep=events.append))
    whole = run_stream(RunConfig(method="lda", data=features, step=2))
    assert sum(result.chunk_sizes) == sum(result.train_sizes) == sum(whole.train_sizes)
    assert set(result.chunk_sizes[:3]) == {15}
    assert result.any_time == pytest.approx(any_time(result.chunk_accuracy, result.chunk_sizes))
    ends = [
        len([e for e in events[: events.index(t)] if e["event"] == "chunk"]) for t in events if t["event"] == "task"
    ]
    assert [result.chunk_accuracy[end - 1] for end in ends] == pytest.approx(result.seen_accuracy)
    assert result.accuracy == whole.accuracy  # the same statistics, learned in another order
    assert result.future_accuracy == whole.future_accuracy
    assert result.split != whole.split
    assert len(result.seconds_per_task) == 3
    assert whole.any_time is None
    assert not whole.chunk_sizes


def test_blurry_borders_move_images_and_nothing_else(features):
    sharp, blurry = (run_stream(RunConfig(method="lda", data=features, blurry=b, **ONLINE)) for b in (0.0, 0.5))
    assert sharp.train_sizes == blurry.train_sizes
    assert sharp.test_sizes == blurry.test_sizes
    assert sharp.split != blurry.split
    assert sharp.accuracy[-1] == blurry.accuracy[-1]  # at the end the same images were learned


@pytest.mark.parametrize("name", ABLE)
def test_chunks_of_one_image_are_learned(name, features):
    quick: dict[str, JsonValue] = (
        {"width": 60} if name in ("acil", "ranpac") else {"features": 60} if name == "blend" else {}
    )
    config = RunConfig(method=name, data=features, stream="online", chunk=1, step=3, limit_train=4, settings=quick)
    result = run_stream(config)
    assert len(result.chunk_sizes) == 2 * (1 + 9)
    assert result.last > 0.4
    assert not {float("inf"), None} & set(result.nll)


def test_temperatures_are_fitted_on_what_was_scored_before_it_was_learned(features):
    found = []
    result = run_stream(
        RunConfig(method="simplecil", data=features, **ONLINE),
        learned=lambda outcome: found.append(outcome.calibration),
    )
    # Of the first chunk no class is known; of those that begin a task the new ones are not
    known = sum(result.chunk_sizes) - sum(size for size in result.chunk_sizes[:1])
    assert 0 < found[0].rows <= known
    assert result.temperature[0] not in (None, 1.0)
    again = run_stream(RunConfig(method="simplecil", data=features, **ONLINE))
    assert again.temperature == result.temperature


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(ABLE)))
def test_what_goes_over_images_again_is_refused_in_one_line(name, features):
    with pytest.raises(ConfigError, match=f"--stream online: not with method '{name}': it goes over.*take one of acil"):
        run_stream(RunConfig(method=name, data=features, **ONLINE))


def test_a_refused_call_leaves_nothing_behind(features, tmp_path, cairn):
    call = ["run", "dmc", "--data", features, "--step", 2, "--stream", "online", "--out", "runs/new"]
    status, out, err = cairn(*call)
    assert (status, out) == (2, "")
    assert err.startswith("cairn: --stream online: not with method 'dmc'")
    assert not (tmp_path / "runs").exists()


def test_a_setting_that_goes_over_images_again_is_refused(features):
    config = RunConfig(method="ranpac", data=features, settings={"tuning": "adapter"}, **ONLINE)
    with pytest.raises(ConfigError, match="not with method 'ranpac': tuning trains the image encoder in epochs"):
        run_stream(config)


def test_the_command_says_it(features, tmp_path, cairn):
    status, out, _ = cairn("run", "lda", "--data", features, "--step", 2, "--stream", "online", "--out", tmp_path / "a")
    assert status == 0
    assert "any-time accuracy" in out
    assert read_result(tmp_path / "a").chunk_sizes == [58, 76, 46]  # tasks are smaller than a chunk is by default
    status, _, err = cairn("run", "lda", "--data", features, "--step", 2, "--chunk", 9, "--out", tmp_path / "b")
    assert status != 0
    assert err == "cairn: chunk 9: tasks are learned whole; ask for --stream online, or leave --chunk out\n"
    status, _, err = cairn("run", "lda", "--data", features, "--stream", "twice", "--out", tmp_path / "c")
    assert err == "cairn: --stream twice: must be tasks or online\n"


@pytest.mark.parametrize("asked", [{"stream": "online"}, {"blurry": 0.2}])
def test_several_classes_in_an_image_are_refused(asked):
    with pytest.raises(ConfigError, match="data 'attributes' has several classes in an image; leave it out"):
        run_stream(RunConfig(method="zero-shot", data="attributes", **asked))
