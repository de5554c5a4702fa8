"""A vLLM server as `amygdala serve` starts it, and what tests ask of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

READY = 300.0  # seconds; a server is ready after 30 on a quiet machine
OPTIONS = (
    *("--max-model-len", "512", "--kv-cache-memory-bytes", str(64 << 20)),
    *("--served-model-name", "served", "--max-num-seqs", "32"),
)
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}


@dataclass
class Server:
    """A running server: where it is, its token and folder, its processes and its log."""

    url: str
    token: str
    runtime: Path
    model: Path
    process: subprocess.Popen
    log: Path

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.token}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=120)
        self.anyone = httpx.Client(base_url=self.url, timeout=120)

    def close(self) -> None:
        self.http.close()
        self.anyone.close()

    def complete(self, prompt: str | list, **options: Any) -> dict[str, Any]:
        """The answer of /v1/completions, greedy, with 8 tokens."""
        body = {"model": "served", "prompt": prompt, "max_tokens": 8, "temperature": 0}
        answer = self.anyone.post("/v1/completions", json=body | options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def scores(self, ids: Sequence[int], **options: Any) -> list[float]:
        """Log-probabilities of a text's tokens but the first, as the server has them."""
        found = self.complete(list(ids), max_tokens=1, prompt_logprobs=0, **options)
        rows = found["choices"][0]["prompt_logprobs"]
        return [row[str(token)]["logprob"] for row, token in zip(rows[1:], ids[1:], strict=True)]

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.http.request(method, f"/v1/amygdala{path}", **options)

    def train(self, job: Mapping[str, Any], timeout: float = 300) -> dict[str, Any]:
        """What came of a job, once it is done or has failed."""
        answer = self.call("POST", "/train", json=job)
        assert answer.status_code == 202, answer.text
        return self.result(answer.json()["job"], timeout)

    def result(self, name: str, timeout: float = 300) -> dict[str, Any]:
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            answer = self.call("GET", f"/train/{name}")
            if answer.status_code == 200 and "result" in answer.json():
                return answer.json()["result"]
            time.sleep(0.1)
        raise TimeoutError(f"{name}: {answer.text}")

    def ready(self, timeout: float = 120) -> dict[str, Any]:
        """The status, once the training worker is attached."""
        until = time.monotonic() + timeout
        while True:
            found = self.call("GET", "/status").json()
            if found.get("state") == "ready" and found["ok"]:
                return found
            assert time.monotonic() < until, found
            time.sleep(0.2)

    def processes(self) -> dict[str, psutil.Process]:
        """The API server, the engine's core, the process that computes, and the trainer."""
        (api,) = psutil.Process(self.process.pid).children()
        below = {child.pid: child for child in api.children(recursive=True)}
        owner = psutil.Process(self.call("GET", "/status").json()["server"]["pid"])
        trainer = next(c for c in below.values() if "amygdala_lib.live.worker" in c.cmdline())
        return {"api": api, "engine": owner.parent(), "worker": owner, "trainer": trainer}


@contextmanager
def serving(
    model: Path,
    runtime: Path,
    *,
    readout: Path | None = None,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server on a port of its own, ready; nothing of it is left afterwards."""
    port = _free_port()
    log = runtime.with_name(f"{runtime.name}.log")
    command = [sys.executable, "-m", "amygdala_lib.cli", "serve", str(model)]
    command += ["--port", str(port), "--runtime", str(runtime)]
    command += ["--readout", str(readout)] if readout else []
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*command, "--", *OPTIONS, *options],
            stdout=file,
            stderr=file,
            env=os.environ | QUIET | (environment or {}),
        )
    server = None
    try:
        _wait(process, port, log)
        token = (runtime / "token").read_text().strip()
        server = Server(f"http://127.0.0.1:{port}", token, runtime, model, process, log)
        yield server
    finally:
        left = _family(process.pid)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)  # at once
                process.wait(30)
        if server is not None:
            server.close()
        _, alive = psutil.wait_procs(left, timeout=20)
        for each in alive:
            each.kill()
        assert not alive, f"left behind: {[each.name() for each in alive]}"


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _wait(process: subprocess.Popen, port: int, log: Path) -> None:
    until = time.monotonic() + READY
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    raise RuntimeError(f"no server: {log.read_text(errors='replace')[-6000:]}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
