"""A kept learner, and the patches behind its predictions."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

from cairn.cli.app import main
from cairn.data.shapes import shapes_dataset
from cairn.errors import ConfigError, ResultError
from cairn.experiment.folder import LEARNER, Call, RunFolder, read_learner, write_learner
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.methods.catalogue import METHODS
from cairn.training.context import Context
from cairn.training.log import Log
from cairn.training.seeds import Seeds


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run of SPA with its learner, and the method that was kept."""
    folder = tmp_path_factory.mktemp("run")
    config = RunConfig(
        method="spa",
        data="shapes",
        step=20,
        limit_train=3,
        limit_test=1,
        device="cpu",
        settings=("schedule.epochs=2", "local.patches=8"),
    )
    ended = []
    result = run_stream(config, Log(), ended.append)
    write_learner(folder, ended[0])
    RunFolder(folder, Call(run=config, checkpoint_seconds=60)).write(result)
    return folder, ended[0].method


def pixels(method, index=0):
    return method.towers.pixels(method.towers.prepare(shapes_dataset().test[index])[None])


def test_a_learner_comes_back_as_it_was(kept):
    folder, method = kept
    result, learner = read_learner(folder)
    restored = learner.method_
    assert result.method == "spa"
    x = pixels(method)
    assert torch.equal(restored.scores(restored.embed(x)), method.scores(method.embed(x)))
    assert restored.sentences == method.sentences


def test_reasons_add_up_to_the_score(kept):
    _, method = kept
    x = pixels(method)
    scores = method.scores(method.embed(x))[0]
    reasons = method.reasons(method.embed(x), best=4)
    assert [reason["class"] for reason in reasons] == scores.topk(4).indices.tolist()
    for reason in reasons:
        total = method.towers.logit_scale * (reason["global"] + method.config.local.weight * reason["local"])
        assert reason["score"] == pytest.approx(total, rel=1e-4)
        assert reason["score"] == pytest.approx(float(scores[reason["class"]]))
        assert sum(patch["share"] for patch in reason["patches"]) == pytest.approx(1, abs=1e-4)
        assert len({patch["patch"] for patch in reason["patches"]}) == 8
        assert {patch["sentence"] for patch in reason["patches"]} <= set(method.sentences[reason["class"]])


@pytest.mark.parametrize("tokens", ["sentences", "words"])
def test_every_token_knows_its_sentence(towers, small_stream, tokens):
    entry = METHODS["spa"]
    config = entry.config.model_validate({"local": {"tokens": tokens}, "schedule": {"epochs": 0}})
    method = entry.build(towers, config, seed=1)
    method.learn(small_stream.tasks[0], Context(Seeds(1)))
    said = [method._sentence(1, token) for token in range(len(method._tokens[1]))]
    assert list(dict.fromkeys(said)) == list(method.sentences[1])


def test_the_command_draws_and_writes(kept, tmp_path, monkeypatch, capsys):
    folder, _ = kept
    Image.fromarray(shapes_dataset().test[0]).save(tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["cairn", "predict", str(folder / LEARNER), "scene.png", "--explain", "why"])
    main()
    with Image.open("why/scene.png") as drawn:
        assert drawn.width > 300
    told = json.loads((tmp_path / "why" / "scene.json").read_text())
    assert told["grid"] == 7
    assert [len(reason["patches"]) for reason in told["classes"]] == [8, 8, 8]
    assert told["classes"][0]["name"] in capsys.readouterr().out
    names = ("one/scene.png", "one/scene-2.png", "two/scene.png")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "scene.png", tmp_path / name)
    monkeypatch.setattr("sys.argv", ["cairn", "predict", str(folder / LEARNER), *names, "--explain", "each"])
    main()
    told = {json.loads(file.read_text())["image"] for file in (tmp_path / "each").glob("*.json")}
    assert told == {*names}


def test_the_command_of_before_says_what_to_use(cairn):
    status, out, err = cairn("explain-image", "runs/a", "scene.png", "--best", "2")
    assert (status, out) == (2, "")
    assert err == (
        "cairn: explain-image: use `cairn predict RUN/learner IMAGE --explain FOLDER`, which writes the same picture\n"
    )


def test_what_cannot_be_explained_is_said(kept, tmp_path, towers):
    folder, method = kept
    with pytest.raises(ResultError, match="cannot be read"):
        read_learner(tmp_path)
    result, _ = read_learner(folder)
    RunFolder(tmp_path, Call(run=result.run, checkpoint_seconds=60)).write(result)
    with pytest.raises(ResultError, match="run it again with --keep-learner"):
        read_learner(tmp_path)
    (tmp_path / LEARNER).mkdir()
    (tmp_path / LEARNER / "learner-000001.json").write_bytes(b"no learner")
    with pytest.raises(ResultError, match="not JSON"):
        read_learner(tmp_path)
    with pytest.raises(ValueError, match="2 images: one at a time"):
        method.reasons(method.embed(pixels(method)).expand(2, -1))
    plain = METHODS["spa"]
    flat = plain.build(towers, plain.config.model_validate({"local": {"weight": 0}}), seed=1)
    with pytest.raises(ConfigError, match=r"local\.weight is 0"):
        flat.reasons(flat.embed(pixels(method)))
