"""The loop over rounds: as Flower's `Strategy.start`, with deadlines, a log, and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from logging import INFO, WARNING
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from eclm_flower.federation.checkpoint import Checkpoint, CheckpointFolder
from eclm_flower.federation.exchange import stream
from eclm_flower.federation.messages import in_rows
from eclm_flower.federation.phase import metric_lines
from eclm_flower.federation.run_state import (
    RunState,
    check_same_run,
    digest,
    from_checkpoint,
    to_checkpoint,
)
from eclm_flower.federation.summary import log_lines

if TYPE_CHECKING:
    from eclm_flower.federation.strategy import ECLM

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


def run_rounds(
    strategy: ECLM,
    grid: Grid,
    initial_arrays: ArrayRecord,
    *,
    num_rounds: int,
    train_config: ConfigRecord,
    evaluate_config: ConfigRecord,
    evaluate_fn: EvaluateFn | None,
) -> Result:
    """Run the rounds that are not done yet; see `ECLM.start`."""
    start = time.monotonic()
    log(INFO, "Starting %s: %s rounds", type(strategy).__name__, num_rounds)
    strategy.summary()
    strategy.take_over(initial_arrays, 1)  # refuses those of another model before anything is sent
    settings = {
        **strategy.settings(),
        "query_config": _told(strategy.query_config),
        "train_config": _told(train_config),
        "evaluate_config": _told(evaluate_config),
    }
    initial = digest(initial_arrays)
    folder, done = strategy.checkpoints, None
    if folder is not None:
        folder.prepare()
        done = _resume(strategy, folder, settings, initial)
    if done is not None:
        result, arrays, first = done.result, done.cloud.arrays, done.server_round + 1
    else:
        result, arrays, first = Result(), initial_arrays, 1
        strategy.told.start_anew()
        _evaluate_in_the_cloud(evaluate_fn, 0, arrays, result)

    for server_round in range(first, num_rounds + 1):
        log(INFO, "[ROUND %s/%s]", server_round, num_rounds)
        arrays, lines = _train(strategy, grid, server_round, arrays, train_config, result)
        lines += _evaluate(strategy, grid, server_round, arrays, evaluate_config, result)
        lines += _evaluate_in_the_cloud(evaluate_fn, server_round, arrays, result)
        if folder is not None and (server_round % folder.every == 0 or server_round == num_rounds):
            state = RunState(
                server_round=server_round,
                cloud=strategy.merged,
                told=strategy.told,
                selections=strategy.selections,
                result=result,
                initial=initial,
                usual=strategy.usual,
            )
            lines += _save(folder, to_checkpoint(state, settings))
        log_lines(lines)

    log(INFO, "Finished %s rounds in %.1f s", num_rounds, time.monotonic() - start)
    result.arrays = in_rows(result.arrays)  # so that they can be saved as they are
    return result


def _told(config: ConfigRecord) -> str:
    """Write a user's config; without what Flower's strategies put into it."""
    return str({key: value for key, value in config.items() if key != "server-round"})


def _resume(
    strategy: ECLM, folder: CheckpointFolder, settings: Mapping[str, str], initial: str
) -> RunState | None:
    """Go on from the newest checkpoint, if there is one."""
    checkpoint = folder.load()
    if checkpoint is None:
        return None
    if strategy.model.sub_tasks:  # `prototype`, which adds delta modules, may have been skipped
        strategy.model.add_deltas_of(checkpoint.facts["arrays"])
    check_same_run(checkpoint, strategy.model, settings, folder.path)
    state = from_checkpoint(checkpoint, strategy.model, strategy.told)
    strategy.go_on_from(state)
    log(INFO, "Going on after round %s, from %s", state.server_round, folder.newest())
    if state.initial != initial:
        log(
            WARNING,
            "The initial arrays are not those that the run started from. They are not used: it "
            "goes on from the checkpoint.",
        )
    return state


def _train(
    strategy: ECLM,
    grid: Grid,
    server_round: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
    result: Result,
) -> tuple[ArrayRecord, list[str]]:
    messages = strategy.configure_train(server_round, arrays, config, grid)
    phase = strategy.phase
    replies = stream(
        grid, messages, until=phase.deadline, window=strategy.window, traffic=phase.traffic
    )
    merged, metrics = strategy.aggregate_train(server_round, replies)
    if merged is not None:
        result.arrays = arrays = merged
    if metrics is not None:
        metrics.update(phase.traffic_metrics())
        result.train_metrics_clientapp[server_round] = metrics
    lines = phase.lines("train", used="merged") if strategy.fraction_train else []
    return arrays, [*lines, *metric_lines("train metrics", metrics)]


def _evaluate(
    strategy: ECLM,
    grid: Grid,
    server_round: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
    result: Result,
) -> list[str]:
    messages = strategy.configure_evaluate(server_round, arrays, config, grid)
    phase = strategy.phase
    replies = stream(
        grid, messages, until=phase.deadline, window=strategy.window, traffic=phase.traffic
    )
    metrics = strategy.aggregate_evaluate(server_round, replies)
    if metrics is not None:
        result.evaluate_metrics_clientapp[server_round] = metrics
    lines = phase.lines("evaluate", used="answered") if strategy.fraction_evaluate else []
    return [*lines, *metric_lines("evaluate metrics", metrics)]


def _evaluate_in_the_cloud(
    evaluate_fn: EvaluateFn | None, server_round: int, arrays: ArrayRecord, result: Result
) -> list[str]:
    if evaluate_fn is None:
        return []
    metrics = evaluate_fn(server_round, in_rows(arrays))
    if metrics is not None:
        result.evaluate_metrics_serverapp[server_round] = metrics
    lines = metric_lines("cloud metrics", metrics)
    if server_round == 0:
        log_lines(lines)
    return lines


def _save(folder: CheckpointFolder, checkpoint: Checkpoint) -> list[str]:
    start = time.monotonic()
    path = folder.save(checkpoint)
    if path is None:
        return ["checkpoint: NOT written"]
    return [f"checkpoint: {path.name} in {time.monotonic() - start:.2f} s"]
