"""Changes to a live model that can be taken back to the byte."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint.shards import shortened
from ..errors import TrainingError
from .named_weights import tensor_hash

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Applied:
    """Changes made to a live model, and the bytes that were there before, on the CPU.

    A context manager: leaving it is `undo`.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._kept: dict[str, _Kept] = {}

    def write(self, name: str, weight: Tensor, changed: Tensor) -> None:
        """Put `changed` into the model's `weight`, and keep what it replaces."""
        old, new = _bits(weight), _bits(changed)
        differs = (old != new).flatten()
        places, values = None, old.flatten()
        # A place takes 8 bytes, so they only pay where few values change.
        if int(differs.sum()) * (8 + old.itemsize) < old.nbytes:
            places = differs.nonzero()[:, 0]
            values = values[places]
            places = places.cpu()
        kept = values.to("cpu", copy=True)
        self._kept[name] = _Kept(places, kept, tensor_hash(changed))
        old.copy_(new)

    def undo(self) -> None:
        """Make every byte what it was; does nothing the second time.

        Raises TrainingError, with nothing undone, if something else has changed these weights
        since: undo what was applied later first.
        """
        state = self._model.state_dict()
        if changed := [
            name
            for name, kept in self._kept.items()
            if name not in state or tensor_hash(state[name]) != kept.hash_after
        ]:
            raise TrainingError(
                f"{shortened(changed)} changed since the vector was applied, so what was there "
                "before cannot be put back: undo what was applied later first"
            )
        self.restore()

    def restore(self) -> None:
        """`undo` without a look at what is there now."""
        state = self._model.state_dict()
        for name, kept in list(self._kept.items()):
            bits = _bits(state[name])
            values = kept.values.to(bits.device)
            if kept.places is not None:
                values = bits.flatten().index_copy(0, kept.places.to(bits.device), values)
            bits.copy_(values.view(bits.shape))
            del self._kept[name]

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


class _Kept(NamedTuple):
    """What a weight held, as integers: all of it, or only in some places of the flat tensor."""

    places: Tensor | None
    values: Tensor
    hash_after: str


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that NaN equals NaN and 0 is not -0."""
    return tensor.detach().view(_BITS[tensor.element_size()])
