"""docs/operations.md says what is true."""

import re
from pathlib import Path

from federated import build_model, eclm_app, grid_of
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp

from eclm_flower.federation.phase import Phase

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, *on_devices = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    model = build_model()
    names = {"model": model, "grid": grid_of(eclm_app()), "arrays": ArrayRecord(model.state_dict())}
    exec(code.replace("num_rounds=100", "num_rounds=2"), names)
    assert list((tmp_path / "checkpoints").glob("round-000002/*"))
    for on_device in on_devices:
        exec(on_device, {"app": ClientApp(), "model": model})


def test_every_metric_of_a_round_is_explained():
    phase = Phase.that_asks_nobody()
    for metric in [*phase.metrics(), *phase.traffic_metrics()]:
        assert f"`{metric}`" in PAGE or f"{metric} =" in PAGE, metric
