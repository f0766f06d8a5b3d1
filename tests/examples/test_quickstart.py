"""The quickstart with FedAvg, the diff that docs/migrating.md shows, and the same with ECLM."""

import importlib
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from safetensors.torch import load_file
from torch import nn

from eclm_flower import modularize
from eclm_flower.federation import InProcessGrid

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FEDAVG, ECLM = EXAMPLES / "quickstart-fedavg", EXAMPLES / "quickstart-eclm"
SIDES = ["server_app.py", "client_app.py"]
PAGE = (ROOT / "docs" / "migrating.md").read_text()
DIFFS = dict(zip(SIDES, re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL), strict=True))


def side(diff: str, keep: str) -> str:
    """Apply a diff (keep="+") or take it back (keep="-")."""
    return "".join(
        line[1:] or "\n" for line in diff.splitlines(keepends=True) if line[0] in (" ", keep, "\n")
    )


@pytest.mark.parametrize("name", SIDES)
def test_the_diff_of_the_docs_turns_one_example_into_the_other(name):
    before, after = ((folder / "quickstart" / name).read_text() for folder in (FEDAVG, ECLM))
    assert side(DIFFS[name], "-") == before
    assert side(DIFFS[name], "+") == after


@pytest.mark.parametrize("name", SIDES)
def test_at_most_ten_lines_a_side_are_changed_or_added(name):
    added = [line for line in DIFFS[name].splitlines() if line.startswith("+") and line[1:].strip()]
    assert 0 < len(added) <= 10


def test_nothing_else_differs_but_the_name():
    files = {path.relative_to(FEDAVG) for path in FEDAVG.rglob("*.py")}
    assert files == {path.relative_to(ECLM) for path in ECLM.rglob("*.py")}
    for path in files - {Path("quickstart") / name for name in SIDES}:
        assert (FEDAVG / path).read_text() == (ECLM / path).read_text()
    fedavg = (FEDAVG / "pyproject.toml").read_text()
    renamed = fedavg.replace("quickstart-fedavg", "quickstart-eclm").replace("FedAvg", "ECLM")
    assert (ECLM / "pyproject.toml").read_text() == renamed


@pytest.mark.filterwarnings("ignore:The narrowest selector")
def test_the_network_comes_out_as_the_page_says():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    net, trained = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    model = modularize(trained, modules_per_layer=4, example_input=torch.zeros(1, 4))
    exec(code, {"net": net, "arrays": ArrayRecord(model.state_dict())})
    assert torch.equal(net[0].weight, trained[0].weight)


@pytest.fixture(params=[FEDAVG, ECLM], ids=["FedAvg", "ECLM"])
def example(request, monkeypatch):
    """Import an example's two apps."""
    monkeypatch.syspath_prepend(request.param)
    yield tuple(
        importlib.import_module(f"quickstart.{side}") for side in ("server_app", "client_app")
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "quickstart"]:
        del sys.modules[name]


def test_it_runs_before_and_after(example, tmp_path, caplog):
    server, client = example
    out = tmp_path / "model.safetensors"
    config = {"num-server-rounds": 3, "local-epochs": 2, "learning-rate": 0.05, "out": str(out)}
    shares = [0.125, 0.25, 0.5, 1.0]
    grid = InProcessGrid(
        client.app,
        4,
        run_config=config,
        node_config={device: {"module-share": share} for device, share in enumerate(shares)},
    )
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    with caplog.at_level(logging.INFO, logger="flwr"):
        server.app(grid, context)
    prefix = "" if server.__file__.startswith(str(FEDAVG)) else "body."
    net = server.task.Net()
    net.load_state_dict(
        {
            key.removeprefix(prefix): tensor
            for key, tensor in load_file(out).items()
            if key.startswith(prefix)
        }
    )
    accuracy, examples = server.task.test_loop(
        net, server.task.DataLoader(server.task.digits(1), batch_size=64)
    )
    assert accuracy > 0.8, f"of {examples} digits"  # chance is a tenth
