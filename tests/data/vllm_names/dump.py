"""What vLLM holds of tiny models whose parameters are known: names, shapes and hashes, as JSON.

    flock /tmp/vllm.lock .venv-vllm/bin/python -m tests.data.vllm_names.dump

One file per model beside this one; `tests/test_live_mapping.py` reads them where there is no vLLM.
vLLM loads each folder with its own classes and loaders; only what its CPU build does to weights
afterwards (packing) is left out, as `amygdala_lib.vllm_plugin` leaves it out.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}

import torch
import transformers as hf
from torch import Tensor, nn

HERE = Path(__file__).parent
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "vocab_size": 401,  # no multiple of 64
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 16}
DELTA_NET = HEADS | {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 48}
TIED = {"tie_word_embeddings": True}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}


def configurations() -> dict[str, tuple[hf.PretrainedConfig, torch.dtype]]:
    """Those with experts first: vLLM makes what they need once, for the first model it loads."""
    text = SIZES | DELTA_NET
    biased = SIZES | HEADS | {"attention_bias": True, "mlp_bias": True}
    return {
        "qwen3_next": (hf.Qwen3NextConfig(**text, **EXPERTS, **SHARED), torch.bfloat16),
        "qwen3_moe": (hf.Qwen3MoeConfig(**SIZES, **HEADS, **EXPERTS), torch.bfloat16),
        "qwen3_5_moe": (hf.Qwen3_5MoeTextConfig(**text, **EXPERTS, **SHARED), torch.bfloat16),
        "qwen3_5": (hf.Qwen3_5TextConfig(**text), torch.bfloat16),
        "qwen3_5_tied": (hf.Qwen3_5TextConfig(**text, **TIED), torch.bfloat16),
        "qwen3_5_vision": (
            hf.Qwen3_5Config(text_config=text, vision_config=VISION),
            torch.bfloat16,
        ),
        "qwen3": (hf.Qwen3Config(**SIZES, **HEADS), torch.float32),
        "qwen3_tied": (hf.Qwen3Config(**SIZES, **HEADS, **TIED), torch.float32),
        "qwen2": (hf.Qwen2Config(**SIZES), torch.bfloat16),
        "llama": (hf.LlamaConfig(**biased), torch.bfloat16),
        "mistral": (hf.MistralConfig(**SIZES, **HEADS), torch.bfloat16),
    }


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give every element a value by its parameter's name and its place; exact in bfloat16."""
    for name, parameter in model.named_parameters():
        start = sum(name.encode())
        values = (torch.arange(parameter.numel()) * 7 + start) % 251
        parameter.copy_(values.view(parameter.shape))


def digest(tensor: Tensor) -> str:
    return sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def save(config: hf.PretrainedConfig, dtype: torch.dtype, folder: Path) -> None:
    several = config.get_text_config() is not config
    kind = hf.AutoModelForImageTextToText if several else hf.AutoModelForCausalLM
    model = kind.from_config(config, dtype=dtype)
    fill(model)
    model.save_pretrained(folder)


def main() -> None:
    import vllm
    import vllm.model_executor.model_loader.base_loader as loader
    import vllm.model_executor.models.registry as registry
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    from amygdala_lib.live.weights import weights_of_module

    _stand_in_for_torchvision()
    registry._run_in_subprocess = lambda inspect: inspect()  # no process per architecture
    loader.process_weights_after_loading = lambda *_: None
    torch.accelerator.empty_cache = lambda: None  # a worker on the CPU does so, too
    for number, (name, (config, dtype)) in enumerate(configurations().items()):
        with tempfile.TemporaryDirectory() as folder:
            save(config, dtype, Path(folder))
            settings = EngineArgs(
                model=folder,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=128,
                skip_tokenizer_init=True,
                enforce_eager=True,
                kv_cache_memory_bytes=1 << 24,
            ).create_engine_config()
            with set_current_vllm_config(settings):
                if number == 0:
                    init_distributed_environment(1, 0, "tcp://127.0.0.1:29533", 0, "gloo")
                    ensure_model_parallel_initialized(1, 1)
                model = get_model(vllm_config=settings)
            content = {
                "vllm": vllm.__version__,
                "architecture": type(model).__name__,
                "dtype": str(dtype).removeprefix("torch."),
                "config": json.loads((Path(folder) / "config.json").read_text()),
                "served": [
                    {
                        "names": weight.names,
                        "shape": list(weight.tensor.shape),
                        "dtype": str(weight.tensor.dtype).removeprefix("torch."),
                        "sha256": digest(weight.tensor),
                    }
                    for weight in weights_of_module(model)
                ],
            }
        (HERE / f"{name}.json").write_text(as_lines(content))
        print(name, content["architecture"], len(content["served"]), "tensors", flush=True)


def as_lines(content: dict) -> str:
    """One tensor per line, so that a change is seen as one."""
    head = {name: value for name, value in content.items() if name != "served"}
    lines = ",\n".join(json.dumps(tensor) for tensor in content["served"])
    return json.dumps(head, indent=1)[:-2] + f',\n "served": [\n{lines}\n]}}\n'


def _stand_in_for_torchvision() -> None:
    """There is none for this CPU build; vLLM takes but one function from what needs it."""
    import types

    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil

    name = "transformers.models.qwen2_vl.image_processing_qwen2_vl"
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].smart_resize = pil.smart_resize


if __name__ == "__main__":
    main()
