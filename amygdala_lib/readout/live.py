"""Live: what a model holds of each concept, token by token, while it reads and writes."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import Cache

from ..errors import ModelError
from ..models import EMBEDDING, LanguageModel
from .generation import GenerateCall
from .recording import Recording, Sequence, Step
from .spelling import spell
from .streaming import Reading, Stream

if TYPE_CHECKING:
    from .readout import Readout


class LiveReadout:
    """What a readout has recorded since it was attached to a model: see `Readout.attach`.

    It can be asked while attached and afterwards; until then values stay where they were computed.
    """

    def __init__(
        self,
        readout: Readout,
        lm: LanguageModel,
        *,
        prompt: bool = False,
        on_token: Callable[[Reading], None] | None = None,
    ):
        self.readout = readout
        self.lm = lm
        self.prompt = prompt
        self.attached = False
        self._on_token = on_token
        self._recordings: list[Recording] = []
        self._open: tuple[Recording, Step] | None = None
        """What the forward that is running belongs to."""
        self._generation: Recording | None = None
        self._stream: Stream | None = None
        self._cache: Callable[[], object | None] = lambda: None
        """The cache that the last forward outside `generate` left, if it still lives."""
        self._readers: list[tuple[dict, int]] = []
        """Where the layers' hooks are registered, and their numbers."""

    @property
    def layers(self) -> list[int]:
        return self.readout.directions.layers

    @property
    def concepts(self) -> list[str]:
        return self.readout.directions.concepts

    def __repr__(self) -> str:
        what = "prompts and generated tokens" if self.prompt else "generated tokens"
        return (
            f"<LiveReadout {'' if self.attached else 'was '}attached to {self.lm.name} at layers "
            f"{', '.join(map(str, self.layers))}: {len(self.concepts)} concepts over {what}, "
            f"{sum(recording.n_sequences for recording in self._recordings)} sequences so far>"
        )

    def frame(self) -> pd.DataFrame:
        """One row per sequence, token, layer and concept, in this order.

        `value` is the projection of the residual stream at the token's own position: the state
        after the model has read it, from which it goes on to choose the next. `z` is the same in
        standard deviations. The last token of a generation is chosen and never read: its `value`
        and `z` are NaN. `sequence` counts on from one call of the model to the next; `position`
        counts the tokens of a sequence from 0, padding left out; `generated` says whether
        `generate` chose the token or was given it. The `token`s of a sequence spell its text.

        Raises ModelError if a generation went a way that cannot be followed.
        """
        sequences = self._sequences()
        n_layers, n_concepts = len(self.layers), len(self.concepts)
        lengths = [len(sequence.ids) for sequence in sequences]
        by_token = {
            "sequence": np.repeat(np.arange(len(sequences)), lengths),
            "position": np.array([p for s in sequences for p in s.positions], int),
            "token": np.array([token for s in sequences for token in self._spelt(s)], object),
            "generated": np.array([g for s in sequences for g in s.generated], bool),
        }
        frame = {name: np.repeat(v, n_layers * n_concepts) for name, v in by_token.items()}
        n = sum(lengths)
        codes = np.tile(np.arange(n_concepts), n * n_layers)
        values = torch.cat(
            [torch.empty(0, n_layers, n_concepts), *(sequence.values for sequence in sequences)]
        )
        frame |= {
            "layer": np.tile(np.repeat(self.layers, n_concepts), n),
            "concept": pd.Categorical.from_codes(codes, self.concepts),
            "value": values.numpy().reshape(-1),
            "z": self._zscored(values).numpy().reshape(-1),
        }
        return pd.DataFrame(frame)

    def zscores(self, layer: int | None = None, sequence: int = 0) -> pd.DataFrame:
        """The z-scores of one sequence at one layer: tokens (the index) by concepts.

        `layer` may be left out where there is but one; a negative `sequence` counts from the end.
        Raises ModelError for a layer or sequence that was not recorded.
        """
        problems, sequences = [], self._sequences()
        if layer is None and len(self.layers) == 1:
            layer = self.layers[0]
        if layer not in self.layers:
            problems.append(f"no layer {layer} is recorded: choose one of {self.layers}")
        if not -len(sequences) <= sequence < len(sequences):
            problems.append(f"no sequence {sequence} is recorded: there are {len(sequences)}")
        if problems:
            raise ModelError("\n".join(problems))
        found = sequences[sequence]
        return pd.DataFrame(
            self._zscored(found.values)[:, self.layers.index(layer)].numpy(),
            index=pd.Index(self._spelt(found), name="token"),
            columns=self.concepts,
        )

    def _sequences(self) -> list[Sequence]:
        return [sequence for recording in self._recordings for sequence in recording.sequences()]

    def _spelt(self, sequence: Sequence) -> list[str]:
        return spell(self.lm.tokenizer, sequence.ids)

    def _zscored(
        self, values: Float[Tensor, "tokens layers concepts"]
    ) -> Float[Tensor, "tokens layers concepts"]:
        dirs = self.readout.directions
        means = torch.stack([dirs.means[layer] for layer in self.layers])
        stds = torch.stack([dirs.stds[layer] for layer in self.layers])
        return (values - means) / stds

    # While attached

    @contextmanager
    def listening(self) -> Iterator[LiveReadout]:
        """Record within the block; no hook outlives it."""
        model, blocks = self.lm.model, self.lm.layers
        parameters = [*inspect.signature(model.forward).parameters]
        hooks = []
        try:
            for layer in self.layers:
                reader = self._reader(layer)
                if layer == EMBEDDING:
                    hooks.append(blocks[0].register_forward_pre_hook(reader, with_kwargs=True))
                    self._readers.append((blocks[0]._forward_pre_hooks, hooks[-1].id))
                else:
                    hooks.append(blocks[layer].register_forward_hook(reader))
                    self._readers.append((blocks[layer]._forward_hooks, hooks[-1].id))
            before = functools.partial(self._before, parameters)
            hooks.append(model.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(model.register_forward_hook(self._after))
            self.attached = True
            with _replaced(model, "generate", self._generate):
                yield self
        finally:
            self.attached = False
            self._readers.clear()
            for hook in hooks:
                hook.remove()

    def _reader(self, layer: int) -> Callable:
        vectors = self.readout.directions.vectors[layer]
        placed: dict[torch.device, Tensor] = {}

        def read(hidden: Tensor) -> None:
            if self._open is None or not (recorded := self._open[1].ids.shape[1]):
                return
            if hidden.device not in placed:
                placed[hidden.device] = vectors.to(hidden.device)
            # float32 whatever the model's dtype: bfloat16 keeps too few digits of a projection.
            states = hidden.detach()[:, -recorded:].float()
            self._open[1].values[layer] = linear(states, placed[hidden.device])

        def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            read(output[0] if isinstance(output, tuple) else output)

        def embedding_hook(module: nn.Module, inputs: tuple, keywords: dict) -> None:
            read(inputs[0] if inputs else keywords["hidden_states"])

        return embedding_hook if layer == EMBEDDING else hook

    def _before(self, parameters: list[str], module: nn.Module, inputs: tuple, given: dict) -> None:
        """A forward begins: which tokens will it read, and which of them are recorded?"""
        for hooks, number in self._readers:
            # Behind whatever changes the stream, steering say, though it be entered later.
            hooks.move_to_end(number)
        arguments = dict(zip(parameters, inputs, strict=False)) | given
        ids, cache = arguments.get("input_ids"), arguments.get("past_key_values")
        if ids is None:
            raise ModelError(
                "a live readout names the tokens that are read: pass input_ids, not inputs_embeds"
            )
        recording = self._generation or self._continued(cache)
        start = _length_of(cache, recording.end)
        first = start
        if recording.prompt_end is not None:
            first = max(start, 0 if self.prompt else recording.prompt_end)
            if cache is None:  # all is read again for every token
                first = max(first, recording.end)
        mask = arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            recording.mask = mask
        self._open = recording, Step(start + ids.shape[1], ids[:, first - start :])

    def _continued(self, cache: object | None) -> Recording:
        if cache is not None and cache is self._cache():
            return self._recordings[-1]
        return self._recording()

    def _recording(self, **facts: Any) -> Recording:
        return Recording(self.layers, len(self.concepts), **facts)

    def _after(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        """A forward is through; one that failed or was cut short never comes here."""
        (recording, step), self._open = self._open, None
        recording.steps.append(step)
        recording.end = step.end
        if self._generation is not None:
            if self._stream:
                self._stream.read(step)
            return
        cache = getattr(output, "past_key_values", None)
        self._cache = weakref.ref(cache) if isinstance(cache, Cache) else lambda: None
        if len(recording.steps) == 1:
            self._recordings.append(recording)
            self._stream = self._new_stream(recording, ends=())
        if self._stream:
            self._stream.read(step)

    def _new_stream(self, recording: Recording, ends: Iterable[int]) -> Stream | None:
        """For the recording that was added last."""
        if self._on_token is None:
            return None
        return Stream(
            self._on_token,
            recording,
            first=sum(earlier.n_sequences for earlier in self._recordings[:-1]),
            tokenizer=self.lm.tokenizer,
            zscored=self._zscored,
            ends=set(ends),
        )

    def _generate(self, generate: Callable, *given: Any, **options: Any) -> Any:
        """`generate`, with what was asked for and what came of it put on record."""
        if not self.attached:
            return generate(*given, **options)
        call = GenerateCall(self.lm.model, *given, **options)
        problems = call.problems(streaming=self._on_token is not None)
        if self._generation is not None:
            problems.append("it runs within another generation (early-exit speculation, a thread)")
        if problems:
            raise ModelError("a live readout cannot follow this: " + "; ".join(problems))
        recording = self._recording(
            prompt_end=call.prompt_end, beams=call.beams, mask=options.get("attention_mask")
        )
        self._recordings.append(recording)
        self._stream = self._new_stream(recording, ends=[*call.ends, *call.padding])
        self._cache = lambda: None
        self._generation = recording
        try:
            output, recording.result = call.run(generate)
        finally:
            self._generation = None
        if self._stream:
            self._stream.finish()
        return output


@contextmanager
def _replaced(model: nn.Module, name: str, replacement: Callable) -> Iterator[None]:
    """Within the block, `model.name(...)` is `replacement(model.name, ...)`, if there is one."""
    if not hasattr(model, name):
        yield
        return
    before, original = vars(model).get(name), getattr(model, name)

    @functools.wraps(original)
    def instead(*given: Any, **options: Any) -> Any:
        return replacement(original, *given, **options)

    setattr(model, name, instead)
    try:
        yield
    finally:
        if before is None:
            delattr(model, name)
        else:
            setattr(model, name, before)


def _length_of(cache: object | None, otherwise: int) -> int:
    """How many tokens a cache holds."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # of linear attention only: it does not know
        return otherwise
