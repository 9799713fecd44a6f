"""The service and its page."""

from __future__ import annotations

import asyncio
import csv
import io
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from cairn import IncrementalClassifier
from cairn.classifier.estimate import AccuracyEstimate
from cairn.data.attributes import attributes_dataset
from cairn.data.shapes import shapes_dataset
from cairn.errors import ConfigError
from cairn.experiment.folder import Lock
from cairn.serve.app import Server, application, server_config
from cairn.serve.connection import CONNECTIONS
from cairn.serve.guard import HEADERS, ROOM, Rules
from cairn.serve.service import Service

TOKEN = "a-token-for-the-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
QUICK = {"stage1.schedule.epochs": 1, "stage2.schedule.epochs": 2}


def png(pixels: np.ndarray, **how) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(out, "PNG", **how)
    return out.getvalue()


@pytest.fixture(scope="module")
def drawn():
    """PNG files by class name: eight for training, then one for testing, of five classes."""
    data = shapes_dataset()
    found = {}
    for c in range(5):
        rows = np.flatnonzero(data.train.labels == c)[:8]
        found[data.classes[c]] = [png(data.train[i]) for i in rows]
        found[data.classes[c]].append(png(data.test[np.flatnonzero(data.test.labels == c)[0]]))
    return found


def learner_of(drawn, towers, method="dmc-ot", classes=3, **changes):
    settings = QUICK if method == "dmc-ot" else {"schedule.epochs": 2}
    learner = IncrementalClassifier(method, towers, settings=settings, device="cpu", **changes)
    rows = [
        (np.asarray(Image.open(io.BytesIO(file))), name) for name in list(drawn)[:classes] for file in drawn[name][:8]
    ]
    return learner.partial_fit(*zip(*rows, strict=True))


@pytest.fixture(scope="module")
def saved(drawn, towers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    learner_of(drawn, towers).save(folder)
    return folder


@pytest.fixture
def service(saved, towers, tmp_path):
    folder = tmp_path / "learner"
    shutil.copytree(saved, folder)
    service = Service(folder, IncrementalClassifier.load(folder, towers))
    yield service
    service.close()


def client(service, rules=None, **changes):
    """Asks as a browser on this machine does, with the token unless told otherwise."""

    async def ask(method, path, **how):
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=BEARER) as http:
            return await http.request(method, path, **how)

    app = application(service, rules or Rules(token=TOKEN, **changes))
    asked = lambda method, path, **how: asyncio.run(ask(method, path, **how))  # noqa: E731
    asked.app = app
    return asked


def pictures(*files):
    return [("images", (f"../../{i}.png", file, "image/png")) for i, file in enumerate(files)]


def error(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    assert "\n" not in response.json()["error"]
    return response.json()["error"]


def test_predicts_as_the_learner_does(service, drawn):
    ask, (name, files) = client(service), next(iter(drawn.items()))
    found = ask("POST", "/api/predict", files={"image": files[8]}, data={"topk": 2}).json()
    image = np.asarray(Image.open(io.BytesIO(files[8])))
    best = service.learner.predict_topk([image], 2)[0]
    assert [(row["name"], row["probability"]) for row in found["classes"]] == best
    assert found["known"] == service.learner.known_score([image])[0]
    assert (found["grid"], found["reasons"]) == (None, [])
    assert ask("GET", "/api/classes").json()["classes"][0] == {"name": name, "images": 8}
    health = ask("GET", "/api/health").json()
    assert (health["status"], health["may_change"], health["learning"]) == ("ok", True, None)
    paths = ask("GET", "/openapi.json").json()["paths"]
    names = ("classes", "predict", "learn", "relabel", "undo", "history", "estimate", "health", "classes/{name}")
    assert {f"/api/{name}" for name in names} == set(paths)


def test_learns_saves_and_forgets(service, drawn, towers):
    ask, names = client(service), list(drawn)
    before = service.learner
    learned = ask("POST", "/api/learn", data={"name": f" {names[3]} "}, files=pictures(*drawn[names[3]][:8]))
    assert learned.json()["classes"][-1] == {"name": names[3], "images": 8}
    assert list(before.classes_) == names[:3]
    again = ask("POST", "/api/learn", data={"name": names[0]}, files=pictures(*drawn[names[0]][7:9]))
    assert again.json()["classes"][0] == {"name": names[0], "images": 9}  # one of the two was learned before
    repeated = ask("POST", "/api/learn", data={"name": names[0]}, files=pictures(*drawn[names[0]]))
    assert "has learned these pictures already" in error(repeated, 409)
    found = ask("POST", "/api/predict", files={"image": drawn[names[3]][0]}).json()
    assert found["classes"][0]["name"] == names[3]
    odd = 'a/../b?#"<i>'
    assert ask("POST", "/api/learn", data={"name": odd}, files=pictures(drawn[names[4]][0])).status_code == 200
    assert ask("DELETE", "/api/classes/a%2F..%2Fb%3F%23%22%3Ci%3E").status_code == 200
    gone = ask("DELETE", f"/api/classes/{names[1]}").json()["classes"]
    assert [row["name"] for row in gone] == [names[0], *names[2:4]]
    stored = IncrementalClassifier.load(service.folder, towers)
    assert list(stored.classes_) == [names[0], *names[2:4]]
    assert "is not known" in error(ask("DELETE", f"/api/classes/{names[1]}"), 404)
    for name in (names[0], names[2]):
        ask("DELETE", f"/api/classes/{name}")
    assert "only class" in error(ask("DELETE", f"/api/classes/{names[3]}"), 409)
    assert not (service.folder / ".lock").exists()


def sums(drawn, towers, folder, method="lda"):
    """A service of a learner that can unlearn: three classes of 8, 8 and 7 pictures in two tasks."""
    names = list(drawn)
    learner = IncrementalClassifier(method, towers, device="cpu")
    for task in ((names[0], drawn[names[0]][:8]), (names[1], drawn[names[1]][:8])), ((names[2], drawn[names[2]][:7]),):
        rows = [(np.asarray(Image.open(io.BytesIO(file))), name) for name, files in task for file in files]
        learner.partial_fit(*zip(*rows, strict=True))
        learner.save(folder)
    return Service(folder, learner)


def test_relabels_as_the_learner_does(drawn, towers, tmp_path):
    names = list(drawn)
    service = sums(drawn, towers, tmp_path)
    ask, wrong = client(service), drawn[names[2]][6]
    twin = IncrementalClassifier.load(tmp_path, towers)
    assert ask("GET", "/api/health").json()["relabels"] is True
    for name in ("new one", names[0]):  # a class that is not known, and one that is
        found = ask("POST", "/api/relabel", data={"name": f" {name}"}, files=pictures(wrong, drawn[names[3]][0]))
        twin.relabel([np.asarray(Image.open(io.BytesIO(file))) for file in (wrong, drawn[names[3]][0])], name)
        counts = {row["name"]: row["images"] for row in found.json()["classes"]}
        assert counts == dict(zip(twin.classes_, twin.counts_, strict=True))
    assert counts == {names[0]: 10, names[1]: 8, names[2]: 6}
    image = [np.asarray(Image.open(io.BytesIO(drawn[names[2]][8])))]
    np.testing.assert_array_equal(service.learner.predict_proba(image), twin.predict_proba(image))
    repeated = ask("POST", "/api/relabel", data={"name": names[0]}, files=pictures(wrong))
    assert "has learned these pictures already" in error(repeated, 409)
    before = service.learner
    assert "picture 2 cannot be read" in error(
        ask("POST", "/api/relabel", data={"name": names[1]}, files=pictures(wrong, b"no image")), 415
    )
    error(ask("POST", "/api/relabel", data={"name": " "}, files=pictures(wrong)), 422)
    assert service.learner is before
    service.close()


def test_where_pictures_cannot_be_taken_out_relabelling_is_refused(service, drawn):
    ask, names = client(service), list(drawn)
    assert ask("GET", "/api/health").json()["relabels"] is False
    refused = ask("POST", "/api/relabel", data={"name": names[1]}, files=pictures(drawn[names[0]][0]))
    assert "pictures cannot be taken out" in error(refused, 422)


def test_undoes_and_tells_what_was_done(drawn, towers, tmp_path):
    names = list(drawn)
    service = sums(drawn, towers, tmp_path)
    ask, image = client(service), [np.asarray(Image.open(io.BytesIO(drawn[names[0]][8])))]
    before = service.learner.predict_proba(image)
    ask("POST", "/api/learn", data={"name": names[3]}, files=pictures(*drawn[names[3]][:3]))
    done = ask("GET", "/api/history").json()
    assert [entry["names"] for entry in done["entries"]] == [names[:2], [names[2]], [names[3]]]
    assert done["entries"][0]["change"] == "2 new classes, 16 images"
    assert done["undoable"] == 2
    known = ask("POST", "/api/undo").json()["classes"]
    assert [row["name"] for row in known] == names[:3]
    np.testing.assert_array_equal(service.learner.predict_proba(image), before)
    assert list(IncrementalClassifier.load(tmp_path, towers).classes_) == names[:3]
    done = ask("GET", "/api/history").json()
    assert (done["entries"][-1]["change"], done["undoable"]) == ("undone: learning", 1)
    assert len(ask("POST", "/api/undo").json()["classes"]) == 2
    now = service.learner
    assert "nothing can be undone" in error(ask("POST", "/api/undo"), 409)
    assert service.learner is now
    other = Lock(tmp_path).take()
    try:
        assert str(tmp_path) not in error(ask("POST", "/api/undo"), 503)
    finally:
        other.release()
    service.stop(signal.SIGTERM)
    assert "being stopped" in error(ask("POST", "/api/undo"), 503)
    service.close()


def test_tells_how_good_it_is(drawn, towers, tmp_path):
    names = list(drawn)
    service = sums(drawn, towers, tmp_path)
    ask, learner = client(service), service.learner
    M = np.array([[5.0, 3, 0], [1, 6, 1], [1, 0, 6]])
    known = AccuracyEstimate().with_task(M, "left out one by one")
    learner._learned = replace(learner._learned, estimate=known)
    found = ask("GET", "/api/estimate").json()
    assert found["accuracy"] == pytest.approx((5 / 8 + 6 / 8 + 6 / 7) / 3)
    assert found["interval"] == list(known.interval)
    assert found["sources"] == ["23 pictures left out one by one"]
    assert [row["name"] for row in found["classes"]] == found["shown"] == names[:3]
    assert [row["accuracy"] for row in found["classes"]] == pytest.approx([5 / 8, 6 / 8, 6 / 7])
    assert (found["confusions"], found["others"]) == (M.tolist(), [0, 0, 0])
    pairs = [(row["first"], row["second"], row["pictures"]) for row in found["confused"]]
    assert pairs == [(names[0], names[1], 4), (names[0], names[2], 1), (names[1], names[2], 1)]
    assert found["confused"][0]["advice"] == learner.advice(known.confused)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cairn.serve.service.SHOWN", 2)
        service.learner = deepcopy(learner)
        few = ask("GET", "/api/estimate").json()
    assert (few["shown"], few["confusions"], few["others"]) == (names[:2], [[5, 3], [1, 6]], [0, 1])
    service.close()


def test_a_picture_is_the_same_one_for_the_service_and_the_command_line(service, drawn, towers, tmp_path, cairn):
    """A photograph that is reduced on its way to the tower, stored on its side, and a PNG."""
    name, rng = next(iter(drawn)), np.random.default_rng(0)
    photograph = Image.fromarray(rng.integers(0, 256, (45, 60, 3), dtype=np.uint8)).resize((1200, 900))
    exif = photograph.getexif()
    exif[0x0112] = 6
    folder = tmp_path / "pictures" / name
    folder.mkdir(parents=True)
    photograph.save(folder / "photograph.jpg", exif=exif, quality=90)
    photograph.save(folder / "photograph.png")
    files = [(folder / file).read_bytes() for file in ("photograph.jpg", "photograph.png")]
    ask = client(service)

    learned = ask("POST", "/api/learn", data={"name": name}, files=pictures(files[0])).json()["classes"]
    assert learned[0] == {"name": name, "images": 9}
    status, out, err = cairn("learn", service.folder, folder.parent, "--device", "cpu")
    assert (status, err) == (0, "")
    assert "1 picture learned, 0 new classes" in " ".join(out.split())
    assert IncrementalClassifier.load(service.folder, towers).counts_[0] == 10
    repeated = ask("POST", "/api/learn", data={"name": name}, files=pictures(*files))
    assert "has learned these pictures already" in error(repeated, 409)


def test_one_learns_while_the_old_state_predicts(service, drawn, monkeypatch):
    ask, names = client(service), list(drawn)
    begun, on = threading.Event(), threading.Event()
    learn = IncrementalClassifier.partial_fit

    def slow(self, *given, **how):
        begun.set()
        on.wait(30)
        return learn(self, *given, **how)

    monkeypatch.setattr(IncrementalClassifier, "partial_fit", slow)
    answers = []

    def teach():
        answers.append(ask("POST", "/api/learn", data={"name": names[3]}, files=pictures(*drawn[names[3]][:8])))

    thread = threading.Thread(target=teach)
    thread.start()
    assert begun.wait(30)
    try:
        found = ask("POST", "/api/predict", files={"image": drawn[names[0]][8]}).json()
        assert {row["name"] for row in found["classes"]} == set(names[:3])
        assert ask("GET", "/api/health").json()["learning"] == 0
        said = error(ask("POST", "/api/learn", data={"name": "x"}, files=pictures(drawn[names[4]][0])), 409)
        assert said == f"'{names[3]}' is being learned; try again when that is done"
        assert "is being learned" in error(ask("DELETE", f"/api/classes/{names[0]}"), 409)
    finally:
        on.set()
        thread.join()
    assert answers[0].status_code == 200
    assert ask("GET", "/api/health").json()["learning"] is None


def test_what_fails_changes_nothing(service, drawn, monkeypatch, tmp_path):
    ask, names, before = client(service), list(drawn), service.learner
    files = sorted((path.name, path.read_bytes()) for path in service.folder.iterdir())
    teach = lambda name=names[3], *more: ask(  # noqa: E731
        "POST", "/api/learn", data={"name": name}, files=pictures(drawn[names[3]][0], *more)
    )
    for name in ("", "  ", "a\nb", "x" * 101, ".."):
        error(teach(name), 422)
    assert "picture 2 cannot be read as a picture (not an image)" in error(teach(names[3], b"no image"), 415)
    assert "images" in error(ask("POST", "/api/learn", data={"name": "x"}), 422)
    with monkeypatch.context() as patch:
        patch.setattr("cairn.methods.dmc_ot.class_cross_entropy", lambda z, *_: z.sum() * float("nan"))
        assert "loss is nan" in error(teach(), 422)
    with monkeypatch.context() as patch:
        patch.setattr(IncrementalClassifier, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("secret")))
        assert "secret" not in error(teach(), 500)
    other = Lock(service.folder).take()
    try:
        assert str(tmp_path) not in error(teach(), 503)
    finally:
        other.release()
    assert service.learner is before
    assert sorted((path.name, path.read_bytes()) for path in service.folder.iterdir()) == files
    service.stop(signal.SIGTERM)
    assert "being stopped" in error(teach(), 503)


def test_stopping_gives_up_learning_but_finishes_a_save(service, drawn, monkeypatch):
    ask, names = client(service), list(drawn)
    learn, save = IncrementalClassifier.partial_fit, IncrementalClassifier.save
    teach = lambda: ask("POST", "/api/learn", data={"name": names[3]}, files=pictures(*drawn[names[3]][:8]))  # noqa: E731

    def stopped(self, *given, **how):
        service.stop(signal.SIGTERM)
        return learn(self, *given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(IncrementalClassifier, "partial_fit", stopped)
        assert "nothing was changed" in error(teach(), 503)
    assert names[3] not in service.learner.classes_

    def saving(self, folder):
        service.stop(signal.SIGTERM)
        save(self, folder)

    service.stopping = None
    monkeypatch.setattr(IncrementalClassifier, "save", saving)
    assert teach().status_code == 200
    assert names[3] in service.learner.classes_


def test_only_pictures_are_looked_at(service, monkeypatch):
    ask = client(service)
    square = np.zeros((8, 8, 3), np.uint8)
    for bad in (b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", png(square)[:45]):
        assert "cannot be read as a picture" in error(ask("POST", "/api/predict", files={"image": bad}), 415)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert "exceed" in error(ask("POST", "/api/predict", files={"image": png(square)}), 415)
    uploaded = "must be an uploaded picture, sent as multipart/form-data"
    assert error(ask("POST", "/api/predict", data={"image": "/etc/passwd"}), 422) == f"image: {uploaded}"
    told = error(ask("POST", "/api/learn", data={"name": "x", "images": ["a.png", "b.png"]}), 422)
    assert told == f"images 0: {uploaded}"
    told = error(ask("POST", "/api/predict", files={"image": png(square)}, data={"topk": 0}), 422)
    assert told == "topk: must be greater than or equal to 1"
    error(ask("GET", "/../../etc/passwd"), 404)


def test_sizes_are_limited_while_they_come_in(service):
    ask = client(service, max_bytes=1000)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    assert "0.001 MB" in error(ask("POST", "/api/predict", files={"image": png(image)}), 413)
    for path in ("/api/learn", "/api/relabel"):
        assert "too large" in error(ask("POST", path, data={"name": "x"}, files=pictures(png(image))), 413)
        assert "too large" in error(ask("POST", path, content=b"x" * (ROOM + 20_001)), 413)
    assert "too large" in error(ask("POST", "/api/undo", content=b"x" * (ROOM + 1)), 413)
    assert "too large" in error(ask("POST", "/api/predict", content=b"x" * (ROOM + 1001)), 413)
    sent = 0

    async def endless():
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        while sent < 50 * ROOM:
            sent += 10_000
            yield b"x" * 10_000

    form = {"content-type": "multipart/form-data; boundary=x"}
    assert "too large" in error(ask("POST", "/api/predict", content=endless(), headers=form), 413)
    assert sent < 2 * ROOM
    many = pictures(*[b"x"] * 101)
    for path in ("/api/learn", "/api/relabel"):
        assert "100" in error(ask("POST", path, data={"name": "x"}, files=many), 422)


def test_who_may_ask_for_what(service, drawn):
    image = {"image": next(iter(drawn.values()))[8]}
    name = next(iter(drawn))
    wrong = [
        {"Authorization": value} for value in ("", "Bearer", "Bearer wrong", f"Basic {TOKEN}", "Bearer é".encode())
    ]
    for headers in wrong:
        here = client(service)
        assert here("POST", "/api/predict", files=image, headers=headers).status_code == 200
        for method, path in (
            ("POST", "/api/learn"),
            ("POST", "/api/relabel"),
            ("POST", "/api/undo"),
            ("DELETE", f"/api/classes/{name}"),
        ):
            refused = here(method, path, headers=headers)
            assert "access code" in error(refused, 401)
            assert refused.headers["www-authenticate"] == "Bearer"
    assert here("GET", "/api/health", headers=wrong[0]).json()["may_change"] is False
    there = client(service, loopback=False, host="0.0.0.0")
    asking = ("classes", "history", "estimate")
    for method, path in (("POST", "/api/predict"), *(("GET", f"/api/{one}") for one in asking), ("POST", "/api/learn")):
        error(there(method, path, headers=wrong[2]), 401)
    assert there("POST", "/api/predict", files=image, headers={"Host": "any.example"}).status_code == 200
    assert there("GET", "/api/health", headers=wrong[0]).json()["may_ask"] is False


def test_other_sites_are_kept_out(service, drawn):
    ask, image = client(service), {"image": next(iter(drawn.values()))[8]}
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::1"):
        error(ask("GET", "/api/classes", headers={"Host": host}), 403)
        error(ask("GET", "/", headers={"Host": host}), 403)
    for host in ("localhost:8000", "[::1]:9"):
        assert ask("GET", "/api/classes", headers={"Host": host}).status_code == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:9000"):
        error(ask("POST", "/api/predict", files=image, headers={"Origin": origin}), 403)
    own = ask("POST", "/api/predict", files=image, headers={"Origin": "http://127.0.0.1:8000"})
    assert own.status_code == 200
    for response in (
        own,
        ask("GET", "/"),
        ask("GET", "/page.js"),
        ask("GET", "/nowhere"),
        ask("OPTIONS", "/api/learn"),
    ):
        assert all(response.headers[key] == value for key, value in HEADERS.items())
        assert not [key for key in response.headers if key.startswith("access-control")]


def test_requests_of_other_sites_are_refused(service):
    """A picture or a form in somebody else's page is asked for by the owner's own browser."""
    ask = client(service)
    for site in ("cross-site", "same-site"):
        headers = {"Authorization": "Bearer wrong", "Sec-Fetch-Site": site}
        for path in ("classes", "history", "estimate"):
            assert "other sites" in error(ask("GET", f"/api/{path}", headers=headers), 403)
        for path in ("relabel", "undo"):
            assert "other sites" in error(ask("POST", f"/api/{path}", headers=BEARER | headers), 403)
    assert ask("GET", "/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link leads there
    for site in ("same-origin", "none"):
        assert ask("GET", "/api/classes", headers={"Sec-Fetch-Site": site}).status_code == 200
    assert ask("GET", "/api/classes", headers={"Authorization": "Bearer wrong"}).status_code == 200


def test_behind_a_proxy(service, drawn):
    """Without --public-url what a proxy forwards is refused; with it, the page works and everything needs the token."""
    image, proxied = {"image": next(iter(drawn.values()))[8]}, {"X-Forwarded-For": "192.0.2.7"}
    here = client(service)
    for header in ("X-Forwarded-For", "X-Forwarded-Proto", "X-Real-IP", "Forwarded", "Via"):
        said = error(here("POST", "/api/predict", files=image, headers={header: "192.0.2.7"}), 403)
        assert header.lower() in said
        assert "--public-url" in said
    for url in ("https://cairn.example.org", "https://CAIRN.example.org:443/learners/"):
        public = client(service, public_url=url)
        site = {"Origin": "https://cairn.example.org", "Sec-Fetch-Site": "same-origin"}
        for host in ("cairn.example.org", "127.0.0.1:8000"):  # as the proxy has it, or as the browser does
            headers = proxied | site | {"Host": host}
            assert public("POST", "/api/predict", files=image, headers=headers).status_code == 200
            health = public("GET", "/api/health", headers=headers).json()
            assert (health["may_ask"], health["may_change"]) == (True, True)
            without = headers | {"Authorization": ""}
            error(public("POST", "/api/predict", files=image, headers=without), 401)
            assert public("GET", "/api/health", headers=without).json()["may_ask"] is False
        for origin in ("http://cairn.example.org", "https://cairn.example.org:444", "https://evil.example", "null"):
            error(public("POST", "/api/predict", files=image, headers=site | proxied | {"Origin": origin}), 403)
    for url in (
        "cairn.example.org",
        "ftp://a.example",
        "https://",
        "https://a.example?b",
        "https://a:b@c.example",
        "https://a:x",
    ):
        with pytest.raises(ConfigError, match="must be an address such as"):
            Rules(token=TOKEN, public_url=url)
    with pytest.raises(ConfigError, match="give --token"):
        Rules(public_url="https://cairn.example.org")


def test_pictures_are_decoded_no_larger_than_the_tower_needs(service, monkeypatch):
    ask = client(service)
    large = png(np.zeros((9000, 9000), np.uint8))
    assert len(large) < 200_000
    tracemalloc.start()
    said = error(ask("POST", "/api/predict", files={"image": large}), 415)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "9000 x 9000 pixels, where 16,777,216 are the most" in said
    assert peak < 30_000_000
    out, sizes = io.BytesIO(), []
    Image.new("RGB", (4000, 3000), (200, 30, 30)).save(out, "JPEG")
    prepare = service.towers.prepare
    monkeypatch.setattr(service.towers, "prepare", lambda image: (sizes.append(np.shape(image)[:2]), prepare(image))[1])
    assert ask("POST", "/api/predict", files={"image": out.getvalue()}).status_code == 200
    assert (375, 500) in sizes


def test_connections_that_ask_for_nothing_keep_nobody_out(service, monkeypatch):
    with served(service) as address:
        place = ("127.0.0.1", port_of(address))
        held = [socket.create_connection(place) for _ in range(CONNECTIONS + 30)]
        try:
            for half in held[::2]:
                with suppress(OSError):
                    half.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
            began = time.monotonic()
            for _ in range(3):
                assert httpx.get(f"{address}api/health", timeout=10).status_code == 200
            assert time.monotonic() - began < 8
        finally:
            for half in held:
                half.close()
        monkeypatch.setattr("cairn.serve.connection.HEADER_SECONDS", 0.5)
        for begun in (
            b"",
            b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ",
            b"GET /page.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET",
        ):
            with socket.create_connection(place, timeout=10) as slow:
                slow.sendall(begun)
                assert closed_in_time(slow)


def test_a_body_that_trickles_is_ended(service, monkeypatch):
    monkeypatch.setattr("cairn.serve.guard.GRACE", 1.0)
    head = (
        f"POST /api/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 9000\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    )
    with served(service) as address:
        place = ("127.0.0.1", port_of(address))
        with socket.create_connection(place, timeout=10) as slow:
            slow.sendall(head.encode())
            answer = []
            assert closed_in_time(slow, answer)
        assert b"408" in answer[0].splitlines()[0]
        assert b"too slowly" in b"".join(answer)
        assert httpx.get(f"{address}api/health", timeout=10).status_code == 200


def closed_in_time(slow, answer=None, seconds=8.0):
    """Whether the other side closes the connection, although a byte is sent every tenth of a second."""
    began = time.monotonic()
    slow.settimeout(0.1)
    while time.monotonic() - began < seconds:
        try:
            slow.sendall(b"x")
            some = slow.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            return True
        if not some:
            return True
        if answer is not None:
            answer.append(some)
    return False


def test_patches_and_sentences_of_spa(drawn, towers, tmp_path):
    said = {name: [f"something {name.split()[1]}", f"a {name.split()[2]}"] for name in drawn}
    names = list(drawn)
    learner_of(drawn, towers, "spa", 2, descriptions={name: said[name] for name in names[:2]}).save(tmp_path)
    service = Service(tmp_path, IncrementalClassifier.load(tmp_path, towers))
    ask = client(service)
    found = ask("POST", "/api/predict", files={"image": drawn[names[0]][8]}).json()
    assert found["view"] == "crop"
    reason = found["reasons"][0]
    assert {patch["sentence"] for patch in reason["patches"]} <= set(said[reason["name"]])
    assert all(0 <= patch["patch"] < found["grid"] ** 2 for patch in reason["patches"])
    assert sum(patch["share"] for patch in reason["patches"]) == pytest.approx(1, abs=1e-4)
    assert ask("GET", "/api/health").json()["describes"] is True
    teach = {"data": {"name": names[2]}, "files": pictures(*drawn[names[2]][:4])}
    assert "looks like" in error(ask("POST", "/api/learn", **teach), 422)
    teach["data"]["sentences"] = "\n".join(said[names[2]])
    assert ask("POST", "/api/learn", **teach).status_code == 200
    assert IncrementalClassifier.load(tmp_path, towers).descriptions[names[2]] == said[names[2]]
    assert ask("DELETE", f"/api/classes/{names[0]}").status_code == 200
    assert names[0] not in IncrementalClassifier.load(tmp_path, towers).descriptions
    service.close()


def test_the_command_refuses_what_is_not_safe(cairn, tmp_path):
    for arguments, said in (
        (("--host", "0.0.0.0"), "give --token"),
        (("--token", "short"), "16 to 200"),
        (("--host", "no such host"), "give 127.0.0.1"),
        ((), "no learner there"),
        (("--port", "70000"), "--port"),
        (("--public-url", "https://cairn.example.org"), "give --token"),
        (("--public-url", "cairn.example.org", "--token", TOKEN), "must be an address"),
    ):
        status, _, err = cairn("serve", tmp_path, *arguments)
        assert (status, err.count("\n")) == (2, 1)
        assert said in err
    with pytest.raises(ConfigError, match="give --token"):
        Rules(loopback=False, host="::")
    assert len(Rules().token) >= 32


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal_comes(saved, number, tmp_path):
    shutil.copytree(saved, tmp_path / "learner")
    call = [Path(sys.executable).with_name("cairn"), "serve", tmp_path / "learner", "--port", "0"]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        address, token = line.split()[1].split("#token=")
        headers = {"Authorization": f"Bearer {token}"}
        for _ in range(100):
            try:
                health = httpx.get(f"{address}api/health", headers=headers).json()
                break
            except httpx.TransportError:
                time.sleep(0.1)
        assert health["may_change"] is True
        process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


@contextmanager
def served(service, **changes):
    """The address of a service in a thread."""
    listening = socket.create_server(("127.0.0.1", 0))
    rules = Rules(token=TOKEN, **changes)
    server = Server(server_config(application(service, rules)), service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def port_of(address: str) -> int:
    return httpx.URL(address).port


DROP = """([area, name, files]) => {
  const moved = new DataTransfer();
  files.forEach((base64, i) => {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    moved.items.add(new File([bytes], name || `${i}.png`, {type: "image/png"}));
  });
  document.querySelector(area).dispatchEvent(new DragEvent("drop", {dataTransfer: moved, bubbles: true, cancelable: true}));
}"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_in_a_browser(service, drawn):
    sync_api = pytest.importorskip("playwright.sync_api")
    names, new = list(drawn), "<b>ring & co</b>"
    coded = lambda *files: [b64encode(file).decode() for file in files]  # noqa: E731
    with served(service, max_bytes=100_000) as address, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(30_000)
        problems, asked = [], []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda problem: problems.append(str(problem)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}#token={TOKEN}")
        page.wait_for_selector("#teach:not([hidden])")
        assert page.url == address
        page.locator("#known li").nth(2).wait_for()

        page.evaluate(DROP, ["#drop", "", coded(drawn[names[0]][8])])
        page.wait_for_selector("#bars li")
        assert page.locator("#bars li").count() == 3

        page.fill("#name", new)
        page.evaluate(DROP, ["#teach-drop", "", coded(*drawn[names[3]][:8])])
        assert page.locator("#chosen img").count() == 8
        page.click("#learn")
        page.get_by_text(f"Learned “{new}”.").wait_for()
        assert page.locator("#known .name").all_inner_texts() == [*names[:3], new]
        page.evaluate(DROP, ["#drop", "", coded(drawn[names[3]][0])])
        page.wait_for_function("() => document.querySelectorAll('#bars li').length === 4")
        assert page.locator("#bars .name").first.inner_text() == new
        page.evaluate("document.querySelector('details').open = true")
        slide = "value => { const at = $('threshold'); at.value = value; at.dispatchEvent(new Event('input')); }"
        page.evaluate(slide, "0")
        assert page.locator("#verdict").inner_text().startswith(new)
        fit = page.evaluate("answer.known")
        page.evaluate(slide, "1")
        assert ("may be none of the known classes" in page.locator("#verdict").inner_text()) == (fit < 1)

        page.evaluate(DROP, ["#drop", "large.png", coded(b"x" * 100_001)])
        page.get_by_text("“large.png” is too large").wait_for()
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width

        page.get_by_role("button", name=f"Forget {names[0]}").click()
        page.get_by_role("button", name="Keep it").click()
        page.get_by_role("button", name=f"Forget {names[0]}").click()
        page.get_by_role("button", name="Forget it").click()
        page.get_by_text(f"Forgot “{names[0]}”.").wait_for()
        assert page.locator("#known .name").all_inner_texts() == [*names[1:3], new]
        browser.close()
    assert not problems
    assert not [url for url in asked if not url.startswith((address, f"blob:{address}", "data:"))]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_several_pictures_corrections_and_the_camera_in_a_browser(drawn, towers, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    names, service = list(drawn), sums(drawn, towers, tmp_path / "learner")
    files = [
        {"name": name, "mimeType": "image/png", "buffer": content}
        for name, content in (
            ("=1+1.png", drawn[names[0]][8]),
            ('a "quoted", one.png', drawn[names[1]][8]),
            ("broken.png", b"no image"),
            ("wrong.png", drawn[names[2]][6]),
        )
    ]
    arguments = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    with served(service) as address, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(30_000)
        problems = []
        page.on("pageerror", lambda problem: problems.append(str(problem)))
        page.goto(f"{address}#token={TOKEN}")
        page.wait_for_selector("#good:not([hidden])")
        share = round(100 * service.learner.estimate_.accuracy)
        assert page.locator("#accuracy").inner_text().startswith(f"About {share}\u00a0%")
        page.locator("#matrix-choice summary").click()
        assert page.locator("#matrix tbody th").all_inner_texts() == names[:3]

        # several at once, one of them damaged
        page.set_input_files("#file", files)
        page.wait_for_function("() => !$('csv').disabled")
        images = [np.asarray(Image.open(io.BytesIO(file["buffer"]))) for i, file in enumerate(files) if i != 2]
        predictions = service.learner.predictions(images, known=True)
        with page.expect_download() as download:
            page.click("#csv")
        lines = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text(), newline="")))
        assert [line["image"] for line in lines] == ["'=1+1.png", *(file["name"] for file in files[1:])]
        assert "cannot be read as a picture" in lines[2]["problem"]
        assert lines[2]["class"] == ""
        best = [classes[0] for classes in predictions.topk(1)]
        rows = [lines[i] for i in (0, 1, 3)]
        assert [(row["class"], row["probability"]) for row in rows] == [(n, f"{p:.6f}") for n, p in best]
        assert [row["known"] for row in rows] == [f"{known:.6f}" for known in predictions.known_scores()]
        assert [row["unknown"] for row in rows] == [str(known < 0.05).lower() for known in predictions.known_scores()]

        # by keyboard: the last picture, which was learned under a wrong name
        page.locator(".one").first.focus()
        for _ in range(3):
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.locator(".one[aria-current=true] .file").inner_text() == "wrong.png"
        page.locator("#mend summary").focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.type(names[0])
        page.keyboard.press("Enter")
        page.get_by_text(f"Learned as “{names[0]}”.").wait_for()
        assert page.locator("#known .soft").all_inner_texts() == ["9 pictures", "8 pictures", "6 pictures"]
        assert "1 image taken out again" in page.locator("#history li").first.inner_text()

        page.click("#undo")
        page.get_by_role("button", name="Undo it").click()
        page.get_by_text("The last change is undone.").wait_for()
        assert page.locator("#known .soft").all_inner_texts() == ["8 pictures", "8 pictures", "7 pictures"]

        page.click("#camera-on")
        page.wait_for_function("() => $('live').videoWidth > 0")
        page.click("#snap-teach")
        page.wait_for_selector("#chosen img")
        page.click("#snap")
        page.wait_for_function("() => looked.length === 1 && answer !== null")
        page.click("#camera-off")
        assert page.evaluate("camera") is None
        for width in (1200, 390):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    service.close()
    assert not problems


def nginx_block() -> str:
    """The block of docs/your-images.md."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "your-images.md").read_text()
    return re.search(r"```nginx\n(.*?)```", page, re.DOTALL)[1]


@contextmanager
def proxied(folder, service_port, name="cairn.example.org"):
    """nginx with the documented block and a certificate of its own in front of a port; where it listens, and the certificate."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            f"/CN={name}",
            "-addext",
            f"subjectAltName=DNS:{name}",
            "-keyout",
            key,
            "-out",
            certificate,
        ],
        check=True,
        capture_output=True,
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    block = nginx_block()
    for written, here in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("/etc/ssl/cairn/fullchain.pem", str(certificate)),
        ("/etc/ssl/cairn/privkey.pem", str(key)),
        ("127.0.0.1:8000", f"127.0.0.1:{service_port}"),
    ):
        assert block.count(written) == 1
        block = block.replace(written, here)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder / kind};\n" for kind in kinds)
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {folder / 'pid'}; error_log {folder / 'error.log'};\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{paths}{block}\n}}\n"
    )
    command = [shutil.which("nginx", path=NGINX_PATH), "-c", config, "-p", folder, "-e", folder / "error.log"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(200):
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        yield port, certificate
    finally:
        process.terminate()
        process.communicate(timeout=30)


NGINX_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])


@pytest.mark.skipif(
    shutil.which("nginx", path=NGINX_PATH) is None or shutil.which("openssl") is None, reason="needs nginx and openssl"
)
def test_the_documented_nginx_block_works(service, drawn, tmp_path):
    """Everything through TLS: the page, looking, teaching and forgetting with the token; nothing without it."""
    names, file = list(drawn), next(iter(drawn.values()))[8]
    with (
        served(service, public_url="https://cairn.example.org/") as address,
        proxied(tmp_path, port_of(address)) as (port, certificate),
        httpx.Client(verify=ssl.create_default_context(cafile=certificate), timeout=60) as through,
    ):

        def ask(method, path, token=TOKEN, **how):
            headers = {"Origin": "https://cairn.example.org", "Sec-Fetch-Site": "same-origin"}
            headers |= {"Authorization": f"Bearer {token}"} if token else {}
            headers |= {"Host": "cairn.example.org"} | how.pop("headers", {})
            named = {"sni_hostname": "cairn.example.org"}
            return through.request(method, f"https://127.0.0.1:{port}{path}", headers=headers, extensions=named, **how)

        for path in ("/", "/page.js", "/page.css"):
            assert ask("GET", path, token=None).status_code == 200
        assert ask("GET", "/api/health", token=None).json()["may_ask"] is False
        assert ask("GET", "/api/health").json()["may_change"] is True
        found = ask("POST", "/api/predict", files={"image": file})
        assert found.json()["classes"][0]["name"] in names
        for token in (None, "wrong"):
            error(ask("POST", "/api/predict", token=token, files={"image": file}), 401)
            error(ask("DELETE", f"/api/classes/{names[0]}", token=token), 401)
        evil = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
        assert "other sites" in error(ask("GET", "/api/classes", headers=evil), 403)
        taught = ask("POST", "/api/learn", data={"name": names[3]}, files=pictures(*drawn[names[3]][:4]))
        assert taught.json()["classes"][-1] == {"name": names[3], "images": 4}
        assert ask("DELETE", f"/api/classes/{names[3]}").status_code == 200
        large = bytes(Rules(token=TOKEN).max_bytes + 2 * ROOM)
        for _ in range(3):  # answered before all of it is there, and the answer gets through
            assert "too large" in error(ask("POST", "/api/predict", files={"image": large}), 413)
            error(ask("POST", "/api/predict", token=None, files={"image": large}), 401)
        with ThreadPoolExecutor(20) as many:  # more than limit_req lets through
            answers = list(many.map(lambda _: ask("GET", "/page.css", token=None).status_code, range(150)))
        assert set(answers) == {200, 429}
    with served(service) as address, proxied(tmp_path, port_of(address)) as (port, certificate):
        refused = httpx.get(f"https://127.0.0.1:{port}/api/classes", verify=False, headers={"Host": "127.0.0.1"})
        assert "--public-url" in error(refused, 403)


@pytest.fixture(scope="module")
def scenes():
    """PNG files of scenes, and what each shows of three words of the drawn world."""
    data = attributes_dataset("dev")
    words = np.argsort(-data.train.targets.sum(0))[:3]
    shown = [[data.classes[c] for c in words if data.train.targets[row, c]] for row in range(40)]
    return [(png(data.train[row]), own) for row, own in enumerate(shown) if own]


@pytest.fixture
def several(scenes, towers, tmp_path):
    """The service of a learner whose pictures may show several classes."""
    learner = IncrementalClassifier("simplecil", towers, device="cpu")
    images = [np.asarray(Image.open(io.BytesIO(file))) for file, _ in scenes[:24]]
    learner.partial_fit(images, [own for _, own in scenes[:24]]).save(tmp_path)
    service = Service(tmp_path, learner)
    yield service
    service.close()


def test_tells_and_learns_pictures_that_show_several_classes(several, scenes):
    ask, (file, _) = client(several), scenes[30]
    assert ask("GET", "/api/health").json()["several"] is True
    found = ask("POST", "/api/predict", files={"image": file}).json()
    image = np.asarray(Image.open(io.BytesIO(file)))
    expected = several.learner.predictions([image]).sets()[0]
    assert [(one["name"], one["probability"]) for one in found["labels"]] == expected
    assert found["known"] is None
    every = ask("POST", "/api/predict", files={"image": file}, data={"threshold": 0}).json()["labels"]
    assert len(every) == 3
    first = str(several.learner.classes_[0])
    assert ask("POST", "/api/learn", files=pictures(file), data={"name": f"{first}; new one ;"}).status_code == 200
    assert list(several.learner.classes_)[-1] == "new one"
    assert several.learner.counts_[-1] == 1
    assert ask("POST", "/api/relabel", files=pictures(file), data={"name": first}).status_code == 200
    assert "new one" not in several.learner.classes_
    error(ask("POST", "/api/learn", files=pictures(file), data={"name": ";"}), 422)


def test_a_threshold_is_for_pictures_that_show_several_classes(service, drawn):
    name = next(iter(drawn))
    answer = client(service)("POST", "/api/predict", files={"image": drawn[name][8]}, data={"threshold": 0.5})
    assert "show one class each" in error(answer, 422)
    assert client(service)("GET", "/api/health").json()["several"] is False


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_shows_several_classes_as_chips(several, scenes):
    sync_api = pytest.importorskip("playwright.sync_api")
    with served(several) as address, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(30_000)
        problems = []
        page.on("pageerror", lambda problem: problems.append(str(problem)))
        page.goto(f"{address}#token={TOKEN}")
        page.wait_for_selector("#teach:not([hidden])")
        page.evaluate(DROP, ["#drop", "", [b64encode(file).decode() for file, _ in scenes[30:33]]])
        page.wait_for_function("() => looked.every((one) => one.answer)")
        labels = page.evaluate("answer.labels")
        page.wait_for_function("() => document.querySelectorAll('#bars li').length === 3")
        assert page.locator("#chips .name").all_inner_texts() == [one["name"] for one in labels]
        assert page.locator("#sure").is_hidden()
        table = page.evaluate("table()")
        assert table.startswith("image,label,probability,problem\n")
        assert len(table.splitlines()) == 1 + page.evaluate(
            "looked.reduce((n, one) => n + Math.max(1, one.answer.labels.length), 0)"
        )
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert problems == []
        browser.close()
