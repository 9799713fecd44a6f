"""What the package shows to the outside, and what it must not do on import."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from PIL import Image

import cairn
from cairn.config import NoSettings
from cairn.methods.catalogue import METHODS

ROOT = Path(__file__).resolve().parents[1]


def test_every_public_name_is_there_and_nothing_is_forgotten():
    assert set(cairn.__all__) == set(cairn._HOMES) == set(dir(cairn))
    for name in cairn.__all__:
        assert getattr(cairn, name) is not None


def test_importing_has_no_effect():
    code = (
        "import sys, os; before = (os.getcwd(), len(sys.path))\n"
        "import cairn, cairn.cli.app, cairn.reports.tables\n"
        "assert (os.getcwd(), len(sys.path)) == before\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_pickle_anywhere():
    for path in (ROOT / "cairn").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"\bimport pickle\b|torch\.(load|save)\(|trust_remote_code\s*=\s*True", text), path


DECLARED = {"method", "method_", "towers", "_towers", "images", "source", "batches", "loader", "learner", "encoder"}
"""How variables with a declared contract are called."""


def test_nothing_is_guessed_of_methods_towers_and_images():
    """What they have stands in their protocols; what only some have is asked for with isinstance."""
    for path in (ROOT / "cairn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("hasattr", "getattr")
            ):
                asked = re.split(r"\W", ast.unparse(node.args[0]))[-1]
                assert asked not in DECLARED, f"{path}:{node.lineno}"


def test_prompts_of_the_repository_name_no_machine():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        assert str(Path.home()) not in path.read_text(), path


def test_no_modules_import_one_another_in_a_circle():
    """Imports inside functions count too."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "cairn").rglob("*.py")}
    imported: dict[str, set[str]] = {}
    for module, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        named = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
        imported[module] = {name for name in named | {str(node.module) for node in froms} if name in paths}
    while leaves := {module for module, below in imported.items() if not below}:
        imported = {module: below - leaves for module, below in imported.items() if module not in leaves}
    assert not imported, "these import one another, or what does"


def test_dmc_can_be_followed_through_few_files():
    """What `methods/dmc.py` imports, and what those import: the files that its reader may have to open."""
    behind, found = ["cairn.methods.dmc"], set()
    while behind:
        if (module := behind.pop()) in found:
            continue
        found.add(module)
        tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("cairn."):
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                is_file = (ROOT / str(node.module).replace(".", "/")).with_suffix(".py").is_file()
                behind += [str(node.module)] if is_file else inside
    assert len(found) <= 26, sorted(found)


def test_type_hints_of_public_names_resolve():
    for name in cairn.__all__:
        value = getattr(cairn, name)
        if not callable(value):
            continue
        typing.get_type_hints(value)
        for member in vars(value).values() if inspect.isclass(value) else ():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if inspect.isfunction(function):
                typing.get_type_hints(function)


HEAVY = {"peft", "matplotlib", "ray", "optuna", "datasets", "sklearn", "pandas", "fastapi", "uvicorn", "onnx"}
"""Packages that a prediction does without. accelerate and scipy are not among them: `CLIPModel`'s own
module imports both."""


def imported(*arguments: str) -> set[str]:
    """Modules that are there after a run of the command, or after `import cairn` where no arguments are given."""
    code = (
        "import sys, cairn\n"
        "if sys.argv[1:]:\n"
        "    from cairn.cli.app import main\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code, stop.code\n"
        "print('\\n' + ' '.join(sys.modules))\n"
    )
    told = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return set(told.stdout.splitlines()[-1].split())


def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path):
    heavy = HEAVY | {"torch", "transformers", "accelerate", "scipy", "numpy"}
    assert not heavy & imported()
    assert not heavy & imported("--help")

    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), dtype=np.uint8)
    images = [Image.fromarray(one) for one in pixels.reshape(-1, 32, 32, 3)]
    quick = METHODS["dmc"].card.quick  # with a LoRA, which is not peft's
    learner = cairn.IncrementalClassifier("dmc", towers="tiny", device="cpu", settings=quick)
    learner.fit(images, ["one"] * 4 + ["other"] * 4)
    learner.save(tmp_path / "learner")
    images[0].save(tmp_path / "image.png")

    modules = imported("predict", str(tmp_path / "learner"), str(tmp_path / "image.png"), "--device", "cpu")
    assert "transformers.models.clip.modeling_clip" in modules
    assert not HEAVY & modules
    methods = {METHODS[name].build.__module__ for name in METHODS}
    assert methods & modules == {METHODS["dmc"].build.__module__}


def test_shapes_that_annotations_name_are_checked_when_tests_run(flat):
    """In methods, too: see the hook in tests/conftest.py."""
    method = METHODS["simplecil"].build(flat, NoSettings(), seed=1)
    with pytest.raises(TypeCheckError, match="features"):
        method.scores(torch.zeros(16))


class Place:
    """A path of another kind than pathlib's."""

    def __init__(self, path):
        self.path = str(path)

    def __fspath__(self):
        return self.path


@pytest.mark.parametrize("kind", [Path, Place])
def test_a_path_of_any_kind_is_taken_where_its_text_is(tmp_path, kind, monkeypatch, features_file):
    file = kind(features_file())
    picture = Image.fromarray(np.full((56, 56, 3), 200, np.uint8))
    for name in ("cat", "dog"):
        for i in range(3):
            (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
            picture.rotate(30 * i).save(tmp_path / "pictures" / name / f"{i}.png")
    assert cairn.open_dataset(kind(tmp_path / "pictures")).classes == ("cat", "dog")
    data = cairn.open_dataset(file)
    (tmp_path / "order.txt").write_text("\n".join(reversed(data.classes)))
    order = kind(tmp_path / "order.txt")
    assert cairn.task_stream(data, step=2, order=order).class_names == data.classes[::-1]
    result = cairn.run_stream(cairn.RunConfig(method="lda", data=file, order=order, step=2))
    assert result.run.data == os.fspath(file)
    assert result.class_order == list(data.classes[::-1])
    (tmp_path / "said.json").write_text('{"classes": {"cat": {"sentences": ["whiskers"]}}}')
    said = kind(tmp_path / "said.json")
    spa = cairn.with_settings(METHODS["spa"].config(), {"descriptions": said})
    assert spa.descriptions == os.fspath(said)
    assert cairn.RunConfig(method="spa", settings={"descriptions": said}).settings == {"descriptions": os.fspath(said)}

    tiny = kind(ROOT / "cairn" / "towers" / "tiny")
    assert cairn.load_towers(tiny).fingerprint == cairn.load_towers("tiny").fingerprint
    files = [kind(path) for path in sorted((tmp_path / "pictures").glob("*/*.png"))]
    learner = cairn.IncrementalClassifier("simplecil", towers=tiny, descriptions=said)
    learner.partial_fit(files, ["cat"] * 3 + ["dog"] * 3)
    assert learner.predict(files[0]) == learner.predict(os.fspath(files[0]))
    assert os.fspath(tiny) in repr(learner)
    learner.save(kind(tmp_path / "kept"))
    again = cairn.IncrementalClassifier.load(kind(tmp_path / "kept"), tiny)
    assert (again.predict_proba(files) == learner.predict_proba(files)).all()
    rows = cairn.IncrementalClassifier("lda", towers=file)
    rows.partial_fit(np.asarray(data.train.values), [data.classes[c] for c in data.train.labels])
    assert len(rows.classes_) == len(data.classes)
