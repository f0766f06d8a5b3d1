"""ECLM over Flower: the strategy, the device's side, an in-process engine, byte counts."""

from eclm_flower.federation.cache import ModuleCache
from eclm_flower.federation.client import profile, receive, reply, selection_of
from eclm_flower.federation.differences import ErrorFeedback
from eclm_flower.federation.in_process import InProcessGrid, run_in_process
from eclm_flower.federation.live_budget import link_rate, live_budget
from eclm_flower.federation.node_budget import node_budget
from eclm_flower.federation.roster import Roster
from eclm_flower.federation.strategy import ECLM
from eclm_flower.federation.traffic import MeteredGrid, Traffic, content_bytes

__all__ = [
    "ECLM",
    "ErrorFeedback",
    "InProcessGrid",
    "MeteredGrid",
    "ModuleCache",
    "Roster",
    "Traffic",
    "content_bytes",
    "link_rate",
    "live_budget",
    "node_budget",
    "profile",
    "receive",
    "reply",
    "run_in_process",
    "selection_of",
]
