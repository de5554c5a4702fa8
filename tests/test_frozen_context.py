"""A frozen context changes nothing about what is predicted, and only what learns from it."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next

from amygdala_lib.errors import ModelError, TrainingError
from amygdala_lib.training.frozen_context import (
    example_losses,
    frozen_context_loss,
    token_log_probabilities,
)
from amygdala_lib.training.objectives import DPO, SFT, SequenceLogProbs

GENERATOR = torch.Generator().manual_seed(0)


def some_ids(n):
    return torch.randint(1, 300, (n,), generator=GENERATOR).tolist()


# (context, continuation) lengths: one token each way, shorter than the convolution, over a chunk
LENGTHS = [(7, 5), (1, 3), (70, 1), (2, 9), (0, 4), (67, 12)]
EXAMPLES = [(some_ids(n), some_ids(m)) for n, m in LENGTHS]


@contextmanager
def trainable(lm):
    """The shared model with gradients, and without them again afterwards."""
    try:
        lm.model.requires_grad_(True)
        yield lm.model
    finally:
        lm.model.requires_grad_(False)
        lm.model.zero_grad(set_to_none=True)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def cut(tensor, prefix):
    return torch.cat([tensor[:, :prefix].detach(), tensor[:, prefix:]], 1)


# What mixes tokens reads the context by these; query projections only speak for their own position.
READ_BY_OTHERS = (
    *("k_proj", "v_proj", "k_norm", "c_attn", "query_key_value"),
    *("in_proj_qkv", "in_proj_qkvz", "in_proj_ba", "in_proj_a", "in_proj_b"),
)


@contextmanager
def context_detached(model, prefix, monkeypatch):
    """A whole forward in which nothing at the first `prefix` positions has a gradient to give."""

    def hook(module, inputs, output):
        return cut(output, prefix)

    def recurrence(query, key, value, g, beta, **options):
        query, key, value, g, beta = (cut(x, prefix) for x in (query, key, value, g, beta))
        options |= {"initial_state": None, "output_final_state": False}
        return modeling_qwen3_5.torch_recurrent_gated_delta_rule(
            query, key, value, g, beta, **options
        )

    hooks = [
        module.register_forward_hook(hook)
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in READ_BY_OTHERS
    ]
    try:
        with monkeypatch.context() as patch:
            for modeling in (modeling_qwen3_5, modeling_qwen3_next):
                patch.setattr(modeling, "torch_chunk_gated_delta_rule", recurrence)
            yield
    finally:
        for each in hooks:
            each.remove()


def whole_log_probs(model, context, continuation):
    """Of the continuation, from one forward over everything, without a cache."""
    ids = torch.tensor([[*context, *continuation]])
    logits = model(input_ids=ids, use_cache=False).logits.float()
    predicted = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return predicted[max(len(context) - 1, 0) :]


def differences(found, expected):
    """Per parameter, relative to its gradient, or to a hundredth of all if that is larger.

    Decays (A_log, dt_bias) have gradients of a millionth of the rest, sums of parts that cancel:
    there float32 has four digits left, whichever way the recurrence is computed.
    """
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    return {
        name: ((found[name] - g).norm() / max(g.norm(), 0.01 * whole)).item()
        for name, g in expected.items()
    }


# The same numbers as a whole pass


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"{n}+{m}" for n, m in LENGTHS])
def test_log_probabilities_are_those_of_a_whole_pass(causal_lm, example):
    with torch.no_grad():
        found, mask = token_log_probabilities(causal_lm, *example)
        expected = whole_log_probs(causal_lm.model, *example)
    assert mask.sum() == len(example[1]) - (not example[0])
    assert torch.allclose(found[mask], expected, atol=1e-5, rtol=1e-5)
    assert (found[~mask] == 0).all()


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"{n}+{m}" for n, m in LENGTHS])
def test_gradients_are_those_of_a_whole_pass_with_the_context_detached(
    causal_lm, example, monkeypatch
):
    context, continuation = example
    with trainable(causal_lm) as model:
        frozen_context_loss(causal_lm, context, continuation).backward()
        found = gradients(model)
        model.zero_grad()
        with context_detached(model, max(len(context) - 1, 0), monkeypatch):
            (-whole_log_probs(model, context, continuation).mean()).backward()
        expected = gradients(model)
    off = differences(found, expected)
    assert set(found) == set(expected)
    assert max(off.values()) < 1e-4, sorted(off.items(), key=lambda item: -item[1])[:5]


def test_a_context_with_gradient_would_give_other_gradients(causal_lm):
    """The reference detaches something: or the test above could not fail."""
    context, continuation = EXAMPLES[0]
    with trainable(causal_lm) as model:
        frozen_context_loss(causal_lm, context, continuation).backward()
        found = gradients(model)
        model.zero_grad()
        (-whole_log_probs(model, context, continuation).mean()).backward()
        off = differences(found, gradients(model))
    assert sum(difference > 0.01 for difference in off.values()) > len(off) / 2


def test_the_first_continuation_token_has_its_gradient(causal_lm):
    context, continuation = EXAMPLES[0]
    with trainable(causal_lm) as model:
        log_probs, _ = token_log_probabilities(causal_lm, context, continuation)
        log_probs[0, 0].backward()
        found = gradients(model)
        last = [
            name for name in found if f".{len(causal_lm.layers) - 1}." in name and "mlp" in name
        ]
    assert last and all(found[name].norm() > 0 for name in last)


def test_frozen_keys_still_shape_how_queries_learn(loaded):
    """The gradient of the query projection depends on what the context says."""
    lm = loaded("qwen3")
    continuation, found = some_ids(4), []
    with trainable(lm) as model:
        for context in ([5, 6, 7, 8, 9], [9, 8, 7, 6, 9]):
            model.zero_grad()
            frozen_context_loss(lm, context, continuation).backward()
            found.append(model.model.layers[2].self_attn.q_proj.weight.grad.clone())
    assert (found[0] - found[1]).norm() > 0.05 * found[0].norm()


# Batches


def test_a_batch_of_different_lengths_is_its_rows_one_by_one(causal_lm):
    contexts, continuations = zip(*EXAMPLES, strict=True)
    with trainable(causal_lm) as model:
        log_probs, mask = token_log_probabilities(causal_lm, contexts, continuations)
        SequenceLogProbs.of(log_probs, mask).mean.sum().backward()
        together = gradients(model)
        model.zero_grad()
        for row, row_mask, (context, continuation) in zip(log_probs, mask, EXAMPLES, strict=True):
            alone, alone_mask = token_log_probabilities(causal_lm, context, continuation)
            assert torch.allclose(row[row_mask], alone[alone_mask], atol=1e-5, rtol=1e-5)
            SequenceLogProbs.of(alone, alone_mask).mean.sum().backward()
        off = differences(together, gradients(model))
    assert max(off.values()) < 1e-4, sorted(off.items(), key=lambda item: -item[1])[:5]


@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(1, 300), max_size=9),
            st.lists(st.integers(1, 300), min_size=2, max_size=6),
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=20)
def test_whatever_else_is_in_the_batch_a_row_stays_what_it_is(loaded, rows):
    lm = loaded("qwen3_5")
    contexts, continuations = zip(*rows, strict=True)
    with torch.no_grad():
        found, mask = token_log_probabilities(lm, contexts, continuations)
        expected = whole_log_probs(lm.model, contexts[-1], continuations[-1])
    assert torch.allclose(found[-1][mask[-1]], expected, atol=2e-5, rtol=1e-5)


def test_a_context_shared_by_several_continuations_runs_once(causal_lm):
    context = some_ids(20)
    others = [some_ids(20), some_ids(6)]
    continuations = [some_ids(4), some_ids(2), some_ids(7), some_ids(3)]
    contexts = [context, others[0], context, others[1]]
    widths = []
    hook = causal_lm.model.register_forward_pre_hook(
        lambda module, inputs, options: widths.append(tuple(options["input_ids"].shape)),
        with_kwargs=True,
    )
    with torch.no_grad():
        found, mask = token_log_probabilities(causal_lm, contexts, continuations)
        hook.remove()
        assert widths == [(3, 19), (4, 7)]
        for i, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
            alone, _ = token_log_probabilities(causal_lm, context, continuation)
            assert torch.allclose(found[i][mask[i]], alone[0], atol=1e-5, rtol=1e-5)


def test_a_single_token_never_runs_alone_on_the_cache(lm):
    """Kernels for decoding write the cached state in place, and the fast ones have no backward."""
    widths = []
    hook = lm.model.register_forward_pre_hook(
        lambda module, inputs, options: widths.append(tuple(options["input_ids"].shape)),
        with_kwargs=True,
    )
    with torch.no_grad():
        token_log_probabilities(lm, some_ids(5), some_ids(1))
    hook.remove()
    assert widths == [(1, 4), (1, 2)]


def test_positions_after_the_end_stay_within_what_the_model_has(loaded):
    lm = loaded("gpt2")  # 256 positions learnt, and no more
    contexts, continuations = [some_ids(252), some_ids(3)], [some_ids(4), some_ids(40)]
    with torch.no_grad():
        found, mask = token_log_probabilities(lm, contexts, continuations)
        expected = whole_log_probs(lm.model, contexts[0], continuations[0])
    assert torch.allclose(found[0][mask[0]], expected, atol=1e-5, rtol=1e-5)


def test_sliding_windows_see_through_the_boundary():
    config = hf.Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    torch.manual_seed(2)
    model = hf.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        found, mask = token_log_probabilities(model, *zip(*EXAMPLES, strict=True))
        for row, row_mask, example in zip(found, mask, EXAMPLES, strict=True):
            expected = whole_log_probs(model, *example)
            assert torch.allclose(row[row_mask], expected, atol=1e-5, rtol=1e-5)


# The loss


def test_a_loss_is_the_mean_over_examples_whatever_their_length(lm):
    contexts, continuations = zip(*EXAMPLES, strict=True)
    with torch.no_grad():
        together = frozen_context_loss(lm, contexts, continuations)
        apart = [frozen_context_loss(lm, *example) for example in EXAMPLES]
        tensors = frozen_context_loss(
            lm.model, [torch.tensor(c) for c in contexts], [torch.tensor(c) for c in continuations]
        )
    assert together.shape == ()
    assert torch.allclose(together, torch.stack(apart).mean(), atol=1e-5)
    assert torch.allclose(together, tensors, atol=1e-6)


def test_examples_without_a_rejected_answer_count_by_their_likelihood_among_preferences(lm):
    context, chosen, rejected = some_ids(6), some_ids(4), some_ids(5)
    reference = torch.tensor([[-3.0, -4.0], [0.0, 0.0]])
    with torch.no_grad():
        losses, report = example_losses(
            lm, [context, context], [chosen, chosen], [rejected, None], DPO(), reference
        )
        pair = frozen_context_loss(
            lm,
            context,
            chosen,
            objective="dpo",
            rejected_ids=rejected,
            reference=reference[:1],
        )
        plain = frozen_context_loss(lm, context, chosen)
    assert torch.allclose(losses, torch.stack([pair, plain]), atol=1e-5)
    assert report["margin"].shape == (1,)


def test_reference_totals_summed_before_step_one_make_every_margin_nothing(lm):
    context, chosen, rejected = some_ids(6), some_ids(4), some_ids(5)
    with torch.no_grad():
        scores = SequenceLogProbs.of(
            *token_log_probabilities(lm, [context, context], [chosen, rejected])
        )
        losses, report = example_losses(
            lm, [context], [chosen], [rejected], DPO(), scores.total[None]
        )
    assert torch.allclose(report["margin"], torch.zeros(1), atol=1e-5)
    assert torch.allclose(losses, torch.tensor([2.0]).log(), atol=1e-5)


def test_low_precision_models_give_float32_log_probabilities(model_folder):
    from amygdala_lib import load_model

    narrow = load_model(model_folder("qwen3_5"), device="cpu", dtype=torch.bfloat16)
    contexts, continuations = zip(*EXAMPLES, strict=True)
    with trainable(narrow) as model:
        log_probs, mask = token_log_probabilities(narrow, contexts, continuations)
        (-SequenceLogProbs.of(log_probs, mask).mean.mean()).backward()
        assert log_probs.dtype == torch.float32
        assert all(g.isfinite().all() for g in gradients(model).values())


# What it leaves, what it refuses


def test_nothing_of_the_model_is_changed_and_no_random_number_is_drawn(causal_lm):
    def hooks():  # transformers leaves some of its own where hidden states were asked for
        return [list(module._forward_hooks) for module in causal_lm.layers.modules()]

    state, before = torch.random.get_rng_state(), hooks()
    frozen_context_loss(causal_lm, *EXAMPLES[0])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(p.requires_grad or p.grad is not None for p in causal_lm.model.parameters())
    assert hooks() == before


def test_everything_wrong_with_a_batch_is_named_at_once(lm):
    contexts = [[1, 2], [], [1, 999], [3] * 250]
    continuations = [[], [4], [-5, 4], [4] * 20]
    with pytest.raises(TrainingError) as refused:
        frozen_context_loss(lm, contexts, continuations)
    message = str(refused.value)
    assert "row 0 has an empty continuation" in message
    assert "row 1 has one token and no context" in message
    assert "row 2 has token ids [-5, 999], the model 0 to" in message
    assert "row 3 has 270 tokens, the model reads 256" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "dop"}, "no objective 'dop': choose one of sft, dpo, dpop, orpo"),
        ({"objective": "orpo"}, "ORPO needs rejected_ids"),
        ({"objective": "dpo", "rejected_ids": [4]}, r"DPO needs a reference of shape \(1, 2\)"),
        (
            {"objective": "dpo", "rejected_ids": [4], "reference": torch.zeros(2, 2)},
            r"not \(2, 2\)",
        ),
        ({"objective": "orpo", "rejected_ids": [[4], [5]]}, "1 continuations, 2 rejected"),
    ],
)
def test_a_lacking_comparison_is_refused(lm, options, said):
    with pytest.raises(TrainingError, match=said):
        frozen_context_loss(lm, [1, 2], [3], **options)


def test_contexts_and_continuations_must_pair_up(lm):
    with pytest.raises(TrainingError, match="2 contexts, 1 continuations"):
        token_log_probabilities(lm, [[1, 2], [3]], [[4]])


def test_gradient_checkpointing_would_drop_the_context_and_is_refused(model_folder):
    from amygdala_lib import load_model

    lm = load_model(model_folder("qwen3"), device="cpu")
    lm.model.gradient_checkpointing_enable()
    frozen_context_loss(lm, *EXAMPLES[0])  # in evaluation mode it is not used
    lm.model.train()
    with pytest.raises(TrainingError, match="gradient_checkpointing_disable"):
        frozen_context_loss(lm, *EXAMPLES[0])


def test_a_model_that_only_reads_is_refused(loaded):
    with pytest.raises(ModelError, match="BertModel does not write"):
        frozen_context_loss(loaded("bert"), *EXAMPLES[0])


def test_a_model_without_a_cache_to_continue_from_is_refused(loaded, monkeypatch):
    lm = loaded("llama")
    forward = lm.model.forward

    def cacheless(*inputs, **options):
        return forward(*inputs, **options | {"use_cache": False})

    monkeypatch.setattr(lm.model, "forward", cacheless)
    with pytest.raises(ModelError, match="no cache to continue"):
        frozen_context_loss(lm, *EXAMPLES[0])


def test_sft_is_what_is_meant_by_default(lm):
    with torch.no_grad():
        by_name = frozen_context_loss(lm, *EXAMPLES[0])
        by_object = frozen_context_loss(lm, *EXAMPLES[0], objective=SFT())
    assert torch.equal(by_name, by_object)
