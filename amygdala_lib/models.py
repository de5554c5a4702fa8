"""Load a language model: where it goes, in which dtype and why, and where its layers are."""

from __future__ import annotations

import hashlib
import operator
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .artefacts import repository_root
from .errors import ModelError

DEMO_FOLDER = Path(__file__).parent / "demo" / "model"
EMBEDDING = -1
"""Layer index of the residual stream before the first block: the token embeddings."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OTHER_TOWERS = re.compile(r"\b(visual|vision\w*|audio\w*)\b")
_HASH_CHUNK = 1 << 22
_WEIGHTS = "model*.safetensors"
"""Some repositories hold the weights a second time, as `consolidated.safetensors`."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model with its tokenizer and its decoder blocks, in order.

    `layers[i]` writes the residual stream of layer i; `revision` is the hub commit, or the hash of
    the weights for a folder; `reason` says why this device and dtype were chosen.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: nn.ModuleList
    name: str
    revision: str
    reason: str

    @property
    def hidden_size(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embedding."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def __str__(self) -> str:
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        return (
            f"{self.name}: {type(self.model).__name__}, {millions:,.1f}M parameters, "
            f"{len(self.layers)} layers of {self.hidden_size}; {self.reason}"
        )


def load_model(
    name: str | Path = "demo",
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """Load `"demo"`, a folder, or a Hugging Face id, to be read: evaluation mode, no gradients.

    `dtype` and `device` default to `choose_device()`; a model larger than one GPU is spread over
    all of them. Disk and memory are checked before any weight is read.

    Raises ModelError if there is no such model, or it does not fit.
    """
    source, label = _locate(name)
    chosen_device, chosen_dtype, reason = choose_device()
    if device is not None:
        chosen_device, reason = _device(device), f"on {device}, as asked"
        if dtype is None and chosen_device.type == "cpu":
            chosen_dtype = torch.float32
    if dtype is not None:
        chosen_dtype, reason = dtype, f"{reason}; {str(dtype).removeprefix('torch.')}, as asked"
    config = _config(source, label, revision)
    spread = _check_room(source, label, config, chosen_device, chosen_dtype, revision)
    kind = AutoModelForCausalLM if _generates(config) else AutoModel
    # What a checkpoint lacks (BERT's pooler, say) is drawn at random: the same each time, or no
    # result would be found again under the weights' hash.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            model = kind.from_pretrained(
                source,
                revision=revision,
                dtype=chosen_dtype,
                device_map="auto" if spread else {"": chosen_device},
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(
                f"{source} cannot be loaded: save or download its weights and tokenizer again "
                f"({error})"
            ) from error
    model.eval().requires_grad_(False)
    commit = getattr(model.config, "_commit_hash", None)
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        layers=find_layers(model),
        name=label,
        revision=commit or weight_hash(model),
        reason=reason,
    )


def choose_device() -> tuple[torch.device, torch.dtype, str]:
    """The device and dtype this machine reads models best with, and the reason in words."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return (
                torch.device("cuda"),
                torch.bfloat16,
                f"bfloat16 on {name}: the dtype models are trained in",
            )
        return torch.device("cuda"), torch.float16, f"float16 on {name}: it has no bfloat16"
    if torch.backends.mps.is_available():
        return (
            torch.device("mps"),
            torch.float16,
            "float16 on Apple GPU: half the memory of float32",
        )
    return (
        torch.device("cpu"),
        torch.float32,
        "float32 on CPU: no GPU found, and exact beats small here",
    )


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder (or encoder) blocks of a model, whatever it calls them.

    Takes the outermost list of as many modules as the text configuration has layers; vision and
    audio towers are passed over. Raises ModelError if there is none.
    """
    text = model.config.get_text_config()
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not _OTHER_TOWERS.search(path)
    }
    depth = getattr(text, "num_hidden_layers", None)
    fitting = {path: module for path, module in lists.items() if len(module) == depth}
    if not fitting:
        seen = ", ".join(f"{path} ({len(module)})" for path, module in lists.items()) or "none"
        raise ModelError(
            f"{type(model).__name__} should have {depth} layers, but no module list of that length "
            f"was found (lists: {seen}); pass the model's text tower instead"
        )
    return fitting[min(fitting, key=lambda path: path.count("."))]


def check_layers(layers: Iterable[int] | None, n_layers: int) -> list[int]:
    """Layer indices in ascending order, each once; None gives `default_layers`.

    EMBEDDING (-1) stands for the residual stream before the first block. Raises ModelError naming
    every index that the model does not have.
    """
    try:
        indices = default_layers(n_layers) if layers is None else map(operator.index, layers)
        wanted = sorted(set(indices))
    except TypeError:
        raise ModelError(
            f"layers are a list of whole numbers, not {layers!r}: say [3, 5]"
        ) from None
    wrong = [layer for layer in wanted if not EMBEDDING <= layer < n_layers]
    if wrong or not wanted:
        raise ModelError(
            f"no layers {wrong}: this model has 0 to {n_layers - 1}, and -1 for its embeddings"
            if wrong
            else f"no layers asked for: choose from 0 to {n_layers - 1}"
        )
    return wanted


def default_layers(n_layers: int) -> list[int]:
    """A spread over depth with two thirds, where concepts are usually clearest, in it."""
    return sorted({max(0, round(n_layers * share) - 1) for share in (0.25, 0.5, 2 / 3, 0.85)})


def depth_label(layer: int, n_layers: int) -> str:
    """How a layer is named to people: `layer 40 of 64 (63%)`."""
    if layer == EMBEDDING:
        return "embeddings"
    return f"layer {layer} of {n_layers} ({int(100 * layer / n_layers + 0.5)}%)"


@torch.no_grad()
def weight_hash(model: nn.Module) -> str:
    """A hash (16 hex digits) of the weights a model holds now, on whatever device.

    It changes when a single bit of a parameter does, so results cached under it are never stale
    after training in place. Not meant to withstand forgery.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        bits = parameter.detach().contiguous().view(-1).view(_INTEGER[parameter.element_size()])
        for chunk in bits.split(_HASH_CHUNK):
            # A sum with odd weights that depend on the position, modulo 2^64.
            weights = torch.arange(chunk.numel(), device=chunk.device, dtype=torch.int64)
            weights = (weights * 0x9E3779B97F4A7C1 + 0x632BE59BD9B4E01) | 1
            digest.update(int((chunk.long() * weights).sum()).to_bytes(8, "little", signed=True))
    return digest.hexdigest()[:16]


_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _locate(name: str | Path) -> tuple[str, str]:
    """Where to load from, and what to call it."""
    if name == "demo":
        if not (DEMO_FOLDER / "config.json").exists():
            raise ModelError(
                f"the bundled model is not in {DEMO_FOLDER}: make it with `make demo-model`"
            )
        return str(DEMO_FOLDER), "demo"
    folder = Path(name).expanduser()
    if not folder.is_dir():
        # Notebooks run in their own folder, but their parameters are given from the repository's.
        folder = repository_root() / folder
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(f"{folder} has no config.json: give the folder save_pretrained wrote")
        return str(folder), folder.resolve().name
    if isinstance(name, Path) or not _HUB_ID.fullmatch(name):
        raise ModelError(f"no model folder {name}: give a folder, a Hugging Face id, or 'demo'")
    return name, name


def _config(source: str, label: str, revision: str | None) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise ModelError(
                f"{source}/config.json describes no model this transformers can read: save or "
                f"download it again, or upgrade transformers ({error})"
            ) from error
        raise ModelError(
            f"{label} is neither a folder here nor a model the Hugging Face hub gives out "
            f"(offline? misspelt? not logged in?): {error}"
        ) from error


def _device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"no device {str(device)!r} here: leave it out, or pass device='cpu' ({error})"
        ) from error
    return chosen


def _generates(config: PretrainedConfig) -> bool:
    architectures = config.architectures or []
    return any(
        a.endswith(("CausalLM", "ConditionalGeneration", "LMHeadModel")) for a in architectures
    )


def _check_room(
    source: str,
    label: str,
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None,
) -> bool:
    """Refuse a model that cannot fit; True if it has to be spread over several GPUs."""
    stored, to_download = _weight_bytes(source, revision)
    if to_download:
        cache = Path.home() if not (home := _hub_cache()).exists() else home
        if (free := shutil.disk_usage(cache).free) < to_download:
            raise ModelError(
                f"{label} is a download of {to_download / 1e9:.1f} GB, but {cache} has "
                f"{free / 1e9:.1f} GB free: make room, or point HF_HOME at a larger disk"
            )
    stored_dtype = config.get_text_config().dtype or torch.float32
    needed = stored * dtype.itemsize / stored_dtype.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        everywhere = sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    else:
        free = everywhere = psutil.virtual_memory().available
    if needed > everywhere:
        raise ModelError(
            f"{label} needs {needed / 1e9:.1f} GB as {str(dtype).removeprefix('torch.')}, but "
            f"{device} has {everywhere / 1e9:.1f} GB free: pass dtype=torch.bfloat16, "
            "another device, or a smaller model"
        )
    return needed > free


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _weight_bytes(source: str, revision: str | None) -> tuple[int, int]:
    """Bytes of a model's weights, and how many of them have yet to be downloaded; 0 if unknown."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(source, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            folder = None
        if folder is None or not any(folder.glob(_WEIGHTS)):
            try:
                info = HfApi().model_info(
                    source, revision=revision, files_metadata=True, timeout=10
                )
            except (HfHubHTTPError, OSError) as error:
                print(f"size of {source} unknown ({error}); not checked", file=sys.stderr)
                return 0, 0
            size = sum(f.size or 0 for f in info.siblings if fnmatch(f.rfilename, _WEIGHTS))
            return size, size
    return sum(file.stat().st_size for file in folder.glob(_WEIGHTS)), 0
