"""Whatever stops a sync, the folder opens as the state before or the state after, never a mixture.

Four ways to stop one: SIGKILL at random instants; SIGKILL before, after and half-way through every
call that changes the disk; every such call failing; and the power failing, after which the disk has
kept an arbitrary part of what was never flushed. The calls are `os.pwrite`, `os.fsync` and so on,
replaced by ones that count: the code under test is the real one.
"""

import contextlib
import errno
import os
import random
import shutil
import signal
import tempfile
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amygdala_lib import checkpoint
from amygdala_lib.checkpoint import shards
from amygdala_lib.checkpoint.journal import journal_path
from amygdala_lib.errors import CheckpointError

QUIET = {"progress": False}
KILLS = 300
AIMED = 60
CALLS = ("pwrite", "fsync", "replace", "unlink", "mkdir", "copy_file_range")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of two blocks, and one thread: the calls come in the same order every time."""
    monkeypatch.setattr(shards, "PIECE", 8192)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tmp_path():
    """In memory where there is such a folder: a sync waits for the disk a dozen times."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as path:
        yield Path(path)


def states(size=1200):
    """The state before and the one after, which differs in every shard, here and there and all."""
    generator = torch.Generator().manual_seed(0)
    before = {name: torch.randn(7, size, generator=generator).bfloat16() for name in "abc"}
    after = {name: tensor.clone() for name, tensor in before.items()}
    after["a"][3] += 1
    after["b"] += 1
    after["c"].view(-1)[:: size // 3] += 1
    return before, after


def write_folder(folder, state):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weight_map = {name: f"model-{name}.safetensors" for name in state}
    for name, shard in weight_map.items():
        save_file({name: state[name]}, folder / shard)
    index = '{"weight_map": {%s}}' % ", ".join(f'"{n}": "{s}"' for n, s in weight_map.items())  # noqa: UP031
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


def fingerprint(folder):
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def before_and_after(tmp_path):
    """A folder in the state before, with that state, the one after, and their fingerprints."""
    before, after = states()
    folder = write_folder(tmp_path / "model", before)
    first = fingerprint(folder)
    checkpoint.sync(folder, after, **QUIET)
    second = fingerprint(folder)
    checkpoint.sync(folder, before, **QUIET)
    assert fingerprint(folder) == first != second
    return folder, after, first, second


def in_a_child(work):
    """Run `work` in a process of its own; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def reopened(folder, after, first, second):
    """Open a folder as anyone would; which of two states it holds, checked in every way."""
    with checkpoint.reading(folder):
        found = fingerprint(folder)
    assert found in (first, second), "a mixture"
    assert not journal_path(folder).exists()
    for path in folder.glob("*.safetensors"):
        load_file(path)
    assert (
        checkpoint.verify(folder, **QUIET).weights
        == checkpoint.history(folder, **QUIET)["hash"].iloc[-1]
    ), "the history knows in which state the folder is"
    checkpoint.sync(folder, after, **QUIET)
    assert fingerprint(folder) == second, "and it can be written to again"
    assert not list((folder / ".amygdala").glob("*.tmp"))
    return "before" if found == first else "after"


class Interrupted:
    """Counts the calls that change the disk; does `what` at the `at`-th."""

    def __init__(self, patch, at=None, what=None):
        self.count, self.at, self.what = 0, at, what
        for name in CALLS:
            patch.setattr(os, name, self._counting(getattr(os, name)))

    def _counting(self, real):
        def call(*arguments, **keywords):
            self.count += 1
            if self.count == self.at or (
                self.what is fail_from_here and self.count > (self.at or 0)
            ):
                return self.what(real, *arguments, **keywords)
            return real(*arguments, **keywords)

        return call


def kill_before(real, *arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(real, *arguments, **keywords):
    with contextlib.suppress(OSError):
        real(*arguments, **keywords)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_half_way(real, *arguments, **keywords):
    """A write that is torn in the middle; other calls are all or nothing."""
    if real.__name__ == "pwrite":
        descriptor, data, offset = arguments
        real(descriptor, memoryview(data)[: len(data) // 2], offset)
    os.kill(os.getpid(), signal.SIGKILL)


def fail_with(number):
    def fail(real, *arguments, **keywords):
        raise OSError(number, os.strerror(number))

    return fail


def fail_half_way(real, *arguments, **keywords):
    if real.__name__ == "pwrite":
        descriptor, data, offset = arguments
        real(descriptor, memoryview(data)[: len(data) // 2], offset)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_from_here(real, *arguments, **keywords):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def interrupt(reason):
    def raised(real, *arguments, **keywords):
        raise reason

    return raised


def number_of_calls(folder, state):
    """How many calls a sync makes that change the disk."""
    with pytest.MonkeyPatch.context() as patch:
        counter = Interrupted(patch)
        checkpoint.sync(folder, state, **QUIET)
    return counter.count


# Killed


@pytest.mark.slow
def test_a_sync_killed_at_any_instant_leaves_one_of_two_states(tmp_path):
    """A process syncs to and fro until it is killed; what it left is opened; and again."""
    before, after = states(size=30_000)
    folder = write_folder(tmp_path / "model", before)
    first = fingerprint(folder)
    checkpoint.sync(folder, after, keep=2, **QUIET)
    second = fingerprint(folder)
    start = time.perf_counter()
    checkpoint.sync(folder, before, keep=2, **QUIET)
    seconds = time.perf_counter() - start
    draw = random.Random(0)

    def to_and_fro():
        while True:
            checkpoint.sync(folder, after, keep=2, **QUIET)
            checkpoint.sync(folder, before, keep=2, **QUIET)

    found = {"before": 0, "after": 0, "under way": 0}
    for number in range(KILLS + AIMED):
        pid = in_a_child(to_and_fro)
        if number < KILLS:
            time.sleep(draw.uniform(0, 2.4 * seconds))
        else:  # aim at the time in which the shards are written
            until = time.monotonic() + 60
            while not journal_path(folder).exists():
                assert time.monotonic() < until, "the child does not get to write"
                time.sleep(0.0001)
            time.sleep(draw.uniform(0, seconds / 20))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "it had not ended by itself"
        found["under way"] += journal_path(folder).exists()
        with checkpoint.reading(folder):
            now = fingerprint(folder)
        assert now in (first, second), f"a mixture after {number} kills"
        found["before" if now == first else "after"] += 1
        assert not journal_path(folder).exists()
    print(f"\n{KILLS} kills at random and {AIMED} aimed: {found}")
    assert found["under way"] >= AIMED // 3, "or the kills missed what they are for"
    assert found["before"] > 0 and found["after"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("what", [kill_before, kill_half_way, kill_after])
def test_a_sync_killed_at_any_call_leaves_one_of_two_states(before_and_after, tmp_path, what):
    folder, after, first, second = before_and_after
    calls = number_of_calls(shutil.copytree(folder, tmp_path / "count"), after)
    assert calls > 20
    outcomes = []
    for at in range(1, calls + 1):
        victim = shutil.copytree(folder, tmp_path / f"{at}")

        def work(victim=victim, at=at):
            with pytest.MonkeyPatch.context() as patch:
                Interrupted(patch, at, what)
                checkpoint.sync(victim, after, **QUIET)

        pid = in_a_child(work)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        outcomes.append(reopened(victim, after, first, second))
        shutil.rmtree(victim)
    assert outcomes == sorted(outcomes, reverse=True), "old until it is made, new from then on"
    assert len(set(outcomes)) == 2


@pytest.mark.slow
def test_recovery_killed_at_any_call_is_taken_up_again(before_and_after, tmp_path):
    """A kill in the middle of writing; then a kill at each call of undoing that."""
    folder, after, first, second = before_and_after
    calls = number_of_calls(shutil.copytree(folder, tmp_path / "count"), after)

    def work(target, action, at, what):
        with pytest.MonkeyPatch.context() as patch:
            Interrupted(patch, at, what)
            action(target)

    for at in range(1, calls + 1):
        torn = shutil.copytree(folder, tmp_path / "torn")
        sync = in_a_child(
            lambda torn=torn, at=at: work(
                torn, lambda f: checkpoint.sync(f, after, **QUIET), at, kill_half_way
            )
        )
        os.waitpid(sync, 0)
        if journal_path(torn).exists() and fingerprint(torn) not in (first, second):
            break
        shutil.rmtree(torn)
    assert fingerprint(torn) not in (first, second), "a mixture, to begin with"
    for what in (kill_before, kill_half_way, kill_after):
        for at in range(1, 100):
            victim = shutil.copytree(torn, tmp_path / "victim")
            recovery = in_a_child(lambda at=at, what=what, v=victim: work(v, opened, at, what))
            killed = os.waitpid(recovery, 0)[1] == signal.SIGKILL
            assert reopened(victim, after, first, second) == "before"
            shutil.rmtree(victim)
            if not killed:
                break
        assert at > 5, "it takes several calls to undo"


def opened(folder):
    with checkpoint.reading(folder):
        pass


# Calls that fail


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(fail_with(errno.ENOSPC), id="disk full"),
        pytest.param(fail_half_way, id="disk full in the middle of a write"),
        pytest.param(fail_with(errno.EIO), id="input/output error"),
        pytest.param(interrupt(KeyboardInterrupt()), id="Ctrl-C"),
    ],
)
def test_a_call_that_fails_leaves_the_state_before_at_once(before_and_after, tmp_path, what):
    """In the same process, before anything is opened again."""
    folder, after, first, second = before_and_after
    calls = number_of_calls(shutil.copytree(folder, tmp_path / "count"), after)
    outcomes = []
    for at in range(1, calls + 1):
        victim = shutil.copytree(folder, tmp_path / "victim")
        with pytest.MonkeyPatch.context() as patch:
            Interrupted(patch, at, what)
            try:
                checkpoint.sync(victim, after, **QUIET)
                outcome = "synced all the same"
            except KeyboardInterrupt:
                outcome = "stopped"
            except CheckpointError as error:
                outcome = "written" if "is written" in str(error) else "failed"
                assert outcome == "written" or "as it was" in str(error)
        found = fingerprint(victim)
        assert found in (first, second) and not journal_path(victim).exists()
        if outcome != "stopped":
            assert (found == first) == (outcome == "failed"), at
        outcomes.append(outcome)
        shutil.rmtree(victim)
    assert outcomes.count("failed") + outcomes.count("stopped") > calls * 0.7


@pytest.mark.slow
def test_a_disk_that_fails_for_good_leaves_what_can_be_undone_later(before_and_after, tmp_path):
    folder, after, first, second = before_and_after
    calls = number_of_calls(shutil.copytree(folder, tmp_path / "count"), after)
    left = 0
    for at in range(1, calls + 1):
        victim = shutil.copytree(folder, tmp_path / "victim")
        with pytest.MonkeyPatch.context() as patch:
            Interrupted(patch, at, fail_from_here)
            with contextlib.suppress(CheckpointError):
                checkpoint.sync(victim, after, **QUIET)
        left += journal_path(victim).exists()
        reopened(victim, after, first, second)
        shutil.rmtree(victim)
    assert left > 5, "some of the time there is something to undo"


def test_writes_that_the_system_takes_in_parts_are_completed(before_and_after, monkeypatch):
    folder, after, _, second = before_and_after
    real = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, at: real(fd, memoryview(data)[: 1 + len(data) // 3], at)
    )
    checkpoint.sync(folder, after, **QUIET)
    assert fingerprint(folder) == second


# Power cuts


class Disk:
    """Files as a disk keeps them: what was not flushed is kept in part, or not at all.

    A file's writes are kept for sure once the file is flushed, the names in a folder once that is.
    Of the rest a power cut keeps any subset: of writes by sectors of 512 bytes; of the changes of
    names any first few in each folder. A file that moves does so in both folders at once.
    """

    def __init__(self, root, patch, flushing=True):
        self.root, self.flushing = root, flushing
        self.log = []
        self.content, self.names = {}, {}
        for path in sorted(root.rglob("*")):
            self.names[path] = None if path.is_dir() else path.stat().st_ino
            if path.is_file():
                self.content[path.stat().st_ino] = path.read_bytes()
        for name in ("open", "pwrite", "fsync", "replace", "unlink", "mkdir"):
            patch.setattr(os, name, getattr(self, f"_{name}")(getattr(os, name)))
        patch.setattr(os, "copy_file_range", fail_with(errno.ENOSYS))

    def _open(self, real):
        def call(path, flags, *rest, **keywords):
            new = flags & os.O_CREAT and not os.path.exists(path)
            descriptor = real(path, flags, *rest, **keywords)
            if Path(path).is_relative_to(self.root) and flags & (os.O_CREAT | os.O_TRUNC):
                inode = os.fstat(descriptor).st_ino
                if new:
                    self.log.append(("name", Path(path), inode))
                if flags & os.O_TRUNC:
                    self.log.append(("empty", inode))
            return descriptor

        return call

    def _pwrite(self, real):
        def call(descriptor, data, offset):
            written = real(descriptor, data, offset)
            inode = os.fstat(descriptor).st_ino
            self.log.append(("write", inode, offset, bytes(data)[:written]))
            return written

        return call

    def _fsync(self, real):
        def call(descriptor):
            real(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            kind = "flush names" if path.is_dir() else "flush"
            self.log.append((kind, path if path.is_dir() else os.fstat(descriptor).st_ino))

        return call

    def _replace(self, real):
        def call(source, target):
            inode = os.stat(source).st_ino
            real(source, target)
            self.log.append(("rename", Path(target), inode, Path(source)))

        return call

    def _unlink(self, real):
        def call(path, **keywords):
            real(path, **keywords)
            self.log.append(("no name", Path(path)))

        return call

    def _mkdir(self, real):
        def call(path, *rest, **keywords):
            real(path, *rest, **keywords)
            self.log.append(("name", Path(path), None))

        return call

    def after_power_cut(self, at, draw):
        """What is on the disk if the power fails after the first `at` entries of the log."""
        content, names = dict(self.content), dict(self.names)
        writes, renames = {}, {}
        for entry in self.log[:at]:
            kind, what, *rest = entry
            if kind in ("write", "empty"):
                writes.setdefault(what, []).append(rest)
            elif kind in ("name", "no name", "rename"):
                for parent in {path.parent for path in (what, *rest[1:])}:
                    renames.setdefault(parent, []).append(entry)
            elif kind == "flush" and self.flushing:
                content[what] = written(content.get(what, b""), writes.pop(what, []))
            elif kind == "flush names" and self.flushing:
                named(names, renames.pop(what, []))
        for inode, waiting in writes.items():
            content[inode] = written(content.get(inode, b""), torn(waiting, draw))
        for waiting in renames.values():
            named(names, waiting[: draw.randint(0, len(waiting))])
        return content, names

    def restore(self, at, draw, target):
        content, names = self.after_power_cut(at, draw)
        target.mkdir()
        for path in sorted(names):
            place = target / path.relative_to(self.root)
            if place.parent.is_dir():  # else the folder's own name was lost
                if names[path] is None:
                    place.mkdir(mode=0o700)
                else:
                    place.write_bytes(content.get(names[path], b""))
        return target


def written(content, writes):
    content = bytearray(content)
    for write in writes:
        if not write:
            content.clear()
            continue
        offset, data = write
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data
    return bytes(content)


def torn(writes, draw):
    """Some sectors of some writes."""
    share = draw.random()
    for write in writes:
        if not write:
            yield write
            continue
        offset, data = write
        for start in range(0, len(data), 512):
            if draw.random() < share:
                yield offset + start, data[start : start + 512]


def named(names, changes):
    for kind, path, *rest in changes:
        if kind == "no name":
            names.pop(path, None)
        elif kind == "name":
            names[path] = rest[0]
        elif rest[1] in names:  # else the other folder has had it already
            names[path] = names.pop(rest[1])


def power_cuts(folder, after, tmp_path, flushing, first, second):
    """The states found after the power fails at every point of a sync, several times each."""
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(folder, patch, flushing)
        checkpoint.sync(folder, after, **QUIET)
    assert len(disk.log) > 30
    for at in range(len(disk.log) + 1):
        for seed in range(4):
            victim = disk.restore(at, random.Random(f"{at} {seed}"), tmp_path / "victim")
            try:
                opened(victim)
                found = fingerprint(victim)
                states = checkpoint.history(victim, **QUIET)
                known = len(states) == 0 or states["reachable"].iloc[-1]
            except CheckpointError:
                found, known = "cannot be opened", True
            kind = {str(first): "before", str(second): "after"}.get(str(found), "mixture")
            yield kind if known else f"{kind}, but the history does not know it"
            shutil.rmtree(victim)


@pytest.mark.slow
@pytest.mark.parametrize("new_bookkeeping", [False, True])
def test_a_power_cut_leaves_one_of_two_states(before_and_after, tmp_path, new_bookkeeping):
    folder, after, first, second = before_and_after
    if new_bookkeeping:
        shutil.rmtree(folder / ".amygdala")
    found = list(power_cuts(folder, after, tmp_path, True, first, second))
    assert set(found) == {"before", "after"}
    assert found[-4:] == ["after"] * 4, "a sync that has returned is on the disk"


@pytest.mark.slow
def test_a_disk_that_does_not_flush_would_not(before_and_after, tmp_path):
    """Or the test above would not notice a flush that is missing."""
    folder, after, first, second = before_and_after
    assert "mixture" in power_cuts(folder, after, tmp_path, False, first, second)


# Readers


@pytest.mark.slow
def test_readers_never_see_a_mixture(before_and_after):
    """Three processes read as fast as they can, while another syncs to and fro."""
    folder, after, first, second = before_and_after
    before, _ = states()
    end, ends = os.pipe()
    kinds = {str(first): "before", str(second): "after"}

    def read():
        seen = {"before": 0, "after": 0, "mixture": 0}
        until = time.monotonic() + 240
        while min(seen["before"], seen["after"]) < 10 and time.monotonic() < until:
            with checkpoint.reading(folder, wait=60):
                seen[kinds.get(str(fingerprint(folder)), "mixture")] += 1
            time.sleep(0.01)
        os.write(ends, f"{seen['before']} {seen['after']} {seen['mixture']}\n".encode())

    readers = {in_a_child(read) for _ in range(3)}
    n_syncs = 0
    while readers:
        checkpoint.sync(folder, after if n_syncs % 2 == 0 else before, wait=60, keep=2, **QUIET)
        n_syncs += 1
        time.sleep(0.02)  # or the readers would hardly get in
        readers -= {pid for pid in readers if os.waitpid(pid, os.WNOHANG)[0]}
    os.close(ends)
    with os.fdopen(end) as pipe:
        counts = [tuple(map(int, line.split())) for line in pipe]
    print(f"\n{n_syncs} syncs; readers saw (before, after, mixture): {counts}")
    assert len(counts) == 3 and n_syncs >= 10
    assert all(before >= 10 and after >= 10 and mixture == 0 for before, after, mixture in counts)
