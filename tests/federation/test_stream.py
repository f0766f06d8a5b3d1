"""Replies are handed on in order and as they come; few messages are under way, none is kept."""

import gc
import weakref

import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from eclm_flower.federation import InProcessGrid
from eclm_flower.federation.exchange import Deadline, stream

NODES = 8


class Drawn:
    """A grid on which a look finds as many replies as are drawn, of any of the open messages."""

    def __init__(self, draw, silent=()):
        InProcessGrid(ClientApp(), 1)  # messages can only be made inside a run
        self.draw, self.silent = draw, set(silent)
        self.pushed: list[int] = []
        self.open: dict[str, Message] = {}

    def push_messages(self, messages):
        ids = []
        for message in messages:
            number = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = f"m{number}"
            self.pushed.append(number)
            self.open[f"m{number}"] = message
            ids.append(f"m{number}")
        return ids

    def pull_messages(self, message_ids):
        there = [one for one in sorted(message_ids) if int(one[1:]) not in self.silent]
        some = self.draw(there)
        return [answer(self.open.pop(message_id)) for message_id in some]


def question(number):
    return Message(RecordDict(), dst_node_id=number, message_type="train")


def answer(message):
    number = MetricRecord({"number": message.metadata.dst_node_id})
    return Message(RecordDict({"m": number}), reply_to=message)


def number_of(reply):
    return reply.content["m"]["number"]


def one_or_more(data):
    """Draw which of the replies that are there are found by a look, and in what order."""

    def draw(there):
        if not there:
            return []
        size = data.draw(st.integers(1, len(there)))
        return data.draw(st.permutations(there))[:size]

    return draw


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr("eclm_flower.federation.exchange.time.sleep", lambda seconds: None)


@given(data=st.data(), number=st.integers(0, 40), window=st.none() | st.integers(1, 40))
def test_replies_come_in_the_order_of_the_messages_and_the_window_is_kept(data, number, window):
    grid = Drawn(one_or_more(data))
    handed_on, built = [], []

    def messages():
        for one in range(1, number + 1):
            built.append(one)
            # What is built is sent and not yet handed on: it was room for it that it was built for.
            assert window is None or len(built) - len(handed_on) <= window
            yield question(one)

    for reply in stream(grid, messages(), until=Deadline.after(60), window=window):
        handed_on.append(number_of(reply))
    assert handed_on == grid.pushed == list(range(1, number + 1))


def test_a_message_is_not_built_before_there_is_room():
    grid = Drawn(lambda there: there[:1])
    built = []

    def messages():
        for one in range(1, NODES + 1):
            built.append(one)
            yield question(one)

    replies = stream(grid, messages(), until=Deadline.after(60), window=3)
    assert not built
    assert number_of(next(replies)) == 1
    assert built == [1, 2, 3]
    assert number_of(next(replies)) == 2
    assert built[-1] <= 2 + 3
    assert [number_of(reply) for reply in replies] == [3, 4, 5, 6, 7, 8]


def test_at_the_deadline_what_came_is_handed_on_and_nothing_more_is_waited_for(monkeypatch):
    now = 0.0
    clock = "eclm_flower.federation.exchange.time"
    monkeypatch.setattr(f"{clock}.monotonic", lambda: now)

    def sleep(seconds):
        nonlocal now
        now += max(seconds, 0.01)

    monkeypatch.setattr(f"{clock}.sleep", sleep)
    grid = Drawn(lambda there: there, silent={2})
    messages = (question(number) for number in range(1, 5))
    replies = list(stream(grid, messages, until=Deadline(5.0)))
    assert [number_of(reply) for reply in replies] == [1, 3, 4]
    assert 5.0 <= now < 6.5


def test_two_replies_to_a_message_are_handed_on_one_after_the_other():
    class Twice(Drawn):
        def pull_messages(self, message_ids):
            return [reply for reply in super().pull_messages(message_ids) for _ in range(2)]

    grid = Twice(lambda there: there[::-1])
    messages = (question(number) for number in range(1, 4))
    replies = stream(grid, messages, until=Deadline.after(60))
    assert [number_of(reply) for reply in replies] == [1, 1, 2, 2, 3, 3]


def test_neither_messages_nor_replies_are_kept():
    sent, came = [], []

    class Forgetting(Drawn):
        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            came.extend(weakref.ref(reply) for reply in replies)
            return replies

    def messages():
        for number in range(1, NODES + 1):
            message = question(number)
            sent.append(weakref.ref(message))
            yield message
            del message

    grid = Forgetting(lambda there: there[:1])
    for reply in stream(grid, messages(), until=Deadline.after(60), window=2):
        number = number_of(reply)
        del reply
        gc.collect()
        assert not any(kept() for kept in came)
        assert not any(kept() for kept in sent[:number])
    assert len(sent) == len(came) == NODES


def test_nobody_is_asked_after_the_deadline():
    grid = Drawn(lambda there: there)
    questions = map(question, range(NODES))
    came = stream(grid, questions, until=Deadline.after(0), window=3)
    assert [number_of(reply) for reply in came] == [0, 1, 2]
    assert grid.pushed == [0, 1, 2]
