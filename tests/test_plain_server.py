"""A plain server computes as Hugging Face does, is trained while it serves, and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from amygdala_lib import live, servers
from amygdala_lib.directions import Directions
from amygdala_lib.errors import LiveError
from amygdala_lib.models import load_model, weight_hash
from amygdala_lib.servers import guard
from amygdala_lib.servers.server import launch, new_runtime
from amygdala_lib.steering import steer
from amygdala_lib.training import Example
from tests.vllm.conftest import save_directions
from tests.vllm.reference import projections, scores

pytestmark = pytest.mark.slow  # each server imports torch anew

LAYERS = [1, 3]
PROMPTS = [[5, 9, 30, 12], [7, 7, 100, 41, 3, 60], [250, 11, 19]]
TEXT = Example(tuple(range(20, 26)), tuple(range(40, 60)))


@pytest.fixture(scope="module")
def directions(tmp_path_factory):
    return save_directions(tmp_path_factory.mktemp("readout"), 64, LAYERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder):
    place = tmp_path_factory.mktemp("served") / "model"
    return Path(shutil.copytree(model_folder("qwen3_5"), place))


@pytest.fixture(scope="module")
def server(folder, directions):
    with servers.start(folder, directions, engine="plain") as found:
        yield found
        family = psutil.Process().children(recursive=True)
    assert not found.runtime.exists()
    assert psutil.wait_procs(family, timeout=0)[1] == []


@pytest.fixture(scope="module")
def reference(folder):
    return load_model(folder, device="cpu")


def likeliest(model, prompt, n):
    """By Hugging Face: the tokens, and the log-probability of each."""
    found = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        eos_token_id=-1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = found.sequences[0, len(prompt) :].tolist()
    chosen = [s[0].log_softmax(-1)[t].item() for s, t in zip(found.logits, tokens, strict=True)]
    return tokens, chosen


def at_once(function, given):
    with ThreadPoolExecutor(len(given)) as pool:
        return list(pool.map(function, given))


def test_requests_answered_at_once_are_what_hugging_face_writes(server, reference):
    found = at_once(lambda prompt: server.complete(prompt, 12), PROMPTS)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        tokens, chosen = likeliest(reference.model, prompt, 12)
        assert completion.token_ids == tokens
        assert completion.log_probabilities == pytest.approx(chosen, abs=1e-4)
    assert len({completion.id for completion in found}) == 3


def test_log_probabilities_of_a_text_are_those_of_the_model(server, reference):
    text = [*TEXT.context_ids, *TEXT.continuation_ids]
    expected = scores(reference.model, text)
    assert server.log_probabilities(text).tolist() == pytest.approx(expected, abs=1e-4)
    assert server.score(TEXT) == pytest.approx(sum(expected[-20:]) / 20, abs=1e-4)


def test_a_readout_has_a_row_per_token_so_far_while_it_is_written(server, reference, directions):
    read, sizes = Directions.load(directions), []
    for name, tokens in server.stream(PROMPTS[1], 40):
        if len(tokens) in (1, 20):
            sizes.append((len(tokens), server.client.readout(name).position.nunique()))
    assert [n for n, _ in sizes] == [1, 20]
    assert all(received <= seen < 40 for received, seen in sizes)
    frame = server.client.readout(name)
    expected = projections(reference.model, read, PROMPTS[1], tokens)
    assert frame.value.to_numpy() == pytest.approx(expected.numpy().reshape(-1), abs=1e-3)
    assert frame.token_id.to_numpy()[:: len(LAYERS) * 3].tolist() == tokens
    means = torch.stack([read.means[layer] for layer in LAYERS])
    stds = torch.stack([read.stds[layer] for layer in LAYERS])
    z = ((expected - means) / stds).numpy().reshape(-1)
    assert frame.z.to_numpy() == pytest.approx(z, abs=1e-3)


def test_steering_changes_one_request_and_not_the_one_beside_it(server, reference, directions):
    strengths, read = {"calm": 3.0, "sad": -1.0}, Directions.load(directions)
    alone = server.complete(PROMPTS[2], 24)

    def ask(steered):
        if steered:
            return server.complete(PROMPTS[0], 24, steering=strengths, layers=[3])
        return server.complete(PROMPTS[2], 24)

    pushed, neighbour = at_once(ask, [True, False])
    assert neighbour.token_ids == alone.token_ids
    assert neighbour.log_probabilities == alone.log_probabilities
    with steer(reference, read, strengths, layers=[3], allow_other_model=True):
        expected = likeliest(reference.model, PROMPTS[0], 24)
    assert pushed.token_ids == expected[0] != server.complete(PROMPTS[0], 24).token_ids


def test_it_is_trained_written_and_rolled_back_while_requests_run(server, folder):
    twin, before = live.attach(server.handles), (folder / "model.safetensors").read_bytes()
    untrained, text = weight_hash(twin), [*TEXT.context_ids, *TEXT.continuation_ids]
    first = server.log_probabilities(text)
    with servers.Load(server, PROMPTS, connections=2, max_tokens=4) as load:
        result = server.client.train([TEXT], steps=2, lr=1e-3, progress=False)
    requests = load.frame()
    assert len(requests) >= 2 and requests.error.isna().all() and (requests.tokens == 4).all()
    assert requests.start.is_monotonic_increasing and (requests.seconds > 0).all()
    assert result.losses[-1] < result.losses[0]
    after = result.log_probabilities["continuation after"]
    assert server.score(TEXT) == pytest.approx(after[0], abs=1e-4) and after[0] > first[-20:].mean()
    assert server.client.checkpoint()["jobs"] == 1
    assert (folder / "model.safetensors").read_bytes() != before
    assert server.client.history().index.tolist() == [0, 1]
    server.client.rollback(0)
    assert (folder / "model.safetensors").read_bytes() == before
    assert weight_hash(twin) == untrained
    assert (server.log_probabilities(text) == first).all()


REFUSED = {
    "a token the model has not": ({"prompt": [1, 10**6]}, "no tokens of this model: [1000000]"),
    "a text": ({"prompt": "calm"}, "list of token ids"),
    "no prompt": ({"prompt": []}, "prompt is empty"),
    "floats": ({"prompt": [1.5]}, "no tokens of this model"),
    "no tokens": ({"prompt": [1], "max_tokens": 0}, "from 1 on"),
    "more than it reads": ({"prompt": [1], "max_tokens": 10**6}, "at most"),
    "sampling": ({"prompt": [1], "temperature": 1}, "likeliest"),
    "an unknown concept": (
        {"prompt": [1], "vllm_xargs": {"amygdala_steering": '{"clam": 1}'}},
        "calm",
    ),
    "steering that is a list": (
        {"prompt": [1], "vllm_xargs": {"amygdala_steering": "[1]"}},
        "give",
    ),
    "an unknown concept, streamed": (
        {"prompt": [1], "stream": True, "vllm_xargs": {"amygdala_steering": '{"clam": 1}'}},
        "calm",
    ),
    "a layer that is not read": (
        {
            "prompt": [1],
            "vllm_xargs": {"amygdala_steering": '{"strengths": {"calm": 1}, "layers": [2]}'},
        },
        "2",
    ),
}


@pytest.fixture
def http(server):
    transport = httpx.HTTPTransport(uds=str(server.runtime / "server.sock"))
    with httpx.Client(transport=transport, base_url="http://localhost/v1", timeout=30) as client:
        yield client


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_answered_is_refused_with_the_reason(http, what):
    body, said = REFUSED[what]
    answer = http.post("/completions", json=body)
    assert answer.status_code == 422 and said in answer.json()["error"]
    assert http.post("/completions", json={"prompt": [1]}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/amygdala/readout/cmpl-0", 404),
        ("GET", "/amygdala/readout/..%2f..", 404),
        ("GET", "/amygdala/train/job-99", 404),
        ("GET", "/amygdala/train", 404),
        ("POST", "/amygdala/history", 404),
        ("PUT", "/amygdala/steering", 501),
        ("POST", "/nowhere", 404),
    ],
)
def test_what_is_not_there_is_said_not_to_be(http, method, path, status):
    assert http.request(method, path, json={}).status_code == status


def test_a_body_that_is_no_json_or_too_large_is_not_taken(http, server):
    assert http.post("/completions", content=b"{").status_code == 422
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(server.runtime / "server.sock"))
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1073741824\r\n\r\n")
        answer = raw.makefile("rb").read()  # all of it: the server hangs up
    assert b"422" in answer.splitlines()[0] and b"at most" in answer
    with pytest.raises(LiveError, match="empty continuation"):
        server.client.train([{"context_ids": [], "continuation_ids": []}])


def test_only_this_user_can_reach_it(server):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in server.runtime.iterdir()}
    assert stat.S_IMODE(server.runtime.stat().st_mode) == 0o700
    assert modes["server.sock"] == modes["weights.json"] == modes["worker.sock"] == 0o600


def test_another_can_connect_to_it_and_does_not_end_it(server):
    other = servers.connect(server.client.url, server.runtime)
    assert other.engine == "plain" and other.model_folder == server.model_folder
    assert other.complete(PROMPTS[0], 3).token_ids == server.complete(PROMPTS[0], 3).token_ids
    other.close()
    assert server.complete(PROMPTS[0], 3).token_ids


# Beginning and end


def test_connecting_to_no_server_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("AMYGDALA_RUNTIME", raising=False)
    with pytest.raises(LiveError, match="private folder"):
        servers.connect("http://127.0.0.1:1")
    with pytest.raises(LiveError, match="choose one of auto, plain, vllm"):
        servers.start(tmp_path, engine="gguf")


def test_a_server_that_does_not_come_up_is_reported_with_its_log_and_leaves_nothing():
    runtime = new_runtime()
    command = [sys.executable, "-c", "print('the disk is full'); raise SystemExit(3)"]
    with pytest.raises(LiveError, match="has ended:\nthe disk is full"):
        launch(command, runtime, {}, has_token=True)
    assert not runtime.exists()


STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


@pytest.mark.parametrize("stubborn", [False, True])
def test_what_a_killed_process_has_started_ends_with_it(tmp_path, monkeypatch, stubborn):
    """Its guard is all that is left to see to that; a server that heeds no signal is killed."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    script = tmp_path / "guard.py"
    text = Path(guard.__file__).read_text()
    patient = "_PATIENCE = 60.0, 15.0, 5.0"
    assert patient in text
    script.write_text(text.replace(patient, "_PATIENCE = 0.5, 0.5, 5.0"))
    watched = [sys.executable, "-c", STUBBORN if stubborn else "import time; time.sleep(600)"]
    command = [sys.executable, "-I", str(script), str(folder), *watched]
    starter = (
        "import json, subprocess, sys, time; "
        f"subprocess.Popen(json.loads({json.dumps(command)!r}), stdin=subprocess.PIPE, "
        "start_new_session=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", starter])
    parent, until = psutil.Process(process.pid), time.monotonic() + 20
    while len(family := parent.children(recursive=True)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(family) == 2
    time.sleep(0.5)  # for the signal to be ignored
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs(family, timeout=20)[1] == []
    assert not folder.exists()


def test_what_to_install_is_what_amygdala_serve_says(folder):
    said = servers.how_to_install(folder)
    assert said is None or "make vllm" in said
