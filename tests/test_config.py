"""Settings by `--set`: applied, refused, listed."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from cairn import IncrementalClassifier
from cairn.config import merged, parsed, settings, texts, with_settings, with_values
from cairn.contrib.pycil import read_config
from cairn.embed.plan import EmbedConfig
from cairn.errors import ConfigError, ResultError, UnknownName
from cairn.experiment.config_file import RunFile, read_run_file, run_file_text
from cairn.experiment.schema import RunConfig
from cairn.methods.catalogue import METHODS
from cairn.methods.dmc import DmcConfig
from cairn.storage.schema import validated
from cairn.towers.tuning import Full, Lora


def test_numbers_words_and_choices():
    config = with_settings(
        DmcConfig(),
        [
            "stage1.schedule.epochs=4",
            "stage1.schedule.lr=5e-4",
            "stage1.tuning.rank=16",
            "covariance=low_rank",
            "covariance.rank=8",
            "stage2.text=prompts",
            "stage2.text.per_class=4",
            "stage2.real_share=null",
            "stage2.text.init=a photo of a",
        ],
    )
    assert config.stage1.schedule.epochs == 4
    assert config.stage1.schedule.lr == 5e-4
    assert config.stage1.schedule.batch == DmcConfig().stage1.schedule.batch
    assert config.stage1.tuning == Lora(rank=16)
    assert (config.covariance.kind, config.covariance.rank) == ("low_rank", 8)
    assert config.stage2.text.per_class == 4
    assert config.stage2.text.init == "a photo of a"
    assert config.stage2.real_share is None


def test_a_choice_by_name_then_its_own_settings():
    config = with_settings(DmcConfig(), ["stage1.tuning=full", "stage1.tuning.lr=1e-5"])
    assert config.stage1.tuning == Full(lr=1e-5)
    assert with_settings(DmcConfig(), ["stage1.tuning=none"]).stage1.tuning.kind == "none"


@pytest.mark.parametrize(
    ("assignment", "error", "says"),
    [
        ("stage1.epoch=3", UnknownName, r"unknown setting 'stage1.epoch': did you mean .*stage1\."),
        ("stage3.x=1", UnknownName, "unknown setting 'stage3.x'"),
        ("template_weight.x=1", UnknownName, "template_weight.x"),
        ("stage1.tuning=lorra", UnknownName, r"unknown stage1.tuning 'lorra': did you mean lora"),
        ("stage1.schedule.epochs=-1", ConfigError, r"stage1.schedule.epochs=-1: .*greater than or equal to 0"),
        ("stage1.schedule.epochs=many", ConfigError, r"stage1.schedule.epochs=many: must be a whole number"),
        ("stage1.schedule.lr=0", ConfigError, "greater than 0"),
        ("template_weight=1.5", ConfigError, "less than or equal to 1"),
        ("epochs", ConfigError, "must be key=value"),
    ],
)
def test_what_does_not_fit_names_the_setting_and_the_remedy(assignment, error, says):
    with pytest.raises(error, match=says):
        with_settings(DmcConfig(), [assignment])


@pytest.mark.parametrize("name", METHODS)
def test_every_listed_setting_can_be_set_to_its_own_default(name):
    for config in (METHODS[name].config(), METHODS[name].config.embedding()):
        for path, value, _ in settings(config):
            text = "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
            assert with_settings(config, [f"{path}={text}"]) == config, path


def test_every_setting_of_dmc_says_what_it_is():
    silent = [path for path, _, text in settings(DmcConfig()) if not text]
    assert set(silent) <= {path for path, _, _ in settings(DmcConfig()) if path.endswith("weight_decay")}


@pytest.mark.parametrize("method", METHODS)
def test_every_value_of_python_is_taken_as_it_is(method):
    config = METHODS[method].config()
    for path, value, _ in settings(config):
        assert with_values(config, [(path, value)]) == config, path


# --- the doors --------------------------------------------------------------------------------------------------------

VALUES = {
    "stage1.schedule.epochs": 3, "stage1.schedule.lr": 1e-3, "stage1.schedule.cosine": False, "stage1.tuning": "lora",
    "stage1.tuning.targets": "12", "stage2.text": "prompts", "stage2.text.init": "null and 1e-3", "stage2.real_share": None,
}  # fmt: skip
"""A text that looks like a number, and one that holds words of other languages, stay texts."""


def changed():
    """DMC's settings with these values, put in by hand."""
    return with_values(DmcConfig(), VALUES.items())


def test_values_of_toml_are_values(tmp_path):
    (tmp_path / "run.toml").write_text(
        "method = 'dmc'\n[settings.stage1]\ntuning.targets = '12'\ntuning.kind = 'lora'\n"
        "schedule = {epochs = 3, lr = 1e-3, cosine = false}\n"
        "[settings.stage2]\ntext.init = 'null and 1e-3'\ntext.kind = 'prompts'\nreal_share = 'null'\n"
    )
    file = read_run_file(tmp_path / "run.toml")
    assert with_settings(DmcConfig(), file.settings) == changed()
    (tmp_path / "again.toml").write_text(run_file_text(file, "again"))
    assert read_run_file(tmp_path / "again.toml").settings == file.settings


def test_values_of_python_and_json_are_values():
    run = RunConfig(method="dmc", settings=VALUES)
    assert with_settings(DmcConfig(), run.settings) == changed()
    stored = json.loads(json.dumps(run.model_dump(mode="json")))
    assert validated(RunConfig, stored, "here") == run
    assert stored["settings"] == VALUES
    learner = IncrementalClassifier("dmc", "tiny", settings=VALUES)
    assert learner._settings() == changed()


def test_values_of_another_toolboxs_json_are_values(tmp_path):
    (tmp_path / "theirs.json").write_text(
        '{"model_name": "finetune", "epochs": 3, "lrate": 0.001, "scheduler": "constant"}'
    )
    expected = {"stage1.schedule.epochs": 3, "stage1.schedule.lr": 0.001, "stage1.schedule.cosine": False}
    assert read_config(tmp_path / "theirs.json").settings == expected


def test_texts_of_the_command_line_are_parsed():
    given = ["a=1", "b=1e-3", "c=false", "d=null", "e=[1, 2]", "f=a photo", "g=2020-01-01", "h=", "i={x"]
    expected = {
        "a": 1,
        "b": 1e-3,
        "c": False,
        "d": None,
        "e": [1, 2],
        "f": "a photo",
        "g": "2020-01-01",
        "h": "",
        "i": "{x",
    }
    found = merged({}, parsed(given))
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]
    assert merged({}, parsed(texts(found))) == found


def test_texts_of_older_results_are_values():
    stored = RunConfig(method="dmc").model_dump(mode="json") | {"settings": ["stage1.schedule.lr=1e-3", "drift=none"]}
    assert validated(RunConfig, stored, "here").settings == {"stage1.schedule.lr": 1e-3, "drift": "none"}
    with pytest.raises(ResultError, match=r"settings: --set junk: must be key=value"):
        validated(RunConfig, stored | {"settings": ["junk"]}, "here")


def test_what_is_said_later_counts_and_a_choice_drops_what_was_said_of_the_one_before():
    first = merged({}, [("stage1.tuning", "full"), ("stage1.tuning.lr", 1e-5), ("probes", 1)])
    assert merged(first, [("stage1.tuning", "full"), ("probes", 2)]) == first | {"probes": 2}
    assert merged(first, [("stage1.tuning", "lora")]) == {"probes": 1, "stage1.tuning": "lora"}


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.config is not None])
def test_a_truth_value_is_no_number_whatever_the_setting(method):
    """Python and pydantic take true for 1."""
    config = METHODS[method].config()
    for path, value, _ in settings(config):
        if isinstance(value, int | float) and not isinstance(value, bool):
            for given in ({path: True}, [f"{path}=true"]):
                with pytest.raises(ConfigError, match=f"setting {path}=True: must be (a (whole )?number|2 or 4)"):
                    with_settings(config, given)


def test_truth_values_are_no_numbers_in_any_form(tmp_path):
    for given in (["stage1.schedule.milestones=[1, true]"], ["shrinkage={kind: ridge, eps: true}"]):
        with pytest.raises(ConfigError, match=r"must be a (whole )?number"):
            with_settings(DmcConfig(), given)
    file = tmp_path / "run.toml"
    for line in ("limit_train = true", "validation = false", "seeds = [1, true]", "seed = false"):
        file.write_text(f'method = "lda"\n{line}\n')
        with pytest.raises(ConfigError, match=r"must be a (whole )?number"):
            read_run_file(file)
        key, value = line.split(" = ")
        with pytest.raises(ValidationError, match=key):
            RunFile.model_validate({"method": "lda", key: json.loads(value)})
    with pytest.raises(ResultError, match="limit_train"):
        validated(RunConfig, {"method": "lda", "limit_train": True}, "stored")
    with pytest.raises(ValidationError, match="batch"):
        EmbedConfig(batch=True)
    assert with_settings(DmcConfig(), {"stage1.schedule.cosine": False}).stage1.schedule.cosine is False
