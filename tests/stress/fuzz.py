"""Damage what cairn reads, in every way that chance finds, and see that it is refused in one line or read right.

    python tests/stress/fuzz.py [--cases 10000] [--seed 0] [--only TARGET] [--case N] [--out FILE]

Saved learners, checkpoints, features files, descriptions, class orders, calls and settings are changed: bytes are flipped,
inserted, dropped and swapped, values in JSON and in tensors' headers replaced, files exchanged for links, pipes and folders;
in half of the cases the hashes are then made to fit again. Each must end in a CairnError of one line, or in scores that are
finite and as many as the classes; nothing else may be raised, take ten seconds, or touch a file. Prints what became of the
cases as JSON, with the number of each that broke a rule; exit status 1 if any did. `--only` and `--case` do one again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch

from cairn.classifier.classifier import IncrementalClassifier
from cairn.config import settings, with_settings
from cairn.contrib.pycil import read_config
from cairn.data.descriptions import read_descriptions, written_by
from cairn.data.embeddings import features_dataset, save_features
from cairn.data.loading import Loader
from cairn.data.stream import class_order, task_stream
from cairn.errors import CairnError, one_line
from cairn.experiment.config_file import read_run_file
from cairn.experiment.folder import CALL, CHECKPOINT, RESULT, Call, read_call, read_learner, write_learner
from cairn.experiment.inputs import prepared
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.methods.catalogue import METHODS
from cairn.storage.archive import Archive, digest
from cairn.storage.files import write_json
from cairn.towers.protocol import Towers
from cairn.training.checkpoint import Checkpoint

SECONDS = 10
MEMORY = 8 << 30
"""Address space: who believes a size of a file is stopped, and the machine is not."""

QUICK = ("stage1.schedule.epochs=1", "stage2.schedule.epochs=1")
LEARNERS = {
    "zero-shot": (),
    "simplecil": (),
    "dmc": QUICK,
    "dmc-ot": (*QUICK, "covariance=low_rank"),
    "finetune": QUICK[:1],
}

MANIFEST = re.compile(r".*-[0-9]+\.json")

RUN_FILE = b'method = "dmc"\ndata = "shapes"\nstep = 5\nseeds = [1, 2]\n[settings]\nstage1.schedule.epochs = 2\n'
TOOLBOX = b'{\n"model_name": "simplecil",\n"dataset": "cifar224",\n"init_cls": 10,\n"increment": 10,\n"seed": [1993]\n}'

Files = dict[str, bytes]


class Slow(BaseException):
    """A case that takes too long."""


class Wrong(Exception):
    """What was read is not what it must be."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Wrong(what)


# --- what is read -----------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """Files as they should be, and what reads them and looks at what came of it."""

    files: Files
    read: Callable[[Path], Any]


def targets(root: Path) -> dict[str, Target]:
    """Everything that is damaged, by name; `root` gets the one features file that runs were made with."""
    rng = np.random.default_rng(0)
    names = [f"class_{i}" for i in range(6)]
    text = rng.normal(size=(6, 8)).astype(np.float32)
    labels = np.repeat(np.arange(6), 4)
    rows = (text[labels] + 0.3 * rng.normal(size=(24, 8))).astype(np.float32)
    data = root / "data.safetensors"
    save_features(
        data,
        train_features=rows,
        train_labels=labels,
        test_features=rows[::2],
        test_labels=labels[::2],
        class_names=names,
        text_features=text,
        templates=["a {}."],
        logit_scale=20.0,
        model="made",
    )
    found = {}
    for name, changed in LEARNERS.items():
        config = RunConfig(method=name, data=str(data), step=2, settings=changed)
        folder = root / name
        result = run_stream(config, learned=partial(write_learner, folder))
        write_json(folder / RESULT, result.model_dump(mode="json"))
        found[f"learner {name}"] = Target(_files(folder), _learner)
        found[f"checkpoint {name}"] = Target(_files(_cut_off(config, root / f"{name}-cut")), _gone_on(config))
    towers = prepared(config).towers
    for name in ("simplecil", "dmc"):
        made = IncrementalClassifier(name, towers, settings=dict(text.split("=") for text in LEARNERS[name]))
        made.partial_fit(rows, [names[label] for label in labels]).save(root / f"classifier-{name}")
        found[f"classifier {name}"] = Target(_files(root / f"classifier-{name}"), _classifier(towers, rows))
    call = Call(
        run=RunConfig(method="dmc-ot", data=str(data), step=2, settings=LEARNERS["dmc-ot"]), checkpoint_seconds=60
    )
    said = written_by("me", {name: ("a bushy tail", f"the {name}'s ears") for name in names})
    lists = {"json": json.dumps(names), "yaml": "\n".join(f"- {name}" for name in names), "txt": "\n".join(names)}
    for kind, text in lists.items():
        found[f"order {kind}"] = Target({f"order.{kind}": text.encode()}, _order(f"order.{kind}", names))
    return found | {
        "features": Target({"x.safetensors": data.read_bytes()}, _features),
        "descriptions": Target({"d.json": _json(said.model_dump(mode="json"))}, _descriptions),
        "run file": Target({"run.toml": RUN_FILE}, lambda folder: read_run_file(folder / "run.toml")),
        "toolbox": Target({"config.json": TOOLBOX}, lambda folder: read_config(folder / "config.json")),
        "call": Target({CALL: _json(call.model_dump(mode="json"))}, _call),
        "settings": Target({"settings": b"dmc"}, _settings),
    }


def _files(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


def _learner(folder: Path) -> None:
    result, learner = read_learner(folder)
    method = learner.method_
    stream = task_stream(features_dataset(result.run.data), step=2)
    pixels = next(iter(Loader(stream.tests[0], method.towers.prepare, method.towers.pixels)))[0]
    with torch.no_grad():
        scores = method.scores(method.embed(pixels))
    require(scores.shape == (len(pixels), len(result.class_order)), f"scores {tuple(scores.shape)}")
    require(bool(torch.isfinite(scores).all()), "scores that are not finite")


def _classifier(towers: Towers, rows: np.ndarray) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        loaded = IncrementalClassifier.load(folder, towers)
        p = loaded.predict_proba(rows[:3])
        require(p.shape == (3, len(loaded.classes_)) and bool(np.isfinite(p).all()), f"probabilities {p.shape}")

    return read


def _cut_off(config: RunConfig, folder: Path) -> Path:
    """A run that was stopped in its second task."""

    class Cut(BaseException): ...

    class Cutting(Checkpoint):
        def __init__(self) -> None:
            super().__init__(steps=1)
            self.begun = 0

        def begin(self, work: dict | None = None) -> None:
            super().begin(work)
            self.begun += 1

        def step(self, name: str, state: Callable) -> None:
            super().step(name, state)
            if self.begun == 2:
                raise Cut

    try:
        run_stream(config, checkpoint=Cutting(), archive=Archive(folder / CHECKPOINT, "run"))
    except Cut:
        pass
    else:  # a method without work of its own: between tasks
        archive = Archive(folder / CHECKPOINT, "run")
        archive.clear()
        checkpoint = Checkpoint(steps=10**9)
        run_stream(config, checkpoint=checkpoint, archive=archive)
        checkpoint.save()
    return folder


def _gone_on(config: RunConfig) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        result = run_stream(config, checkpoint=Checkpoint(), archive=Archive(folder / CHECKPOINT, "run"))
        require(len(result.accuracy) == 3 and all(0 <= a <= 1 for a in result.seen_accuracy), "accuracies")
        json.dumps(result.model_dump(mode="json"), allow_nan=False)

    return read


def _order(file: str, names: list[str]) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        require(sorted(class_order(str(folder / file), names)) == list(range(6)), "no permutation")

    return read


def _features(folder: Path) -> None:
    data = features_dataset(folder / "x.safetensors")
    for part in (data.train, data.test):
        require(part.values.shape == (len(part.labels), data.embeddings.dim), f"rows {part.values.shape}")
        require(bool(np.isfinite(part.values).all()), "rows that are not finite")
        require(0 <= part.labels.min() <= part.labels.max() < len(data.classes), "labels")
    require(0 < data.embeddings.logit_scale < float("inf"), "scale")
    task_stream(data, step=1)


def _descriptions(folder: Path) -> None:
    found = read_descriptions(folder / "d.json")
    for sentences in found.of(found.classes):
        require(bool(sentences) and all(sentence.strip() for sentence in sentences), "no sentence")
    json.dumps(found.model_dump(mode="json"), ensure_ascii=False).encode()


def _call(folder: Path) -> None:
    call = read_call(folder)
    made = prepared(call.run)
    require(sum(len(task.classes) for task in made.stream.tasks) == len(made.stream.class_names), "tasks")
    json.dumps([call.model_dump(mode="json"), made.settings.model_dump(mode="json")], allow_nan=False).encode()


def _settings(folder: Path) -> None:
    method, *given = (folder / "settings").read_bytes().decode(errors="surrogateescape").split("\0\0")
    config = with_settings(METHODS[method].config(), given)
    dumped = config.model_dump(mode="json")
    json.dumps(dumped, allow_nan=False, ensure_ascii=False).encode()
    require(type(config).model_validate(dumped) == config, "settings that do not read back")


# --- what is done to it -----------------------------------------------------------------------------------------------

RAW = "@raw@"
"""Stands for what `json` would not write."""

RAWS = (
    "[" * 100_000, "[" * 90 + "]" * 90, "[" * 500 + "]" * 500, "9" * 5000, "1e999", "NaN", "-Infinity", '"\\ud800"', "01", "",
)  # fmt: skip

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e-320, 1e38, 1e308, 1e18, "", " ", "a", "0",
    "1", "nan", "\ud800", "\udcff", "\0", "\n", "x\ny", "\x1b[2J", "../../outside", "/etc/passwd", "C:\\", "dmc", "spa", "none",
    "a" * 100_000, [], {}, [[]], [None], [0] * 1000, {"a": {}}, {"kind": "none"}, {"kind": []}, RAW, "F64", "I64", "BF16",
    "F8_E4M3", "C64", "BOOL", [0, 0], [2**62, 4], [-1, 8], "features", "x.safetensors", "seed:5", "cifar100", "a {} {}",
)  # fmt: skip

KEYS = ("", "kind", "../x", "\ud800", "x" * 200, "schema_version")

TEXTS = (
    "nan", ".nan", ".inf", "-.inf", "1e400", "1e-3", "-1", "0", "1", "0x" + "f" * 20_000, "0x_", "9" * 5000, "1:30", "2020-13-45",
    "2020-01-01", "[1, 2", "[1, 2]", "{a: b}", "{kind: lora}", "{kind: lora, rank: 0}", "{kind: full, average: .nan}", "lora",
    "none", "null", "~", "true", "=", "<<", "!!python/object/apply:os.system ['touch made-by-yaml']", "!!binary x",
    "!!timestamp x", "!!float x", "!!set {[a]}", "? [a]", "*a", "&a [*a]", "[&a [x, x], &b [*a, *a]]", "[" * 3000, "- a\n- b",
    "\ud800", "\0", "\x1b[2J", "x" * 20_000, "local", "prompts", "1e5", "10000000000000000000000", "0o17", "1_000", "", " ",
)  # fmt: skip


def flipped(data: bytes, rng: random.Random) -> bytes:
    """The bytes after one to four changes without any sense."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, length = rng.randrange(len(out) + 1), min(rng.choice((1, 1, 2, 8, 64, 1000)), len(out))
        kind = rng.randrange(9)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + 1] = bytes([rng.choice((0, 0xFF, 0x22, 0x7B, 0x5B, 0x80, rng.randrange(256)))])
        elif kind == 2:
            out[at:at] = rng.randbytes(length)
        elif kind == 3:
            del out[at : at + length]
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            out[at:at] = out[at : at + length]
        elif kind == 6:
            out[at : at + length] = bytes(len(out[at : at + length]))
        elif kind == 7:
            out += rng.randbytes(length)
        else:
            other = rng.randrange(len(out) + 1)
            out[at : at + length], out[other : other + length] = out[other : other + length], out[at : at + length]
    return bytes(out)


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a value."""
    found, rest = [], [value]
    while rest:
        node = rest.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        found += [(node, key) for key in keys]
        rest += [node[key] for key in keys]
    return found


def twisted(value: Any, rng: random.Random) -> Any:
    """A value of JSON with one to three of its parts replaced, dropped, moved, nested or multiplied. It is changed in place."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        nodes = _nodes(value)
        if not nodes:
            return deepcopy(rng.choice(VALUES))
        node, key = rng.choice(nodes)
        kind = rng.randrange(8)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice((*KEYS, f"{key}0"))] = node.pop(key)
        elif kind == 2:
            other, place = rng.choice(nodes)
            node[key] = deepcopy(other[place])
        elif kind == 3:
            node[key] = [node[key]] if rng.random() < 0.5 else {"a": node[key]}
        elif kind == 4 and isinstance(node, list):
            node[key:key] = [node[key]] * rng.choice((1, 10, 1000))
        elif kind == 5 and type(node[key]) in (int, float):
            node[key] = rng.choice((node[key] + 1, -node[key], node[key] * 10**6, str(node[key]), float(node[key])))
        else:
            node[key] = deepcopy(rng.choice(VALUES))
    return value


def written(value: Any, rng: random.Random) -> bytes:
    """As JSON, and what is none of it."""
    text = json.dumps(value, indent=rng.choice((None, 2)))
    return text.replace(f'"{RAW}"', rng.choice(RAWS)).encode()


def lines_moved(data: bytes, rng: random.Random) -> bytes:
    """A text with a line twice, dropped, or at another place: keys that are there twice, lists that do not end."""
    lines = data.split(b"\n")
    line = lines.pop(rng.randrange(len(lines)))
    for _ in range(rng.randrange(3)):
        lines.insert(rng.randrange(len(lines) + 1), line)
    return b"\n".join(lines)


def tensors_changed(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, or other numbers."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    kind = rng.randrange(5)
    if kind == 0 and len(body) > 8:
        at = rng.randrange(len(body) // 4) * 4
        value = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e30, 1e-42, 0.0))
        body[at : at + 4] = np.float32(value).tobytes()
    elif kind == 1:  # one tensor less, more or wider, whole otherwise
        keys = [key for key in header if key != "__metadata__"]
        order = sorted(keys, key=lambda key: header[key]["data_offsets"])
        parts = {key: bytes(body[slice(*header[key]["data_offsets"])]) for key in order}
        key = rng.choice(keys)
        change = rng.randrange(4)
        if change == 0:
            del parts[key], header[key]
        elif change == 1:
            key, header[key + "x"], parts[key + "x"] = key + "x", dict(header[key]), parts[key]
        elif change == 2 and header[key]["shape"]:
            header[key]["shape"][0] *= 2
            parts[key] *= 2
        else:
            header[key]["shape"] = rng.choice(
                ([1, *header[key]["shape"]], header[key]["shape"][::-1], [*header[key]["shape"], 1])
            )
        body, end = bytearray(), 0
        for key, content in parts.items():
            header[key]["data_offsets"] = [end, end := end + len(content)]
            body += content
    else:
        header = twisted(header, rng)
    text = written(header, rng)
    text += b" " * (-len(text) % 8)
    size = len(text) if rng.random() < 0.95 else rng.choice((0, 1, 2**24, 2**40, 2**63, 2**64 - 1))
    return size.to_bytes(8, "little") + text + bytes(body)


def sealed(files: Files) -> Files:
    """The same with hashes, names and sizes in the manifests made to fit, where they are manifests still."""
    files = dict(files)
    for name in [name for name in files if MANIFEST.fullmatch(name)]:
        try:
            manifest = json.loads(files[name])
            for part, entry in manifest["parts"].items():
                place, _, prefix = name.rpartition("-")[0].rpartition("/")
                content = files[f"{place}/{entry['file']}"]
                sha256 = hashlib.sha256(content).hexdigest()
                entry |= {"file": f"{prefix}-{part}-{sha256[:16]}.safetensors", "bytes": len(content), "sha256": sha256}
                if part.isidentifier():
                    files[f"{place}/{entry['file']}"] = content
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        try:
            manifest.pop("sha256", None)
            files[name] = _json(manifest | {"sha256": digest(manifest)})
        except (TypeError, AttributeError, UnboundLocalError, RecursionError, ValueError):
            pass
    return files


def assignments(rng: random.Random) -> bytes:
    """What may stand behind --set, several of them."""
    method = rng.choice(("dmc-ot", "spa", "dmc"))
    known = list(settings(METHODS[method].config()))
    out = [method.encode()]
    for _ in range(rng.choice((1, 1, 2, 4))):
        path, value, _ = rng.choice(known)
        if rng.random() < 0.2:
            path = rng.choice((path + ".kind", path + ".x", path.rpartition(".")[0], "", ".", " " + path, path.upper()))
        text = rng.choice((rng.choice(TEXTS), json.dumps(value), json.dumps(twisted([value], rng))))
        whole = f"{path}={text}".encode(errors="surrogatepass")
        out.append(flipped(whole, rng) if rng.random() < 0.2 else whole)
    return b"\0\0".join(out)


class Damage(NamedTuple):
    """Files with new contents, names that are gone, and (name, what it is instead)."""

    files: Files
    special: tuple[str, str] | None = None


def damaged(target: Target, rng: random.Random) -> Damage:
    files = dict(target.files)
    if "settings" in files:
        return Damage({"settings": assignments(rng)})
    manifests = sorted(name for name in files if MANIFEST.fullmatch(name))
    if len(manifests) > 1 and rng.random() < 0.5:  # nothing to fall back on
        del files[manifests[0]]
    name = rng.choice(sorted(files))
    if rng.random() < 0.06:
        return Damage(files, (name, rng.choice(("link", "pipe", "folder", "gone", "empty", "loop"))))
    if len(files) > 1 and rng.random() < 0.05:
        other = rng.choice(sorted(files))
        files[name], files[other] = files[other], files[name]
    elif rng.random() < 0.35:
        files[name] = flipped(files[name], rng)
    elif name.endswith(".safetensors"):
        files[name] = tensors_changed(files[name], rng)
    elif name.endswith(".json") and rng.random() < 0.85:
        files[name] = written(twisted(json.loads(files[name]), rng), rng)
    else:
        files[name] = lines_moved(files[name], rng)
    return Damage(sealed(files) if rng.random() < 0.5 else files)


# --- one case ---------------------------------------------------------------------------------------------------------


class Place:
    """A folder to read from, in the middle of others that must stay as they are."""

    def __init__(self, root: Path):
        self.root, self.folder = root, root / "inside" / "folder"
        self.outside = root / "inside" / "outside.json"
        self.folder.mkdir(parents=True)
        self.outside.write_text("{}")

    def lay(self, damage: Damage) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        for name, content in damage.files.items():
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        if damage.special is not None:
            path, kind = self.folder / damage.special[0], damage.special[1]
            path.unlink()
            if kind == "link":
                path.symlink_to(self.outside)
            elif kind == "loop":
                path.symlink_to(path)
            elif kind == "pipe":
                os.mkfifo(path)
            elif kind == "folder":
                path.mkdir()
            elif kind == "empty":
                path.touch()

    def listing(self) -> dict[str, tuple[int, int]]:
        found = {}
        for folder, folders, files in os.walk(self.root):
            for name in folders + files:
                path = os.path.join(folder, name)
                seen = os.lstat(path)
                found[path] = (seen.st_size, seen.st_mtime_ns)
        return found


def outcome(target: Target, damage: Damage, place: Place) -> tuple[str, str]:
    """('right' or 'refused' or 'broken', what is to be said of it)."""
    place.lay(damage)
    before = place.listing()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        target.read(place.folder)
        found = "right", ""
    except CairnError as error:
        message = str(error)
        found = ("refused", message) if message and one_line(message) == message else ("broken", f"message {message!r}")
    except (Exception, Slow) as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}cairn{os.sep}" in f.filename]
        where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "here"
        found = "broken", f"{type(error).__name__}: {str(error)[:200]} ({where})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if (after := place.listing()) != before:
        found = "broken", f"files changed: {sorted(before.items() ^ after.items())[:4]}"
    return found


def fuzzed(cases: int, seed: int, root: Path, only: str = "", case: int | None = None) -> dict[str, Any]:
    """Counts by target and outcome, and the cases that broke a rule. The files lie below `root`."""
    began, place = time.perf_counter(), Place(root)
    known = {name: target for name, target in targets(root).items() if name.startswith(only)}
    for name, target in known.items():
        if (found := outcome(target, Damage(target.files), place))[0] != "right":
            raise SystemExit(f"{name}: unharmed, and {found}")
    counts: dict[str, Counter] = {name: Counter() for name in known}
    broken = []
    for number in range(cases) if case is None else [case]:
        name = list(known)[number % len(known)]
        damage = damaged(known[name], random.Random(f"{seed} {name} {number}"))
        kind, said = outcome(known[name], damage, place)
        counts[name][kind] += 1
        if kind == "broken":
            broken.append({"target": name, "case": number, "what": said})
        if case is not None:
            print(kind, said, file=sys.stderr)
    return {
        "cases": sum(count.total() for count in counts.values()),
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
        "targets": counts,
        "broken": broken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name begins like this")
    parser.add_argument("--case", type=int, help="this one alone, with the same --only")
    parser.add_argument("--out", type=Path, help="where the report goes as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of odd shapes, on their way to being refused
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, _slow)
    out = args.out.resolve() if args.out else None
    with tempfile.TemporaryDirectory() as passing:
        root = Path(passing).resolve()
        os.chdir(root)
        report = fuzzed(args.cases, args.seed, root, args.only, args.case)
        os.chdir("/")
    print(json.dumps(report, indent=2))
    if out is not None:
        write_json(out, report)
    sys.exit(1 if report["broken"] else 0)


def _slow(number: int, frame: Any) -> None:
    raise Slow(f"more than {SECONDS} s")


if __name__ == "__main__":
    main()
