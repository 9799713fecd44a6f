"""From weights in safetensors files to a `CLIPModel` that holds exactly these."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, CLIPConfig, CLIPModel

from cairn.errors import ResultError, TowersError, counted
from cairn.storage.files import read_json
from cairn.storage.tensors import TensorFile

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")

_PREFIXES = re.compile(r"(?:module\.|_orig_mod\.|model\.|base_model\.model\.|clip\.)*")
"""What wrappers put before the names: data parallelism, `torch.compile`, a module that holds the model, peft."""

_ADAPTED = re.compile(r"\.(lora_\w+|base_layer)\.")


@dataclass(frozen=True)
class ClipCheckpoint:
    """A frozen float32 model; the folders in which its other files are looked for, in that order; what a user should know of
    how it was read."""

    model: CLIPModel
    folders: tuple[Path, ...]
    commit: str | None
    notices: tuple[str, ...]

    def folder_with(self, names: Sequence[str]) -> Path:
        """The first that has one of these files, else the last."""
        found = (folder for folder in self.folders if any((folder / name).is_file() for name in names))
        return next(found, self.folders[-1])


def image_side(model: CLIPModel) -> int:
    """Pixels of a side of the square that the image tower takes."""
    side = model.vision_model.config.image_size
    if not isinstance(side, int):
        raise TowersError(f"image_size {side}: images are squares; give one number")
    return side


def has_weights(folder: Path) -> bool:
    """Whether all of them are there, in one file or in the parts of an index."""
    if (folder / WHOLE).is_file():
        return True
    return (folder / INDEX).is_file() and all((folder / part).is_file() for part in _parts(folder))


def no_weights(folder: Path, name: str) -> TowersError:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    seen = f" but {pickled[0]}" if pickled else ""
    return TowersError(
        f"'{folder}' holds no safetensors weights{seen}: pickled weights are not read; convert them to {name}"
    )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in the transformers layout. Raises TowersError naming what is missing or damaged."""
    if (folder / WHOLE).is_file():
        return read_file(folder / WHOLE)
    if not (folder / INDEX).is_file():
        raise no_weights(folder, WHOLE)
    return {name: value for part in _parts(folder) for name, value in read_file(folder / part).items()}


def read_file(path: Path) -> dict[str, Tensor]:
    """Views of a safetensors file."""
    try:
        return TensorFile(path).tensors()
    except ResultError as error:
        raise TowersError(f"{error}; fetch the checkpoint again") from None


def _parts(folder: Path) -> list[str]:
    """Files of an index. A name that leads out of the folder is refused."""
    stored = read_json(folder / INDEX, links=True)
    found = stored.get("weight_map") if isinstance(stored, dict) else None
    if not isinstance(found, dict) or not all(
        isinstance(part, str) and Path(part).name == part for part in found.values()
    ):
        raise TowersError(f"'{folder / INDEX}': no index of weights; fetch the checkpoint again")
    return sorted(set(found.values()))


def without_prefixes(state: Mapping[str, Tensor], where: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights under the names of the model itself, and what was taken off these.

    Raises TowersError where two weights then have one name, and for layers of a LoRA, whose scale no weight tells.
    """
    found, prefixes = {}, {}
    for name, value in state.items():
        bare = _PREFIXES.sub("", name, count=1)
        prefix, bare = name.removesuffix(bare), bare.replace("._orig_mod.", ".")
        if bare in found:
            raise TowersError(f"'{where}': '{name}' is there twice, with and without a prefix; save the model alone")
        if prefix:
            prefixes[prefix] = None
        found[bare] = value
    if adapted := [name for name in found if _ADAPTED.search(name)]:
        raise TowersError(
            f"'{where}': holds {counted(len(adapted), 'tensor')} of LoRA layers, first '{adapted[0]}'; merge them with peft's "
            "merge_and_unload() and save the model again"
        )
    return found, tuple(prefixes)


def prefix_notices(prefixes: Sequence[str], where: Path) -> tuple[str, ...]:
    shown = " and ".join(f"'{prefix}'" for prefix in prefixes)
    return (f"'{where}': names of weights begin with {shown}, which is left out",) if prefixes else ()


def model_with(config: CLIPConfig, state: Mapping[str, Tensor], where: Path, said: str) -> tuple[CLIPModel, list[str]]:
    """A frozen float32 model in evaluation mode with these weights, and the names of those that it has no place for. No
    random number is drawn. `said` is the config's file.

    Raises TowersError for weights that are missing, of another shape than the config's, or of layers that it has not.
    """
    # On the meta device nothing is initialised: no time, no memory, no draw from the global generator.
    with torch.device("meta"):
        model = AutoModel.from_config(config, attn_implementation="sdpa", dtype=torch.float32, trust_remote_code=False)
    own = model.state_dict()
    given = {name: value for name, value in state.items() if not name.endswith("position_ids")}
    if missing := sorted(own.keys() - given.keys()):
        raise TowersError(
            f"'{where}': missing: {counted(len(missing), 'weight')}, first '{missing[0]}'; the file is incomplete, or {said} that "
            "of another model"
        )
    towers = ("vision_model.", "text_model.")
    expected = {name: tuple(value.shape) for name, value in own.items()}
    shapes = {name: tuple(value.shape) for name, value in given.items()}
    wrong = [name for name in shapes if shapes[name] != expected.get(name) and (name in own or name.startswith(towers))]
    if wrong:
        name = min(wrong)
        raise TowersError(
            f"'{where}' does not fit its config in {counted(len(wrong), 'weight')}: '{name}' is {shapes[name]}, by {said} "
            f"{expected.get(name, 'absent')}; take both files from one checkpoint"
        )
    # A copy, because what safetensors hands out is a view of the file, which may change later.
    model.load_state_dict({name: given[name].to(torch.float32, copy=True) for name in own}, assign=True)
    for embeddings in (model.vision_model.embeddings, model.text_model.embeddings):
        # The one buffer no checkpoint holds.
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings).unsqueeze(0)
    return model.eval().requires_grad_(False), sorted(given.keys() - own.keys())
