"""The client says what is meant to a server, and what the server answers to its caller.

Over real HTTP, to a server that checks jobs as the real one does and answers by a script; what the
real one makes of them is tested where vLLM is, in `tests/vllm`.
"""

import json
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from amygdala_lib.cli import main
from amygdala_lib.errors import LiveError
from amygdala_lib.live import Client
from amygdala_lib.live.jobs import Limits, Refusal, TrainingJob
from amygdala_lib.live.results import JobResult
from amygdala_lib.training import DPO, Example
from amygdala_lib.training.examples import from_text

TOKEN = "a token of some length"
DONE = JobResult(
    "job-1",
    "done",
    steps=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}],
    log_probabilities={"continuation before": [-3.0], "continuation after": [-1.0]},
    parameters_changed=7,
    optimizer="new",
)
EXAMPLES = [Example((1, 2), (3, 4)), Example((), (5, 6, 7))]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self):
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.asked.append((self.command, self.path, body, dict(self.headers)))
        status, content = self.server.answer(self.command, self.path, body, self.headers)
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if status == 307:
            self.send_header("Location", self.server.elsewhere)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def address_string(self):
        return "a client"  # a unix socket's has none

    def log_message(self, *args):
        pass


class Scripted:
    """Checks the token, jobs and little else; `script` has answers for paths."""

    def __init__(self, server):
        self.server, self.asked, self.script = server, [], {}
        server.asked, server.answer, server.elsewhere = self.asked, self._answer, ""
        self._thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def job(self):
        """The last that was sent, as the real server reads it."""
        bodies = [body for _, path, body, _ in self.asked if path.endswith("/train")]
        return TrainingJob.from_json(bodies[-1], Limits())

    def _answer(self, method, path, body, headers):
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "wrong token", "kind": "unauthorised"}
        path = path.removeprefix("/v1/amygdala")
        if answers := self.script.get(path):
            return answers.pop(0) if len(answers) > 1 else answers[0]
        if path == "/train":
            try:
                TrainingJob.from_json(body, Limits())
            except Refusal as refusal:
                return 422, {"error": str(refusal), "kind": refusal.kind}
            return 202, {"job": "job-1", "waiting": 1}
        if path == "/train/job-1":
            return 200, {"job": "job-1", "state": "done", "result": DONE.to_json()}
        return 404, {"detail": "Not Found"}

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.fixture
def server():
    found = Scripted(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
    yield found
    found.close()


@pytest.fixture
def client(server):
    with Client(server.url, TOKEN) as found:
        yield found


def test_a_job_arrives_as_it_was_meant(client, server):
    pairs = [Example((1, 2), (3, 4), (5,)), Example((6,), (7, 8), (9,))]
    name = client.train(
        pairs,
        replay=EXAMPLES[:1],
        objective=DPO(beta=0.2),
        steps=3,
        label="calm",
        lr=1e-4,
        rank=8,
        wait=False,
    )
    assert name == "job-1"
    assert server.job == TrainingJob(
        context_ids=((1, 2), (6,)),
        continuation_ids=((3, 4), (7, 8)),
        rejected_ids=((5,), (9,)),
        objective="dpo",
        objective_settings={"beta": 0.2, "label_smoothing": 0.0},
        steps=3,
        replay_context_ids=((1, 2),),
        replay_continuation_ids=((3, 4),),
        settings={"lr": 1e-4, "rank": 8},
        label="calm",
    )


def test_training_waits_for_the_result(client):
    result = client.train(EXAMPLES, progress=False)
    assert result == DONE
    assert result.frame()["loss"].tolist() == [2.0, 1.5]
    assert "loss 2.0000 at the first, 1.5000 at the last" in str(result)


def test_texts_become_the_tokens_the_model_reads(client, server, loaded, model_folder):
    lm, folder = loaded("llama"), model_folder("llama")  # it begins texts with a token of its own
    texts = [("The kettle took", " its time."), ("Rain", " on the roof;", " in the loaf.")]
    expected = [from_text(lm, *texts[0]), from_text(lm, *texts[1][:2], rejected=texts[1][2])]
    client.train(texts, model=folder, progress=False)
    assert server.job.examples() == expected
    server.script["/status"] = [(200, {"model": str(folder)})]
    client.train([*texts, {"context_ids": [1], "continuation_ids": [2]}], progress=False)
    assert server.job.examples() == [*expected, Example((1,), (2,))]


def test_all_examples_that_are_none_are_named(client, server, model_folder):
    wrong = [("The kettle took ", "its time."), 5, {"ids": [1]}, ("one text",)]
    with pytest.raises(LiveError) as refused:
        client.train(wrong, model=model_folder("llama"))
    assert [line.split(":")[0] for line in str(refused.value).split("\n")] == [
        f"example {n}" for n in range(4)
    ]
    with pytest.raises(LiveError, match="no tokenizer and configuration"):
        client.train([("a", "b")], model="no/such/folder")
    assert server.asked == []


def test_what_the_server_refuses_is_told_in_its_words(client, server):
    with pytest.raises(Refusal, match="settings: no momentum") as refused:
        client.train(EXAMPLES, momentum=0.9)
    assert refused.value.kind == "invalid"
    for status, content, kind, said in (
        (429, {"error": "16 jobs wait", "kind": "full"}, "full", "answered 429: 16 jobs wait"),
        (503, {"error": "no server's weights", "kind": "lost"}, "lost", "no server's weights"),
        (404, {"detail": "Not Found"}, "unknown", "`amygdala serve` starts servers that have"),
        (400, {"error": {"message": "of vLLM"}}, "invalid", "answered 400: of vLLM"),
        (500, b"<html>oh</html>", "failed", "answered 500"),
        (200, [1], "invalid", "nothing that can be read"),
    ):
        server.script["/status"] = [(status, content)]
        with pytest.raises(Refusal, match=said) as refused:
            client.status()
        assert refused.value.kind == kind
    with pytest.raises(LiveError, match="cannot be sent"):
        client.train(EXAMPLES, lr=float("nan"))


def test_a_failed_job_is_an_error(client, server):
    failed = JobResult("job-1", "failed", error="step 2: loss is nan", kind="failed")
    answer = {"job": "job-1", "state": "failed", "result": failed.to_json()}
    server.script["/train/job-1"] = [(200, answer)]
    with pytest.raises(Refusal, match="job-1 failed: step 2: loss is nan"):
        client.train(EXAMPLES, progress=False)


def test_waiting_goes_on_while_the_worker_is_down_and_ends_when_it_is_to(client, server, capsys):
    done = 200, {"job": "job-1", "state": "done", "result": DONE.to_json()}
    down = 503, {"error": "no training worker", "kind": "down"}
    training = 200, {"job": "job-1", "state": "training", "step": 1, "steps": 2, "loss": 2.0}
    server.script["/train/job-1"] = [training, down, down, training, done]
    assert client.wait("job-1") == DONE
    assert "2/2" in capsys.readouterr().err  # the bar
    server.script["/train/job-1"] = [training]
    with pytest.raises(LiveError, match="not done after 0.3 s .training.: it goes on"):
        client.wait("job-1", timeout=0.3, progress=False)
    server.script["/train/job-1"] = [(503, {"error": "they are gone", "kind": "lost"})]
    with pytest.raises(Refusal, match="they are gone"):
        client.wait("job-1", progress=False)


def test_a_readout_is_a_row_per_token_layer_and_concept(client, server):
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(tokens, 2, 3)) for tokens in (2, 1)]
    mean, std = rng.normal(size=(2, 3)), 1 + rng.random((2, 3))
    server.script["/readout/cmpl%2F1"] = [
        (
            200,
            {
                "concepts": ["calm", "afraid", "proud"],
                "layers": [4, 7],
                "mean": mean.tolist(),
                "std": std.tolist(),
                "sequences": [
                    {"positions": [0, 1], "token_ids": [11, 12], "values": values[0].tolist()},
                    {"positions": [5], "token_ids": [13], "values": values[1].tolist()},
                ],
            },
        )
    ]
    frame = client.readout("cmpl/1")
    assert len(frame) == 3 * 2 * 3
    for s, (positions, ids) in enumerate((((0, 1), (11, 12)), ((5,), (13,)))):
        for t, (position, token) in enumerate(zip(positions, ids, strict=True)):
            for i, layer in enumerate((4, 7)):
                for j, concept in enumerate(("calm", "afraid", "proud")):
                    row = frame.query(
                        f"sequence == {s} and position == {position} and layer == {layer} "
                        f"and concept == '{concept}'"
                    ).iloc[0]
                    assert row["token_id"] == token and row["value"] == values[s][t, i, j]
                    assert row["z"] == pytest.approx((values[s][t, i, j] - mean[i, j]) / std[i, j])


def test_steering_checkpoints_and_history(client, server):
    steering = {"strengths": {"calm": 0.5}, "layers": [4]}
    server.script |= {
        "/steering": [(200, {"steering": steering, "concepts": ["calm"]})],
        "/checkpoint": [(200, {"checkpoint": {"id": 3}})],
        "/rollback": [(200, {"rollback": {"id": 4}})],
        "/history": [(200, {"history": [{"id": 0, "action": "start"}, {"id": 1}]})],
    }
    assert client.steer({"calm": 0.5}, layers=[4]) == steering
    assert server.asked[-1][:3] == ("PUT", "/v1/amygdala/steering", steering)
    client.steer({})
    assert server.asked[-1][0] == "DELETE"
    assert client.steering()["concepts"] == ["calm"]
    assert client.checkpoint() == {"id": 3} and client.rollback(1) == {"id": 4}
    assert server.asked[-1][2] == {"to": 1}
    assert client.history().loc[0, "action"] == "start"


def test_the_token_is_found_where_the_server_has_put_it(server, monkeypatch, tmp_path):
    with Client(server.url) as client, pytest.raises(Refusal, match="wrong token"):
        client.train(EXAMPLES)
    monkeypatch.setenv("AMYGDALA_TOKEN", TOKEN)
    with Client(server.url) as client:
        client.train(EXAMPLES, progress=False)
    monkeypatch.delenv("AMYGDALA_TOKEN")
    monkeypatch.setenv("AMYGDALA_RUNTIME", str(tmp_path))
    tmp_path.chmod(0o700)
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o644)
    with pytest.raises(LiveError, match="open to others"):
        Client(server.url)
    path.chmod(0o600)
    with Client(server.url) as client:
        client.train(EXAMPLES, progress=False)


def test_the_token_goes_nowhere_else(client, server, monkeypatch):
    with pytest.raises(LiveError, match="plain HTTP to another machine"):
        Client("http://192.0.2.1:8000", TOKEN)
    Client("https://192.0.2.1:8000", TOKEN).close()
    Client("http://192.0.2.1:8000", TOKEN, insecure=True).close()
    Client("http://[::1]:8000", TOKEN).close()
    for url in ("127.0.0.1:8000", "ftp://127.0.0.1", "http://", "file:///etc"):
        with pytest.raises(LiveError, match="is no address"):
            Client(url, TOKEN)
    # Neither to a proxy nor where the server would send it on.
    other = Scripted(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
    try:
        monkeypatch.setenv("HTTP_PROXY", other.url)
        monkeypatch.setenv("ALL_PROXY", other.url)
        server.server.elsewhere = f"{other.url}/v1/amygdala/status"
        server.script["/status"] = [(307, {})]
        with Client(server.url, TOKEN) as again, pytest.raises(Refusal, match="answered 307"):
            again.status()
        assert other.asked == []
    finally:
        other.close()


def test_a_unix_socket(tmp_path):
    class Unix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    path = tmp_path / "api.sock"
    server = Scripted(Unix(str(path), Handler))
    try:
        for url in (f"unix:{path}", f"unix://{path}"):
            with Client(url, TOKEN) as client:
                assert client.train(EXAMPLES, progress=False) == DONE
    finally:
        server.close()


def test_without_a_server_it_says_how_to_start_one(tmp_path):
    for url in ("http://127.0.0.1:9", f"unix:{tmp_path / 'none.sock'}"):
        with Client(url, TOKEN) as client, pytest.raises(LiveError, match="`amygdala serve`"):
            client.status()


def test_generation_asks_for_the_openai_package(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(LiveError, match="-m pip install openai"):
        client.openai()


def test_amygdala_train_with_a_server(server, tmp_path, model_folder, loaded, capsys):
    tmp_path.chmod(0o700)
    token, examples = tmp_path / "token", tmp_path / "examples.jsonl"
    token.write_text(TOKEN)
    token.chmod(0o600)
    examples.write_text(json.dumps({"context": "Rain", "continuation": " on the roof;"}) + "\n")
    server.script["/status"] = [(200, {"model": str(model_folder("llama"))})]
    command = ["train", str(examples), "--server", server.url, "--token-file", str(token)]
    assert main([*command, "--lr", "1e-4", "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "1.5000 at the last" in printed and "after a checkpoint" in printed
    assert server.job.examples() == [from_text(loaded("llama"), "Rain", " on the roof;")]
    assert server.job.settings == {"lr": 1e-4, "rank": 64} and server.job.steps == 2
    assert main([*command, "--dry-run"]) == 0 and server.job.dry_run
    assert "nothing was written" in capsys.readouterr().out

    assert main([*command, "--run", "mine", "--out", str(tmp_path / "out")]) == 2
    assert "--run and --out" in capsys.readouterr().err
    assert main(["train", str(examples), "--token-file", str(token)]) == 2
    assert "--token-file is for a server" in capsys.readouterr().err
    token.chmod(0o644)
    assert main(command) == 2
    assert "open to others" in capsys.readouterr().err
