"""How long it takes to choose the modules of 10,000 devices, and how near the optimum they come.

Three sizes, importance of two kinds, and budgets of the phone fleet in three resources::

    python -m benchmarks.derivation

*Share of the optimum*: importance of the modules chosen over that of the exact solver, HiGHS
(`scipy.optimize.milp`, gap 0.01 %). Where HiGHS runs into its time limit, its upper bound stands
for the optimum, so the share is at least the one given. Costs are drawn, an order of magnitude
apart between layers; *flat*: importance nearly equal, *peaked*: a few modules of each layer hold
most. Seconds: 10,000 devices, processor otherwise idle, one thread; HiGHS on the same machine, in
turn with ours.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.table import Table
from scipy.optimize import Bounds, LinearConstraint, milp

from eclm_flower.adaptation import Budget, Importance
from eclm_flower.adaptation.derivation import derive_all
from eclm_flower.errors import InfeasibleBudgetError
from eclm_flower.modular import RESOURCES, Cost, CostTable, Selection
from simulations.conditions import conditions_of, shares_of
from simulations.fleet import draw_fleet

SIZES = ((4, 16), (3, 32), (12, 64))
CONCENTRATIONS = {"flat": 30.0, "peaked": 0.1}  # of a Dirichlet distribution
SHARED_PART = 0.1  # of the cost of all modules


def main(
    devices: Annotated[int, typer.Option(help="Devices derived for.")] = 10_000,
    sample: Annotated[int, typer.Option(help="Of them compared with the exact optimum.")] = 500,
    repeats: Annotated[int, typer.Option(help="Times the derivation is repeated.")] = 5,
    solver_seconds: Annotated[float, typer.Option(help="Time limit of HiGHS, a device.")] = 1.0,
    out: Annotated[Path, typer.Option(help="A CSV file for the rows.")] = Path(
        "benchmarks/results/derivation.csv"
    ),
) -> None:
    """Time the derivation and compare it with HiGHS."""
    rows = []
    for layers, modules in SIZES:
        for kind, concentration in CONCENTRATIONS.items():
            generator = np.random.default_rng([layers, modules])
            costs = drawn_costs(layers, modules, generator)
            budgets = fleet_budgets(costs, devices)
            weights = generator.dirichlet(np.full(modules, concentration), (devices, layers))
            importances = [dict(zip(costs.modules, own, strict=True)) for own in weights]
            row = {"layers": layers, "modules": modules, "importance": kind, "devices": devices}
            rows.append(
                row | measured(importances, costs, budgets, sample, repeats, solver_seconds)
            )
            pd.DataFrame(rows).to_csv(out, index=False)
    show(pd.DataFrame(rows))


def drawn_costs(layers: int, modules: int, generator: np.random.Generator) -> CostTable:
    """Draw costs; those of two layers are up to a factor of 10 apart, in each resource."""
    drawn = [
        Cost(**dict(zip(RESOURCES, 10 ** generator.uniform(4, 5, 3), strict=True)))
        for _ in range(layers)
    ]
    per_module = {f"layer{number}": cost for number, cost in enumerate(drawn)}
    total = sum((cost * modules for cost in drawn[1:]), drawn[0] * modules)
    return CostTable(total * SHARED_PART, per_module, dict.fromkeys(per_module, modules))


def fleet_budgets(costs: CostTable, devices: int) -> list[Budget]:
    """Draw the budgets of phones at a moment, as in a simulation."""
    budgets = []
    for number, device in enumerate(draw_fleet(devices, seed=0)):
        shares = shares_of(device, conditions_of(number, 0, seed=0))
        budgets.append(
            Budget.share_of(
                costs,
                communication_bytes=max(shares.communication, costs.least_share),
                computation_flops=max(shares.computation, costs.least_share),
                memory_bytes=max(shares.memory, costs.least_share),
            )
        )
    return budgets


def measured(
    importances: list[dict[str, np.ndarray]],
    costs: CostTable,
    budgets: list[Budget],
    sample: int,
    repeats: int,
    solver_seconds: float,
) -> dict[str, float]:
    """Derive for all, several times, and for a sample exactly, a part of it after each time."""
    seconds, solver, shares, unsolved = [], [], [], 0
    for turn in range(repeats):
        start = time.perf_counter()
        selections = derive_all(importances, costs, budgets)
        seconds.append(time.perf_counter() - start)
        for i in range(turn, min(sample, len(budgets)), repeats):
            selection = selections[i]
            if isinstance(selection, InfeasibleBudgetError):
                continue
            start = time.perf_counter()
            most, solved = exact(importances[i], costs, budgets[i], solver_seconds)
            solver.append(time.perf_counter() - start)
            unsolved += not solved
            shares.append(worth(importances[i], selection) / most)
    over = sum(
        not isinstance(selection, InfeasibleBudgetError) and not budget.allows(costs.of(selection))
        for selection, budget in zip(selections, budgets, strict=True)
    )
    return {
        "seconds": float(np.median(seconds)),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "mean_share": float(np.mean(shares)),
        "worst_share": float(np.min(shares)),
        "compared": len(shares),
        "unsolved": unsolved,
        "refused": sum(isinstance(each, InfeasibleBudgetError) for each in selections),
        "over_budget": over,
        "solver_ms": 1e3 * float(np.mean(solver)),
    }


def exact(
    importance: Importance, costs: CostTable, budget: Budget, seconds: float
) -> tuple[float, bool]:
    """Return an upper bound of the optimum by HiGHS, and whether it finished."""
    names = [name for name, number in costs.modules.items() for _ in range(number)]
    value = np.concatenate([importance[name] for name in costs.modules])
    forced = np.concatenate(
        [np.arange(n) == np.argmax(importance[name]) for name, n in costs.modules.items()]
    )
    price = np.array([[getattr(costs.per_module[name], r) for name in names] for r in RESOURCES])
    free = np.array([getattr(budget, r) - getattr(costs.shared, r) for r in RESOURCES])
    scale = price.max(axis=1)
    solution = milp(
        -value,
        integrality=np.ones(len(value)),
        bounds=Bounds(forced, 1),
        constraints=LinearConstraint(price / scale[:, None], -np.inf, free / scale),
        options={"mip_rel_gap": 1e-4, "time_limit": seconds},
    )
    if solution.status == 0:
        return -solution.fun, True
    return -solution.mip_dual_bound, False


def worth(importance: Importance, selection: Selection) -> float:
    """Add up the importance of a selection's modules."""
    return sum(float(importance[name][list(chosen)].sum()) for name, chosen in selection.items())


def show(frame: pd.DataFrame) -> None:
    """Print a row for each size and kind."""
    table = Table(title="Derivation: three resources, one thread")
    headings = (
        "layers x modules",
        "importance",
        "devices",
        "seconds (fastest to slowest)",
        "mean share of the optimum",
        "worst",
        "HiGHS at its limit",
        "over budget",
        "HiGHS, ms a device",
        "ours, ms",
    )
    for heading in headings:
        table.add_column(heading)
    for row in frame.itertuples():
        table.add_row(
            f"{row.layers} x {row.modules}",
            row.importance,
            f"{row.devices:,}",
            f"{row.seconds:.2f} ({row.fastest:.2f} to {row.slowest:.2f})",
            f"{row.mean_share:.3%}",
            f"{row.worst_share:.2%}",
            f"{row.unsolved} of {row.compared}",
            str(row.over_budget),
            f"{row.solver_ms:.1f}",
            f"{1e3 * row.seconds / row.devices:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
