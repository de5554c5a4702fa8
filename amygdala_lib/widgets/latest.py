"""Latest: work in a thread of which only the last request counts."""

from __future__ import annotations

import threading
from collections.abc import Callable

Job = Callable[[Callable[[], bool]], None]
"""Called with a function that tells whether a later job has taken its place."""


class Latest:
    """Runs jobs in one thread, one after another; a new one takes the place of those before.

    A job that waits is dropped, one that runs is told, by its argument, and ends when it looks.
    So the last request always runs last, and never beside another. What a job raises goes to
    `on_error`, unless another has taken its place.
    """

    def __init__(self, on_error: Callable[[Exception], None]):
        self._on_error = on_error
        self._changed = threading.Condition()
        self._waiting: Job | None = None
        self._number = 0
        self._running = False

    def submit(self, job: Job) -> None:
        with self._changed:
            self._number += 1
            self._waiting = job
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="amygdala widget", daemon=True).start()

    def cancel(self) -> None:
        """Drop what waits, and tell what runs."""
        with self._changed:
            self._number += 1
            self._waiting = None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs; False if that took longer than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                job, number = self._waiting, self._number
                self._waiting = None
                if job is None:
                    self._running = False
                    self._changed.notify_all()
                    return

            def replaced(number: int = number) -> bool:
                return self._number != number

            try:
                job(replaced)
            except Exception as error:
                if not replaced():
                    self._on_error(error)
