"""Models of many devices trained on a GPU, each step captured once and then replayed.

A training step of a small model is hundreds of kernels of a few microseconds, and what takes time
is launching them. Here the step of every device's model is captured as a CUDA graph, on buffers
that stay in place; from then on a step is one launch. Models stay apart, as on real devices: each
has a graph, and a stream, of its own, so that the GPU works on several at a time.

What is computed is what `strategies.local_training.train` computes: every device draws the batches
it would draw alone. Batches that are short are filled with samples that weigh nothing, because a
graph has one size; so batch norm has to be frozen, as in `benchmarks.stacked`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.stacked import Plan, StackingError, stackable
from strategies.local_training import Training

_MOMENTUM = 0.9  # as in `strategies.local_training.train`
_WARM_UP = 2  # steps: libraries choose kernels and allocate what must not be captured


def train_captured(
    models: Sequence[nn.Module],
    data: Sequence[TensorDataset],
    settings: Training,
    generators: Sequence[torch.Generator],
    *,
    streams: int = 25,
) -> list[float]:
    """Train models, in place, each on its own data, where they are.

    On a CPU, steps are computed instead of replayed.

    Parameters
    ----------
    models : sequence of nn.Module
        One a device, of any shapes; map inputs ``[B, ...]`` to logits ``[B, C]``.
    data : sequence of TensorDataset
        ``(x [n, ...], y [n])`` of each, where its model is.
    settings : Training
        Learning rate, batch size, epochs.
    generators : sequence of torch.Generator
        Of the order of samples, one a device.
    streams : int (default: 25)
        Most devices that the GPU works on at a time.

    Returns
    -------
    list of float
        The mean loss of each in its last epoch.

    Raises
    ------
    StackingError
        A model is of a kind for which this is not what training alone does; see `stackable`.
    """
    for model in models:
        model.train()
        if not stackable(model):
            raise StackingError("Expected plain models without dropout, their batch norm frozen.")
    plan = Plan.drawn([len(of_device) for of_device in data], settings, generators)
    where = next(models[0].parameters()).device
    rows, weights = plan.local_rows.to(where), plan.weights.to(where)
    losses = torch.zeros(len(rows), len(models), device=where)
    steps = [
        _Step(models[number], data[number], settings.batch_size, settings.learning_rate)
        for number in plan.order
    ]
    with _replayable(steps, streams) as replays:
        for number, training in enumerate(plan.training):
            for place in range(training):
                step, (replay, stream) = steps[place], replays[place]
                with torch.cuda.stream(stream):  # of nothing, on a CPU
                    step.rows.copy_(rows[number, place])
                    step.weights.copy_(weights[number, place])
                    replay()
                    losses[number, place].copy_(step.loss)
    return plan.losses_of_last_epoch(losses.cpu())


class _Step:
    """A training step of one device's model.

    Attributes
    ----------
    rows, weights : Tensor
        ``[B]``: the batch, and 1 / its size for its samples, 0 for what fills it. Zero at first: a
        step then changes nothing.
    loss : Tensor
        ``[]``, of the last step.
    """

    def __init__(
        self, model: nn.Module, data: TensorDataset, batch_size: int, learning_rate: float
    ) -> None:
        self.model, (self.x, self.y) = model, data.tensors
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.velocity = [torch.zeros_like(p) for p in self.parameters]
        self.rows = torch.zeros(batch_size, dtype=torch.long, device=self.x.device)
        self.weights = torch.zeros(batch_size, device=self.x.device)
        self.loss = torch.zeros((), device=self.x.device)
        self.learning_rate = learning_rate

    def __call__(self) -> None:
        logits = self.model(self.x[self.rows])
        each = F.cross_entropy(logits, self.y[self.rows], reduction="none")
        loss = (each * self.weights).sum()
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            torch._foreach_mul_(self.velocity, _MOMENTUM)
            torch._foreach_add_(self.velocity, gradients)
            torch._foreach_add_(self.parameters, self.velocity, alpha=-self.learning_rate)
            self.loss.copy_(loss)


@contextmanager
def _replayable(
    steps: Sequence[_Step], streams: int
) -> Iterator[list[tuple[Callable[[], None], torch.cuda.Stream | None]]]:
    """Capture steps: how to replay each, and on which stream. Waits for all of them at the end."""
    if steps[0].x.device.type != "cuda":
        yield [(step, None) for step in steps]
        return
    device = steps[0].x.device
    side = [torch.cuda.Stream(device) for _ in range(min(streams, len(steps)))]
    replays: list[tuple[Callable[[], None], torch.cuda.Stream | None]] = []
    torch.cuda.synchronize(device)
    was_enabled = gc.isenabled()
    gc.disable()  # nothing of CUDA may be freed in the middle of a capture
    try:
        for number, step in enumerate(steps):
            stream = side[number % len(side)]
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP if number == 0 else 0):
                    step()
                graph = torch.cuda.CUDAGraph()
                # Not `torch.cuda.graph`, which collects garbage and empties caches each time.
                graph.capture_begin()
                step()
                graph.capture_end()
            replays.append((graph.replay, stream))
    finally:
        if was_enabled:
            gc.enable()
    yield replays
    torch.cuda.synchronize(device)
