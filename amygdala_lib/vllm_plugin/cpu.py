"""CPU: keep vLLM's weights as they were loaded, and mend what the CPU build gets wrong."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from ..errors import LiveError
from .patches import wrap_once


def keep_weights_plain() -> None:
    """Let vLLM compute with weights as they lie on disk, so that they can be shared and trained.

    The CPU build repacks them for its kernels: of linear layers, of GatedDeltaNet's convolutions
    and of experts. Here they go the plain way, which is slower. Also mended, for this process:
    attention in bfloat16 on CPUs with AMX, prefills of one token in hybrid models, and Qwen3.5
    without torchvision. May be called again.
    """
    torch.cpu._init_amx()  # or attention in bfloat16 dies of an illegal instruction
    _image_processing_without_torchvision()
    _plain_linear_layers()
    _plain_convolutions()
    _plain_experts()


def _image_processing_without_torchvision() -> None:
    """vLLM's Qwen3.5 imports one function of a module that needs torchvision; PIL has it too."""
    name = "transformers.models.qwen2_vl.image_processing_qwen2_vl"
    if importlib.util.find_spec("torchvision") or name in sys.modules:
        return
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl

    stand_in = types.ModuleType(name)
    stand_in.smart_resize = image_processing_pil_qwen2_vl.smart_resize
    sys.modules[name] = stand_in


def _plain_linear_layers() -> None:
    from vllm.model_executor.layers import utils

    def plain(layer: nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = linear

    # Looked up in its module at every call, so replacing it there is enough.
    utils.dispatch_cpu_unquantized_gemm = plain


def _plain_convolutions() -> None:
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    for name in ("_causal_conv1d_fwd_cpu", "_causal_conv1d_update_cpu"):
        wrap_once(gdn_attention, name, _with_plain_weight)


def _with_plain_weight(
    convolve: Callable[..., Tensor],
    *,
    x: Tensor,
    weight: Tensor,
    is_weight_packed: bool,
    **more: object,
) -> Tensor:
    if weight.dim() == 3:
        weight = weight.view(weight.size(0), weight.size(2))
    if "fwd" in convolve.__name__ and x.size(1) == 1:
        # The kernel wants the channels of a token side by side, and asks for it by a stride that
        # has no meaning when there is one token.
        x = x.as_strided(x.shape, (1, x.size(0)))
    return convolve(x=x, weight=weight, is_weight_packed=False, **more)


def _plain_experts() -> None:
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    experts = cpu_moe.CPUUnquantizedExperts
    for kind in (experts, *experts.__subclasses__()):
        for name, plain in (
            ("process_weights_after_loading", _keep_experts),
            ("apply", _apply_experts),
        ):
            if name in vars(kind):
                setattr(kind, name, plain)


def _keep_experts(self, layer: nn.Module) -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    activation = self.moe_config.activation
    if activation != MoEActivation.SILU or self.w1_bias is not None or self.w2_bias is not None:
        raise LiveError(
            f"experts with {activation} or with biases cannot be kept as they are on the CPU: "
            "serve this model on a GPU"
        )
    self._use_zentorch = False


def _apply_experts(
    self,
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *more: object,
    apply_router_weight_on_input: bool = False,
    **others: object,
) -> None:
    """Each expert in turn, over the tokens that were sent to it."""
    total = torch.zeros_like(hidden_states, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        tokens, places = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = linear(hidden_states[tokens], w1[expert]).chunk(2, -1)
        written = linear(silu(gate) * up, w2[expert]).float()
        if not apply_router_weight_on_input:  # otherwise the input came weighted
            written *= topk_weights[tokens, places, None].float()
        total.index_add_(0, tokens, written)
    output.copy_(total)
