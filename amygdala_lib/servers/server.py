"""Server: a running server as its callers see it, whatever serves."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from jaxtyping import Float

from ..errors import LiveError
from ..live.client import Client
from ..live.connection import RUNTIME, Connection, found_token, read_token
from ..training import Example
from . import guard

SOCKET = "server.sock"
TOKEN = "token"
_LOG = "server.log"
_TIMEOUT = 120.0  # seconds for an answer
_READY = 300.0  # seconds for a server to load its model, and for its worker to attach
_LOOK = 0.2  # seconds between looks whether it is ready
_ENDING = 90.0  # seconds for all of it to end: more than the guard's patience
_SHOWN = 3000  # characters of a log's end
_ERRORS = 10  # before that
_ERROR = re.compile(r"\b\w*(?:Error|Exception): .{1,400}")


@dataclass(frozen=True)
class Completion:
    """What was generated: its tokens, their log-probabilities (nats), and how long it took (s)."""

    id: str
    token_ids: list[int]
    log_probabilities: list[float]
    seconds: float


class Server:
    """Generates, and says how probable texts are; `client` trains it and reads it.

    engine: "plain" or "vllm", what serves. handles: the handle file for `live.attach`. Use it as a
    context manager, or call `close`, which ends a server that was started here; it ends with this
    process in any case. Methods may be called from several threads. All raise LiveError, with the
    server's own words, for what is refused and if nothing answers.
    """

    def __init__(self, url: str, runtime: Path, *, token: str | None = None):
        self.runtime = runtime
        self.client = Client(url, token)
        options = Connection(
            url, token, api_key=None, timeout=_TIMEOUT, insecure=False
        ).openai_options()
        self._http: httpx.Client = options["http_client"]
        self._base = options["base_url"]
        self._headers = {"Authorization": f"Bearer {options['api_key']}"}
        self._end: Callable[[], object] = lambda: None
        self.engine, self._model = "", ""

    @property
    def handles(self) -> Path:
        return self.runtime / "weights.json"

    @property
    def model_folder(self) -> Path:
        """The folder that was loaded, and that checkpoints are written to."""
        return Path(self.client.status()["model"])

    def __repr__(self) -> str:
        return f"<Server: {self.engine} at {self.client.url}>"

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server, if it was started here: no process, socket or file of it is left."""
        self.client.close()
        self._http.close()
        self._end()

    # Requests

    def complete(
        self,
        prompt: Sequence[int],
        max_tokens: int = 16,
        *,
        steering: Mapping[str, float] | None = None,
        layers: Sequence[int] | None = None,
    ) -> Completion:
        """The likeliest continuation, token by token; an end of text does not end it.

        steering: this request's own, strengths by concept as in `amy.steer`. layers: where; by
            default all that the server's readout has.
        """
        start = time.perf_counter()
        found = self._post(_request(prompt, max_tokens, steering, layers)).json()
        choice = found["choices"][0]
        return Completion(
            found["id"],
            choice["token_ids"],
            choice["logprobs"]["token_logprobs"],
            time.perf_counter() - start,
        )

    def stream(
        self,
        prompt: Sequence[int],
        max_tokens: int = 16,
        *,
        steering: Mapping[str, float] | None = None,
        layers: Sequence[int] | None = None,
    ) -> Iterator[tuple[str, list[int]]]:
        """As `complete`, while it is generated: the request's id, and all tokens so far."""
        content = self._content(_request(prompt, max_tokens, steering, layers) | {"stream": True})
        options = {"json": content, "headers": self._headers, "timeout": _TIMEOUT}
        written: list[int] = []
        try:
            with self._http.stream("POST", f"{self._base}/completions", **options) as answer:
                if not answer.is_success:
                    answer.read()
                    raise _refusal(answer)
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        found = json.loads(line.removeprefix("data: "))
                        if "error" in found:
                            raise LiveError(f"{self.client.url}: {found['error']}")
                        for choice in found["choices"]:
                            written += choice["token_ids"] or []
                            yield found["id"], list(written)
        except httpx.HTTPError as error:
            raise self._unanswered(error) from error

    def log_probabilities(self, ids: Sequence[int]) -> Float[np.ndarray, " tokens-1"]:
        """Of each token of a text but the first, in nats, as the server computes it."""
        asked = {"prompt": list(ids), "max_tokens": 1, "prompt_logprobs": 0}
        rows = self._post(asked).json()["choices"][0]["prompt_logprobs"]
        pairs = zip(rows[1:], ids[1:], strict=True)
        return np.array([row[str(token)]["logprob"] for row, token in pairs])

    def score(self, example: Example) -> float:
        """Mean log-probability of the continuation's tokens after their context, in nats."""
        found = self.log_probabilities([*example.context_ids, *example.continuation_ids])
        return float(found[-len(example.continuation_ids) :].mean())

    # Beginning and end

    def wait_until_ready(self, seconds: float = _READY) -> None:
        """Until it answers, and its training worker has attached.

        Raises LiveError, with the end of its log, if it ends or takes longer.
        """
        until = time.monotonic() + seconds
        while True:
            problem = "its training worker is not ready"
            try:
                status = self.client.status()
                if status["ok"] and status["state"] == "ready":
                    break
                problem = status.get("why") or status["worker"]["error"] or problem
            except LiveError as error:
                if getattr(error, "kind", None) == "invalid":  # a wrong token stays wrong
                    raise
                problem = str(error)
            if (self.runtime / guard.ENDED).exists():
                raise LiveError(f"the server has ended:\n{self._log()}")
            if time.monotonic() > until:
                raise LiveError(
                    f"no server after {seconds:g} s ({problem}); is another user of this machine "
                    f"busy? Its log:\n{self._log()}"
                )
            time.sleep(_LOOK)
        served = self._http.get(
            f"{self._base}/models", headers=self._headers, timeout=_TIMEOUT
        ).json()["data"][0]
        self._model, self.engine = served["id"], served.get("owned_by", "unknown")

    def _log(self) -> str:
        """Its errors, each once, as the first may be long past; then how it ends."""
        path = self.runtime / _LOG
        if not path.exists():
            return "(it has none here)"
        text = path.read_text(errors="replace")
        tail = text[-_SHOWN:]
        errors = dict.fromkeys(_ERROR.findall(text[:-_SHOWN]))
        return "\n".join([*list(errors)[:_ERRORS], tail])

    def _content(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self._model, "temperature": 0, **asked}

    def _post(self, asked: Mapping[str, Any]) -> httpx.Response:
        try:
            answer = self._http.post(
                f"{self._base}/completions",
                json=self._content(asked),
                headers=self._headers,
                timeout=_TIMEOUT,
            )
        except httpx.HTTPError as error:
            raise self._unanswered(error) from error
        if not answer.is_success:
            raise _refusal(answer)
        return answer

    def _unanswered(self, error: httpx.HTTPError) -> LiveError:
        return LiveError(f"no answer from {self.client.url} ({error}): {self._log()}")


def connect(url: str, runtime: Path | str | None = None, token: str | None = None) -> Server:
    """A server that runs already, on this machine.

    runtime: its private folder, which `amygdala serve` has printed; by default AMYGDALA_RUNTIME.
    token: by default AMYGDALA_TOKEN, or the file `token` in that folder. Raises LiveError if it
    does not answer, or the folder is not this user's alone.
    """
    runtime = runtime or os.environ.get(RUNTIME)
    if not runtime:
        raise LiveError(
            "attaching takes the server's private folder, which `amygdala serve` has printed: give "
            f"it, or set {RUNTIME}"
        )
    folder = Path(runtime).absolute()
    token = token or found_token()
    if token is None and (folder / TOKEN).exists():
        token = read_token(folder / TOKEN)
    server = Server(url, folder, token=token)
    try:
        server.wait_until_ready(10.0)
    except BaseException:
        server.close()
        raise
    return server


def launch(
    command: Sequence[str], runtime: Path, environment: Mapping[str, str], *, has_token: bool
) -> Server:
    """Start `command`, which listens at the socket in `runtime`, under a guard; wait until ready.

    has_token: whether it writes the token it asks for into `runtime`, before it listens. Both end,
    and the folder is removed, when the server is closed or this process ends. Raises LiveError
    with the end of its log if it does not come to listen.
    """
    watched = [sys.executable, "-I", guard.__file__, str(runtime), *command]
    with (runtime / _LOG).open("ab") as log:
        process = subprocess.Popen(
            watched,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | dict(environment),
            start_new_session=True,  # an interrupt of a notebook's cell is not for the server
        )
    try:
        token = _written_token(runtime) if has_token else None
        server = Server(f"unix:{runtime / SOCKET}", runtime, token=token)
        server.wait_until_ready()
    except BaseException:
        _ended(process, runtime)
        raise
    server._end = weakref.finalize(server, _ended, process, runtime)
    return server


def new_runtime() -> Path:
    """A private folder of its own, for one server."""
    return Path(tempfile.mkdtemp(prefix="amygdala-"))  # mode 0700


def _written_token(runtime: Path) -> str | None:
    """None if the server has ended before it wrote one, which `wait_until_ready` reports."""
    path, until = runtime / TOKEN, time.monotonic() + _READY
    while not path.exists() and time.monotonic() < until:
        if (runtime / guard.ENDED).exists():
            return None
        time.sleep(_LOOK)
    return read_token(path)


def _ended(process: subprocess.Popen, runtime: Path) -> None:
    """Close the guard's input, and wait until it has done what it is there for."""
    process.stdin.close()
    try:
        process.wait(_ENDING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(runtime, ignore_errors=True)  # if the guard was killed


def _request(
    prompt: Sequence[int],
    max_tokens: int,
    steering: Mapping[str, float] | None,
    layers: Sequence[int] | None,
) -> dict[str, Any]:
    asked = {"prompt": list(prompt), "max_tokens": max_tokens, "logprobs": 0}
    asked |= {"ignore_eos": True, "return_token_ids": True}
    if steering:
        told = {"strengths": dict(steering)} | ({} if layers is None else {"layers": list(layers)})
        asked["vllm_xargs"] = {"amygdala_steering": json.dumps(told)}
    return asked


def _refusal(answer: httpx.Response) -> LiveError:
    try:
        said = answer.json()["error"]
        said = said["message"] if isinstance(said, Mapping) else said
    except (ValueError, KeyError, TypeError):
        said = answer.text[:_SHOWN]
    return LiveError(f"{answer.url.path} answered {answer.status_code}: {said}")
