"""Worker: the process that trains a server's weights, `python -m amygdala_lib.live.worker`."""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from ..errors import AmygdalaError, LiveError
from .jobs import Limits, Refusal
from .messages import SOCKET, Envelope, Mailbox, refused
from .owner import start_time
from .private import check_private, private_folder, write_private_json

if TYPE_CHECKING:
    from .work import Work

LOCK, WHO = "worker.lock", "worker.json"
LOCKED = 3
"""Exit status: another trainer has these weights."""

_TICK = 0.2  # seconds between looks at the parent, signals and answers
_GRACE = 600.0  # seconds for the work to end: one step of a job, or a checkpoint
_WATCHERS = 64
_PRIORITY = 5  # lower than the server's: requests come first

log = logging.getLogger("amygdala_lib.live")


def main(argv: Sequence[str] | None = None) -> int:
    """Answer messages until told to stop, or the parent ends; the exit status."""
    options = _parser().parse_args(argv)
    try:
        runtime = private_folder(options.runtime.absolute())
        with _lock(runtime):
            return Worker(runtime, options).serve()
    except Refusal as error:
        print(error, file=sys.stderr)
        return LOCKED
    except AmygdalaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


class Worker:
    """Reads messages and answers them; the work itself is done by a thread of its own."""

    def __init__(self, runtime: Path, options: argparse.Namespace):
        self.runtime, self.options = runtime, options
        self.limits = Limits(**{f.name: getattr(options, f.name) for f in fields(Limits)})
        self._answers: SimpleQueue[tuple[Envelope, dict[str, Any]]] = SimpleQueue()
        self._watching: deque[tuple[Envelope, int]] = deque(maxlen=_WATCHERS)
        self._ending: str | None = None
        self._save_at_end = False
        self._started = time.monotonic()
        self._work: Work | None = None

    def serve(self) -> int:
        """Until `stop`, a signal, or the parent's end."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        os.umask(0o077)
        os.nice(_PRIORITY)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        mailbox = Mailbox(self.runtime / SOCKET, self.limits.message_bytes)
        try:
            who = {"pid": os.getpid(), "started": start_time(os.getpid())}
            write_private_json(self.runtime / WHO, who)
            self._begin_work()
            while not self._ending:
                self._turn(mailbox)
            log.info("ends: %s", self._ending)
            finished = self._end_work(mailbox)
        finally:
            mailbox.close()
            (self.runtime / WHO).unlink(missing_ok=True)
        if not finished:  # a thread that still computes would keep the process
            os._exit(1)
        return 0

    def _begin_work(self) -> None:
        import torch  # seconds

        from .work import Work

        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        self._work = Work(
            self.runtime,
            self.limits,
            checkpoint_after=self.options.checkpoint_after or None,
            folder=self.options.folder,
        )
        self._work.start()

    def _turn(self, mailbox: Mailbox) -> None:
        received = mailbox.receive(_TICK)
        if received:
            envelope, message = received
            try:
                answer = self._answered(envelope, message)
            except Refusal as error:
                answer = refused(error)
            except Exception as error:
                log.exception("a message could not be answered")
                answer = refused(Refusal("failed", f"{type(error).__name__}: {error}"))
            if answer is not None:
                mailbox.answer(envelope, answer)
        self._send(mailbox)
        self._tell_watchers(mailbox)
        if self.options.parent and os.getppid() != self.options.parent:
            self._ending = f"process {self.options.parent}, which started it, has ended"
        if not self._work.is_alive():
            self._ending = "its work has ended"

    def _answered(self, envelope: Envelope, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer; None if it comes later."""
        work, action = self._work, message.get("do")
        if action == "train":
            return {"ok": True, **work.train(message.get("job"))}
        if action == "status" and "job" in message:
            return {"ok": True, **work.job(message["job"])}
        if action == "status":
            up = round(time.monotonic() - self._started, 1)
            return {"ok": True, "pid": os.getpid(), "up": up, **work.status()}
        if action in ("checkpoint", "rollback", "history"):
            settings = {"to": _state(message)} if action == "rollback" else {}
            work.ask(action, settings, lambda answer: self._answers.put((envelope, answer)))
            return None
        if action == "watch":
            self._watching.append((envelope, message.get("version")))
            return None
        if action == "stop":
            self._ending = "asked to"
            self._save_at_end = message.get("checkpoint") is True
            return {"ok": True}
        known = "train, status, checkpoint, rollback, history, watch, stop"
        raise Refusal("invalid", f"do is {str(action)[:60]!r}: choose one of {known}")

    def _send(self, mailbox: Mailbox) -> None:
        while True:
            try:
                mailbox.answer(*self._answers.get_nowait())
            except Empty:
                return

    def _tell_watchers(self, mailbox: Mailbox) -> None:
        version = self._work.version
        for envelope, known in list(self._watching):
            if known != version:
                mailbox.answer(envelope, {"ok": True, "version": version})
                self._watching.remove((envelope, known))

    def _end_work(self, mailbox: Mailbox) -> bool:
        self._work.stop(checkpoint=self._save_at_end)
        self._work.join(_GRACE)
        self._send(mailbox)
        return not self._work.is_alive()

    def _signalled(self, number: int, frame: object) -> None:
        self._ending = signal.Signals(number).name


@contextmanager
def _lock(runtime: Path) -> Iterator[None]:
    """One trainer per server. Raises Refusal (busy) if there is another."""
    path = runtime / LOCK
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise LiveError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        check_private(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(
                "busy",
                f"another worker trains the weights of {runtime}: one at a time. Stop it first",
            ) from None
        yield
    finally:
        os.close(descriptor)  # which also unlocks; the file stays, or two could each lock their own


def _state(message: Mapping[str, Any]) -> int | str:
    to = message.get("to")
    if type(to) is int or (isinstance(to, str) and 4 <= len(to) <= 64):
        return to
    raise Refusal(
        "invalid",
        f"to is {str(to)[:60]!r}: give the id of a state in the history, or the start of its hash",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime", type=Path, required=True, help="the server's private folder")
    parser.add_argument("--folder", type=Path, help="model folder to write (the server's own)")
    parser.add_argument("--parent", type=int, help="end when this process does")
    parser.add_argument("--threads", type=int, help="of torch (its own choice)")
    parser.add_argument(
        "--checkpoint-after",
        type=float,
        default=600,
        help="seconds from the last job to the checkpoint; 0 for none (600)",
    )
    for limit in fields(Limits):
        parser.add_argument(
            f"--{limit.name.replace('_', '-')}", type=type(limit.default), default=limit.default
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
