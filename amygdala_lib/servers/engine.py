"""Engine: a plain Hugging Face model that writes several requests at once, a token each in turn."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import AmygdalaError, LiveError
from ..live.jobs import Refusal
from ..models import LanguageModel
from ..readout import Reading, Readout
from ..steering import steer

KEPT = 256
"""Requests whose readout can be asked for, the last ones."""

_AT_ONCE = 64  # requests that are written; more are refused
_PATIENCE = 60.0  # seconds for a step

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Request:
    """What is to be written, and what has been; another thread may look while it is.

    steering: `strengths` and, perhaps, `layers`, as `amy.steer` takes them; {} for none. values: of
    each token, (layers, concepts), the projections of the state it was chosen from.
    prompt_log_probabilities: of the prompt's tokens but the first, once it was read.
    """

    name: str
    prompt: list[int]
    max_tokens: int
    steering: Mapping[str, Any] = field(default_factory=dict)
    ends: frozenset[int] = frozenset()
    token_ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    values: list[Float[Tensor, "layers concepts"]] = field(default_factory=list)
    prompt_log_probabilities: list[float] = field(default_factory=list)
    cache: Any = None
    state: str = "running"
    """Then "stop", "length" or "failed"."""
    error: str = "the model failed: the server's log says how"


class Engine(Thread):
    """The thread that computes with the served model: nobody else in its process does.

    readout: what is recorded of every token, and steered with. Greedy search; every request is a
    batch of its own, so that none of them has an influence on another's numbers.
    """

    def __init__(self, lm: LanguageModel, readout: Readout | None):
        super().__init__(name="engine", daemon=True)
        self.lm, self.readout = lm, readout
        self._active: deque[Request] = deque()
        self._known: OrderedDict[str, Request] = OrderedDict()
        self._changed = Condition()
        self._stopping = False

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        steering: Mapping[str, Any] | None = None,
        ignore_eos: bool = False,
    ) -> Request:
        """Raises LiveError for what cannot be written, with all problems; Refusal if full."""
        problems = self._problems(prompt, max_tokens)
        with self._changed:
            if problems:
                raise LiveError("\n".join(problems))
            if len(self._active) >= _AT_ONCE:
                raise Refusal("full", f"{_AT_ONCE} requests are being answered: ask again soon")
            ends = frozenset() if ignore_eos else self._ends()
            name = f"cmpl-{torch.randint(1 << 62, ()).item():016x}"
            request = Request(name, list(prompt), max_tokens, dict(steering or {}), ends)
            self._known[name] = request
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
            self._active.append(request)
            self._changed.notify_all()
        return request

    def written(self, request: Request) -> Iterator[int]:
        """The number of tokens so far, whenever there are more, until all are there.

        Raises LiveError if the model failed, or the steering cannot be meant.
        """
        seen = 0
        while True:
            with self._changed:
                more = self._changed.wait_for(
                    lambda: len(request.token_ids) > seen or request.state != "running", _PATIENCE
                )
                n, state = len(request.token_ids), request.state
            if state == "failed" or not more:
                raise LiveError(request.error if more else f"no token for {_PATIENCE:g} s")
            if n > seen:
                yield (seen := n)
            if state != "running":
                return

    def request(self, name: str) -> Request | None:
        """One of the last ones, by its name."""
        return self._known.get(name)

    def stop(self) -> None:
        """After the token that is being chosen; what is not written by then never is."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self.join()

    def run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._active or self._stopping)
                if self._stopping:
                    return
                request = self._active.popleft()
            state = "failed"
            try:
                state = self._step(request)
            except AmygdalaError as error:
                request.error = str(error)
            except Exception:
                log.exception("%s failed", request.name)
            with self._changed:
                request.state = state
                if state == "running":
                    self._active.append(request)
                else:
                    request.cache = None
                self._changed.notify_all()

    @torch.no_grad()
    def _step(self, request: Request) -> str:
        """Choose one more token; the request's state after it."""
        first = not request.token_ids
        ids = request.prompt if first else request.token_ids[-1:]
        readings: list[Reading] = []
        with ExitStack() as hooks:
            if request.steering:
                hooks.enter_context(self._steered(request.steering))
            if self.readout is not None:
                hooks.enter_context(
                    self.readout.attach(self.lm, on_token=readings.append, allow_other_model=True)
                )
            output = self.lm.model(
                torch.tensor([ids], device=self.lm.device),
                past_key_values=request.cache,
                use_cache=True,
            )
        scores = output.logits[0].float().log_softmax(-1)
        if first and len(ids) > 1:
            following = torch.tensor(ids[1:], device=scores.device)[:, None]
            request.prompt_log_probabilities = scores[:-1].gather(1, following)[:, 0].tolist()
        request.cache = output.past_key_values
        token = int(scores[-1].argmax())
        if readings:
            request.values.append(readings[-1].values)
        request.log_probabilities.append(float(scores[-1, token]))
        request.token_ids.append(token)  # last: whoever looks finds the rest
        if token in request.ends:
            return "stop"
        return "length" if len(request.token_ids) >= request.max_tokens else "running"

    def _problems(self, prompt: Sequence[int], max_tokens: int) -> list[str]:
        problems, config = [], self.lm.model.config.get_text_config()
        if not prompt:
            problems.append("the prompt is empty")
        if bad := [i for i in prompt if type(i) is not int or not 0 <= i < config.vocab_size]:
            problems.append(f"no tokens of this model: {str(bad[:5])[:80]}")
        if type(max_tokens) is not int or max_tokens < 1:
            return [*problems, f"max_tokens is {max_tokens!r}: give a whole number from 1 on"]
        most = getattr(config, "max_position_embeddings", None) or 4096
        if len(prompt) + max_tokens > most:
            problems.append(
                f"{len(prompt)} tokens and {max_tokens} more: this model reads {most} at most"
            )
        return problems

    def _steered(self, steering: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Only for this thread: within it, whatever runs is steered."""
        if self.readout is None:
            raise LiveError("this server has no directions to steer with: start it with a readout")
        return steer(self.lm, self.readout.directions, **steering, allow_other_model=True)

    def _ends(self) -> frozenset[int]:
        ends = self.lm.model.generation_config.eos_token_id
        return frozenset([ends] if isinstance(ends, int) else ends or [])
