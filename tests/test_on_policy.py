"""A model's own attempts: drawn from its distribution, judged, and kept where they fail."""

import math
import random

import numpy as np
import pytest
import torch

from amygdala_lib import Readout, capture, extract, load_model
from amygdala_lib.errors import AmygdalaError, TrainingError
from amygdala_lib.training.examples import Example, from_text
from amygdala_lib.training.on_policy import (
    Attempt,
    TemperatureLoop,
    own_failures,
    readout_score,
    sample,
)

CONTEXT = "She waited at the window, and"


@pytest.fixture(scope="module")
def demo():
    return load_model("demo", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def context(demo):
    return tuple(demo.tokenizer(CONTEXT)["input_ids"])


def next_logits(lm, ids):
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()


# Sampling


def test_without_temperature_it_writes_what_full_passes_find_likeliest(causal_lm):
    ids = causal_lm.tokenizer("The bus has")["input_ids"]
    [attempt, same] = sample(causal_lm, ids, temperatures=[0], samples=2, max_new_tokens=6)
    written = list(ids)
    for token in attempt.continuation_ids:
        assert token == next_logits(causal_lm, written).argmax()
        written.append(token)
    assert attempt == same
    assert attempt.context_ids == tuple(ids)
    assert attempt.text == causal_lm.tokenizer.decode(
        attempt.continuation_ids, skip_special_tokens=True
    )


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_a_token_comes_as_often_as_the_whole_distribution_says(demo, context, temperature):
    n = 4000
    drawn = sample(demo, context, temperatures=[temperature], samples=n, max_new_tokens=1)
    counts = torch.zeros(demo.model.config.vocab_size, dtype=torch.float64)
    for attempt in drawn:
        counts[attempt.continuation_ids[0]] += 1
    expected = (next_logits(demo, context) / temperature).softmax(0)
    likeliest = expected.topk(12).indices
    spread = (expected * (1 - expected) / n).sqrt()[likeliest]
    assert ((counts / n - expected)[likeliest].abs() < 4 * spread + 1e-9).all()
    rest = 1 - expected[likeliest].sum()
    found = 1 - counts[likeliest].sum() / n
    assert abs(found - rest) < 4 * math.sqrt(rest * (1 - rest) / n), "no top-k, no top-p"


def test_later_tokens_follow_what_was_drawn_before(demo, context):
    attempts = sample(demo, context, temperatures=[0.05, 1.0], samples=3, max_new_tokens=8)
    assert [a.temperature for a in attempts] == [0.05] * 3 + [1.0] * 3
    cold, hot = attempts[0], attempts[3:]
    assert len({a.continuation_ids for a in hot}) == 3
    written = list(context)
    for token in cold.continuation_ids:
        chances = next_logits(demo, written).softmax(0)
        assert chances[token] > 0.6 * chances.max(), "so cold, it takes what is about likeliest"
        written.append(token)


def test_every_token_is_drawn_anew(lm):
    drawn = sample(lm, [1, 2], temperatures=[1e9], samples=200, max_new_tokens=2)
    pairs = [a.continuation_ids for a in drawn if len(a.continuation_ids) == 2]
    known = lm.model.config.vocab_size
    assert len(pairs) > 190
    assert sum(first == second for first, second in pairs) < 10, f"all {known} are as likely"
    assert len({first for first, _ in pairs}) > 100


def test_an_attempt_does_not_depend_on_what_else_is_sampled(demo, context):
    many = sample(demo, context, temperatures=[0.5, 1.0], samples=3, max_new_tokens=8, seed=7)
    alone = sample(demo, context, temperatures=[1.0], samples=2, max_new_tokens=8, seed=7)
    assert alone == many[3:5]
    other = sample(demo, context, temperatures=[1.0], samples=2, max_new_tokens=8, seed=8)
    assert other != alone


def test_global_random_state_is_neither_read_nor_moved(demo, context):
    first = sample(demo, context, samples=1, max_new_tokens=4)
    torch.manual_seed(99)
    random.seed(99)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert sample(demo, context, samples=1, max_new_tokens=4) == first
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_an_attempt_ends_with_the_end_token_if_it_comes(demo, context, monkeypatch):
    [stop] = demo.tokenizer(".")["input_ids"]
    monkeypatch.setattr(demo.model.generation_config, "eos_token_id", [0, stop])
    attempts = sample(demo, context, temperatures=[0.8], samples=8, max_new_tokens=24)
    ended = [a for a in attempts if len(a.continuation_ids) < 24]
    assert ended and len({len(a.continuation_ids) for a in ended}) > 1, "each at its own place"
    assert all(a.continuation_ids[-1] == stop for a in ended)
    assert all(stop not in a.continuation_ids[:-1] for a in attempts)


def test_hooks_of_the_caller_apply(demo, context):
    plain = sample(demo, context, temperatures=[0], samples=1, max_new_tokens=6)
    hook = demo.layers[3].register_forward_hook(lambda module, inputs, output: -output)
    try:
        assert sample(demo, context, temperatures=[0], samples=1, max_new_tokens=6) != plain
    finally:
        hook.remove()
    assert sample(demo, context, temperatures=[0], samples=1, max_new_tokens=6) == plain


def test_all_that_cannot_be_sampled_is_refused_at_once(demo):
    with pytest.raises(TrainingError) as refused:
        sample(demo, [], temperatures=[-1, math.nan], samples=0, max_new_tokens=0)
    for said in ("context 0 is empty", "temperatures are", "samples is 0", "max_new_tokens is 0"):
        assert said in str(refused.value)
    with pytest.raises(TrainingError) as refused:
        sample(demo, [1] * 2000 + [2048], temperatures=[1.0, 1.0], max_new_tokens=100)
    for said in ("2001 tokens: with 100 new", "[2048] are not in the vocabulary", "hold one twice"):
        assert said in str(refused.value)


def test_dropout_and_overflow_are_refused(model_folder):
    own = load_model(model_folder("gpt2"), device="cpu")
    own.model.train()
    with pytest.raises(TrainingError, match="in training mode"):
        sample(own, [1, 2], max_new_tokens=1)
    own.model.eval()
    with torch.no_grad():
        own.model.get_input_embeddings().weight[1] = math.nan
    with pytest.raises(TrainingError, match="not finite"):
        sample(own, [1, 2], max_new_tokens=1)


# Failures


def says_the(attempt):
    return " the" in attempt.text


def test_failures_are_what_the_judge_turned_down_after_their_context(demo):
    examples = [
        from_text(demo, CONTEXT, " the rain went on.", source="one"),
        from_text(demo, "He opened the letter", " and read it again."),
    ]
    options = {"temperatures": (0.7, 1.2), "samples": 3, "max_new_tokens": 8, "seed": 4}
    found = own_failures(demo, examples, says_the, progress=False, **options)
    expected, failed = [], {0.7: 0, 1.2: 0}
    for example in examples:
        for attempt in sample(demo, example.context_ids, **options):
            if not says_the(attempt):
                failed[attempt.temperature] += 1
                expected.append((example.context_ids, attempt.continuation_ids))
    assert 0 < len(expected) < 12, "the judge has to tell some from others"
    assert found.failed == failed
    assert found.attempts == {0.7: 6, 1.2: 6}
    assert found.rate == len(expected) / 12
    assert [(t.context_ids, t.rejected_ids) for t in found.triplets] == list(
        dict.fromkeys(expected)
    )
    chosen = {example.context_ids: example for example in examples}
    for triplet in found.triplets:
        origin = chosen[triplet.context_ids]
        assert triplet.continuation_ids == origin.continuation_ids
        assert triplet.source == origin.source


def test_a_failure_is_kept_once_and_never_if_it_is_the_chosen_answer(demo, context):
    options = {"temperatures": [0], "samples": 3, "max_new_tokens": 5}
    [greedy, *_] = sample(demo, context, **options)
    wanted = Example(context, (5, 6))
    found = own_failures(demo, [wanted], lambda a: False, progress=False, **options)
    assert found.failed == {0: 3}
    assert found.triplets == [Example(context, (5, 6), greedy.continuation_ids)]
    same = Example(context, greedy.continuation_ids)
    found = own_failures(demo, [same], lambda a: np.bool_(False), progress=False, **options)
    assert found.failed == {0: 3} and found.triplets == []


def test_a_judge_that_gives_a_score_is_told_to_compare_it(demo, context):
    with pytest.raises(TrainingError, match=r"said 0\.7 of"):
        own_failures(
            demo, [Example(context, (5,))], lambda a: 0.7, max_new_tokens=2, progress=False
        )


def test_examples_are_checked_before_anything_is_sampled(demo, context):
    def judge(attempt):
        pytest.fail("nothing should be judged")

    bad = [Example(context, (5,)), Example(context, ()), Example((), (1, 2))]
    with pytest.raises(TrainingError, match="example 1: the continuation is empty"):
        own_failures(demo, bad, judge, progress=False)
    with pytest.raises(TrainingError, match="context 1 is empty"):
        own_failures(demo, [bad[0], bad[2]], judge, progress=False)
    with pytest.raises(TrainingError, match="no examples"):
        own_failures(demo, [], judge)


def test_a_readout_scores_only_what_the_model_wrote(lm, corpus):
    acts = capture(lm, corpus, [1], progress=False)
    readout = Readout(extract(acts, corpus))
    ids, written = (5, 6, 7, 8), (9, 10, 11)
    score = readout_score(lm, readout, "proud", 1)
    with torch.no_grad():
        states = lm.model(
            input_ids=torch.tensor([ids + written]), output_hidden_states=True
        ).hidden_states[2][0, 4:]
    dirs = readout.directions
    row = dirs.index("proud")
    by_hand = (states @ dirs.vectors[1][row] - dirs.means[1][row]) / dirs.stds[1][row]
    assert math.isclose(score(Attempt(ids, written, 1.0, "")), by_hand.mean(), rel_tol=1e-4)
    for concept, layer in (("prod", 1), ("proud", 99)):
        with pytest.raises(AmygdalaError):
            readout_score(lm, readout, concept, layer)


# The closed loop


def rising(centre):
    """The share of failures of a model that writes worse the hotter it is."""
    return lambda t: 1 / (1 + math.exp(-12 * (t - centre)))


def run(loop, failure_rate, rounds=120):
    return [loop.update(failure_rate(loop.temperature)) for _ in range(rounds)]


@pytest.mark.parametrize("start", [0.3, 0.6, 0.85])
def test_a_mastered_context_is_sampled_just_as_hot_as_it_takes_to_fail(start):
    curve = rising(0.9)
    settled = run(TemperatureLoop(start), curve)[-20:]
    border = 0.9 - math.log(4) / 12  # where a fifth of the attempts fail
    assert all(border / 1.1 <= t <= border * 1.1 for t in settled)


@pytest.mark.parametrize("start", [0.3, 0.7])
def test_a_context_only_chance_gets_right_is_sampled_just_as_hot_as_it_takes_to_succeed(start):
    rate = rising(0.9)
    settled = run(TemperatureLoop(start), lambda t: 1 - rate(t))[-20:]
    border = 0.9 - math.log(4) / 12  # where a fifth of the attempts succeed
    assert all(border / 1.1 <= t <= border * 1.1 for t in settled)


def test_it_cools_as_ever_less_daring_is_needed_whatever_the_noise_of_counts():
    rng, loop, path = random.Random(0), TemperatureLoop(0.4), []
    for number in range(300):
        success = rising(1.2 - 0.6 * number / 300)(loop.temperature)
        failures = sum(rng.random() > success for _ in range(16))
        path.append(loop.update(failures / 16))
    early, late = sum(path[30:60]) / 30, sum(path[-30:]) / 30
    assert early == pytest.approx(1.11 - math.log(4) / 12, abs=0.1)
    assert late == pytest.approx(0.63 - math.log(4) / 12, abs=0.1)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_where_all_attempts_end_alike_it_heats_up_to_its_bound(rate):
    path = run(TemperatureLoop(0.5, highest=1.2, step=1.3), lambda t: rate, 8)
    assert path == sorted(path)
    assert path[0] == pytest.approx(0.65)
    assert path[-1] == 1.2


def test_at_the_edge_of_ability_it_cools_down_to_its_bound():
    path = run(TemperatureLoop(1.0, lowest=0.4), lambda t: 0.5, 20)
    assert path == sorted(path, reverse=True)
    assert path[0] == pytest.approx(1 / 1.1)
    assert path[-1] == 0.4


def test_settings_of_the_loop_that_do_not_go_together_are_named():
    with pytest.raises(TrainingError) as refused:
        TemperatureLoop(2.0, lowest=0, highest=1, step=1.0, edge=(0.8, 0.2))
    for said in ("ascend", "step is 1.0", "edge is (0.8, 0.2)"):
        assert said in str(refused.value)
    with pytest.raises(TrainingError, match="share of failures is 16"):
        TemperatureLoop().update(16)
