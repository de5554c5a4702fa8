"""Steering adds what it says where it says, and leaves the model as it was."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amygdala_lib import AmygdalaError, Directions, capture, extract, load_model, steer
from amygdala_lib.capture import residual_stream
from amygdala_lib.errors import SteeringError

TEXT = "The kettle took its time, and"
CLOSE = 2e-5


@pytest.fixture(scope="module")
def directions_of(loaded, corpus):
    """Directions of a family at the embeddings, a GatedDeltaNet or other layer, and the last."""
    found = {}

    def make(lm):
        if lm.name not in found:
            acts = capture(lm, corpus, [-1, 1, 4], pool="mean", progress=False)
            found[lm.name] = extract(acts, corpus)
        return found[lm.name]

    return make


def logits(lm, ids):
    with torch.no_grad():
        return lm.model(input_ids=ids).logits


def ids_of(lm, text=TEXT):
    return lm.tokenizer(text, return_tensors="pt")["input_ids"]


def n_hooks(lm):
    modules = list(lm.model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# What it adds


@pytest.mark.parametrize("layer", [-1, 1, 4])
def test_steering_is_adding_by_hand_at_that_layer(causal_lm, directions_of, layer):
    dirs, ids = directions_of(causal_lm), ids_of(causal_lm)
    push = dirs.residual_norms[layer] * (
        0.5 * dirs.vectors[layer][dirs.index("calm")] - 2 * dirs.vectors[layer][dirs.index("proud")]
    )

    def add_before(module, inputs):
        return (inputs[0] + push, *inputs[1:])

    def add_after(module, inputs, output):
        if isinstance(output, tuple):
            return (output[0] + push, *output[1:])
        return output + push

    if layer == -1:
        hook = causal_lm.layers[0].register_forward_pre_hook(add_before)
    else:
        hook = causal_lm.layers[layer].register_forward_hook(add_after)
    expected = logits(causal_lm, ids)
    hook.remove()
    with steer(causal_lm, dirs, {"calm": 0.5, "afraid": 0.0, "proud": -2}, layers=[layer]):
        steered = logits(causal_lm, ids)
    assert distance(steered, expected) < CLOSE
    assert distance(steered, logits(causal_lm, ids)) > 1e-3, "it has to do something"


def test_strength_is_in_units_of_the_mean_residual_norm(causal_lm, directions_of):
    dirs, ids = directions_of(causal_lm), ids_of(causal_lm)
    with torch.no_grad(), residual_stream(causal_lm, [1]) as stream:
        causal_lm.model(input_ids=ids)
    before = stream[1]
    with (
        torch.no_grad(),
        steer(causal_lm, dirs, {"calm": 0.25}, layers=[1]),
        residual_stream(causal_lm, [1]) as stream,
    ):
        causal_lm.model(input_ids=ids)
    moved = (stream[1] - before).norm(dim=-1)
    assert torch.allclose(moved, torch.tensor(0.25 * dirs.residual_norms[1]), rtol=1e-4)


def test_all_layers_of_the_directions_are_steered_unless_some_are_named(lm, directions_of):
    dirs, ids = directions_of(lm), ids_of(lm)
    with steer(lm, dirs, {"calm": 0.5}):
        everywhere = logits(lm, ids)
    with (
        steer(lm, dirs, {"calm": 0.5}, layers=[-1]),
        steer(lm, dirs, {"calm": 0.5}, layers=[1]),
        steer(lm, dirs, {"calm": 0.5}, layers=[4]),
    ):
        assert distance(logits(lm, ids), everywhere) < CLOSE


@given(first=st.floats(-2, 2), second=st.floats(-2, 2))
def test_nested_blocks_add_up(loaded, directions_of, first, second):
    lm = loaded("qwen3")
    dirs, ids = directions_of(lm), ids_of(lm, "Rain.")
    with steer(lm, dirs, {"calm": first + second}, layers=[1]):
        together = logits(lm, ids)
    with steer(lm, dirs, {"calm": first}, layers=[1]):
        with steer(lm, dirs, {"calm": second}, layers=[1]):
            assert distance(logits(lm, ids), together) < 1e-4
        inner_left = logits(lm, ids)
    with steer(lm, dirs, {"calm": first}, layers=[1]):
        assert torch.equal(logits(lm, ids), inner_left)


@pytest.mark.parametrize("strengths", [{}, {"calm": 0.0}, {"calm": 0, "proud": -0.0}])
def test_no_strength_changes_no_bit(causal_lm, directions_of, strengths):
    ids = ids_of(causal_lm)
    dirs, before, hooks = directions_of(causal_lm), logits(causal_lm, ids), n_hooks(causal_lm)
    with steer(causal_lm, dirs, strengths):
        assert n_hooks(causal_lm) == hooks
        assert torch.equal(logits(causal_lm, ids), before)


def test_every_step_of_generation_is_steered_as_a_whole_forward_would_be(causal_lm, directions_of):
    dirs, ids = directions_of(causal_lm), ids_of(causal_lm)
    options = {"do_sample": False, "use_cache": True, "max_new_tokens": 8, "eos_token_id": None}
    mask = torch.ones_like(ids)
    with steer(causal_lm, dirs, {"afraid": 0.7}):
        out = causal_lm.model.generate(
            ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
        )
        whole = logits(causal_lm, out.sequences)
    plain = causal_lm.model.generate(ids, attention_mask=mask, **options)
    assert len(out.logits) == 8
    for step, made in enumerate(out.logits):
        position = ids.shape[1] - 1 + step
        assert distance(made[0], whole[0, position]) < 1e-4
        assert out.sequences[0, position + 1] == made[0].argmax()
    assert not torch.equal(out.sequences, plain), "it has to do something"


def test_a_model_in_another_dtype_stays_in_it(model_folder, directions_of, lm):
    narrow = load_model(model_folder("qwen3_5"), device="cpu", dtype=torch.bfloat16)
    with steer(narrow, directions_of(lm), {"calm": 1.0}):
        assert logits(narrow, ids_of(narrow)).dtype == torch.bfloat16


def test_a_bare_hugging_face_model_can_be_steered(lm, directions_of):
    dirs, ids = directions_of(lm), ids_of(lm)
    with steer(lm, dirs, {"calm": 0.5}):
        expected = logits(lm, ids)
    with steer(lm.model, dirs, {"calm": 0.5}):
        assert torch.equal(logits(lm, ids), expected)


def test_gradients_flow_through_a_steered_forward(lm, directions_of):
    embedded = lm.model.get_input_embeddings()(ids_of(lm)).requires_grad_()
    with steer(lm, directions_of(lm), {"calm": 0.5}):
        lm.model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0


# What it leaves


def test_the_model_is_as_before_when_the_block_is_left(causal_lm, directions_of):
    dirs, ids = directions_of(causal_lm), ids_of(causal_lm)
    before, hooks = logits(causal_lm, ids), n_hooks(causal_lm)
    with steer(causal_lm, dirs, {"calm": 1.0}):
        assert n_hooks(causal_lm) == hooks + 3
    assert n_hooks(causal_lm) == hooks
    assert torch.equal(logits(causal_lm, ids), before)


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_no_hook_outlives_an_exception(lm, directions_of, interruption):
    before, hooks = logits(lm, ids_of(lm)), n_hooks(lm)
    with (
        pytest.raises(interruption),
        steer(lm, directions_of(lm), {"calm": 1.0}),
        steer(lm, directions_of(lm), {"proud": 1}),
    ):
        raise interruption
    assert n_hooks(lm) == hooks
    assert torch.equal(logits(lm, ids_of(lm)), before)


def test_a_forward_that_fails_within_the_block_leaves_no_hook(lm, directions_of):
    hooks = n_hooks(lm)
    with pytest.raises(IndexError), steer(lm, directions_of(lm), {"calm": 1.0}):
        lm.model(input_ids=torch.tensor([[10**6]]))
    assert n_hooks(lm) == hooks


# What it refuses


def refusal(lm, *args, **options):
    hooks = n_hooks(lm)
    with pytest.raises(SteeringError) as refused, steer(lm, *args, **options):
        pytest.fail("a refused block must not be entered")
    assert n_hooks(lm) == hooks
    return str(refused.value)


def test_everything_that_is_wrong_is_named_at_once(lm, directions_of):
    wrong = {"clam": 1.0, "prod": 1.0, "calm": math.nan, "afraid": math.inf, "proud": "0.5"}
    message = refusal(lm, directions_of(lm), wrong, layers=[3, 1, 2])
    assert "no direction for clam, prod: there are calm, afraid, proud" in message
    assert "{'calm': nan, 'afraid': inf, 'proud': '0.5'}" in message
    assert "no directions at layers [2, 3]: there are [-1, 1, 4]" in message


def test_every_layer_the_model_does_not_have_is_named(lm, directions_of):
    message = refusal(lm, directions_of(lm), {"calm": 1.0}, layers=[1, 7, 9, -2])
    assert "no layers [-2, 7, 9]: this model has 0 to 4" in message


@pytest.mark.parametrize("layers", [[], 1, [1.5]])
def test_layers_that_are_no_list_of_layers_are_refused(lm, directions_of, layers):
    refusal(lm, directions_of(lm), {"calm": 1.0}, layers=layers)


def test_directions_of_another_model_are_refused(lm):
    other = Directions(
        concepts=["calm"],
        vectors={9: torch.eye(32)[:1]},
        residual_norms={9: 1.0},
        means={9: torch.zeros(1)},
        stds={9: torch.ones(1)},
        provenance={"model": "another-9b"},
    )
    message = refusal(lm, other, {"calm": 1.0})
    assert "directions of 32 do not fit a residual stream of 64" in message
    assert "made for another-9b" in message
    assert "no layers [9]" in message


def test_a_refusal_can_be_caught_with_all_others(lm, directions_of):
    with pytest.raises(AmygdalaError), steer(lm, directions_of(lm), {"clam": 1.0}):
        pass
