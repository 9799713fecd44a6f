"""A method of another package is one file and an entry point: it is listed, explained, run, saved, served."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from cairn import IncrementalClassifier
from cairn.cli.app import app
from cairn.data.shapes import shapes_dataset
from cairn.errors import UnknownName
from cairn.methods import catalogue
from cairn.methods.catalogue import METHODS, method_named
from cairn.serve.app import application
from cairn.serve.guard import Rules
from cairn.serve.service import Service

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extend.md"


def install_from_page(folder: Path) -> None:
    """What `pip install -e .` makes of the page's two files, as far as Python looks for it."""
    text = PAGE.read_text(encoding="utf-8")
    source, project = (re.search(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.M)[1] for kind in ("python", "toml"))
    (folder / "sums.py").write_text(source, encoding="utf-8")
    made = tomllib.loads(project)["project"]
    install(folder, made["name"], made["entry-points"]["cairn.methods"])


def install(folder: Path, name: str, points: dict[str, str]) -> None:
    info = folder / f"{name.replace('-', '_')}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n", encoding="utf-8")
    lines = [f"{key} = {value}" for key, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[cairn.methods]", *lines, ""]), encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """On Python's path; what is found there is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    catalogue._others.cache_clear()
    yield tmp_path
    catalogue._others.cache_clear()


def test_one_file_and_an_entry_point_make_a_method(folder, towers, tmp_path, capsys):
    install_from_page(folder)
    entry = METHODS["sums"]
    assert list(METHODS)[-1] == "sums"

    def said(*words: str) -> str:
        app([*words], standalone_mode=False)
        return capsys.readouterr().out

    assert re.search(r"^sums +nothing +sums +0\.2 +no +an example", said("list"), re.MULTILINE)
    explained = said("explain", "sums")
    assert "Sums of embeddings" in explained
    assert "1. a sum of embeddings per class" in explained

    out = tmp_path / "run"
    said(
        "run",
        "sums",
        "--data",
        "shapes",
        "--step",
        "20",
        "--limit-train",
        "3",
        "--limit-test",
        "2",
        "--device",
        "cpu",
        "--out",
        str(out),
    )
    result = json.loads((out / "result.json").read_text())
    assert (result["method"], result["memory_bytes"]) == ("sums", entry.card.bytes(40, towers.dim, 0, 0, 0))
    assert result["last"] > 0.3

    data = shapes_dataset()
    rows = [i for c in range(3) for i in (data.train.labels == c).nonzero()[0][:4]]
    images, names = [data.train[i] for i in rows], [data.classes[data.train.labels[i]] for i in rows]
    learner = IncrementalClassifier("sums", towers).partial_fit(images, names)
    learner.save(tmp_path / "learner")
    again = IncrementalClassifier.load(tmp_path / "learner", towers)
    assert (again.predict_proba(images) == learner.predict_proba(images)).all()
    assert again.predict(images).tolist() == names

    service = Service(tmp_path / "learner", again)
    transport = httpx.ASGITransport(application(service, Rules(token="a-token-for-the-tests")))
    picture = io.BytesIO()
    Image.fromarray(np.asarray(images[0])).save(picture, "PNG")

    async def asked():
        bearer = {"Authorization": "Bearer a-token-for-the-tests"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=bearer) as http:
            return await http.post("/api/predict", files={"image": picture.getvalue()}, data={"topk": 1})

    try:
        assert asyncio.run(asked()).json()["classes"][0]["name"] == names[0]
    finally:
        service.close()


def test_an_entry_point_that_cannot_be_used_is_one_line(folder, caplog):
    (folder / "broken.py").write_text("raise RuntimeError('no\\nluck')", encoding="utf-8")
    (folder / "plain.py").write_text("class Plain: pass", encoding="utf-8")
    install(
        folder,
        "their-methods",
        {"absent": "nowhere:Class", "broken": "broken:Class", "plain": "plain:Plain", "dmc": "cairn.methods.dmc:DMC"},
    )
    names = list(METHODS)
    assert not {"absent", "broken", "plain"} & {*names}
    assert METHODS["dmc"].build.__module__ == "cairn.methods.dmc"
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split("'")[1] for line in lines] == ["absent", "broken", "dmc", "plain"]
    assert all("'their-methods'" in line and "\n" not in line for line in lines)
    with pytest.raises(UnknownName, match="unknown method 'broken'"):
        method_named("broken")


def test_every_module_with_a_card_is_a_method_by_its_name():
    own = {path.stem for path in Path(catalogue.__file__).parent.glob("*.py") if "card = Card(" in path.read_text()}
    assert {entry.build.__module__ for entry in METHODS.values()} == {f"cairn.methods.{name}" for name in own}
    assert list(METHODS) == sorted(name.replace("_", "-") for name in own)
    assert "two-stage" not in METHODS
    assert "catalogue" not in METHODS


@pytest.mark.slow
def test_the_contract_runs_on_the_method_of_ones_own_as_the_page_says(tmp_path):
    install_from_page(tmp_path)
    words = shlex.split(re.search(r"^```sh\n(.*)\n```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[1])
    assert words[0] == ".venv/bin/python"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(PAGE.parents[1])])}
    ended = subprocess.run([sys.executable, *words[1:]], cwd=PAGE.parents[1], env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert re.search(r"\b\d\d passed", ended.stdout)
