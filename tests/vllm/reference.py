"""What Hugging Face computes, to compare a server with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from amygdala_lib.directions import Directions
from amygdala_lib.steering import steer


def from_disk(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def scores(model: PreTrainedModel, ids: Sequence[int]) -> list[float]:
    """Log-probabilities of a text's tokens but the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


@torch.no_grad()
def projections(
    model: PreTrainedModel,
    directions: Directions,
    prompt: Sequence[int],
    written: Sequence[int],
    strengths: dict[str, float] | None = None,
) -> torch.Tensor:
    """(tokens, layers, concepts): of the states from which each token was chosen."""
    ids = torch.tensor([[*prompt, *written[:-1]]])
    with steer(model, directions, strengths) if strengths else nullcontext():
        states = model(ids, output_hidden_states=True).hidden_states
    # Number 0 is the embedding; the last has gone through the final norm and is not read here.
    found = [
        states[layer + 1][0, len(prompt) - 1 :].float() @ directions.vectors[layer].T
        for layer in directions.layers
    ]
    return torch.stack(found, 1)


def digest_of(model: PreTrainedModel) -> str:
    """Of all weights as they are now."""
    found = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        found.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_of_folder(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                found.update(file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
