"""ECLM: every device gets the modules that matter for its data and fit its budget."""

from __future__ import annotations

from flwr.app import ArrayRecord

from eclm_flower import ECLM, receive, reply
from strategies.method import Method

METHOD = Method(
    name="eclm",
    arrays=lambda model: ArrayRecord(model.state_dict()),
    strategy=ECLM,
    receive=receive,
    reply=reply,
)
