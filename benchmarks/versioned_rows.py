"""Rows of a benchmark, measured on the code before and after a change, in one CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

RESULTS = Path(__file__).parent / "results"


def write_rows(path: Path, rows: pd.DataFrame) -> None:
    """Write rows to a file; those it has of the same `version` are replaced, others stay.

    Parameters
    ----------
    path : path
        A CSV file; made if there is none.
    rows : DataFrame
        With a column ``version``.
    """
    if path.exists():
        there = pd.read_csv(path)
        others = there[~there["version"].isin(rows["version"])]
        rows = pd.concat([others, rows]) if len(others) else rows
    rows.to_csv(path, index=False)


def with_spread(values: Sequence[float] | np.ndarray, form: str = ".2f") -> str:
    """Write the median of repeated measurements, and the smallest and the largest."""
    middle, low, high = np.median(values), np.min(values), np.max(values)
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"
