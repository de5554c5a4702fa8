"""Steering changes what it says where it says, and leaves the model as it was."""

import copy
import inspect
import math
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amygdala_lib import AmygdalaError, Directions, capture, extract, load_model, steer
from amygdala_lib.capture import residual_stream
from amygdala_lib.errors import SteeringError
from amygdala_lib.steering.interventions import clamp, project_out
from amygdala_lib.steering.positions import sentence_ends

TEXT = "The kettle took its time, and"
LONGER = "He read his own name. The bus has two doors, and a step!"
CLOSE = 2e-5
WRITING = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


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


@contextmanager
def edited(lm, layer, change):
    """The residual stream after a block, changed by hand."""

    def after(module, inputs, output):
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    hook = lm.layers[layer].register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def padded(lm, texts, side):
    """Ids and mask of a batch, and positions for a plain forward of models that take them."""
    rows = [ids_of(lm, text)[0].tolist() for text in texts]
    width = max(map(len, rows))
    gaps = [[0] * (width - len(row)) for row in rows]
    lay = (lambda gap, row: gap + row) if side == "left" else (lambda gap, row: row + gap)
    ids = torch.tensor([lay(gap, row) for gap, row in zip(gaps, rows, strict=True)])
    mask = torch.tensor([lay(gap, [1] * len(row)) for gap, row in zip(gaps, rows, strict=True)])
    return ids, mask


def forward(lm, ids, mask):
    """Logits of a whole forward, positions counted as `generate` does."""
    options = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(lm.model.forward).parameters:
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return lm.model(**options).logits


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


@pytest.mark.filterwarnings("ignore:the directions are of")
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


# Removing and holding


def residual(lm, ids, layer, *blocks):
    """The residual stream of a layer, as those after it read it, in float64."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block)
        stream = stack.enter_context(residual_stream(lm, [layer]))
        logits(lm, ids)
    return stream[layer].double()


def spanned(dirs, layer, concepts):
    """An orthonormal basis of the concepts' joint span, by QR in float64."""
    rows = torch.stack([dirs.vectors[layer][dirs.index(c)] for c in concepts]).double()
    return torch.linalg.qr(rows.T)[0].T


@pytest.mark.parametrize("layer", [-1, 1, 4])
def test_concepts_projected_out_are_gone_and_nothing_else_is(causal_lm, directions_of, layer):
    dirs, ids, gone = directions_of(causal_lm), ids_of(causal_lm), ["calm", "afraid"]
    before = residual(causal_lm, ids, layer)
    block = steer(causal_lm, dirs, gone, layers=[layer], mode="project_out")
    basis = spanned(dirs, layer, gone)

    def without(hidden):
        return (hidden.double() - hidden.double() @ basis.T @ basis).to(hidden.dtype)

    if layer == -1:
        hook = causal_lm.layers[0].register_forward_pre_hook(
            lambda module, inputs: (without(inputs[0]), *inputs[1:])
        )
        expected = logits(causal_lm, ids)
        hook.remove()
    else:
        after = residual(causal_lm, ids, layer, block)
        assert (after @ basis.T).abs().max() < 1e-5 * before.norm(dim=-1).max()
        assert distance(after, without(before)) < 1e-5
        block = steer(causal_lm, dirs, gone, layers=[layer], mode="project_out")
        with edited(causal_lm, layer, without):
            expected = logits(causal_lm, ids)
    with block:
        assert distance(logits(causal_lm, ids), expected) < CLOSE
    assert distance(logits(causal_lm, ids), expected) > 1e-3, "it has to do something"


def test_correlated_concepts_both_go_though_their_vectors_are_not_orthogonal(lm, directions_of):
    dirs = directions_of(lm)
    cosine = dirs.similarity(1)[dirs.index("calm"), dirs.index("proud")]
    assert abs(cosine) > 0.05, "or one after the other would do"
    after = residual(
        lm, ids_of(lm), 1, steer(lm, dirs, ["calm", "proud"], layers=[1], mode="project_out")
    )
    assert (after @ dirs.vectors[1].double().T)[..., [0, 2]].abs().max() < 1e-4


def test_the_same_direction_twice_is_removed_once(lm, directions_of):
    dirs = directions_of(lm)
    twice = {n: v[[0, 1, 0]] for n, v in dirs.vectors.items()}
    twins = replace(dirs, concepts=["calm", "afraid", "serene"], vectors=twice)
    with steer(lm, dirs, ["calm"], layers=[1], mode="project_out"):
        once = logits(lm, ids_of(lm))
    with steer(lm, twins, ["calm", "serene"], layers=[1], mode="project_out"):
        assert distance(logits(lm, ids_of(lm)), once) < CLOSE


def test_clamping_sets_all_projections_at_once(causal_lm, directions_of):
    dirs, ids = directions_of(causal_lm), ids_of(causal_lm)
    levels = {"calm": 0.5, "afraid": -0.25, "proud": 0.0}
    before = residual(causal_lm, ids, 1)
    after = residual(causal_lm, ids, 1, steer(causal_lm, dirs, levels, layers=[1], mode="clamp"))
    norm, vectors = dirs.residual_norms[1], dirs.vectors[1].double()
    expected = norm * torch.tensor([levels[c] for c in dirs.concepts]).double()
    assert torch.allclose(after @ vectors.T, expected, atol=1e-4 * norm)
    basis = spanned(dirs, 1, dirs.concepts)
    moved = after - before
    assert (moved - moved @ basis.T @ basis).abs().max() < 1e-4 * norm, "the smallest change"


def test_clamping_to_nothing_is_projecting_out(lm, directions_of):
    dirs, ids = directions_of(lm), ids_of(lm)
    with steer(lm, dirs, ["calm", "proud"], mode="project_out"):
        gone = logits(lm, ids)
    with steer(lm, dirs, {"calm": 0, "proud": 0.0}, mode="clamp"):
        assert distance(logits(lm, ids), gone) < CLOSE
    assert distance(logits(lm, ids), gone) > 1e-3, "at 0 a clamp does something"


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 5),
    levels=st.lists(st.floats(-3, 3), min_size=5, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_directions_can_be_held_at_any_levels(seed, n, levels, dtype):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(n, 40, generator=generator))
    hidden = 10 * torch.randn(2, 3, 40, generator=generator, dtype=dtype)
    held = clamp(vectors, torch.tensor(levels[:n]))(hidden)
    assert held.dtype == dtype
    assert torch.allclose(
        (held @ vectors.to(dtype).T).double(), torch.tensor(levels[:n]).double(), atol=1e-4
    )
    gone = project_out(vectors)(hidden)
    rest = torch.eye(40).double() - torch.linalg.pinv(vectors.double()) @ vectors.double()
    assert torch.allclose(gone.double(), hidden.double() @ rest, atol=1e-4)


def test_inner_blocks_change_what_outer_ones_left(lm, directions_of):
    dirs, ids = directions_of(lm), ids_of(lm)
    calm, norm = dirs.vectors[1][dirs.index("calm")].double(), dirs.residual_norms[1]

    def level(*blocks):
        return residual(lm, ids, 1, *blocks) @ calm / norm

    def added():
        return steer(lm, dirs, {"calm": 0.5}, layers=[1])

    def removed():
        return steer(lm, dirs, ["calm"], layers=[1], mode="project_out")

    assert level(added(), removed()).abs().max() < 1e-4
    assert torch.allclose(level(removed(), added()), torch.tensor(0.5).double(), atol=1e-4)


@pytest.mark.filterwarnings("ignore:the directions are of")
@pytest.mark.parametrize("mode", ["project_out", "clamp"])
def test_removing_in_a_narrow_dtype_is_as_exact_as_it_can_be(model_folder, directions_of, lm, mode):
    narrow = load_model(model_folder("qwen3_5"), device="cpu", dtype=torch.bfloat16)
    dirs = directions_of(lm)
    strengths = ["calm"] if mode == "project_out" else {"calm": 0.0}
    with (
        steer(narrow, dirs, strengths, layers=[1], mode=mode),
        residual_stream(narrow, [1]) as stream,
    ):
        assert logits(narrow, ids_of(narrow)).dtype == torch.bfloat16
    left = stream[1].double() @ dirs.vectors[1][dirs.index("calm")].double()
    assert left.abs().max() < 2**-8 * stream[1].double().norm(dim=-1).max()


# Where it does it


def whole(lm, dirs, sequences, mask, where):
    """A full forward with 0.7 of afraid added by hand at layer 1 where the mask says."""
    push = 0.7 * dirs.residual_norms[1] * dirs.vectors[1][dirs.index("afraid")]
    with edited(lm, 1, lambda hidden: hidden + push * where[..., None]):
        return forward(lm, sequences, mask)


def write(lm, ids, mask, **options):
    """What is written, and the logits of every step."""
    out = lm.model.generate(
        ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True,
        **WRITING | options,
    )  # fmt: skip
    n_new = out.sequences.shape[1] - ids.shape[1]
    mask = torch.cat([mask, torch.ones(len(mask), n_new, dtype=torch.long)], 1)
    return out, mask


def same_steps(out, expected, start):
    return all(
        distance(made, expected[:, start - 1 + step]) < 1e-4 for step, made in enumerate(out.logits)
    )


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cached", "uncached"])
def test_generated_tokens_alone_are_steered(causal_lm, directions_of, options):
    dirs = directions_of(causal_lm)
    ids, mask = padded(causal_lm, [TEXT, "Rain."], "left")
    with steer(causal_lm, dirs, {"afraid": 0.7}, layers=[1], tokens="generated"):
        out, longer = write(causal_lm, ids, mask, **options)
    where = torch.arange(longer.shape[1])[None] >= ids.shape[1]
    expected = whole(causal_lm, dirs, out.sequences, longer, where)
    assert same_steps(out, expected, ids.shape[1])
    assert not same_steps(out, forward(causal_lm, out.sequences, longer), ids.shape[1])
    # The first new token is read off the prompt's last position, which is not steered.
    assert torch.equal(out.logits[0], write(causal_lm, ids, mask, **options)[0].logits[0])


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_prompt_that_comes_in_chunks_is_not_taken_for_generated(loaded, directions_of, size):
    lm = loaded("qwen3")
    dirs, ids = directions_of(lm), ids_of(lm, LONGER)
    with steer(lm, dirs, {"afraid": 0.7}, layers=[1], tokens="generated"):
        at_once = lm.model.generate(ids, **WRITING)
        chunked = lm.model.generate(ids, prefill_chunk_size=size, **WRITING)
    assert torch.equal(chunked, at_once)
    assert not torch.equal(chunked, lm.model.generate(ids, **WRITING)), "it has to do something"


def test_speculation_that_takes_tokens_back_changes_nothing(loaded, directions_of):
    lm = loaded("qwen3")
    dirs, ids = directions_of(lm), ids_of(lm, LONGER)
    with steer(lm, dirs, {"afraid": 0.7}, layers=[1], tokens="generated"):
        expected = lm.model.generate(ids, **WRITING)
        assert torch.equal(lm.model.generate(ids, prompt_lookup_num_tokens=3, **WRITING), expected)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cached", "uncached"])
def test_beams_are_scored_as_steered(loaded, directions_of, options):
    lm = loaded("qwen3")
    dirs, (ids, mask) = directions_of(lm), padded(lm, [TEXT, "Rain."], "left")
    with steer(lm, dirs, {"afraid": 0.7}, layers=[1], tokens="generated"):
        out, longer = write(lm, ids, mask, num_beams=3, length_penalty=0.0, output_scores=True,
                            **options)  # fmt: skip
    where = torch.arange(longer.shape[1])[None] >= ids.shape[1]
    likelihood = whole(lm, dirs, out.sequences, longer, where).log_softmax(-1)
    new = out.sequences[:, ids.shape[1] :]
    scores = likelihood[:, ids.shape[1] - 1 : -1].gather(-1, new[..., None]).sum((1, 2))
    assert torch.allclose(out.sequences_scores, scores, atol=1e-3)


def test_a_dialogue_that_goes_on_from_a_cache_counts_all_before_as_prompt(loaded, directions_of):
    lm = loaded("qwen3")
    dirs = directions_of(lm)
    first = lm.model.generate(ids_of(lm), return_dict_in_generate=True, **WRITING)
    ids = torch.cat([first.sequences, ids_of(lm, " Rain.")], 1)
    mask = torch.ones_like(ids)
    with steer(lm, dirs, {"afraid": 0.7}, layers=[1], tokens="generated"):
        out, longer = write(lm, ids, mask, past_key_values=copy.deepcopy(first.past_key_values))
        anew = lm.model.generate(ids, attention_mask=mask, **WRITING)
        # Of what is in the cache, only the mask tells then.
        cache, added = copy.deepcopy(first.past_key_values), ids[:, first.sequences.shape[1] - 1 :]
        short = lm.model.generate(added, attention_mask=mask, past_key_values=cache, **WRITING)
    where = torch.arange(longer.shape[1])[None] >= ids.shape[1]
    assert same_steps(out, whole(lm, dirs, out.sequences, longer, where), ids.shape[1])
    assert torch.equal(out.sequences, anew)
    assert torch.equal(short[:, added.shape[1] :], anew[:, ids.shape[1] :])


def test_a_prompt_given_as_embeddings_is_not_steered_as_generated(loaded, directions_of):
    lm = loaded("qwen3")
    dirs, ids = directions_of(lm), ids_of(lm)
    with steer(lm, dirs, {"afraid": 0.7}, layers=[1], tokens="generated"):
        expected = lm.model.generate(ids, **WRITING)[:, ids.shape[1] :]
        embedded = lm.model.get_input_embeddings()(ids)
        assert torch.equal(lm.model.generate(inputs_embeds=embedded, **WRITING), expected)


def test_outside_of_generate_nothing_is_generated(causal_lm, directions_of):
    dirs, ids = directions_of(causal_lm), ids_of(causal_lm)
    plain = logits(causal_lm, ids)
    with steer(causal_lm, dirs, {"afraid": 0.7}, tokens="generated"):
        assert torch.equal(logits(causal_lm, ids), plain)
        causal_lm.model.generate(ids, **WRITING)
        assert torch.equal(logits(causal_lm, ids), plain)


@pytest.mark.parametrize("chosen", [slice(2, 5), slice(3, None)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_slice_means_the_same_in_every_batch(causal_lm, directions_of, chosen, side):
    dirs, texts = directions_of(causal_lm), [LONGER, "Rain.", TEXT]
    ids, mask = padded(causal_lm, texts, side)
    with steer(causal_lm, dirs, {"afraid": 0.7}, layers=[1], tokens=chosen):
        together = forward(causal_lm, ids, mask)
    for row, text in enumerate(texts):
        alone = ids_of(causal_lm, text)
        where = torch.zeros(alone.shape[1])
        where[chosen] = 1
        expected = whole(causal_lm, dirs, alone, torch.ones_like(alone), where)
        assert distance(together[row, mask[row].bool()], expected[0]) < 1e-4


def test_a_slice_beyond_a_text_changes_no_bit(lm, directions_of):
    dirs, ids = directions_of(lm), ids_of(lm)
    plain = logits(lm, ids)
    with steer(lm, dirs, {"afraid": 0.7}, tokens=slice(90, 99)):
        assert torch.equal(logits(lm, ids), plain)
    with steer(lm, dirs, {"afraid": 0.7}, tokens=slice(None, 1)):
        first = logits(lm, ids)
    with steer(lm, dirs, {"afraid": 0.7}, tokens=slice(0, 1)):
        assert torch.equal(logits(lm, ids), first)
    assert not torch.equal(first, plain), "it has to do something"


def test_a_slice_reaches_into_what_is_generated(causal_lm, directions_of):
    dirs = directions_of(causal_lm)
    ids, mask = padded(causal_lm, [TEXT, "Rain."], "left")
    with steer(causal_lm, dirs, {"afraid": 0.7}, layers=[1], tokens=slice(2, 11)):
        out, longer = write(causal_lm, ids, mask)
        places = longer.cumsum(1) - 1
        where = (places >= 2) & (places < 11) & longer.bool()
    expected = whole(causal_lm, dirs, out.sequences, longer, where)
    assert same_steps(out, expected, ids.shape[1])


def test_the_ends_of_sentences_are_steered_in_prompt_and_continuation(causal_lm, directions_of):
    dirs, tokenizer = directions_of(causal_lm), causal_lm.tokenizer
    ids, mask = padded(causal_lm, [LONGER, "Rain."], "left")
    with steer(causal_lm, dirs, {"afraid": 0.7}, layers=[1], tokens="sentence_end"):
        out, longer = write(causal_lm, ids, mask)
    spelt = [[tokenizer.decode([i]) for i in row] for row in out.sequences.tolist()]
    where = torch.tensor(
        [[t.rstrip()[-1:] in tuple(".!?") and t != "" for t in row] for row in spelt]
    )
    assert where[:, : ids.shape[1]].sum(1).tolist() == [2, 1]
    expected = whole(causal_lm, dirs, out.sequences, longer, where & longer.bool())
    assert same_steps(out, expected, ids.shape[1])


def test_a_token_ends_a_sentence_by_its_own_text(loaded):
    tokenizer = loaded("qwen3").tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    marks = ['."', "!”", "?)", "…", "。", ' ."', "...", ',"', "e.g", "3.5", ".x", '"']
    tokenizer.add_tokens(marks)
    size = len(tokenizer) + 5  # embeddings are often longer than the vocabulary
    ends = sentence_ends(tokenizer, size)
    found = [ends[tokenizer.convert_tokens_to_ids(mark)].item() for mark in marks]
    assert found == [True] * 7 + [False] * 5
    assert len(ends) == size and not ends[-5:].any()


def test_blocks_with_tokens_of_their_own_nest(lm, directions_of):
    dirs, ids = directions_of(lm), ids_of(lm)
    with (
        steer(lm, dirs, {"calm": 0.5}, layers=[1], tokens=slice(0, 3)),
        steer(lm, dirs, {"calm": 0.5}, layers=[1], tokens=slice(3, None)),
    ):
        halves = logits(lm, ids)
    with steer(lm, dirs, {"calm": 0.5}, layers=[1]):
        assert distance(halves, logits(lm, ids)) < CLOSE


def test_removing_can_be_limited_to_tokens_as_adding_can(lm, directions_of):
    dirs, ids = directions_of(lm), ids_of(lm)
    calm = dirs.vectors[1][dirs.index("calm")].double()
    before = residual(lm, ids, 1)
    block = steer(lm, dirs, ["calm"], layers=[1], mode="project_out", tokens=slice(2, 4))
    after = residual(lm, ids, 1, block)
    assert (after[0, 2:4] @ calm).abs().max() < 1e-4
    assert torch.equal(after[0, :2], before[0, :2]) and torch.equal(after[0, 4:], before[0, 4:])


def test_part_of_a_model_does_not_tell_its_tokens(lm, directions_of):
    ids = ids_of(lm)
    with (
        steer(lm, directions_of(lm), {"calm": 0.5}, tokens=slice(2, 4)),
        pytest.raises(SteeringError, match="call the model itself"),
    ):
        lm.model.model(input_ids=ids)


def test_embeddings_do_not_tell_where_sentences_end(lm, directions_of):
    dirs, ids = directions_of(lm), ids_of(lm)
    embedded = lm.model.get_input_embeddings()(ids)
    before, hooks = logits(lm, ids), n_hooks(lm)
    with (
        pytest.raises(SteeringError, match="pass input_ids"),
        steer(lm, dirs, {"calm": 0.5}, tokens="sentence_end"),
    ):
        lm.model(inputs_embeds=embedded)
    assert n_hooks(lm) == hooks
    assert torch.equal(logits(lm, ids), before)


# What it leaves


def test_nothing_is_left_on_the_model_whatever_the_order_blocks_end_in(lm, directions_of):
    dirs, ids, hooks = directions_of(lm), ids_of(lm), n_hooks(lm)
    expected = []
    for concept in ("calm", "proud"):
        with steer(lm, dirs, {concept: 1.0}, tokens="generated"):
            expected.append(lm.model.generate(ids, **WRITING))
    first = steer(lm, dirs, {"calm": 1.0}, tokens="generated")
    second = steer(lm, dirs, {"proud": 1.0}, tokens="generated")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(lm.model.generate(ids, **WRITING), expected[1])
    second.__exit__(None, None, None)
    assert "generate" not in vars(lm.model)
    assert n_hooks(lm) == hooks
    assert not torch.equal(*expected), "or either would pass for the other"


def test_a_generate_of_the_users_own_is_called_and_left(lm, directions_of, monkeypatch):
    calls = []

    def own(*inputs, **keywords):
        calls.append(keywords)
        return type(lm.model).generate(lm.model, *inputs, **keywords)

    monkeypatch.setattr(lm.model, "generate", own, raising=False)
    with steer(lm, directions_of(lm), {"calm": 1.0}, tokens="generated"):
        lm.model.generate(ids_of(lm), **WRITING)
    assert len(calls) == 1
    assert lm.model.generate is own


@pytest.mark.parametrize("tokens", ["generated", "sentence_end", slice(1, 3)])
def test_a_block_that_changes_nothing_sets_nothing(lm, directions_of, tokens):
    hooks = n_hooks(lm)
    with steer(lm, directions_of(lm), {"calm": 0.0}, tokens=tokens):
        assert n_hooks(lm) == hooks
        assert "generate" not in vars(lm.model)


@pytest.mark.parametrize("tokens", ["generated", "sentence_end", slice(1, 3)])
def test_a_forward_that_fails_does_not_spoil_the_next(lm, directions_of, tokens):
    dirs, ids = directions_of(lm), ids_of(lm, LONGER)
    hooks, before = n_hooks(lm), logits(lm, ids)
    with steer(lm, dirs, {"calm": 1.0}, layers=[1], tokens=tokens):
        steered = logits(lm, ids)
        with pytest.raises(IndexError):
            lm.model(input_ids=torch.tensor([[10**6]]))
        with pytest.raises(SteeringError):
            lm.model.model(input_ids=ids)
        with pytest.raises(IndexError):
            lm.model.generate(torch.tensor([[10**6]]), **WRITING)
        assert torch.equal(logits(lm, ids), steered)
    assert n_hooks(lm) == hooks
    assert torch.equal(logits(lm, ids), before)


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
    wrong = {"clam": 1.0, "xyz": 1.0, "calm": math.nan, "afraid": math.inf, "proud": "0.5"}
    message = refusal(lm, directions_of(lm), wrong, layers=[3, 1, 2], tokens="some")
    assert "no direction for clam (did you mean calm?), xyz: there are calm, afraid" in message
    assert "no tokens 'some': choose 'all', 'generated', 'sentence_end' or a slice" in message
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
    assert "directions of 32 do not fit a residual stream of 64, that of qwen3_5" in message
    assert "made for another-9b" in message
    assert "no layers [9]" in message


def test_a_refusal_can_be_caught_with_all_others(lm, directions_of):
    with pytest.raises(AmygdalaError), steer(lm, directions_of(lm), {"clam": 1.0}):
        pass


@pytest.mark.parametrize(
    ("strengths", "mode", "expected"),
    [
        ({"calm": 1.0}, "project_out", "project_out takes names and no strengths: say ['calm']"),
        (["calm"], "add", "add needs a strength for each concept, as in {'calm': 0.5}"),
        (["calm"], "clamp", "clamp needs a strength for each concept"),
        ("calm", "project_out", "strengths is 'calm': give concepts as in ['calm']"),
        (0.5, "add", "strengths is 0.5: give concepts as in {'calm': 0.5}"),
        ({"calm": 1.0}, "ablate", "no mode 'ablate': choose one of add, project_out, clamp"),
        (["clam"], "project_out", "no direction for clam (did you mean calm?)"),
        ({"calm": math.nan}, "clamp", "strengths must be finite numbers: {'calm': nan}"),
    ],
)
def test_concepts_that_do_not_fit_the_mode_are_refused(
    lm, directions_of, strengths, mode, expected
):
    assert expected in refusal(lm, directions_of(lm), strengths, mode=mode)


def test_of_many_concepts_those_with_near_names_are_named(lm, directions_of):
    dirs = directions_of(lm)
    names = [f"state {i:02}" for i in range(60)]
    many = replace(dirs, concepts=names, vectors={n: v[[0] * 60] for n, v in dirs.vectors.items()})
    message = refusal(lm, many, {"stat 41": 1.0, "joy": 1.0})
    assert "stat 41 (did you mean state 41" in message
    assert "state 19 and 40 more" in message and "state 20" not in message


def test_one_direction_cannot_be_held_at_two_levels(lm, directions_of):
    dirs = directions_of(lm)
    nearly = {}
    for layer, rows in dirs.vectors.items():
        twin = torch.nn.functional.normalize(rows[:1] + 1e-3 * rows[1:2])
        nearly[layer] = torch.cat([rows, twin])
    twins = replace(dirs, concepts=[*dirs.concepts, "serene"], vectors=nearly)
    message = refusal(lm, twins, {"calm": 0.5, "serene": -0.5}, layers=[1, 4], mode="clamp")
    assert "calm, serene are so alike at layers [1, 4]" in message
    with steer(lm, twins, {"calm": 0.5, "serene": 0.5}, mode="clamp"):
        pass


@pytest.mark.parametrize(
    "tokens", [slice(-2, None), slice(0, 8, 2), slice(0.5, 3), "last", 3, None, ["all"]]
)
def test_tokens_that_cannot_be_told_are_refused(lm, directions_of, tokens):
    refusal(lm, directions_of(lm), {"calm": 1.0}, tokens=tokens)


def test_a_bare_model_has_no_tokenizer_to_see_sentences_with(lm, directions_of):
    message = refusal(lm.model, directions_of(lm), {"calm": 1.0}, tokens="sentence_end")
    assert "pass what amy.load_model gives" in message


def test_a_model_that_does_not_write_has_nothing_generated(loaded, directions_of):
    message = refusal(
        loaded("bert"), directions_of(loaded("bert")), {"calm": 1.0}, tokens="generated"
    )
    assert "BertModel generates nothing" in message


# Directions of another model


def test_directions_of_a_model_of_another_name_are_refused_unless_insisted(lm, directions_of):
    dirs = directions_of(lm)
    theirs = replace(dirs, provenance=dirs.provenance | {"model": "other/9b", "revision": "1"})
    message = refusal(lm, theirs, {"calm": 1.0})
    assert "made for other/9b, this model is qwen3_5" in message
    assert "allow_other_model=True" in message
    with steer(lm, dirs, {"calm": 1.0}):
        expected = logits(lm, ids_of(lm))
    with steer(lm, theirs, {"calm": 1.0}, allow_other_model=True):
        assert torch.equal(logits(lm, ids_of(lm)), expected)


def test_directions_of_a_deeper_model_are_refused(lm, directions_of):
    dirs = directions_of(lm)
    deeper = replace(dirs, provenance=dirs.provenance | {"model": "deep", "n_layers": 64})
    message = refusal(lm, deeper, {"calm": 1.0}, allow_other_model=True)
    assert "of a model of 64 layers do not fit the 5 of qwen3_5: they were made for deep" in message


def test_a_hub_id_and_a_folder_of_that_name_are_one_model(lm, directions_of):
    dirs = directions_of(lm)
    from_hub = replace(dirs, provenance=dirs.provenance | {"model": "Qwen/Qwen3_5"})
    with steer(lm, from_hub, {"calm": 1.0}):
        pass


def test_the_same_weights_by_another_name_are_the_same_model(lm, directions_of):
    with steer(replace(lm, name="a copy"), directions_of(lm), {"calm": 1.0}):
        pass


def test_other_weights_of_the_same_name_are_steered_with_a_warning(lm, directions_of):
    trained = replace(lm, revision="0123456789abcdef")
    with (
        pytest.warns(UserWarning, match="at 0123456789abcdef: other weights") as warned,
        steer(trained, directions_of(lm), {"calm": 1.0}),
    ):
        pass
    assert warned[0].filename == __file__


def test_directions_that_do_not_say_whose_they_are_are_taken(lm, directions_of):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with steer(lm, replace(directions_of(lm), provenance={}), {"calm": 1.0}):
            pass


# Beside the steering-vectors library


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("where", [slice(None), slice(2, 5)])
def test_steering_vectors_gives_the_same_logits(loaded, directions_of, family, where):
    library = pytest.importorskip("steering_vectors", reason="see requirements-nodeps.txt")
    lm = loaded(family)
    dirs, ids = directions_of(lm), ids_of(lm, LONGER)
    pushes = {n: dirs.residual_norms[n] * dirs.vectors[n][dirs.index("proud")] for n in (1, 4)}
    vector = library.SteeringVector(pushes)
    with vector.apply(lm.model, multiplier=0.6, min_token_index=None, token_indices=where):
        theirs = logits(lm, ids)
    with steer(lm, dirs, {"proud": 0.6}, layers=[1, 4], tokens=where):
        assert distance(logits(lm, ids), theirs) < CLOSE
    assert distance(logits(lm, ids), theirs) > 1e-3, "it has to do something"
