"""Heads and neurons are found in every family; what they write adds up to the layer's output."""

import pytest
import torch

from amygdala_lib import capture
from amygdala_lib.components import find_output, layers_with
from amygdala_lib.errors import ModelError

KINDS = {
    "qwen3_5": ["GatedDeltaNet"] * 3 + ["attention", "GatedDeltaNet"],
    "qwen3_next": ["GatedDeltaNet"] * 3 + ["attention", "GatedDeltaNet"],
}


def test_every_layer_has_heads_of_the_right_kind_and_number(any_lm):
    family = any_lm.name.split("/")[-1]
    for layer in range(5):
        output = find_output(any_lm, layer, "attn_heads")
        expected = KINDS.get(family, ["attention"] * 5)[layer]
        assert (output.kind, output.parts) == (expected, 4)
        assert output.weight.shape[0] == 64 and output.weight.dtype == torch.float32
        assert output.weight.shape[1] % output.parts == 0


@pytest.mark.parametrize("site", ["attn_heads", "mlp_neurons"])
def test_what_is_captured_times_the_weight_is_what_the_map_puts_out(any_lm, site):
    """The exact output of the map, read by a hook of our own, for a single text."""
    layers = layers_with(any_lm, range(5), site)
    if site == "mlp_neurons" and "qwen3_next" in any_lm.name:
        assert layers == []  # routed experts
        return
    assert layers == list(range(5))
    found = capture(any_lm, ["Rain on the roof."], layers, pool="tokens", site=site, cache=None,
                    progress=False)  # fmt: skip
    assert found.site == site
    for layer in layers:
        output, seen = find_output(any_lm, layer, site), []
        hook = output.module.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))
        try:
            capture(any_lm, ["Rain on the roof."], [4], cache=None, progress=False)
        finally:
            hook.remove()
        bias = 0 if output.module.bias is None else output.module.bias
        written = found[layer][0] @ output.weight.T + bias
        # Special tokens are run and not read: the text's own are in the middle.
        expected = seen[0][0]
        start = 1 if len(expected) > len(written) else 0
        assert torch.allclose(written, expected[start : start + len(written)], atol=1e-5)


def test_head_outputs_pool_as_the_residual_stream_does(lm, texts):
    tokens = capture(lm, texts[:6], [1, 3], pool="tokens", site="attn_heads", progress=False)
    for pool in ("mean", "last"):
        pooled = capture(lm, texts[:6], [1, 3], pool=pool, site="attn_heads", progress=False)
        for layer in (1, 3):
            rows = [t.mean(0) if pool == "mean" else t[-1] for t in tokens[layer]]
            assert torch.allclose(pooled[layer], torch.stack(rows), atol=1e-5)


def test_sites_do_not_share_the_cache(lm, texts):
    stream = capture(lm, texts[:3], [1], progress=False)
    heads = capture(lm, texts[:3], [1], site="attn_heads", progress=False)
    again = capture(lm, texts[:3], [1], site="attn_heads", progress=False)
    assert stream[1].shape == (3, 64) and heads[1].shape == (3, 64)
    assert not torch.allclose(stream[1], heads[1])
    assert again.reused == 3 and torch.equal(again[1], heads[1])


def test_layers_without_the_site_are_named(loaded):
    experts = loaded("qwen3_next")
    with pytest.raises(ModelError, match=r"layers \[1, 3\] of .* have no mlp_neurons"):
        capture(experts, ["Rain."], [1, 3], site="mlp_neurons", progress=False)
    with pytest.raises(ModelError, match=r"layers \[-1\] of .* have no attn_heads"):
        capture(experts, ["Rain."], [-1, 3], site="attn_heads", progress=False)
    with pytest.raises(ModelError, match="no site 'heads': choose one of residual, attn_heads"):
        capture(experts, ["Rain."], site="heads", progress=False)


def test_activations_of_some_texts_keep_their_order(lm, texts):
    acts = capture(lm, texts[:5], [1], pool="tokens", progress=False)
    chosen = acts.select({texts[3], texts[1]})
    assert chosen.texts == [texts[1], texts[3]]
    assert torch.equal(chosen[1][1], acts[1][3]) and chosen.tokens[0] == acts.tokens[1]
    with pytest.raises(ModelError, match="1 texts were not captured .'Snow.'"):
        acts.select([texts[0], "Snow."])
