"""`cairn reproduce`: on a features file, whose figures are made here first."""

import json

import pytest

METHODS = "zero-shot,simplecil,lda"


@pytest.fixture
def features(features_file, blurred_dataset):
    """Test images that are often told wrong: where all are right, no order is wrong."""
    return features_file(test_features=blurred_dataset.test.values)


@pytest.fixture
def figures(cairn, features, tmp_path):
    """A file of figures that runs of this version reach; with changes."""
    rows = []
    for method in METHODS.split(","):
        status, _, error = cairn(
            "run", method, "--data", features, "--step", "2", "--order", "seed:1993", "--out", f"f/{method}"
        )
        assert status == 0, error
        result = json.loads((tmp_path / "f" / method / "result.json").read_text())
        rows.append([tmp_path.joinpath(features).stem, 0, 2, method, 100 * result["average"], 100 * result["last"]])

    def written(order="seed:1993", add=0.0, test=None):
        shown = [
            [*row[:4], row[4] + add * (row[3] == "zero-shot"), row[5] + add * (row[3] == "zero-shot")] for row in rows
        ]
        text = f'[settings.own]\ntitle = "own"\ntowers = ["features"]\norder = "{order}"\n'
        text += f'[[source]]\nname = "me"\ncite = "here"\nsetting = "own"\nfigures = {json.dumps(shown)}\n'
        if test:
            text += f'[[data]]\nkey = "{rows[0][0]}"\nclasses = 6\ntest = {test}\n'
        (tmp_path / "figures.toml").write_text(text)
        return tmp_path / "figures.toml"

    return written


def call(cairn, features, file, *more, seeds="1,2"):
    words = ("--towers", "features", "--figures", file, "--methods", METHODS, "--seeds", seeds, "--out", "o")
    return cairn("reproduce", features, *words, *more)


def test_figures_are_reached_and_shown(cairn, features, figures, tmp_path):
    status, _, error = call(cairn, features, figures())
    assert (status, error) == (0, "")
    report = json.loads((tmp_path / "o" / "reproduction.json").read_text())
    assert report["findings"] == []
    assert [row["method"] for row in report["rows"]] == METHODS.split(",")
    assert [row["seeds"] for row in report["rows"]] == [[1, 2]] * 3
    table = (tmp_path / "o" / "reproduction.md").read_text()
    assert table.count("| yes |") == 6
    page = (tmp_path / "o" / "reproduction.html").read_text()
    assert "me, here" in page
    assert "seed:1993" in page
    before = (tmp_path / "o" / "lda" / "seed-1" / "result.json").read_bytes()
    assert call(cairn, features, figures())[0] == 0  # goes on: nothing is run again
    assert (tmp_path / "o" / "lda" / "seed-1" / "result.json").read_bytes() == before


def test_a_wrong_order_is_told_at_once(cairn, features, figures, tmp_path):
    status, _, error = call(cairn, features, figures(order="natural"))
    assert status == 2
    assert error.count("\n") == 1
    assert "zero-shot is not as published" in error
    report = json.loads((tmp_path / "o" / "reproduction.json").read_text())
    assert "class order: --order seed:1993" in report["findings"][0]
    assert not (tmp_path / "o" / "simplecil").exists()
    status, _, error = call(cairn, features, figures(order="natural"), "--anyway")
    assert (status, error) == (0, "")
    assert (tmp_path / "o" / "lda" / "seed-2" / "result.json").exists()


def test_other_weights_and_another_split(cairn, features, figures, tmp_path):
    status, _, _ = call(cairn, features, figures(add=-20.0, test=99))
    assert status == 2
    first, second = json.loads((tmp_path / "o" / "reproduction.json").read_text())["findings"]
    assert "published 99" in first
    assert "other weights or other test images" in second


def test_a_plan_runs_nothing(cairn, features, figures, tmp_path):
    status, out, _ = call(cairn, features, figures(), "--plan", "--price", "2")
    assert status == 0
    assert "simplecil" in out
    assert not (tmp_path / "o").exists()


def test_shards_make_it_whole(cairn, features, figures, tmp_path):
    file = figures()
    for part in ("1/2", "2/2"):
        assert call(cairn, features, file, "--shard", part, seeds="1,2,3")[0] == 0
    rows = json.loads((tmp_path / "o" / "reproduction.json").read_text())["rows"]
    assert [row["seeds"] for row in rows] == [[1, 2, 3]] * 3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--shard", "3/2"), "3/2"),
        (("--seeds", "1,1"), "1,1"),
        (("--set", "dmc.x=1"), "dmc.x"),
        (("--base", "4"), "--base 4"),
        (("--setting", "B"), "'B'"),
    ],
)
def test_bad_calls_are_one_line(cairn, features, figures, more, said, tmp_path):
    status, _, error = call(cairn, features, figures(), *more)
    assert status == 2
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "o").exists()
