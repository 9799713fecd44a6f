"""Runs of which only some training images are labelled."""

from __future__ import annotations

import pytest
from PIL import Image

from cairn.data.feature_store import FeatureStore
from cairn.errors import ConfigError, DataError
from cairn.experiment.folder import read_result
from cairn.experiment.inputs import prepared
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
