"""A job on a server's weights is whole or not at all, whatever dies while it is trained."""

import asyncio
import copy
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from amygdala_lib import checkpoint
from amygdala_lib.errors import LiveError
from amygdala_lib.live import attach, worker
from amygdala_lib.live.checkpoints import Checkpoints, put_back
from amygdala_lib.live.jobs import KINDS, Limits, Refusal, TrainingJob
from amygdala_lib.live.messages import SOCKET, Mailbox, ask
from amygdala_lib.live.queue import JobQueue, failed
from amygdala_lib.live.record import Record
from amygdala_lib.live.results import JobResult
from amygdala_lib.live.supervisor import Supervisor
from amygdala_lib.live.trainer import Stopped, Trainer
from amygdala_lib.live.undo import Undo
from amygdala_lib.live.worker import LOCKED
from amygdala_lib.models import DEMO_FOLDER, weight_hash
from amygdala_lib.training import train
from tests.live_server import Server

SERVER = 4711, 1
CONTEXTS = [[7, 8, 9], [30, 31], [50, 60, 70, 80]]
CONTINUATIONS = [[10, 11, 12], [33, 34, 35, 36], [90, 91]]
REJECTED = [[20, 21], [22, 23, 24], [25]]
ROWS = {"context_ids": CONTEXTS, "continuation_ids": CONTINUATIONS}
BAD_JOBS = {
    "empty": ({"context_ids": [], "continuation_ids": []}, "no examples"),
    "nothing": ({}, "context_ids is missing"),
    "no object": ([1], "a job is a JSON object"),
    "text for ids": (ROWS | {"context_ids": "calm"}, "a list of lists of token ids"),
    "floats": (ROWS | {"context_ids": [[1.0], [2], [3]]}, "whole numbers"),
    "booleans": (ROWS | {"context_ids": [[True], [2], [3]]}, "whole numbers"),
    "unpaired": (ROWS | {"context_ids": [[1]]}, "do not pair up"),
    "an empty continuation": (ROWS | {"continuation_ids": [[1], [], [2]]}, "empty continuation"),
    "out of vocabulary": (ROWS | {"context_ids": [[10**6], [2], [3]]}, "1000000"),
    "negative": (ROWS | {"context_ids": [[-1], [2], [3]]}, "-1"),
    "over-long": (ROWS | {"context_ids": [[1] * 9000, [2], [3]]}, "at most 8192"),
    "longer than the model": (ROWS | {"context_ids": [[1] * 5000, [2], [3]]}, "the model reads"),
    "too many rows": ({"context_ids": [[1]] * 5000, "continuation_ids": [[1]]}, "at most 4096"),
    "too many steps": (ROWS | {"steps": 10**9}, "steps is 1000000000"),
    "steps by epochs": (ROWS | {"epochs": 1000, "batch_size": 1}, "at most 1000"),
    "a rate that is no number": (ROWS | {"settings": {"lr": float("nan")}}, "settings.lr is nan"),
    "a rate beyond all bounds": (ROWS | {"settings": {"lr": 1e9}}, "above 0 to 0.1"),
    "no such setting": (ROWS | {"settings": {"momentum": 1}}, "no momentum"),
    "no such field": (ROWS | {"pickle": "gASV"}, "pickle: no such field"),
    "no such objective": (ROWS | {"objective": "ppo"}, "one of sft, dpo"),
    "an objective that is a list": (ROWS | {"objective": ["sft"]}, "one of sft, dpo"),
    "another objective's setting": (ROWS | {"objective_settings": {"beta": 1}}, "no beta"),
    "dpo with nothing to compare": (ROWS | {"objective": "dpo"}, "no rejected_ids"),
    "no such parameter": (ROWS | {"parameters": ["*nowhere*"]}, "no parameter is called"),
}


def job_of(**settings):
    job = {**ROWS, "batch_size": 2, "steps": 4, "settings": {"lr": 1e-3}} | settings
    return TrainingJob.from_json(job)


def never():
    return False


class Bench:
    """A trainer over a model of this process: what a worker does, without the worker."""

    def __init__(self, model, runtime):
        self.model, self.runtime = model, runtime
        runtime.mkdir(mode=0o700, exist_ok=True)
        self.restart()

    def restart(self):
        """As a new worker finds things."""
        self.record = Record.open(self.runtime / "record.json")
        self.record.begin_server(SERVER)
        self.trainer = Trainer(self.model, self.record, self.runtime, alive=lambda: None)

    def run(self, name, job, stopped=never, heard=lambda step: None):
        return self.trainer.run(name, job, stopped=stopped, heard=heard)

    @property
    def hash(self):
        return weight_hash(self.model)


@pytest.fixture
def new_bench(request, lm, tmp_path):
    """Trainers of equal models: `new_bench("a")`; in bfloat16, if the test says nothing else."""
    dtype = getattr(request, "param", torch.bfloat16)

    def make(name):
        return Bench(copy.deepcopy(lm.model).to(dtype), tmp_path / name)

    return make


IN_BOTH = pytest.mark.parametrize(
    "new_bench", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"], indirect=True
)


@pytest.fixture
def bench(new_bench):
    return new_bench("one")


@IN_BOTH
def test_a_job_trains_as_amy_train_does(bench, lm):
    reference = copy.deepcopy(bench.model)
    job = job_of(replay_context_ids=[[5, 6]], replay_continuation_ids=[[7, 8]])
    result = bench.run("job-1", job)
    expected = train(
        reference,
        job.examples(),
        replay=job.replay(),
        batch_size=2,
        steps=4,
        lr=1e-3,
        progress=False,
    )
    assert bench.hash == weight_hash(reference) == expected.weights_after
    assert result.losses == expected.steps["loss"].tolist()
    told = result.log_probabilities
    assert told["continuation after"] == expected.log_probabilities["continuation after"].tolist()
    largest = expected.changes.sort_values("relative_change", ascending=False).head(3)
    for row, (name, change) in zip(result.changes, largest.iterrows(), strict=False):
        assert row["name"] == name
        assert row["relative_change"] == pytest.approx(change["relative_change"], rel=1e-4)
        assert row["changed"] == pytest.approx(change["changed"], rel=1e-4)
    assert JobResult.from_json(json.loads(json.dumps(result.to_json()))) == result


@pytest.mark.parametrize("objective", ["sft", "dpo", "dpop", "orpo"])
def test_every_objective_lowers_its_loss(bench, objective):
    rejected = {} if objective == "sft" else {"rejected_ids": REJECTED}
    result = bench.run("job-1", job_of(objective=objective, batch_size=3, steps=6, **rejected))
    assert result.losses[-1] < result.losses[0]
    if rejected:
        told = result.log_probabilities
        margins = [
            sum(told[f"continuation {when}"]) - sum(told[f"rejected {when}"])
            for when in ("before", "after")
        ]
        assert margins[1] > margins[0]


@IN_BOTH
def test_the_optimizer_goes_on_after_a_restart_as_if_there_had_been_none(new_bench):
    unbroken, broken, forgetful = new_bench("unbroken"), new_bench("broken"), new_bench("forgetful")
    for bench in (unbroken, broken, forgetful):
        bench.run("job-1", job_of())
    broken.restart()
    assert broken.trainer.resumed == "resumed from job-1"
    results = [bench.run("job-2", job_of(seed=5)) for bench in (unbroken, broken)]
    assert results[0].losses == results[1].losses and results[1].optimizer == "went on"
    forgetful.run("job-2", job_of(seed=5, fresh_optimizer=True))
    assert unbroken.hash == broken.hash != forgetful.hash
    assert [path.name for path in (broken.runtime / "optimizer").iterdir()] == ["job-2.safetensors"]


def test_another_rank_begins_another_optimizer(bench):
    bench.run("job-1", job_of())
    assert "rank 4, it was 64" in bench.run("job-2", job_of(settings={"rank": 4})).optimizer
    bench.restart()
    assert bench.run("job-3", job_of()).optimizer == "went on"
    assert bench.record.rank == 4


def spoil_gradients(model, after):
    """From step `after` + 1 on, one gradient in the first layer is infinite, the loss is not."""
    parameter, steps = next(iter(model.model.layers[0].mlp.parameters())), []
    parameter.requires_grad_(True)  # or there is nothing to hook
    parameter.register_hook(lambda gradient: gradient * (torch.inf if len(steps) >= after else 1))
    return steps.append


@pytest.mark.parametrize("step_in_backward", [False, True])
def test_a_gradient_that_is_infinite_takes_the_whole_job_back(new_bench, step_in_backward):
    bench, untroubled = new_bench("troubled"), new_bench("untroubled")
    for each in (bench, untroubled):
        each.run("job-1", job_of())
    before, hashes = bench.hash, []
    count = spoil_gradients(bench.model, after=2)

    def heard(step):
        hashes.append(bench.hash)
        count(step)

    with pytest.raises(Refusal, match="The weights are as they were before the job") as refused:
        bench.run("job-2", job_of(step_in_backward=step_in_backward), heard=heard)
    assert refused.value.kind == "failed"
    assert len(hashes) == 2 and before not in hashes  # it had begun
    assert bench.hash == before
    # Nor has the optimizer's memory changed.
    next(iter(bench.model.model.layers[0].mlp.parameters()))._backward_hooks.clear()
    for each in (bench, untroubled):
        each.run("job-3", job_of())
    assert bench.hash == untroubled.hash
    assert not list(bench.runtime.glob("undo*"))


def test_weights_that_are_no_numbers_are_not_trained(bench):
    with torch.no_grad():
        bench.model.get_parameter("model.norm.weight")[0] = torch.nan
    bits = [p.detach().clone().view(torch.uint8) for p in bench.model.parameters()]
    with pytest.raises(Refusal, match="step 1: loss is nan"):
        bench.run("job-1", job_of())
    found = [p.detach().view(torch.uint8) for p in bench.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(bits, found, strict=True))


def test_a_dry_run_changes_nothing_and_says_what_would_change(bench):
    bench.run("job-1", job_of())
    before, files = bench.hash, sorted((bench.runtime / "optimizer").iterdir())
    result = bench.run("job-2", job_of(dry_run=True))
    assert bench.hash == before and sorted((bench.runtime / "optimizer").iterdir()) == files
    assert result.dry_run and result.parameters_changed > 0
    assert result.changes[0]["relative_change"] > 0
    assert len(result.losses) == 4 and bench.record.n_unsaved == 1


def test_a_stopped_job_is_taken_back(bench):
    before, steps = bench.hash, []
    with pytest.raises(Stopped):
        bench.run("job-1", job_of(steps=9), stopped=lambda: len(steps) == 2, heard=steps.append)
    assert bench.hash == before and len(steps) == 2


def test_what_a_killed_worker_has_left_half_done_is_taken_back(new_bench, tmp_path):
    bench, unbroken = new_bench("killed"), new_bench("unbroken")
    before = bench.hash
    left = tmp_path / "left"

    def killed(step):
        if step["step"] == 3:  # what is on the disk when a process is killed here
            shutil.copytree(bench.runtime, left)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run("job-1", job_of(steps=9), heard=killed)
    shutil.rmtree(bench.runtime)
    left.rename(bench.runtime)
    with torch.no_grad():
        for parameter in bench.model.parameters():
            parameter.add_(1)
    bench.restart()
    name, said = bench.trainer.recover()
    assert name == "job-1" and "as they were before it" in said
    assert bench.hash == before and bench.trainer.recover() is None
    for each in (bench, unbroken):
        each.run("job-2", job_of())
    assert bench.hash == unbroken.hash


def test_a_job_whose_result_is_recorded_is_not_taken_back(bench, monkeypatch):
    """A kill after the record, and before the copy of the old weights is removed."""
    monkeypatch.setattr(Undo, "discard", lambda self: None)
    bench.trainer.undo.lacking_room = lambda tensors: None
    bench.run("job-1", job_of())
    monkeypatch.undo()
    after = bench.hash
    bench.restart()
    assert bench.trainer.undo.pending()["job"] == "job-1"
    assert bench.trainer.recover() is None
    assert bench.hash == after and not list(bench.runtime.glob("undo*"))


def test_without_room_for_a_copy_a_job_says_that_it_cannot_be_taken_back(bench, monkeypatch):
    monkeypatch.setattr(Undo, "lacking_room", lambda self, tensors: "no room")
    result = bench.run("job-1", job_of())
    assert not result.undo and result.changes == [] and result.parameters_changed is None
    count = spoil_gradients(bench.model, after=2)
    with pytest.raises(Refusal, match="2 steps before it have changed the weights, for which no"):
        bench.run("job-2", job_of(), heard=count)


@pytest.mark.parametrize("what", BAD_JOBS)
def test_a_job_that_cannot_be_is_refused_by_name(what, loaded):
    job, said = BAD_JOBS[what]
    with pytest.raises(Refusal, match=said.replace("(", r"\(")) as refused:
        found = TrainingJob.from_json(job)
        problems = found.problems_for(loaded("llama").model)
        raise Refusal("invalid", "\n".join(problems) or "nothing wrong was found")
    assert refused.value.kind == "invalid"


def test_all_that_is_wrong_with_a_job_is_said_at_once():
    with pytest.raises(Refusal) as refused:
        TrainingJob.from_json(
            {
                "context_ids": [["a"]],
                "steps": 0,
                "clip": -1,
                "settings": {"lr": 5, "betas": [1]},
                "label": "two\nlines",
                "stps": 1,
            }
        )
    said = str(refused.value).split("\n")
    names = ["stps", "continuation_ids", "context_ids[0]", "steps", "clip", "settings.lr"]
    names += ["settings.betas", "label"]
    assert len(said) == len(names)
    assert all(any(line.startswith(name) for line in said) for name in names)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*TrainingJob.__dataclass_fields__, "x"]), VALUES))
def test_whatever_comes_as_a_job_is_refused_or_is_one(content):
    try:
        job = TrainingJob.from_json(ROWS | content)
    except Refusal as refusal:
        assert refusal.kind == "invalid" and str(refusal)
    else:
        assert TrainingJob.from_json(job.to_json()) == job
        assert job.batches()


def test_jobs_wait_on_disk_until_they_are_done(tmp_path):
    tmp_path.chmod(0o700)
    limits = Limits(queued=3)
    queue = JobQueue(tmp_path, limits)
    names = [queue.add(job_of(seed=n), SERVER) for n in range(3)]
    with pytest.raises(Refusal, match="3 jobs wait") as refused:
        queue.add(job_of(), SERVER)
    assert refused.value.kind == "full"
    name, job = queue.next()
    assert (name, job.seed) == (names[0], 0)
    queue.finish(JobResult(name, "done", steps=[{"step": 1, "loss": float("nan")}]))
    queue.next()  # and is killed; and while it wrote
    with (tmp_path / "jobs.jsonl").open("a") as file:
        file.write('{"job": "job-')

    later = JobQueue(tmp_path, limits)
    assert later.take_up(SERVER) == []
    assert later.waiting == names[1:]
    assert later.result(names[0]).losses == [None] and later.result(names[1]) is None
    later.finish(failed(names[1], None, "failed", "the worker was killed"))
    assert later.add(job_of(), SERVER) == "job-4"
    with pytest.raises(Refusal, match="no job 'job-9'") as refused:
        later.result("job-9")
    assert refused.value.kind == "unknown"

    elsewhere = JobQueue(tmp_path, limits)
    assert elsewhere.take_up((1, 2)) == ["job-3", "job-4"] and elsewhere.waiting == []
    assert elsewhere.result("job-2").error == "the worker was killed"
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("**/*.json*")} == {0o600}


def test_the_optimizer_goes_on_with_a_new_server_only_if_its_folder_has_all(bench):
    bench.run("job-1", job_of())
    record = Record.open(bench.record.path)
    assert not record.begin_server(SERVER) and record.optimizer
    assert record.begin_server((5, 5)) and record.optimizer is None
    record = Record.open(bench.record.path)
    assert record.server == (5, 5) and record.n_unsaved == 0


# Checkpoints


class Kept:
    """A bench whose model was read from a folder of its own."""

    def __init__(self, source, tmp_path):
        self.folder = tmp_path / "model"
        shutil.copytree(source, self.folder)
        self.bench = Bench(self.new_model(), tmp_path / "run")
        self.checkpoints = self.new_checkpoints()

    def new_model(self):
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype="auto").eval()

    def new_checkpoints(self):
        return Checkpoints(self.folder, self.bench.model, self.bench.record)

    def trained(self, name, **settings):
        self.checkpoints.begin()
        self.bench.run(name, job_of(**settings))
        return self.bench.hash

    @property
    def stored(self):
        """Hash of what is in the folder, as transformers reads it."""
        return weight_hash(self.new_model())


@pytest.fixture
def kept(request, model_folder, tmp_path):
    return Kept(model_folder(getattr(request, "param", "qwen3_5")), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["qwen3_5", "qwen3_next"], indirect=True)
def test_a_checkpoint_has_what_was_trained_and_a_rollback_brings_all_of_it_back(kept):
    """Of a mixture of experts, too, whose weights are saved in other pieces."""
    first = kept.bench.hash
    second = kept.trained("job-1", label="calm")
    done = kept.checkpoints.sync("asked for")
    assert kept.stored == second and done["jobs"] == 1 and kept.bench.record.n_unsaved == 0
    third = kept.trained("job-2")
    kept.checkpoints.sync("scheduled")
    assert kept.stored == third
    kept.trained("job-3")
    rows = kept.checkpoints.history()
    json.dumps(rows)
    assert rows[1]["facts"]["jobs"][0]["label"] == "calm"
    assert rows[1]["facts"]["job"] == "job-1" and rows[2]["facts"]["why"] == "scheduled"

    back = kept.checkpoints.rollback(1)
    assert kept.bench.hash == kept.stored == second and back["jobs_given_up"] == 1
    kept.checkpoints.rollback(0)
    assert kept.bench.hash == kept.stored == first
    with pytest.raises(Refusal, match="is not one state") as refused:
        kept.checkpoints.rollback(99)
    assert refused.value.kind == "invalid" and kept.bench.record.doing is None
    kept.trained("job-4")
    assert kept.checkpoints.sync("again")["jobs"] == 1


def test_a_folder_that_does_not_hold_what_is_served_is_left_alone(kept, tmp_path):
    kept.trained("job-1")
    with torch.no_grad():
        other = kept.new_model()
        other.model.norm.weight.add_(1)
    checkpoint.sync(kept.folder, other, progress=False)
    before = kept.stored
    for refused in (kept.checkpoints.sync, kept.checkpoints.rollback):
        with pytest.raises(Refusal, match="another program has changed it since"):
            refused(0)
    assert kept.stored == before
    # One that was another from the start, too.
    kept.bench.record.parent = None
    late = kept.new_checkpoints()
    with pytest.raises(Refusal, match="does not hold the weights that are served"):
        late.sync("asked for")
    nowhere = Checkpoints(None, kept.bench.model, kept.bench.record)
    with pytest.raises(Refusal, match="not started from a model folder"):
        nowhere.sync("asked for")


def test_a_kill_after_a_checkpoint_and_before_its_record(kept):
    kept.trained("job-1")
    path = kept.bench.record.path
    kept.bench.record.doing = {"action": "checkpoint"}
    kept.bench.record.save()
    left = path.read_bytes()
    kept.checkpoints.sync("asked for")
    path.write_bytes(left)
    kept.bench.restart()
    later = kept.new_checkpoints()
    assert later.recover() is None
    assert kept.bench.record.n_unsaved == 0 and kept.bench.record.doing is None
    kept.checkpoints = later
    kept.trained("job-2")
    assert later.sync("asked for")["jobs"] == 1

    # And before the checkpoint has written anything.
    kept.trained("job-3")
    kept.bench.record.doing = {"action": "checkpoint"}
    kept.bench.record.save()
    assert later.recover() is None and kept.bench.record.n_unsaved == 1
    assert later.sync("asked for")["jobs"] == 1


def test_a_rollback_that_was_cut_short_is_finished(kept):
    first = kept.bench.hash
    kept.trained("job-1")
    kept.checkpoints.sync("asked for")
    kept.trained("job-2")
    kept.bench.record.doing = {"action": "rollback", "to": 0}
    kept.bench.record.save()
    checkpoint.rollback(kept.folder, 0, progress=False)
    kept.bench.restart()
    assert kept.new_checkpoints().recover() is not None
    assert kept.bench.hash == kept.stored == first and kept.bench.record.n_unsaved == 0


def test_weights_are_put_back_through_views_of_any_strides(model_folder, tmp_path):
    folder = model_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = weight_hash(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data = parameter.data.T.contiguous().T
            parameter.mul_(3)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    put_back(folder, model)
    assert weight_hash(model) == expected
    assert places == [parameter.data_ptr() for parameter in model.parameters()]


# Processes


def log_probability(logits, context, continuation):
    """Of the whole continuation, from the logits of both."""
    found = logits[len(context) - 1 : -1].log_softmax(-1)
    return found.gather(1, torch.tensor(continuation)[:, None]).sum().item()


@contextmanager
def one_thread():
    """As the server computes: sums of other parts are other numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class HFServer(Server):
    """A plain Hugging Face process as the server."""

    def __init__(self, folder, runtime):
        super().__init__()
        self.handles = self.serve(folder, runtime / "weights.json", "bfloat16")

    def weight_hash(self):
        return weight_hash(attach(self.handles))

    def log_probability(self, context, continuation):
        """By a plain forward of the server's own model."""
        return log_probability(self.logits([*context, *continuation]), context, continuation)

    def kill(self):
        self.process.kill()
        self.end()


class Served:
    """A server of the bundled model, its trainer, and a loop that talks to it."""

    def __init__(self, root, **settings):
        self.folder, self.runtime = root / "model", root / "run"
        if not self.folder.exists():
            shutil.copytree(DEMO_FOLDER, self.folder)
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        self.server = HFServer(self.folder, self.runtime)
        self._loop = asyncio.new_event_loop()
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(self._loop.run_forever)
        self.supervisor = Supervisor(self.runtime, threads=1, **settings)
        self.wait_for(self.supervisor.start())

    def wait_for(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(600)

    def request(self, timeout=60.0, **message):
        return self.wait_for(self.supervisor.request(message, timeout=timeout))

    def status(self):
        return self.wait_for(self.supervisor.status())

    def until(self, fits, seconds=400):
        """The first status that fits."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if fits(status := self.status()):
                return status
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s: {status}")

    def ready(self):
        return self.until(lambda status: status["ok"] and status["state"] == "ready")

    def train(self, **settings):
        job = {**ROWS, "batch_size": 3, "steps": 5, "settings": {"lr": 1e-3}} | settings
        return self.request(do="train", job=job)

    def result(self, name, seconds=400):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.request(do="status", job=name)
            if "result" in found:
                return JobResult.from_json(found["result"])
            time.sleep(0.05)
        raise AssertionError(f"{name} is not done within {seconds} s: {found}")

    def worker(self):
        return self.until(lambda status: status["ok"])["pid"]

    def close(self):
        self.wait_for(self.supervisor.stop(checkpoint=False))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.shutdown()
        self._loop.close()
        self.server.end()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One server for what does not kill it."""
    found = Served(tmp_path_factory.mktemp("served"), checkpoint_after=None)
    found.ready()
    yield found
    found.close()


@pytest.fixture
def own_served(tmp_path):
    """A server to be killed, as often as need be."""
    found = Served(tmp_path, checkpoint_after=None)
    found.ready()
    yield found
    found.close()


def test_a_server_is_trained_in_its_own_memory(served):
    context, continuation = CONTEXTS[0], CONTINUATIONS[0]
    before = served.server.log_probability(context, continuation)
    accepted = served.train(steps=15, label="three of them")
    assert accepted["ok"]
    result = served.result(accepted["job"])
    assert result.state == "done" and result.label == "three of them"
    assert result.losses[-1] < result.losses[0] - 1
    after = served.server.log_probability(context, continuation)
    assert after > before + 3
    # The attached model and the server's own say the same of the same memory.
    model = attach(served.runtime / "weights.json")
    assert weight_hash(model) == served.server.weight_hash()
    with one_thread(), torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0].float()
    assert log_probability(logits, context, continuation) == after
    # By a cache instead of one forward: alike to what bfloat16 has of digits.
    mean = result.log_probabilities["continuation after"][0]
    assert mean * len(continuation) == pytest.approx(after, abs=0.2)


def test_bad_jobs_and_messages_leave_the_weights_alone(served):
    before = served.server.weight_hash()
    for what, (job, said) in BAD_JOBS.items():
        if what == "a rate that is no number":
            continue  # no JSON: see below
        answer = served.request(do="train", job=job)
        assert (answer["ok"], answer["kind"]) == (False, "invalid"), what
        assert said in answer["error"], what
    assert served.train(settings={"lr": float("nan")})["kind"] == "invalid"
    for message in (
        {"do": "format the disk"},
        {"do": ["train"]},
        {},
        {"do": "rollback"},
        {"do": "rollback", "to": {"a": 1}},
        {"do": "status", "job": ["job-1"]},
    ):
        assert served.request(**message)["kind"] == "invalid", message
    assert served.request(do="status", job="job-999")["kind"] == "unknown"
    assert served.request(do="rollback", to=77, timeout=None)["kind"] == "invalid"
    huge = {"do": "train", "job": {"context_ids": [[1] * (5 << 20)]}}
    assert served.request(**huge)["kind"] == "invalid"
    assert served.server.weight_hash() == before
    assert served.status()["ok"]


@pytest.mark.parametrize("payload", [b"", b"\xff\xfe", b"[1]", b"[" * 10**5, b'{"do": NaN}'])
def test_what_is_no_json_is_answered_and_nothing_else_happens(served, payload):
    import zmq

    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.linger = 0
        socket.connect(f"ipc://{served.runtime / SOCKET}")
        socket.send(payload)
        assert socket.poll(60_000)
        assert json.loads(socket.recv())["kind"] == "invalid"
    assert served.status()["ok"]


def test_a_second_trainer_is_refused(served, capsys):
    assert worker.main(["--runtime", str(served.runtime)]) == LOCKED
    assert "one at a time" in capsys.readouterr().err
    assert served.status()["ok"]


def test_the_runtime_folder_is_private(served):
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in [served.runtime, *served.runtime.rglob("*")]
    }
    assert {name: mode for name, mode in modes.items() if mode & 0o077} == {}


@pytest.mark.slow
def test_a_checkpoint_of_a_running_server_and_back(served):
    served.ready()
    start = served.request(do="checkpoint", timeout=None)
    assert start["ok"], start
    ids = [row["id"] for row in served.request(do="history", timeout=None)["history"]]
    before = served.server.weight_hash()
    version = served.status()["version"]
    name = served.train()["job"]
    assert served.result(name).state == "done"
    # Whoever keeps what was computed with the weights is told that they are others.
    assert served.request(do="watch", version=version)["version"] > version
    after = served.server.weight_hash()
    done = served.request(do="checkpoint", timeout=None)["checkpoint"]
    assert done["jobs"] == 1
    stored = AutoModelForCausalLM.from_pretrained(served.folder, dtype="auto")
    assert weight_hash(stored) == after != before
    assert served.request(do="rollback", to=ids[-1] if ids else 0, timeout=None)["ok"]
    assert served.server.weight_hash() == before
    stored = AutoModelForCausalLM.from_pretrained(served.folder, dtype="auto")
    assert weight_hash(stored) == before
    status = served.status()
    assert status["checkpoint"]["unsaved_jobs"] == 0 and status["optimizer"]["file"] is None


def test_a_socket_name_that_is_too_long_is_said(tmp_path):
    with pytest.raises(LiveError, match="a socket's name at most 107"):
        Mailbox(tmp_path / ("a" * 100), 100)


def test_without_a_worker_every_request_says_so(tmp_path):
    supervisor = Supervisor(tmp_path / "run")
    status = asyncio.run(supervisor.status())
    assert not status["ok"] and status["stale"] and status["worker"]["state"] == "not started"
    assert asyncio.run(supervisor.request({"do": "train", "job": {}}))["kind"] == "down"
    assert "down" in KINDS


@pytest.mark.parametrize("seconds", [0, 0.2])
def test_a_worker_can_be_stopped_while_it_starts(tmp_path, seconds):
    async def run():
        supervisor = Supervisor(tmp_path / "run")
        await supervisor.start()
        await asyncio.sleep(seconds)
        await asyncio.wait_for(supervisor.stop(), 60)
        await supervisor.stop()
        return await supervisor.status()

    status = asyncio.run(run())
    assert status["worker"]["state"] == "stopped" and status["worker"]["pid"] is None
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"worker.log", "worker.lock"}


def test_a_runtime_folder_of_others_is_refused(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.raises(LiveError, match="open to others"):
        Supervisor(folder)


# Kills


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_a_job_leaves_the_weights_as_before(own_served):
    served = own_served
    assert served.result(served.train()["job"]).state == "done"
    before = served.server.weight_hash()
    first = served.worker()
    killed, waiting = served.train(steps=1000)["job"], served.train(seed=3)["job"]
    served.until(lambda status: (status.get("running") or {}).get("step", 0) > 2)
    assert served.server.weight_hash() != before
    os.kill(first, signal.SIGKILL)
    assert served.status()["worker"]["state"] != "running"
    assert served.server.log_probability(CONTEXTS[0], CONTINUATIONS[0]) < 0  # it serves on
    result = served.result(killed)
    assert result.state == "failed" and "as they were before it" in result.error
    assert served.result(waiting).state == "done"  # it was accepted, and is not forgotten
    status = served.ready()
    assert status["worker"]["restarts"] == 1
    assert "SIGKILL" in status["worker"]["last_exit"]
    assert status["optimizer"]["memory"] == "resumed from job-1"

    # As one that was never killed: the same jobs, by a trainer in this process.
    model = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype="auto").eval()
    bench = Bench(model, served.runtime.parent / "bench")
    for name, seed in (("job-1", 0), ("job-3", 3)):
        bench.run(name, job_of(batch_size=3, steps=5, seed=seed))
    assert bench.hash == served.server.weight_hash()


@pytest.mark.slow
def test_a_worker_killed_during_a_checkpoint_leaves_the_old_or_the_new_folder(own_served):
    served = own_served
    for number in range(4):
        name = served.train(seed=number)["job"]
        assert served.result(name).state == "done"
        before = weight_hash(AutoModelForCausalLM.from_pretrained(served.folder, dtype="auto"))
        pid = served.worker()
        asked = asyncio.run_coroutine_threadsafe(
            served.supervisor.request({"do": "checkpoint"}, timeout=None), served._loop
        )
        time.sleep(0.02 + 0.06 * number)
        os.kill(pid, signal.SIGKILL)
        answer = asked.result(600)
        assert answer["ok"] or answer["kind"] == "down"
        served.ready()
        with checkpoint.reading(served.folder, wait=30):
            found = weight_hash(AutoModelForCausalLM.from_pretrained(served.folder, dtype="auto"))
        assert found in (before, served.server.weight_hash())
        again = served.request(do="checkpoint", timeout=None)
        assert again["ok"], again
        stored = AutoModelForCausalLM.from_pretrained(served.folder, dtype="auto")
        assert weight_hash(stored) == served.server.weight_hash()


@pytest.mark.slow
def test_a_server_that_dies_is_noticed_and_its_successor_attached(own_served):
    served = own_served
    running, waiting = served.train(steps=1000)["job"], served.train()["job"]
    served.until(lambda status: (status.get("running") or {}).get("step", 0) > 2)
    served.server.kill()
    for name in (running, waiting):
        result = served.result(name)
        assert (result.state, result.kind) == ("failed", "lost"), result
    refused = served.train()
    assert refused["kind"] == "lost" and "has ended" in refused["error"]
    assert served.request(do="checkpoint", timeout=None)["kind"] == "lost"
    assert served.status()["state"] == "lost"
    served.server = HFServer(served.folder, served.runtime)
    status = served.ready()
    assert status["server"]["pid"] == served.server.pid and status["worker"]["restarts"] == 0
    result = served.result(served.train()["job"])
    assert result.state == "done" and result.optimizer == "new"


@pytest.mark.slow
def test_what_is_trained_is_written_after_a_while_and_when_the_server_ends(tmp_path):
    served = Served(tmp_path, checkpoint_after=1)
    try:
        served.ready()
        assert served.result(served.train()["job"]).state == "done"
        served.until(lambda status: status["checkpoint"]["last"] is not None)
        stored = AutoModelForCausalLM.from_pretrained(served.folder, dtype="auto")
        assert weight_hash(stored) == served.server.weight_hash()
        assert "scheduled" in served.status()["checkpoint"]["last"]["why"]
    finally:
        served.close()
    served = Served(tmp_path, checkpoint_after=600)
    try:
        served.ready()
        result = served.result(served.train()["job"])
        assert result.optimizer == "went on"  # the folder had all of it
        served.wait_for(served.supervisor.stop())
        stored = AutoModelForCausalLM.from_pretrained(served.folder, dtype="auto")
        assert weight_hash(stored) == served.server.weight_hash()
    finally:
        served.close()


@pytest.mark.slow
def test_a_worker_ends_with_its_parent_and_leaves_nothing(tmp_path):
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    program = (
        "import asyncio, sys\n"
        "from amygdala_lib.live.supervisor import Supervisor\n"
        "async def main():\n"
        "    supervisor = Supervisor(sys.argv[1])\n"
        "    await supervisor.start()\n"
        "    while not (found := await supervisor.status())['ok']:\n"
        "        await asyncio.sleep(0.1)\n"
        "    print(found['pid'], flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, runtime], stdout=subprocess.PIPE, text=True
    )
    process = Path("/proc") / parent.stdout.readline().strip()
    assert process.exists()
    assert asyncio.run(ask(runtime / SOCKET, {"do": "status"}, timeout=60, limit=100))["ok"]
    parent.kill()
    parent.wait()
    end = time.monotonic() + 60
    while process.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not process.exists()
    assert {path.name for path in runtime.iterdir()} <= {"worker.lock", "worker.log", "queue"}


@pytest.mark.slow
def test_a_worker_that_cannot_start_is_tried_again_ever_more_slowly(tmp_path):
    supervisor = Supervisor(tmp_path / "run")
    (tmp_path / "run" / "worker.lock").symlink_to(tmp_path / "elsewhere")

    async def states():
        await supervisor.start()
        found = set()
        end = time.monotonic() + 120
        while supervisor._restarts < 2 and time.monotonic() < end:
            found.add((await supervisor.status())["worker"]["state"])
            await asyncio.sleep(0.05)
        last = (await supervisor.status())["worker"]["last_exit"]
        await supervisor.stop()
        return found, last

    found, last = asyncio.run(states())
    assert {"restarting in 0.5 s", "restarting in 1 s"} <= found and last == "status 2"
    assert not (tmp_path / "elsewhere").exists()
