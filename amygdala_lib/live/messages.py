"""Messages: JSON over a unix socket, between a training worker and whoever supervises it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from ..errors import LiveError
from .jobs import Refusal

SOCKET = "worker.sock"
_LONGEST_PATH = 107  # bytes of a unix socket's name
_WAITING = 256  # messages in a socket's own queue
_OVERHEAD = 4096  # bytes of a message besides the job in it

Envelope = list[bytes]


class Mailbox:
    """Where a worker's messages come in; every one is answered, in any order."""

    def __init__(self, path: Path, limit: int):
        """Raises LiveError if the path is too long for a socket. One left by another is replaced.

        limit: bytes of a job; a connection that sends more than that is cut.
        """
        if (length := len(os.fsencode(path))) > _LONGEST_PATH:
            raise LiveError(
                f"{path} has {length} bytes, and a socket's name at most {_LONGEST_PATH}: choose a "
                "shorter runtime folder (AMYGDALA_RUNTIME)"
            )
        self.path = path
        path.unlink(missing_ok=True)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.maxmsgsize = limit + _OVERHEAD
        self._socket.linger = 1000
        self._socket.rcvhwm = self._socket.sndhwm = _WAITING
        self._socket.bind(f"ipc://{path}")
        path.chmod(0o600)

    def receive(self, timeout: float) -> tuple[Envelope, Mapping[str, Any]] | None:
        """The next message; None after `timeout` seconds. What is no object is answered here."""
        if not self._socket.poll(timeout * 1000):
            return None
        *envelope, payload = self._socket.recv_multipart()
        try:
            message = json.loads(payload, parse_constant=_refuse_constant)
            if not isinstance(message, dict):
                raise ValueError(f"it is a {type(message).__name__}")
        except (ValueError, RecursionError) as error:
            refusal = Refusal("invalid", f"a message is a JSON object: {error}")
            self.answer(envelope, refused(refusal))
            return None
        return envelope, message

    def answer(self, envelope: Envelope, content: Mapping[str, Any]) -> None:
        """To whom has gone since, nothing is sent."""
        self._socket.send_multipart([*envelope, json.dumps(content).encode()])

    def close(self) -> None:
        self._socket.close()
        self._context.term()
        self.path.unlink(missing_ok=True)


async def ask(
    path: Path, message: Mapping[str, Any], *, timeout: float | None, limit: int
) -> dict[str, Any]:
    """Send a message to the worker that listens at `path`; its answer.

    Raises Refusal: invalid for a message of more than `limit` bytes or of what JSON has no form
    for; down if nobody answers within `timeout` seconds. The worker may have read it all the same.
    """
    try:
        payload = json.dumps(message, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Refusal("invalid", f"the message is no JSON: {error}") from error
    if len(payload) > limit + _OVERHEAD:
        raise Refusal("invalid", f"{len(payload):,} bytes: at most {limit:,} are taken")
    if not path.exists():
        raise Refusal("down", f"no training worker listens at {path}")
    # A socket for each message: what was for a worker that has died never reaches the next.
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    try:
        socket.linger, socket.immediate = 0, 1
        socket.connect(f"ipc://{path}")
        milliseconds = -1 if timeout is None else timeout * 1000
        if not await socket.poll(milliseconds, zmq.POLLOUT):
            raise Refusal("down", f"no training worker takes messages at {path}")
        await socket.send_multipart([b"", payload])
        if not await socket.poll(milliseconds):
            raise Refusal("down", f"the training worker has not answered within {timeout:g} s")
        return json.loads((await socket.recv_multipart())[-1])
    finally:
        socket.close()


def refused(refusal: Refusal) -> dict[str, Any]:
    return {"ok": False, "error": str(refusal), "kind": refusal.kind}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")
