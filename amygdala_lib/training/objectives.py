"""What a step makes likelier, and against what: SFT, DPO, DPOP and ORPO on log-probabilities.

All read the log-probabilities of continuations, in float32, and give one loss per example. A batch
is their mean, so an example counts the same however long it is and whatever stands beside it, and a
batch in parts has the gradient of the whole.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import TrainingError

_NEAREST_TO_ONE = -1e-6
"""Mean log-probabilities above this count as this, where the odds of certainty would be infinite"""


@dataclass(frozen=True, eq=False)
class SequenceLogProbs:
    """Log-probabilities of whole continuations: `total` sums over the `tokens` of each row."""

    total: Float[Tensor, " rows"]
    tokens: Int[Tensor, " rows"]

    @classmethod
    def of(
        cls, log_probs: Float[Tensor, "rows tokens"], mask: Bool[Tensor, "rows tokens"]
    ) -> SequenceLogProbs:
        """Sum each row over the tokens in `mask`, in float32.

        Raises TrainingError naming the rows that have none: nothing could be learnt from them, and
        their mean would be NaN.
        """
        tokens = mask.sum(1)
        if empty := (tokens == 0).nonzero().flatten().tolist():
            raise TrainingError(
                f"rows {empty} have no token with a log-probability: leave them out, or give them "
                "a longer continuation"
            )
        return cls(log_probs.float().masked_fill(~mask, 0).sum(1), tokens)

    @property
    def mean(self) -> Float[Tensor, " rows"]:
        return self.total / self.tokens

    def __getitem__(self, rows: slice | Tensor | list[int]) -> SequenceLogProbs:
        return SequenceLogProbs(self.total[rows], self.tokens[rows])


Losses = tuple[Float[Tensor, " rows"], dict[str, Float[Tensor, " rows"]]]
"""A loss per row, with its gradient, and what else there is to report of each row, without."""


class Objective(ABC):
    """One loss per example. `needs_rejected` and `needs_reference` say what it compares with."""

    needs_rejected: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self,
        chosen: SequenceLogProbs,
        rejected: SequenceLogProbs | None = None,
        reference: Float[Tensor, "rows 2"] | None = None,
    ) -> Losses:
        """Losses and figures to report, one of each per row.

        `reference` holds the totals of chosen and rejected under the weights before step one.
        """


@dataclass(frozen=True)
class SFT(Objective):
    """Supervised fine-tuning: the mean negative log-likelihood of the continuation's tokens."""

    needs_rejected: ClassVar[bool] = False

    def __call__(
        self,
        chosen: SequenceLogProbs,
        rejected: SequenceLogProbs | None = None,
        reference: Float[Tensor, "rows 2"] | None = None,
    ) -> Losses:
        return -chosen.mean, {}


@dataclass(frozen=True)
class DPO(Objective):
    """Direct preference optimisation (arXiv 2305.18290, eq. 7), conservative with label smoothing.

    With D = (log pi_w - log ref_w) - (log pi_l - log ref_l), summed over tokens,
    L = -(1 - e) logsigmoid(beta D) - e logsigmoid(-beta D), e being the share of pairs thought to
    be labelled the wrong way round. L can fall while the chosen answer grows less likely: watch
    `reward_chosen`, or use DPOP. Raises TrainingError for a setting out of range.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        smoothing = self.label_smoothing
        _check(
            beta=(self.beta, self.beta > 0, "above 0"),
            label_smoothing=(smoothing, 0 <= smoothing < 0.5, "from 0 to below 0.5"),
        )

    def __call__(
        self,
        chosen: SequenceLogProbs,
        rejected: SequenceLogProbs | None = None,
        reference: Float[Tensor, "rows 2"] | None = None,
    ) -> Losses:
        gain_chosen, gain_rejected = (
            chosen.total - reference[:, 0],
            rejected.total - reference[:, 1],
        )
        losses = self._loss(self.beta * (gain_chosen - gain_rejected))
        return losses, _rewards(self.beta * gain_chosen, self.beta * gain_rejected)

    def _loss(self, margin: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        likely = (1 - self.label_smoothing) * F.logsigmoid(margin)
        return -likely - self.label_smoothing * F.logsigmoid(-margin)


@dataclass(frozen=True)
class DPOP(DPO):
    """DPO-Positive (Smaug, arXiv 2402.13228, eq. 3): DPO that keeps the chosen answer likely.

    D of DPO less `penalty` times max(0, log ref_w - log pi_w), within the sigmoid. The paper finds
    penalties of 5 to 500 alike, and takes 50.
    """

    penalty: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(penalty=(self.penalty, self.penalty >= 0, "0 or more"))

    def __call__(
        self,
        chosen: SequenceLogProbs,
        rejected: SequenceLogProbs | None = None,
        reference: Float[Tensor, "rows 2"] | None = None,
    ) -> Losses:
        gain_chosen, gain_rejected = (
            chosen.total - reference[:, 0],
            rejected.total - reference[:, 1],
        )
        lost = (-gain_chosen).clamp(min=0)
        losses = self._loss(self.beta * (gain_chosen - gain_rejected - self.penalty * lost))
        return losses, _rewards(self.beta * gain_chosen, self.beta * gain_rejected)


@dataclass(frozen=True)
class ORPO(Objective):
    """Odds-ratio preference optimisation (arXiv 2403.07691, eqs. 4 to 7): SFT and a preference.

    With a the mean log-probability per token and odds(a) = e^a / (1 - e^a),
    L = -a_w - weight logsigmoid(log odds(a_w) - log odds(a_l)). No reference is needed. TRL's first
    term covers the prompt too; here the context has no gradient, so it is the continuation only.
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        _check(weight=(self.weight, self.weight >= 0, "0 or more"))

    def __call__(
        self,
        chosen: SequenceLogProbs,
        rejected: SequenceLogProbs | None = None,
        reference: Float[Tensor, "rows 2"] | None = None,
    ) -> Losses:
        ratio = _log_odds(chosen.mean) - _log_odds(rejected.mean)
        losses = -chosen.mean - self.weight * F.logsigmoid(ratio)
        rewards = _rewards(self.weight * chosen.mean, self.weight * rejected.mean)
        return losses, rewards | {"log_odds_ratio": ratio.detach()}


OBJECTIVES: dict[str, type[Objective]] = {"sft": SFT, "dpo": DPO, "dpop": DPOP, "orpo": ORPO}


def as_objective(objective: str | Objective) -> Objective:
    """An objective by name with its default settings, or the one given.

    Raises TrainingError for a name that is none.
    """
    if isinstance(objective, Objective):
        return objective
    if objective not in OBJECTIVES:
        raise TrainingError(f"no objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]()


def _rewards(chosen: Tensor, rejected: Tensor) -> dict[str, Float[Tensor, " rows"]]:
    chosen, rejected = chosen.detach(), rejected.detach()
    margin = chosen - rejected
    return {
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "margin": margin,
        "accuracy": (margin > 0).float(),
    }


def _log_odds(log_prob: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    return log_prob - log1mexp(log_prob.clamp(max=_NEAREST_TO_ONE))


def log1mexp(x: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """log(1 - e^x) for x < 0, by whichever form does not cancel.

    The second form sees no x near 0, where it is infinite: `where` multiplies the gradient of the
    form it does not take by 0, and 0 times infinity is NaN.
    """
    near = x > -math.log(2)
    by_expm1 = torch.log(-torch.expm1(x))
    by_exp = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, by_expm1, by_exp)


def _check(**settings: tuple[float, bool, str]) -> None:
    wrong = [
        f"{name} is {value}: it has to be {extent}"
        for name, (value, fits, extent) in settings.items()
        if not (fits and math.isfinite(value))
    ]
    if wrong:
        raise TrainingError("\n".join(wrong))
