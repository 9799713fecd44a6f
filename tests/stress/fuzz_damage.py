"""What the fuzzer does to files: bytes, values of JSON, tensors and their headers, settings, and hashes made to fit again."""

from __future__ import annotations

import hashlib
import json
import random
import re
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
from fuzz_targets import Files, Target, as_json

from cairn.config import settings
from cairn.methods.catalogue import METHODS
from cairn.storage.archive import digest

MANIFEST = re.compile(r".*-[0-9]+\.json")

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
            files[name] = as_json(manifest | {"sha256": digest(manifest)})
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
