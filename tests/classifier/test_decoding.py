"""A learner decodes JPEG files as it did when it was made: whole, or reduced."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from cairn import IncrementalClassifier
from cairn.data.decoding import decoded
from cairn.data.feature_store import FeatureStore
from cairn.serve.service import Service

SIDE = 112
"""Twice the side of the embedded towers."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Six JPEG files, three of each class, with grain that shows how they were decoded."""
    root, rng, found = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for name, colour in (("ash", (200, 80, 40)), ("elm", (30, 90, 190))):
        (root / name).mkdir()
        for i in range(3):
            pixels = np.array(colour) + rng.normal(0, 40, (360, 480, 1)) + rng.normal(0, 9, 3)
            file = root / name / f"{i}.jpg"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=92)
            found.append(file)
    return found


def learner_of(files, method="lda", **how):
    learner = IncrementalClassifier(method, "tiny", device="cpu", **how)
    return learner.partial_fit(files[:2] + files[3:5], ["ash", "ash", "elm", "elm"])


@pytest.fixture(scope="module")
def both(files):
    return learner_of(files), learner_of(files, decode="reduced")


def test_it_learns_and_predicts_from_the_reduced_picture(files, both):
    whole, smaller = both
    given = [decoded(file, SIDE) for file in files]
    assert {picture.size for picture in given} == {(240, 180)}
    by_hand = learner_of(given)
    np.testing.assert_array_equal(smaller.predict_proba(files), by_hand.predict_proba(given))
    assert np.abs(smaller.predict_proba(files) - whole.predict_proba(files)).max() > 0
    np.testing.assert_array_equal(smaller.predict(files), whole.predict(files))


def test_it_stays_so_across_saving(files, both, tmp_path):
    for name, learner in zip(("whole", "reduced"), both, strict=True):
        learner.save(tmp_path / name)
        loaded = IncrementalClassifier.load(tmp_path / name, device="cpu")
        assert loaded.decode == name
        np.testing.assert_array_equal(loaded.predict_proba(files), learner.predict_proba(files))
        towers = json.loads((tmp_path / name / "learner-000001.json").read_text())["record"]["towers"]
        assert towers.get("decode") == (None if name == "whole" else name)  # earlier versions read a whole one


def test_a_store_keeps_the_two_apart(files, both, tmp_path):
    store = FeatureStore(tmp_path / "store")
    for name, learner in zip(("whole", "reduced"), both, strict=True):
        learner.save(tmp_path / name)
        loaded = IncrementalClassifier.load(tmp_path / name, device="cpu", store=store)
        np.testing.assert_allclose(loaded.predict_proba(files), learner.predict_proba(files), atol=1e-6)
        assert loaded.open_towers().passes["stored"] == 0


def test_pictures_are_known_again_by_the_whole_of_them(files):
    learner = learner_of(files, method="acil", decode="reduced")
    assert learner.partial_fit(files[:2], ["ash", "ash"]).counts_.tolist() == [2, 2]
    learner.partial_fit([files[2]], ["ash"]).unlearn([Image.open(files[2])])
    assert learner.counts_.tolist() == [2, 2]


def test_whatever_looks_at_a_file_reads_it_so(files, monkeypatch):
    sizes = []
    plain = IncrementalClassifier("lda", "tiny", device="cpu", decode="reduced", targets="sets")
    towers = plain.open_towers()
    prepare = towers.prepare
    monkeypatch.setattr(towers, "prepare", lambda item: (sizes.append(item.size), prepare(item))[1])
    plain.partial_fit(files, [["ash"]] * 3 + [["elm", "ash"]] * 3)
    plain.predict(files)
    one = IncrementalClassifier("lda", towers, device="cpu").partial_fit(files, ["ash"] * 3 + ["elm"] * 3)
    one.drift(files)
    IncrementalClassifier("acil", towers, device="cpu").partial_fit(files, ["ash"] * 3 + ["elm"] * 3).unlearn(files[:1])
    assert set(sizes) == {(240, 180)}


def test_the_service_sees_what_the_learner_sees(files, both, tmp_path):
    both[1].save(tmp_path)
    service = Service(tmp_path, IncrementalClassifier.load(tmp_path, device="cpu"))
    progressive = io.BytesIO()
    Image.open(files[5]).save(progressive, "JPEG", quality=92, progressive=True)
    for data in (files[5].read_bytes(), progressive.getvalue()):
        seen = service.towers.prepare(decoded(io.BytesIO(data), SIDE)).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(service._seen(io.BytesIO(data)), seen)
        np.testing.assert_array_equal(service._whole(io.BytesIO(data), "it").values, seen)


def test_the_command_makes_it_and_holds_to_it(files, cairn, tmp_path):
    folder = files[0].parents[1]
    call = ("learn", tmp_path / "mine", folder, "--method", "lda", "--towers", "tiny", "--device", "cpu")
    assert cairn(*call, "--decode", "reduced")[0] == 0
    assert IncrementalClassifier.load(tmp_path / "mine", device="cpu").decode == "reduced"
    code, _, error = cairn(*call, "--decode", "whole")
    assert code != 0
    assert "--decode: whole is asked for, but the learner that is there was made with reduced" in error
    code, _, error = cairn(*call[:1], tmp_path / "other", *call[2:], "--decode", "half")
    assert code != 0
    assert "decode 'half': must be whole or reduced" in error
