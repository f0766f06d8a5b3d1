import json
from pathlib import Path

import pytest

from simulations.settings import Settings, SettingsError
from simulations.strategy_run import run_config


def test_settings_survive_the_way_to_a_device():
    settings = Settings(
        strategies=("fedavg",),
        seeds=(3, 1),
        learning_rate=0.01,
        out="/x y/ü",
        feature_shift="new",
        views=("noise", "blur"),
        module_cache=True,
        rates=(("eclm", 0.1), ("fedavg", 0.2)),
        judged_on="validation",
        guard=True,
        masked_loss=True,
    )
    assert Settings.from_json(settings.to_json()) == settings


def test_devices_get_no_byte_of_what_concerns_the_cloud_alone():
    settings = Settings(devices=7, strategies=("fedavg",), seeds=(3, 1), out="/x", dropout=0.5)
    other = Settings(devices=7, seeds=(4,), resume=True, availability=0.5)
    assert settings.for_devices().to_json() == other.for_devices().to_json() == '{"devices": 7}'


def test_classes_per_device_give_way_to_other_ways_of_dividing():
    assert Settings.suited(alpha=0.5, classes_per_device=-1).classes_per_device == 0
    assert Settings.suited(feature_shift="known", classes_per_device=-1).classes_per_device == 0
    assert Settings.suited(feature_shift="known", classes_per_device=2).classes_per_device == 2


def test_a_strategy_is_told_its_own_rate_and_no_other(tmp_path: Path):
    (tmp_path / "rates.toml").write_text("fedavg = 0.5\neclm = 1\n")
    settings = Settings.suited(rates=str(tmp_path / "rates.toml"), learning_rate=0.1)
    assert settings.rates == (("eclm", 1.0), ("fedavg", 0.5))
    rates = [settings.with_rate_of(name).learning_rate for name in ("fedavg", "eclm", "nested")]
    assert rates == [0.5, 1.0, 0.1]
    for name, rate in (("fedavg", 0.5), ("nested", 0.1)):
        config = run_config(settings, 0, name)
        told = json.loads(str(config["settings"]))
        assert told["learning_rate"] == rate
        assert "rates" not in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("eclm = 'fast'", "learning rate for eclm in .*, got 'fast'"),
        ("eclm = true", "got True"),
        ("eclm = -1", "--rates > 0, below 10, for eclm, got -1"),
        ("eclm 1", "Can't read --rates"),
        (None, "Can't read --rates"),
    ],
)
def test_bad_rates_are_refused(tmp_path: Path, text: str | None, said: str):
    if text is not None:
        (tmp_path / "rates.toml").write_text(text)
    with pytest.raises(SettingsError, match=said):
        Settings.suited(rates=str(tmp_path / "rates.toml"))


def test_data_shifts_every_so_many_steps():
    settings = Settings(steps=7, shift_every=3)
    assert [settings.phase(step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]


def test_options_left_out_become_what_suits_the_data_set():
    assert Settings.suited(dataset="hapt", classes_per_device=-1).classes_per_device == 0
    assert Settings.suited(dataset="hapt", classes_per_device=2).classes_per_device == 2
    assert Settings.suited(dataset="cifar10", epochs=-1).epochs == Settings().epochs
    assert Settings.suited(dataset="digits").epochs > Settings().epochs


def test_run_config_has_dashes_and_comma_separated_lists():
    settings = Settings.from_run_config({"per-round": 2, "seeds": "0,4", "strategies": "eclm"})
    assert (settings.per_round, settings.seeds, settings.strategies) == (2, (0, 4), ("eclm",))
    with pytest.raises(SettingsError, match="Unknown key 'per_rund'"):
        Settings.from_run_config({"per_rund": 2})


def test_a_whole_number_is_a_number():
    settings = Settings(dropout=0, alpha=0, shift=1)  # as a preset may say
    assert settings == Settings(dropout=0.0, alpha=0.0, shift=1.0)


def test_paths_become_absolute_for_devices_that_run_elsewhere():
    settings = Settings.suited(dataset="a.npz", data_dir="data", out="results")
    assert all(
        Path(path).is_absolute() for path in (settings.dataset, settings.data_dir, settings.out)
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dataset": "mnits"}, "Expected a data set from digits"),
        ({"devices": -1}, "--devices of at least 1, got -1"),
        ({"devices": 0}, "--devices of at least 1, got 0"),
        ({"per_round": 30}, "--per-round of at most the 20 devices, got 30"),
        ({"local_epochs": 0}, "--local-epochs of at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate > 0"),
        ({"learning_rate": float("nan")}, "--learning-rate > 0"),
        ({"seeds": "0,x"}, "seeds as numbers"),
        ({"seeds": "1,1"}, "--seeds as a list without repetitions"),
        ({"seeds": "-2"}, "seeds of at least 0"),
        ({"strategies": ","}, "--strategies as a list"),
        ({"rounds": -5}, "--rounds of at least 0"),
        ({"steps": 0}, "--steps of at least 1"),
        ({"shift": 1.1}, "--shift from 0 to 1, got 1.1"),
        ({"shift_every": 0}, "--shift-every of at least 1"),
        ({"variant": "cloudless"}, "--variant from full, no-cloud, no-local-training"),
        ({"fleet": "uniform:2"}, "share above 0 and at most 1, got 'uniform:2'"),
        ({"availability": 0.0}, "--availability above 0"),
        ({"dropout": 1.0}, "--dropout from 0 to below 1"),
        ({"alpha": 0.5, "classes_per_device": 2}, "two ways to divide the data, got both"),
        ({"alpha": float("nan")}, "--alpha of at least 0"),
        ({"feature_shift": "old"}, "--feature-shift from none, known, new"),
        ({"judged_on": "train"}, "--judged-on from test, validation"),
        ({"strength": 6}, "--strength of 1 to 5"),
        ({"views": "noise"}, "--feature-shift known or new with --views"),
        ({"devices": "ten"}, "--devices as a whole number, got 'ten'"),
        ({"rounds": 1.5}, "--rounds as a whole number, got 1.5"),
        ({"rounds": True}, "--rounds as a whole number, got True"),
        ({"learning_rate": "0.01"}, "--learning-rate as a number, got '0.01'"),
        ({"alpha": True}, "--alpha as a number, got True"),
        ({"guard": 1}, "--guard as true or false, got 1"),
        ({"guard": "no"}, "--guard as true or false, got 'no'"),
        ({"dataset": 5}, "--dataset as text, got 5"),
        ({"seeds": 0.5}, "--seeds as a list, got 0.5"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(options, sentence):
    with pytest.raises(SettingsError, match=sentence):
        Settings.suited(**options)
