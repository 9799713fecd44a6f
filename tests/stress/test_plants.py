"""The list of bugs to plant fits the code as it is; `plant.py` tries them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("plants", HERE / "plants.py")
_plants = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_plants)


@pytest.mark.parametrize("plant", _plants.PLANTS, ids=lambda plant: plant.name)
def test_what_is_to_be_changed_stands_there_once(plant):
    text = (HERE.parents[1] / "cairn" / plant.file).read_text(encoding="utf-8")
    assert text.count(plant.old) == 1
    assert plant.new != plant.old
    compile(text.replace(plant.old, plant.new), plant.file, "exec")
    assert all((HERE.parent / test).is_file() for test in plant.tests)


def test_there_are_enough_and_each_has_a_name():
    assert len(_plants.PLANTS) >= 40
    assert len({plant.name for plant in _plants.PLANTS}) == len(_plants.PLANTS)
