"""The habits of PyCIL and of what came from it (PILOT, C3Box): JSON configs, read as run files, and lines on the terminal.

Names, keys and what they mean were read off the configs and trainers of G-U-N/PyCIL, sun-hailong/LAMDA-PILOT and
LAMDA-CL/C3Box. They draw the class order from the seed (`RandomState(seed).permutation(k)`): here `order = "seed:N"`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cairn.config import settings
from cairn.data.catalogue import CATALOGUE
from cairn.errors import ConfigError, counted, one_line
from cairn.experiment.config_file import RunFile, checked
from cairn.methods.catalogue import METHODS, Entry
from cairn.storage.files import read_json
from cairn.towers.catalogue import KNOWN

LAION = "open_clip:timm/vit_base_patch16_clip_224.laion400m_e32"
OPENAI = "openai/clip-vit-base-patch16"


def _plain(name: str) -> str:
    """'ImageNet-R', 'imagenet_r' and 'imagenetr' are one name."""
    return re.sub(r"[-_ ]", "", name.lower())


METHOD_NAMES = {_plain(name): name for name in METHODS} | {"zsclip": "zero-shot"}
DATA_NAMES = {_plain(key): key for key in CATALOGUE} | {
    "cifar224": "cifar100", "cub": "cub200", "ucf": "ucf101", "stanfordcars": "cars", "food": "food101", "sun": "sun397",
}  # fmt: skip
TOWERS_NAMES = {_plain(key): key for key in KNOWN} | {
    # C3Box's names and those of its README, then open_clip's and OpenAI's own
    "clip": LAION, "laion400m": LAION, "openaiclip": OPENAI, "openai": OPENAI,
    "cliplaion2b": "open_clip:laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    "vitb16": LAION, "laion400me32": LAION, "vitb/16": OPENAI, "vitb/32": "openai/clip-vit-base-patch32",
    "vitl/14": "openai/clip-vit-large-patch14",
}  # fmt: skip
SCHEDULE_KEYS = {
    "epochs": ("tuned_epoch", "epochs"), "batch": ("batch_size",), "lr": ("lrate", "init_lr"),
    "weight_decay": ("weight_decay",),
}  # fmt: skip
"""What a schedule takes, and the keys that say it for every task; the first found counts."""
SCHEDULE_WORDS = {
    ("optimizer", "sgd"): ("optimizer", "sgd"), ("optimizer", "adam"): ("optimizer", "adam"),
    ("optimizer", "adamw"): ("optimizer", "adamw"), ("scheduler", "cosine"): ("cosine", True),
    ("scheduler", "constant"): ("cosine", False),
}  # fmt: skip


def read_config(path: Path) -> RunFile:
    """A toolbox's config. Names that are not known here are left to be refused, or overridden, where they are used.

    Raises ResultError for a file that is no JSON, ConfigError for one that is no such config or whose values do not fit.
    """
    stored = read_json(path, links=True)
    if not isinstance(stored, dict) or not isinstance(stored.get("model_name"), str):
        raise ConfigError(
            f"'{path}': a run file is TOML, a toolbox's config is JSON with a model_name; this is neither"
        )
    left, notices = dict(stored), []
    name = left.pop("model_name")
    values: dict[str, Any] = {"preprocess": "squash", **_stream(left, notices), **_towers(left, notices)}
    if _plain(name) in METHOD_NAMES:
        entry = METHODS[METHOD_NAMES[_plain(name)]]
        values |= {"method": entry.name, "settings": _schedule(entry, left)}
        notices += _memory(entry, left)
    else:
        values["problem"] = f"'{path}': model_name '{name}' is not here; methods: {', '.join(METHODS)}"
    if left:
        notices.append(f"not used: {', '.join(left)}")
    values["notices"] = tuple(f"{path.name}: {one_line(text)}" for text in notices)
    return checked(RunFile, values, f"run file '{path}'")


def curve_lines(seen: Sequence[float]) -> tuple[str, str]:
    """What PyCIL prints after a task, from the accuracies over the classes seen: percent with two decimals."""
    average = round(100 * sum(seen) / len(seen), 2)
    return f"CNN top1 curve: {[round(100 * a, 2) for a in seen]}", f"Average Accuracy (CNN): {average}"


def _stream(left: dict[str, Any], notices: list[str]) -> dict[str, Any]:
    """Data set, classes per task, class order and seeds."""
    values: dict[str, Any] = {}
    name = str(left.pop("dataset", ""))
    found = re.fullmatch(r"(.*?)(?:_b(\d{1,6}))?(?:_inc(\d{1,6}))?", name, re.I | re.S)
    stem, base, step = found.groups() if found else (name, None, None)
    base, step = (number and int(number) for number in (base, step))
    values["data"] = DATA_NAMES.get(_plain(stem), name)
    row = CATALOGUE.get(values["data"])
    if row is not None and len(row.classes) > 1:
        whole, part = row.classes
        notices.append(
            f"{row.title} has {counted(whole, 'class')}, their config uses {part} of them; give a copy with these, {row.key}=PATH"
        )
    base, step = left.pop("init_cls", base), left.pop("increment", step)
    if step is not None:
        values |= {"base": 0 if base in (None, step) else base, "step": step}
    seeds = left.pop("seed", [])
    seeds = seeds if isinstance(seeds, list) else [seeds]
    if seeds:
        values["seed"] = seeds[0]
    if left.pop("shuffle", False) and seeds:
        values["order"] = f"seed:{seeds[0]}"
    if len(seeds) > 1:
        values["seeds"] = seeds
        if "order" in values:
            notices.append(f"theirs has a class order for each seed; here all seeds have that of the first, {seeds[0]}")
    return values


def _towers(left: dict[str, Any], notices: list[str]) -> dict[str, Any]:
    """Weights and device. Where an image network without texts is named, setting B's towers stand in, with a notice."""
    named = [str(left.pop(key)) for key in ("backbone_type", "convnet_type") if key in left]
    towers = TOWERS_NAMES.get(_plain(named[0])) if named else None
    if towers is None:
        reason = f"'{named[0]}' is no CLIP" if named else "no backbone is named"
        notices.append(f"{reason}; the usual towers, {LAION}, are taken unless --towers says otherwise")
        towers = LAION
    devices = left.pop("device", [])
    devices = [str(number) for number in (devices if isinstance(devices, list) else [devices])]
    if len(devices) > 1:
        notices.append(f"one device is used, the first of {', '.join(devices)}")
    # "0" is what every config says, whatever the machine has: the accelerator there is
    first = devices[0] if devices else "0"
    device = {"0": "auto", "-1": "cpu"}.get(first, f"cuda:{first}" if first.isdecimal() else first)
    return {"towers": towers, "device": device}


def _schedule(entry: Entry, left: dict[str, Any]) -> dict[str, Any]:
    """Settings of the method's schedule, if it has a single one: with two stages it is not clear which is meant."""
    paths = [path for path, _, _ in settings(entry.config()) if path.endswith("schedule.epochs")]
    if len(paths) != 1:
        return {}
    found = {}
    for name, keys in SCHEDULE_KEYS.items():
        if said := [key for key in keys if key in left]:
            found[name] = left.pop(said[0])
    for (key, word), (name, value) in SCHEDULE_WORDS.items():
        if str(left.get(key)).lower() == word:
            del left[key]
            found[name] = value
    return {paths[0].removesuffix("epochs") + name: value for name, value in found.items()}


def _memory(entry: Entry, left: dict[str, Any]) -> list[str]:
    """A notice if the config says how many images to keep: here that is a setting of the method, if of anything."""
    asked = {key: left.pop(key) for key in ("memory_size", "memory_per_class", "fixed_memory") if key in left}
    kept = next((key for key in ("memory_size", "memory_per_class") if asked.get(key)), None)
    if kept is None:
        return []
    return [f"{kept} {asked[kept]} is not used: {entry.name} keeps {entry.card.keeps}"]
