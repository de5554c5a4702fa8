"""Export: share the weights that a vLLM worker has loaded, and set the hooks on its layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import LiveError
from . import hooks
from .patches import wrap_once

if TYPE_CHECKING:
    from torch import nn

    from .settings import Settings

HANDLES = "weights.json"


def wrap_loader(settings: Settings) -> None:
    """Let vLLM's loader share what it has loaded, and hook its layers, before graphs are captured.

    What cannot be shared, read or steered ends the worker, before weights are read where that can
    be told: LiveError.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    def load_and_share(
        load: Callable[..., nn.Module],
        loader: BaseModelLoader,
        vllm_config: Any,
        model_config: Any,
        prefix: str = "",
    ) -> nn.Module:
        load = functools.partial(load, loader, vllm_config, model_config, prefix)
        return _load(load, settings, vllm_config, model_config.model)

    wrap_once(BaseModelLoader, "load_model", load_and_share)


def unshareable(vllm_config: Any) -> list[str]:
    """Why the weights of a server with these settings cannot be trained where they lie."""
    problems = []
    if vllm_config.model_config.quantization is not None:
        problems.append(
            f"quantised weights ({vllm_config.model_config.quantization}) cannot be trained: serve "
            "the model in bfloat16"
        )
    if vllm_config.model_config.enable_sleep_mode:
        problems.append("sleep mode moves weights about: leave out --enable-sleep-mode")
    parallel = vllm_config.parallel_config
    if parallel.world_size > 1 or parallel.data_parallel_size > 1:
        problems.append(
            "weights that are spread over processes cannot be attached to: leave out "
            "--tensor-parallel-size, --pipeline-parallel-size and --data-parallel-size"
        )
    if vllm_config.speculative_config is not None:
        problems.append("a draft model would go stale: leave out --speculative-config")
    if vllm_config.lora_config is not None:
        problems.append("LoRA wraps the layers that are shared: leave out --enable-lora")
    return problems


def _load(
    load: Callable[[], nn.Module], settings: Settings, vllm_config: Any, model_name: str
) -> nn.Module:
    directions = None
    if settings.runtime is not None and (problems := unshareable(vllm_config)):
        raise LiveError("this server cannot be trained:\n" + "\n".join(problems))
    if settings.readout is not None:
        from ..readout import Readout

        if problems := hooks.unhookable(vllm_config):
            raise LiveError("this server cannot be read and steered:\n" + "\n".join(problems))
        directions = Readout.load(settings.readout).directions
    model = load()
    if settings.runtime is not None:
        from ..live.handles import export_weights

        export_weights(model, settings.runtime / HANDLES, model_name=model_name)
    if directions is not None:
        hooks.install(model, vllm_config, directions)
    return model
