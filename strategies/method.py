"""The interface of a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAvg
from torch import nn

from eclm_flower.modular import ModularModel


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to learn across devices.

    Attributes
    ----------
    name : str
        Its name on the command line and in the results.
    arrays : callable
        Modular cloud model -> what Flower's `start` is given as initial arrays.
    strategy : callable
        (modular cloud model, seed, query config, further parameters of Flower's `FedAvg`) -> the
        Flower strategy: what devices get, how what returns is merged. Methods given the same seed
        ask the same devices in every round.
    receive : callable
        (message, modular model) -> the module a device trains and evaluates.
    reply : callable
        As `eclm_flower.reply`: answers a message with the trained module, or metrics alone.
    """

    name: str
    arrays: Callable[[ModularModel], ArrayRecord]
    strategy: Callable[..., FedAvg]
    receive: Callable[[Message, ModularModel], nn.Module]
    reply: Callable[..., Message]
