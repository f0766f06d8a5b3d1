"""Learning rates, chosen for every strategy alike, without a look at reported test data.

Every strategy runs with the same few trial rates, in a validation world of a seed that no table
uses, and the rate of the best mean accuracy after local adaptation at the end of the run is taken:
one rule for all. Every trial's means are kept, the losers' as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from simulations.engine import run
from simulations.results import ROWS, read, to_frame
from simulations.settings import Settings
from simulations.summary import summarise

JUDGED_BY = "accuracy_after"
_MEANS = ("accuracy_before", JUDGED_BY, "masked_before", "masked_after")


def tune(
    settings: Settings,
    trials: Sequence[float],
    rates_file: Path,
    *,
    command: str,
    console: Console,
    verbose: bool = False,
    known: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Run all trials and write the rates, and beside them the means of all trials as ``.csv``.

    Trials that an interrupted tuning finished are kept.

    Parameters
    ----------
    settings : Settings
        What is tuned; its learning rates don't matter, and it is judged on validation data whatever
        it says.
    trials : sequence of float
        Learning rates.
    rates_file : Path
        A ``.toml`` for ``--rates``.
    command : str
        Noted in that file.
    console : Console
    verbose : bool (default: False)
    known : DataFrame, optional
        What trials of other strategies came to before, to be kept.

    Returns
    -------
    DataFrame
        A row for each strategy and trial.
    """
    frames = [] if known is None else [known]
    for rate in trials:
        trial = replace(
            settings,
            learning_rate=rate,
            rates=(),
            judged_on="validation",
            out=str(settings.out_dir / f"rate-{rate:g}"),
            offline_dir=str(settings.offline_folder),
            resume=True,
        )
        run(trial, "in-process", verbose=verbose)
        frames.append(means(to_frame(read(trial.out_dir / ROWS)), rate))
    outcome = pd.concat(frames, ignore_index=True)
    rates_file.parent.mkdir(parents=True, exist_ok=True)
    outcome.round(5).to_csv(rates_file.with_suffix(".csv"), index=False)
    rates_file.write_text(as_toml(winners(outcome), command))
    show(outcome, console)
    console.print(f"Rates: {rates_file.resolve()}", soft_wrap=True)
    return outcome


def means(frame: pd.DataFrame, rate: float) -> pd.DataFrame:
    """Return what one trial came to, a row for each strategy."""
    rows = [
        {"strategy": strategy, "rate": rate, **{name: own[name] for name in _MEANS}}
        for strategy, own in summarise(frame).items()
    ]
    return pd.DataFrame(rows)


def winners(outcome: pd.DataFrame) -> dict[str, float]:
    """Return the best rate of each strategy; of equally good ones the smallest."""
    best = {}
    for strategy, own in outcome.groupby("strategy", sort=True):
        highest = own[own[JUDGED_BY] == own[JUDGED_BY].max()]
        best[str(strategy)] = float(highest["rate"].min())
    return best


def as_toml(rates: dict[str, float], command: str) -> str:
    """Write rates as a file that ``--rates`` reads."""
    lines = [f"# {command}", *(f"{strategy} = {rate:g}" for strategy, rate in rates.items())]
    return "\n".join(lines) + "\n"


def show(outcome: pd.DataFrame, console: Console) -> None:
    """Print the accuracy of every strategy at every rate, the best in bold."""
    best = winners(outcome)
    table = Table(title="Validation data: mean accuracy after local adaptation, at the end")
    table.add_column("strategy")
    rates = sorted(outcome["rate"].unique())
    for rate in rates:
        table.add_column(f"{rate:g}", justify="right")
    by_rate = outcome.set_index(["strategy", "rate"])[JUDGED_BY]
    for strategy, own in best.items():
        cells = [f"{by_rate[strategy, rate]:.1%}" for rate in rates]
        table.add_row(
            strategy,
            *(
                f"[bold]{cell}[/]" if rate == own else cell
                for cell, rate in zip(cells, rates, strict=True)
            ),
        )
    console.print(table)
    at_the_end = [name for name, rate in best.items() if rate in (rates[0], rates[-1])]
    if at_the_end and len(rates) > 1:
        console.print(f"At an end of the trials: {', '.join(at_the_end)}.")
