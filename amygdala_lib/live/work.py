"""Work: attach to the server, train what waits, write checkpoints; one thing at a time."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from ..errors import AmygdalaError, LiveError
from .attach import attach, weights_of
from .checkpoints import Checkpoints, folder_of
from .handles import SharedWeights
from .jobs import Limits, Refusal, TrainingJob
from .owner import start_time
from .queue import JobQueue, failed
from .record import Record
from .results import JobResult
from .trainer import Stopped, Trainer

HANDLES = "weights.json"
_LOOK = 1.0  # seconds between looks for the server, when there is nothing else to do
_LAST = 10  # results in a status

log = logging.getLogger(__name__)

Answer = Callable[[dict[str, Any]], None]


class Work(Thread):
    """The thread that owns the attached model: nobody else reads or writes its weights.

    checkpoint_after: seconds from the last job to the checkpoint of all since the one before; None
        for no checkpoint but those asked for.
    folder: the model folder to write to; None for the one that the server was started from.
    """

    def __init__(
        self,
        runtime: Path,
        limits: Limits,
        *,
        checkpoint_after: float | None,
        folder: Path | None,
    ):
        super().__init__(name="work", daemon=True)
        self.runtime, self.limits = runtime, limits
        self.queue = JobQueue(runtime, limits)
        self.state, self.why = "waiting", "not attached yet"
        self.model: PreTrainedModel | None = None
        self.progress: dict[str, Any] | None = None
        self.error: str | None = None
        """Of the last checkpoint, if that failed."""
        self._record = Record.open(runtime / "record.json")
        self._after, self._folder = checkpoint_after, folder
        self._asked: deque[tuple[str, dict[str, Any], Answer]] = deque()
        self._stopping, self._save_at_end = Event(), False
        self._due: float | None = None
        self._shared: SharedWeights | None = None
        self._trainer: Trainer | None = None
        self._checkpoints: Checkpoints | None = None

    # For the thread that answers messages

    def train(self, content: object) -> dict[str, Any]:
        """Queue a job. Raises Refusal: invalid, full, lost."""
        job = TrainingJob.from_json(content, self.limits)
        model = self._served()
        if problems := job.problems_for(model):
            raise Refusal("invalid", "\n".join(problems))
        name = self.queue.add(job, self._record.server)
        return {"job": name, "waiting": len(self.queue.waiting)}

    def ask(self, action: str, settings: dict[str, Any], answer: Answer) -> None:
        """Checkpoint, rollback or history, before the next job; `answer` is called when done."""
        if action != "history":
            self._served()
        with self.queue.changed:
            self._asked.append((action, settings, answer))
            self.queue.changed.notify_all()

    def stop(self, *, checkpoint: bool) -> None:
        """A job that runs is taken back after its step, and waits for the next worker.

        checkpoint: then write what no checkpoint has, as the server ends.
        """
        self._save_at_end = checkpoint
        self._stopping.set()
        with self.queue.changed:
            self.queue.changed.notify_all()

    def job(self, name: object) -> dict[str, Any]:
        """How far a job has come. Raises Refusal: unknown, invalid."""
        if not isinstance(name, str):
            raise Refusal("invalid", f"job is {name!r}: give the name that train answered with")
        result = self.queue.result(name)
        if result is not None:
            return {"job": name, "state": result.state, "result": result.to_json()}
        waiting, progress = self.queue.waiting, self.progress
        if name in waiting:
            return {"job": name, "state": "waiting", "before": waiting.index(name)}
        if progress is not None and progress["job"] == name:
            return {"state": "training", **progress}
        return {"job": name, "state": "training"}

    def status(self) -> dict[str, Any]:
        shared, record, trainer = self._shared, self._record, self._trainer
        checkpoints, due = self._checkpoints, self._due
        return {
            "state": self.state,
            "why": self.why,
            "server": {"pid": record.server[0], "started": record.server[1]} if shared else None,
            "model": shared.model if shared else None,
            "version": record.version,
            "running": self.progress,
            "waiting": self.queue.waiting,
            "jobs": [_shown(result) for result in self.queue.last(_LAST)],
            "optimizer": {
                "file": record.optimizer,
                "rank": record.rank,
                "memory": trainer.resumed if trainer else None,
            },
            "checkpoint": {
                "folder": str(checkpoints.folder) if checkpoints else None,
                "parent": record.parent,
                "unsaved_jobs": record.n_unsaved,
                "due_in": None if due is None else round(max(0.0, due - time.monotonic()), 1),
                "last": record.checkpoint,
                "problem": self.error or (checkpoints.problem if checkpoints else None),
            },
            "memory": _memory(),
        }

    @property
    def version(self) -> int:
        """Of the weights; see `Record`."""
        return self._record.version

    # The thread itself

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._step()
            except Exception as error:  # the next thing may work; a dead thread would be silent
                log.exception("unexpected")
                self.why = f"{type(error).__name__}: {error}"
                self._stopping.wait(_LOOK)
        if self._save_at_end and self._shared is not None and self._record.n_unsaved:
            with self._doing("checkpoint"):
                self._act("checkpoint", {"why": "the server ends"}, lambda answer: None)
        self._refuse_asked("down", "the training worker ends")

    def _step(self) -> None:
        if self._shared is None:
            if not self._attach():
                self._refuse_asked("lost", self.why)
                self._wait(_LOOK)
            return
        if not self._shared.alive():
            self._detach()
            return
        if self._asked:
            with self._doing(self._asked[0][0]):
                self._act(*self._asked.popleft())
        elif waiting := self.queue.next():
            self._train(*waiting)
        elif self._due is not None and time.monotonic() >= self._due:
            self._due = None
            with self._doing("checkpoint"):
                self._act("checkpoint", {"why": "scheduled"}, lambda answer: None)
        else:
            left = _LOOK if self._due is None else self._due - time.monotonic()
            self._wait(min(_LOOK, max(0.0, left)))

    def _wait(self, seconds: float) -> None:
        with self.queue.changed:
            if not (self._asked or self._stopping.is_set() or self._has_work()):
                self.queue.changed.wait(seconds)

    def _has_work(self) -> bool:
        return self._shared is not None and bool(self.queue.waiting)

    def _attach(self) -> bool:
        """Whether the server's weights are here now; `why` says what is lacking otherwise."""
        path = self.runtime / HANDLES
        if not path.exists():
            self.state, self.why = "waiting", f"{path} is not there: the server has not started yet"
            return False
        self.state, before = "attaching", self.why
        try:
            model = attach(path)
            self._begin(model, weights_of(model))
        except Exception as error:
            self.state, self.why = "lost", str(error) or type(error).__name__
            if self.why != before:
                expected = isinstance(error, AmygdalaError)
                log.warning("cannot attach: %s", self.why, exc_info=not expected)
            return False
        self.state, self.why = "ready", ""
        log.info("attached to %r", self._shared)
        return True

    def _begin(self, model: PreTrainedModel, shared: SharedWeights) -> None:
        """Take over what the last worker has left behind."""
        server = shared.pid, start_time(shared.pid)
        shared.check()
        record, queue = self._record, self.queue
        if record.last is not None:
            self._finish_unless_known(JobResult.from_json(record.last))
        record.begin_server(server)
        self._shared = shared
        try:
            trainer = Trainer(model, record, self.runtime, alive=self._alive)
            if interrupted := trainer.recover():
                queue.finish(failed(interrupted[0], None, "failed", interrupted[1]))
            checkpoints = Checkpoints(self._folder or folder_of(shared.model), model, record)
            try:
                if checkpoints.recover() is not None:
                    trainer.forget()
            except AmygdalaError as error:
                self.error = str(error)
                log.error("what the last worker was doing could not be finished: %s", error)
            for name in queue.take_up(server):
                gone = "the server it was sent to has gone before it was trained: send it again"
                queue.finish(failed(name, None, "lost", gone))
        except BaseException:
            self._shared = None
            raise
        self.model, self._trainer, self._checkpoints = model, trainer, checkpoints
        if record.n_unsaved:
            self._schedule()

    def _finish_unless_known(self, result: JobResult) -> None:
        try:
            known = self.queue.result(result.job)
        except Refusal:
            known = None
        if known is None:
            self.queue.finish(result)

    def _detach(self) -> None:
        """The server has gone: what waits was for its weights."""
        try:
            self._shared.check()
            lost = "the server has gone"
        except LiveError as error:
            lost = str(error)
        log.warning("%s", lost)
        self.model = self._trainer = self._checkpoints = self._due = None
        self._shared.close()
        self._shared = None
        self.state, self.why = "lost", lost
        self.queue.give_up("lost", lost)

    def _served(self) -> PreTrainedModel:
        """Raises Refusal (lost) if there are no weights to train."""
        model, shared = self.model, self._shared
        if model is None or shared is None or not shared.alive():
            raise Refusal("lost", f"no server's weights are attached ({self.state}): {self.why}")
        return model

    def _alive(self) -> None:
        try:
            self._shared.check()
        except LiveError as error:
            raise Refusal("lost", str(error)) from error

    def _train(self, name: str, job: TrainingJob) -> None:
        self.progress = {"job": name, "step": 0, "steps": None, "loss": None}
        with self._doing("training"):
            try:
                if not job.dry_run:
                    self._checkpoints.begin()
                self.progress["steps"] = len(job.batches())
                result = self._trainer.run(
                    name, job, stopped=self._stopping.is_set, heard=self._heard
                )
            except Stopped:
                self.queue.put_back(job)
                return
            except Refusal as error:
                result = failed(name, job, error.kind, str(error))
            except Exception as error:
                log.exception("%s failed", name)
                result = failed(name, job, "failed", f"{type(error).__name__}: {error}")
            finally:
                self.progress = None
        self.queue.finish(result)
        log.info("%s", result)
        if result.state == "done" and not result.dry_run:
            self._schedule()

    def _heard(self, step: Mapping[str, Any]) -> None:
        self.progress = {**self.progress, "step": step["step"], "loss": step["loss"]}

    def _schedule(self) -> None:
        self._due = None if self._after is None else time.monotonic() + self._after

    def _act(self, action: str, settings: dict[str, Any], answer: Answer) -> None:
        try:
            if action != "history":
                self._alive()
            answer({"ok": True, action: self._acted(action, settings)})
        except Refusal as error:
            if action == "checkpoint":
                self.error = str(error)
                self._schedule()
            log.warning("%s: %s", action, error)
            answer({"ok": False, "error": str(error), "kind": error.kind})
        except Exception as error:
            log.exception("%s failed", action)
            said = f"{type(error).__name__}: {error}"
            answer({"ok": False, "error": said, "kind": "failed"})

    def _acted(self, action: str, settings: dict[str, Any]) -> Any:
        if action == "checkpoint":
            done = self._checkpoints.sync(settings.get("why", "asked for"))
        elif action == "rollback":
            done = self._checkpoints.rollback(settings["to"])
            self._trainer.forget()
        else:
            return self._checkpoints.history()
        self._due = self.error = None
        log.info("%s", done["said"])
        return done

    def _refuse_asked(self, kind: str, why: str) -> None:
        while self._asked:
            self._asked.popleft()[2]({"ok": False, "error": why, "kind": kind})

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """Within the block, a status says what is being done."""
        self.state = what
        try:
            yield
        finally:
            self.state = "ready"


def _shown(result: JobResult) -> dict[str, Any]:
    shown = {**result.brief(), "state": result.state, "dry_run": result.dry_run}
    return shown if result.error is None else {**shown, "error": result.error, "kind": result.kind}


def _memory() -> dict[str, int]:
    """Bytes: of this process alone, with what it shares, and of the GPU."""
    found = psutil.Process().memory_full_info()
    memory = {"own": found.uss, "resident": found.rss}
    if torch.cuda.is_initialized():
        memory["cuda"] = torch.cuda.memory_allocated()
    return memory
