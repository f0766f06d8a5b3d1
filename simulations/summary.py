"""What a run says: means, intervals, worst devices, recovery after shifts, costs.

From rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from simulations.statistics import worst_tenth

REFERENCE = "fedavg"  #: its best accuracy is the target of the others


def curves(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracies, total bytes and simulated seconds so far.

    One row for each strategy, seed, step and round.
    """
    keys = ["strategy", "seed", "step", "round"]
    grouped = frame.groupby(keys, sort=True)
    result = grouped[["accuracy_before", "accuracy_after", "clock"]].mean()
    spent = grouped[["bytes_down", "bytes_up"]].sum().sum(axis=1)
    result["bytes"] = spent.groupby(level=["strategy", "seed"]).cumsum()
    return result.reset_index()


def first_reaching(course: pd.DataFrame, accuracy: str, target: float) -> pd.Series[float] | None:
    """Return the first row, by round, in which an accuracy reaches a target; None: it never does.

    Parameters
    ----------
    course : DataFrame
        Of one strategy, and one seed or a mean over seeds.
    accuracy : str
        Its column.
    target : float
        nan is never reached.
    """
    there = course[course[accuracy] >= target].sort_values("round", kind="stable")
    return there.iloc[0] if len(there) else None


def summarise(
    frame: pd.DataFrame, *, shift_every: int = 1, wall_seconds: Mapping[str, float] | None = None
) -> dict[str, dict[str, Any]]:
    """Sum up each strategy.

    Parameters
    ----------
    frame : DataFrame
        From `results.to_frame`.
    shift_every : int (default: 1)
        Steps from one shift of the data to the next.
    wall_seconds : dict[str, float], optional
        Strategy -> wall seconds over all seeds.

    Returns
    -------
    dict[str, dict]
        Strategy -> at the end of the run: mean accuracies over devices and seeds, half-widths of
        their 95 % confidence intervals (``ci95``, ``ci95_after``), mean of the worst tenth of the
        devices of each seed, of the whole cloud model; over all ends of steps: mean accuracy; over
        shifts: accuracy right after, and at the ends of the steps since; totals, mean over seeds:
        bytes, simulated seconds; what it took until FedAvg's best accuracy (None: never, or FedAvg
        did not run); mean over devices at the end: simulated seconds of an adaptation, peak memory.
    """
    course = curves(frame)
    course = course.groupby(["strategy", "step", "round"]).mean(numeric_only=True).reset_index()
    target = course[course["strategy"] == REFERENCE]["accuracy_before"].max()  # or nan: never
    summary = {}
    for strategy in frame["strategy"].unique():
        own = frame[frame["strategy"] == strategy]
        ends = own[own["round"] == own.groupby(["seed", "step"])["round"].transform("max")]
        end = ends[ends["step"] == ends["step"].max()]
        seeds = own["seed"].nunique()
        reaching = first_reaching(course[course["strategy"] == strategy], "accuracy_before", target)
        by_device = end.set_index(["seed", "device"])
        summary[str(strategy)] = {
            **{
                name: float(end[name].mean())
                for name in ("accuracy_before", "accuracy_after", "masked_before", "masked_after")
            },
            "ci95": _half_width(end["accuracy_before"]),
            "ci95_after": _half_width(end["accuracy_after"]),
            "worst_decile": worst_tenth(by_device["accuracy_before"]),
            "worst_decile_after": worst_tenth(by_device["accuracy_after"]),
            "accuracy_global": _number(end["accuracy_global"].mean()),
            "mean_over_steps": float(ends["accuracy_after"].mean()),
            **_recovery(own, ends, shift_every),
            "bytes_down": float(own["bytes_down"].sum() / seeds),
            "bytes_up": float(own["bytes_up"].sum() / seeds),
            "bytes_delivered": float(own["bytes_delivered"].sum() / seeds),
            "bytes_to_target": None if reaching is None else float(reaching["bytes"]),
            "clock": float(end["clock"].mean()),
            "clock_to_target": None if reaching is None else float(reaching["clock"]),
            "adaptation_seconds": float(end["seconds"].mean()),
            "memory": float(end["memory"].mean()),
            "wall_seconds": (wall_seconds or {}).get(str(strategy)),
        }
    return summary


def _recovery(own: pd.DataFrame, ends: pd.DataFrame, shift_every: int) -> dict[str, Any]:
    """Accuracy of held models right after a shift, and after adaptation k steps later."""
    later = ends[ends["step"] >= shift_every]
    since = later.groupby(later["step"] % shift_every)["accuracy_after"].mean()
    return {
        "accuracy_right_after_shift": _number(own["accuracy_held"].mean()),
        "accuracy_steps_after_shift": dict(enumerate(map(float, since))),
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _half_width(values: pd.Series[float]) -> float:
    """Half-width of the 95 % confidence interval of a mean, by the normal approximation."""
    values = values.dropna()
    return float(1.96 * values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
