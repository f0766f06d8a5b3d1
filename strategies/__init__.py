"""Every method a simulation can run, one file each, on the same footing.

A method answers three questions: what does a device get, how is that opened and answered on the
device, and how is what returns merged. Data, fleet, budgets, starting weights, local training,
byte counts and metrics are the simulation's, and the same for all.
"""

from __future__ import annotations

from strategies.eclm import METHOD as ECLM
from strategies.fedavg import METHOD as FEDAVG
from strategies.method import Method

METHODS: dict[str, Method] = {method.name: method for method in (ECLM, FEDAVG)}

__all__ = ["METHODS", "Method"]
