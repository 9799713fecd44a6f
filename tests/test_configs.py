"""Run files: those in `configs/`, what a file may hold, and other toolboxes' configs run as they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cairn.config import settings, with_settings
from cairn.contrib.pycil import LAION, OPENAI, curve_lines, read_config
from cairn.data.catalogue import CATALOGUE, SETTING_A_TEMPLATE
from cairn.errors import CairnError, ConfigError
from cairn.experiment.config_file import read_run_file, run_file_text
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.methods.catalogue import METHODS
from cairn.towers.catalogue import KNOWN

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))
SMALL = ("--data", "shapes", "--step", 20, "--limit-train", 2, "--limit-test", 1, "--device", "cpu")


# --- configs/ ---------------------------------------------------------------------------------------------------------


def test_every_published_setting_has_its_file():
    four = ("cifar100", "imagenet-r", "cub200", "ucf101")
    wanted = {f"{method}/{key}.toml" for method in ("dmc", "dmc-ot") for key in four} | {
        f"spa/{key}.toml" for key in CATALOGUE
    }
    published = {name for name, entry in METHODS.items() if "arXiv" in entry.card.citation}
    wanted |= {
        f"{name}/cifar100.toml" for name in published - {"zero-shot"}
    }  # which has no settings and learns nothing
    assert {str(path.relative_to(ROOT / "configs")) for path in CONFIGS} == wanted


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_config_is_a_run_that_exists(path):
    file = read_run_file(path)
    config = RunConfig(**file.options, settings=file.settings)
    entry, row = METHODS[config.method], CATALOGUE[config.data]
    assert (path.parent.name, path.stem) == (entry.name, row.key)
    assert (config.base, config.step) in row.protocols
    assert config.towers in KNOWN
    applied = with_settings(entry.config(), file.settings)
    changed = {path.removesuffix(".kind") for path in file.settings}
    assert changed <= {key for key, _, _ in settings(applied)}
    assert applied != entry.config() or not file.settings


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_config_is_headed_by_paper_score_command_and_status(path):
    text = path.read_text(encoding="utf-8")
    head = dict(re.findall(r"^# (\w+): +(.*)$", text, re.MULTILINE))
    entry = METHODS[path.parent.name]
    assert re.search(r"arXiv (\d{4}\.\d{5})$", head["Paper"])[1] in entry.card.source + entry.card.citation
    assert re.search(r"not published|\d", head["Expected"])
    assert head["Command"] == f"cairn run --config {path.relative_to(ROOT)}"
    assert head["Status"] == "not yet run on these weights"
    file = read_run_file(path)
    of_setting = {
        "A": ("openai/clip-vit-base-patch16", "natural", "crop", SETTING_A_TEMPLATE),
        "B": (LAION, "seed:1993", "squash", None),
    }
    assert (file.towers, file.order, file.preprocess, file.template) == of_setting[head["Setting"][0]]
    if len(CATALOGUE[file.data].classes) > 1:
        assert str(CATALOGUE[file.data].classes[1]) in head["Data"]


def test_a_config_runs_and_the_command_line_goes_before_it(cairn, tmp_path):
    status, _, err = cairn(
        "run",
        "--config",
        ROOT / "configs" / "dmc" / "cub200.toml",
        *SMALL,
        "--towers",
        "tiny",
        "--seed",
        4,
        "--set",
        "stage1.schedule.epochs=1",
        "--set",
        "stage2.schedule.epochs=1",
        "--out",
        "here",
    )
    assert (status, err) == (0, "")
    stored = json.loads((tmp_path / "here" / "result.json").read_text())
    assert stored["run"]["data"] == "shapes"
    assert (stored["seed"], stored["step"]) == (4, 20)
    assert stored["run"]["template"] == SETTING_A_TEMPLATE
    assert stored["config"]["stage1"]["schedule"]["epochs"] == 1
    assert stored["config"]["stage2"]["text"] | {"shared": 16, "per_class": 0} == stored["config"]["stage2"]["text"]


# --- what a file may hold ---------------------------------------------------------------------------------------------


def test_a_file_says_what_options_say(cairn, features, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'method = "dmc"\ndata = {json.dumps(features)}\nstep = 3\nseeds = [2, 5]\nout = "there"\n'
        "[settings]\nstage1.schedule = {epochs = 1, lr = 1e-3}\nstage2.real_share = 'null'\n"
    )
    assert cairn("run", "--config", "run.toml")[0] == 0
    options = (
        "--set",
        "stage1.schedule.epochs=1",
        "--set",
        "stage1.schedule.lr=1e-3",
        "--set",
        "stage2.real_share=null",
    )
    assert cairn("run", "dmc", "--data", features, "--step", 3, "--seeds", "2,5", "--out", "o", *options)[0] == 0
    first, second = (json.loads((tmp_path / out / "seed-5" / "result.json").read_text()) for out in ("there", "o"))
    assert first["config"] == second["config"]
    assert first["accuracy"] == second["accuracy"]
    assert json.loads((tmp_path / "there" / "summary.json").read_text())["seeds"] == [2, 5]


def test_seeds_given_on_the_command_line_go_before_those_of_the_file(cairn, features, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'method = "zero-shot"\ndata = {json.dumps(features)}\nseeds = [2, 5]\nstep = 3\n'
    )
    assert cairn("run", "--config", "run.toml", "--seeds", "7,8", "--out", "a")[0] == 0
    assert (tmp_path / "a" / "seed-8" / "result.json").is_file()
    assert cairn("run", "--config", "run.toml", "--seed", "9", "--out", "b")[0] == 0
    assert json.loads((tmp_path / "b" / "result.json").read_text())["seed"] == 9
    assert cairn("run", "simplecil", "--config", "run.toml", "--out", "c")[0] == 0
    assert json.loads((tmp_path / "c" / "seed-2" / "result.json").read_text())["method"] == "simplecil"


def test_a_choice_is_named_before_what_is_set_of_it(tmp_path):
    (tmp_path / "run.toml").write_text('[settings]\ndrift.lam = 0.5\ndrift.kind = "paired"\n')
    config = with_settings(METHODS["dmc-ot"].config(), read_run_file(tmp_path / "run.toml").settings)
    assert (config.drift.kind, config.drift.lam) == ("paired", 0.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stepp = 3", "unknown key of run file"),
        ("seed = 3\nseeds = [1, 2]", "seed 3, and seeds that begin with 1; leave seed or seeds out"),
        ("notices = ['a']", "unknown key of run file"),
        ("step = 'x'", "step = 'x': must be a whole number"),
        ("seeds = []", "seeds = []"),
        ("seeds = [1, 1]", "seeds = [1, 1]: must differ"),
        ("settings = 3", "settings = 3"),
        ("step = ", "not TOML"),
        ("step = 3\nstep = 4", "not TOML"),
        ("[settings]\na" + ".a" * 1000 + " = 1", "run file 'run.toml'"),
        ("[settings]\na" + ".a" * 30_000 + " = 1", "a line of 60005 letters where at most 2048 are expected"),
        ("a = " + "[" * 2000, "not TOML"),
        ("# " + "letters\n" * 10_000, "80002 bytes where at most 65536 are expected"),
        ("precision = 'float7'", "precision = 'float7'"),
        ("method = 'dcm'", "unknown method 'dcm': did you mean dmc"),
        ("step = 3", "no method given"),
        ("method = 'dmc'\n[settings]\nstage9.x = 1", "unknown setting 'stage9.x'"),
        ("method = 'dmc'\ntemplate = 'a photo'", "template: 'a photo' must hold {} once"),
    ],
)
def test_a_bad_file_is_one_line(cairn, tmp_path, text, says):
    (tmp_path / "run.toml").write_text(text)
    status, _, err = cairn("run", "--config", "run.toml")
    assert status == 2
    assert says in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml"]


def test_a_file_that_is_not_there(cairn):
    status, _, err = cairn("run", "--config", "nowhere.toml")
    assert status == 2
    assert "'nowhere.toml': cannot be read" in err


def test_a_template_is_for_images_alone(features):
    with pytest.raises(ConfigError, match="leave --template out"):
        run_stream(RunConfig(method="zero-shot", data=features, step=3, template="a {}."))


# --- configs of PyCIL, PILOT and C3Box --------------------------------------------------------------------------------

THEIRS = {
    "prefix": "reproduce", "dataset": "cifar224", "memory_size": 0, "memory_per_class": 0, "fixed_memory": False,
    "shuffle": True, "init_cls": 10, "increment": 10, "model_name": "simplecil", "backbone_type": "clip",
    "device": ["0"], "seed": [1993],
}  # fmt: skip


def theirs(folder, **changes):
    (folder / "theirs.json").write_text(json.dumps(THEIRS | changes))
    return read_config(folder / "theirs.json")


def test_a_config_of_theirs_is_a_call_of_ours(tmp_path):
    file = theirs(tmp_path)
    assert file.options == {
        "method": "simplecil",
        "data": "cifar100",
        "base": 0,
        "step": 10,
        "order": "seed:1993",
        "seed": 1993,
        "towers": LAION,
        "device": "auto",
        "preprocess": "squash",
    }
    assert file.settings == {}
    assert file.notices == ("theirs.json: not used: prefix",)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_name": "ZS_CLIP"}, {"method": "zero-shot"}),
        ({"model_name": "SimpleCIL"}, {"method": "simplecil"}),
        ({"model_name": "DMC_OT"}, {"method": "dmc-ot"}),
        ({"dataset": "imagenetr", "init_cls": 20, "increment": 20}, {"data": "imagenet-r", "base": 0, "step": 20}),
        ({"dataset": "ImageNet-R"}, {"data": "imagenet-r"}),
        ({"dataset": "cub"}, {"data": "cub200"}),
        ({"dataset": "sun"}, {"data": "sun397"}),
        ({"dataset": "./my-pictures"}, {"data": "./my-pictures"}),
        ({"init_cls": 50}, {"base": 50, "step": 10}),
        ({"shuffle": False}, {"order": "natural", "seed": 1993}),
        ({"seed": 7}, {"order": "seed:7", "seed": 7}),
        ({"seed": [5, 6]}, {"order": "seed:5", "seeds": (5, 6)}),
        ({"backbone_type": "OpenAI"}, {"towers": OPENAI}),
        ({"backbone_type": "ViT-B/16"}, {"towers": OPENAI}),
        ({"backbone_type": "ViT-B-16"}, {"towers": LAION}),
        ({"backbone_type": "LAION-400M"}, {"towers": LAION}),
        ({"backbone_type": "pretrained_vit_b16_224"}, {"towers": LAION}),
        ({"device": [-1]}, {"device": "cpu"}),
        ({"device": ["2", "3"]}, {"device": "cuda:2"}),
    ],
)
def test_their_names_are_understood(tmp_path, changes, expected):
    file = theirs(tmp_path, **changes)
    assert {key: getattr(file, key) for key in expected} == expected


@pytest.mark.parametrize(("suffix", "base", "step"), [("_b0_inc10", 0, 10), ("_b50_inc5", 50, 5), ("_inc20", 0, 20)])
def test_a_data_set_may_carry_its_protocol(tmp_path, suffix, base, step):
    config = {"model_name": "zs_clip", "dataset": f"cifar224{suffix}", "seed": [1993]}
    (tmp_path / "short.json").write_text(json.dumps(config))
    file = read_config(tmp_path / "short.json")
    assert (file.data, file.base, file.step) == ("cifar100", base, step)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"memory_size": 2000}, "memory_size 2000 is not used: simplecil keeps means"),
        ({"model_name": "joint", "memory_per_class": 20}, "memory_per_class 20 is not used: joint keeps images"),
        ({"convnet_type": "resnet32", "backbone_type": "resnet32"}, "'resnet32' is no CLIP"),
        ({"dataset": "cars"}, "Stanford Cars has 196 classes, their config uses 100 of them"),
        ({"seed": [1, 2]}, "a class order for each seed"),
        ({"device": ["0", "1"]}, "one device is used, the first of 0, 1"),
        ({"tuned_epoch": 20, "vpt_type": "deep"}, "not used: prefix, tuned_epoch, vpt_type"),
        ({"model_name": "dmc", "epochs": 20}, "not used: prefix, epochs"),
    ],
)
def test_what_has_no_counterpart_is_told(tmp_path, changes, says):
    assert any(says in notice for notice in theirs(tmp_path, **changes).notices)


def test_a_single_schedule_takes_theirs(tmp_path):
    training = {
        "init_epoch": 20,
        "epochs": 15,
        "init_lr": 0.01,
        "lrate": 0.002,
        "batch_size": 48,
        "weight_decay": 0.0005,
        "optimizer": "SGD",
        "scheduler": "constant",
        "milestones": [40, 70],
    }
    file = theirs(tmp_path, model_name="finetune", **training)
    schedule = with_settings(METHODS["finetune"].config(), file.settings).stage1.schedule
    assert (schedule.epochs, schedule.lr, schedule.batch, schedule.weight_decay) == (15, 0.002, 48, 0.0005)
    assert (schedule.optimizer, schedule.cosine) == ("sgd", False)
    assert file.notices == ("theirs.json: not used: prefix, init_epoch, init_lr, milestones",)


def test_a_config_of_theirs_runs_with_their_lines(cairn, tmp_path):
    theirs(tmp_path, increment=20, init_cls=20)
    call = ("run", "--config", "theirs.json", *SMALL, "--towers", "tiny", "--out", "here", "--log-lines")
    status, out, err = cairn(*call)
    assert (status, err) == (0, "")
    assert "note: theirs.json: not used: prefix" in out
    stored = json.loads((tmp_path / "here" / "result.json").read_text())
    seen = [round(100 * value, 2) for value in stored["seen_accuracy"]]
    assert f"CNN top1 curve: {seen[:1]}\nAverage Accuracy (CNN): {seen[0]}\n" in out
    assert f"CNN top1 curve: {seen}\nAverage Accuracy (CNN): {round(100 * stored['average'], 2)}\n" in out
    events = [json.loads(line) for line in (tmp_path / "here" / "events.jsonl").read_text().splitlines()]
    assert events[0] == {"event": "notice", "text": "theirs.json: not used: prefix"}


def test_their_lines_are_percent():
    assert curve_lines([0.961, 2 / 3]) == ("CNN top1 curve: [96.1, 66.67]", "Average Accuracy (CNN): 81.38")


def test_an_imported_config_is_the_same_run(cairn, tmp_path):
    file = theirs(tmp_path, model_name="finetune", epochs=3, lrate=1e-5, optimizer="adam", seed=[4, 5], dataset="cars")
    assert cairn("import", "theirs.json", "-o", "ours.toml") == (0, "", "")
    again = read_run_file(tmp_path / "ours.toml")
    assert again == file.model_copy(update={"notices": ()})
    text = (tmp_path / "ours.toml").read_text()
    assert "# theirs.json: not used: prefix\n" in text
    assert "stage1.schedule.epochs = 3\n" in text
    assert cairn("import", "theirs.json")[1] == text == run_file_text(file, "from theirs.json")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({**THEIRS, "model_name": "coda"}, "model_name 'coda' is not here; methods: acil, aper"),
        ({**THEIRS, "dataset": "tv100"}, "unknown dataset 'tv100'"),
        ({**THEIRS, "increment": "ten"}, "step = 'ten'"),
        ({**THEIRS, "seed": [[1]]}, "seed = [1]"),
        ({**THEIRS, "model_name": 3}, "JSON with a model_name; this is neither"),
        ([1], "JSON with a model_name; this is neither"),
        ({"model_name": "a\nb"}, r"model_name 'a\nb' is not here"),
    ],
)
def test_a_bad_config_of_theirs_is_one_line(cairn, tmp_path, content, says):
    (tmp_path / "theirs.json").write_text(json.dumps(content))
    status, _, err = cairn("run", "--config", "theirs.json")
    assert status == 2
    assert says in err
    assert err.count("\n") == 1


def test_a_method_of_ours_takes_the_protocol_of_one_that_is_not_here(cairn, tmp_path):
    theirs(tmp_path, model_name="coda")
    status, _, err = cairn("run", "zero-shot", "--config", "theirs.json", *SMALL, "--towers", "tiny", "--out", "here")
    assert (status, err) == (0, "")
    assert json.loads((tmp_path / "here" / "result.json").read_text())["run"]["order"] == "seed:1993"
    with pytest.raises(CairnError, match="coda"):
        raise CairnError(cairn("import", "theirs.json")[2])
