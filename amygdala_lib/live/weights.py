"""Weights: the parameters of a served model, each once, whatever names it goes by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import LiveError
from .handle_file import DTYPES, span


@dataclass(frozen=True, eq=False)
class Weight:
    """One place in memory, the parameters that are it, and all their names (more if tied)."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]

    @property
    def tensor(self) -> Tensor:
        return self.parameters[0].data

    def move_to(self, tensor: Tensor) -> None:
        """Let every one of the parameters be `tensor`, which holds the same values."""
        for parameter in self.parameters:
            parameter.data = tensor


def weights_of_module(model: nn.Module) -> list[Weight]:
    """All parameters of a model in order; tied ones are one weight with several names.

    Raises LiveError, naming all of them, for parameters that cannot be trained where they lie:
    quantised, without memory of their own, or sharing a part of it with another tensor.
    """
    found: dict[object, tuple[list[str], dict[int, nn.Parameter]]] = {}
    problems = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if problem := _unshareable(parameter):
            problems.append(f"{name} {problem}")
            continue
        names, parameters = found.setdefault(_place(parameter), ([], {}))
        names.append(name)
        parameters[id(parameter)] = parameter
    weights = [Weight(tuple(names), tuple(held.values())) for names, held in found.values()]
    devices = sorted({str(weight.tensor.device) for weight in weights})
    if len({device.partition(":")[0] for device in devices}) > 1:
        problems.append(f"the weights are spread over {', '.join(devices)}: keep them on one kind")
    problems += _overlapping(model, weights)
    if problems or not weights:
        said = "\n".join(problems) or "it has no parameters"
        raise LiveError(f"{type(model).__name__} cannot be shared:\n{said}")
    return weights


def _unshareable(parameter: Tensor) -> str | None:
    if parameter.layout != torch.strided:
        return f"is {parameter.layout}, not dense"
    if parameter.is_meta:
        return "is on the meta device, without values"
    if parameter.device.type not in ("cpu", "cuda"):
        return f"is on {parameter.device}: only CPU and CUDA memory can be shared"
    if parameter.dtype not in DTYPES.values():
        return f"is {_short(parameter.dtype)}, quantised: serve the model in {', '.join(DTYPES)}"
    return None


def _place(tensor: Tensor) -> object:
    if not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _overlapping(model: nn.Module, weights: Sequence[Weight]) -> list[str]:
    """Tensors of the model that have a part of their memory in common.

    Were one of them moved, the other would go on with the old values.
    """
    named = [(weight.names[0], weight.tensor) for weight in weights]
    # On CUDA nothing is moved: a buffer over a parameter goes on seeing what is written.
    named += [(name, buffer) for name, buffer in model.named_buffers() if buffer.is_cpu]
    extents = sorted(
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + _span_bytes(tensor), name)
        for name, tensor in named
        if tensor.layout == torch.strided and tensor.numel()
    )
    problems = []
    for number, (device, _, end, name) in enumerate(extents):
        for other_device, other_start, _, other in extents[number + 1 :]:
            if other_device != device or other_start >= end:
                break
            problems.append(f"{name} and {other} share a part of their memory")
    return problems


def _span_bytes(tensor: Tensor) -> int:
    return span(tensor.shape, tensor.stride()) * tensor.element_size()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
