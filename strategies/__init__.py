"""Every method a simulation can run, one file each, on the same footing.

A method answers three questions: what does a device get, how does the device adapt it, and how is
what returns merged. Data, fleet, budgets, starting weights, byte counts and metrics are the
simulation's, and the same for all.
"""

from __future__ import annotations

from strategies import eclm_ablations, eclm_precision
from strategies.adaptivenet import METHOD as ADAPTIVENET
from strategies.clusters import METHOD as CLUSTERS
from strategies.eclm import METHOD as ECLM
from strategies.fedavg import METHOD as FEDAVG
from strategies.fedavg_small import METHOD as FEDAVG_SMALL
from strategies.fedrolex import METHOD as FEDROLEX
from strategies.fjord import METHOD as FJORD
from strategies.heterofl import METHOD as HETEROFL
from strategies.local_adaptation import METHOD as LOCAL_ADAPTATION
from strategies.method import Method
from strategies.nested import METHOD as NESTED
from strategies.no_adaptation import METHOD as NO_ADAPTATION
from strategies.random_modules import METHOD as RANDOM

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        ECLM,
        FEDAVG,
        FEDAVG_SMALL,
        NO_ADAPTATION,
        LOCAL_ADAPTATION,
        NESTED,
        HETEROFL,
        FEDROLEX,
        FJORD,
        ADAPTIVENET,
        CLUSTERS,
        RANDOM,
        eclm_ablations.NO_PRIOR,
        eclm_ablations.NO_DELTAS,
        eclm_ablations.FIXED_DELTAS,
        eclm_ablations.BORN_DELTAS,
        eclm_ablations.CHOSEN,
        eclm_ablations.UNIFORM_MERGE,
        eclm_ablations.NO_IMPORTANCE,
        eclm_ablations.NO_ENHANCING,
        eclm_precision.HALF,
        eclm_precision.EIGHT_BIT,
    )
}

__all__ = ["METHODS", "Method"]
