"""The cloud's side of the simulation: every strategy on every seed, over one grid."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from rich.console import Console
from rich.progress import Progress

from eclm_flower import prototype
from eclm_flower.federation import MeteredGrid, Roster, Traffic
from eclm_flower.modular import ModularModel
from simulations.results import RESULT_FILES, Row, print_table, to_frame, write
from simulations.settings import Settings, SettingsError
from simulations.world import World, flip_and_crop, world_of
from strategies import METHODS
from strategies.method import Method

_CONNECT_SECONDS = 300

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what Flower's run config says."""
    run_experiment(grid, Settings.from_run_config(context.run_config), engine="flower")


class DeviceFailedError(RuntimeError):
    """A simulated device raised: the run ends; strategies that were done stay written."""


def check_strategies(settings: Settings) -> None:
    """Refuse strategies that don't exist."""
    unknown = [name for name in settings.strategies if name not in METHODS]
    if unknown:
        raise SettingsError(
            f"Expected --strategies from {', '.join(METHODS)}, got '{', '.join(unknown)}'."
        )


def make_out_dir(settings: Settings) -> None:
    """Make the folder for the results, before anything is computed that could not be kept."""
    try:
        settings.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"Can't write to --out {settings.out}: {error.strerror}.") from error


def run_experiment(grid: Grid, settings: Settings, *, engine: str) -> None:
    """Run an experiment and write its results.

    Parameters
    ----------
    grid : Grid
        With at least as many nodes as devices, numbered by their partition id.
    settings : Settings
        The experiment.
    engine : str
        Noted in the results.
    """
    check_strategies(settings)
    make_out_dir(settings)
    for name in RESULT_FILES:  # nothing of an older run may look like this one's
        (settings.out_dir / name).unlink(missing_ok=True)
    console = Console()
    metered = MeteredGrid(grid)
    rows: list[Row] = []
    seconds: dict[str, float] = defaultdict(float)
    cloud_model = {}
    for seed in settings.seeds:
        world = world_of(settings.for_devices(), seed)
        model, cloud_model[str(seed)] = offline_stage(world, console)
        # Let every process load what it needs, so that the first strategy is not timed for it.
        roster = Roster(seed, _config(world, settings.strategies[0]))
        roster.refresh(metered, at_least=settings.devices, timeout=_CONNECT_SECONDS)
        for name in settings.strategies:
            start = time.perf_counter()
            rows += run_strategy(metered, world, model, METHODS[name], console)
            seconds[name] += time.perf_counter() - start
            summary = write(settings, engine, to_frame(rows), dict(seconds), cloud_model)
    print_table(summary, settings.out_dir, console)


def offline_stage(world: World, console: Console) -> tuple[ModularModel, dict[str, float]]:
    """Prepare the cloud model that every strategy starts from."""
    settings, environment = world.settings, world.environment
    console.print(
        f"Seed {world.seed}: {settings.dataset}, {settings.devices} devices, "
        f"{len(environment.proxy_rows)} proxy samples in the cloud. Offline stage:"
    )
    model = world.build_model()
    photographs = environment.input_shape[:1] == (3,) and len(environment.input_shape) == 3
    report = prototype(
        model,
        environment.proxy(),
        sub_tasks=environment.proxy_sub_tasks,
        config=world.prototyping(),
        validation=environment.cloud_test(),
        augment=flip_and_crop if photographs else None,
    )
    accuracies = list(report.accuracy.values())
    return model, {
        "before_modularising": accuracies[0] if accuracies else float("nan"),
        "after_offline_stage": accuracies[-1] if accuracies else float("nan"),
    }


def run_strategy(
    grid: MeteredGrid, world: World, model: ModularModel, method: Method, console: Console
) -> list[Row]:
    """Run one strategy for one seed: evaluate, then rounds of training and evaluation.

    Flower's `Strategy.start` neither evaluates devices before the first round nor skips
    evaluations, so its loop stands here.
    """
    settings = world.settings
    strategy = method.strategy(
        model,
        seed=world.seed,
        query_config=_config(world, method.name),
        fraction_train=settings.per_round / settings.devices,
        min_train_nodes=settings.per_round,
        min_available_nodes=settings.devices,
    )
    arrays: ArrayRecord = method.arrays(model)
    rows: list[Row] = []
    grid.reset()
    with Progress(console=console) as progress:
        bar = progress.add_task(method.name, total=settings.rounds)
        for server_round in range(settings.rounds + 1):
            config = _config(world, method.name)
            if server_round > 0:
                requests = strategy.configure_train(server_round, arrays, config, grid)
                replies = _checked(grid.send_and_receive(requests), settings.per_round)
                merged, _ = strategy.aggregate_train(server_round, replies)
                arrays = merged or arrays
                progress.advance(bar)
            last = server_round == settings.rounds
            if last or server_round % settings.evaluate_every == 0:
                requests = strategy.configure_evaluate(server_round, arrays, config, grid)
                replies = _checked(grid.send_and_receive(requests), settings.devices)
                new = _rows(replies, grid, method.name, world.seed, server_round)
                rows += new
                mean = sum(row.accuracy_before for row in new) / len(new)
                progress.update(bar, description=f"{method.name} (accuracy {mean:.1%})")
    return rows


def _config(world: World, strategy: str) -> ConfigRecord:
    """Everything a device must know of the experiment."""
    return ConfigRecord(
        {"settings": world.settings.to_json(), "seed": world.seed, "strategy": strategy}
    )


def _checked(replies: Iterable[Message], expected: int) -> list[Message]:
    """Return the replies; simulated devices don't fail, so a failure is a mistake to mend."""
    replies = list(replies)
    for reply in replies:
        if reply.has_error():
            raise DeviceFailedError(f"A device failed: {reply.error.reason}")
    if len(replies) < expected:
        raise DeviceFailedError(f"Expected {expected} devices to answer, got {len(replies)}.")
    return replies


def _rows(
    replies: list[Message], grid: MeteredGrid, strategy: str, seed: int, server_round: int
) -> list[Row]:
    rows = []
    for reply in replies:
        metrics = reply.content.metric_records["metrics"]
        node = reply.metadata.src_node_id
        traffic = [grid.traffic[kind].get(node, Traffic()) for kind in ("query", "train")]
        rows.append(
            Row(
                strategy=strategy,
                seed=seed,
                round=server_round,
                device=int(metrics["device"]),  # type: ignore[arg-type]
                accuracy_before=float(metrics["accuracy-before"]),  # type: ignore[arg-type]
                accuracy_after=float(metrics["accuracy-after"]),  # type: ignore[arg-type]
                bytes_down=sum(part.down for part in traffic),
                bytes_up=sum(part.up for part in traffic),
                modules=int(metrics["modules"]),  # type: ignore[arg-type]
                seconds=float(metrics["seconds"]),  # type: ignore[arg-type]
            )
        )
    grid.reset()
    return sorted(rows, key=lambda row: row.device)
