"""A thread that computes the newest request; older ones that nobody waits for any more are dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Request = TypeVar("Request")


class Latest(Generic[Request]):
    """Runs `steps(request)` in a thread of its own, and lets go of it when a newer request has come.

    steps: a generator function; between two of its yields it may be dropped, so that what matters most comes first.
    failed: told of an exception (the thread lives on). busy: told True when work begins and False when none is left.
    All three run in the thread. So a control that is dragged never queues up stale pictures.
    """

    def __init__(
        self,
        steps: Callable[[Request], Iterator[object]],
        failed: Callable[[Request, Exception], None],
        busy: Callable[[bool], None],
    ) -> None:
        self._steps, self._failed, self._busy = steps, failed, busy
        self._condition = threading.Condition()
        self._waiting: list[Request] = []
        self._working = self._closed = False
        threading.Thread(target=self._run, name="backsight explorer", daemon=True).start()

    def submit(self, request: Request) -> None:
        """Ask for this instead of whatever is waiting or being computed; returns at once."""
        with self._condition:
            self._waiting[:] = [request]
            self._condition.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Until nothing waits and nothing runs; False after `timeout` seconds."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._waiting and not self._working, timeout)

    def close(self) -> None:
        """Give up what is waiting, and end the thread after its present step."""
        with self._condition:
            self._closed = True
            self._waiting.clear()
            self._condition.notify_all()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                request = self._waiting.pop()
                self._working = True
            self._busy(True)
            try:
                for _ in self._steps(request):
                    with self._condition:
                        if self._waiting or self._closed:
                            break
            except Exception as error:  # whatever it was, the page must say it and live on
                self._failed(request, error)
            with self._condition:
                self._working = False
                idle = not self._waiting
                self._condition.notify_all()
            if idle:
                self._busy(False)
