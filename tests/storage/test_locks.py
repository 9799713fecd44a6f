"""The readers-writer lock: many readers at once, or one writer alone."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cairn.storage.locks import ReadWriteLock

ROOT = Path(__file__).resolve().parents[2]

SOON = 10.0
"""Seconds within which something that is not blocked has happened."""

A_WHILE = 0.2
"""Seconds after which something that is blocked would have happened otherwise."""


class Other:
    """A thread that takes one side of the lock, says so, and keeps it until it is told to leave."""

    def __init__(self, lock: ReadWriteLock, side: str):
        self.inside, self.leave = threading.Event(), threading.Event()
        self._lock, self._side = lock, side
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with getattr(self._lock, self._side)():
            self.inside.set()
            self.leave.wait()

    def end(self) -> None:
        self.leave.set()
        self._thread.join(SOON)
        assert not self._thread.is_alive()


@pytest.fixture
def entered():
    """Starts threads on a lock of the test's own; all of them are let go at the end."""
    others: list[Other] = []

    def start(lock: ReadWriteLock, side: str) -> Other:
        others.append(Other(lock, side))
        return others[-1]

    yield start
    for other in others:
        other.leave.set()


@pytest.mark.timeout(60)
def test_readers_are_inside_together(entered):
    lock = ReadWriteLock()
    readers = [entered(lock, "reading") for _ in range(3)]
    assert all(reader.inside.wait(SOON) for reader in readers)


@pytest.mark.timeout(60)
def test_a_writer_waits_for_every_reader(entered):
    lock = ReadWriteLock()
    first, second = entered(lock, "reading"), entered(lock, "reading")
    assert first.inside.wait(SOON)
    assert second.inside.wait(SOON)
    writer = entered(lock, "writing")
    assert not writer.inside.wait(A_WHILE)
    first.end()
    assert not writer.inside.wait(A_WHILE)
    second.end()
    assert writer.inside.wait(SOON)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("side", ["reading", "writing"])
def test_nobody_enters_beside_a_writer(entered, side):
    lock = ReadWriteLock()
    writer = entered(lock, "writing")
    assert writer.inside.wait(SOON)
    other = entered(lock, side)
    assert not other.inside.wait(A_WHILE)
    writer.end()
    assert other.inside.wait(SOON)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("side", ["reading", "writing"])
def test_an_error_inside_lets_the_next_writer_in(entered, side):
    lock = ReadWriteLock()
    with pytest.raises(RuntimeError, match="inside"), getattr(lock, side)():
        raise RuntimeError("inside")
    assert entered(lock, "writing").inside.wait(SOON)


HANGS = """
import pytest
from cairn.storage.locks import ReadWriteLock

@pytest.mark.timeout(1)
def test_writes_beside_a_reader_that_never_leaves():
    lock = ReadWriteLock()
    reader = lock.reading()
    reader.__enter__()
    with lock.writing():
        pass
"""


def test_a_deadlock_fails(tmp_path):
    """The limit of pyproject.toml, which this test makes shorter, ends a run whose threads wait for one another."""
    file = tmp_path / "test_hangs.py"
    file.write_text(HANGS)
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", str(file)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )
    assert found.returncode == 1
    assert "+ Timeout +" in found.stdout
    assert "with lock.writing()" in found.stdout


def test_every_test_has_a_limit(pytestconfig):
    assert 0 < float(pytestconfig.getini("timeout")) <= 600
    assert pytestconfig.getini("timeout_method") == "thread"
