"""How far to trust delta modules: the scale that serves devices best, on data nobody trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.func import functional_call

from eclm_flower.modular.model import ModularModel
from eclm_flower.modular.modes import evaluating
from eclm_flower.prototyping.config import PrototypingConfig
from eclm_flower.prototyping.deltas import DeltaModules, equal_mixture
from eclm_flower.prototyping.proxy import ProxyData
from eclm_flower.prototyping.stages import Choice, budget_of, draw_sub_tasks

_DEVICES, _SAMPLES = 32, 256  # an accuracy over 8,192 answers: a standard error of half a point


@torch.no_grad()
def choose_scale(
    model: ModularModel,
    deltas: DeltaModules,
    held_out: ProxyData,
    choose: Choice,
    config: PrototypingConfig,
    *,
    scales: Sequence[float] = (0.0, 0.5, 1.0),
) -> dict[float, float]:
    """Set the scale of delta modules by the accuracy of sub-models as deployed.

    The simulated devices are the same for every scale; of equally good scales the smallest wins.

    Parameters
    ----------
    model : ModularModel
        The cloud model, trained with the deltas.
    deltas : DeltaModules
        Its ``scale`` is set.
    held_out : ProxyData
        Proxy data that was not trained on, with the same sub-tasks.
    choose : callable
        What the online stage will send to whom, as in training.
    config : PrototypingConfig
        Seed, budgets and number of sub-tasks of the simulated devices, as in training.
    scales : sequence of float
        To choose from, the most cautious first; 0 is the shared model for everyone.

    Returns
    -------
    dict[float, float]
        Scale -> mean accuracy, 0 to 1.
    """
    accuracy = {}
    with evaluating(model):
        for scale in scales:
            deltas.scale = scale
            rng = np.random.default_rng(config.seed)
            right = []
            for device in range(_DEVICES):
                share = config.budget_shares[device % len(config.budget_shares)]
                sub_tasks = draw_sub_tasks(held_out.num_sub_tasks, config, rng)
                rows = held_out.device_rows(sub_tasks, _SAMPLES, rng)
                (x, y, _), *_ = held_out.batches([rows])
                selection = choose(sub_tasks, budget_of(model.costs, share), rng)
                mixture = equal_mixture(sub_tasks, held_out.num_sub_tasks)
                state = deltas.merged(model.narrowed_state(selection), selection, mixture)
                logits = functional_call(model.body, state, (x,))
                right.append(float((logits.argmax(dim=1) == y).float().mean()))
            accuracy[scale] = float(np.mean(right))
    deltas.scale = max(scales, key=lambda scale: accuracy[scale])
    return accuracy
