"""Published figures: the file of the field, and files of one's own."""

import re
import tomllib
from pathlib import Path

import pytest

from cairn.data.catalogue import CATALOGUE
from cairn.errors import CairnError
from cairn.experiment.config_file import read_run_file
from cairn.methods.catalogue import METHODS
from cairn.reproduce.figures import published
from cairn.reproduce.plan import reproduction

ROOT = Path(__file__).resolve().parents[2]


def test_every_figure_of_the_field_is_of_something_that_is_here():
    field = published()
    for source in field.source:
        assert source.cite
        for key, base, step, method, average, last in source.figures:
            assert key in CATALOGUE, key
            assert (base, step) in CATALOGUE[key].protocols, (key, base, step)
            assert method in METHODS
            assert average != "?" or last != "?"
            if "?" not in (average, last):
                assert average >= last  # fewer classes are easier
        rows = [row[:4] for row in source.figures]
        assert len(set(rows)) == len(rows)
    for copy in field.data:
        assert copy.classes in CATALOGUE[copy.key].classes


@pytest.mark.parametrize("name", ["A", "B"])
def test_settings_are_those_of_the_run_files(name):
    setting = published().settings[name]
    head = {"A": "rapf", "B": "simplecil"}[name]
    file = read_run_file(ROOT / "configs" / head / "cifar100.toml")
    assert file.towers in setting.towers
    assert file.order == setting.order
    assert file.preprocess == setting.preprocess
    assert file.template == setting.template


@pytest.mark.parametrize(
    "method", sorted({row[3] for source in published().source for row in source.figures} - {"zero-shot"})
)
def test_methods_are_run_as_their_run_files_say(method):
    file = read_run_file(ROOT / "configs" / method / "cifar100.toml")
    needs = published().approach(method).needs
    assert published().approach(method).settings == {k: v for k, v in file.settings.items() if k != needs}


def test_expected_figures_of_the_run_files_are_those(request):
    """The heads of the run files and the file of figures cannot say two things."""
    for method in ("simplecil", "ranpac", "rapf", "proof", "engine", "spa"):
        text = (ROOT / "configs" / method / "cifar100.toml").read_text(encoding="utf-8")
        numbers = [float(n) for n in re.findall(r"\d+\.\d+", re.search(r"# Expected: (.*)", text)[1])]
        found = [
            figure
            for name in ("A", "B")
            for figure in published().figures(name, "cifar100")
            if figure.method == method and figure.step == 10 and figure.base == 0
        ]
        assert any([100 * v for v in (f.average, f.last) if v is not None] == pytest.approx(numbers) for f in found), (
            method
        )


def test_the_setting_is_that_of_the_towers():
    assert reproduction("cifar100", "openai/clip-vit-base-patch16", published()).setting_name == "A"
    asked = reproduction(
        "cifar100", "open_clip:timm/vit_base_patch16_clip_224.laion400m_e32", published(), base=50, step=10
    )
    assert asked.setting_name == "B"
    runs = asked.runs()
    assert [run.method for run in runs[::3]] == ["zero-shot", "simplecil", "ranpac", "blend", "proof"]
    assert runs[0].config.order == "seed:1993"
    assert (runs[0].config.base, runs[0].config.step, runs[0].config.preprocess) == (50, 10, "squash")
    assert runs[-1].config.settings == {"schedule.epochs": 5}
    assert len({run.place for run in runs}) == len(runs) == 15


def test_data_sets_of_which_benchmarks_keep_a_part_are_cut(tmp_path):
    laion = "open_clip:timm/vit_base_patch16_clip_224.laion400m_e32"
    assert reproduction("cars", laion, published()).data == "cars:published"
    assert reproduction(f"food101={tmp_path}", laion, published()).data == f"food101:published={tmp_path}"
    assert reproduction("cars", laion, published()).key == "cars"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"towers": "other/weights"}, "other/weights"),
        ({"towers": "other/weights", "setting": "C"}, "'C'"),
        ({"data": "shapes"}, "shapes"),
        ({"base": 20}, "--base 20"),
        ({"methods": ["simplecill"]}, "simplecill"),
        ({"settings": {"dmc.epochs": 1}}, "dmc.epochs"),
    ],
)
def test_what_has_no_figures_is_refused(call, said):
    values = {"data": "cifar100", "towers": "openai/clip-vit-base-patch16"} | call
    with pytest.raises(CairnError, match=re.escape(said)) as caught:
        reproduction(values.pop("data"), values.pop("towers"), published(), **values)
    assert "\n" not in str(caught.value)


GOOD = """
[settings.own]
title = "own"
towers = ["x"]
order = "natural"

[[source]]
name = "me"
cite = "here"
setting = "own"
figures = [["d", 0, 5, "lda", 90, "?"]]
"""


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "f.toml").write_text(GOOD)
    (figure,) = published(tmp_path / "f.toml").figures("own", "d")
    assert (figure.average, figure.last, figure.source.name) == (0.9, None, "me")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('setting = "own"', 'setting = "other"', "other"),
        ("90", "190", "100"),
        ("90", '"ninety"', "ninety"),
        ('order = "natural"', "", "order"),
        ('cite = "here"', 'cite = "here"\nsite = 1', "site"),
        ("[[source]]", "[[source", "TOML"),
    ],
)
def test_files_that_do_not_fit(tmp_path, old, new, said):
    assert old in GOOD
    (tmp_path / "f.toml").write_text(GOOD.replace(old, new))
    with pytest.raises(CairnError, match=said) as caught:
        published(tmp_path / "f.toml")
    assert "\n" not in str(caught.value)


def test_the_file_of_the_field_is_plain_toml():
    text = (ROOT / "cairn" / "reproduce" / "published.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text)["settings"].keys() == {"A", "B"}
