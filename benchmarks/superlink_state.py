"""What a SuperLink's own state takes as a fleet grows: Flower's code, called without HTTP.

Node lists, heartbeats, and polls of nodes that find no message, while `--outstanding` messages wait
for other nodes; on SQLite in a file (``flower-superlink --database FILE``) and in memory::

    python -m benchmarks.superlink_state

*capacity*: registered nodes whose heartbeats (every 24 s, 0.8 of Flower's interval of 30 s) and
polls (every 3 s) take all of one core, HTTP not counted. A SuperLink is one process.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.runtime_pb2 import GetNodesResponse
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkState
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.state.schema.linkstate_models import Node as NodeModel
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.utils import uint64_to_int64
from flwr.superlink.federation import NoOpFederationManager
from rich.console import Console
from rich.table import Table
from sqlalchemy import insert

from benchmarks.versioned_rows import RESULTS, with_spread, write_rows

CALLS = 200
HEARTBEAT_SECONDS, POLL_SECONDS = 24, 3


def open_state(database: str, folder: Path) -> LinkState:
    """Open a state of Flower's: "sqlite" or "memory"."""
    store = ObjectStoreFactory().store()
    if database == "memory":
        return InMemoryLinkState(NoOpFederationManager(), store)
    state = SqlLinkState(str(folder / "state.db"), NoOpFederationManager(), store)
    state.initialize()
    return state


def register(state: LinkState, number: int) -> list[int]:
    """Register nodes that are online; in SQLite all at once, which is not what is measured."""
    node_ids = []
    for _ in range(1 if isinstance(state, SqlLinkState) else number):
        node_ids.append(state.create_node("", "", str(len(node_ids)).encode(), 30.0))
        state.activate_node(node_ids[-1], 1e6)
    if isinstance(state, SqlLinkState):
        with state.session() as session:
            first = session.get(NodeModel, uint64_to_int64(node_ids[0]))
            assert first is not None
            columns = [column.name for column in NodeModel.__table__.columns]
            row = {name: getattr(first, name) for name in columns}
            others = range(1, number)
            rows = [{**row, "node_id": i, "public_key": str(i).encode()} for i in others]
            session.execute(insert(NodeModel), rows)
            node_ids += others
    return node_ids


def seconds_a_call(call: Callable[[int], Any], arguments: list[int]) -> float:
    """Mean seconds of calls with one argument after the other."""
    start = time.perf_counter()
    for argument in arguments:
        call(argument)
    return (time.perf_counter() - start) / len(arguments)


def measure(database: str, nodes: int, outstanding: int) -> dict[str, float | str]:
    """Measure a state with some nodes and messages."""
    with tempfile.TemporaryDirectory() as folder:
        state = open_state(database, Path(folder))
        state.federation_manager.ensure_default_federations_exist("")
        run_id = state.create_run("", "", "", {}, NOOP_FEDERATION_ID, None, "", TaskType.SERVER_APP)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = (
            run_id,
            SUPERLINK_NODE_ID,
            1,
        )
        node_ids = register(state, nodes)
        idle, addressed = node_ids[-CALLS:], node_ids[:outstanding]
        figures: dict[str, float | str] = {}

        def push(node_id: int) -> None:
            message = Message(RecordDict({"config": ConfigRecord()}), node_id, "query", ttl=3600)
            message.metadata.__dict__["_message_id"] = f"message to {node_id}"
            if state.store_message_ins(message) is None:
                raise RuntimeError("The message was refused.")

        figures["message stored, ms"] = 1e3 * seconds_a_call(push, addressed)
        poll = seconds_a_call(lambda node_id: state.get_message_ins(node_id, limit=1), idle)
        beat = seconds_a_call(lambda node: state.acknowledge_node_heartbeat(node, 1e6), idle)
        figures["empty poll, ms"], figures["heartbeat, ms"] = 1e3 * poll, 1e3 * beat
        figures["capacity, nodes"] = 1 / (poll / POLL_SECONDS + beat / HEARTBEAT_SECONDS)
        try:  # as Flower's handler of GetNodes does it
            start = time.perf_counter()
            info = state.get_node_info(node_ids=list(state.get_nodes(run_id)))
            size = len(GetNodesResponse(nodes=info).SerializeToString())
            figures["node list, s"] = time.perf_counter() - start
            figures["node list, MB"] = size / 1e6
        except Exception as error:
            figures["node list"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        return figures


def main(
    nodes: Annotated[str, typer.Option(help="Registered and online.")] = "1000,10000,100000",
    outstanding: Annotated[int, typer.Option(help="Messages that wait for other nodes.")] = 100,
    repetitions: Annotated[int, typer.Option(help="Of each case, in turn.")] = 3,
    version: Annotated[str, typer.Option(help="Noted in the rows.")] = "flwr 1.41",
    out: Annotated[Path, typer.Option(help="A CSV file.")] = RESULTS / "superlink_state.csv",
) -> None:
    """Measure Flower's two states."""
    logging.disable(logging.ERROR)
    rows = [
        {
            "version": version,
            "database": database,
            "nodes": number,
            "outstanding": outstanding,
            "repetition": repetition,
            **measure(database, number, outstanding),
        }
        for repetition in range(repetitions)
        for number in map(int, nodes.split(","))
        for database in ("sqlite", "memory")
    ]
    frame = pd.DataFrame(rows)
    write_rows(out, frame)
    show(frame)


def show(frame: pd.DataFrame) -> None:
    """Print medians and spread."""
    figures = [name for name in frame if "," in str(name)]
    table = Table(title=f"SuperLink state, {frame['outstanding'].iloc[0]} messages outstanding")
    for heading in ("database", "nodes", *map(str, figures)):
        table.add_column(heading, justify="right")
    for (nodes, database), part in frame.groupby(["nodes", "database"]):
        table.add_row(
            database,
            f"{nodes:,}",
            *(
                with_spread(part[name].to_numpy(), ",.0f" if "capacity" in str(name) else ",.2f")
                if part[name].notna().all()
                else str(part["node list"].iloc[0])
                for name in figures
            ),
        )
    Console(width=180).print(table)


if __name__ == "__main__":
    typer.run(main)
