"""Tables from stored results."""

from __future__ import annotations

import json

import pytest
from scipy.stats import ttest_1samp

from cairn.errors import ResultError
from cairn.reports.console import Console, percent, sparkline
from cairn.reports.tables import comparable, difference_table, markdown_table, replaced_block, results_below


def result(method="dmc", seed=1, average=0.5, **changes):
    made = {
        "method": method,
        "seed": seed,
        "average": average,
        "last": average - 0.1,
        "forgetting": 0.05,
        "seconds": 12.4,
        "memory_bytes": 2000,
        "exemplar_free": method != "joint",
        "split": "s",
        "towers": {"fingerprint": "t"},
        "run": {"settings": [], "precision": "float32"},
    }
    return made | changes


def test_frequent_and_rare_classes_have_columns_where_their_numbers_differ():
    groups = {"head": 0.9, "medium": 0.6, "tail": 0.3}
    table = markdown_table([result("a", last_by_frequency=groups), result("b")])
    assert "| method | average % | last % | head % | medium % | tail % | forgetting |" in table
    assert "| 90.00 | 60.00 | 30.00 |" in next(line for line in table.splitlines() if line.startswith("| a "))
    assert "head" not in markdown_table([result("a"), result("b")])


def test_any_time_accuracy_has_a_column_in_online_streams_alone():
    table = markdown_table([result("a", any_time=0.4), result("b", any_time=0.25)])
    assert "| method | any-time % | average % |" in table
    assert "| 40.00 |" in next(line for line in table.splitlines() if line.startswith("| a "))
    assert "any-time" not in markdown_table([result("a", any_time=None), result("b")])


def test_seeds_become_mean_and_sample_deviation():
    table = markdown_table([result(seed=1, average=0.5), result(seed=2, average=0.6), result(seed=3, average=0.7)])
    row = table.splitlines()[2]
    assert row == "| dmc | 60.00 ± 10.00 | 50.00 ± 10.00 | 5.00 ± 0.00 | 2 | 12 ± 0 | 1, 2, 3 |"


def test_rows_rise_with_their_average_as_numbers_not_words():
    table = markdown_table([result("joint", average=0.95), result("a", average=0.093), result("b", average=0.6)])
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]] == [
        "a",
        "b",
        "joint (keeps exemplars)",
    ]


def test_changed_settings_are_rows_of_their_own_and_named():
    changed = result(run={"settings": ["covariance=shared"], "precision": "float32"})
    table = markdown_table([result(), changed])
    assert "| dmc (covariance=shared) |" in table
    assert len(table.splitlines()) == 4


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"towers": {"fingerprint": "other"}}, "towers"),
        ({"split": "other"}, "split or class order"),
        ({"run": {"settings": [], "precision": "bfloat16"}}, "precision"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, what):
    pair = [result(), result(**changes)]
    assert comparable(pair) == [what]
    with pytest.raises(ResultError, match=f"differ in {what}"):
        markdown_table(pair)


def test_a_difference_is_paired_by_seed_with_the_interval_of_student():
    gains = [0.010, 0.013, 0.022]
    second = [result("dmc", seed, average) for seed, average in zip((1, 2, 3), (0.5, 0.8, 0.3), strict=True)]
    first = [result("dmc-ot", r["seed"], r["average"] + gain) for r, gain in zip(second, gains, strict=True)]
    (row,) = difference_table([first[2], first[0], first[1], result("dmc-ot", 9)], second).splitlines()[2:]
    low, high = ttest_1samp([100 * gain for gain in gains], 0).confidence_interval(0.95)
    assert f"| dmc-ot - dmc | {1.5:+.2f} [{low:+.2f}, {high:+.2f}] |" in row
    assert row.endswith("| 1, 2, 3 |")


def test_over_several_class_orders_the_interval_is_over_the_orders():
    """Seeds of an order share its luck: as many observations as orders, each the mean over its seeds."""
    gains = {"a": [0.01, 0.03], "b": [0.05], "c": [0.02, 0.02]}
    runs = [
        (result("ranpac", seed, average), result("blend", seed, average + gain), order)
        for order, average in (("a", 0.5), ("b", 0.8), ("c", 0.3))
        for seed, gain in enumerate(gains[order], 1)
    ]
    second, first = ([pair[i] | {"class_order": [pair[2]]} for pair in runs] for i in (0, 1))
    (row,) = difference_table([*reversed(first), result("blend", 1)], second).splitlines()[2:]
    low, high = ttest_1samp([2.0, 5.0, 2.0], 0).confidence_interval(0.95)
    assert row.startswith(f"| blend - ranpac | {3.0:+.2f} [{low:+.2f}, {high:+.2f}] |")
    assert row.endswith("| 1, 2 | 3 |")


def test_a_difference_over_one_seed_or_two_streams_is_refused():
    with pytest.raises(ResultError, match="in both folders: 1 seed"):
        difference_table([result(), result(seed=2)], [result()])
    with pytest.raises(ResultError, match="differ in split"):
        difference_table([result()], [result(split="other")])


def test_a_missing_figure_is_a_dash():
    assert "| - |" in markdown_table([result(forgetting=None)])


def test_results_are_found_at_any_depth_and_damage_is_named(tmp_path):
    (tmp_path / "a" / "seed-1").mkdir(parents=True)
    (tmp_path / "a" / "seed-1" / "result.json").write_text(json.dumps(result()))
    assert len(results_below([tmp_path])) == 1
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ResultError, match="not JSON"):
        results_below([tmp_path])


def test_a_block_is_replaced_and_only_that():
    text = "a\n<!-- cairn table x -->\nold\n<!-- end -->\n<!-- cairn table y -->\nkeep\n<!-- end -->\n"
    assert replaced_block(text, "table x", "| new \\1 |") == text.replace("old", "| new \\1 |")
    with pytest.raises(ResultError, match="no block"):
        replaced_block(text, "table z", "")


def test_figures_for_people():
    assert percent(0.12345) == "12.35"
    assert percent(None) == "-"
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"


def test_without_a_terminal_progress_is_plain_lines_seldom(tmp_path):
    with open(tmp_path / "log", "w") as file:
        console = Console(file)
        state = {"epoch": 0, "epochs": 1, "steps": 9, "loss": 1.0, "rate": 5.0, "remaining": 2.0}
        with console.live():
            for step in range(5):
                console.progress(state | {"step": step})
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 1
    assert "step 0/9" in lines[0]
    assert "\x1b" not in lines[0]


def test_one_run_twice_is_no_second_seed():
    for results in ([result(), result()], [result(seed=1), result(seed=2), result(seed=2, average=0.6)]):
        with pytest.raises(ResultError, match="2 runs on the same stream, which would count as 2 seeds"):
            markdown_table(results)
    other = [result("lda", seed) for seed in (1, 2)]
    with pytest.raises(ResultError, match="'dmc' with seed 1: 2 runs"):
        difference_table([result(), result(), result(seed=2)], other)


def test_a_difference_is_of_one_method_and_another():
    """Of a folder with several methods the last of each seed would stand for all of them."""
    first, several = [result("dmc", seed) for seed in (1, 2)], [result(m, s) for m in ("lda", "blend") for s in (1, 2)]
    for pair in ((first, several), (several, first)):
        with pytest.raises(ResultError, match="results of 'lda' and 'blend' in one folder"):
            difference_table(*pair)


def test_seeds_that_move_nothing_are_one_difference():
    """The interval of copies has no width, and would tell apart what was compared once."""
    first, second = (
        [result(method, seed, average) for seed in (1, 2, 3)] for method, average in (("lda", 0.6), ("acil", 0.5))
    )
    with pytest.raises(ResultError, match="3 seeds move neither method, so there is one difference"):
        difference_table(first, second)
    assert "| lda - acil |" in difference_table([*first[:2], result("lda", 3, 0.61)], second)
