"""Operations: training, checkpoints, readouts and steering of one server, behind its endpoints."""

from __future__ import annotations

import asyncio
import functools
import hmac
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import LiveError
from ..live.jobs import KINDS
from .arrivals import Arrivals, Written, arrivals
from .settings import RUNTIME, Settings

if TYPE_CHECKING:
    from argparse import Namespace

    from ..directions import Directions
    from ..live.supervisor import Supervisor

TOKEN = "token"
"""The file that holds it, in the runtime folder."""

RECORD = "record.json"
"""What the training worker writes anew when the weights have come to rest after a change."""

_TOKEN_BYTES = 16, 4096
_LOOK = 0.1  # seconds between looks whether the weights have changed
_REFRESH = 5.0  # seconds between looks at the worker, for metrics


class Refused(Exception):
    """What was asked for is not done: a status code, a kind, and why."""

    def __init__(self, status: int, kind: str, message: str):
        super().__init__(message)
        self.status, self.kind = status, kind


class Operations:
    """What can be asked of a server. Each gives a status code and JSON, or raises Refused."""

    def __init__(self, settings: Settings, engine: Any, args: Namespace):
        """Raises LiveError if this server must not be started."""
        from ..live.private import private_folder, read_private
        from ..live.supervisor import Supervisor

        if settings.runtime is None:
            raise LiveError(f"{RUNTIME} is not set: start the server with `amygdala serve`")
        if getattr(args, "api_server_count", None) not in (None, 1):
            raise LiveError(
                f"there are {args.api_server_count} API servers, of which each would steer for "
                "itself: leave out --api-server-count"
            )
        self.engine = engine
        self.arrivals: Arrivals = arrivals()
        self.runtime = private_folder(settings.runtime)
        least, most = _TOKEN_BYTES
        self._token = read_private(self.runtime / TOKEN, most).strip()
        if len(self._token) < least:
            raise LiveError(
                f"{self.runtime / TOKEN} holds {len(self._token)} characters: a token has at least "
                f"{least}; delete it, and `amygdala serve` writes another"
            )
        after = settings.checkpoint_after
        self.supervisor: Supervisor = Supervisor(
            self.runtime, **({} if after is None else {"checkpoint_after": after})
        )
        self.known: dict[str, Any] = {}
        """The last status, for metrics."""
        self._change = self._change_seen()
        self._tasks: list[asyncio.Task[None]] = []
        self._loop = asyncio.get_running_loop()

    async def start(self) -> None:
        """Start the training worker. Raises LiveError if there are no weights for it."""
        from ..live.handle_file import HandleFile
        from .export import HANDLES
        from .metrics import publish

        # A loader of its own, for tensorised weights say, shares nothing.
        HandleFile.read(self.runtime / HANDLES)
        await self.supervisor.start()
        self._tasks = [
            asyncio.create_task(self._watch_changes()),
            asyncio.create_task(self._refresh()),
        ]
        publish(self)
        _stop_before(self.engine, self)

    async def stop(self) -> None:
        """End the training worker, which writes what no checkpoint has yet. Safe to call twice."""
        tasks, self._tasks = self._tasks, []
        if tasks:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.supervisor.stop()

    def stop_from_thread(self) -> None:
        """`stop`, from a thread that may wait for it; nothing if that is done, or the loop over."""
        if self._tasks and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self.stop(), self._loop).result()

    def is_token(self, told: str) -> bool:
        """Whether this is the server's token; how far one is right cannot be timed."""
        return hmac.compare_digest(told.encode(), self._token)

    # Training

    async def train(self, content: object) -> tuple[int, Any]:
        return 202, await self._asked({"do": "train", "job": content})

    async def job(self, job: str) -> tuple[int, Any]:
        found = await self._asked({"do": "status", "job": job})
        self._notice_changes()  # before the caller knows that the job has ended
        return 200, found

    async def status(self) -> tuple[int, Any]:
        self.known = await self.supervisor.status()
        self._notice_changes()
        directions = self.arrivals.directions
        return 200, {
            **self.known,
            "weights_version": self.arrivals.version,
            "steering": self.arrivals.default,
            "readout": directions
            and {"concepts": directions.concepts, "layers": directions.layers},
        }

    async def checkpoint(self, content: object) -> tuple[int, Any]:
        if content not in (None, {}):
            raise Refused(422, "invalid", "a checkpoint has no settings: send {} or nothing")
        return 200, await self._asked({"do": "checkpoint"}, timeout=None)

    async def rollback(self, content: object) -> tuple[int, Any]:
        if not isinstance(content, dict) or set(content) != {"to"}:
            raise Refused(422, "invalid", 'give {"to": ID}, the id of a state in the history')
        found = await self._asked({"do": "rollback", "to": content["to"]}, timeout=None)
        self._notice_changes()
        return 200, found

    async def history(self) -> tuple[int, Any]:
        return 200, await self._asked({"do": "history"}, timeout=None)

    # Readouts and steering

    async def readout(self, request_id: str) -> tuple[int, Any]:
        """A row per generated token: the state from which it was chosen.

        `values` are projections (tokens by layers by concepts); `mean` and `std` (layers by
        concepts) make z-scores of them.
        """
        directions = self._directions()
        layers = directions.layers
        written = self.arrivals.written(request_id)
        (found,) = await self.engine.collective_rpc("amygdala_readout", args=(request_id,))
        shape = (-1, len(layers), len(directions.concepts))
        recorded = {
            name: (positions, np.frombuffer(values, np.float32).reshape(shape))
            for name, positions, values in found
        }
        sequences = [
            _answered(name, *recorded[name], answer)
            for name, answer in written.items()
            if name in recorded
        ]
        if not sequences:
            raise Refused(
                404,
                "unknown",
                f"no readout of a request {request_id[:200]!r}: give the id of its response, soon "
                "(the last ones are kept)",
            )
        return 200, {
            "request_id": request_id,
            "concepts": directions.concepts,
            "layers": layers,
            "mean": [directions.means[layer].tolist() for layer in layers],
            "std": [directions.stds[layer].tolist() for layer in layers],
            "sequences": sequences,
        }

    async def steering(self) -> tuple[int, Any]:
        directions = self._directions()
        return 200, {
            "steering": self.arrivals.default,
            "concepts": directions.concepts,
            "layers": directions.layers,
        }

    async def steer(self, content: object) -> tuple[int, Any]:
        """The steering of all requests from now on that bring none of their own."""
        self._directions()
        self.arrivals.default = self.arrivals.read_steering(content)
        return await self.steering()

    async def unsteer(self) -> tuple[int, Any]:
        self.arrivals.default = {}
        return await self.steering()

    # What is behind them

    def _directions(self) -> Directions:
        if self.arrivals.directions is None:
            raise Refused(
                409, "unavailable", "this server reads nothing: start it with --readout FOLDER"
            )
        return self.arrivals.directions

    async def _asked(self, message: dict[str, Any], timeout: float | None = 30.0) -> dict[str, Any]:
        found = await self.supervisor.request(message, timeout)
        if found.pop("ok"):
            return found
        raise Refused(KINDS[found["kind"]], found["kind"], found["error"])

    async def _refresh(self) -> None:
        while True:
            self.known = await self.supervisor.status()
            await asyncio.sleep(_REFRESH)

    async def _watch_changes(self) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            self._notice_changes()

    def _notice_changes(self) -> None:
        """Requests from now on use nothing that was computed with the weights before a change."""
        seen = self._change_seen()
        if seen != self._change:
            self._change = seen
            self.arrivals.version += 1

    def _change_seen(self) -> tuple[int, int] | None:
        """Another one whenever the worker, whoever asked it, has changed the weights."""
        try:
            found = (self.runtime / RECORD).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns


def _answered(
    name: str, positions: list[int], values: np.ndarray, answer: Written
) -> dict[str, Any]:
    """The rows of the tokens that were answered: a step that was already under way is left out."""
    token_ids = list(answer.token_ids)
    kept = [n for n, position in enumerate(positions) if position < len(token_ids)]
    return {
        "id": name,
        "finished": answer.finished,
        "positions": [positions[n] for n in kept],
        "token_ids": [token_ids[positions[n]] for n in kept],
        "values": values[kept].tolist(),
    }


def _stop_before(engine: Any, operations: Operations) -> None:
    """Let vLLM's way of ending the engine end training first, while there are weights to save."""
    shutdown = engine.shutdown

    @functools.wraps(shutdown)
    def after_training(*given: Any, **named: Any) -> None:
        try:
            # vLLM ends the engine from a thread, so that the loop goes on.
            if not _in_a_loop():
                operations.stop_from_thread()
        finally:
            shutdown(*given, **named)

    engine.shutdown = after_training


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
