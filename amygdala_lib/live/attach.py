"""Attach: a Hugging Face model whose parameters are the memory that a server serves from."""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from ..errors import LiveError
from .handles import SharedWeights, open_handles
from .mapping import map_weights

_ATTACHED: weakref.WeakKeyDictionary[PreTrainedModel, SharedWeights] = weakref.WeakKeyDictionary()


def attach(handle_file: Path | str) -> PreTrainedModel:
    """A model whose parameters are the server's: training it trains what is being served.

    `handle_file` is the `weights.json` in the server's runtime folder. The model is in evaluation
    mode, on the server's device, its parameters require gradients, and no weight is copied. Before
    a write, `weights_of(model).check()` says whether the server is still there; after one on CUDA,
    `torch.cuda.synchronize()` makes sure that the server sees all of it.

    Raises LiveError if the file is not to be trusted, the server has gone, or a weight of either
    side has no counterpart on the other.
    """
    shared = open_handles(handle_file)
    try:
        model = _model_on(shared)
    except BaseException:
        shared.close()
        raise
    _ATTACHED[model] = shared
    return model


def weights_of(model: PreTrainedModel) -> SharedWeights:
    """The server's weights that an attached model is made of.

    Raises LiveError for a model that is not attached.
    """
    try:
        return _ATTACHED[model]
    except (KeyError, TypeError):
        raise LiveError(
            f"this {type(model).__name__} is not attached to a server: use what attach returned"
        ) from None


def _model_on(shared: SharedWeights) -> PreTrainedModel:
    config = _config(shared.model)
    dtypes: Counter[torch.dtype] = Counter()
    for tensor in shared.tensors.values():
        dtypes[tensor.dtype] += tensor.numel()
    device = next(iter(shared.tensors.values())).device
    model = _without_weights(config, dtypes.most_common(1)[0][0])
    # Before there are weights in it, so that whatever this initialises, it is not the server's.
    _make_buffers(model, device)
    views = map_weights(config, shared.tensors, _wanted(model), naming=shared.naming)
    model.load_state_dict(views, strict=False, assign=True)
    model.tie_weights()
    if left := _on_meta(model):
        raise LiveError(
            f"{type(model).__name__} keeps tensors that no server shares: {', '.join(left)}"
        )
    _set_generation(model, shared.model)
    return model.eval()


def _config(model: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise LiveError(
            f"the server's model {model} has no config.json that can be read here: attach on the "
            f"machine where its folder is ({error})"
        ) from error


def _without_weights(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise LiveError(f"{config.model_type} models write no text: {error}") from error


def _wanted(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of everything that would be saved, tied tensors once."""
    first: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (name, tensor))
    return {name: tuple(tensor.shape) for name, tensor in first.values()}


@torch.no_grad()
def _make_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute what a model makes of its configuration and does not save, such as rotary angles.

    transformers does so itself for models loaded on meta, in the place where it initialises
    weights; those are on meta here, where it has no effect.
    """
    for module in model.modules():
        mine = [name for name in module._non_persistent_buffers_set if name in module._buffers]
        for name in mine:
            if module._buffers[name] is not None:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        module._is_hf_initialized = not mine  # the others are passed over
    model.initialize_weights()


def _on_meta(model: nn.Module) -> list[str]:
    """Names of all tensors without values, those that are plain attributes of a module too."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, value in [
            *module._parameters.items(),
            *module._buffers.items(),
            *vars(module).items(),
        ]
        if isinstance(value, torch.Tensor) and value.is_meta
    ]


def _set_generation(model: PreTrainedModel, folder: str) -> None:
    """As `from_pretrained` does: a folder may say how its model is best generated with."""
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:
        return  # it says nothing: derived from the configuration
