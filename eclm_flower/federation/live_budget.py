"""What a device can spend at this moment: free memory, idle CPU, the rate of its link.

Every figure is measured on the device, by its own process, when the cloud asks. Nothing is kept
between two questions, so a device that got busy has a smaller budget in the next round.
"""

from __future__ import annotations

import time
import urllib.request

import psutil

from eclm_flower.adaptation.profile import Budget
from eclm_flower.modular.costs import CostTable

_LOAD_SECONDS = 0.5  # over which the CPU's load is taken
_CHUNK_BYTES = 64 * 1024


def live_budget(
    costs: CostTable,
    *,
    memory_share: float = 0.5,
    bytes_per_second: float = float("inf"),
    transfer_seconds: float = 10.0,
) -> Budget:
    """Turn what is free on this device right now into a budget.

    Memory: a share of what is available without swapping. In a container that is the host's, not
    the container's limit: give the limit as a fixed budget beside this one (`node_budget`).

    Computation: the idle share of the CPUs buys the same share of the modules, so that a busy
    device trains its sub-model about as fast as an idle one trains the whole model. A device
    without idle CPU can still afford one module in every layer.

    Communication: what its link carries in the time a transfer may take.

    Parameters
    ----------
    costs : CostTable
        The cloud model's, ``model.costs``.
    memory_share : float (default: 0.5)
        Of the available memory, what training may take; above 0, at most 1.
    bytes_per_second : float (default: inf)
        Rate of the link, known or measured by `link_rate`.
    transfer_seconds : float (default: 10)
        Longest one transfer (down, or up) may take.

    Raises
    ------
    ValueError
        A number outside its range.
    """
    if not 0 < memory_share <= 1:
        raise ValueError(f"Expected memory_share above 0 and at most 1, got {memory_share}.")
    if not (bytes_per_second > 0 and transfer_seconds > 0):
        raise ValueError(
            "Expected bytes_per_second and transfer_seconds above 0, got "
            f"{bytes_per_second} and {transfer_seconds}."
        )
    idle = 1 - psutil.cpu_percent(interval=_LOAD_SECONDS) / 100
    compute = Budget.share_of(costs, computation_flops=max(idle, costs.least_share))
    return Budget(
        communication_bytes=bytes_per_second * transfer_seconds,
        computation_flops=compute.computation_flops,
        memory_bytes=psutil.virtual_memory().available * memory_share,
    )


def link_rate(url: str, *, seconds: float = 1.0) -> float:
    """Measure how fast this device downloads right now, in bytes per second.

    Reads what `url` gives until it ends or the time is over. It measures the way to that host: put
    a file of a few MB beside the SuperLink. Uplinks are often slower, and this doesn't see it.

    Parameters
    ----------
    url : str
        A ``http``, ``https`` or ``file`` address.
    seconds : float (default: 1)
        Longest time to read, and to wait for an answer.
    """
    start = time.perf_counter()
    read = 0
    with urllib.request.urlopen(url, timeout=seconds) as source:
        try:
            while chunk := source.read1(_CHUNK_BYTES):  # what is there, not as much as that
                read += len(chunk)
                if time.perf_counter() - start >= seconds:
                    break
        except TimeoutError:  # a link this slow: what came until now is its rate
            pass
    return read / (time.perf_counter() - start)
