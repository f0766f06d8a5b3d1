"""What a round of ECLM really sends, against what it must send, and what the rest is.

Three cloud models with sub-models of a quarter of their modules, on devices with and without a
module cache, in process; training is noise added to every parameter. In each round half of the
devices train and half are evaluated (a draw of its own; ``--no-evaluation`` leaves it out)::

    python -m benchmarks.round_bytes

*Must*: 4 bytes for every value of the chosen modules and of the shared part, in both directions;
down to a device with a cache only those that have changed since it got them. Modules that a device
has trained have always changed, so in rounds without evaluation a cache has nothing to spare.
*Overhead*: everything else, as a share of that, and by cause, the framing of the records included:

- *query*: what the cloud asks and devices tell of themselves, the greeting of new nodes included;
- *selector*: the selector's arrays, sent once to every device;
- *config*: what stands beside the arrays in training: selection, settings, metrics;
- *framing*: names, shapes and headers of the arrays;
- *surplus*: values that need not have been sent.

Rounds are the first, in which all devices are new, and the mean of the later ones. Mark: 2 %.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.versioned_rows import RESULTS, write_rows
from eclm_flower import ECLM, Budget, profile, receive, reply, selection_of
from eclm_flower.federation import InProcessGrid, MeteredGrid, content_bytes
from eclm_flower.federation.cache import ModuleCache
from eclm_flower.modular import ModularModel, modularize
from simulations.models import build_model

#: Name -> model of the simulations, shape of a sample, classes.
MODELS = {
    "slim CIFAR ResNet": ("slim-resnet", (3, 32, 32), 10),
    "HAPT MLP": ("mlp", (561,), 6),
    "ResNet18": ("resnet18", (3, 32, 32), 10),
}
SHARE, MARK = 0.25, 0.02
CAUSES = ("query", "selector", "config", "framing", "surplus")

Piece = tuple[str, int]  # layer and module; the shared part is ("", 0)


class Federation:
    """Devices that count what passes by.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    devices, rounds : int
        Devices, half of which are asked in each round.
    folder : path, optional
        For the devices' module caches; None: they have none.
    evaluation : bool
        Whether half of the devices are evaluated in each round, too.
    """

    def __init__(
        self, name: str, devices: int, rounds: int, folder: Path | None, *, evaluation: bool
    ) -> None:
        build, shape, classes = MODELS[name]
        torch.manual_seed(0)
        body = build_model(build, shape, classes, seed=0)
        self.model = modularize(body, example_input=torch.zeros(1, *shape))
        # As if trained: equal tensors would travel once, and all scores would be alike.
        _add_noise(body.state_dict().values(), 0.01)
        torch.nn.init.normal_(self.model.selector.heads.weight)
        self.budget = Budget.share_of(self.model.costs, communication_bytes=SHARE)
        self.devices, self.rounds, self.folder = devices, rounds, folder
        self.strategy = ECLM(
            self.model,
            fraction_train=0.5,
            fraction_evaluate=0.5 if evaluation else 0.0,
            min_available_nodes=devices,
        )
        self.rows: list[dict[str, Any]] = []
        self.parts: Counter[str] = Counter()  # bytes of the round that is going on
        self.held: defaultdict[int, dict[Piece, bytes]] = defaultdict(dict)
        self.cut_state: dict[str, Tensor] = {}  # of the cloud model that `pieces` are of
        self.pieces: dict[Piece, tuple[int, bytes]] = {}

    def run(self) -> list[dict[str, Any]]:
        """Run the rounds; return a row for each, in bytes."""
        grid = MeteredGrid(InProcessGrid(self._app(), self.devices))

        def end_of_round(server_round: int, arrays: ArrayRecord) -> None:
            if server_round:
                counted = {name: self.parts[name] for name in ("must", *CAUSES)}
                sent = sum(t.down + t.up for nodes in grid.traffic.values() for t in nodes.values())
                if sent != sum(counted.values()):
                    raise RuntimeError(f"Expected {sent} bytes, counted {counted}.")
                self.rows.append({"round": server_round, "sent": sent, **counted})
            self.parts.clear()
            grid.reset()

        self.strategy.start(
            grid,
            ArrayRecord(self.model.state_dict()),
            num_rounds=self.rounds,
            evaluate_fn=end_of_round,
        )
        return self.rows

    def _app(self) -> ClientApp:
        app = ClientApp()

        @app.query()
        def query(msg: Message, context: Context) -> Message:
            device = _device(context)
            generator = torch.Generator().manual_seed(device)
            shape = self.model.example_input.shape[1:]
            # Around a mean of its own: devices need different modules.
            x = 2 * torch.randn(1, *shape, generator=generator)
            x = x + torch.randn(16, *shape, generator=generator)
            answer = profile(
                msg, context, self.model, [x], budget=self.budget, cache=self._cache(device)
            )
            selector = _array_bytes(msg.content)
            self.parts["selector"] += selector
            self.parts["query"] += content_bytes(msg.content) - selector
            self.parts["query"] += content_bytes(answer.content)
            return answer

        @app.train()
        def train(msg: Message, context: Context) -> Message:
            device = _device(context)
            sub_model = receive(msg, self.model, cache=self._cache(device))
            _add_noise(sub_model.parameters(), 0.001)
            answer = reply(msg, sub_model, num_examples=10)
            self._count(msg, answer, device)
            return answer

        @app.evaluate()
        def evaluate(msg: Message, context: Context) -> Message:
            device = _device(context)
            receive(msg, self.model, cache=self._cache(device))
            answer = reply(msg, num_examples=10, metrics={"accuracy": 0.5})
            self._count(msg, answer, device)
            return answer

        return app

    def _cache(self, device: int) -> ModuleCache | None:
        return self.folder and ModuleCache(self.folder / str(device))

    def _count(self, msg: Message, answer: Message, device: int) -> None:
        state = self.strategy.state
        if state is not self.cut_state:
            self.cut_state, self.pieces = state, dict(_pieces(self.model, state))
        chosen: list[Piece] = [("", 0)]
        chosen += [(layer, m) for layer, modules in selection_of(msg).items() for m in modules]
        held = self.held[device]
        new = [p for p in chosen if self.folder is None or held.get(p) != self.pieces[p][1]]
        held.update({piece: self.pieces[piece][1] for piece in chosen})
        returned = chosen if answer.content.array_records else []
        for content, needed in ((msg.content, new), (answer.content, returned)):
            must = sum(self.pieces[piece][0] for piece in needed)
            arrays, values = _array_bytes(content), _value_bytes(content)
            self.parts["must"] += must
            self.parts["surplus"] += values - must
            self.parts["framing"] += arrays - values
            self.parts["config"] += content_bytes(content) - arrays


def _device(context: Context) -> int:
    return int(context.node_config["partition-id"])


@torch.no_grad()
def _add_noise(tensors: Any, size: float) -> None:
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.add_(size * torch.randn_like(tensor))


def _array_bytes(content: RecordDict) -> int:
    """Bytes that the arrays add to a message."""
    rest = {name: record for name, record in content.items() if not isinstance(record, ArrayRecord)}
    return content_bytes(content) - content_bytes(RecordDict(rest))


def _value_bytes(content: RecordDict) -> int:
    """Bytes of the numbers in the arrays alone."""
    return sum(
        int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize
        for arrays in content.array_records.values()
        for array in arrays.values()
    )


def _pieces(
    model: ModularModel, state: dict[str, Tensor]
) -> Iterator[tuple[Piece, tuple[int, bytes]]]:
    """Cut the cloud model into modules and shared part: bytes and digest of each."""
    shared = {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}
    for layer in model.layers.values():
        packed = [layer.packed(key, shared.pop(key)) for key in layer.axes if key in shared]
        for module in range(layer.modules):
            yield (layer.name, module), _measured([tensor[module] for tensor in packed])
    yield ("", 0), _measured(list(shared.values()))


def _measured(tensors: list[Tensor]) -> tuple[int, bytes]:
    values = torch.cat([tensor.flatten() for tensor in tensors]).numpy()
    return 4 * values.size, hashlib.sha256(values.tobytes()).digest()


def main(
    devices: Annotated[int, typer.Option(help="Devices; half of them are asked a round.")] = 12,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 6,
    only: Annotated[str, typer.Option(help="Models with this in their name.")] = "",
    evaluation: Annotated[bool, typer.Option(help="Evaluate devices in every round.")] = True,
    version: Annotated[str, typer.Option(help="Of the code, noted in the rows.")] = "after",
    out: Annotated[Path, typer.Option(help="A CSV file.")] = RESULTS / "round_bytes.csv",
) -> None:
    """Count the bytes of rounds."""
    rows = []
    for name in MODELS:
        if only not in name:
            continue
        for cache in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                federation = Federation(
                    name, devices, rounds, Path(folder) if cache else None, evaluation=evaluation
                )
                rows += [{"model": name, "cache": cache, **row} for row in federation.run()]
    frame = pd.DataFrame(rows)
    frame.insert(0, "version", version)
    write_rows(out, frame)
    Console(width=120).print(table(frame))


def table(frame: pd.DataFrame) -> Table:
    """Lay out megabytes, and the overhead by cause."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.title = f"{frame['version'].iloc[0]}; overhead in % of what must be sent"
    for heading in ("model", "cache", "round"):
        table.add_column(heading, no_wrap=True)
    for heading in ("MB sent", "must", "overhead", *CAUSES):
        table.add_column(heading, justify="right")
    when = frame["round"].eq(1).map({True: "first", False: "later"})
    columns = ["sent", "must", *CAUSES]
    means = frame.groupby(["model", "cache", when], sort=False)[columns].mean()
    for (model, cache, part), row in means.iterrows():
        overhead = row["sent"] / row["must"] - 1
        table.add_row(
            model,
            "yes" if cache else "no",
            part,
            f"{row['sent'] / 1e6:.2f}",
            f"{row['must'] / 1e6:.2f}",
            f"{overhead:.2%}{' ' if overhead <= MARK else '!'}",
            *(f"{row[cause] / row['must']:.2%}" for cause in CAUSES),
        )
    return table


if __name__ == "__main__":
    typer.run(main)
