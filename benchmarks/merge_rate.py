"""How fast returned sub-models are merged, against plain additions and Flower's own average.

100 replies of 40 MB sub-models into a cloud model of 100 MB (residual blocks, whose modules lie
along both axes of convolutions, and perceptrons, the same for linear layers)::

    python -m benchmarks.merge_rate

Timed in turn, repetition after repetition, and compared within a repetition:

- *add*: ``total += reply`` in numpy, on buffers of a sub-model's size. The limit set by memory;
- *Flower*: its `aggregate_arrayrecords` on the content of the same replies. All devices hold as
  many modules of each layer, so it takes these records for those of one model;
- *Flower, by tensor*: the same on the same sub-models as a FedAvg app sends them, one array a
  tensor. How large arrays are makes a difference to it: small temporary ones stay in the cache;
- *ECLM*: `ECLM.aggregate_train` on the same replies: matched, decoded, checked, merged.

numpy and Flower add in one thread; ECLM takes torch's default, a thread a core, or ``--threads``.
On a busy machine give it one, too: two that wait for each other say nothing of either; then
processor time compares better than seconds. Buffers and
replies are ``distinct`` ones in turn, more than the caches hold. *Memory* is measured
in a process of its own, where each reply is made when the strategy takes it, as if it arrived then.
It is the peak above the process before it had the cloud model's arrays; the structure that the user
gave (`ModularModel`, whose weights aren't used) is not in it. Marks: at least 0.5 of *add*, 3 times
*Flower*; memory of twice the cloud model and one reply.
"""

from __future__ import annotations

import multiprocessing
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision.models.resnet import BasicBlock

from benchmarks.costs import resident
from benchmarks.process_memory import memory_now
from benchmarks.versioned_rows import RESULTS, with_spread, write_rows
from eclm_flower import ECLM, profile, receive, reply
from eclm_flower.adaptation import DeviceProfile
from eclm_flower.federation import InProcessGrid
from eclm_flower.modular import ModularModel, Selection, modularize

MODULES = 16
# Modules held of each layer: 40 % of the bytes.
HELD = (7, 6, 6, 7, 6)
FEATURES = 1024
MARKS = {"add": 0.5, "Flower": 3.0, "Flower, by tensor": 3.0}


class BlocksInARow(nn.Module):
    """Convolutional blocks, then perceptrons: 100 MB, or less with fewer features."""

    def __init__(self, features: int = FEATURES) -> None:
        super().__init__()
        channels, hidden = features // 2, 5 * features // 2
        self.convolutions = nn.Sequential(*(BasicBlock(channels, channels) for _ in range(3)))
        self.widen = nn.Linear(channels, features)
        self.perceptrons = nn.ModuleList(
            nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, features))
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B, channels, y, x]`` to ``[B, features]``."""
        x = self.widen(self.convolutions(x).mean(dim=(2, 3)))
        for perceptron in self.perceptrons:
            x = x + perceptron(x)
        return x


def build_model(features: int = FEATURES) -> ModularModel:
    """Build the cloud model: five module layers."""
    torch.manual_seed(0)
    example = torch.zeros(1, features // 2, 2, 2)
    return modularize(
        BlocksInARow(features), modules_per_layer=MODULES, example_input=example, selector_share=0.1
    )


class Chosen(ECLM):
    """ECLM whose devices get given modules."""

    chosen: list[dict[str, list[int]]]

    def derive(self, profile: DeviceProfile, server_round: int) -> Selection:
        """Give devices the choices in turn."""
        return self.chosen[profile.device % len(self.chosen)]


def choices(model: ModularModel, number: int) -> list[dict[str, list[int]]]:
    """Choose modules at random, equally many in all choices."""
    rng = np.random.default_rng(0)
    return [
        {
            layer: sorted(rng.choice(MODULES, held, replace=False).tolist())
            for layer, held in zip(model.layers, HELD, strict=True)
        }
        for _ in range(number)
    ]


class Federation:
    """The cloud's side of a round whose devices have trained.

    Parameters
    ----------
    devices : int
        Replies in a round.
    distinct : int
        Different replies; devices return them in turn.
    features : int
        Size of the model.
    """

    def __init__(self, devices: int, distinct: int, features: int = FEATURES) -> None:
        self.model = build_model(features)
        self.distinct = distinct
        self.before = memory_now()
        self.arrays = ArrayRecord(self.model.state_dict())
        self.strategy = Chosen(
            self.model, fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=devices
        )
        self.strategy.chosen = choices(self.model, distinct)
        self.grid = InProcessGrid(_telling(self.model), devices)
        self.contents: list[RecordDict] = []  # of the different replies
        self.by_tensor: list[RecordDict] = []  # the same sub-models, as a FedAvg app returns them
        self._round = 0

    def ask(self) -> list[Message]:
        """Begin a round; return the requests, emptied as soon as replies to them are known."""
        self._round += 1
        asked = self.strategy.configure_train(self._round, self.arrays, ConfigRecord(), self.grid)
        requests = []
        for request in asked:
            request.metadata.__dict__["_message_id"] = uuid.uuid4().hex  # as engines do
            if len(self.contents) < self.distinct:
                self._train(request)
            request.content = RecordDict()
            requests.append(request)
        return requests

    def _train(self, request: Message) -> None:
        sub_model = receive(request, self.model)
        with torch.no_grad():
            for parameter in sub_model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        content = reply(request, sub_model, num_examples=10 + len(self.contents)).content
        floats = {k: v for k, v in sub_model.state_dict().items() if v.is_floating_point()}
        self.contents.append(content)
        self.by_tensor.append(
            RecordDict({"arrays": ArrayRecord(floats), "metrics": content["metrics"]})
        )

    def replies(self, requests: list[Message], *, fresh: bool = False) -> Iterator[Message]:
        """Answer requests, one when it is asked for; `fresh`: in memory of its own."""
        for number, request in enumerate(requests):
            content = self.contents[number % len(self.contents)]
            yield Message(_copied(content) if fresh else content, reply_to=request)

    def merge(self, replies: Iterator[Message]) -> None:
        """Merge what came."""
        arrays, metrics = self.strategy.aggregate_train(self._round, replies)
        if arrays is None or metrics["eclm-merged"] != metrics["eclm-asked"]:
            raise RuntimeError(f"Expected all replies to be merged, got {metrics}.")
        self.arrays = arrays  # as the next round gets them


def _telling(model: ModularModel) -> ClientApp:
    """Make a ClientApp that only tells its profile."""
    app = ClientApp()

    @app.query()
    def query(msg: Message, context: Context) -> Message:
        data = torch.randn(4, *model.example_input.shape[1:])
        return profile(msg, context, model, [data])

    return app


def _copied(content: RecordDict) -> RecordDict:
    copied = RecordDict(dict(content))
    for name, arrays in content.array_records.items():
        copied[name] = ArrayRecord(
            {
                key: Array(a.dtype, a.shape, a.stype, bytes(memoryview(a.data)))
                for key, a in arrays.items()
            }
        )
    return copied


def sizes(federation: Federation) -> tuple[float, float]:
    """Bytes of the cloud model's values, and of a reply's."""

    def values(arrays: ArrayRecord) -> float:
        return float(sum(np.prod(a.shape) * np.dtype(a.dtype).itemsize for a in arrays.values()))

    sub_model = federation.by_tensor[0]["arrays"]
    return values(federation.arrays), values(sub_model)


def measure_rates(
    replies: int, distinct: int, repetitions: int, features: int = FEATURES, threads: int = 0
) -> list[dict[str, object]]:
    """Time the three in turn; `threads` of ECLM's, 0: torch's default."""
    if threads:
        torch.set_num_threads(threads)
    federation = Federation(replies, distinct, features)
    federation.ask()
    cloud, size = sizes(federation)
    rng = np.random.default_rng(0)
    buffers = [rng.random(int(size) // 4, dtype=np.float32) for _ in range(distinct)]
    total = np.zeros_like(buffers[0])

    def add() -> None:
        for number in range(replies):
            np.add(total, buffers[number % distinct], out=total)

    def flower(contents: list[RecordDict]) -> None:
        records = [contents[number % distinct] for number in range(replies)]
        aggregate_arrayrecords(records, "num-examples")

    rows: list[dict[str, object]] = []
    for repetition in range(repetitions):
        requests = federation.ask()
        works: dict[str, Callable[[], None]] = {
            "add": add,
            "Flower": lambda: flower(federation.contents),
            "Flower, by tensor": lambda: flower(federation.by_tensor),
            "ECLM": lambda asked=requests: federation.merge(federation.replies(asked)),
        }
        names = list(works)
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            start, processor = time.perf_counter(), time.process_time()
            works[name]()
            seconds = time.perf_counter() - start
            processor = time.process_time() - processor
            rows.append(
                {
                    "measure": name,
                    "repetition": repetition,
                    "replies": replies,
                    "threads": torch.get_num_threads() if name == "ECLM" else 1,
                    "cloud_mb": cloud / 1e6,
                    "reply_mb": size / 1e6,
                    "seconds": seconds,
                    "mb_per_second": replies * size / seconds / 1e6,
                    "processor_seconds": processor,
                }
            )
    return rows


def measure_memory(replies: int, repetition: int, features: int = FEATURES) -> dict[str, object]:
    """Measure the peak of memory while replies are merged as they arrive."""
    torch.set_num_threads(1)
    federation = Federation(replies, 1, features)
    peaks = []
    for _ in range(2):  # in the first round updates wait until enough are known to judge them
        requests = federation.ask()
        held = memory_now()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        federation.merge(federation.replies(requests, fresh=True))
        peaks.append(resident("VmHWM"))
    cloud, size = sizes(federation)
    # The reply that the copies are made from is the benchmark's own, in both forms.
    own = federation.before + 2 * size
    return {
        "measure": "memory",
        "repetition": repetition,
        "replies": replies,
        "cloud_mb": cloud / 1e6,
        "reply_mb": size / 1e6,
        "before_merge_mb": (held - own) / 1e6,
        "first_peak_mb": (peaks[0] - own) / 1e6,
        "peak_mb": (peaks[1] - own) / 1e6,
    }


def main(
    replies: Annotated[int, typer.Option(help="Replies to merge.")] = 100,
    distinct: Annotated[int, typer.Option(help="Different ones among them.")] = 12,
    repetitions: Annotated[int, typer.Option(help="Repetitions of all measurements.")] = 5,
    features: Annotated[int, typer.Option(help="Size of the model; 1024: 100 MB.")] = FEATURES,
    threads: Annotated[int, typer.Option(help="Of ECLM; 0: torch's default.")] = 0,
    version: Annotated[str, typer.Option(help="Of the code, noted in the rows.")] = "after",
    out: Annotated[Path, typer.Option(help="A CSV file.")] = RESULTS / "merge_rate.csv",
) -> None:
    """Measure rate and memory of a merge."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        rows = processes.submit(
            measure_rates, replies, distinct, repetitions, features, threads
        ).result()
        for repetition in range(min(3, repetitions)):
            rows.append(processes.submit(measure_memory, replies, repetition, features).result())
    frame = pd.DataFrame(rows)
    frame.insert(0, "version", version)
    write_rows(out, frame)
    show(frame)


def show(frame: pd.DataFrame) -> None:
    """Print rates, ratios within repetitions, and memory."""
    first = frame.iloc[0]
    console = Console(width=100)
    console.print(
        f"{first['replies']} replies of {first['reply_mb']:.1f} MB into "
        f"{first['cloud_mb']:.1f} MB ({first['version']}): median (smallest-largest)"
    )
    rates = frame.pivot(index="repetition", columns="measure", values="mb_per_second")
    table = Table(box=None, header_style="bold", pad_edge=False)
    processor = frame.pivot(index="repetition", columns="measure", values="processor_seconds")
    for heading in ("", "GB/s", "ECLM is times this", "by processor time", "mark"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in ("ECLM", *MARKS):
        ratio = with_spread((rates["ECLM"] / rates[name]).dropna()) if name in MARKS else ""
        busy = with_spread((processor[name] / processor["ECLM"]).dropna()) if name in MARKS else ""
        mark = f">= {MARKS[name]:g}" if name in MARKS else ""
        table.add_row(name, with_spread(rates[name].dropna() / 1e3), ratio, busy, mark)
    console.print(table)
    memory = frame[frame["measure"] == "memory"]
    limit = 2 * first["cloud_mb"] + first["reply_mb"]
    console.print(
        f"memory: {with_spread(memory['before_merge_mb'], '.0f')} MB before the merge, at most "
        f"{with_spread(memory['peak_mb'], '.0f')} MB in it (mark: <= {limit:.0f}); in the very "
        f"first round {with_spread(memory['first_peak_mb'], '.0f')} MB"
    )


if __name__ == "__main__":
    typer.run(main)
