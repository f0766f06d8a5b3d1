"""What the cloud prepares before devices come: one trained model, made ready for each method.

Equal preparation decides a comparison, so all kinds start from the same trained whole model and
take the same number of further epochs on the same proxy data. In those epochs the cloud trains
sub-models as the method will deploy them, with the same simulated devices, budgets and distillation
(`eclm_flower.prototyping.stages.train_as_deployed`); ECLM's delta modules get the last third of
them:

=============  ====================================================================================
kind           sub-models trained in the cloud
=============  ====================================================================================
``modules``    ECLM's: prefixes as in ``nested``; then delta modules for what sub-tasks differ in
``no-deltas``  the same without delta modules
``blank``      ECLM's, all delta modules zero: what comes into them, devices bring
``chosen``     modules behind a core of two: units are grouped, the selector learns, then chooses
``nested``     prefixes of one order of units, those that contribute most first
``scaled``     the same prefixes, their hidden units scaled as HeteroFL does
``windows``    modules in a row, from a random one on
``branches``   modules at random
``whole``      none: the whole model trains on
``split``      none: the whole model trains on, then units are put in order
=============  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from eclm_flower import Budget, PrototypingConfig, prototype
from eclm_flower.modular import ModularModel, Selection
from eclm_flower.modular.costs import CostTable
from eclm_flower.prototyping import PrototypingReport
from strategies.scaler import scale_hidden_units
from strategies.windows import numbers_within, scattered, window

Offline = Literal[
    "modules",
    "no-deltas",
    "blank",
    "chosen",
    "nested",
    "scaled",
    "windows",
    "branches",
    "whole",
    "split",
]


#: Kinds with delta modules: only there is it of use what a device's sub-tasks are.
WITH_DELTAS = frozenset[Offline]({"modules", "blank"})

CHOSEN_CORE = 2  # modules that all have where others are chosen; more helped nobody in our trials


def prepare(
    model: ModularModel,
    proxy_data: Dataset[Any],
    *,
    offline: Offline,
    config: PrototypingConfig,
    **options: Any,
) -> PrototypingReport:
    """Prepare a trained whole model for the methods of a kind, in place.

    Parameters
    ----------
    model : ModularModel
        Its body is trained.
    proxy_data : Dataset
        The cloud's labelled data.
    offline : Offline
        The kind.
    config : PrototypingConfig
        Its ``epochs`` are not used: they are what the model was trained with.
    **options
        Further parameters of `eclm_flower.prototype`, sub-tasks among them.
    """
    config = replace(config, epochs=0)
    if offline not in WITH_DELTAS:
        config = replace(config, delta_share=0)
    if offline == "blank":
        config = replace(config, delta_scales=(0.0,))
    if offline == "chosen":
        config = replace(config, core_modules=CHOSEN_CORE)
    if offline in ("whole", "split"):
        config = replace(
            config,
            epochs=config.enhancing_epochs,
            learning_rate=config.enhancing_learning_rate,
            enhancing_epochs=0,
            selector_epochs=0,
        )
    if offline in _SUB_MODELS:
        options["sub_models"] = _SUB_MODELS[offline]
    if offline == "scaled":
        with _scaled(model):
            return prototype(model, proxy_data, config=config, **options)
    return prototype(model, proxy_data, config=config, **options)


def _prefix(costs: CostTable, budget: Budget, rng: np.random.Generator) -> Selection:
    return window(costs, numbers_within(costs, budget))


def _window(costs: CostTable, budget: Budget, rng: np.random.Generator) -> Selection:
    start = int(rng.integers(max(costs.modules.values())))
    return window(costs, numbers_within(costs, budget), start=start)


def _branch(costs: CostTable, budget: Budget, rng: np.random.Generator) -> Selection:
    return scattered(costs, numbers_within(costs, budget), rng)


_SUB_MODELS = {"nested": _prefix, "scaled": _prefix, "windows": _window, "branches": _branch}


@contextmanager
def _scaled(model: ModularModel) -> Iterator[None]:
    handles = scale_hidden_units(model.body, model.layers.values())
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
