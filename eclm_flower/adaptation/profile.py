"""What the cloud knows of a device: what matters to its data, and what it can afford."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from eclm_flower.modular.costs import RESOURCES, Cost, CostTable
from eclm_flower.modular.selection import Selection

Importance = Mapping[str, np.ndarray]
"""Layer name -> float64 ``[N]``, non-negative, sums to 1 (paper section 5.1)."""


@dataclass(frozen=True, kw_only=True, slots=True)  # the cloud keeps one of every device
class Budget:
    """What a device can spend on a sub-model; infinity where it need not care.

    Attributes
    ----------
    communication_bytes : float (default: inf)
        Most bytes of one transfer, one way.
    computation_flops : float (default: inf)
        Most FLOPs of a training step for one sample.
    memory_bytes : float (default: inf)
        Most bytes of memory while training.
    """

    communication_bytes: float = math.inf
    computation_flops: float = math.inf
    memory_bytes: float = math.inf

    def __post_init__(self) -> None:
        for resource in RESOURCES:
            value = getattr(self, resource)
            if math.isnan(value) or value < 0:
                raise ValueError(f"Expected {resource} of a budget to be >= 0, got {value}.")

    @classmethod
    def share_of(cls, costs: CostTable, **shares: float) -> Budget:
        """Build the budget that pays for the shared part and a share of the modules.

        Parameters
        ----------
        costs : CostTable
            The cloud model's costs.
        **shares : float
            Resource -> share of what all modules together cost, 1 for the whole cloud model.

        Examples
        --------
        >>> Budget.share_of(model.costs, communication_bytes=0.25, memory_bytes=0.5)
        """
        unknown = set(shares) - set(RESOURCES)
        if unknown:
            raise ValueError(f"Expected shares of {RESOURCES}, got {sorted(unknown)}.")
        limits = {}
        for name, share in shares.items():
            shared, whole = getattr(costs.shared, name), getattr(costs.whole, name)
            limits[name] = shared + share * (whole - shared)
        return cls(**limits)

    def allows(self, cost: Cost) -> bool:
        """Whether a cost stays within the budget, in every resource."""
        return all(getattr(cost, name) <= getattr(self, name) for name in RESOURCES)


@dataclass(frozen=True, kw_only=True, slots=True)  # the cloud keeps one of every device
class DeviceProfile:
    """A device's answer to the cloud's query (paper section 5.1).

    Attributes
    ----------
    device : int
        The device's own lasting number (Flower's partition id, or its node id).
    budget : Budget
        What it can spend now.
    importance : dict[str, np.ndarray]
        How much each module matters for its data; empty until the cloud asked for it.
    mixture : np.ndarray, optional
        float64 ``[S]``, the proportions of the sub-tasks in its data, if it can tell them; else
        they are inferred from its importance.
    selection : dict[str, sequence of int]
        The modules of its sub-model, if it derived that itself; importance and budget are then its
        own business.
    infeasible : bool
        It derived itself, and nothing fits its budget.
    cached : dict[str, sequence of int]
        Digests of what the device holds from earlier rounds; empty if it keeps no cache.
    """

    device: int
    budget: Budget = field(default_factory=Budget)
    importance: Importance = field(default_factory=dict)
    mixture: np.ndarray | None = None
    selection: Selection = field(default_factory=dict)
    infeasible: bool = False
    cached: Mapping[str, Sequence[int]] = field(default_factory=dict)
