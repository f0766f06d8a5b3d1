"""The search tries every pair of its grid, judges on what nothing trained on, and has a control."""

import pandas as pd
import pytest

from benchmarks import delta_stage

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")


def test_every_pair_is_tried_and_so_are_sub_models_alone(tmp_path, capsys):
    delta_stage.main(
        dataset="digits",
        resolution=0,
        views="plain,negative",
        epochs=20,
        enhancing_epochs=1,
        delta_epochs="0,2",
        delta_rates="1,3",
        seeds="0",
        out=tmp_path / "rows.csv",
    )
    frame = pd.read_csv(tmp_path / "rows.csv").set_index(["epochs", "rate"])["accuracy"]
    assert list(frame.index) == [(0, 0), (0, 1), (0, 3), (2, 1), (2, 3), (0, 0), (2, 0)]
    assert frame[0, 1] == frame[0, 3] == frame[0, 0].iloc[0], "untrained, they change nothing"
    assert frame[0, 0].nunique() == 1, "the control starts where the search does"
    assert frame[2, 0] != frame[0, 0].iloc[0]
    printed = capsys.readouterr().out
    assert "no delta modules" in printed
    assert "rate 3" in printed
