"""The interface of a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from eclm_flower import receive, reply
from eclm_flower.federation.client import selection_of
from eclm_flower.federation.messages import BODY, to_tensors
from eclm_flower.modular import ModularModel, Selection
from strategies.local_training import Training, train
from strategies.offline import Offline

# The first argument is what the method's own `receive` returns.
Select = Callable[[Any, TensorDataset, torch.Generator], None]
Adapt = Callable[[Any, TensorDataset, Training, torch.Generator], float]


def _whole_state(model: ModularModel) -> ArrayRecord:
    return ArrayRecord(model.state_dict())


def _body_state(arrays: ArrayRecord) -> dict[str, Tensor]:
    return to_tensors(arrays, BODY)


def _modules(msg: Message, model: ModularModel) -> Selection:
    return selection_of(msg)


def _nothing_to_select(model: nn.Module, data: TensorDataset, generator: torch.Generator) -> None:
    """Use what was received as it is."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to learn across devices; what is left out is as in ECLM.

    On a device: ``model = receive(msg, cloud)``, then ``select(model, data, generator)``, then
    ``adapt(model, data, settings, generator)``, then ``reply(msg, model, ...)``.

    Attributes
    ----------
    name : str
        Its name on the command line and in the results.
    strategy : callable
        (modular cloud model, seed, query config, further parameters of Flower's `FedAvg`) -> the
        Flower strategy: what devices get, how what returns is merged. Methods given the same seed
        ask the same devices in every round.
    offline : Offline
        What the cloud prepared before; see `strategies.offline`.
    arrays : callable
        Modular cloud model -> what Flower's `start` is given as initial arrays.
    body : callable
        The strategy's arrays -> the state of the cloud model's body, to measure it whole; None
        where there is no one cloud model.
    receive : callable
        (message, modular model) -> the module a device evaluates and trains; also takes a
        ``cache``, as `eclm_flower.receive` does, if the method is `cached`.
    select : callable
        (that module, local data, generator) -> None: choose among what was received, in place,
        before anything is done with it.
    modules : callable
        (message, modular model) -> the modules that the device then uses; they price its work.
    adapt : callable
        (that module, local data, settings, generator) -> loss: train it, in place.
    reply : callable
        As `eclm_flower.reply`: answers a message with the trained module, or metrics alone.
    federated : bool
        False: there are no rounds. A device is sent its module once and keeps it.
    cached : bool
        Devices can keep modules between rounds in a `ModuleCache`.
    feedback : bool
        Devices return rounded changes and keep what that loses; `receive` takes an `ErrorFeedback`.
    local : bool
        False: a device never adapts what it was sent to its own data.
    class_prior : bool
        Under label skew devices use and train their models with a class prior
        (`eclm_flower.class_prior`), whatever the settings say.
    """

    name: str
    strategy: Callable[..., FedAvg]
    offline: Offline = "modules"
    arrays: Callable[[ModularModel], ArrayRecord] = _whole_state
    body: Callable[[ArrayRecord], Mapping[str, Tensor] | None] = _body_state
    receive: Callable[..., nn.Module] = receive
    select: Select = _nothing_to_select
    modules: Callable[[Message, ModularModel], Selection] = _modules
    adapt: Adapt = train
    reply: Callable[..., Message] = reply
    federated: bool = True
    cached: bool = True
    feedback: bool = False
    local: bool = True
    class_prior: bool = False
