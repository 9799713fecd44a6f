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
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from fuzz_damage import Damage, damaged
from fuzz_targets import Target, targets

from cairn.errors import CairnError, one_line
from cairn.storage.files import write_json

SECONDS = 10
MEMORY = 8 << 30
"""Address space: who believes a size of a file is stopped, and the machine is not."""


class Slow(BaseException):
    """A case that takes too long."""


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
