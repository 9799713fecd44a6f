"""The readers-writer lock: many readers at once, or one writer alone."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cairn.storage.locks import Gate

ROOT = Path(__file__).resolve().parents[2]

SOON = 10.0
"""Seconds within which something that is not blocked has happened."""

A_WHILE = 0.2
"""Seconds after which something that is blocked would have happened otherwise."""


class Other:
    """A thread that takes one side of the gate, says so, and keeps it until it is told to leave."""

    def __init__(self, gate: Gate, side: str):
        self.inside, self.leave = threading.Event(), threading.Event()
        self._gate, self._side = gate, side
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with getattr(self._gate, self._side)():
            self.inside.set()
            self.leave.wait()

    def end(self) -> None:
        self.leave.set()
        self._thread.join(SOON)
        assert not self._thread.is_alive()


@pytest.fixture
def entered():
    """Starts threads on a gate of the test's own; all of them are let go at the end."""
    others: list[Other] = []

    def start(gate: Gate, side: str) -> Other:
        others.append(Other(gate, side))
        return others[-1]

    yield start
    for other in others:
        other.leave.set()


@pytest.mark.timeout(60)
def test_readers_are_inside_together(entered):
    gate = Gate()
    readers = [entered(gate, "reading") for _ in range(3)]
    assert all(reader.inside.wait(SOON) for reader in readers)


@pytest.mark.timeout(60)
def test_a_writer_waits_for_every_reader(entered):
    gate = Gate()
    first, second = entered(gate, "reading"), entered(gate, "reading")
    assert first.inside.wait(SOON)
    assert second.inside.wait(SOON)
    writer = entered(gate, "writing")
    assert not writer.inside.wait(A_WHILE)
    first.end()
    assert not writer.inside.wait(A_WHILE)
    second.end()
    assert writer.inside.wait(SOON)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("side", ["reading", "writing"])
def test_nobody_enters_beside_a_writer(entered, side):
    gate = Gate()
    writer = entered(gate, "writing")
    assert writer.inside.wait(SOON)
    other = entered(gate, side)
    assert not other.inside.wait(A_WHILE)
    writer.end()
    assert other.inside.wait(SOON)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("side", ["reading", "writing"])
def test_an_error_inside_lets_the_next_writer_in(entered, side):
    gate = Gate()
    with pytest.raises(RuntimeError, match="inside"), getattr(gate, side)():
        raise RuntimeError("inside")
    assert entered(gate, "writing").inside.wait(SOON)


HANGS = """
import pytest
from cairn.storage.locks import Gate

@pytest.mark.timeout(1)
def test_writes_beside_a_reader_that_never_leaves():
    gate = Gate()
    reader = gate.reading()
    reader.__enter__()
    with gate.writing():
        pass
"""


def test_a_deadlock_fails(tmp_path):
    """The limit of pyproject.toml, which this test makes shorter, ends a run whose threads wait for one another."""
    file = tmp_path / "test_hangs.py"
    file.write_text(HANGS)
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", str(file)],
        capture_output=True, text=True, timeout=120, cwd=ROOT, check=False,
    )  # fmt: skip
    assert found.returncode == 1
    assert "+ Timeout +" in found.stdout
    assert "with gate.writing()" in found.stdout


def test_every_test_has_a_limit(pytestconfig):
    assert 0 < float(pytestconfig.getini("timeout")) <= 600
    assert pytestconfig.getini("timeout_method") == "thread"
