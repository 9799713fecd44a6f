"""Standard output that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")


def printed_to(file, *arguments, unbuffered=""):
    with open(file, "wb") as out:
        return subprocess.run(
            [sys.executable, "-m", "cairn", *arguments],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            timeout=100,
        )


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    ("call", "unbuffered"), [(["--help"], "1"), (["version"], ""), (["version"], "1"), (["explain", "lda"], "1")]
)
def test_a_full_disk_behind_it_is_one_line_and_status_2(call, unbuffered):
    """Whether it is found at once or, where little is printed, when the process ends; by `print`, rich and typer alike."""
    done = printed_to(FULL, *call, unbuffered=unbuffered)
    assert done.stderr == (
        "cairn: 'standard output': cannot be written: No space left on device; free some space or send it elsewhere\n"
    )
    assert done.returncode == 2


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_is_no_error_to_speak_of(unbuffered):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "cairn", "version"],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            timeout=100,
        )
    assert (done.returncode, done.stderr) == (1, "")
