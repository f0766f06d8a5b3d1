"""What a run leaves: rows, a summary, a picture. Summary, table and picture come from rows alone.

Bytes of a row are those of the queries and training messages the device exchanged since its last
row. Evaluation messages are not counted: they are the experimenter's, not the method's. The queries
that precede them are, so that the price of knowing every device stands in the results.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from simulations.settings import Settings

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULT_FILES = ("results.csv", "summary.json", "accuracy.png")
_REFERENCE = "fedavg"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluated device: accuracies 0 to 1, bytes since its last row, seconds of adaptation."""

    strategy: str
    seed: int
    round: int
    device: int
    accuracy_before: float
    accuracy_after: float
    bytes_down: int
    bytes_up: int
    modules: int
    seconds: float


def to_frame(rows: list[Row]) -> pd.DataFrame:
    """Put rows into a table, one column a field."""
    return pd.DataFrame([asdict(row) for row in rows], columns=list(Row.__annotations__))


def curves(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracies and total bytes so far, for each strategy, seed and round."""
    keys = ["strategy", "seed", "round"]
    grouped = frame.groupby(keys, sort=True)
    result = grouped[["accuracy_before", "accuracy_after"]].mean()
    spent = grouped[["bytes_down", "bytes_up"]].sum().sum(axis=1)
    result["bytes"] = spent.groupby(level=["strategy", "seed"]).cumsum()
    return result.reset_index()


def summarise(frame: pd.DataFrame, seconds: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Sum up each strategy, at the end of its run.

    Parameters
    ----------
    frame : DataFrame
        From `to_frame`.
    seconds : dict[str, float]
        Strategy -> wall seconds over all seeds.

    Returns
    -------
    dict[str, dict]
        Strategy -> mean accuracies over devices and seeds, half-widths of their 95 % confidence
        intervals (``ci95`` before, ``ci95_after`` after local adaptation), mean total bytes over
        seeds, ``bytes_to_target`` (None if it never got there or FedAvg did not run), seconds.
    """
    course = curves(frame).groupby(["strategy", "round"]).mean(numeric_only=True).reset_index()
    target = course[course["strategy"] == _REFERENCE]["accuracy_before"].max()  # or nan: never
    summary = {}
    for strategy in frame["strategy"].unique():
        own = frame[frame["strategy"] == strategy]
        end = own[own["round"] == own["round"].max()]
        seeds = own["seed"].nunique()
        summary[str(strategy)] = {
            "accuracy_before": float(end["accuracy_before"].mean()),
            "accuracy_after": float(end["accuracy_after"].mean()),
            "ci95": _half_width(end["accuracy_before"]),
            "ci95_after": _half_width(end["accuracy_after"]),
            "bytes_down": float(own["bytes_down"].sum() / seeds),
            "bytes_up": float(own["bytes_up"].sum() / seeds),
            "bytes_to_target": _bytes_to(target, course[course["strategy"] == strategy]),
            "seconds": seconds.get(str(strategy), float(own["seconds"].sum())),
        }
    return summary


def _half_width(values: pd.Series[float]) -> float:
    """Half-width of the 95 % confidence interval of a mean, by the normal approximation."""
    return float(1.96 * values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _bytes_to(target: float, course: pd.DataFrame) -> float | None:
    """Bytes spent, mean over seeds, until the mean over seeds first reaches the target."""
    reached = course[course["accuracy_before"] >= target]
    return None if reached.empty else float(reached["bytes"].iloc[0])


def write(
    settings: Settings,
    engine: str,
    frame: pd.DataFrame,
    seconds: dict[str, float],
    cloud_model: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Write ``results.csv``, ``summary.json`` and ``accuracy.png``; returns the summary."""
    out = settings.out_dir
    summary = {
        "config": {**asdict(settings), "engine": engine},
        "cloud_model": cloud_model,
        "strategies": summarise(frame, seconds),
    }
    frame.to_csv(out / "results.csv", index=False)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(frame, out / "accuracy.png")
    return summary


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Draw accuracy over rounds and over bytes; the band is the range over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    course = curves(frame)
    for number, (strategy, own) in enumerate(course.groupby("strategy", sort=False)):
        by_round = own.groupby("round")
        for column, style, label in (
            ("accuracy_before", "-", f"{strategy}"),
            ("accuracy_after", "--", f"{strategy}, after local adaptation"),
        ):
            mean = by_round[column].mean() * 100
            low, high = by_round[column].min() * 100, by_round[column].max() * 100
            megabytes = by_round["bytes"].mean() / 1e6
            for axis, x in zip(axes, (mean.index, megabytes), strict=True):
                axis.plot(x, mean, style, color=f"C{number}", label=label)
                axis.fill_between(x, low, high, color=f"C{number}", alpha=0.15)
    axes[0].set(xlabel="round", ylabel="accuracy on the devices' own test data, %")
    axes[1].set(xlabel="MB sent, both ways")
    axes[1].legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(summary: dict[str, Any], out: Path, console: Console) -> None:
    """Print what matters, and where the rest lies."""
    table = Table(
        title="At the end of the run: mean over devices and seeds, 95 % interval",
        caption="adapted: after local training; to target: MB until FedAvg's best accuracy",
        box=box.SIMPLE_HEAD,
    )
    headings = ("strategy", "accuracy", "adapted", "MB down", "MB up", "to target", "sec")
    for heading in headings:
        left = heading == "strategy"
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for name, own in summary["strategies"].items():
        to_target = own["bytes_to_target"]
        table.add_row(
            name,
            f"{own['accuracy_before']:.1%} ± {own['ci95'] * 100:.1f}",
            f"{own['accuracy_after']:.1%} ± {own['ci95_after'] * 100:.1f}",
            f"{own['bytes_down'] / 1e6:.2f}",
            f"{own['bytes_up'] / 1e6:.2f}",
            "never" if to_target is None else f"{to_target / 1e6:.2f}",
            f"{own['seconds']:.0f}",
        )
    console.print(table)
    for seed, accuracies in summary["cloud_model"].items():
        console.print(
            f"Whole cloud model, seed {seed}: "
            f"{accuracies['before_modularising']:.1%} before modularising, "
            f"{accuracies['after_offline_stage']:.1%} after the offline stage."
        )
    console.print(f"Rows, summary and picture: {(out / 'accuracy.png').resolve()}", soft_wrap=True)
