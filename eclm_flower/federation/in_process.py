"""Run a ServerApp and a ClientApp in this process: no Ray, no SuperLink, no sockets.

For tests and small simulations: a whole federation takes about a second, errors have their own
traceback, and the numbers are those of Flower's engines.
"""

from __future__ import annotations

import copy
import traceback
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

_CLIENT_APP_RAISED = 2  # Flower's own error code for it


class InProcessGrid(Grid):
    """A grid whose nodes run one after the other, here and now.

    Parameters
    ----------
    client_app : ClientApp
        What every node runs.
    num_supernodes : int
        Number of nodes. Node i has ``node_config = {"partition-id": i, "num-partitions": n}``, as
        in Flower's own simulations.
    run_config : dict, optional
        Every node's ``context.run_config``.
    node_config : dict[int, dict], optional
        More entries for the node config of single nodes, by partition id.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_supernodes: int,
        *,
        run_config: Mapping[str, Any] | None = None,
        node_config: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        # Messages can only be made inside a run: this process is one. Flower has no public way to
        # say so; imported here, so that deployments don't depend on it.
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self._client_app = client_app
        self._contexts = {
            1000 + partition: Context(
                run_id=1,
                node_id=1000 + partition,
                node_config={
                    "partition-id": partition,
                    "num-partitions": num_supernodes,
                    **(node_config or {}).get(partition, {}),
                },
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for partition in range(num_supernodes)
        }
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:  # noqa: D102
        return set(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:  # noqa: D102
        ids = []
        for message in messages:
            message_id = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = message_id
            self._replies[message_id] = self._deliver(message)
            ids.append(message_id)
        return ids

    def _deliver(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        try:
            answer = self._client_app(_copied(message), self._contexts[node_id])
            if not isinstance(answer, Message):
                raise TypeError(f"The ClientApp returned {type(answer).__name__}, not a Message.")
            return answer
        except Exception:
            return Message(Error(_CLIENT_APP_RAISED, traceback.format_exc()), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:  # noqa: D102
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(  # noqa: D102
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Any) -> None:  # noqa: D102
        raise NotImplementedError("An in-process grid is a run of its own.")

    @property
    def run(self) -> Any:  # noqa: D102
        from flwr.supercore.run import Run

        return Run.create_empty(run_id=1)

    def create_message(  # noqa: D102
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)


def _copied(message: Message) -> Message:
    """Copy a message, as a wire would: what a device changes must not reach the cloud."""
    content = RecordDict()
    for key, record in message.content.items():
        if isinstance(record, ArrayRecord):  # arrays are immutable bytes
            content[key] = ArrayRecord(dict(record))
        else:
            content[key] = copy.deepcopy(record)
    return Message(content, metadata=message.metadata)  # type: ignore[call-overload,no-any-return]


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    num_supernodes: int,
    *,
    run_config: Mapping[str, Any] | None = None,
) -> Context:
    """Run a federation in this process; the counterpart of Flower's `run_simulation`.

    Returns
    -------
    Context
        The ServerApp's, with the state it left.
    """
    grid = InProcessGrid(client_app, num_supernodes, run_config=run_config)
    context = Context(
        run_id=1,
        node_id=0,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config or {}),
    )
    server_app(grid, context)
    return context
