"""Generation: what a call of `generate` was asked for, and what came of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..errors import ModelError
from ..models import LanguageModel
from .recording import Result


class GenerateCall:
    """The arguments of one call of `model.generate`, read as `generate` will read them.

    `ends` are the tokens that end a text, `padding` fills the row after one. The prompt's ids
    stand in places `first` to `prompt_end`: places before it are held by a cache that was given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Int[Tensor, "batch tokens"] | None = None,
        generation_config: GenerationConfig | None = None,
        *more: Any,
        **options: Any,
    ):
        self._model = model
        self._inputs = inputs
        self._config = generation_config
        self._more = more
        self.options = options
        self.beams = (self.setting("num_beams") or 1) > 1
        self.ends = _numbers(self.setting("eos_token_id"))
        self.padding = _numbers(self.setting("pad_token_id")) if self.ends else []
        self.first, self.prompt_end = self._places()

    def setting(self, name: str) -> Any:
        """An argument of the call, or else the first value that is set."""
        if name in self.options:
            return self.options[name]
        held = (getattr(c, name, None) for c in (self._config, self._model.generation_config))
        return next((value for value in held if value is not None), None)

    def problems(self, *, streaming: bool) -> list[str]:
        """Why the tokens of this call cannot be followed."""
        found = []
        if self.options.get("custom_generate") is not None:
            found.append("custom_generate goes its own way")
        if self.setting("cache_implementation") == "paged":
            found.append("a paged cache packs all sequences into one row")
        if streaming and self.beams:
            found.append("which beams are kept is only known in the end: leave out on_token")
        if streaming and (
            self.options.get("assistant_model") or self.setting("prompt_lookup_num_tokens")
        ):
            found.append("speculation takes tokens back: leave out on_token")
        return found

    def run(self, generate: Callable) -> tuple[Any, Result]:
        """What the caller is to get, and what it came to."""
        # Only the long form tells where beams went; in a compiled model, hooks would be traced.
        config, options = self._config, dict(self.options)
        forced = {"return_dict_in_generate": True, "disable_compile": True}
        asked = self.setting("return_dict_in_generate")
        if config is None:
            options |= forced
        else:  # which generate does not want together with settings
            config = copy.deepcopy(config)
            config.update(**forced)
            options = {name: value for name, value in options.items() if name not in forced}
        output = generate(self._inputs, config, *self._more, **options)
        beam_rows = getattr(output, "beam_indices", None)
        if beam_rows is not None:
            lengths = (beam_rows >= 0).sum(1).tolist()
        else:
            made = output.sequences[:, self.prompt_end - self.first :]
            lengths = [self._length(row) for row in made.tolist()]
        result = Result(output.sequences, self.first, lengths, beam_rows)
        return output if asked else output.sequences, result

    def _places(self) -> tuple[int, int]:
        ids = self.options.get("input_ids") if self._inputs is None else self._inputs
        if ids is None:
            return 0, 1  # generate begins with the BOS token
        cache, mask = self.options.get("past_key_values"), self.options.get("attention_mask")
        # As in generate: ids as long as the mask begin where the cache does; shorter ones after it.
        apart = cache is not None and mask is not None and mask.shape[1] != ids.shape[1]
        first = int(cache.get_seq_length()) if apart else 0
        return first, first + ids.shape[1]

    def _length(self, row: list[int]) -> int:
        """How many tokens were generated: through the first that ends a text, or to the padding."""
        for n, token_id in enumerate(row, 1):
            if token_id in self.ends:
                return n
        n = len(row)
        while n and row[n - 1] in self.padding:
            n -= 1
        return n


def _numbers(ids: int | Iterable[int] | Tensor | None) -> list[int]:
    return [] if ids is None else torch.as_tensor(ids).reshape(-1).tolist()


def check_length(lm: LanguageModel, n_given: int, n_written: int = 0) -> None:
    """Raises ModelError if there are no tokens, or more than the model can read."""
    longest = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if n_given == 0:
        raise ModelError("there is no text: write a few words")
    if longest and n_given + n_written > longest:
        more = f" and {n_written} to write" if n_written else ""
        raise ModelError(
            f"{n_given} tokens{more} are more than the {longest} {lm.name} reads: shorten the text"
        )
