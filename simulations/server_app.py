"""The cloud's side of the simulation: every strategy on every seed, over one grid."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import replace

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from eclm_flower.federation import Roster
from simulations.held import devices_folder
from simulations.living_grid import LivingGrid
from simulations.offline import OfflineStage
from simulations.report import print_tables, write_report
from simulations.results import Record
from simulations.settings import Settings, SettingsError
from simulations.strategy_run import StrategyRun, run_config
from simulations.world import world_of
from strategies import METHODS

_CONNECT_SECONDS = 300

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what Flower's run config says."""
    run_experiment(grid, Settings.from_run_config(context.run_config), engine="flower")


def with_known_strategies(settings: Settings) -> Settings:
    """Return settings that name strategies, where they may say "all".

    Raises
    ------
    SettingsError
        There are no such strategies.
    """
    if settings.strategies == ("all",):
        settings = replace(settings, strategies=tuple(METHODS))
    if unknown := [name for name, _ in settings.rates if name not in METHODS]:
        raise SettingsError(
            f"Expected --rates of {', '.join(METHODS)}, got one of '{', '.join(unknown)}'."
        )
    unknown = [name for name in settings.strategies if name not in METHODS]
    if unknown:
        raise SettingsError(
            f"Expected --strategies from {', '.join(METHODS)}, or all, got '{', '.join(unknown)}'."
        )
    return settings


def run_experiment(grid: Grid, settings: Settings, *, engine: str) -> None:
    """Run an experiment, or what is missing of it, and write its results.

    Parameters
    ----------
    grid : Grid
        With at least as many nodes as devices, numbered by their partition id.
    settings : Settings
        The experiment.
    engine : str
        Noted in the results.
    """
    settings = with_known_strategies(settings)
    record = Record.begin(settings, engine)
    console = Console(width=None if sys.stdout.isatty() else 100)
    living = LivingGrid(grid)
    for seed in settings.seeds:
        missing = [name for name in settings.strategies if (name, seed) not in record.done]
        if missing:
            _run_seed(living, record, seed, missing, console)
    print_tables(write_report(record), settings.out_dir, console)


def _run_seed(
    grid: LivingGrid, record: Record, seed: int, names: list[str], console: Console
) -> None:
    settings = record.settings
    world = world_of(settings.for_devices(), seed)
    offline = OfflineStage(world, settings, console)
    offline.accuracies = record.cloud_model.setdefault(str(seed), {})
    cloud_test = world.environment.cloud_test()
    # Let every process load what it needs, so that the first strategy is not timed for it.
    roster = Roster(seed, run_config(settings, seed, names[0]))
    roster.refresh(grid, at_least=settings.devices, timeout=_CONNECT_SECONDS)
    for name in names:
        method = METHODS[name]
        model = offline.model(method.offline)
        shutil.rmtree(devices_folder(settings.out_dir), ignore_errors=True)
        start = time.perf_counter()
        run = StrategyRun(
            settings=settings,
            world=world,
            method=method,
            model=model,
            grid=grid,
            roster=roster,
            cloud_test=cloud_test,
        )
        record.add(name, seed, run.rows(console), time.perf_counter() - start)
        shutil.rmtree(devices_folder(settings.out_dir), ignore_errors=True)
