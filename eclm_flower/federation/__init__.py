"""ECLM over Flower: the strategy, the device's side, an in-process engine, byte counts."""

from eclm_flower.federation.client import profile, receive, reply
from eclm_flower.federation.in_process import InProcessGrid, run_in_process
from eclm_flower.federation.roster import Roster
from eclm_flower.federation.strategy import ECLM
from eclm_flower.federation.traffic import MeteredGrid, Traffic, content_bytes

__all__ = [
    "ECLM",
    "InProcessGrid",
    "MeteredGrid",
    "Roster",
    "Traffic",
    "content_bytes",
    "profile",
    "receive",
    "reply",
    "run_in_process",
]
