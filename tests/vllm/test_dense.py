"""A dense model in float32 in a real vLLM server: what is served is what is trained and read."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
import torch

from amygdala_lib.directions import Directions
from amygdala_lib.errors import LiveError
from amygdala_lib.live import Client, attach, weights_of
from tests.vllm.conftest import CONCEPTS, save_directions
from tests.vllm.reference import digest_of, digest_of_folder, from_disk, projections, scores
from tests.vllm.server import serving

pytestmark = pytest.mark.vllm

LAYERS = [-1, 1, 2]
OPTIONS = (
    *("--max-num-batched-tokens", "64"),  # prompts come in parts
    *("--num-gpu-blocks-override", "12"),  # of 128 tokens: 8 long requests do not fit together
    "--enable-prompt-tokens-details",
)
BLOCK = 128


@pytest.fixture(scope="module")
def directions(tmp_path_factory, dense_folder):
    return save_directions(tmp_path_factory.mktemp("readout"), 128, LAYERS)


@pytest.fixture(scope="module")
def server(tmp_path_factory, dense_folder, directions):
    runtime = tmp_path_factory.mktemp("dense") / "runtime"
    with serving(dense_folder, runtime, readout=directions, options=OPTIONS) as found:
        found.ready()
        yield found


@pytest.fixture(scope="module")
def attached(server):
    return attach(server.runtime / "weights.json")


def drawn(seed: int, n: int) -> list[int]:
    """Tokens of a prompt; none of them ends a text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 300, (n,), generator=generator).tolist()


def at_once(function, given):
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(function, given))


def generate(server, prompt, n=8, **options):
    """The answer, and the ids of its tokens."""
    found = server.complete(
        prompt, max_tokens=n, ignore_eos=True, return_token_ids=True, logprobs=0, **options
    )
    return found, found["choices"][0]["token_ids"]


def cached(answer) -> int:
    return (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)


def close(found, expected, tolerance):
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())


# What is served is what is attached


def test_attached_logits_equal_those_from_disk_bit_for_bit(server, attached):
    ids = torch.tensor([drawn(0, 90)])
    with torch.no_grad():
        assert torch.equal(attached(ids).logits, from_disk(server.model)(ids).logits)


def test_every_parameter_lies_in_the_servers_memory(server, attached):
    shared = weights_of(attached)
    spans = [
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in shared.tensors.values()
    ]
    for name, parameter in attached.named_parameters():
        start = parameter.data_ptr()
        assert any(low <= start and start + parameter.nbytes <= high for low, high in spans), name
    assert sum(p.numel() for p in attached.parameters()) == sum(
        p.numel() for p in from_disk(server.model).parameters()
    )


def test_one_write_is_seen_by_both_and_can_be_taken_back(server, attached):
    ids = drawn(1, 40)
    before = server.scores(ids)
    for name, parameter in attached.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.5)
        changed = server.scores(ids)
        assert changed != before, name
        close(changed, scores(attached, ids), 1e-4)
        with torch.no_grad():
            parameter.copy_(kept)
    assert server.scores(ids) == before


# Readouts


def test_one_row_per_generated_token_under_concurrency_as_hugging_face_computes_it(
    server, directions, record_property
):
    read, model = Directions.load(directions), from_disk(server.model)
    prompts = [drawn(seed, n) for seed, n in enumerate([1, 2, 30, 64, 65, 129, 200, 300])]
    worst = 0.0
    for prompt, (answer, written) in zip(
        prompts, at_once(lambda p: generate(server, p, 24), prompts), strict=True
    ):
        found = server.call("GET", f"/readout/{answer['id']}").json()
        (sequence,) = found["sequences"]
        assert found["concepts"] == CONCEPTS and found["layers"] == LAYERS
        assert sequence["finished"] and sequence["token_ids"] == written
        assert sequence["positions"] == list(range(24))
        expected = projections(model, read, prompt, written)
        values = torch.tensor(sequence["values"])
        worst = max(worst, ((values - expected).abs().max() / expected.abs().max()).item())
        close(found["mean"], torch.stack([read.means[layer] for layer in LAYERS]), 0)
        close(found["std"], torch.stack([read.stds[layer] for layer in LAYERS]), 0)
    record_property("worst relative difference of readouts, fp32", f"{worst:.2g}")
    assert worst < 1e-5


def preemptions(server) -> float:
    lines = server.anyone.get("/metrics").text.splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("vllm:num_preemptions_total"))


def test_requests_that_are_set_back_are_read_once_per_token_too(server, directions):
    read, model = Directions.load(directions), from_disk(server.model)
    prompts, before = [drawn(50 + seed, 60) for seed in range(8)], preemptions(server)
    found = at_once(lambda p: generate(server, p, 200), prompts)
    assert preemptions(server) > before
    for prompt, (answer, written) in zip(prompts, found, strict=True):
        (sequence,) = server.call("GET", f"/readout/{answer['id']}").json()["sequences"]
        assert sequence["positions"] == list(range(200)) and sequence["token_ids"] == written
        close(sequence["values"], projections(model, read, prompt, written), 1e-5)


def test_several_sequences_of_one_request_are_told_apart(server):
    prompts = [drawn(70, 10), drawn(71, 20)]
    found = server.complete(prompts, n=2, temperature=1.0, seed=3, max_tokens=5, ignore_eos=True)
    sequences = server.call("GET", f"/readout/{found['id']}").json()["sequences"]
    assert len({sequence["id"] for sequence in sequences}) == 4
    assert all(sequence["positions"] == list(range(5)) for sequence in sequences)


def test_a_readout_can_be_had_while_its_request_runs(server):
    answer = server.anyone.stream(
        "POST",
        "/v1/completions",
        json={
            "model": "served",
            "prompt": drawn(72, 10),
            "max_tokens": 400,
            "ignore_eos": True,
            "stream": True,
        },
    )
    with answer as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: {"))
        name = json.loads(next(lines).removeprefix("data: "))["id"]
        (sequence,) = server.call("GET", f"/readout/{name}").json()["sequences"]
        assert not sequence["finished"] and 1 <= len(sequence["values"]) < 400
        assert len(list(lines)) > 300


@pytest.mark.parametrize("name", ["cmpl-unknown", "cmpl", "c", "%2e%2e"])
def test_readouts_of_unknown_requests_are_not_found(server, name):
    server.complete(drawn(0, 5))
    answer = server.call("GET", f"/readout/{name}")
    assert answer.status_code == 404, answer.text


# Steering


def steered_by(strengths) -> dict:
    return {"vllm_xargs": {"amygdala_steering": json.dumps(strengths)}}


def log_probabilities(answer) -> list[float]:
    return answer["choices"][0]["logprobs"]["token_logprobs"]


def test_steering_one_request_leaves_its_neighbours_alone(server, directions, record_property):
    read, model = Directions.load(directions), from_disk(server.model)
    prompts = [drawn(100 + seed, 30 + seed) for seed in range(8)]
    strengths = {"calm": 0.5, "sad": -0.25}

    def run(number, steered):
        options = steered_by(strengths) if number == 3 and steered else {}
        return generate(server, prompts[number], 24, **options)

    plain = at_once(lambda n: run(n, False), range(8))
    mixed = at_once(lambda n: run(n, True), range(8))
    worst = 0.0
    for number in range(8):
        if number == 3:
            continue
        assert plain[number][1] == mixed[number][1]
        pairs = zip(
            *(log_probabilities(run[number][0]) for run in (plain, mixed)),
            strict=True,
        )
        worst = max(worst, max(abs(a - b) for a, b in pairs))
    record_property("neighbours' log-probabilities change by at most", f"{worst:.2g}")
    assert worst < 1e-5
    answer, written = mixed[3]
    assert written != plain[3][1]
    (sequence,) = server.call("GET", f"/readout/{answer['id']}").json()["sequences"]
    close(sequence["values"], projections(model, read, prompts[3], written, strengths), 1e-4)


def test_steered_and_unsteered_requests_share_no_cached_blocks(server):
    prompt, strengths = drawn(120, 2 * BLOCK + 20), steered_by({"proud": 0.5})
    first, plain = generate(server, prompt)
    again, _ = generate(server, prompt)
    assert (cached(first), cached(again)) == (0, 2 * BLOCK)
    steered, pushed = generate(server, prompt, **strengths)
    assert cached(steered) == 0 and pushed != plain
    same, pushed_again = generate(server, prompt, **strengths)
    assert cached(same) == 2 * BLOCK and pushed_again == pushed
    other, _ = generate(server, prompt, **steered_by({"proud": 0.25}))
    salted, _ = generate(server, prompt, cache_salt="mine")
    assert cached(other) == cached(salted) == 0
    assert generate(server, prompt)[1] == plain


def test_a_default_steers_whatever_brings_none_of_its_own(server):
    prompt = drawn(130, 40)
    plain = generate(server, prompt)[1]
    by_hand = generate(server, prompt, **steered_by({"calm": 0.5}))[1]
    at_one = {"strengths": {"calm": 0.5}, "layers": [2]}
    try:
        answer = server.call("PUT", "/steering", json={"calm": 0.5})
        expected = {"strengths": {"calm": 0.5}, "layers": LAYERS}
        assert (answer.status_code, answer.json()["steering"]) == (200, expected)
        assert generate(server, prompt)[1] == by_hand != plain
        assert generate(server, prompt, **steered_by({}))[1] == plain
        assert server.call("PUT", "/steering", json=at_one).status_code == 200
        assert generate(server, prompt)[1] == generate(server, prompt, **steered_by(at_one))[1]
    finally:
        assert server.call("DELETE", "/steering").json()["steering"] == {}
    assert server.call("GET", "/steering").json()["steering"] == {}
    assert generate(server, prompt)[1] == plain


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"clam": 0.5}, "do you mean calm"),
        ({"calm": "much"}, "give a number"),
        ({"calm": 11}, "from -10 to 10"),
        ({"calm": True}, "give a number"),
        ([1], "give an object"),
        ({"strengths": {"calm": 1}, "layers": [7]}, "some of"),
        ({"strengths": {"calm": 1}, "layer": [1]}, "no layer"),
    ],
)
def test_steering_that_cannot_be_meant_is_refused(server, told, said):
    answer = server.call("PUT", "/steering", json=told)
    assert answer.status_code == 422 and said in answer.json()["error"]
    body = {"model": "served", "prompt": [1, 2], "max_tokens": 1} | steered_by(told)
    answer = server.anyone.post("/v1/completions", json=body)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


# Training while requests run


JOB = {"steps": 12, "batch_size": 4, "settings": {"lr": 3e-3, "rank": 16}}


def job_of(*texts, split=8, **settings) -> dict:
    return JOB | {
        "context_ids": [text[:split] for text in texts],
        "continuation_ids": [text[split:] for text in texts],
        **settings,
    }


def requests_until(server, stop) -> list[tuple[float, float]]:
    """One after the other: when each began, and how long it took; all are checked."""
    found = []
    while not stop(len(found)):
        start = time.perf_counter()
        answer = server.complete(drawn(len(found), 20), max_tokens=16, ignore_eos=True)
        found.append((start, time.perf_counter() - start))
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "length" and isinstance(choice["text"], str)
        assert answer["usage"]["completion_tokens"] == 16
    return found


def test_training_while_200_requests_run_on_8_connections(server, attached, record_property):
    texts = [drawn(200 + seed, 40) for seed in range(4)]
    long = drawn(210, 2 * BLOCK + 10)
    before = [sum(server.scores(text)[7:]) for text in texts]
    server.complete(long)
    assert cached(server.complete(long)) == 2 * BLOCK
    with ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(requests_until, server, lambda n: n >= 15) for _ in range(8)]
        quiet = [seconds for run in runs for _, seconds in run.result()]
        job = job_of(*texts, steps=150, settings={"lr": 1e-3, "rank": 16})
        name = server.call("POST", "/train", json=job).json()["job"]
        ended = []
        runs = [
            pool.submit(requests_until, server, lambda n: n >= 25 and bool(ended)) for _ in range(8)
        ]
        result = server.result(name)
        ended.append(time.perf_counter())
        answered = [request for run in runs for request in run.result()]
    assert result["state"] == "done", result
    busy = [seconds for start, seconds in answered if start + seconds < ended[0]]
    assert len(answered) >= 200 and len(busy) >= 100
    losses = [step["loss"] for step in result["steps"]]
    assert losses[-1] < 0.5 * losses[0]
    answer = server.complete(long, max_tokens=1)
    assert cached(answer) == 0, "the next request sees the new weights"
    for text, was in zip(texts, before, strict=True):
        now = server.scores(text)
        assert sum(now[7:]) > was + 10
        close(now, scores(attached, text), 1e-4)
    _, written = generate(server, long, 12)
    with torch.no_grad():
        expected = attached.generate(
            torch.tensor([long]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )[0, len(long) :].tolist()
    assert written == expected
    record_property("requests", f"{len(answered)}, {len(busy)} of them answered while training")
    for name, times in (("without", quiet), ("with", busy)):
        median, worst = statistics.median(times), max(times)
        record_property(f"seconds a request {name} training", f"{median:.3f}, at most {worst:.3f}")
    record_property("loss", f"{losses[0]:.3f} to {losses[-1]:.3f}")


def test_a_checkpoint_is_the_served_model_and_rollback_brings_both_back(server, attached):
    first = digest_of_folder(server.model)
    text = drawn(300, 40)
    answer = server.call("POST", "/checkpoint")
    assert answer.status_code == 200, answer.text
    saved, then = digest_of_folder(server.model), digest_of(attached)
    assert saved != first and digest_of(from_disk(server.model)) == then
    before = server.scores(text)
    assert server.train(job_of(text))["state"] == "done"
    assert server.scores(text) != before and digest_of_folder(server.model) == saved
    assert server.call("POST", "/checkpoint").status_code == 200
    history = server.call("GET", "/history")
    assert history.status_code == 200, history.text
    states = history.json()["history"]
    answer = server.call("POST", "/rollback", json={"to": states[-2]["id"]})
    assert answer.status_code == 200, answer.text
    assert digest_of_folder(server.model) == saved and digest_of(attached) == then
    assert server.scores(text) == before


def test_the_client_trains_reads_and_steers(server):
    text = drawn(310, 30)
    pair = {"context_ids": text[:5], "continuation_ids": text[5:]}
    with Client(server.url, server.token) as client:
        answer, written = generate(server, text)
        frame = client.readout(answer["id"])
        assert frame.drop_duplicates("position").token_id.tolist() == written
        assert len(frame) == 8 * len(LAYERS) * len(CONCEPTS) and frame.z.notna().all()
        assert client.steer({"calm": 0.5}, layers=[1])["layers"] == [1]
        assert client.steer({}) == client.steering()["steering"] == {}
        result = client.train([pair], steps=3, lr=1e-3, rank=8, progress=False)
        assert result.state == "done" and len(result.losses) == 3
        assert client.status()["state"] == "ready"


# What is refused


def test_nothing_is_to_be_had_without_the_token(server):
    calls = [
        ("POST", "/train"),
        ("GET", "/train/job-1"),
        ("GET", "/status"),
        ("POST", "/checkpoint"),
        ("POST", "/rollback"),
        ("GET", "/history"),
        ("GET", "/readout/cmpl-1"),
        ("GET", "/steering"),
        ("PUT", "/steering"),
        ("DELETE", "/steering"),
    ]
    wrong = ["", "Bearer", "Bearer x", f"Basic {server.token}", f"Bearer {server.token}x"]
    wrong += [f"Bearer {server.token[:-1]}", server.token]
    for method, path in calls:
        for told in wrong:
            answer = server.anyone.request(
                method, f"/v1/amygdala{path}", json={}, headers={"Authorization": told}
            )
            assert answer.status_code == 401 and "token" in answer.json()["error"]
            assert server.token not in answer.text
    other = {"X-Amygdala-Token": server.token}
    assert server.anyone.get("/v1/amygdala/status", headers=other).status_code == 200


WRONG = {
    "empty": ({}, "context_ids is missing"),
    "no examples": ({"context_ids": [], "continuation_ids": []}, "no examples"),
    "nothing to learn": (job_of([1, 2, 3], split=3), "continuation"),
    "out of vocabulary": (job_of([1, 2, 10**6], split=1), "0 to 399"),
    "negative": (job_of([1, 2, -1], split=1), "0 to 399"),
    "too long": (job_of([1] * 600, split=1), "512"),
    "no numbers": (job_of([1, "2"], split=1), "token ids"),
    "too many steps": (job_of([1, 2], split=1, steps=10**6), "steps"),
    "no such setting": (job_of([1, 2], split=1, settings={"lrr": 1}), "lrr"),
    "wild learning rate": (job_of([1, 2], split=1, settings={"lr": 5}), "lr"),
    "no such field": (job_of([1, 2], split=1, extra=1), "extra"),
    "a list": ([], "object"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_job_that_cannot_be_meant_is_refused_with_the_reason(server, attached, name):
    job, said = WRONG[name]
    before = digest_of(attached)
    answer = server.call("POST", "/train", json=job)
    assert answer.status_code == 422 and said in answer.json()["error"], answer.text
    assert digest_of(attached) == before


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 422),
        (b"\xff\xfe", 422),
        (b'{"context_ids": NaN}', 422),
        (b"[" * 100_000, 422),
        (b" " * (9 << 20), 413),
    ],
)
def test_a_body_that_is_no_job_is_refused_and_never_read_whole(server, content, status):
    assert server.call("POST", "/train", content=content).status_code == status
    chunks = (content[n : n + 65536] for n in range(0, len(content), 65536))
    try:
        assert server.call("POST", "/train", content=chunks).status_code == status
    except httpx.WriteError:  # it has hung up, as it may
        assert status == 413
    if status == 413:
        small = b" " * (1 << 17)
        assert server.call("PUT", "/steering", content=small).status_code == 413


def test_a_queue_that_is_full_takes_no_more(server):
    text = drawn(320, 40)
    jobs = [job_of(text, steps=30)] + 19 * [job_of(text, steps=1, dry_run=True)]
    answers = [server.call("POST", "/train", json=job) for job in jobs]
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {202, 429} and codes[:16] == 16 * [202]
    assert answers[codes.index(429)].headers["Retry-After"]
    for answer in answers:
        if answer.status_code == 202:
            assert server.result(answer.json()["job"])["state"] == "done"


def test_a_job_whose_loss_is_not_finite_changes_nothing(server, attached):
    weight = attached.model.norm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0] = float("nan")
    before = digest_of(attached)
    try:
        result = server.train(job_of(drawn(330, 30)))
    finally:
        changed = digest_of(attached) != before
        with torch.no_grad():
            weight.copy_(kept)
    assert result["state"] == "failed" and "loss is nan" in result["error"], result
    assert not changed


@pytest.mark.parametrize(("path", "code"), [("/train/job-9999", 404), ("/train/x", 404)])
def test_jobs_that_there_are_not(server, path, code):
    assert server.call("GET", path).status_code == code
    assert server.call("POST", "/rollback", json={"to": 10**6}).status_code in (404, 422)
    assert server.call("POST", "/rollback", json={}).status_code == 422


# What is reported


def test_prometheus_is_told(server):
    text = drawn(340, 20)
    server.train(job_of(text, steps=1))
    deadline = time.monotonic() + 30
    while "amygdala_up 1.0" not in (told := server.anyone.get("/metrics").text):
        assert time.monotonic() < deadline, told[-2000:]
        time.sleep(0.5)
    for name in ("jobs_waiting", "weights_version_total", "worker_restarts_total", "steered"):
        assert f"\namygdala_{name} " in told


# Faults


def test_a_second_trainer_is_refused(server):
    command = [sys.executable, "-m", "amygdala_lib.live.worker", "--runtime", str(server.runtime)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and "another worker" in done.stderr
    assert server.ready()["worker"]["restarts"] == 0


@pytest.mark.parametrize("mode", [0o644, 0o660])
def test_weights_that_others_could_have_named_are_refused(server, mode):
    path = server.runtime / "weights.json"
    path.chmod(mode)
    try:
        with pytest.raises(LiveError, match="open to others"):
            attach(path)
    finally:
        path.chmod(0o600)


def test_a_trainer_that_is_killed_is_started_again_and_goes_on(server, attached):
    text = drawn(350, 40)
    assert server.train(job_of(text, steps=3))["state"] == "done"
    before = digest_of(attached)
    name = server.call("POST", "/train", json=job_of(text, steps=400)).json()["job"]
    while server.call("GET", f"/train/{name}").json().get("step", 0) < 2:
        time.sleep(0.1)
    os.kill(server.processes()["trainer"].pid, signal.SIGKILL)
    assert generate(server, text)[1]
    status = server.call("GET", "/status")
    assert status.status_code == 200 and not status.json()["ok"]
    assert server.call("POST", "/train", json=job_of(text)).status_code == 503
    found = server.ready()
    assert found["worker"]["restarts"] == 1 and "SIGKILL" in found["worker"]["last_exit"]
    result = server.result(name)
    assert result["state"] == "failed" and "killed" in result["error"]
    assert digest_of(attached) == before
    close(server.scores(text), scores(attached, text), 1e-4)
    result = server.train(job_of(text, steps=3))
    assert (result["state"], result["optimizer"]) == ("done", "went on")


def test_the_server_ends_with_its_worker_and_takes_the_trainer_with_it(
    server, dense_folder, directions, tmp_path
):
    """Last: there is no server after it but the one that takes its place, in the same folder."""
    found = server.processes()
    kept = digest_of_folder(server.model)
    attached = attach(server.runtime / "weights.json")
    os.kill(found["worker"].pid, signal.SIGKILL)
    _, alive = psutil.wait_procs([*found.values()], timeout=90)
    assert not alive
    with pytest.raises(LiveError, match="has ended"):
        weights_of(attached).check()
    with pytest.raises(LiveError, match="ended|gone"):
        attach(server.runtime / "weights.json")
    server.process.wait(30)
    assert digest_of_folder(server.model) == kept
    with serving(dense_folder, server.runtime, readout=directions) as other:
        other.ready()
        assert other.train(job_of(drawn(360, 30), steps=2))["state"] == "done"
