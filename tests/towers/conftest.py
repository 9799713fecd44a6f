"""Checkpoint folders of a user, small, and a hub that needs no network."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from safetensors.torch import save_file

from cairn.towers.openclip import open_clip_state


@pytest.fixture
def copy(tmp_path) -> Path:
    """The tiny towers as a user's own folder."""
    folder = tmp_path / "mine"
    shutil.copytree(str(resources.files("cairn.towers").joinpath("tiny")), folder)
    return folder


@pytest.fixture
def open_clip_copy(tmp_path, towers) -> Path:
    """The same in the open_clip layout."""
    folder, model = tmp_path / "open", towers._model
    folder.mkdir()
    save_file(
        {key: value.contiguous() for key, value in open_clip_state(model.state_dict()).items()},
        folder / "open_clip_model.safetensors",
    )
    text, vision = model.config.text_config, model.config.vision_config
    side = {"embed_dim": towers.dim, "quick_gelu": False}
    side["vision_cfg"] = {
        "image_size": vision.image_size,
        "layers": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "patch_size": vision.patch_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
    }
    side["text_cfg"] = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": side, "preprocess_cfg": {}}))
    towers.tokenizer.save_pretrained(folder)
    return folder


class Hub:
    """Repositories that are folders; what is fetched of them lies in the cache as the hub's own client leaves it."""

    def __init__(self, cache: Path):
        self.cache, self.asked = cache, []
        self._held: dict[tuple[str, str], Path] = {}

    def holds(self, name: str, folder: Path, revision: str = "main") -> None:
        self._held[name, revision] = folder

    @staticmethod
    def commit(name: str, revision: str) -> str:
        return hashlib.sha1(f"{name} {revision}".encode()).hexdigest()

    def model_info(self, api, name: str, *, revision=None, timeout=None):
        """Of what no repository holds there is no network."""
        self.asked.append(name)
        if (found := self._held.get((name, revision or "main"))) is None:
            raise ConnectionError("Name or service not known")
        files = [SimpleNamespace(rfilename=path.name) for path in found.iterdir()]
        return SimpleNamespace(sha=self.commit(name, revision or "main"), siblings=files)

    def snapshot_download(self, name: str, *, revision: str, allow_patterns: list[str]) -> str:
        (at,) = (held for held in self._held if held[0] == name and self.commit(*held) == revision)
        place = self.cache / f"models--{name.replace('/', '--')}"
        folder = place / "snapshots" / revision
        folder.mkdir(parents=True, exist_ok=True)
        for file in allow_patterns:
            shutil.copy(self._held[at] / file, folder / file)
        reference = place / "refs" / at[1]
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(revision)
        return str(folder)

    def disconnect(self) -> None:
        self._held, self.asked = {}, []


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    made = Hub(tmp_path / "cache")
    made.cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made.cache))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *given, **named: made.model_info(*given, **named))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made
