"""A hybrid with experts in a real vLLM server: on the CPU, the plugin computes these itself."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from amygdala_lib.live import attach
from tests.conftest import new_tokenizer
from tests.vllm.reference import from_disk, scores
from tests.vllm.server import serving

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "experts"
    tokenizer = new_tokenizer("qwen3_next")
    config = hf.Qwen3NextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(1)
    hf.Qwen3NextForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_experts_are_served_attached_and_trained(folder, tmp_path, record_property):
    ids = torch.randint(1, 300, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    with serving(folder, tmp_path / "runtime") as server:
        server.ready()
        attached, disk = attach(server.runtime / "weights.json"), from_disk(folder)
        with torch.no_grad():
            tokens = torch.tensor([ids])
            assert torch.equal(attached(tokens).logits, disk(tokens).logits)
        served = torch.tensor(server.scores(ids))
        difference = (served - torch.tensor(scores(disk, ids))).abs()
        record_property("worst difference of log-probabilities, bf16", f"{difference.max():.2g}")
        assert difference.mean() < 0.03  # a router near a tie may send a token elsewhere
        job = {
            "context_ids": [ids[:8]],
            "continuation_ids": [ids[8:]],
            "steps": 20,
            "settings": {"lr": 3e-3, "rank": 8},
        }
        result = server.train(job)
        assert result["state"] == "done", result
        trained = torch.tensor(server.scores(ids))
        assert trained[7:].sum() > served[7:].sum() + 10
        difference = (trained - torch.tensor(scores(attached, ids))).abs()
        assert difference.mean() < 0.1
        name = "model.layers.0.mlp.experts.gate_up_proj"
        assert not torch.equal(attached.get_parameter(name), disk.get_parameter(name))
