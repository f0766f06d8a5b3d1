"""Every division and rate is tried, judged on what nothing trained on, beside a control."""

import pandas as pd
import pytest

from benchmarks import delta_stage

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")


def test_every_division_is_tried_at_every_rate_and_so_are_sub_models_alone(tmp_path, capsys):
    delta_stage.main(
        dataset="digits",
        resolution=0,
        views="plain,negative",
        epochs=10,
        enhancing_epochs="1,6",
        delta_shares="0.5",
        delta_rates="1,3",
        seeds="0",
        out=tmp_path / "rows.csv",
    )
    frame = pd.read_csv(tmp_path / "rows.csv")
    frame = frame.set_index(["enhancing_epochs", "delta_epochs", "rate"])["accuracy"]
    # Half of one epoch is none: the control twice.
    assert list(frame.index) == [(1, 0, 0), (1, 0, 0), (6, 0, 0), (6, 3, 1), (6, 3, 3)]
    assert frame[1, 0, 0].nunique() == 1, "the control starts where the search does"
    assert frame[6].nunique() == 3
    printed = capsys.readouterr().out
    assert "no delta modules" in printed
    assert "3 + 3" in printed
