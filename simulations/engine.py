"""Running an experiment: on Flower's simulation engine (Ray), or in this process."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress

import psutil
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from eclm_flower.federation import run_in_process
from simulations.client_app import app as client_app
from simulations.compute import expect_compute
from simulations.results import make_out_dir
from simulations.server_app import run_experiment, with_known_strategies
from simulations.settings import Engine, Settings
from simulations.world import world_of

_SHUTDOWN_SECONDS = 20


def run(settings: Settings, engine: Engine, *, verbose: bool = False) -> None:
    """Run an experiment on an engine; what goes wrong is raised here.

    Parameters
    ----------
    settings : Settings
        The experiment.
    engine : {"ray", "in-process"}
        "ray" runs devices in parallel, one process a core; "in-process" one after the other.
    verbose : bool (default: False)
        Show Flower's own log.
    """
    logging.getLogger("flwr").setLevel(logging.INFO if verbose else logging.ERROR)
    settings = with_known_strategies(settings)
    expect_compute(settings.compute)
    make_out_dir(settings)
    for seed in settings.seeds:  # bad data or models are refused before an engine starts
        world_of(settings.for_devices(), seed).budget(0, 0)

    server_app = ServerApp()
    me = psutil.Process()
    before, started = set(me.children(recursive=True)), set[psutil.Process]()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            run_experiment(grid, settings, engine=engine)
        finally:
            started.update(me.children(recursive=True))

    if engine == "in-process":
        run_in_process(server_app, client_app, settings.devices)
        return

    from flwr.simulation import run_simulation  # late: it needs what in-process runs do without

    # A short path, because Ray puts sockets there.
    ray_files = tempfile.mkdtemp(prefix="ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
    try:
        run_simulation(
            server_app,
            client_app,
            num_supernodes=settings.devices,
            backend_config={
                "init_args": {
                    "_temp_dir": ray_files,
                    "include_dashboard": False,
                    "logging_level": "error",
                    "log_to_driver": verbose,
                },
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
            verbose_logging=False,
        )
    finally:
        # Ray's workers outlive its shutdown by seconds; nobody should find them.
        started.update(me.children(recursive=True))
        _end(started - before)
        shutil.rmtree(ray_files, ignore_errors=True)


def _end(processes: Iterable[psutil.Process]) -> None:
    """Wait for processes to end, and kill those that don't."""
    _, late = psutil.wait_procs(processes, timeout=_SHUTDOWN_SECONDS)
    for process in late:
        with suppress(psutil.NoSuchProcess):  # it ended after all
            process.kill()
