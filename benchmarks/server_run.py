"""One run on Flower's simulation engine whose devices return what they got: for `server_round`.

A module of its own, because Ray's workers import it.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.simulation import run_simulation
from torch import Tensor, nn

from benchmarks.costs import resident
from benchmarks.process_memory import memory_now
from eclm_flower import ECLM, Budget, modularize, profile, receive, reply
from eclm_flower.modular import ModularModel

FEATURES, HIDDEN, PERCEPTRONS, SHARE = 128, 1024, 4, 0.25
RAY_CPUS = 2


class Perceptrons(nn.Module):
    """4 MB of residual perceptrons."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, FEATURES))
            for _ in range(PERCEPTRONS)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, 128]`` to the same shape."""
        for block in self.blocks:
            x = x + block(x)
        return x


@lru_cache(maxsize=1)
def model_of_process() -> ModularModel:
    """Build the cloud model, once per process."""
    torch.manual_seed(0)
    model = modularize(Perceptrons(), example_input=torch.zeros(1, FEATURES))
    torch.nn.init.normal_(model.selector.heads.weight)  # else nobody is asked for importance
    return model


eclm_app, fedavg_app = ClientApp(), ClientApp()


@eclm_app.query()
def query(msg: Message, context: Context) -> Message:
    """Tell a budget of a quarter of the modules; importance for random data."""
    model = model_of_process()
    seed = int(context.node_config["partition-id"])
    data = torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(seed))
    budget = Budget.share_of(model.costs, communication_bytes=SHARE)
    return profile(msg, context, model, [data], budget=budget)


@eclm_app.train()
def train_eclm(msg: Message, context: Context) -> Message:
    """Open the sub-model and return it."""
    return reply(msg, receive(msg, model_of_process()), num_examples=10)


@fedavg_app.train()
def train_fedavg(msg: Message, context: Context) -> Message:
    """Open the model and return it."""
    body = model_of_process().body
    body.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    metrics = MetricRecord({"num-examples": 10})
    content = RecordDict({"arrays": ArrayRecord(body.state_dict()), "metrics": metrics})
    return Message(content, reply_to=msg)


def run(
    name: str,
    devices: int,
    *,
    rounds: int,
    repetition: int,
    window: int | None,
    budget_every: int = 1,
) -> list[dict[str, Any]]:
    """Run a strategy in this process; measure its rounds and this process's memory.

    Parameters
    ----------
    name : {"ECLM", "FedAvg"}
        The strategy.
    devices : int
        All are asked to train in every round.
    rounds : int
        Rounds; the first, in which Ray starts and importance is told, is not reported.
    repetition : int
        Noted in the rows.
    window : int, optional
        Of ECLM: requests under way at a time.
    budget_every : int (default: 1)
        Of ECLM: rounds after which a device is asked for its budget again.
    """
    torch.set_num_threads(1)  # two would wait for each other where workers need the cores
    model = model_of_process()
    ends: list[float] = []
    merged: list[int] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        everyone = {
            "fraction_train": 1.0,
            "fraction_evaluate": 0.0,
            "min_available_nodes": devices,
        }
        strategy: Strategy
        if name == "ECLM":
            options = {} if window is None else {"window": window}
            strategy = ECLM(model, budget_every=budget_every, **everyone, **options)
            initial = model.state_dict()
        else:
            strategy, initial = FedAvg(**everyone), model.body.state_dict()

        def end_of_round(server_round: int, arrays: ArrayRecord) -> None:
            ends.append(time.perf_counter())

        result = strategy.start(
            grid, ArrayRecord(initial), num_rounds=rounds, evaluate_fn=end_of_round
        )
        merged.extend(
            int(metrics["eclm-merged"])  # type: ignore[arg-type]
            for metrics in result.train_metrics_clientapp.values()
            if "eclm-merged" in metrics
        )

    idle = memory_now()
    os.environ.update(OMP_NUM_THREADS="1", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray_files:
        run_simulation(
            server_app,
            eclm_app if name == "ECLM" else fedavg_app,
            num_supernodes=devices,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {
                    "_temp_dir": ray_files,
                    "num_cpus": RAY_CPUS,
                    "include_dashboard": False,
                    "logging_level": "error",
                    "log_to_driver": False,
                },
            },
        )
    peak = resident("VmHWM")
    if len(ends) != rounds + 1 or any(number != devices for number in merged):
        raise RuntimeError(f"Expected {rounds} rounds of {devices} replies, got {merged}.")
    return [
        {
            "strategy": name,
            "devices": devices,
            "window": window,
            "budget_every": budget_every if name == "ECLM" else None,
            "repetition": repetition,
            "round": number,
            "seconds": ends[number] - ends[number - 1],
            "idle_mb": idle / 1e6,
            "peak_mb": peak / 1e6,
            "load": os.getloadavg()[0],
        }
        for number in range(2, rounds + 1)
    ]
