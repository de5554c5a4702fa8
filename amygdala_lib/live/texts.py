"""Texts: training examples from whatever a caller has, by a model without its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ..errors import LiveError, TrainingError
from ..models import LanguageModel, find_layers
from ..training import Example
from ..training.examples import from_text

Texts = tuple[str, str] | tuple[str, str, str]
"""A context and its continuation; then, for a preference, the continuation that is rejected."""


def without_weights(model: Path | str) -> LanguageModel:
    """Tokenizer and configuration of a folder or Hugging Face id; the parameters are on meta.

    For everything in `training` that reads examples. Raises LiveError if there is none.
    """
    name = str(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise LiveError(
            f"{name} has no tokenizer and configuration that can be read here: give the folder of "
            f"the model that is served, or token ids ({error})"
        ) from error
    with suppress(OSError):  # a folder need not say how its model ends
        empty.generation_config = GenerationConfig.from_pretrained(name)
    layers = find_layers(empty)
    return LanguageModel(empty, tokenizer, layers, name, "none", "without weights")


def examples_of(
    given: Sequence[Example | Mapping[str, Any] | Texts],
    language_model: Callable[[], LanguageModel],
) -> list[Example]:
    """Examples of examples, of dictionaries of token ids, or of texts.

    language_model: asked for its tokenizer where there are texts. Raises LiveError naming every
    one that is none of these, or cannot be tokenised.
    """
    found, problems = [], []
    for number, each in enumerate(given):
        try:
            found.append(_example(each, language_model))
        except (TrainingError, TypeError) as error:
            problems += [f"example {number}: {line}" for line in str(error).split("\n")]
    if problems:
        raise LiveError("\n".join(problems))
    return found


def _example(given: Any, language_model: Callable[[], LanguageModel]) -> Example:
    if isinstance(given, Example):
        return given
    if isinstance(given, Mapping):
        ids = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
        return Example(**ids)
    texts = isinstance(given, tuple | list) and len(given) in (2, 3)
    if not (texts and all(isinstance(text, str) for text in given)):
        raise TypeError(
            f"{str(given)[:60]} is none: give an Example, a dictionary of token ids, or a pair of "
            "texts"
        )
    context, continuation, *rejected = given
    return from_text(
        language_model(), context, continuation, rejected=rejected[0] if rejected else None
    )
