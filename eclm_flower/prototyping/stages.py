"""The training stages of the offline stage (paper section 4); `prototype` puts them in order.

Each stage is a generator: it yields its mean loss after every epoch, so that whoever runs it can
show progress, and works in place on the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from eclm_flower.adaptation.derivation import derive
from eclm_flower.adaptation.profile import Budget
from eclm_flower.errors import PrototypingError
from eclm_flower.modular.batch_norm import batch_sizes
from eclm_flower.modular.costs import CostTable
from eclm_flower.modular.deltas import equal_mixture
from eclm_flower.modular.model import ModularModel
from eclm_flower.modular.selection import Selection
from eclm_flower.modular.selector import top_k_gates
from eclm_flower.prototyping.config import PrototypingConfig
from eclm_flower.prototyping.gating_noise import balance_loss, noisy
from eclm_flower.prototyping.proxy import ProxyData

Stage = Iterator[float]
Choice = Callable[[tuple[int, ...], Budget, np.random.Generator], Selection]
"""(sub-tasks of a simulated device, its budget, random numbers) -> its sub-model."""

_DECIMALS = 12  # of importance: what differs by less is the same sub-model


class _Descent:
    """SGD with Nesterov momentum, clipped gradients, warm-up and cosine decay."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        config: PrototypingConfig,
        learning_rate: float,
        steps: int,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.clip_norm = config.clip_norm
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=config.weight_decay,
        )
        warm_up = max(1, steps // 10)

        def rate(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)

    def step(self, loss: Tensor) -> float:
        """Descend one step along the gradient of the loss."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())


def train_whole(
    model: ModularModel, data: ProxyData, config: PrototypingConfig, generator: torch.Generator
) -> Stage:
    """Train the whole model, all gates 1: what a team does before it hears of ECLM."""
    model.train()
    yield from train_network(model.body, data, config, generator)


def train_network(
    network: nn.Module, data: ProxyData, config: PrototypingConfig, generator: torch.Generator
) -> Stage:
    """Train a network as it is, in the mode it is in."""
    sizes = batch_sizes(len(data), config.batch_size, network)
    steps = config.epochs * len(sizes)
    descent = _Descent(network.parameters(), config, config.learning_rate, steps)
    for _ in range(config.epochs):
        losses = [
            descent.step(F.cross_entropy(network(x), y))
            for x, y, _ in data.shuffled(sizes, generator)
        ]
        yield float(np.mean(losses))


def train_end_to_end(
    model: ModularModel, data: ProxyData, config: PrototypingConfig, generator: torch.Generator
) -> Stage:
    """Train modules and selector together: cross-entropy + lambda * load balance (section 4.2)."""
    model.train()
    sizes = batch_sizes(len(data), config.batch_size, model)
    steps = config.epochs * len(sizes)
    descent = _Descent(model.parameters(), config, config.learning_rate, steps)
    done = 0
    for _ in range(config.epochs):
        losses = []
        for x, y, _ in data.shuffled(sizes, generator):
            noise = config.gate_noise * (1 - done / steps)
            clean = model.selector(x)
            noised = {name: noisy(logits, noise, generator) for name, logits in clean.items()}
            loss = F.cross_entropy(model.forward_gated(x, model.gates(noised)), y)
            for name, layer in model.layers.items():
                top_k = model.top_k or layer.modules
                gates = top_k_gates(noised[name], model.top_k)
                balance = balance_loss(clean[name], noised[name], gates, top_k, noise)
                loss = loss + config.balance_weight * balance
            losses.append(descent.step(loss))
            done += 1
        yield float(np.mean(losses))


def enhance_abilities(
    model: ModularModel,
    data: ProxyData,
    targets: dict[str, Tensor],
    config: PrototypingConfig,
    generator: torch.Generator,
) -> Stage:
    """Fine-tune modules and selector: cross-entropy + lambda * KL(P || g) (section 4.3)."""
    model.train()
    sizes = batch_sizes(len(data), config.batch_size, model)
    steps = config.enhancing_epochs * len(sizes)
    descent = _Descent(model.parameters(), config, config.enhancing_learning_rate, steps)
    for _ in range(config.enhancing_epochs):
        losses = []
        for x, y, tasks in data.shuffled(sizes, generator):
            logits = model.selector(x)
            loss = F.cross_entropy(model.forward_gated(x, model.gates(logits)), y)
            loss = loss + config.kl_weight * _distance_to_targets(logits, targets, tasks)
            losses.append(descent.step(loss))
        yield float(np.mean(losses))


def train_selector(
    model: ModularModel,
    data: ProxyData,
    targets: Mapping[str, Tensor],
    config: PrototypingConfig,
    generator: torch.Generator,
) -> Stage:
    """Teach the selector alone which modules each sub-task should use: KL(P || g).

    Layers without targets stay as they are.
    """
    optimizer = torch.optim.Adam(model.selector.parameters(), lr=config.selector_learning_rate)
    sizes = batch_sizes(len(data), config.batch_size, model.selector)
    for _ in range(config.selector_epochs):
        losses = []
        for x, _, tasks in data.shuffled(sizes, generator):
            loss = _distance_to_targets(model.selector(x), targets, tasks)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
        yield float(np.mean(losses))


def _distance_to_targets(
    logits: Mapping[str, Tensor], targets: Mapping[str, Tensor], tasks: Tensor
) -> Tensor:
    """Mean over layers and samples of KL(P[sub-task] || g); KL(g || P) is infinite where P = 0."""
    distances = [
        F.kl_div(
            F.log_softmax(logits[name], dim=1),
            target[tasks].to(logits[name]),
            reduction="batchmean",
        )
        for name, target in targets.items()
    ]
    return torch.stack(distances).mean()


def by_importance(importance: Mapping[str, np.ndarray], costs: CostTable) -> Choice:
    """Choose as ECLM does online, from the selector's mean gates on each sub-task.

    Parameters
    ----------
    importance : dict[str, np.ndarray]
        Layer name -> ``[T, N]``.
    costs : CostTable
        The cloud model's costs.
    """

    @lru_cache(maxsize=4096)
    def derived(own: tuple[bytes, ...], budget: Budget) -> Selection:
        rows = (np.frombuffer(row) for row in own)
        return derive(dict(zip(costs.modules, rows, strict=True)), costs, budget)

    def choose(sub_tasks: tuple[int, ...], budget: Budget, rng: np.random.Generator) -> Selection:
        # Nested sub-models are the same for all sub-tasks, whose importance differs by rounding.
        means = (importance[name][list(sub_tasks)].mean(axis=0) for name in costs.modules)
        return derived(tuple(mean.round(_DECIMALS).tobytes() for mean in means), budget)

    return choose


def train_as_deployed(
    model: ModularModel,
    data: ProxyData,
    choose: Choice,
    config: PrototypingConfig,
    generator: torch.Generator,
    *,
    epochs: int,
) -> Stage:
    """Train sub-models the way devices will hold them (not in the paper).

    In every step a few simulated devices draw sub-tasks and a budget, get the sub-model they would
    be sent, and train it on samples of their sub-tasks, where `distillation` says so helped by soft
    labels of the whole model as it was before; the whole model trains on samples of all sub-tasks
    beside them. Batch norm statistics are frozen, as on devices.

    Parameters
    ----------
    choose : callable
        What the online stage will send to whom.
    epochs : int
        The configuration's `enhancing_epochs`, or what its delta modules leave of them.
    """
    rng = np.random.default_rng(config.seed)
    whole_logits = _logits(model, data, config) if config.distillation else None

    def loss_of(state: Mapping[str, Tensor], x: Tensor, y: Tensor, rows: list[int]) -> Tensor:
        logits = functional_call(model.body, dict(state), (x,))
        loss = F.cross_entropy(logits, y)
        if whole_logits is not None:
            t = config.temperature
            soft = F.softmax(whole_logits[rows] / t, dim=1)
            distilled = F.kl_div(F.log_softmax(logits / t, dim=1), soft, reduction="batchmean")
            loss = (1 - config.distillation) * loss + config.distillation * t * t * distilled
        return loss

    _train_as_on_devices(model)
    steps_per_epoch = math.ceil(len(data) / config.batch_size)
    steps, rate = epochs * steps_per_epoch, config.enhancing_learning_rate
    descent = _Descent(model.body.parameters(), config, rate, steps)
    everything = range(data.num_sub_tasks)
    devices = _simulated_devices(model, data, choose, config, rng, generator)
    for _ in range(epochs):
        losses = []
        for _ in range(steps_per_epoch):
            rows = data.device_rows(everything, config.whole_samples, rng)
            x, y = data.labelled(rows, generator)
            parts = [F.cross_entropy(model.body(x), y)]
            for _, selection, rows, x, y in itertools.islice(devices, config.devices_per_step):
                parts.append(loss_of(model.narrowed_state(selection), x, y, rows))
            losses.append(descent.step(torch.stack(parts).mean()))
        yield float(np.mean(losses))


def train_deltas(
    model: ModularModel,
    data: ProxyData,
    choose: Choice,
    config: PrototypingConfig,
    generator: torch.Generator,
) -> Stage:
    """Train delta modules, merged into sub-models as deployed (not in the paper).

    The model is as it will be sent and stays so: to multiply its delta modules by 0 is no loss.
    Simulated devices are drawn as in `train_as_deployed`, budgets too; each delta module learns
    from the devices of its sub-task.

    Parameters
    ----------
    choose : callable
        What the online stage will send to whom.
    """
    deltas = model.deltas
    if deltas is None:
        raise PrototypingError("Expected a model with delta modules to train; see add_deltas.")
    rng = np.random.default_rng(config.seed)
    _train_as_on_devices(model)
    steps_per_epoch = math.ceil(len(data) / config.batch_size)
    steps = config.delta_epochs * steps_per_epoch
    rate = config.delta_rate * config.enhancing_learning_rate
    descent = _Descent(deltas.tensors.values(), config, rate, steps)
    devices = _simulated_devices(model, data, choose, config, rng, generator)
    for _ in range(config.delta_epochs):
        losses = []
        for _ in range(steps_per_epoch):
            parts = []
            for sub_tasks, selection, _, x, y in itertools.islice(devices, config.devices_per_step):
                with torch.no_grad():
                    state = model.narrowed_state(selection)
                mixture = equal_mixture(sub_tasks, model.sub_tasks)
                merged = deltas.merged(state, selection, mixture)
                parts.append(F.cross_entropy(functional_call(model.body, merged, (x,)), y))
            losses.append(descent.step(torch.stack(parts).mean()))
        yield float(np.mean(losses))


def _simulated_devices(
    model: ModularModel,
    data: ProxyData,
    choose: Choice,
    config: PrototypingConfig,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> Iterator[tuple[tuple[int, ...], Selection, list[int], Tensor, Tensor]]:
    """Draw devices without end: sub-tasks, sub-model, rows of a batch, and the batch ``(x, y)``."""
    for share in itertools.cycle(config.budget_shares):
        sub_tasks = draw_sub_tasks(data.num_sub_tasks, config, rng)
        rows = data.device_rows(sub_tasks, config.samples_per_device, rng)
        x, y = data.labelled(rows, generator)
        yield sub_tasks, choose(sub_tasks, budget_of(model.costs, share), rng), rows, x, y


def _train_as_on_devices(model: ModularModel) -> None:
    """Put a model in training mode, batch norm statistics frozen."""
    model.train()
    for layer in model.body.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()


def budget_of(costs: CostTable, share: float) -> Budget:
    """Return the budget of a simulated device that holds a share of the modules, one at least."""
    share = max(share, costs.least_share)
    return Budget.share_of(costs, communication_bytes=share, computation_flops=share)


def draw_sub_tasks(
    number: int, config: PrototypingConfig, rng: np.random.Generator
) -> tuple[int, ...]:
    """Draw the sub-tasks of a simulated device, out of a number of them."""
    least, most = (min(seen, number) for seen in config.sub_tasks_per_device)
    drawn = rng.choice(number, int(rng.integers(least, most + 1)), replace=False)
    return tuple(np.sort(drawn).tolist())


@torch.no_grad()
def _logits(model: ModularModel, data: ProxyData, config: PrototypingConfig) -> Tensor:
    model.eval()
    return torch.cat([model.body(x) for x, *_ in data.in_order(4 * config.batch_size)])


@torch.no_grad()
def mean_gates(
    selector: Callable[[Tensor], dict[str, Tensor]],
    data: ProxyData,
    *,
    top_k: int | None = None,
    batch_size: int = 256,
) -> dict[str, np.ndarray]:
    """Average the selector's gates over each sub-task: the load matrix H (paper section 4.3).

    Returns
    -------
    dict[str, np.ndarray]
        Layer name -> float64 ``[T, N]``.
    """
    total: dict[str, Tensor] = {}
    for x, _, tasks in data.in_order(batch_size):
        for name, logits in selector(x).items():
            gates = top_k_gates(logits, top_k).double().cpu()
            if name not in total:
                total[name] = torch.zeros(data.num_sub_tasks, gates.shape[1], dtype=torch.float64)
            total[name].index_add_(0, tasks, gates)
    samples = torch.bincount(data.sub_tasks, minlength=data.num_sub_tasks)[:, None]
    return {name: (gates / samples).numpy() for name, gates in total.items()}
