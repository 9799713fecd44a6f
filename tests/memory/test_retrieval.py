"""Nearest rows: against scikit-learn, in chunks, without the own row, among rows that share a text, and approximately."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from cairn.errors import ConfigError
from cairn.maths.similarity import unit
from cairn.memory import retrieval
from cairn.memory.retrieval import Approximate, Exact, nearest_others, text_neighbours


def clustered(seed, n, d=8, k=4):
    """Unit rows in clusters, correlated within each."""
    rng = np.random.default_rng(seed)
    centres = 2 * np.random.default_rng(7).normal(size=(k, d))
    noise = rng.normal(size=(n, d)) @ (rng.normal(size=(d, d)) * np.geomspace(1, 0.1, d))
    return unit(torch.tensor(centres[np.arange(n) % k] + noise, dtype=torch.float32))


def theirs(rows, queries, number):
    found = NearestNeighbors(n_neighbors=number, metric="cosine", algorithm="brute").fit(rows.double().numpy())
    distances, numbers = found.kneighbors(queries.double().numpy())
    return numbers, 1 - distances


@pytest.mark.parametrize("chunk", [retrieval.CHUNK_VALUES, 32 * 16, 16])
def test_exact_search_is_scikit_learn_s_whatever_the_chunks(chunk, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK_VALUES", chunk)
    rows, queries = clustered(0, 75), clustered(1, 13)
    found = Exact().index(rows).nearest(queries, 6)
    numbers, cosines = theirs(rows, queries, 6)
    assert found.numbers.tolist() == numbers.tolist()
    torch.testing.assert_close(found.cosines.double(), torch.from_numpy(cosines), rtol=0, atol=1e-6)


def test_more_than_there_are_takes_all_and_of_none_there_are_none():
    rows, queries = clustered(0, 5), clustered(1, 3)
    found = Exact().index(rows).nearest(queries, 9)
    assert found.numbers.sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert Exact().index(rows[:0]).nearest(queries, 9).numbers.shape == (3, 0)
    assert Exact().index(rows).nearest(queries[:0], 2).numbers.shape == (0, 2)


def test_without_the_own_row_it_is_a_search_of_the_others_duplicates_too():
    rows = clustered(0, 30)
    rows[7], rows[19] = rows[3], rows[3]  # three of a kind: each finds the two others
    found = nearest_others(Exact().index(rows), rows, torch.arange(30), 4)
    for i in range(30):
        others = [j for j in range(30) if j != i]
        numbers, cosines = theirs(rows[others], rows[i : i + 1], 4)
        assert i not in found.numbers[i].tolist()
        torch.testing.assert_close(found.cosines[i].double(), torch.from_numpy(cosines[0]), rtol=0, atol=1e-6)
        if i not in (3, 7, 19) and not {3, 7, 19} & {*found.numbers[i].tolist()}:
            assert found.numbers[i].tolist() == [others[j] for j in numbers[0]]
    assert {*found.numbers[3, :2].tolist()} == {7, 19}
    alone = nearest_others(Exact().index(rows[:1]), rows[:1], torch.arange(1), 4)
    assert alone.numbers.shape == (1, 0)


def test_where_all_are_found_and_the_own_row_is_among_them_the_others_are_left():
    rows = clustered(0, 4)
    found = nearest_others(Exact().index(rows), rows, torch.arange(4), 9)
    assert [sorted(row) for row in found.numbers.tolist()] == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


def test_rows_of_a_text_come_by_their_own_cosine_those_of_nearer_texts_first():
    U, rows = clustered(2, 5), clustered(0, 23)
    groups = torch.tensor([0] * 9 + [2] * 3 + [3] * 7 + [4] * 4)[
        torch.randperm(23, generator=torch.Generator().manual_seed(0))
    ]
    for number in (2, 6, 40):
        found = text_neighbours(U[:3], U, rows, groups, number)
        for c in range(3):
            keys = [(-float(U[c] @ U[g]), -float(U[c] @ row)) for g, row in zip(groups.tolist(), rows, strict=True)]
            naive = sorted(range(23), key=lambda j, keys=keys: keys[j])[:number]
            assert found.numbers[c].tolist() == naive
            likeness = torch.stack([U[c] @ U[groups[j]] for j in naive])
            torch.testing.assert_close(found.cosines[c], likeness)


def test_a_floor_says_which_count():
    rows, queries = clustered(0, 20), clustered(1, 5)
    found = Exact().index(rows).nearest(queries, 8)
    present = found.present(0.5)
    assert present.tolist() == (queries @ rows.T).topk(8, 1).values.ge(0.5).tolist()
    assert present.any()
    assert not present.all()
    assert found.present(-1.0).all()


def test_without_faiss_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(
        ConfigError, match=r"search=approximate: faiss is missing; pip install .*\[search\].*search=exact"
    ):
        Approximate().index(clustered(0, 5))


def test_approximate_search_of_all_lists_is_exact_and_of_one_nearly_so():
    pytest.importorskip("faiss", reason="pip install '.[search]'")
    rows, queries = clustered(0, 900), clustered(1, 40)
    exact = Exact().index(rows).nearest(queries, 5)
    whole = Approximate(lists=30, probes=30).index(rows).nearest(queries, 5)
    assert whole.numbers.tolist() == exact.numbers.tolist()
    torch.testing.assert_close(whole.cosines, exact.cosines, rtol=0, atol=1e-5)
    recalls = []
    for probes in (1, 8):
        found = Approximate(lists=30, probes=probes).index(rows).nearest(queries, 5)
        hits = [len({*a} & {*b}) for a, b in zip(found.numbers.tolist(), exact.numbers.tolist(), strict=True)]
        recalls.append(sum(hits) / 200)
    assert 0.3 < recalls[0] < recalls[1]
    assert recalls[1] > 0.95


def test_a_list_with_too_few_rows_gives_what_there_are():
    pytest.importorskip("faiss", reason="pip install '.[search]'")
    rows = clustered(0, 24)
    found = Approximate(lists=12, probes=1).index(rows).nearest(rows[:6], 20)
    assert found.numbers.shape == (6, 20)
    missing = found.cosines.isinf()
    assert missing.any()
    assert not found.present(-1.0)[missing].any()
    assert (found.numbers[missing] == 0).all()
    empty = Approximate().index(rows[:0]).nearest(rows[:6], 20)
    assert empty.numbers.shape == (6, 0)
