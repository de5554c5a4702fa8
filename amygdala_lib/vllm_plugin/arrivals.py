"""Arrivals: what a request is given when it comes in, and which tokens it is answered with."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import LiveError
from .patches import wrap_once
from .readout import belongs
from .steering import KEY, Steering, digest, read_steering

if TYPE_CHECKING:
    from ..directions import Directions
    from .settings import Settings

_REQUESTS = 4096  # whose tokens are kept
_TOKENS = 1_000_000  # of all of them together


@dataclass
class Written:
    """The tokens of one sequence so far, as its caller has got them; `number` counts sequences."""

    number: int
    token_ids: list[int] = field(default_factory=list)
    finished: bool = False


class Arrivals:
    """Steers and salts every request of an API server, and keeps what was answered.

    default: the steering of requests that bring none of their own, from their arrival to their
    end. version: of the weights; one more after every change.

    vLLM keeps keys, values and recurrent states of prompts for requests that begin alike. What was
    computed with other weights or other steering must not be taken for a request's own, so both go
    into its `cache_salt`: the stock way of keeping caches apart. It holds at once, while requests
    run, which emptying the cache would not.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self.default: Steering = {}
        self.version = 0
        self._written: OrderedDict[str, Written] = OrderedDict()
        self._n_tokens = self._n_sequences = 0

    @cached_property
    def directions(self) -> Directions | None:
        """What can be read and steered; None if the server was started without a readout."""
        if self._settings.readout is None:
            return None
        from ..readout import Readout

        return Readout.load(self._settings.readout).directions

    def read_steering(self, told: object) -> Steering:
        """As `steering.read_steering` does; raises LiveError also if there is no readout."""
        if self.directions is None:
            raise LiveError(
                "this server has no directions to steer with: start it with --readout FOLDER"
            )
        return read_steering(told, self.directions)

    def stamp(self, request: Any) -> Any:
        """A request of vLLM's engine, with its steering and its salt.

        Raises LiveError for steering that cannot be meant.
        """
        params, steering = request.sampling_params, {}
        if params is not None:
            extra = dict(params.extra_args or {})
            steering = self.read_steering(extra.pop(KEY)) if KEY in extra else self.default
            params.extra_args = extra | ({KEY: steering} if steering else {}) or None
        of_steering = digest(steering) if steering else None
        request.cache_salt = json.dumps([request.cache_salt, self.version, of_steering])
        return request

    def note(self, request: str, token_ids: Sequence[int], finished: bool) -> None:
        """Tokens that were answered, by vLLM's id of the sequence."""
        written = self._written.setdefault(request, Written(self._n_sequences))
        self._n_sequences += not written.token_ids
        self._written.move_to_end(request)  # what still runs is not forgotten
        written.token_ids.extend(token_ids)
        written.finished |= finished
        self._n_tokens += len(token_ids)
        while len(self._written) > _REQUESTS or self._n_tokens > _TOKENS:
            _, oldest = self._written.popitem(last=False)
            self._n_tokens -= len(oldest.token_ids)

    def written(self, request: str) -> dict[str, Written]:
        """What was answered to a request, by vLLM's id of each of its sequences, in order."""
        found = [(name, its) for name, its in self._written.items() if belongs(name, request)]
        return dict(sorted(found, key=lambda item: item[1].number))


_ARRIVALS: Arrivals | None = None


def arrivals() -> Arrivals:
    """Those of this process. Raises LiveError if `register` has found nothing to do."""
    if _ARRIVALS is None:
        raise LiveError("the plugin `amygdala` is not loaded: name it in VLLM_PLUGINS")
    return _ARRIVALS


def wrap_engine(settings: Settings) -> None:
    """Let vLLM's API server stamp every request, and note what it answers."""
    global _ARRIVALS
    if _ARRIVALS is not None:
        return
    _ARRIVALS = here = Arrivals(settings)
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor

    def stamped(take_in: Callable[..., Any], *given: Any, **named: Any) -> Any:
        request = take_in(*given, **named)
        try:
            return here.stamp(request)
        except LiveError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error

    def noted(
        hand_out: Callable[..., Any],
        processor: OutputProcessor,
        outputs: list[Any],
        *given: Any,
        **named: Any,
    ) -> Any:
        for output in outputs:
            if output.request_id in processor.request_states:
                here.note(output.request_id, output.new_token_ids, output.finished)
        return hand_out(processor, outputs, *given, **named)

    wrap_once(InputProcessor, "process_inputs", stamped)
    wrap_once(OutputProcessor, "process_outputs", noted)
