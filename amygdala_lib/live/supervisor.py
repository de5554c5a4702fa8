"""Supervisor: keeps a training worker running beside a server, and passes messages on to it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .jobs import Limits, Refusal
from .messages import SOCKET, ask, refused
from .private import private_folder
from .worker import LOCKED, WHO

LOG = "worker.log"
_LOG_BYTES = 4 << 20  # before a new worker begins another
_LEAST_DELAY, _MOST_DELAY = 0.5, 60.0  # seconds before a restart, twice as long each time
_HEALTHY = 60.0  # seconds after which a worker's end counts as the first again
_SOON = 2.0  # seconds for an answer that should be there at once
_STOPPING = 10.0  # seconds for it to hear that it is to end
_ENDING = 620.0  # seconds for a worker to end by itself: more than it takes for that


class Supervisor:
    """Starts the worker of a runtime folder, restarts it when it dies, and ends it.

    Everything but `start` and `stop` works in any process of this user that has the folder. Use it
    as an asynchronous context manager, or call both. Not for use from several event loops.

    runtime: the server's private folder, which holds or will hold `weights.json`.
    checkpoint_after: seconds from the last job to the checkpoint; None for none but those asked
        for.
    folder: the model folder that checkpoints are written to, by default the one the server was
        started from.
    threads: of torch in the worker.

    Raises LiveError if the folder is not this user's alone.
    """

    def __init__(
        self,
        runtime: Path | str,
        *,
        checkpoint_after: float | None = 600,
        folder: Path | str | None = None,
        threads: int | None = None,
        limits: Limits | None = None,
    ):
        self.runtime = private_folder(Path(runtime).absolute())
        self.limits = limits or Limits()
        self._command = [
            *(sys.executable, "-m", "amygdala_lib.live.worker"),
            *("--runtime", str(self.runtime), "--parent", str(os.getpid())),
            *("--checkpoint-after", str(checkpoint_after or 0)),
            *(("--folder", str(folder)) if folder else ()),
            *(("--threads", str(threads)) if threads else ()),
        ]
        for name, value in asdict(self.limits).items():
            self._command += [f"--{name.replace('_', '-')}", str(value)]
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._state, self._last_exit, self._restarts = "not started", None, 0
        self._known: dict[str, Any] = {}

    async def start(self) -> None:
        """Returns at once: the worker takes seconds to import torch and to attach."""
        if self._task is None:
            self._stopping.clear()
            self._task = asyncio.create_task(self._keep_running())

    async def stop(self, *, checkpoint: bool = True) -> None:
        """End the worker: nothing of it is left. Safe to call twice.

        A job that runs is taken back after its step. checkpoint: then write what no checkpoint has,
        if the server is still there; what cannot be written goes with the server's memory, as the
        log says.
        """
        if self._task is None:
            return
        self._stopping.set()  # from here on, no restart
        if self._process is not None and self._process.returncode is None:
            message = {"do": "stop", "checkpoint": checkpoint}
            told = await self.request(message, timeout=_STOPPING)
            await self._end(told["ok"])
        await self._task
        self._task, self._state = None, "stopped"
        for name in (SOCKET, WHO):  # of one that had to be killed
            if self._last_exit != _said(LOCKED):
                (self.runtime / name).unlink(missing_ok=True)

    async def __aenter__(self) -> Supervisor:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def request(
        self, message: Mapping[str, Any], timeout: float | None = 30.0
    ) -> dict[str, Any]:
        """The worker's answer: {"ok": true, ...} or {"ok": false, "error": text, "kind": ...}.

        `{"do": "train", "job": {...}}` has `job`, the name of a queued job; `{"do": "status"}` and
        `{"do": "status", "job": name}` how things stand. `{"do": "checkpoint"}`, `{"do":
        "rollback", "to": id}` and `{"do": "history"}` are answered when done, which takes as long
        as the job that runs: pass timeout=None. `{"do": "watch", "version": n}` is answered with
        the version of the weights once that is not n: after a job, done or taken back, or a
        rollback, when caches that were computed with other weights are stale.

        Kinds of refusal are `jobs.KINDS`; nothing is raised.
        """
        asked = asyncio.ensure_future(
            ask(
                self.runtime / SOCKET,
                message,
                timeout=timeout,
                limit=self.limits.message_bytes,
            )
        )
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({asked, ended}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            raise Refusal("down", f"the training worker has ended ({self._last_exit})")
        except Refusal as refusal:
            return refused(refusal)
        finally:
            for task in (asked, ended):
                task.cancel()
            await asyncio.gather(asked, ended, return_exceptions=True)

    async def status(self) -> dict[str, Any]:
        """The worker's status, and of the worker itself: state, process, restarts, last exit.

        Answers within seconds in any case: with what was last known (`stale`) if the worker is down
        or does not answer. `ok` says whether it did.
        """
        found = await self.request({"do": "status"}, timeout=_SOON)
        if found["ok"]:
            self._known = {name: value for name, value in found.items() if name != "ok"}
        process = self._process
        worker = {
            "state": "running" if found["ok"] else self._state,
            "pid": process.pid if process and process.returncode is None else None,
            "restarts": self._restarts,
            "last_exit": self._last_exit,
            "error": None if found["ok"] else found["error"],
        }
        return {**self._known, "ok": found["ok"], "stale": not found["ok"], "worker": worker}

    async def _keep_running(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            self._ended.clear()
            self._state = "starting"
            try:
                self._process = await self._spawn()
            except OSError as error:
                self._last_exit = f"it could not be started: {error}"
            else:
                if self._stopping.is_set():  # while it was being started
                    with suppress(ProcessLookupError):
                        self._process.terminate()
                self._last_exit = _said(await self._process.wait())
            self._ended.set()
            if self._stopping.is_set():
                return
            failures = 0 if time.monotonic() - started > _HEALTHY else failures + 1
            delay = min(_MOST_DELAY, _LEAST_DELAY * 2 ** max(0, failures - 1))
            self._state = f"restarting in {delay:g} s"
            if self._last_exit == _said(LOCKED):
                self._state = f"another worker has the lock, {self._state}"
                self._ended.clear()  # that one answers
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
            self._restarts += not self._stopping.is_set()

    async def _spawn(self) -> asyncio.subprocess.Process:
        log = self.runtime / LOG
        if log.exists() and log.stat().st_size > _LOG_BYTES:
            log.replace(log.with_name("worker.1.log"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(log, flags, 0o600)
        try:
            # A session of its own: an interrupt from the terminal is for the server, which stops
            # the worker in its turn.
            return await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,
            )
        finally:
            os.close(descriptor)

    async def _end(self, told: bool) -> None:
        """Wait until the process has ended; one that was not told gets a signal, which it heeds."""
        for how, seconds in ((None if told else signal.SIGTERM, _ENDING), (signal.SIGKILL, None)):
            if how is not None:
                with suppress(ProcessLookupError):
                    self._process.send_signal(how)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ended.wait(), seconds)
                return


def _said(code: int) -> str:
    """An exit status in words."""
    if code == LOCKED:
        return f"status {code}: another worker trains these weights"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"status {code}"
