"""Checkpoint folders of a user, small."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
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
    save_file({key: value.contiguous() for key, value in open_clip_state(model.state_dict()).items()},
              folder / "open_clip_model.safetensors")  # fmt: skip
    text, vision = model.config.text_config, model.config.vision_config
    side = {"embed_dim": towers.dim, "quick_gelu": False}
    side["vision_cfg"] = {"image_size": vision.image_size, "layers": vision.num_hidden_layers,
                          "width": vision.hidden_size, "patch_size": vision.patch_size,
                          "head_width": vision.hidden_size // vision.num_attention_heads}  # fmt: skip
    side["text_cfg"] = {"context_length": text.max_position_embeddings, "vocab_size": text.vocab_size,
                        "width": text.hidden_size, "heads": text.num_attention_heads,
                        "layers": text.num_hidden_layers}  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": side, "preprocess_cfg": {}}))
    towers.tokenizer.save_pretrained(folder)
    return folder
