"""Settings by `--set`: applied, refused, listed."""

from __future__ import annotations

import pytest

from cairn.config import settings, with_settings, with_values
from cairn.errors import ConfigError, UnknownName
from cairn.methods.catalogue import METHODS
from cairn.methods.dmc import DmcConfig
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
