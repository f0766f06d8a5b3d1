"""Learning rates: equal trials for all, on validation data of a seed of its own, best mean wins."""

import sys
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from simulations import __main__ as command_line
from simulations import tuning
from simulations.results import Row
from simulations.settings import Settings, SettingsError, read_rates
from simulations.trials import split_trials
from simulations.tuning import as_toml, tune, winners


def fake_run(asked: list[Settings], best: dict[str, float]):
    """Instead of a run: strategies are the better the nearer their rate is to the best one."""

    def run(settings: Settings, engine: str, *, verbose: bool) -> None:
        asked.append(settings)
        settings.out_dir.mkdir(parents=True, exist_ok=True)
        rows = []
        for strategy in settings.strategies:
            accuracy = 1 / (1 + abs(settings.learning_rate - best[strategy]))
            values = dict.fromkeys(Row.__annotations__, 0.0)
            values |= {"strategy": strategy, "seed": settings.seeds[0], "accuracy_after": accuracy}
            rows.append(values)
        pd.DataFrame(rows).astype(
            {name: int for name, kind in Row.__annotations__.items() if kind == "int"}
        ).to_csv(settings.out_dir / "results.csv", index=False)

    return run


def test_every_strategy_gets_the_same_trials_on_validation_data(tmp_path: Path, monkeypatch):
    asked: list[Settings] = []
    best = {"eclm": 0.002, "fedavg": 0.5, "nested": 0.001}
    monkeypatch.setattr(tuning, "run", fake_run(asked, best))
    settings = Settings(
        strategies=tuple(best), seeds=(1000,), out=str(tmp_path), rates=(("eclm", 0.3),)
    )
    file = tmp_path / "deep" / "rates.toml"
    outcome = tune(settings, (0.001, 0.002, 0.5), file, command="me --out x", console=Console())
    assert [trial.learning_rate for trial in asked] == [0.001, 0.002, 0.5]
    for trial in asked:
        assert trial.judged_on == "validation"
        assert trial.rates == ()
        assert (trial.strategies, trial.seeds) == (tuple(best), (1000,))
    assert len({trial.out for trial in asked}) == 3
    assert {trial.offline_dir for trial in asked} == {str(tmp_path / "offline")}
    assert dict(read_rates(file)) == best
    assert file.read_text().startswith("# me --out x\n")
    assert len(pd.read_csv(file.with_suffix(".csv"))) == len(outcome) == 3 * 3


def test_of_equally_good_rates_the_smallest_wins():
    rows = [("a", 0.1, 0.5), ("a", 0.01, 0.7), ("a", 0.02, 0.7), ("b", 0.1, 0.9), ("b", 0.01, 0.3)]
    outcome = pd.DataFrame(rows, columns=["strategy", "rate", "accuracy_after"])
    assert winners(outcome) == {"a": 0.01, "b": 0.1}


def test_rates_survive_their_file(tmp_path: Path):
    rates = {"eclm": 0.0005, "fedavg": 0.002}
    (tmp_path / "rates.toml").write_text(as_toml(rates, "python -m simulations tune"))
    assert dict(read_rates(tmp_path / "rates.toml")) == rates


def tuned_by(monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[Settings, tuple[float, ...]]:
    """Run the command in this process; return what would be tuned."""
    asked = []
    monkeypatch.setattr(tuning, "tune", lambda *given, **_: asked.append(given[:2]))
    monkeypatch.setattr(sys, "argv", ["simulations", "tune", *options])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    if not asked:
        raise SettingsError(str(ended.value))
    return asked[0]


def test_the_command_takes_a_runs_options_and_presets(monkeypatch, tmp_path: Path):
    (tmp_path / "own.toml").write_text("devices = 7\nseeds = [0, 4]\nlearning-rate = 0.3\n")
    options = ["--preset", str(tmp_path / "own.toml"), "--per-round", "3", "--guard"]
    settings, trials = tuned_by(monkeypatch, *options)
    assert (settings.devices, settings.per_round, settings.guard) == (7, 3, True)
    assert settings.seeds == (1000,)  # not the preset's, which are reported
    assert trials == (0.0005, 0.002, 0.008)
    assert tuned_by(monkeypatch, "--tuning-seeds", "7,8", "--trials", "1,0.1")[1] == (0.1, 1.0)


def test_what_is_tuned_is_no_option_of_tuning(monkeypatch, capsys):
    for option in ("--learning-rate", "--rates", "--judged-on", "--seeds"):
        with pytest.raises(SettingsError):
            tuned_by(monkeypatch, option, "1")
        assert "No such option" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "fast", "0", "0.1,0.1", "-1"])
def test_bad_trials_are_refused(text: str):
    with pytest.raises(SettingsError, match=f"--trials as learning rates.*got '{text}'"):
        split_trials(text)
