"""Whole runs: the command line, both engines, what a run leaves, stopping and going on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from experiments import TINY, column, rows_of, run_tiny
from flwr.clientapp import ClientApp

from eclm_flower.federation import InProcessGrid, run_in_process
from simulations import __main__ as command_line
from simulations import offline
from simulations.client_app import app as client_app
from simulations.results import Record
from simulations.server_app import app as server_app
from simulations.server_app import run_experiment
from simulations.settings import Settings, SettingsError
from simulations.strategy_run import DeviceFailedError

ROOT = Path(__file__).parents[2]
FILES = {"results.csv", "summary.json", "accuracy.png", "run.json", "offline"}
# Everything that moves, in little time.
LIVING = {
    "devices": 4,
    "per_round": 2,
    "steps": 2,
    "rounds": 1,
    "dropout": 0.2,
    "availability": 0.8,
    "fleet": "mixed",
    "alpha": 0.5,
    "module_cache": True,
    "strategies": "eclm,local-adaptation",
    "seeds": "0,1",
}


def options_of(**settings: object) -> list[str]:
    options = []
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        options += [option] if value is True else [option, str(value)]
    return options


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "simulations", "run", *options]


def simulate(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        command(*options), cwd=ROOT, capture_output=True, text=True, timeout=280, env=env
    )


@pytest.fixture(scope="module")
def living(tmp_path_factory):
    out = tmp_path_factory.mktemp("living")
    run_tiny(out, **LIVING)
    return out


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    out = tmp_path_factory.mktemp("still")
    done = simulate(
        *options_of(**TINY, engine="in-process", fleet="uniform:0.25", out=out, evaluate_every=2)
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_ends_with_tables_and_leaves_its_files(still):
    out, printed = still
    assert "What it took" in printed
    assert "Whole cloud model offline, seed 0: dense" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert {path.name for path in out.iterdir()} == FILES


def test_there_is_a_row_for_every_evaluated_device(still):
    keys = [(r["strategy"], r["seed"], r["round"], r["device"]) for r in rows_of(still[0])]
    assert len(keys) == len(set(keys)) == 2 * 1 * 2 * 6


def test_eclm_sends_sub_models_and_fedavg_the_whole_model(still):
    out, _ = still
    assert set(column(rows_of(out), "modules", strategy="fedavg")) == {16}
    assert set(column(rows_of(out), "modules", strategy="eclm")) == {4}
    summary = json.loads((out / "summary.json").read_text())["strategies"]
    assert summary["eclm"]["bytes_down"] < 0.7 * summary["fedavg"]["bytes_down"]
    assert summary["eclm"]["clock"] < summary["fedavg"]["clock"]


def test_strategies_train_the_same_devices_and_every_byte_is_in_some_row(tmp_path):
    rows = run_tiny(tmp_path)

    def trained(strategy: str) -> set[tuple[str, str]]:
        own = [row for row in rows if row["strategy"] == strategy and row["round"] != "0"]
        return {(row["round"], row["device"]) for row in own if int(row["bytes_up"]) > 5_000}

    assert trained("eclm") == trained("fedavg")
    assert len(trained("fedavg")) == 2 * 3  # rounds, devices a round


def test_the_same_seed_gives_the_same_rows_twice(living, tmp_path):
    assert run_tiny(tmp_path, **LIVING) == rows_of(living)


@pytest.mark.ray
def test_ray_gives_the_same_rows_and_leaves_no_process(living, tmp_path):
    mark = {"ECLM_TEST_RUN": str(tmp_path)}  # what it starts inherits this
    done = simulate(*options_of(**{**TINY, **LIVING}, engine="ray", out=tmp_path), **mark)
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path) == rows_of(living)
    assert not processes(mark)


def processes(mark: dict[str, str]) -> list[str]:
    """Command lines of the processes with an environment variable."""
    found = []
    for process in psutil.process_iter():
        try:
            if mark.items() <= process.environ().items():
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


# Stopping and going on


def test_a_stopped_run_goes_on_to_the_same_rows(living, tmp_path, monkeypatch):
    saved = []
    add = Record.add

    def add_two_then_stop(self: Record, *pair: object) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(pair[:2])
        add(self, *pair)

    with monkeypatch.context() as patch:
        patch.setattr(Record, "add", add_two_then_stop)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(tmp_path, **LIVING)
    assert len(rows_of(tmp_path)) < len(rows_of(living))
    trained = []
    monkeypatch.setattr(offline.OfflineStage, "_train", lambda *_: trained.append(1))
    monkeypatch.setattr(
        Record, "add", lambda self, *pair: (saved.append(pair[:2]), add(self, *pair))
    )
    assert run_tiny(tmp_path, resume=True, **LIVING) == rows_of(living)
    assert not trained  # offline models are read
    assert len(saved) == len(set(saved)) == 2 * 2  # and nothing is done twice
    summaries = [json.loads((out / "summary.json").read_text()) for out in (living, tmp_path)]
    assert summaries[0]["cloud_model"] == summaries[1]["cloud_model"]


def test_a_killed_process_goes_on_to_the_same_rows(living, tmp_path):
    options = options_of(**{**TINY, **LIVING}, engine="in-process", out=tmp_path)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(*options), cwd=ROOT, stdout=subprocess.DEVNULL, env=env)
    deadline = time.monotonic() + 120
    while not (tmp_path / "results.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run_tiny(tmp_path, resume=True, **LIVING) == rows_of(living)


def test_other_settings_are_not_resumed(tmp_path):
    run_tiny(tmp_path, rounds=0, strategies="fedavg")
    kept = (tmp_path / "results.csv").read_bytes()
    with pytest.raises(SettingsError, match=r"--devices was 6, got 5; use the same, or another"):
        run_tiny(tmp_path, rounds=0, strategies="fedavg", devices=5, resume=True)
    assert (tmp_path / "results.csv").read_bytes() == kept


def test_other_rates_are_not_resumed_and_unknown_strategies_have_none(tmp_path):
    rates = tmp_path / "rates.toml"
    rates.write_text("fedavg = 0.01")
    options = {"rounds": 1, "strategies": "fedavg", "rates": str(rates)}
    slow = run_tiny(tmp_path / "out", **options)
    assert run_tiny(tmp_path / "out", resume=True, **options) == slow
    rates.write_text("fedavg = 0.5")
    with pytest.raises(SettingsError, match=r"--rates was \[\['fedavg', 0.01\]\], got"):
        run_tiny(tmp_path / "out", resume=True, **options)
    fast = run_tiny(tmp_path / "out", **options)
    assert column(fast, "accuracy_after") != column(slow, "accuracy_after")
    rates.write_text("fedprox = 0.5")
    with pytest.raises(SettingsError, match=r"--rates of eclm, .*, got one of 'fedprox'"):
        run_tiny(tmp_path / "out", **options)


def test_masked_loss_and_guard_change_what_devices_do(tmp_path):
    fast = {"rounds": 1, "strategies": "fedavg", "learning_rate": 0.05}
    plain = run_tiny(tmp_path, **fast)
    masked = run_tiny(tmp_path, **fast, masked_loss=True)
    guarded = run_tiny(tmp_path, **fast, guard=True)
    for rows in (masked, guarded):
        assert column(rows, "accuracy_after") != column(plain, "accuracy_after")
    assert column(guarded, "accuracy_before") == column(plain, "accuracy_before")
    assert column(masked, "accuracy_before") != column(plain, "accuracy_before")


def test_a_class_prior_is_eclms_under_label_skew_and_everyones_if_asked(tmp_path):
    options = {"rounds": 1, "strategies": "eclm,eclm-no-prior,fedavg"}
    usual = run_tiny(tmp_path, **options)
    given = run_tiny(tmp_path, **options, class_prior=True)
    assert column(given, "accuracy_before", strategy="eclm") == column(
        usual, "accuracy_before", strategy="eclm"
    )
    for name in ("eclm-no-prior", "fedavg"):
        start = {"round": 0, "strategy": name}
        better = np.mean(column(given, "accuracy_before", **start))
        assert better > np.mean(column(usual, "accuracy_before", **start))
    # It never comes back to the cloud, whose model knows no device's classes.
    lacking = column(usual, "accuracy_global", round=1, strategy="eclm-no-prior")
    assert min(column(usual, "accuracy_global", round=1, strategy="eclm")) >= min(lacking) - 0.02


def test_without_label_skew_eclm_has_no_class_prior(tmp_path):
    options = {"rounds": 0, "classes_per_device": 0}
    with_prior = run_tiny(tmp_path, **options, strategies="eclm")
    without = run_tiny(tmp_path, **options, strategies="eclm-no-prior")
    name = "accuracy_before"
    assert column(with_prior, name) == column(without, name)


def test_a_finished_run_can_be_given_more_to_do(tmp_path):
    alone = run_tiny(tmp_path / "both", rounds=0, strategies="eclm,fedavg")
    run_tiny(tmp_path / "more", rounds=0, strategies="fedavg")
    assert run_tiny(tmp_path / "more", rounds=0, strategies="eclm,fedavg", resume=True) == alone


def test_without_resume_nothing_old_is_left(tmp_path):
    run_tiny(tmp_path, rounds=0, strategies="fedavg", seeds="0,1")
    rows = run_tiny(tmp_path, rounds=0, strategies="fedavg", seeds="0")
    assert {row["seed"] for row in rows} == {"0"}
    assert list((tmp_path / "offline").glob("*-0-*"))
    assert not list((tmp_path / "offline").glob("*-1-*"))


# Data and options


def test_a_npz_with_people_and_test_rows_runs(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    y = np.tile(np.arange(3), 200)
    x = (rng.normal(size=(600, 8)) + 3 * np.eye(8)[y]).astype(np.float32)
    device = np.repeat(np.arange(6), 100)
    np.savez(tmp_path / "own.npz", x=x, y=y, device=device, test=rng.random(600) < 0.3)
    rows = run_tiny(
        tmp_path / "out", dataset=str(tmp_path / "own.npz"), strategies="eclm", steps=2, rounds=1
    )
    assert len(rows) == 6 * 4


def refusal(monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    """Run the command line in this process; return what it says when it ends."""
    monkeypatch.setattr(sys, "argv", ["simulations", "run", *options])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    return str(ended.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--dataset mnits", "error: Expected a data set from digits"),
        ("--strategies eclm,fedprox", "error: Expected --strategies from eclm, fedavg"),
        ("--per-round 21", "error: Expected --per-round of at most the 20 devices"),
        ("--engine spark", "error: Expected --engine from ray, in-process, got 'spark'"),
        ("--dataset /no/such.npz", "/no/such.npz"),
        ("--dataset cifar10 --data-dir /no/such", "/no/such"),
        ("--classes-per-device 11", "error: Expected `classes_per_device` of 1 to 10"),
        ("--model resnet", "error: Expected --model from auto, mlp"),
        ("--out /dev/null/here", "error: Can't write to --out /dev/null/here"),
        ("--fleet tablets", "error: Expected a fleet from phones, boards"),
        ("--alpha 0.5 --classes-per-device 2", "error: Expected --alpha or --classes-per-device"),
        ("--feature-shift known --views sepia,plain", "error: Expected views of images"),
        ("--preset nothing", "error: Expected --preset from"),
    ],
)
def test_bad_options_end_the_run_with_a_sentence(options, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal(monkeypatch, *options.split())


def test_a_sentence_and_no_traceback_on_the_terminal():
    done = simulate("--variant", "cloudless")
    assert done.returncode != 0
    assert "error: Expected --variant from full, no-cloud, no-local-training" in done.stderr
    assert "Traceback" not in done.stderr


def test_options_given_win_over_those_of_a_preset(monkeypatch, tmp_path):
    (tmp_path / "own.toml").write_text('devices = 7\nper-round = 2\nstrategies = ["eclm"]\n')
    ran = []
    monkeypatch.setattr("simulations.engine.run", lambda settings, *_, **__: ran.append(settings))
    options = ["--preset", str(tmp_path / "own.toml"), "--per-round", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["simulations", "run", *options])
    with pytest.raises(SystemExit):
        command_line.main()
    assert (ran[0].devices, ran[0].per_round, ran[0].strategies) == (7, 3, ("eclm",))


def test_who_stops_a_run_is_told_how_to_go_on(monkeypatch, tmp_path):
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simulations.engine.run", stopped)
    assert "--resume goes on" in refusal(monkeypatch, "--out", str(tmp_path))


def test_a_failing_device_ends_the_run_and_nothing_is_reported(tmp_path):
    app = ClientApp()
    for kind in ("query", "train"):
        app._registered_funcs[f"{kind}.default"] = client_app._registered_funcs[f"{kind}.default"]

    @app.evaluate()
    def evaluate(msg, context):
        raise RuntimeError("the battery is empty")

    settings = Settings(
        devices=3, per_round=2, rounds=1, epochs=1, enhancing_epochs=0, out=str(tmp_path)
    )
    with pytest.raises(DeviceFailedError, match="the battery is empty"):
        run_experiment(InProcessGrid(app, 3), settings, engine="test")
    assert not (tmp_path / "results.csv").exists()


def test_the_flower_app_reads_its_options_from_the_run_config(tmp_path):
    run_config = {
        "devices": 3, "per-round": 2, "rounds": 1, "epochs": 1, "enhancing-epochs": 0,
        "strategies": "eclm", "out": str(tmp_path), "resume": False, "dropout": 0.1,
    }  # fmt: skip
    run_in_process(server_app, client_app, 3, run_config=run_config)
    assert len(rows_of(tmp_path)) == 2 * 3
