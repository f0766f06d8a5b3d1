"""Presets that come along are sound, and a user's own are read with care."""

import enum
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from simulations.presets import FOLDER, known_presets, read_preset
from simulations.run_options import with_preset
from simulations.settings import DATASETS, Settings, SettingsError
from strategies import METHODS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", known_presets())
def test_every_preset_is_sound(name: str):
    settings = Settings.suited(**read_preset(name))
    assert settings.strategies == ("all",) or set(settings.strategies) <= set(METHODS)
    assert (FOLDER / f"{name}.toml").read_text().startswith("# ")


def test_every_data_set_has_a_small_run_of_all_strategies():
    for dataset in DATASETS:
        options = read_preset(f"{dataset}-small")
        assert options["dataset"] == dataset
        rivals = {name for name in METHODS if not name.startswith("eclm-")}
        assert rivals < set(Settings.suited(**options).strategies)


def test_a_preset_of_ones_own(tmp_path: Path):
    (tmp_path / "own.toml").write_text('per-round = 3\nseeds = [0, 4]\nengine = "in-process"\n')
    options = read_preset(str(tmp_path / "own.toml"))
    assert options == {"per_round": 3, "seeds": "0,4", "engine": "in-process"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("per-rund = 3", "options of a run in the preset .*, got per_rund"),
        ("out = 'here'", "got out"),
        ("per-round 3", "Can't read the preset"),
    ],
)
def test_bad_presets_are_refused(tmp_path: Path, text: str, said: str):
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(SettingsError, match=said):
        read_preset(str(tmp_path / "own.toml"))


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(SettingsError, match=r"--preset from .*digits-small.*, or the path of"):
        read_preset("nothing")


def test_the_flower_app_has_every_option_with_its_default():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert {key.replace("-", "_") for key in table} == {field.name for field in fields(Settings)}
    assert Settings.from_run_config(table) == Settings.suited(out="runs/latest")


def test_a_preset_holds_where_the_command_line_has_an_enumeration_of_its_own(tmp_path: Path):
    """Newer versions of typer come with a click, and so a `ParameterSource`, of their own."""

    class Source(enum.Enum):
        COMMANDLINE = 1
        DEFAULT = 3

    class Context:
        def get_parameter_source(self, name: str) -> Source:
            return Source.COMMANDLINE if name == "rounds" else Source.DEFAULT

    path = tmp_path / "own.toml"
    path.write_text("rounds = 7\ndevices = 9\n")
    options = {"preset": str(path), "rounds": 2, "devices": 20}
    merged = with_preset(Context(), options)
    assert (merged["rounds"], merged["devices"]) == (2, 9)
