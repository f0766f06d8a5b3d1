"""Seconds that parts of a program take, without the parts within them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


class Stopwatch:
    """Times functions by the name of a part; time within a timed function is that one's alone.

    Attributes
    ----------
    seconds : Counter
        Part -> seconds so far.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._running: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Time what happens within."""
        self._switch()
        self._running.append(part)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and is timed; of a generator, each step is."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.timing(part):
                result = function(*args, **kwargs)
            return self._steps(part, result) if isinstance(result, Iterator) else result

        return call

    def _steps(self, part: str, steps: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self.timing(part):
                try:
                    item = next(steps)
                except StopIteration:
                    return
            yield item
            del item

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time a method of an object or class, or a function of a module, from now on."""
        setattr(owner, name, self.timed(part, getattr(owner, name)))
