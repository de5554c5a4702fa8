"""Trainer: jobs on the weights of a running server, each whole or not at all."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import AmygdalaError
from ..training import Apollo
from ..training.trainer import chosen_parameters, trainable
from .job_run import DEFAULTS, JobRun
from .jobs import Refusal, TrainingJob
from .record import Record
from .results import JobResult
from .undo import Undo

_RANK = 64

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The worker ends: the job is taken back, and is still to be done."""


class Trainer:
    """One Apollo over the parameters of an attached model, which goes on from job to job.

    The optimizer's memory is written after every job, whole: with rank 64 it is about a twentieth
    of the weights of a 27B model. It is written to a file of its own, the record then names it, and
    only that makes the job done: a worker killed before finds the weights of before the job in
    `Undo` and puts them back; one killed after finds job and optimizer together.

    alive: raises Refusal (lost) if the owner of the weights has gone; called before every step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        record: Record,
        runtime: Path,
        *,
        alive: Callable[[], None],
    ):
        self.model, self.record, self._alive = model, record, alive
        self.undo = Undo(runtime)
        self._folder = runtime / "optimizer"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self.resumed = "none yet"
        self.optimizer = self._loaded()

    def recover(self) -> tuple[str, str] | None:
        """Take back a job that a killed worker left half done: its name, and what to say of it."""
        pending = self.undo.pending()
        if pending is None:
            return None
        interrupted = None
        done = self.record.last is not None and self.record.last["job"] == pending["job"]
        if pending["server"] == list(self.record.server) and not done:
            self._alive()
            self.undo.restore(dict(self.model.named_parameters()))
            kept = "The weights are as they were before it"
            if not pending["kept"]:
                kept = "There was no room to keep the weights of before it: roll back if need be"
            self.record.changed()
            interrupted = pending["job"], f"the worker was killed while it trained this. {kept}"
        self.undo.discard()
        return interrupted

    def forget(self) -> None:
        """Drop the optimizer's memory: the weights are no longer those it has followed."""
        self.record.optimizer = self.record.rank = None
        self.record.save()
        self.optimizer, self.resumed = None, "dropped by a rollback"
        self._tidy()

    def run(
        self,
        name: str,
        job: TrainingJob,
        *,
        stopped: Callable[[], bool],
        heard: Callable[[dict[str, Any]], None],
    ) -> JobResult:
        """Train; `heard` gets the figures of every step.

        Raises Refusal (failed, lost) if a loss, gradient or weight is not finite, the device has no
        memory left, or the server has gone; Stopped once `stopped()`. Weights and optimizer are
        then as before, if there was room to keep the weights (`JobResult.undo`).
        """
        run = JobRun(name, job, self.model)
        optimizer, run.optimizer = self._optimizer_for(job)
        try:
            with self._kept(run), trainable(self.model, run.trained):
                self._steps(run, optimizer, stopped, heard)
                if job.dry_run:
                    return run.result()
                result = self._commit(run, optimizer)
        except BaseException:
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            self.optimizer = self._loaded()
            if not job.dry_run:
                self.record.changed()
            raise
        self._tidy()
        return result

    @contextmanager
    def _kept(self, run: JobRun) -> Iterator[None]:
        """Keep the weights, and put them back if the block fails."""
        facts = {"job": run.name, "server": self.record.server}
        lacking = None if run.job.dry_run else self.undo.lacking_room(run.trained)
        if lacking:
            log.warning("%s cannot be taken back: %s", run.name, lacking)
        run.undo = not (lacking or run.job.dry_run)
        with run.timed("keep"):
            self._alive()
            kept = self.undo.keep(run.trained if run.undo else {}, **facts, kept=run.undo)
            run.before = kept if run.undo else None
        try:
            yield
        except BaseException as error:
            lost = isinstance(error, Refusal) and error.kind == "lost"
            run.undo = run.undo and not lost
            if run.undo:
                self.undo.restore(run.trained)
            run.before = None
            self.undo.discard()
            if isinstance(error, Stopped) or not isinstance(error, Exception):
                raise
            raise _refused(error, run) from error
        run.before = None
        self.undo.discard()

    def _steps(
        self,
        run: JobRun,
        optimizer: Apollo,
        stopped: Callable[[], bool],
        heard: Callable[[dict[str, Any]], None],
    ) -> None:
        loop = run.loop(optimizer)
        with run.timed("score"):
            run.score(loop, "before")
            loop.take_reference(run.examples, loop.reference_of(run.examples, False))
        with run.timed("steps"):
            for number, batch in enumerate(run.batches):
                self._alive()
                if stopped():
                    raise Stopped
                record = loop.step(number, batch)
                if record["skipped"]:
                    raise Refusal("failed", f"step {number + 1}: {record['skipped']}")
                run.records.append(record)
                heard(record)
        self._alive()
        if wild := [n for n, p in run.trained.items() if not _is_finite(p)]:
            raise Refusal("failed", f"after the last step, {wild[0]} has values that are no number")
        if run.job.dry_run:
            run.expected = dict(loop.expected)
            return
        with run.timed("score"):
            run.score(loop, "after")
        run.compare()

    def _commit(self, run: JobRun, optimizer: Apollo) -> JobResult:
        """Optimizer and job become part of the record at once."""
        with run.timed("save"):
            path = optimizer.save_state(self._folder / f"{run.name}.safetensors")
        before = self.record.optimizer, self.record.rank, self.record.last
        result = run.result()
        self.record.optimizer, self.record.rank = path.name, optimizer.param_groups[0]["rank"]
        self.record.last = result.to_json()
        self.record.trained(result.brief())
        try:
            self.record.changed()
        except BaseException:
            self.record.optimizer, self.record.rank, self.record.last = before
            self.record.unsaved.pop()
            self.record.n_unsaved -= 1
            raise
        self.optimizer = optimizer
        return result

    def _optimizer_for(self, job: TrainingJob) -> tuple[Apollo, str]:
        """The optimizer with the settings of a job, and what to say of its memory."""
        held = _RANK if self.optimizer is None else self.optimizer.param_groups[0]["rank"]
        rank = job.settings.get("rank", held)
        if self.optimizer is None:
            optimizer, said = self._new(rank), "new"
        elif job.fresh_optimizer:
            optimizer, said = self._new(rank), "new, as asked"
        elif rank != held:
            optimizer, said = self._new(rank), f"new: rank {rank}, it was {held}"
        else:
            optimizer, said = self.optimizer, "went on"
        settings = {name: value for name, value in job.settings.items() if name != "rank"}
        for group in optimizer.param_groups:
            group.update(DEFAULTS | settings)
        return optimizer, said

    def _new(self, rank: int | None) -> Apollo:
        return Apollo(chosen_parameters(self.model, ("*",)).items(), rank=rank)

    def _loaded(self) -> Apollo | None:
        """The optimizer as the record has it; None if that has none, or its file cannot be used."""
        if self.record.optimizer is None:
            return None
        optimizer = self._new(self.record.rank)
        try:
            optimizer.load_state(self._folder / self.record.optimizer)
        except AmygdalaError as error:
            log.warning("the optimizer starts anew: %s", error)
            self.resumed = f"starts anew: {error}"
            return None
        self.resumed = f"resumed from {Path(self.record.optimizer).stem}"
        return optimizer

    def _tidy(self) -> None:
        for path in self._folder.iterdir():
            if path.name != self.record.optimizer:
                path.unlink()


def _is_finite(parameter: Tensor) -> bool:
    if not parameter.numel():
        return True
    least, most = torch.aminmax(parameter.detach())
    return bool(least.isfinite() and most.isfinite())


def _refused(error: Exception, run: JobRun) -> Refusal:
    kind = error.kind if isinstance(error, Refusal) else "failed"
    if not isinstance(error, AmygdalaError):
        log.exception("%s failed", run.name)
    said = str(error) if isinstance(error, AmygdalaError) else f"{type(error).__name__}: {error}"
    if kind == "lost":
        return Refusal(kind, said)
    if run.job.dry_run or run.undo:
        return Refusal(kind, f"{said}. The weights are as they were before the job")
    return Refusal(
        kind,
        f"{said}. {len(run.records)} steps before it have changed the weights, for which no copy "
        "was kept: roll back to a checkpoint if they are to go",
    )
