import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from eclm_flower.federation import InProcessGrid, run_in_process
from simulations.client_app import app as client_app
from simulations.server_app import DeviceFailedError, run_experiment
from simulations.server_app import app as server_app
from simulations.settings import Settings

ROOT = Path(__file__).parents[2]
TINY = "--devices 6 --per-round 3 --rounds 2 --epochs 10 --enhancing-epochs 5".split()  # noqa: SIM905


def simulate(*options, timeout=240):
    return subprocess.run(
        [sys.executable, "-m", "simulations", "run", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
    )


def rows(out):
    with open(out / "results.csv") as file:
        return [{**row, "seconds": None} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("in-process")
    done = simulate(*TINY, "--engine", "in-process", "--seeds", "0,1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_ends_with_a_table_and_leaves_its_files(in_process):
    out, done = in_process
    assert "strategy" in done.stdout
    assert "before modularising" in done.stdout
    assert {path.name for path in out.iterdir()} == {
        "results.csv",
        "summary.json",
        "accuracy.png",
    }


def test_there_is_a_row_for_every_strategy_seed_round_and_device(in_process):
    out, _ = in_process
    keys = [(r["strategy"], r["seed"], r["round"], r["device"]) for r in rows(out)]
    assert len(keys) == len(set(keys)) == 2 * 2 * 3 * 6


def test_eclm_sends_sub_models_and_fedavg_the_whole_model(in_process):
    out, _ = in_process
    table = rows(out)
    fedavg = {r["modules"] for r in table if r["strategy"] == "fedavg"}
    eclm = {int(r["modules"]) for r in table if r["strategy"] == "eclm"}
    assert fedavg == {"16"}
    assert min(eclm) < 8
    summary = json.loads((out / "summary.json").read_text())["strategies"]
    assert summary["eclm"]["bytes_down"] < 0.7 * summary["fedavg"]["bytes_down"]


def test_every_byte_of_training_is_in_some_row(in_process):
    out, _ = in_process
    trained = [r for r in rows(out) if r["strategy"] == "fedavg" and int(r["bytes_up"]) > 30_000]
    assert len(trained) == 2 * 2 * 3  # seeds, rounds, devices a round


def test_both_strategies_start_from_the_same_weights_and_train_the_same_devices(in_process):
    out, _ = in_process

    def trained(strategy):
        return {
            (r["seed"], r["round"], r["device"])
            for r in rows(out)
            if r["strategy"] == strategy and r["round"] != "0" and int(r["bytes_up"]) > 5_000
        }

    assert trained("eclm") == trained("fedavg")


@pytest.mark.ray
def test_ray_gives_the_same_rows_and_leaves_no_process(in_process, tmp_path):
    before = processes()
    done = simulate(*TINY, "--engine", "ray", "--seeds", "0,1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path) == rows(in_process[0])
    assert processes() <= before


def processes() -> set[str]:
    """Ray's and Flower's processes on this machine."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    names = ("raylet", "gcs_server", "ray::", "flower-super", "ClientAppActor")
    return {line for line in listed.splitlines() if any(name in line for name in names)}


def test_a_npz_with_people_and_test_rows_runs(tmp_path):
    rng = np.random.default_rng(0)
    y = np.tile(np.arange(3), 200)
    x = (rng.normal(size=(600, 8)) + 3 * np.eye(8)[y]).astype(np.float32)
    device = np.repeat(np.arange(6), 100)
    np.savez(tmp_path / "own.npz", x=x, y=y, device=device, test=rng.random(600) < 0.3)
    done = simulate(
        *TINY, "--dataset", str(tmp_path / "own.npz"), "--engine", "in-process", "--out",
        str(tmp_path / "out"), "--strategies", "eclm",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {r["strategy"] for r in rows(tmp_path / "out")} == {"eclm"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--dataset", "mnits"], "error: Expected a data set from digits"),
        (["--strategies", "eclm,fedprox"], "error: Expected --strategies from eclm, fedavg"),
        (["--per-round", "21"], "error: Expected --per-round of at most the 20 devices"),
        (["--engine", "spark"], "error: Expected --engine from ray, in-process, got 'spark'"),
        (["--dataset", "/no/such.npz"], "/no/such.npz"),
        (["--dataset", "cifar10", "--data-dir", "/no/such"], "/no/such"),
        (["--classes-per-device", "11"], "error: Expected `classes_per_device` of 1 to 10"),
        (["--modules", "7"], "can't be cut into 7 equal modules"),
        (["--model", "resnet18", "--dataset", "digits", "--modules", "5"], "5 equal modules"),
        (["--rounds", "many"], "--rounds"),
        (["--out", "/dev/null/here"], "error: Can't write to --out /dev/null/here"),
    ],
)
def test_bad_options_end_the_run_with_a_sentence(options, sentence):
    done = simulate(*options)
    assert done.returncode != 0
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


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
        "strategies": "eclm", "out": str(tmp_path),
    }  # fmt: skip
    run_in_process(server_app, client_app, 3, run_config=run_config)
    assert len(rows(tmp_path)) == 2 * 3
