"""What a SuperLink takes for a node that is idle: polls and heartbeats over HTTP, signed, loopback.

A real ``flower-superlink``, and one node that sends the requests a SuperNode sends while there is
nothing to do, one after the other and from 8 threads::

    python -m benchmarks.superlink_http

Reported is the processor time of the SuperLink's process a request, which, unlike the time until
the answer, does not depend on what else the machine does. *capacity*: nodes whose polls (every 3 s)
and heartbeats (every 24 s, 0.8 of Flower's interval of 30 s) take all of a core. A SuperLink is one
Python process: more cores don't help it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import pandas as pd
import typer
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import (
    generate_key_pairs,
    public_key_to_bytes,
    sign_message,
)
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from benchmarks.versioned_rows import RESULTS, with_spread, write_rows

POLL_SECONDS, HEARTBEAT_SECONDS, START_SECONDS = 3, 24, 60


@contextmanager
def superlink(database: str, port: int) -> Iterator[int]:
    """Run a SuperLink; yield its process id."""
    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ,
            "FLWR_HOME": home,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        if database == "sqlite":
            command += ["--database", str(Path(home) / "state.db")]
        with (Path(home) / "log").open("w") as log:
            process = subprocess.Popen(command, env=environment, cwd=home, stdout=log, stderr=log)
        try:
            yield process.pid
        finally:
            process.terminate()
            process.wait()


class IdleNode:
    """A node, registered and active, that can send what a SuperNode sends when idle."""

    def __init__(self, url: str) -> None:
        private, public = generate_key_pairs()
        key, told = public_key_to_bytes(public), now().isoformat()
        self._url = url
        self._headers = {
            "content-type": "application/protobuf",
            "accept": "application/protobuf",
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(key).decode(),
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(private, told.encode())).decode(),
            TIMESTAMP_HEADER: told,
        }
        with httpx.Client(base_url=url) as client:
            _wait_for(client)
            self._send(client, "register-node", RegisterNodeFleetRequest(public_key=key))
            active = ActivateNodeRequest(public_key=key, heartbeat_interval=30.0)
            answer = ActivateNodeResponse()
            answer.ParseFromString(self._send(client, "activate-node", active))
        node = Node(node_id=answer.node_id)
        self.requests: dict[str, Message] = {
            "pull-messages": PullMessagesRequest(node=node),
            "send-node-heartbeat": SendNodeHeartbeatRequest(node=node, heartbeat_interval=30.0),
        }

    def _send(self, client: httpx.Client, path: str, request: Message) -> bytes:
        content = request.SerializeToString()
        answer = client.post(f"/v1/fleet/{path}", content=content, headers=self._headers)
        return answer.raise_for_status().content

    def send(self, path: str, times: int) -> None:
        """Send a request many times, over one connection."""
        with httpx.Client(base_url=self._url) as client:
            for _ in range(times):
                self._send(client, path, self.requests[path])


def _wait_for(client: httpx.Client) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            client.get("/health").raise_for_status()
            return
        except httpx.HTTPError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def processor_seconds(process: int) -> float:
    """Seconds of processor time a process has taken, all threads (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(database: str, *, threads: int, number: int, port: int) -> dict[str, float]:
    """Milliseconds of the SuperLink's processor time a request; what that allows."""
    figures = {}
    with superlink(database, port) as process:
        node = IdleNode(f"http://127.0.0.1:{port}")
        for path in node.requests:
            before = processor_seconds(process)
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda _, p=path: node.send(p, number // threads), range(threads)))
            taken = processor_seconds(process) - before
            figures[f"{path}, ms"] = 1e3 * taken / (number // threads * threads)
    poll, beat = (seconds / 1e3 for seconds in figures.values())
    return {**figures, "capacity, nodes": 1 / (poll / POLL_SECONDS + beat / HEARTBEAT_SECONDS)}


def main(
    number: Annotated[int, typer.Option("--requests", help="Of each kind.")] = 1000,
    repetitions: Annotated[int, typer.Option(help="SuperLinks started of each kind.")] = 3,
    port: Annotated[int, typer.Option(help="A free one.")] = 18811,
    version: Annotated[str, typer.Option(help="Noted in the rows.")] = "flwr 1.41",
    out: Annotated[Path, typer.Option(help="A CSV file.")] = RESULTS / "superlink_http.csv",
) -> None:
    """Measure idle nodes."""
    rows = [
        {
            "version": version,
            "database": database,
            "threads": threads,
            "repetition": repetition,
            **measure(database, threads=threads, number=number, port=port),
        }
        for repetition in range(repetitions)
        for database in ("memory", "sqlite")
        for threads in (1, 8)
    ]
    frame = pd.DataFrame(rows)
    write_rows(out, frame)
    figures = [name for name in frame if "," in str(name)]
    table = Table(title="Idle nodes at a SuperLink, processor time")
    for heading in ("database", "threads", *map(str, figures)):
        table.add_column(heading, justify="right")
    for (database, threads), part in frame.groupby(["database", "threads"]):
        cells = [
            with_spread(part[name].to_numpy(), ",.0f" if "nodes" in str(name) else ".2f")
            for name in figures
        ]
        table.add_row(str(database), str(threads), *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
