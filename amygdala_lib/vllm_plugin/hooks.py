"""Hooks: what is read from, and added to, the residual stream of a model inside a vLLM worker."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import LiveError
from ..models import EMBEDDING
from .patches import wrap_once
from .readout import Recorder
from .steering import KEY, Pushes

if TYPE_CHECKING:
    from ..directions import Directions


@dataclass(frozen=True, eq=False)
class Step:
    """One forward of a batch: which rows are whose.

    requests: vLLM's ids, in the order of the batch. starts: the first row of each, and at last the
    number of all rows. token: the number of the token that each request's last row chooses, 0 for
    the first that is generated. chooses: whether it does choose one; the last row of a part of a
    prompt does not. steering: of each request, or None.
    """

    requests: list[str]
    starts: Int[np.ndarray, " requests_and_one"]
    token: Int[np.ndarray, " requests"]
    chooses: np.ndarray
    steering: list[Mapping[str, Any] | None]

    @classmethod
    def of(cls, runner: Any) -> Step:
        """What a runner that has prepared its inputs is about to run."""
        batch = runner.input_batch
        n = batch.num_reqs
        requests = list(batch.req_ids[:n])
        lengths = runner.optimistic_seq_lens_cpu[:n].numpy()
        return cls(
            requests,
            runner.query_start_loc.np[: n + 1].copy(),
            lengths - batch.num_prompt_tokens[:n],
            ~runner.discard_request_mask.np[:n],
            [_steering(runner.requests[request]) for request in requests],
        )

    def steered_rows(self) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
        """The rows of all steered requests, and which of these each is of (0 is the first)."""
        steered = [j for j, how in enumerate(self.steering) if how]
        counts = [int(self.starts[j + 1] - self.starts[j]) for j in steered]
        rows = [np.arange(self.starts[j], self.starts[j + 1]) for j in steered]
        return np.concatenate(rows), np.repeat(np.arange(len(steered)), counts)


class LayerHooks:
    """Reads and steers the layers of one model: `during` a step, and never otherwise.

    Within a layer a request is steered first and read then, so that readouts show the stream as
    the model goes on with it.
    """

    def __init__(self, model: nn.Module, n_layers: int, hidden_size: int, directions: Directions):
        """Raises LiveError if the directions do not fit the model, or its layers are not found."""
        _check_fit(directions, n_layers, hidden_size)
        blocks = _blocks(model, n_layers)
        device = next(model.parameters()).device
        self.layers = directions.layers
        self.recorder = Recorder(directions, device)
        self.pushes = Pushes(directions, device)
        self._step: Step | None = None
        self._ends: Tensor | None = None
        self._steered: tuple[Tensor, Tensor, dict[int, Tensor]] | None = None
        """Rows, which request each is of, and what is added to these, by layer."""
        self._read: dict[int, Float[Tensor, "requests hidden"]] = {}
        for layer in self.layers:
            if layer == EMBEDDING:
                names = list(inspect.signature(blocks[0].forward).parameters)
                blocks[0].register_forward_pre_hook(self._before(names), with_kwargs=True)
            else:
                blocks[layer].register_forward_hook(self._after(layer))

    def during(self, step: Step, forward: Callable[[], Any]) -> Any:
        """What `forward` returns, run as this step."""
        device = self.pushes.device
        self._step = step
        self._ends = torch.as_tensor(step.starts[1:] - 1, dtype=torch.long, device=device)
        if any(step.steering):
            rows, whose = step.steered_rows()
            self._steered = (
                torch.as_tensor(rows, device=device),
                torch.as_tensor(whose, device=device),
                self.pushes.of([how for how in step.steering if how]),
            )
        try:
            output = forward()
            if len(self._read) == len(self.layers):
                states = torch.stack([self._read[layer] for layer in self.layers])
                self.recorder.record(step.requests, step.token, step.chooses, states)
            return output
        finally:
            self._step = self._ends = self._steered = None
            self._read.clear()

    def _after(self, layer: int) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
            if self._step is None:
                return None
            # (what the block adds, the stream it adds to), or the stream itself
            hidden, *more = output if isinstance(output, tuple) else (output,)
            pushed = self._pushed(layer, hidden)
            self._read_off(layer, pushed, more[0] if more else None)
            return (pushed, *more) if isinstance(output, tuple) else pushed

        return hook

    def _before(self, names: list[str]) -> Callable:
        place = names.index("hidden_states")

        def hook(module: nn.Module, inputs: tuple, keywords: dict) -> tuple[tuple, dict] | None:
            if self._step is None:
                return None
            named = "hidden_states" in keywords
            hidden = keywords["hidden_states"] if named else inputs[place]
            pushed = self._pushed(EMBEDDING, hidden)
            self._read_off(EMBEDDING, pushed, None)
            if named:
                return inputs, keywords | {"hidden_states": pushed}
            return (*inputs[:place], pushed, *inputs[place + 1 :]), keywords

        return hook

    def _pushed(self, layer: int, hidden: Tensor) -> Tensor:
        if self._steered is None or layer not in self._steered[2]:
            return hidden
        rows, whose, pushes = self._steered
        pushed = hidden.clone()  # the rows of other requests bit for bit
        pushed[rows] += pushes[layer].to(hidden.dtype)[whose]
        return pushed

    def _read_off(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        # At once: the norm that follows overwrites both.
        stream = hidden[self._ends].float()
        self._read[layer] = stream if residual is None else stream + residual[self._ends].float()


def wrap_runner() -> None:
    """Let vLLM's model runner run every forward as a step of its model's hooks, if it has any."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    def as_a_step(forward: Callable[..., Any], runner: Any, *given: Any, **named: Any) -> Any:
        run = functools.partial(forward, runner, *given, **named)
        hooks = hooks_of(runner.get_model())
        return run() if hooks is None else hooks.during(Step.of(runner), run)

    wrap_once(GPUModelRunner, "_model_forward", as_a_step)
    WorkerBase.amygdala_readout = _readout


def install(model: nn.Module, vllm_config: Any, directions: Directions) -> None:
    """Set the hooks of a model that a worker has loaded.

    Raises LiveError if the directions do not fit it.
    """
    config = vllm_config.model_config.hf_text_config
    model._amygdala_hooks = LayerHooks(
        model, config.num_hidden_layers, config.hidden_size, directions
    )


def hooks_of(model: nn.Module) -> LayerHooks | None:
    return getattr(model, "_amygdala_hooks", None)


def unhookable(vllm_config: Any) -> list[str]:
    """Why hooks on layers would not see every token of a server with these settings."""
    problems = []
    if not vllm_config.model_config.enforce_eager:
        problems.append(
            "compiled models and CUDA graphs run past hooks on layers: add --enforce-eager"
        )
    if vllm_config.use_v2_model_runner:
        problems.append("the second model runner keeps other books: set VLLM_USE_V2_MODEL_RUNNER=0")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        problems.append("no process has all layers: leave out --pipeline-parallel-size")
    if vllm_config.speculative_config is not None:
        problems.append("a step may choose several tokens: leave out --speculative-config")
    return problems


def _steering(request: Any) -> Mapping[str, Any] | None:
    params = request.sampling_params
    return (params.extra_args or {}).get(KEY) if params is not None else None


def _blocks(model: nn.Module, n_layers: int) -> nn.ModuleList:
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if len(found) != 1:
        raise LiveError(
            f"{type(model).__name__} has {len(found)} lists of {n_layers} modules, so which are "
            "its layers cannot be told: start the server without a readout"
        )
    return found[0]


def _check_fit(directions: Directions, n_layers: int, hidden_size: int) -> None:
    problems = []
    if beyond := [layer for layer in directions.layers if not EMBEDDING <= layer < n_layers]:
        problems.append(f"layers {beyond} are not among its {n_layers}")
    if directions.hidden_size != hidden_size:
        problems.append(
            f"vectors of {directions.hidden_size} do not fit a residual stream of {hidden_size}"
        )
    if problems:
        made_for = directions.provenance.get("model", "another model")
        raise LiveError(
            f"the readout, made for {made_for}, does not fit the served model: "
            + "; ".join(problems)
        )


def _readout(self: Any, request: str) -> list[tuple[str, list[int], bytes]]:
    """What a worker has recorded of a request: called by its name through `collective_rpc`.

    The id of each sequence, `positions`, and values as bytes: lists of numbers would take the
    worker longer than a step of its model.
    """
    hooks = hooks_of(self.model_runner.get_model())
    return [
        (sequence.name, sequence.positions, sequence.values.numpy().tobytes())
        for sequence in hooks.recorder.of(request)
    ]
