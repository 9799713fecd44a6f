"""Methods over streams: ranks against scipy's and against published critical differences."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import friedmanchisquare

from cairn.errors import ResultError
from cairn.reports.ranking import (
    best_table,
    cliques,
    critical_difference,
    critical_difference_chart,
    few_images_charts,
    friedman_p,
    mean_ranks,
    ranking_page,
    ranking_table,
    rows_of_runs,
    standings,
)


@pytest.mark.parametrize(
    ("methods", "rows", "value"),
    # Demsar 2006: section 3.2.2's example (1.25), and the critical values of table 5(a): CD = q sqrt(k (k + 1) / 6 N)
    [
        (4, 14, 1.25),
        (2, 6, 1.960 * 1 / 6**0.5),
        (5, 30, 2.728 * (30 / 180) ** 0.5),
        (10, 20, 3.164 * (110 / 120) ** 0.5),
    ],
)
def test_critical_differences_are_the_published_ones(methods, rows, value):
    assert critical_difference(methods, rows) == pytest.approx(value, abs=5e-3)


def test_ranks_of_ties_and_friedmans_test():
    scores = [[0.9, 0.8, 0.8], [0.5, 0.6, 0.4], [0.7, 0.7, 0.7]]
    assert mean_ranks(scores) == pytest.approx([np.mean([1, 2, 2]), np.mean([2.5, 1, 2]), np.mean([2.5, 3, 2])])
    assert friedman_p(scores) == pytest.approx(friedmanchisquare(*zip(*scores, strict=True)).pvalue)
    assert friedman_p(scores[:1]) is None
    assert friedman_p([row[:2] for row in scores]) is None
    assert friedman_p([[0.5, 0.5, 0.5]] * 3) is None


def test_cliques_are_the_longest_stretches():
    ranks = [1.1, 2.9, 3.2, 3.8, 4.4, 5.6]
    found = cliques(ranks, 2.67)
    assert found == [(1.1, 3.2), (2.9, 4.4), (3.2, 5.6)]
    for low, high in found:
        assert high - low < 2.67
    assert cliques(ranks, 0.1) == []
    assert cliques(ranks, 9) == [(1.1, 5.6)]


def result(data, method, seed, last, **call):
    return {
        "schema_version": 1, "method": method, "data": data, "split": f"s-{data}-{call}", "towers": {"fingerprint": "t"},
        "class_order": ["a", "b"], "task_sizes": [1, 1], "seed": seed, "seen_accuracy": [0.99, last], "average": (0.99 + last) / 2,
        "last": last, "forgetting": 0.1, "seconds": 3.0, "memory_bytes": 2000, "train_sizes": [9, 9],
        "run": {"settings": call.pop("settings", {}), "order": "natural", **call},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Three methods on four streams, one bound, one method that is missing on some."""
    rng, number = np.random.default_rng(0), 0
    for data, call in (("d", {"limit_train": 1}), ("d", {"limit_train": 4}), ("d", {}), ("e", {"stream": "online"})):
        for method, mean in (("first", 0.9), ("second", 0.7), ("third", 0.4), ("joint", 0.95), ("some", 0.8)):
            for seed in (1, 2, 3):
                if method == "some" and data == "e":
                    continue
                place = tmp_path / str(number)
                place.mkdir()
                number += 1
                one = result(data, method, seed, mean + 0.01 * float(rng.normal()), **call)
                (place / "result.json").write_text(json.dumps(one))
    place = tmp_path / "variant"
    place.mkdir()
    (place / "result.json").write_text(json.dumps(result("d", "first", 1, 0.99, settings={"x": 1})))
    return tmp_path


def test_who_is_best_where(folder):
    found = standings([folder])
    assert (
        found.streams == ["d, 1 image per class", "e, online", "d, 4 images per class", "d"] or len(found.streams) == 4
    )
    assert found.ranked == ["first", "second", "third"] or set(found.ranked) == {"first", "second", "third"}
    table = best_table(found)
    assert [row[1] for row in table.rows] == ["first"] * 4
    by_stream = {row[0]: row for row in table.rows}
    assert by_stream["e, online"][3] == "second"
    assert by_stream["d"][3] == "some"
    assert by_stream["d"][5] == "yes"
    gain = by_stream["d"][4]
    assert gain.low < gain.mean < gain.high
    assert gain.mean == pytest.approx(10, abs=4)


def test_the_ranking_counts_those_that_are_everywhere(folder):
    table = ranking_table(standings([folder]))
    assert [row[0] for row in table.rows[:3]] == ["first", "second", "third"]
    assert [row[1].mean for row in table.rows[:3]] == [1, 2, 3]
    rest = {row[0]: row[1] for row in table.rows[3:]}
    assert rest == {"joint (bound)": None, "some": None}
    assert "joint" in standings([folder], bounds=()).ranked


def test_changed_settings_are_others(folder):
    assert "first (x=1)" not in standings([folder]).methods
    assert "first (x=1)" in standings([folder], variants=True).methods


def test_figures_side_by_side_are_of_the_same_class_orders(tmp_path):
    """`b` was run in an easy order that `a` was not run in, both in one that `c` was not. What one gains over another is over all
    that both have."""
    orders = {"usual": ["a", "b"], "easy": ["b", "a"], "hard": ["a", "c"]}
    said = {"a": {"usual": 0.7, "hard": 0.3}, "b": {"usual": 0.6, "easy": 0.9, "hard": 0.24}, "c": {"usual": 0.5}}
    for method, by_order in said.items():
        for order, last in by_order.items():
            for seed in (1, 2):
                place = tmp_path / f"{method}-{order}-{seed}"
                place.mkdir()
                one = result("d", method, seed, last + seed / 100) | {"class_order": orders[order]}
                place.joinpath("result.json").write_text(json.dumps(one))
    found = standings([tmp_path])
    assert [found.value("d", method).mean for method in "abc"] == pytest.approx([71.5, 61.5, 51.5])
    assert [row[0] for row in ranking_table(found).rows] == ["a", "b", "c"]
    (best,) = best_table(found).rows
    assert (best[1], best[3], best[6]) == ("a", "b", "2")
    assert best[4].mean == pytest.approx(8)  # of 10 and of 6
    (tmp_path / "c-usual-1" / "result.json").unlink()
    one = result("d", "c", 2, 0.5) | {"class_order": ["c", "a"]}
    (tmp_path / "c-usual-2" / "result.json").write_text(json.dumps(one))
    assert standings([tmp_path]).value("d", "b").mean == pytest.approx(58 + 1.5)  # of none in common, all


def test_descriptions_are_no_changed_setting(tmp_path):
    """Unless runs are there with others: then their labels tell them apart."""

    def stored(number, file, seed=1):
        place = tmp_path / str(number)
        place.mkdir()
        settings = {"descriptions": file} if file else {}
        place.joinpath("result.json").write_text(json.dumps(result("d", "spa", seed, 0.5, settings=settings)))

    stored(0, "birds.json", 1)
    stored(1, "birds.json", 2)
    found = standings([tmp_path])
    assert {method: len(runs) for method, runs in found.runs["d"].items()} == {"spa": 2}
    stored(2, "template")
    assert standings([tmp_path]).methods == ["spa"]
    assert standings([tmp_path], variants=True).methods == ["spa", "spa (descriptions=template)"]
    stored(3, "trees.json")
    assert standings([tmp_path]).methods == ["spa (descriptions=birds.json)", "spa (descriptions=trees.json)"]
    stored(4, None)
    assert standings([tmp_path]).methods[2:] == ["spa"]


def test_figures(folder, tmp_path):
    found = standings([folder])
    chart = critical_difference_chart(found)
    assert "critical difference 1.66" in chart.caption
    assert critical_difference(3, 4) == pytest.approx(1.66, abs=0.005)
    (few,) = few_images_charts(found)
    places = [column.title for column in few.table.columns[1:]]
    assert places == ["1", "4", "9"]
    for one in (chart, few):
        assert {path.suffix for path in one.write(tmp_path)} == {".png", ".svg"}
        assert one.svg() == one.svg()


def test_of_many_methods_the_foremost_are_drawn_and_all_are_in_the_table(tmp_path):
    """Method i of 12 is best where there are i images, and last elsewhere; all others keep their order."""
    methods = [f"method {i:02}" for i in range(12)]
    for n in (1, 2, 4):
        for seed in (1, 2):
            for i, name in enumerate([*methods, "zero-shot", "joint"]):
                accuracy = 0.9 if i == n else 0.01 * i
                run = result("d", name, seed, accuracy, limit_train=n)
                (tmp_path / f"{n}" / f"{i}" / f"{seed}").mkdir(parents=True)
                (tmp_path / f"{n}" / f"{i}" / f"{seed}" / "result.json").write_text(json.dumps(run))
    found = standings([tmp_path / str(n) for n in (1, 2, 4)])
    (few,) = few_images_charts(found)
    best = {*(f"method {n:02}" for n in (1, 2, 4)), "method 10", "method 11"}
    assert set(few.labels) == {*best, "zero-shot", "joint"}
    assert {row[0] for row in few.table.rows} == {*methods, "zero-shot", "joint"}
    assert "3 best at any number, of 14 methods" in few.caption
    assert "method 11" in few.svg()
    assert "method 05" not in few.svg()


def test_one_stream_has_no_ranks(folder):
    found = standings([folder / "0", folder / "3"])
    assert critical_difference_chart(found) is None
    assert few_images_charts(found) == []


def test_the_page_has_every_result_and_asks_for_nothing(folder):
    page = ranking_page(standings([folder]))
    rows = rows_of_runs(standings([folder]))
    assert len(rows) == 4 * 4 + 3
    body = re.search(r'<table id="runs">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)[1]
    assert body.count("<tr>") == len(rows)
    assert not re.search(r'(src|href)="http', page)
    order = [
        page.index(title)
        for title in ("Every result", "Who is best where", "Last accuracy by stream", "Mean ranks</h2>")
    ]
    assert all(a < b for a, b in pairwise(order))


def test_names_are_escaped(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(result("<script>x</script>", "m", 1, 0.5)))
    assert "<script>x" not in ranking_page(standings([tmp_path]))


def test_nothing_to_rank(tmp_path):
    with pytest.raises(ResultError):
        standings([tmp_path])
    (tmp_path / "result.json").write_text(json.dumps(result("d", "m", 1, 0.5, settings={"x": 1})))
    with pytest.raises(ResultError, match="--variants"):
        standings([tmp_path])


def test_the_command(cairn, folder):
    status, out, error = cairn("rank", folder, "-o", "r.html", "--figures", "f")
    assert (status, error) == (0, "")
    assert "| e, online | first |" in out
    status, _, error = cairn("rank", folder, "--metric", "best")
    assert status == 2
    assert error.count("\n") == 1


def stored(folder, *results):
    for number, one in enumerate(results):
        (folder / f"more-{number}").mkdir(parents=True)
        (folder / f"more-{number}" / "result.json").write_text(json.dumps(one))
    return folder


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"run": {"labelled": 0.125}}, ["d [labelled 1.0]", "d [labelled 0.125]"]),
        ({"run": {"validation": 0.2}}, ["d [validation None]", "d [validation 0.2]"]),
        ({"task_sizes": [2, 2]}, ["d [classes 2, step 1]", "d [classes 4, step 2]"]),
        ({"towers": {"name": "b", "fingerprint": "u"}}, ["d [towers ? t]", "d [towers b u]"]),
        ({"run": {"precision": "bfloat16"}}, ["d [precision float32]", "d [precision bfloat16]"]),
        ({"class_order": ["b", "a"]}, ["d"]),
    ],
)
def test_streams_that_do_not_compare_are_not_one(tmp_path, changes, names):
    """A method that was run on the easier of the two would be ahead of one that was run on the other."""
    one, other = result("d", "first", 1, 0.5), result("d", "second", 1, 0.9)
    other |= {**changes, "run": other["run"] | changes.get("run", {})}
    found = standings([stored(tmp_path, one, other)])
    assert found.streams == names


def test_a_stream_with_a_bound_alone_has_no_best(folder):
    found = standings([stored(folder / "other", result("f", "joint", 1, 0.9)), folder])
    assert "f" in found.streams
    assert "f" not in [row[0] for row in best_table(found).rows]


@pytest.mark.parametrize("seeds", [1, 3])
def test_what_was_compared_once_is_not_told_apart(tmp_path, seeds):
    runs = [result("d", method, seed, last) for method, last in (("a", 0.9), ("b", 0.5)) for seed in range(seeds)]
    (row,) = best_table(standings([stored(tmp_path, *runs)])).rows
    assert (row[1], row[3], row[4], row[5]) == ("a", "b", None, "-")
