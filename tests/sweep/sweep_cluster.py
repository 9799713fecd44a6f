"""A sweep on a cluster of three nodes, one of which is taken away in the middle. Called by test_sweep.py:

    python sweep_cluster.py SWEEP.toml OUT [WORDS OF `cairn sweep` ...]

Prints as JSON how the command ended, what it printed, and which run was under way on the node that was taken away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}

from ray.cluster_utils import Cluster

NODES = 3
PATIENCE = 240.0


def attempts(out: Path) -> dict[int, Path]:
    """Folders of runs by the process that began them."""
    found = {}
    for events in out.rglob("events.jsonl"):
        for line in events.read_text().splitlines():
            if line.startswith('{"event": "attempt"'):
                found[json.loads(line)["process"]] = events.parent
    return found


def parent(process: int) -> int | None:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("PPid:"))


def under_way(raylet: int, out: Path) -> Path | None:
    """The unfinished run of a node's worker that has kept a state beyond its first: one that can be gone on with."""
    for process, folder in attempts(out).items():
        kept = folder.glob("checkpoint/run-*.json")
        if parent(process) == raylet and any(int(path.stem[4:]) > 2 for path in kept):
            return folder
    return None


def main() -> None:
    file, out, *words = sys.argv[1:]
    store = 100 * 2**20
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": store},
    )
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=store) for _ in range(NODES - 1)]
    cluster.wait_for_nodes()
    command = [sys.executable, "-c", "from cairn.cli.app import main; main()", "sweep", file, "--out", out]
    sweep = subprocess.Popen(
        [*command, "--address", cluster.address, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    victim, lost = nodes[-1], None
    raylet = victim.all_processes["raylet"][0].process.pid
    until = time.monotonic() + PATIENCE
    while lost is None and sweep.poll() is None and time.monotonic() < until:
        lost = under_way(raylet, Path(out))
        time.sleep(0.02)
    cluster.remove_node(victim, allow_graceful=False)
    try:
        printed, _ = sweep.communicate(timeout=PATIENCE)
    finally:
        sweep.kill()
        cluster.shutdown()
    told = {"status": sweep.returncode, "printed": printed, "lost": lost and str(lost.relative_to(out))}
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
