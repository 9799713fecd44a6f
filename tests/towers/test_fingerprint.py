"""Which fingerprints name the same towers, and that records of before tokenizers were covered still match."""

from __future__ import annotations

import pytest

from cairn.reports.tables import comparable
from cairn.towers.fingerprint import completed, full_fingerprint, same_towers, weights_part

W, V, T, U = "a" * 16, "b" * 16, "c" * 16, "d" * 16


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (f"{W}-{T}", f"{W}-{T}", True),
        (W, f"{W}-{T}", True),
        (W, W, True),
        (f"{W}-{T}", f"{W}-{U}", False),
        (f"{W}-{T}", f"{V}-{T}", False),
        (V, f"{W}-{T}", False),
        (T, f"{W}-{T}", False),
        ("my features-2", "my features", False),  # of a features file: any text
        ("my features-2", "my features-2", True),
    ],
)
def test_same_towers(first, second, same):
    assert same_towers(first, second) is same
    assert same_towers(second, first) is same


def test_the_parts_of_a_fingerprint():
    assert full_fingerprint(W, T) == f"{W}-{T}"
    assert weights_part(f"{W}-{T}") == weights_part(W) == W
    assert weights_part("my features-2") == "my features-2"


def test_an_old_record_is_counted_to_the_one_full_fingerprint_that_it_begins():
    assert completed([W, f"{W}-{T}", V]) == {W: f"{W}-{T}", f"{W}-{T}": f"{W}-{T}", V: V}
    assert completed([W, f"{W}-{T}", f"{W}-{U}"])[W] == W  # it may be either


@pytest.mark.parametrize(
    ("fingerprints", "differ"),
    [((W, f"{W}-{T}"), []), ((W, V), ["towers"]), ((f"{W}-{T}", f"{W}-{U}"), ["towers"])],
)
def test_tables_take_old_and_new_rows_of_the_same_towers(fingerprints, differ):
    run = {"split": "s", "run": {"precision": "float32"}}
    assert comparable([run | {"towers": {"fingerprint": one}} for one in fingerprints]) == differ
