"""How far to trust delta modules: the scale that serves devices best, on data nobody trained on."""

from __future__ import annotations

import numpy as np
import torch
from torch.func import functional_call

from eclm_flower.adaptation.sub_tasks import mixture_from_importance
from eclm_flower.errors import PrototypingError
from eclm_flower.modular.model import ModularModel
from eclm_flower.modular.modes import evaluating
from eclm_flower.modular.selector import DELTAS
from eclm_flower.prototyping.config import PrototypingConfig
from eclm_flower.prototyping.proxy import ProxyData
from eclm_flower.prototyping.stages import Choice, budget_of, draw_sub_tasks

_DEVICES, _SAMPLES = 32, 256  # an accuracy over 8,192 answers: a standard error of half a point


@torch.no_grad()
def choose_scale(
    model: ModularModel, held_out: ProxyData, choose: Choice, config: PrototypingConfig
) -> dict[float, float]:
    """Scale a model's delta modules by the accuracy of sub-models as deployed.

    Sub-tasks are inferred from importance, as they will be online, so that a selector that can't
    tell them apart counts against delta modules, too. The simulated devices are the same for every
    scale; of equally good scales the first wins.

    Parameters
    ----------
    model : ModularModel
        The cloud model; its delta modules are multiplied by the scale chosen.
    held_out : ProxyData
        Proxy data that sub-models were not trained on, with the same sub-tasks.
    choose : callable
        What the online stage will send to whom, as in training.
    config : PrototypingConfig
        Scales, seed, budgets and number of sub-tasks of the simulated devices, as in training.

    Returns
    -------
    dict[float, float]
        Scale -> mean accuracy, 0 to 1.
    """
    deltas = model.deltas
    if deltas is None:
        raise PrototypingError("Expected a model with delta modules to scale; see add_deltas.")
    rng = np.random.default_rng(config.seed)
    right: dict[float, list[float]] = {scale: [] for scale in config.delta_scales}
    gates = {DELTAS: deltas.gates.cpu().numpy()}
    with evaluating(model):
        for device in range(_DEVICES):
            share = config.budget_shares[device % len(config.budget_shares)]
            sub_tasks = draw_sub_tasks(held_out.num_sub_tasks, config, rng)
            rows = held_out.device_rows(sub_tasks, _SAMPLES, rng)
            (x, y, _), *_ = held_out.batches([rows])
            selection = choose(sub_tasks, budget_of(model.costs, share), rng)
            mixture = torch.from_numpy(mixture_from_importance(model.importance([x]), gates))
            state = model.narrowed_state(selection)
            difference = deltas.difference(selection, mixture)
            for scale, accuracies in right.items():
                scaled = {key: state[key] + scale * d for key, d in difference.items()}
                logits = functional_call(model.body, {**state, **scaled}, (x,))
                accuracies.append(float((logits.argmax(dim=1) == y).float().mean()))
    accuracy = {scale: float(np.mean(of_devices)) for scale, of_devices in right.items()}
    best = max(config.delta_scales, key=lambda scale: accuracy[scale])
    for tensor in deltas.tensors.values():
        tensor.mul_(best)
    return accuracy
