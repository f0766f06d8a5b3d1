"""Every device is tested in every way, and the table says so."""

import pandas as pd
import pytest

from benchmarks import deltas

pytestmark = pytest.mark.filterwarnings("ignore:The narrowest selector")


def test_every_device_is_tested_in_every_way(tmp_path, capsys):
    options = {"dataset": "digits", "devices": 5, "epochs": 1, "enhancing_epochs": 1, "seeds": "0"}
    deltas.main(**options, views="plain,negative", whole_models=tmp_path, out=tmp_path / "rows.csv")
    frame = pd.read_csv(tmp_path / "rows.csv")
    told = {"nested", "true", "wrong", *deltas.INFERRED}
    for _, rows in frame.groupby(["share", "device"]):
        assert set(rows["told"]) == told
        assert len(rows) == len(told)
    assert set(frame["share"]) == {0.25, 0.125}
    assert set(frame["scale"]) <= {0.0, 0.5, 1.0}
    assert frame[frame["told"].isin(deltas.INFERRED)]["right"].notna().all()
    assert "local losses" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*-0.safetensors"))) == 1


def test_the_worst_decile_is_the_mean_of_the_worst_tenth():
    assert deltas.worst_decile(pd.Series([0.9] * 18 + [0.2, 0.4])) == pytest.approx(0.3)
    assert deltas.worst_decile(pd.Series([0.9, 0.5])) == 0.5
