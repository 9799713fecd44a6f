"""Every method: what people do with a learner of it works, or is refused in one line."""

from __future__ import annotations

import asyncio
import io

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from cairn import IncrementalClassifier
from cairn.classifier.onnx import scores_module
from cairn.cli import app as cli
from cairn.config import settings
from cairn.data.shapes import shapes_dataset
from cairn.errors import ConfigError, one_line
from cairn.methods.catalogue import METHODS
from cairn.methods.protocol import DescribedClasses, KeepsImages, PatchReasons, ScoresAsModule
from cairn.serve.app import application
from cairn.serve.guard import Rules
from cairn.serve.service import Service

TOKEN = "a-token-for-the-tests"
COUNTS = (4, 3, 5, 3)
"""Training images of the four classes."""


@pytest.fixture(scope="module")
def pictures():
    """Training images and names of four classes, and a test image of each."""
    data = shapes_dataset()
    rows = [row for c, n in enumerate(COUNTS) for row in np.flatnonzero(data.train.labels == c)[:n]]
    tests = [data.test[np.flatnonzero(data.test.labels == c)[0]] for c in range(4)]
    return [data.train[i] for i in rows], [data.classes[data.train.labels[i]] for i in rows], tests


@pytest.fixture(params=METHODS)
def learner(request, pictures, towers):
    """A learner of the first three classes."""
    entry, (images, names, _) = METHODS[request.param], pictures
    known = {path for path, _, _ in settings(entry.config())}
    quick = {"width": 64} | {key: 1 if key.endswith("epochs") else value for key, value in entry.card.quick.items()}
    settings_ = {key: value for key, value in quick.items() if key in known}
    learner = IncrementalClassifier(entry.name, towers, settings=settings_)
    first = sum(COUNTS[:3])
    return learner.partial_fit(images[:first], names[:first])


def png(image) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(out, "PNG")
    return out.getvalue()


def saved(learner, folder):
    """Into the folder; skips the test where the method's learner cannot be saved, which is then said in one line."""
    if METHODS[learner.method].card.keeps == "images":
        with pytest.raises(ConfigError, match="keeps images"):
            learner.save(folder)
        pytest.skip("a method that keeps images is not saved")
    learner.save(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_the_words_of_a_card_agree(method):
    entry = METHODS[method]
    assert (KeepsImages in entry.capabilities) == (entry.card.keeps == "images")
    assert ("descriptions" in {path for path, _, _ in settings(entry.config())}) == (
        DescribedClasses in entry.capabilities
    )
    assert entry.card.text or "text" not in entry.card.needs


def test_serve_answers_everything(learner, pictures, towers, tmp_path):
    images, names, tests = pictures
    folder = saved(learner, tmp_path / "learner")
    service = Service(folder, IncrementalClassifier.load(folder, towers))
    app = application(service, Rules(token=TOKEN))

    async def asked(method, path, **how):
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1), raise_app_exceptions=False)
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=bearer) as http:
            return await http.request(method, path, **how)

    def ask(method, path, **how):
        found = asyncio.run(asked(method, path, **how))
        assert found.status_code == 200, found.text
        return found.json()

    try:
        health = ask("GET", "/api/health")
        assert (health["status"], health["describes"]) == ("ok", False)  # templates stand in for sentences
        found = ask("POST", "/api/predict", files={"image": png(tests[0])}, data={"topk": 3})
        assert [(one["name"], one["probability"]) for one in found["classes"]] == learner.predict_topk(tests[:1], 3)[0]
        assert (found["grid"] is not None) == (PatchReasons in METHODS[learner.method].capabilities)
        first = sum(COUNTS[:3])
        files = [("images", (f"{i}.png", png(image), "image/png")) for i, image in enumerate(images[first:])]
        known = ask("POST", "/api/learn", data={"name": names[first]}, files=files)["classes"]
        assert [one["images"] for one in known] == [*COUNTS]
        left = ask("DELETE", f"/api/classes/{names[0]}")["classes"]
        assert [one["images"] for one in left] == [*COUNTS[1:]]
        again = ask("POST", "/api/predict", files={"image": png(tests[0])}, data={"topk": 9})
        assert {one["name"] for one in again["classes"]} == {*names} - {names[0]}
    finally:
        service.close()


def test_export_is_exact_or_refused_in_one_line(learner, pictures, towers):
    """The module that is exported; that ONNX makes the same of it is another test."""
    if ScoresAsModule not in METHODS[learner.method].capabilities or learner.method == "spa":
        with pytest.raises(ConfigError) as caught:
            scores_module(learner)
        assert one_line(str(caught.value)) == str(caught.value)
        return
    pixels = towers.pixels(torch.stack([towers.prepare(image) for image in pictures[2]]))
    with torch.no_grad():
        found = scores_module(learner)(pixels)
    torch.testing.assert_close(found, learner.predictions(pictures[2]).scores, rtol=1e-4, atol=1e-4)


def test_everything_is_told_of_an_image_from_one_pass(learner, pictures, towers):
    """Scores, probabilities, known scores and reasons: m images cost m passes, of whatever method."""
    tests, before = pictures[2], dict(towers.passes)
    found = learner.predictions(tests, known=True, reasons=2)
    passes = 2 if learner.method in ("aper", "joint") else 1  # of the trained encoder and of the original
    assert towers.passes["images"] - before["images"] == passes * len(tests)
    np.testing.assert_array_equal(found.labels(), learner.predict(tests))
    np.testing.assert_allclose(found.probabilities, learner.predict_proba(tests), rtol=1e-6)
    np.testing.assert_allclose(found.known, learner.known_score(tests), rtol=1e-6)
    assert [[told["name"] for told in reasons] for reasons in found.reasons] == [
        [name for name, _ in best] for best in learner.predict_topk(tests, 2)
    ]


def test_learning_embeds_every_image_once_if_the_tower_is_frozen(learner, pictures, towers):
    """What is left out for calibration and the known score is not embedded again."""
    images, names, _ = pictures
    first, before = sum(COUNTS[:3]), towers.passes["images"]
    learner.partial_fit(images[first:], names[first:])
    n, passes = COUNTS[3], towers.passes["images"] - before
    if learner.method == "engine":  # altered copies are images of their own, and one in five is looked at again
        views = learner.method_.config.views
        assert passes == n * (1 + views) + 1
    elif METHODS[learner.method].card.moves:
        assert passes > n
    else:
        assert passes == (1 if learner.method == "zero-shot" else n)


def test_explain_names_the_likeliest_classes(learner, pictures):
    tests = pictures[2]
    reasons = learner.explain(tests[1], best=2)
    best = learner.predict_topk(tests[1:2], 2)[0]
    assert [(reason["name"], reason["probability"]) for reason in reasons] == [(n, pytest.approx(p)) for n, p in best]
    assert all(("patches" in reason) == (learner.method == "spa") for reason in reasons)


def test_inspect_and_forget(learner, pictures, towers, tmp_path, capsys):
    _, names, tests = pictures
    folder = saved(learner, tmp_path / "learner")
    cli.app(["inspect", str(folder)], standalone_mode=False)
    said = capsys.readouterr().out
    assert f"method: {learner.method}, " in said
    assert f"3 classes from {sum(COUNTS[:3])} images" in said
    again = IncrementalClassifier.load(folder, towers)
    np.testing.assert_array_equal(again.predict_proba(tests), learner.predict_proba(tests))
    gone = str(again.classes_[1])
    again.forget(gone)
    again.save(folder)
    left = IncrementalClassifier.load(folder, towers)
    assert (list(left.classes_), left.counts_.tolist()) == (
        [names[0], names[COUNTS[0] + COUNTS[1]]],
        [COUNTS[0], COUNTS[2]],
    )
    assert gone not in left.predict(tests)
    cli.app(["inspect", str(folder)], standalone_mode=False)
    said = capsys.readouterr().out
    assert "2 classes" in said
    assert gone not in said
