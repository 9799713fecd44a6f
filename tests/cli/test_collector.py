"""The garbage collector is left out of imports and of the end of a command, and of nothing else."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from cairn.cli.collector import importing


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_inside_and_what_is_there_is_not_looked_at_again():
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        stays = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(stays)


def test_after_an_error_it_collects_again_unless_it_did_not_before():
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()


def test_files_are_written_and_objects_end_though_nothing_is_collected_at_the_end(tmp_path):
    code = (
        "import atexit, sys, weakref\n"
        "from cairn.cli.collector import end_without_collection\n"
        "class Held: pass\n"
        "held = Held()\n"
        "weakref.finalize(held, print, 'finalised')\n"
        "atexit.register(print, 'exit')\n"
        "end_without_collection()\n"
        "file = open(sys.argv[1], 'w')\n"
        "file.write('whole')\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")], check=True, capture_output=True, text=True
    )
    assert sorted(told.stdout.split()) == ["exit", "finalised"]
    assert (tmp_path / "file").read_text() == "whole"
