"""Objectives are their formulas, in float32, with finite gradients wherever a model may go."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from amygdala_lib.errors import TrainingError
from amygdala_lib.training.objectives import (
    DPO,
    DPOP,
    OBJECTIVES,
    ORPO,
    SFT,
    SequenceLogProbs,
    as_objective,
    log1mexp,
)

TOKENS = torch.tensor([1, 2, 5, 30])


# The formulas as TRL's trainers have them, and the papers; on float64, unguarded.


def trl_dpo(chosen, rejected, reference, beta, label_smoothing):
    logits = (chosen - rejected) - (reference[:, 0] - reference[:, 1])
    return (
        -F.logsigmoid(beta * logits) * (1 - label_smoothing)
        - F.logsigmoid(-beta * logits) * label_smoothing
    )


def smaug_dpop(chosen, rejected, reference, beta, penalty):
    ratio_chosen, ratio_rejected = chosen - reference[:, 0], rejected - reference[:, 1]
    lost = torch.maximum(torch.zeros_like(chosen), reference[:, 0] - chosen)
    return -torch.log(torch.sigmoid(beta * (ratio_chosen - ratio_rejected - penalty * lost)))


def trl_orpo(mean_chosen, mean_rejected, beta):
    log_odds = (mean_chosen - mean_rejected) - (
        torch.log1p(-torch.exp(mean_chosen)) - torch.log1p(-torch.exp(mean_rejected))
    )
    return -mean_chosen - beta * F.logsigmoid(log_odds)


totals = st.lists(st.floats(-60, -0.05), min_size=4, max_size=4)


def both(values):
    """The same numbers as float32 and as float64 leaves."""
    narrow = torch.tensor(values, dtype=torch.float32)
    return narrow.clone().requires_grad_(), narrow.double().requires_grad_()


def same(found, expected, leaves, wide_leaves):
    """Losses and gradients agree to what float32 keeps of numbers of this size."""
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=2e-5)
    for leaf, wide in zip(
        torch.autograd.grad(found.sum(), leaves),
        torch.autograd.grad(expected.sum(), wide_leaves),
        strict=True,
    ):
        assert torch.allclose(leaf.double(), wide, rtol=1e-4, atol=1e-5)


@given(chosen=totals)
def test_sft_is_the_mean_negative_log_likelihood_per_token(chosen):
    narrow, wide = both(chosen)
    losses, report = SFT()(SequenceLogProbs(narrow, TOKENS))
    same(losses, -wide / TOKENS, [narrow], [wide])
    assert report == {}


@given(
    chosen=totals,
    rejected=totals,
    reference=st.tuples(totals, totals),
    beta=st.floats(0.01, 1),
    smoothing=st.sampled_from([0.0, 0.1, 0.4]),
)
def test_dpo_is_trls(chosen, rejected, reference, beta, smoothing):
    (w, w64), (l, l64) = both(chosen), both(rejected)  # noqa: E741
    reference = torch.tensor(reference).T
    losses, report = DPO(beta, smoothing)(
        SequenceLogProbs(w, TOKENS), SequenceLogProbs(l, TOKENS), reference
    )
    same(losses, trl_dpo(w64, l64, reference.double(), beta, smoothing), [w, l], [w64, l64])
    assert torch.allclose(report["reward_chosen"], beta * (w - reference[:, 0]))
    assert torch.allclose(report["reward_rejected"], beta * (l - reference[:, 1]))
    assert torch.equal(report["margin"], report["reward_chosen"] - report["reward_rejected"])
    assert torch.equal(report["accuracy"], (report["margin"] > 0).float())
    assert not any(values.requires_grad for values in report.values())


@given(chosen=totals, reference=st.tuples(totals, totals), penalty=st.sampled_from([0.0, 5.0]))
def test_dpop_is_the_papers(chosen, reference, penalty):
    (w, w64), (l, l64) = both(chosen), both([-3.0, -20.0, -7.5, -50.0])  # noqa: E741
    reference = torch.tensor(reference).T
    losses, _ = DPOP(0.1, penalty=penalty)(
        SequenceLogProbs(w, TOKENS), SequenceLogProbs(l, TOKENS), reference
    )
    expected = smaug_dpop(w64, l64, reference.double(), 0.1, penalty)
    touching = (w == reference[:, 0]).any()  # at the kink either slope is right
    if expected.isfinite().all() and not touching:
        same(losses, expected, [w, l], [w64, l64])


@given(chosen=totals, rejected=totals, weight=st.floats(0, 2))
def test_orpo_is_trls_over_the_continuation(chosen, rejected, weight):
    (w, w64), (l, l64) = both(chosen), both(rejected)  # noqa: E741
    losses, report = ORPO(weight)(SequenceLogProbs(w, TOKENS), SequenceLogProbs(l, TOKENS))
    same(losses, trl_orpo(w64 / TOKENS, l64 / TOKENS, weight), [w, l], [w64, l64])
    assert torch.allclose(report["margin"], weight * (w - l) / TOKENS, atol=1e-5)


# Where a model may go


EXTREMES = [0.0, -1e-8, -1e-4, -0.6931472, -1.0, -90.0, -1e4]
EVERY_PAIR = list(itertools.product(EXTREMES, EXTREMES))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_are_finite_at_certainty_and_at_impossibility(name):
    w, l = (torch.tensor(side, requires_grad=True) for side in zip(*EVERY_PAIR, strict=True))  # noqa: E741
    tokens = torch.ones(len(EVERY_PAIR), dtype=torch.long)
    for reference in (0.0, -1e4):
        losses, report = OBJECTIVES[name]()(
            SequenceLogProbs(w, tokens),
            SequenceLogProbs(l, tokens),
            torch.full((len(EVERY_PAIR), 2), reference),
        )
        gradients = torch.autograd.grad(losses.sum(), [w, l], allow_unused=True)
        assert losses.isfinite().all()
        assert all(g is None or g.isfinite().all() for g in gradients)
        assert all(values.isfinite().all() for values in report.values())
        assert gradients[0].abs().sum() > 0


def test_the_formula_unguarded_is_not_finite_there():
    """What the test above is about."""
    w = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    loss = trl_orpo(w, torch.tensor([-1.0], dtype=torch.float64), 0.1)
    assert not torch.autograd.grad(loss.sum(), w)[0].isfinite().all()


@given(st.floats(-80, -(2.0**-16), width=32))
def test_odds_are_right_to_the_last_digits_from_near_certainty_to_next_to_nothing(log_prob):
    chosen = SequenceLogProbs(torch.tensor([log_prob]), torch.tensor([1]))
    even = SequenceLogProbs(torch.tensor([-math.log(2)]), torch.tensor([1]))  # log odds of 0
    _, report = ORPO()(chosen, even)
    expected = log_prob - math.log(-math.expm1(log_prob))
    assert math.isclose(report["log_odds_ratio"].item(), expected, rel_tol=2e-6, abs_tol=2e-6)


@given(st.floats(-1e4, -(2.0**-120), width=32))
@example(-(2.0**-120))
@example(-(2.0**-30))
def test_log_of_one_minus_a_probability_has_its_value_and_slope_wherever_there_is_one(x):
    leaf = torch.tensor([x], requires_grad=True)
    value = log1mexp(leaf)
    value.backward()
    assert math.isclose(value.item(), math.log(-math.expm1(x)), rel_tol=2e-6, abs_tol=1e-37)
    assert math.isclose(leaf.grad.item(), math.exp(x) / math.expm1(x), rel_tol=2e-6, abs_tol=1e-37)


# What they are for


def test_dpo_falls_while_the_chosen_answer_grows_less_likely_and_dpop_does_not():
    reference = torch.tensor([[-10.0, -10.0]])
    tokens = torch.tensor([5])

    def loss(objective, chosen, rejected):
        return objective(
            SequenceLogProbs(torch.tensor([chosen]), tokens),
            SequenceLogProbs(torch.tensor([rejected]), tokens),
            reference,
        )

    before, _ = loss(DPO(), -10.0, -10.0)
    after, report = loss(DPO(), -14.0, -30.0)
    assert after < before and report["reward_chosen"] < 0 < report["margin"]
    assert loss(DPOP(), -14.0, -30.0)[0] > loss(DPOP(), -10.0, -10.0)[0]
    assert torch.equal(loss(DPOP(), -9.0, -30.0)[0], loss(DPO(), -9.0, -30.0)[0])


def test_label_smoothing_asks_for_a_margin_and_no_more():
    """A share e of wrong labels makes logit(1 - e) the best margin, instead of infinity."""
    margins = torch.linspace(0, 8, 8001)
    totals = SequenceLogProbs(margins, torch.ones(8001))
    none = SequenceLogProbs(torch.zeros(8001), torch.ones(8001))
    losses, _ = DPO(1.0, 0.1)(totals, none, torch.zeros(8001, 2))
    assert margins[losses.argmin()].item() == pytest.approx(math.log(0.9 / 0.1), abs=0.002)
    assert DPO(1.0)(totals, none, torch.zeros(8001, 2))[0].argmin() == 8000


# Rows


def test_rows_are_summed_over_what_is_masked_in_whatever_stands_elsewhere():
    log_probs = torch.tensor([[-1.0, -2.0, math.nan], [-4.0, -math.inf, -6.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    found = SequenceLogProbs.of(log_probs.bfloat16(), mask)
    assert found.total.dtype == torch.float32
    assert found.total.tolist() == [-3.0, -10.0]
    assert found.mean.tolist() == [-1.5, -5.0]
    assert found[[1]].total.tolist() == [-10.0]


def test_rows_with_nothing_to_learn_are_refused():
    mask = torch.tensor([[True, False], [False, False], [False, True], [False, False]])
    with pytest.raises(TrainingError, match=r"rows \[1, 3\] have no token"):
        SequenceLogProbs.of(torch.zeros(4, 2), mask)


# Settings


def test_an_objective_goes_by_its_name_or_by_itself():
    assert as_objective("dpop") == DPOP()
    assert as_objective(ORPO(0.5)) == ORPO(0.5)
    with pytest.raises(TrainingError, match="no objective 'ppo': choose one of sft, dpo"):
        as_objective("ppo")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DPO(0.0), "beta is 0.0: it has to be above 0"),
        (lambda: DPO(math.inf), "beta is inf"),
        (lambda: DPO(0.1, 0.5), "label_smoothing is 0.5: it has to be from 0 to below 0.5"),
        (lambda: DPO(-1.0, 1.0), "beta is -1.0(.|\n)*label_smoothing is 1.0"),
        (lambda: DPOP(penalty=-1), "penalty is -1: it has to be 0 or more"),
        (lambda: ORPO(-0.1), "weight is -0.1: it has to be 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(make, said):
    with pytest.raises(TrainingError, match=said):
        make()
