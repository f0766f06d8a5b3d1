import pandas as pd
import pytest

from benchmarks import training_round


def run_tiny(out):
    training_round.main(devices=3, model="mlp", rounds=1, engines="in-process", out=out)


def test_a_row_a_round_with_both_times(tmp_path, capsys):
    run_tiny(tmp_path / "rows.csv")
    rows = pd.read_csv(tmp_path / "rows.csv")
    assert list(rows["round"]) == [1, 2]
    assert (rows[["round_seconds", "loop_seconds"]] > 0).all(axis=None)
    assert "round / loop" in capsys.readouterr().out


def test_a_loop_of_other_steps_is_no_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(training_round, "TRAIN", training_round.TRAIN + 1)
    with pytest.raises(AssertionError, match="other steps"):
        run_tiny(tmp_path / "rows.csv")
