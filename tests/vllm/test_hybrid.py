"""The bundled model, a hybrid in bfloat16, in a real vLLM server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from amygdala_lib.directions import Directions
from amygdala_lib.live import attach, weights_of
from tests.vllm.conftest import save_directions
from tests.vllm.reference import digest_of_folder, from_disk, projections, scores
from tests.vllm.server import serving

pytestmark = pytest.mark.vllm

LAYERS = [2, 3, 5]


@pytest.fixture(scope="module")
def directions(tmp_path_factory):
    return save_directions(tmp_path_factory.mktemp("readout"), 256, LAYERS)


@pytest.fixture(scope="module")
def server(tmp_path_factory, hybrid_folder, directions):
    runtime = tmp_path_factory.mktemp("hybrid") / "runtime"
    options = ["--enable-prefix-caching", "--enable-prompt-tokens-details"]
    with serving(hybrid_folder, runtime, readout=directions, options=options) as found:
        found.ready()
        yield found


@pytest.fixture(scope="module")
def attached(server):
    return attach(server.runtime / "weights.json")


def drawn(seed: int, n: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 2000, (n,), generator=generator).tolist()


def same_weights(served, saved) -> bool:
    """vLLM keeps A_log in float32, the folder in bfloat16."""
    saved = dict(saved.named_parameters())
    return all(
        torch.equal(parameter.to(saved[name].dtype), saved[name])
        for name, parameter in served.named_parameters()
    )


def test_attached_logits_equal_those_from_disk_bit_for_bit(server, attached):
    ids, disk = torch.tensor([drawn(0, 90)]), from_disk(server.model)
    with torch.no_grad():
        assert torch.equal(attached(ids).logits, disk(ids).logits)
    assert same_weights(attached, disk)
    shared = {id(tensor): tensor for tensor in weights_of(attached).tensors.values()}
    n_served = sum(tensor.numel() for tensor in shared.values())
    assert n_served == sum(parameter.numel() for parameter in attached.parameters())


def test_every_kind_of_weight_is_the_servers_own(server, attached):
    ids = drawn(1, 40)
    before = server.scores(ids)
    kinds = {}
    for name, parameter in attached.named_parameters():
        kinds.setdefault(name.split(".", 3)[-1], parameter)
    assert any("conv1d" in kind for kind in kinds) and any("A_log" in kind for kind in kinds)
    for kind, parameter in kinds.items():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.5)
        changed = server.scores(ids)
        with torch.no_grad():
            parameter.copy_(kept)
        assert changed != before, kind
    assert server.scores(ids) == before


def test_one_row_per_generated_token_under_concurrency(server, directions, record_property):
    """A prompt of one token among them, which the CPU build does not survive by itself."""
    read, model = Directions.load(directions), from_disk(server.model)
    prompts = [drawn(10 + n, n) for n in (1, 2, 17, 64, 100, 129, 200, 300)]

    def generate(prompt):
        return server.complete(prompt, max_tokens=16, ignore_eos=True, return_token_ids=True)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(generate, prompts))
    worst = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        (sequence,) = server.call("GET", f"/readout/{answer['id']}").json()["sequences"]
        written = answer["choices"][0]["token_ids"]
        assert sequence["positions"] == list(range(16)) and sequence["token_ids"] == written
        expected = projections(model, read, prompt, written)
        difference = (torch.tensor(sequence["values"]) - expected).abs().max()
        worst = max(worst, (difference / expected.abs().max()).item())
    record_property("worst relative difference of readouts, bf16", f"{worst:.2g}")
    assert worst < 0.05  # both compute in bfloat16, of 8 bits, in another order


def test_training_is_seen_at_once_past_a_cached_block(server, attached, record_property):
    text, long = drawn(30, 60), drawn(31, 400)
    before = sum(server.scores(text)[9:])

    def cached() -> int:
        usage = server.complete(long)["usage"]
        return (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)

    cached()
    record_property("tokens of 400 that a hybrid takes from its cache", had := cached())
    assert had >= 128
    job = {
        "context_ids": [text[:10]],
        "continuation_ids": [text[10:]],
        "steps": 15,
        "settings": {"lr": 3e-3, "rank": 16},
    }
    with ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(server.complete, drawn(n, 20), max_tokens=16) for n in range(40)]
        result = server.train(job)
        assert all(run.result()["choices"] for run in runs)
    assert result["state"] == "done", result
    assert cached() == 0
    after = server.scores(text)
    assert sum(after[9:]) > before + 20
    difference = torch.tensor(after) - torch.tensor(scores(attached, text))
    record_property("worst difference of log-probabilities, bf16", f"{difference.abs().max():.2g}")
    assert difference.abs().mean() < 0.1


def test_a_checkpoint_is_the_served_model(server, attached):
    first, text = digest_of_folder(server.model), drawn(40, 30)
    job = {"context_ids": [text[:10]], "continuation_ids": [text[10:]], "steps": 2}
    assert server.train(job)["state"] == "done"
    answer = server.call("POST", "/checkpoint")
    assert answer.status_code == 200, answer.text
    assert digest_of_folder(server.model) != first
    assert same_weights(attached, from_disk(server.model))
