"""Parts run as processes of their own; what is finished stays, what fails is told."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from simulations import __main__ as command_line
from simulations.settings import Settings, SettingsError
from simulations.tables.command import run_table
from simulations.tables.definition import read_table
from simulations.tables.rates import rates_of
from simulations.tables.running import OPTIONS, Part, TableRun, write_options

OWN = """
title = "Own"
[options]
seeds = "0,1"
strategies = "nested,eclm"
devices = 4
per-round = 2
rounds = 1
epochs = 2
enhancing-epochs = 1
[[row]]
name = "small"
dataset = "digits"
"""
QUIET = Console(quiet=True)


def own_table(tmp_path: Path, text: str = OWN) -> str:
    (tmp_path / "own.toml").write_text(text)
    return str(tmp_path / "own.toml")


def run_own(tmp_path: Path, text: str = OWN, **more: object) -> None:
    options = {"data_dir": "", "jobs": 2, "runs": tmp_path / "runs", "tune": False}
    options |= {"report": False, "redo": "", "page": ""}
    run_table(own_table(tmp_path, text), **{**options, **more})


def test_parts_run_once_and_share_what_the_cloud_prepared(tmp_path: Path, capsys, monkeypatch):
    started: list[list[str]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda c, **kw: (started.append(c), popen(c, **kw))[1])
    one_seed = OWN.replace('"0,1"', '"0"')
    run_own(tmp_path)
    assert len(started) == 2
    assert len(pd.read_csv(tmp_path / "own" / "small.csv")) == 2 * 2 * 4
    printed = capsys.readouterr().out
    assert "small, seed 0: " in printed
    assert "2 seeds, 8 devices in all" in " ".join(printed.split())
    first = (tmp_path / "own" / "small.csv").read_bytes()

    run_own(tmp_path)  # nothing is missing
    assert len(started) == 2

    # More to do: only that is run, on cloud models that are there.
    models = sorted((tmp_path / "runs" / "offline").glob("*.safetensors"))
    run_own(tmp_path, one_seed.replace('"nested,eclm"', '"nested,eclm,eclm-half"'))
    assert len(started) == 3
    assert "eclm-half" in started[2]
    assert sorted((tmp_path / "runs" / "offline").glob("*.safetensors")) == models
    ends = pd.read_csv(tmp_path / "own" / "small.csv")
    assert ends[ends["strategy"] != "eclm-half"].to_csv(index=False).encode() == first
    assert len(ends) == (2 * 2 + 1) * 4

    # What was interrupted before its rows were gathered is gathered now.
    for file in (tmp_path / "own").glob("small*"):
        file.unlink()
    run_own(tmp_path)
    assert len(started) == 3
    assert (tmp_path / "own" / "small.csv").read_bytes() == first

    # A strategy whose method has changed is run anew, whatever rows there are without results.
    untuned = '[[row]]\nname = "untuned"\ndataset = "digits"\ntuned = "nothing-yet"\n'
    other = '[[row]]\nname = "other"\ndataset = "digits"\n'
    table = read_table(own_table(tmp_path, OWN + untuned + other))
    TableRun(table, tmp_path / "runs", QUIET, redo=["eclm"], only=["other"])
    assert (tmp_path / "own" / "small.csv").read_bytes() == first
    devices = next((tmp_path / "runs" / "own" / "small").iterdir()) / "devices"
    devices.mkdir()  # of an interrupted run
    table_run = TableRun(table, tmp_path / "runs", QUIET, redo=["eclm"])
    assert not devices.exists()
    parts = table_run.parts(table.rows[0])
    assert [table_run.missing(part) for part in parts] == [["eclm"], ["eclm"]]
    assert set(pd.read_csv(tmp_path / "own" / "small.csv")["strategy"]) == {"nested"}
    assert not any((part.folder / "results.csv").exists() for part in parts)

    with pytest.raises(SettingsError, match="--rounds was 1, got 2; take the change back"):
        run_own(tmp_path, OWN.replace("rounds = 1", "rounds = 2"))
    # Other rows run all the same.
    table = read_table(own_table(tmp_path, OWN.replace("rounds = 1", "rounds = 2") + other))
    assert TableRun(table, tmp_path / "runs", QUIET, only=["other"]).rows["small"].done


def test_a_part_is_the_same_as_an_ordinary_run(tmp_path: Path):
    run_own(tmp_path, OWN.replace('"0,1"', '"1"'))
    (part,) = (tmp_path / "runs" / "own" / "small").iterdir()
    settings = {"devices": 4, "per_round": 2, "rounds": 1, "epochs": 2, "enhancing_epochs": 1}
    out = tmp_path / "alone"
    from simulations.engine import run

    run(
        Settings.suited(**settings, strategies="nested,eclm", seeds="1", out=str(out)), "in-process"
    )
    assert (out / "results.csv").read_bytes() == (part / "results.csv").read_bytes()


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path: Path, capsys):
    text = OWN.replace('"0,1"', '"0"') + '[[row]]\nname = "none"\ndataset = "hapt"\n'
    with pytest.raises(SystemExit, match="1 parts failed; the same command goes on"):
        run_own(tmp_path, text)
    printed = capsys.readouterr().out
    assert "none, seed 0: no results of nested, eclm" in printed
    assert "give --data-dir the folder that holds hapt" in " ".join(printed.split())
    assert (tmp_path / "own" / "small.csv").exists()


def test_a_parts_options_are_all_its_settings(tmp_path: Path):
    for options in ({}, {"dataset": "hapt", "classes_per_device": 2, "learning_rate": 0.002}):
        settings = Settings(
            rates=(("eclm", 0.3),), views=("noise", "plain"), feature_shift="new", **options
        )
        write_options(settings, tmp_path)
        from simulations.presets import read_preset

        again = Settings.suited(**read_preset(str(tmp_path / OPTIONS)))
        assert again == Settings(
            **{**settings.__dict__, "out": again.out, "data_dir": again.data_dir}
        )


def test_other_settings_run_elsewhere(tmp_path: Path):
    def folders(text: str) -> list[Path]:
        table = read_table(own_table(tmp_path, text))
        return [p.folder for p in TableRun(table, tmp_path, QUIET).parts(table.rows[0])]

    first = folders(OWN)
    assert len(set(first)) == 2
    assert not set(first) & set(folders(OWN.replace("rounds = 1", "rounds = 2")))
    assert folders(OWN.replace('"nested,eclm"', '"fjord"')) == first


TUNED = OWN.replace('dataset = "digits"', 'dataset = "digits"\ntuned = "small"')


def test_tuned_rates_reach_every_strategy_and_variants_take_the_methods(tmp_path: Path):
    text = TUNED.replace('"nested,eclm"', '"nested,eclm,eclm-half"')
    table = read_table(own_table(tmp_path, text))
    with pytest.raises(SettingsError, match=r"run python -m simulations table own --tune"):
        rates_of(table, table.rows[0])
    rates = tmp_path / "own" / "rates" / "small.toml"
    rates.parent.mkdir(parents=True)
    rates.write_text("nested = 0.1\neclm = 0.2")
    assert rates_of(table, table.rows[0]) == (("eclm", 0.2), ("eclm-half", 0.2), ("nested", 0.1))
    part = TableRun(table, tmp_path, QUIET).parts(table.rows[0])[0]
    assert part.settings.with_rate_of("eclm-half").learning_rate == 0.2
    rates.write_text("eclm = 0.2")
    with pytest.raises(SettingsError, match=r"a learning rate for nested in .*, got eclm; tune"):
        rates_of(table, table.rows[0])


def test_a_table_tunes_its_rows_once(tmp_path: Path, monkeypatch):
    from simulations import tuning

    asked, known = [], []

    def tune(settings: Settings, trials: tuple, file: Path, **options: object) -> None:
        asked.append((settings, trials))
        known.append(options["known"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("nested = 0.1\neclm = 0.2")
        file.with_suffix(".csv").write_text("strategy,rate\nnested,0.1\neclm,0.2\n")

    monkeypatch.setattr(tuning, "tune", tune)
    for _ in range(2):
        run_own(tmp_path, TUNED, tune=True)
    ((settings, trials),) = asked
    assert (settings.seeds, settings.strategies) == ((1000,), ("nested", "eclm"))
    assert trials == (0.0005, 0.002, 0.008)

    # But for a strategy whose method has changed; what the others came to stays.
    run_own(tmp_path, TUNED, tune=True, redo="eclm", only="another")
    run_own(tmp_path, TUNED, tune=True, redo="eclm", only="small")
    assert [settings.strategies for settings, _ in asked[1:]] == [("eclm",)]
    assert known[0] is None
    assert list(known[1]["strategy"]) == ["nested"]

    # And a strategy that has come to the row since.
    wider = TUNED.replace('"nested,eclm"', '"nested,eclm,fjord"')
    assert wider != TUNED
    run_own(tmp_path, wider, tune=True)
    assert asked[2][0].strategies == ("fjord",)
    assert list(known[2]["strategy"]) == ["nested", "eclm"]


@pytest.fixture
def signals():
    """Keep the tests' own way to take a signal."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_a_table_is_told_how_to_go_on_and_no_process_is_left(
    number: int, signals: None, tmp_path: Path, monkeypatch
):
    processes = []
    popen = subprocess.Popen

    def sleep(command: list[str], **options: object) -> subprocess.Popen:
        process = popen([sys.executable, "-c", "import time; time.sleep(600)"], **options)
        processes.append(process)
        return process

    def stop_soon(*_: object) -> None:
        while not processes:
            time.sleep(0.05)
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(subprocess, "Popen", sleep)
    monkeypatch.setattr("simulations.tables.running.as_completed", stop_soon)
    options = ["table", own_table(tmp_path), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["simulations", *options])
    with pytest.raises(SystemExit, match="The same command goes on from here"):
        command_line.main()
    assert len(processes) == 1
    assert processes[0].wait(timeout=20) != 0


def test_a_process_that_starts_while_all_are_stopped_is_stopped_too(tmp_path: Path, monkeypatch):
    popen = subprocess.Popen
    table = read_table(own_table(tmp_path))
    table_run = TableRun(table, tmp_path / "runs", QUIET)
    stop = threading.Thread(target=table_run._stop)

    def stopped_meanwhile(command: list[str], **options: object) -> subprocess.Popen:
        stop.start()
        stop.join(timeout=0.5)
        return popen([sys.executable, "-c", "import time; time.sleep(20)"], **options)

    monkeypatch.setattr(subprocess, "Popen", stopped_meanwhile)
    first, second = table_run.parts(table.rows[0])
    start = time.perf_counter()
    assert table_run._run(first) == ""
    assert time.perf_counter() - start < 10
    assert table_run._run(second) == ""  # and none is started any more
    assert not second.folder.exists()


def test_only_the_rows_asked_for_are_run(tmp_path: Path):
    table = read_table(own_table(tmp_path, f'{OWN}[[row]]\nname = "second"\ndataset = "digits"\n'))
    seen: list[str] = []

    class Watched(TableRun):
        def _run(self, part: Part) -> str:
            seen.append(part.row.name)
            return ""

    Watched(table, tmp_path / "runs", QUIET, only=["second"]).run(1)
    assert set(seen) == {"second"}
    with pytest.raises(SettingsError, match="got 'third'"):
        Watched(table, tmp_path / "runs", QUIET, only=["third"])
    command = Watched(table, tmp_path, QUIET, compute="cuda")
    part = command.parts(table.rows[0])[0]
    assert command._command(part)[-2:] == ["--compute", "cuda"]


def test_a_run_of_other_settings_is_not_taken_for_the_row(tmp_path: Path):
    run_own(tmp_path, OWN.replace('"0,1"', '"0"').replace('"nested,eclm"', '"nested"'), jobs=1)
    (notes,) = (tmp_path / "runs").glob("own/small/*/run.json")
    notes.write_text(notes.read_text().replace('"devices": 4', '"devices": 5'))
    for file in (tmp_path / "own").glob("small*"):
        file.unlink()
    with pytest.raises(SettingsError, match=r"of row small, got another --devices; remove"):
        run_own(tmp_path, OWN.replace('"0,1"', '"0"').replace('"nested,eclm"', '"nested"'), jobs=1)


def test_a_row_without_learning_rates_does_not_stop_the_others(tmp_path: Path):
    second = '[[row]]\nname = "second"\ndataset = "digits"\ntuned = "second"\n'
    table = read_table(own_table(tmp_path, OWN + second))
    table_run = TableRun(table, tmp_path, QUIET, only=["second"])
    assert len(table_run.parts(table.rows[0])) == 2
    with pytest.raises(SettingsError, match="Expected tuned learning rates for the row second"):
        table_run.run(1)
