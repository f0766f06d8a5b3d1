"""The README's two diffs are applied, and the app runs before and after."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from flwr.app import Context
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eclm_flower.federation import InProcessGrid

README = Path(__file__).parents[1] / "README.md"
SERVER, CLIENT = re.findall(r"```diff\n(.*?)```", README.read_text(), flags=re.DOTALL)


def side(diff: str, keep: str) -> str:
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in ("", " ", keep))


@pytest.fixture
def task(monkeypatch):
    """The user's own module: a network, data and loops."""
    task = types.ModuleType("task")
    torch.manual_seed(0)
    y = torch.randint(0, 4, (200,))
    x = torch.randn(200, 8) + 3 * torch.eye(8)[y]

    def load_data(context: Context) -> DataLoader:
        part = slice(context.node_config["partition-id"], None, 4)
        return DataLoader(TensorDataset(x[part], y[part]), batch_size=16)

    def train_loop(net: nn.Module, loader: DataLoader) -> tuple[float, int]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for features, labels in loader:
            loss = nn.functional.cross_entropy(net(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        task.trained.append(sum(p.numel() for p in net.parameters()))
        return float(loss.detach()), len(loader.dataset)

    def test_loop(net: nn.Module, loader: DataLoader) -> tuple[float, int]:
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in loader)
        task.accuracy.append(right / len(loader.dataset))
        return task.accuracy[-1], len(loader.dataset)

    task.accuracy = []
    task.trained = []
    task.EXAMPLE = x[:1]
    task.Net = lambda: nn.Sequential(
        nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    task.proxy_data, task.proxy_labels = TensorDataset(x, y), y
    task.load_data, task.train_loop, task.test_loop = load_data, train_loop, test_loop
    monkeypatch.setitem(sys.modules, "task", task)
    return task


@pytest.mark.parametrize("keep", ["-", "+"], ids=["FedAvg", "ECLM"])
def test_the_app_runs_before_and_after_the_diff(keep, task):
    server, client = {}, {}
    exec(side(SERVER, keep), server)
    exec(side(CLIENT, keep), client)
    grid = InProcessGrid(client["app"], 4)
    server["app"](grid, Context(run_id=1, node_id=0, node_config={}, state=None, run_config={}))
    assert (len(task.trained), len(task.accuracy)) == (3 * 2, 3 * 4)
    assert min(task.accuracy[-4:]) > 0.5  # chance is a quarter
    whole = sum(p.numel() for p in task.Net().parameters())
    assert all((size == whole) == (keep == "-") for size in task.trained)


@pytest.mark.parametrize("diff", [SERVER, CLIENT], ids=["server", "client"])
def test_at_most_ten_lines_a_side_change(diff):
    added = [line for line in diff.splitlines() if line.startswith("+") and line[1:].strip()]
    assert 0 < len(added) <= 10
