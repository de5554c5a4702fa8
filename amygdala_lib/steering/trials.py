"""Trials: what a model writes under a push, and what it makes of that text when left alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..capture import residual_stream
from ..directions import Directions
from ..models import LanguageModel
from ..readout import Readout
from .positions import Tokens
from .steering import steer

_SENTENCE = re.compile(r"""[^.!?…。！？]+[.!?…。！？]+["'”’»)\]]*""")


@dataclass(frozen=True, eq=False)
class Trial:
    """One continuation per prompt, and how the unsteered model reads it.

    `ids` are the tokens written, without end and padding; `nll` the sum of their negative
    log-likelihoods in nats; `readings` the z-scores of their mean residual (NaN without tokens).
    """

    texts: list[str]
    ids: list[list[int]]
    nll: Float[np.ndarray, " texts"]
    readings: Float[np.ndarray, "texts concepts"]

    def only(self, rows: Sequence[int]) -> Trial:
        """The trial of these prompts alone."""
        return Trial(
            [self.texts[i] for i in rows],
            [self.ids[i] for i in rows],
            self.nll[rows],
            self.readings[rows],
        )

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per token; NaN if nothing was written."""
        count = sum(map(len, self.ids))
        return float(np.exp(self.nll.sum() / count)) if count else np.nan

    @property
    def distinct_sentences(self) -> float:
        """Distinct sentences among those of all texts, as a share.

        An unfinished last sentence is left out, unless it is all there is.
        """
        told = [sentence for text in self.texts for sentence in _sentences(text)]
        return len(set(told)) / len(told)

    @property
    def distinct_bigrams(self) -> float:
        """Distinct pairs of neighbouring tokens within each text, as a share; NaN without pairs.

        After Li et al. 2016 (arXiv:1510.03055), for each text by itself.
        """
        pairs = [list(zip(row, row[1:], strict=False)) for row in self.ids]
        count = sum(map(len, pairs))
        return sum(len(set(held)) for held in pairs) / count if count else np.nan


@dataclass(frozen=True, eq=False)
class Bench:
    """A model, what it goes on from, and where its texts are read."""

    lm: LanguageModel
    directions: Directions
    read_layer: int
    prompts: Sequence[str]
    new_tokens: int
    tokens: Tokens
    seed: int
    batch_size: int
    allow_other_model: bool

    def write(
        self, directions: Directions, strengths: Mapping[str, float], layers: Sequence[int]
    ) -> Trial:
        """Continuations sampled at temperature 1 under a push, re-read without it.

        Every trial draws from the same seed, so that trials differ by their pushes alone.
        """
        prompts = self.lm.tokenizer(list(self.prompts))["input_ids"]
        push = steer(
            self.lm, directions, strengths, layers=layers, tokens=self.tokens,
            allow_other_model=self.allow_other_model,
        )  # fmt: skip
        with push, torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(self.seed)
            ids = [row for batch in self._batches(prompts) for row in self._sample(batch)]
        read = [
            self._read(before, after)
            for before, after in zip(self._batches(prompts), self._batches(ids), strict=True)
        ]
        nll, readings = (np.concatenate(parts) for parts in zip(*read, strict=True))
        texts = self.lm.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return Trial(texts, ids, nll, readings)

    def _batches(self, rows: list[list[int]]) -> list[list[list[int]]]:
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def _sample(self, prompts: list[list[int]]) -> list[list[int]]:
        width, pad = max(map(len, prompts)), self.lm.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        out = self.lm.model.generate(
            input_ids=ids.to(self.lm.device),
            attention_mask=mask.to(self.lm.device),
            max_new_tokens=self.new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=pad,
        )
        ends = self.lm.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        return [_up_to(row, ends) for row in out[:, width:].tolist()]

    @torch.inference_mode()
    def _read(
        self, prompts: list[list[int]], written: list[list[int]]
    ) -> tuple[Float[np.ndarray, " batch"], Float[np.ndarray, "batch concepts"]]:
        # Padded on the right, so that positions count from each text's start in every family.
        rows = [before + after for before, after in zip(prompts, written, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.lm.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with residual_stream(self.lm, [self.read_layer]) as stream:
            logits = self.lm.model(
                input_ids=ids, attention_mask=mask.to(self.lm.device), use_cache=False
            ).logits
        hidden = stream[self.read_layer]
        starts = [len(row) for row in prompts]
        nll = [
            _nll(logits[i, start - 1 : len(row) - 1], ids[i, start : len(row)])
            for i, (start, row) in enumerate(zip(starts, rows, strict=True))
        ]
        means = [
            hidden[i, start : len(row)].float().mean(0).cpu()
            for i, (start, row) in enumerate(zip(starts, rows, strict=True))
        ]
        z = Readout(self.directions).project(torch.stack(means), self.read_layer)
        return np.array(nll), z.numpy()


def _nll(logits: Float[Tensor, "tokens vocabulary"], ids: Tensor) -> float:
    return torch.nn.functional.cross_entropy(
        logits.float(), ids.to(logits.device), reduction="sum"
    ).item()


def _up_to(ids: list[int], ends: set[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def _sentences(text: str) -> list[str]:
    return [sentence.strip() for sentence in _SENTENCE.findall(text)] or [text.strip()]
