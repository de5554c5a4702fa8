"""Load: requests that keep a server busy, and how long each of them took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import count
from threading import Event, Thread
from typing import Any

import pandas as pd

from ..errors import LiveError
from .server import Server


class Load:
    """Within the block, each of `connections` asks one request after the other.

    prompts: token ids, taken in turn. max_tokens: of each answer. A request that fails is kept with
    its error; the others go on.
    """

    def __init__(
        self,
        server: Server,
        prompts: Sequence[Sequence[int]],
        *,
        connections: int = 2,
        max_tokens: int = 16,
    ):
        self._server, self._prompts, self._max_tokens = server, prompts, max_tokens
        self._rows: list[dict[str, Any]] = []
        self._numbers, self._stopping = count(), Event()
        self._zero = time.perf_counter()
        self._threads = [Thread(target=self._ask, daemon=True) for _ in range(connections)]

    def __enter__(self) -> Load:
        self._zero = time.perf_counter()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Every request that was begun is waited for."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def now(self) -> float:
        """Seconds since the block was entered."""
        return time.perf_counter() - self._zero

    def frame(self) -> pd.DataFrame:
        """A row per request, by its `start` (s): `seconds`, `tokens` answered, `error` or None."""
        columns = ["start", "seconds", "tokens", "error"]
        return pd.DataFrame(self._rows, columns=columns).sort_values("start", ignore_index=True)

    def _ask(self) -> None:
        while not self._stopping.is_set():
            prompt = self._prompts[next(self._numbers) % len(self._prompts)]
            start, tokens, error = self.now(), 0, None
            try:
                tokens = len(self._server.complete(prompt, self._max_tokens).token_ids)
            except LiveError as problem:
                error = str(problem)
                self._stopping.wait(0.1)  # a server that is gone refuses at once
            row = {"start": start, "seconds": self.now() - start, "tokens": tokens, "error": error}
            self._rows.append(row)
