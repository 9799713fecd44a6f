"""Runs of which only some training images are labelled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cutting import Cut, Cutting
from PIL import Image

from cairn.classifier.stored import copied
from cairn.data.feature_store import FeatureStore
from cairn.data.images import Concatenation, Subset
from cairn.data.loading import Loader
from cairn.errors import ConfigError, DataError
from cairn.experiment.folder import read_result
from cairn.experiment.inputs import prepared
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig, comparable_call
from cairn.methods.catalogue import METHODS
from cairn.storage.archive import Archive
from cairn.training.context import Checkpoint, Context, Seeds
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
    older = {key: value for key, value in call.items() if key not in ("labelled", "unlabelled", "pseudo_labels")}
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


@pytest.fixture
def folder(tmp_path):
    """Two classes of six training and four test pictures, all different."""
    for part, number in (("train", 6), ("test", 4)):
        for c, name in enumerate(("cat", "dog")):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(number):
                colour = (100 * c, 20 * i, 200 if part == "test" else 0)
                Image.new("RGB", (40, 30), colour).save(tmp_path / "data" / part / name / f"{i}.png")
    return tmp_path / "data"


def unlabelled_in(config):
    stream = prepared(config).stream
    (images,) = {id(images): images for images in stream.unlabelled}.values()
    return [images.describe(i) for i in range(len(images))], stream.notices


def test_test_images_are_not_learned_from_whatever_their_files_are_called(folder, tmp_path):
    """The folder of the data itself holds its test images; a copy of one in another format and place is one too."""
    config = RunConfig(method="simplecil", data=str(folder), step=2, unlabelled=str(folder))
    names, notices = unlabelled_in(config)
    assert len(names) == 12
    assert all("/train/" in name for name in names)
    assert any(f"unlabelled '{folder}': left out, as test images: 8 of 20 pictures" in text for text in notices)

    more = tmp_path / "more"
    more.mkdir()
    Image.open(folder / "test" / "cat" / "3.png").save(more / "copy.bmp")
    Image.new("RGB", (40, 30), (1, 2, 3)).save(more / "other.png")
    names, _ = unlabelled_in(config.model_copy(update={"unlabelled": str(more)}))
    assert names == ["more/other.png"]
    (more / "other.png").unlink()
    with pytest.raises(DataError, match="all of its pictures are test images of data 'data'; give others"):
        prepared(config.model_copy(update={"unlabelled": str(more)}))


def test_with_a_validation_split_neither_its_images_nor_those_of_the_test_split_are_learned_from(folder):
    config = RunConfig(method="simplecil", data=str(folder), step=2, unlabelled=str(folder), validation=0.5)
    names, _ = unlabelled_in(config)
    stream = prepared(config).stream
    tested = {images.describe(i) for images in stream.tests for i in range(len(images))}
    assert len(tested) == 6
    assert len(names) == 6
    assert not {name.removeprefix("data/") for name in names} & tested
    assert all("/train/" in name for name in names)


def quick(method, **values):
    settings = {"stage1.schedule.epochs": 1, "stage2.schedule.epochs": 1} if method == "dmc" else {}
    return RunConfig(method=method, step=20, limit_train=4, limit_test=1, labelled=0.5, settings=settings, **values)


@pytest.mark.parametrize("method", ["simplecil", "ranpac"])
def test_a_teacher_tells_what_they_show(method):
    """As if those images had come with the labels that the method, which learned the others, gives them."""
    config = RunConfig(method=method, step=20, limit_train=8, limit_test=2, labelled=0.25, pseudo_labels=0.5)
    events, towers = [], []
    found = run_stream(config, Log(keep=events.append), learned=lambda outcome: towers.append(outcome.towers))
    assert not [event for event in events if event["event"] == "notice" and "without labels" in event["text"]]
    told = [(event["images"], event["trusted"]) for event in events if event["event"] == "unlabelled"]
    assert told == [(120, 60)] * 2
    assert found.unlabelled_sizes == [120, 120]
    assert sum(found.train_sizes) == 80  # what has labels

    entry = METHODS[method]
    learner, ctx = entry.build(towers[0], entry.config(), seed=1), Context(Seeds(1))
    for task in prepared(config).stream.tasks:
        teacher = copied(lambda: entry.build(towers[0], entry.config(), seed=1), learner.state_dict(), [])
        teacher.learn(replace(task, unlabelled=None), ctx)
        loader = Loader(task.unlabelled, towers[0].prepare, towers[0].pixels)
        scores = torch.cat([teacher.scores(teacher.embed(pixels)).detach() for pixels, _ in loader.ordered()])
        scores[:, : task.classes.start] = -torch.inf
        two = scores.double().topk(2, 1).values
        rows = sorted(sorted(range(120), key=lambda i: (-(two[i, 0] - two[i, 1]).item(), i))[:60])
        more = Subset(task.unlabelled, np.array(rows), scores.argmax(1).numpy()[rows])
        learner.learn(replace(task, train=Concatenation([task.train, more]), unlabelled=None), ctx)
    assert found.last == accuracy_of(learner, prepared(config).stream.tests)


def accuracy_of(method, tests):
    right = []
    for images in tests:
        loader = Loader(images, method.towers.prepare, method.towers.pixels)
        for pixels, labels in loader.ordered():
            right += (method.scores(method.embed(pixels)).argmax(1).cpu() == labels).tolist()
    return sum(right) / len(right)


def test_a_run_that_was_cut_off_while_the_teacher_learned_ends_the_same(tmp_path):
    config, untouched = quick("dmc", pseudo_labels=1.0), Cutting()
    whole, names = run_stream(config, checkpoint=untouched, archive=Archive(tmp_path / "whole", "run")), untouched.names
    places = [i + 1 for i, name in enumerate(names) if name.startswith("teacher-")]
    assert 0 < len(places) < len(names)
    for after in (places[0], places[-1], places[-1] + 2):
        archive = Archive(tmp_path / str(after), "run")
        with pytest.raises(Cut):
            run_stream(config, checkpoint=Cutting(after), archive=archive)
        again = run_stream(config, checkpoint=Checkpoint(steps=1), archive=archive)
        assert again.accuracy == whole.accuracy
        assert again.resumed == 1
        assert again.nll == whole.nll


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("blend", {}, "not with method 'blend': it learns from images without labels by itself"),
        ("joint", {}, "not with method 'joint': it keeps the images of every task"),
        ("lda", {"labelled": 1.0}, "all images have labels; give --labelled or --unlabelled"),
    ],
)
def test_where_it_cannot_be_it_is_refused(method, values, message, tmp_path):
    with pytest.raises(ConfigError, match=f"--pseudo-labels 0.5: {message}"):
        run_stream(RunConfig(method=method, pseudo_labels=0.5, **({"labelled": 0.5} | values)))


def test_the_command_takes_the_share_and_tables_name_it(cairn):
    call = ["run", "simplecil", "--limit-train", 2, "--limit-test", 1, "--step", 20, "--labelled", 0.5]
    assert cairn(*call, "--pseudo-labels", 1, "--out", "told")[0] == 0
    assert cairn(*call, "--out", "plain")[0] == 0
    _, out, _ = cairn("table", "told", "plain")
    assert "simplecil (pseudo-labels=1)" in out
    status, _, err = cairn(*call, "--pseudo-labels", 1.5, "--out", "x")
    assert (status, err.count("\n")) == (2, 1)
    assert "--pseudo-labels 1.5" in err
