"""Runs of which only some training images are labelled."""

from __future__ import annotations

import pytest
from PIL import Image

from cairn.data.feature_store import FeatureStore
from cairn.errors import ConfigError
from cairn.experiment.folder import read_result
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig, comparable_call
from cairn.training.log import Log


def test_a_method_that_cannot_use_them_says_so_once_and_learns_from_the_others(features):
    events = []
    few = run_stream(RunConfig(method="simplecil", data=features, step=2, labelled=0.25), Log(keep=events.append))
    said = [event["text"] for event in events if event["event"] == "notice" and "without labels" in event["text"]]
    hidden = sum(few.unlabelled_sizes)
    assert said == [f"simplecil learns from labelled images alone: {hidden} without labels are not used"]
    whole = run_stream(RunConfig(method="simplecil", data=features, step=2))
    assert few.train_sizes == [max(1, round(n / 4)) for n in whole.train_sizes]
    assert hidden + sum(few.train_sizes) == sum(whole.train_sizes)
    assert few.test_sizes == whole.test_sizes
    assert few.split != whole.split
    assert whole.unlabelled_sizes == []


def test_a_call_of_before_there_were_any_is_the_same_call():
    call = RunConfig(method="lda").model_dump(mode="json")
    older = {key: value for key, value in call.items() if key not in ("labelled", "unlabelled")}
    assert comparable_call(older) == comparable_call(call)


def test_the_command_takes_a_folder(tmp_path, cairn):
    (tmp_path / "more" / "inside").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (56, 56), (80 * i, 10, 10)).save(tmp_path / "more" / "inside" / f"{i}.png")
    (tmp_path / "more" / "notes.txt").write_text("no picture")
    call = ["run", "simplecil", "--limit-train", 2, "--limit-test", 1, "--step", 20, "--labelled", 0.5]
    status, out, err = cairn(*call, "--unlabelled", "more", "--out", "done")
    assert status == 0, err
    assert "passed over: 1 .txt" in out + err
    assert read_result(tmp_path / "done").unlabelled_sizes == [23, 23]
    (tmp_path / "more" / "torn.png").write_bytes(b"\x89PNG")
    status, _, err = cairn(*call, "--unlabelled", "more", "--out", "torn")
    assert status != 0
    assert "more/torn.png" in err


def test_embeddings_have_no_pictures_beside_them(features, tmp_path):
    with pytest.raises(ConfigError, match="holds embeddings, not images; leave --unlabelled out"):
        run_stream(RunConfig(method="lda", data=features, unlabelled=str(tmp_path)))


def test_with_a_cache_it_is_the_same(tmp_path):
    config = RunConfig(method="simplecil", step=20, limit_train=2, limit_test=1, labelled=0.5)
    plain, cached = run_stream(config), run_stream(config, store=FeatureStore(tmp_path))
    assert cached.accuracy == plain.accuracy
    assert cached.unlabelled_sizes == [20, 20]
