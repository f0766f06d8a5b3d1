"""What a run is between two rounds: all that the next round depends on, as numbers and JSON.

There is no state of a random generator in it: devices are drawn by a generator made anew from seed,
round and purpose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result

from eclm_flower.adaptation.profile import Budget, DeviceProfile
from eclm_flower.errors import CheckpointError
from eclm_flower.federation.checkpoint import Checkpoint
from eclm_flower.federation.cloud import CloudModel
from eclm_flower.federation.messages import BODY, to_array
from eclm_flower.federation.profiles import Profiles
from eclm_flower.modular.costs import RESOURCES
from eclm_flower.modular.model import ModularModel
from eclm_flower.modular.selection import Selection
from eclm_flower.modular.split import columns_of, to_columns

_HISTORIES = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)
# How the tensors of a checkpoint are named; a layer's name follows.
_NEVER = -1  # stands for the round in which a device told nothing yet
_ARRAYS, _VERSIONS = "arrays.", "versions."
_BUDGETS, _BUDGET_ROUNDS = "profiles.budgets", "profiles.budget-rounds"
_MIXTURES = "profiles.mixtures"  # not a number where a device told none
_IMPORTANCE, _IMPORTANCE_ROUNDS = "profiles.importance.", "profiles.importance-rounds"
_SELECTIONS = "selections."


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run after a round.

    Attributes
    ----------
    server_round : int
        The last complete round.
    cloud : CloudModel
        After it.
    told : Profiles
        What devices told.
    selections : dict[int, Selection]
        Device number -> the modules it was last sent.
    result : Result
        The history so far.
    initial : str
        Digest of the arrays the run started from.
    usual : list of (float, float)
        See `ECLM`.
    """

    server_round: int
    cloud: CloudModel
    told: Profiles
    selections: Mapping[int, Selection]
    result: Result
    initial: str
    usual: Sequence[tuple[float, float]]


def digest(arrays: ArrayRecord) -> str:
    """Digest of keys and values."""
    content = hashlib.sha256()
    for key, array in arrays.items():
        content.update(f"{key} {array.dtype} {array.shape}\n".encode())
        content.update(array.data)
    return content.hexdigest()


def fingerprint(model: ModularModel) -> dict[str, Any]:
    """Say what a checkpoint's model must have in common with one that goes on from it."""
    arrays = {
        key: [str(tensor.dtype), list(tensor.shape)] for key, tensor in model.state_dict().items()
    }
    return {
        "layers": {layer.name: layer.modules for layer in model.layers.values()},
        "gating": model.gating,
        "top_k": model.top_k,
        "arrays": hashlib.sha256(repr(arrays).encode()).hexdigest(),
    }


def to_checkpoint(state: RunState, settings: Mapping[str, str]) -> Checkpoint:
    """Write a run's state as numbers and JSON; `settings` are those that the numbers depend on."""
    cloud, told = state.cloud, state.told
    known, chosen = list(told.latest), list(state.selections)
    tensors: dict[str, np.ndarray] = {
        **{
            f"{_ARRAYS}{key}": np.ascontiguousarray(array.numpy())
            for key, array in cloud.arrays.items()
        },
        **{f"{_VERSIONS}{layer}": last for layer, last in cloud.module_versions.items()},
        _BUDGETS: np.array(
            [[getattr(told.latest[d].budget, name) for name in RESOURCES] for d in known]
        ).reshape(-1, len(RESOURCES)),
        _BUDGET_ROUNDS: np.array(
            [told.budget_rounds.get(d, _NEVER) for d in known], dtype=np.int64
        ),
        _IMPORTANCE_ROUNDS: np.array(
            [told.importance_rounds.get(d, _NEVER) for d in known], dtype=np.int64
        ),
    }
    if told.tells == "importance":
        for name, size in cloud.model.selector.sizes.items():
            tensors[f"{_IMPORTANCE}{name}"] = np.array(
                [told.latest[d].importance[name] for d in known], dtype=np.float64
            ).reshape(-1, size)
        mixtures = np.full((len(known), cloud.model.sub_tasks), np.nan)
        for row, device in zip(mixtures, known, strict=True):
            if (mixture := told.latest[device].mixture) is not None:
                row[:] = mixture
        tensors[_MIXTURES] = mixtures
    for layer in cloud.model.layers.values():
        held = np.zeros((len(chosen), layer.modules), dtype=bool)
        for row, device in zip(held, chosen, strict=True):
            row[list(state.selections[device][layer.name])] = True
        tensors[f"{_SELECTIONS}{layer.name}"] = held
    facts = {
        "model": fingerprint(cloud.model),
        "settings": dict(settings),
        "initial": state.initial,
        "usual": [list(update) for update in state.usual],
        "profiles": known,
        "selections": chosen,
        "merged": bool(state.result.arrays),
        "arrays": list(cloud.arrays),  # safetensors keeps an order of its own
        "history": {
            name: {str(r): dict(metrics) for r, metrics in getattr(state.result, name).items()}
            for name in _HISTORIES
        },
    }
    return Checkpoint(state.server_round, facts, tensors)


def check_same_run(
    checkpoint: Checkpoint, model: ModularModel, settings: Mapping[str, str], where: Path
) -> None:
    """Refuse the checkpoint of another run.

    Raises
    ------
    CheckpointError
        The model or a setting is another; the message names it.
    """
    for what, theirs, ours in (
        ("model", checkpoint.facts["model"], fingerprint(model)),
        ("setting", checkpoint.facts["settings"], dict(settings)),
    ):
        differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if differing:
            key = differing[0]
            raise CheckpointError(
                f"The checkpoint {where} is of another {what}: '{key}' was {theirs.get(key)} and "
                f"is {ours.get(key)} now. It is left as it is; start with the {what} it was "
                "written with, or choose an empty checkpoint_dir."
            )


def from_checkpoint(checkpoint: Checkpoint, model: ModularModel, told: Profiles) -> RunState:
    """Read a run's state back; of `told` only the settings are used."""
    facts, tensors = checkpoint.facts, checkpoint.tensors
    told = Profiles(
        importance_every=told.importance_every, budget_every=told.budget_every, tells=told.tells
    )
    columns = {f"{BODY}{key}" for key in columns_of(model.layers.values())}
    arrays = ArrayRecord()
    for key in facts["arrays"]:
        tensor = torch.from_numpy(tensors[f"{_ARRAYS}{key}"])
        arrays[key] = to_array(to_columns(tensor) if key in columns else tensor)
    cloud = replace(
        CloudModel.opened(model, arrays, version=0),
        module_versions={name: tensors[f"{_VERSIONS}{name}"] for name in model.layers},
    )
    for row, device in enumerate(facts["profiles"]):
        importance = {
            name: tensors[f"{_IMPORTANCE}{name}"][row]
            for name in model.selector.sizes
            if told.tells == "importance"
        }
        budget = Budget(**dict(zip(RESOURCES, map(float, tensors[_BUDGETS][row]), strict=True)))
        mixture = tensors[_MIXTURES][row] if importance else np.array([])
        told.latest[device] = DeviceProfile(
            device=device,
            budget=budget,
            importance=importance,
            mixture=mixture if len(mixture) and not np.isnan(mixture[0]) else None,
        )
        asked = int(tensors[_BUDGET_ROUNDS][row])
        if asked >= 0 and told.tells != "modules":
            told.budget_rounds[device] = asked
        # What devices remember themselves belongs to a Flower run, and this is a new one: they are
        # sent the selector again.
        asked = int(tensors[_IMPORTANCE_ROUNDS][row])
        if asked >= 0 and told.tells == "importance":
            told.importance_rounds[device] = asked
    histories = {
        name: {int(r): MetricRecord(metrics) for r, metrics in facts["history"][name].items()}
        for name in _HISTORIES
    }
    return RunState(
        server_round=checkpoint.server_round,
        cloud=cloud,
        told=told,
        selections=_selections(facts["selections"], model, tensors),
        result=Result(arrays=arrays if facts["merged"] else ArrayRecord(), **histories),
        initial=facts["initial"],
        usual=[(norm, examples) for norm, examples in facts["usual"]],
    )


def _selections(
    devices: Sequence[int], model: ModularModel, tensors: Mapping[str, np.ndarray]
) -> dict[int, Selection]:
    return {
        device: {
            name: tuple(np.flatnonzero(tensors[f"{_SELECTIONS}{name}"][row]).tolist())
            for name in model.layers
        }
        for row, device in enumerate(devices)
    }
