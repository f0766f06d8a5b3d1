"""Who the devices are: how much of the whole cloud model each one can afford.

The paper draws devices from public phone statistics and gives their marginal distributions of RAM
and of MobileNetV3 inference latency (its Figures 1 and 2, read off the vector graphics: PAPER.md
section 4). It does not say how a budget follows from them, so these are our choices:

- **RAM**: one of the paper's bins by its share, and of that bin the upper end, the size phones are
  sold with (2, 4, 6, 8, 12; 16 GB above 12). ``memory_share`` = RAM / 12 GB, at most 1: a 12 GB
  phone holds the whole model, and every app gets the same fraction of a phone's memory.
- **Latency**: the paper's phone quantiles, interpolated on a logarithmic scale; below the 5 % and
  above the 95 % quantile it stays at these. ``computation_share`` = 61 ms / latency, from 0.1 to 1:
  the phone at the 25 % quantile just finishes the whole model within the round.
- **Bandwidth**: the paper publishes none. ``communication_share`` is log-uniform from 0.2 to 1, a
  factor of five between the slowest link and one that just carries the whole model in a round.
- The three are independent, since only the marginals are known.

What comes out over many devices: the scarcest of the three shares, which bounds the sub-model, has
its median near 0.25 and its middle half between about 0.17 and 0.33, near the 20 to 50 % of the
cloud model that the paper's devices hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RAM_GB = np.array([2, 4, 6, 8, 12, 16])
RAM_PROBABILITIES = np.array([0.102, 0.327, 0.213, 0.262, 0.093, 0.005])
LATENCY_QUANTILES = np.array([0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95])
LATENCY_MS = np.array([39, 46, 61, 157, 315, 595, 757])

WHOLE_MODEL_RAM_GB = 12.0
WHOLE_MODEL_LATENCY_MS = 61.0
LEAST_COMPUTATION_SHARE = 0.1
LEAST_COMMUNICATION_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device. Shares are in (0, 1], of what the whole cloud model costs.

    Attributes
    ----------
    ram_gb : float
        Built-in memory, GB.
    latency_ms : float
        Of one MobileNetV3 inference, milliseconds.
    memory_share, computation_share, communication_share : float
        Of the whole cloud model's training memory, FLOPs and bytes.
    """

    ram_gb: float
    latency_ms: float
    memory_share: float
    computation_share: float
    communication_share: float


def draw_fleet(number: int, *, seed: int) -> list[Device]:
    """Draw devices; a larger fleet of the same seed starts with the same devices.

    Parameters
    ----------
    number : int
        How many, at least 1.
    seed : int
        Not negative.

    Raises
    ------
    ValueError
        If a number is too small.
    """
    if number < 1 or seed < 0:
        raise ValueError(
            f"Expected at least 1 device and a seed of at least 0, got {number} and {seed}."
        )

    def uniform(purpose: str) -> NDArray[np.float64]:
        return np.random.default_rng([seed, *purpose.encode()]).random(number)

    edges = np.cumsum(RAM_PROBABILITIES / RAM_PROBABILITIES.sum())
    ram = RAM_GB[np.searchsorted(edges[:-1], uniform("fleet: RAM"), side="right")]
    log_latency = np.interp(uniform("fleet: latency"), LATENCY_QUANTILES, np.log(LATENCY_MS))
    latency = np.exp(log_latency)
    memory = np.minimum(1, ram / WHOLE_MODEL_RAM_GB)
    computation = np.clip(WHOLE_MODEL_LATENCY_MS / latency, LEAST_COMPUTATION_SHARE, 1)
    communication = LEAST_COMMUNICATION_SHARE ** uniform("fleet: bandwidth")
    return [
        Device(
            ram_gb=float(ram[i]),
            latency_ms=float(latency[i]),
            memory_share=float(memory[i]),
            computation_share=float(computation[i]),
            communication_share=float(communication[i]),
        )
        for i in range(number)
    ]
