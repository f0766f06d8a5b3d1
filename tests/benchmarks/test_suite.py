"""The suite runs its benchmarks as they run alone."""

import subprocess
import sys
from importlib import import_module
from inspect import signature

import pandas as pd
import pytest

from benchmarks.__main__ import SUITE, main


@pytest.mark.parametrize("name", SUITE)
def test_every_benchmark_has_the_options_it_is_given(name: str):
    known = signature(import_module(f"benchmarks.{name}").main).parameters
    given = [option for option in SUITE[name] if option.startswith("--")]
    renamed = {"rounds": "number_of_rounds"}
    for option in [*given, "--out"]:
        parameter = option.removeprefix("--").replace("-", "_")
        assert parameter in known or renamed.get(parameter) in known, option


def test_rows_and_the_machine_are_left_in_the_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(SUITE, "derivation", ["--devices", "20", "--sample", "2", "--repeats", "1"])
    main(tmp_path, "derivation")
    assert len(pd.read_csv(tmp_path / "derivation.csv")) > 0
    assert "cores" in (tmp_path / "machine.txt").read_text()
    assert "python -m benchmarks.derivation" in capfd.readouterr().out


def test_what_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(SUITE, "derivation", ["--no-such-option"])
    with pytest.raises(SystemExit, match="Failed: derivation"):
        main(tmp_path, "derivation")


def test_an_unknown_benchmark_is_refused(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--out", str(tmp_path), "--only", "speed"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "got speed" in done.stderr
