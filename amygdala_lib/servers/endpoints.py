"""Endpoints: what a plain server answers over HTTP at a private unix socket, as vLLM's does.

Completions by token ids, and /v1/amygdala without changing the steering of all requests; `Client`
and `Server` speak to it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from itertools import chain
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from threading import Thread
from typing import Any

from ..errors import LiveError
from ..live.jobs import KINDS, Refusal
from ..live.supervisor import Supervisor
from .engine import Engine, Request

_IDLE = 300.0  # seconds that a connection may be silent
_BODY = 8 << 20  # bytes
_SOON = 30.0  # seconds for the worker to answer
_JOB = re.compile(r"/v1/amygdala/train/([\w-]{1,64})")
_READOUT = re.compile(r"/v1/amygdala/readout/([\w-]{1,64})")
_ASKED = {
    "/v1/amygdala/train": ("train", _SOON),
    "/v1/amygdala/checkpoint": ("checkpoint", None),
    "/v1/amygdala/rollback": ("rollback", None),
    "/v1/amygdala/history": ("history", None),
}
"""What of the worker is asked, and for how long is waited."""


@contextmanager
def listening(path: Path, engine: Engine, supervisor: Supervisor) -> Iterator[None]:
    """Answer at a unix socket within the block, in threads; call it in the supervisor's loop.

    The socket is this user's alone, and gone afterwards.
    """
    server = _Server(path, engine, supervisor)
    path.chmod(0o600)
    thread = Thread(target=server.serve_forever, args=(0.1,), name="endpoints", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        path.unlink(missing_ok=True)


class _Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, path: Path, engine: Engine, supervisor: Supervisor):
        self.engine, self.supervisor = engine, supervisor
        self._loop = asyncio.get_running_loop()
        super().__init__(str(path), _Handler)

    def asked(self, message: Mapping[str, Any], timeout: float | None) -> dict[str, Any]:
        """The worker's answer. Raises Refusal."""
        coroutine = self.supervisor.request(message, timeout)
        found = asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
        if found.pop("ok"):
            return found
        raise Refusal(found["kind"], found["error"])

    def status(self) -> dict[str, Any]:
        found = asyncio.run_coroutine_threadsafe(self.supervisor.status(), self._loop).result()
        readout = self.engine.readout
        held = readout and {
            "concepts": readout.directions.concepts,
            "layers": readout.directions.layers,
        }
        return {**found, "readout": held}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _IDLE
    server: _Server

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, form: str, *given: Any) -> None:
        """Nothing: requests are many."""

    def _answer(self, operation: Callable[[], tuple[int, Any] | None]) -> None:
        try:
            found = operation()
            if found is not None:
                self._send(*found)
        except (Refusal, LiveError) as error:
            kind = getattr(error, "kind", "invalid")
            self._send(KINDS[kind], {"error": str(error), "kind": kind})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _get(self) -> tuple[int, Any] | None:
        if self.path == "/v1/models":
            return 200, {"data": [{"id": self.server.engine.lm.name, "owned_by": "plain"}]}
        if self.path == "/v1/amygdala/status":
            return 200, self.server.status()
        if found := _JOB.fullmatch(self.path):
            return 200, self.server.asked({"do": "status", "job": found[1]}, _SOON)
        if found := _READOUT.fullmatch(self.path):
            return 200, self._readout(found[1])
        return self._worker({})

    def _post(self) -> tuple[int, Any] | None:
        content = self._body()
        if self.path == "/v1/completions":
            return self._complete(content)
        return self._worker(content)

    def _worker(self, content: Any) -> tuple[int, Any]:
        action, timeout = _ASKED.get(self.path, (None, None))
        if action is None or (action == "history") != (self.command == "GET"):
            raise Refusal("unknown", f"a plain server has no {self.command} {self.path[:200]}")
        message: dict[str, Any] = {"do": action}
        if action == "train":
            message["job"] = content
        elif action == "rollback":
            message["to"] = content.get("to") if isinstance(content, dict) else None
        return 202 if action == "train" else 200, self.server.asked(message, timeout)

    def _body(self) -> Any:
        told = self.headers.get("Content-Length", "")
        if not told.isdigit() or int(told) > _BODY:
            self.close_connection = True  # what was sent is not read
            raise Refusal("invalid", f"a body has a Content-Length of at most {_BODY:,} bytes")
        try:
            return json.loads(self.rfile.read(int(told)) or "null")
        except (ValueError, RecursionError) as error:
            raise Refusal("invalid", f"the body is no JSON: {error}") from error

    def _complete(self, content: Any) -> tuple[int, Any] | None:
        if not isinstance(content, dict) or not isinstance(content.get("prompt"), list):
            raise LiveError("prompt: give a list of token ids")
        if content.get("temperature", 0) != 0:
            raise LiveError("temperature: a plain server takes the likeliest token, give 0")
        engine = self.server.engine
        request = engine.submit(
            content["prompt"],
            content.get("max_tokens", 16),
            steering=_steering(content.get("vllm_xargs")),
            ignore_eos=content.get("ignore_eos") is True,
        )
        if content.get("stream") is True:
            self._stream(request)
            return None
        for _ in engine.written(request):
            pass
        return 200, _completion(request, scored=content.get("prompt_logprobs") is not None)

    def _stream(self, request: Request) -> None:
        """Server-sent events, a token each; the connection ends with them."""
        written = self.server.engine.written(request)
        first = next(written)  # or it is refused, with a status of its own
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        sent = 0
        try:
            for n in chain([first], written):
                choice = {"token_ids": request.token_ids[sent:n]}
                self._event({"id": request.name, "choices": [choice]})
                sent = n
        except LiveError as error:  # too late for a status
            self._event({"error": str(error)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: Any) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())

    def _readout(self, name: str) -> dict[str, Any]:
        engine = self.server.engine
        request = engine.request(name)
        if engine.readout is None or request is None:
            raise Refusal("unknown", f"no readout of a request {name!r}: the last ones are kept")
        n = len(request.token_ids)
        directions = engine.readout.directions
        return {
            "request_id": name,
            "concepts": directions.concepts,
            "layers": directions.layers,
            "mean": [directions.means[layer].tolist() for layer in directions.layers],
            "std": [directions.stds[layer].tolist() for layer in directions.layers],
            "sequences": [
                {
                    "positions": list(range(n)),
                    "token_ids": request.token_ids[:n],
                    "values": [values.tolist() for values in request.values[:n]],
                    "finished": request.state != "running",
                }
            ],
        }

    def _send(self, status: int, content: Any) -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


def _steering(told: object) -> dict[str, Any] | None:
    """Where vLLM has it: JSON text, as its extra arguments hold no objects."""
    if told is None:
        return None
    try:
        found = json.loads(told["amygdala_steering"])
        strengths = found.get("strengths", found)
        layers = found.get("layers") if "strengths" in found else None
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        example = '{"amygdala_steering": "{\\"calm\\": 0.5}"}'
        raise LiveError(f"vllm_xargs: give {example} ({error})") from error
    return {"strengths": strengths, "layers": layers} if strengths else None


def _completion(request: Request, *, scored: bool) -> dict[str, Any]:
    choice = {
        "token_ids": request.token_ids,
        "finish_reason": request.state,
        "logprobs": {"token_logprobs": request.log_probabilities},
    }
    if scored:
        pairs = zip(request.prompt[1:], request.prompt_log_probabilities, strict=True)
        choice["prompt_logprobs"] = [None, *({str(t): {"logprob": p}} for t, p in pairs)]
    return {"id": request.name, "choices": [choice]}
