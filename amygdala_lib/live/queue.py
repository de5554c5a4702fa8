"""Queue: jobs that wait, on disk until they are done, and the results of those that are."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from threading import Condition

from .jobs import Limits, Refusal, TrainingJob
from .private import check_private, private_folder, read_private_json, write_private_json
from .results import JobResult

_REMEMBERED = 1000  # results
_LOG_BYTES = 16 << 20  # of jobs.jsonl, before it becomes jobs.1.jsonl in place of the one before


class JobQueue:
    """First come, first served; safe for one thread that adds and one that works.

    A job that was accepted is on disk, in `queue/`, until its result is in `jobs.jsonl`, so that
    none is forgotten when the worker is killed. Jobs wait for one server: `server` tells which, and
    those of another are given up.
    """

    def __init__(self, runtime: Path, limits: Limits):
        self._folder = private_folder(runtime / "queue")
        self._log = runtime / "jobs.jsonl"
        self._limits = limits
        self._waiting: OrderedDict[str, TrainingJob] = OrderedDict()
        self._results: OrderedDict[str, JobResult] = OrderedDict()
        self.running: str | None = None
        self.changed = Condition()
        self._number = self._remember()

    def take_up(self, server: tuple[int, int]) -> list[str]:
        """Jobs left by an earlier worker wait again; the names of those for another server.

        Raises LiveError if a file of the queue is not this user's alone.
        """
        strange = []
        with self.changed:
            for path in sorted(self._folder.glob("*.json"), key=_number):
                name = f"job-{_number(path)}"
                if name in self._results:
                    path.unlink()
                    continue
                try:
                    # From the disk: a job's JSON takes more room with its indents.
                    found = read_private_json(path, 4 * self._limits.message_bytes)
                    job = TrainingJob.from_json(found["job"], self._limits)
                    its_server = tuple(found["server"])
                except (Refusal, KeyError, TypeError):
                    its_server = None
                if its_server != server:
                    strange.append(name)
                else:
                    self._waiting[name] = job
        return strange

    def add(self, job: TrainingJob, server: tuple[int, int]) -> str:
        """The name of the job from now on. Raises Refusal (full) if too many wait."""
        with self.changed:
            if len(self._waiting) >= self._limits.queued:
                raise Refusal(
                    "full", f"{len(self._waiting)} jobs wait, no more are taken: try again later"
                )
            self._number += 1
            name = f"job-{self._number}"
            content = {"server": list(server), "job": job.to_json()}
            write_private_json(self._path(name), content)
            self._waiting[name] = job
            self.changed.notify_all()
            return name

    def next(self) -> tuple[str, TrainingJob] | None:
        """The job that has waited longest, now running; None if none waits."""
        with self.changed:
            if not self._waiting:
                return None
            self.running, job = self._waiting.popitem(last=False)
            return self.running, job

    def put_back(self, job: TrainingJob) -> None:
        """The running one waits again, before all others."""
        with self.changed:
            self._waiting[self.running] = job
            self._waiting.move_to_end(self.running, last=False)
            self.running = None

    def finish(self, result: JobResult) -> None:
        """Remember a result for good; the job waits and runs no more."""
        line = json.dumps(result.to_json()) + "\n"
        with self.changed:
            self._append(line.encode())
            self._results[result.job] = result
            while len(self._results) > _REMEMBERED:
                self._results.popitem(last=False)
            self._waiting.pop(result.job, None)
            if self.running == result.job:
                self.running = None
            self._path(result.job).unlink(missing_ok=True)
            self.changed.notify_all()

    def give_up(self, kind: str, error: str) -> None:
        """All that wait have failed."""
        for name, job in list(self._waiting.items()):
            self.finish(failed(name, job, kind, error))

    @property
    def waiting(self) -> list[str]:
        with self.changed:
            return list(self._waiting)

    def result(self, name: str) -> JobResult | None:
        """Of a finished job; None while it waits or runs.

        Raises Refusal (unknown) if there is no such job, or too many have been done since.
        """
        with self.changed:
            if name in self._results:
                return self._results[name]
            if name in self._waiting or name == self.running:
                return None
        raise Refusal("unknown", f"there is no job {name!r}: the last {_REMEMBERED} are remembered")

    def last(self, count: int) -> list[JobResult]:
        with self.changed:
            return list(self._results.values())[-count:]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name.removeprefix('job-')}.json"

    def _append(self, line: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        if self._log.exists() and self._log.stat().st_size + len(line) > _LOG_BYTES:
            self._log.replace(self._log.with_name("jobs.1.jsonl"))
        descriptor = os.open(self._log, flags, 0o600)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def _remember(self) -> int:
        """Read results of earlier workers; the number of the last job there was."""
        numbers = [_number(path) for path in self._folder.glob("*.json")]
        for path in (self._log.with_name("jobs.1.jsonl"), self._log):
            if not path.exists():
                continue
            check_private(path)
            content = path.read_bytes()
            if content and not content.endswith(b"\n"):
                with path.open("ab") as file:
                    file.write(b"\n")
            for line in content.splitlines():
                try:
                    result = JobResult.from_json(json.loads(line))
                    numbers.append(int(result.job.removeprefix("job-")))
                except (ValueError, TypeError, AttributeError):
                    continue  # the line that a killed worker was writing
                self._results[result.job] = result
        while len(self._results) > _REMEMBERED:
            self._results.popitem(last=False)
        return max(numbers, default=0)


def failed(name: str, job: TrainingJob | None, kind: str, error: str) -> JobResult:
    """The result of a job that has none."""
    told = {} if job is None else {"label": job.label, "objective": job.objective}
    return JobResult(name, "failed", **told, error=error, kind=kind)


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdigit() else 0
