"""Train the bundled model from nothing: `make demo-model` (about an hour on two cores).

A Qwen3.5 hybrid of 6M parameters learns fresh stories of the affect world, mixed with the
training texts of the hand-written corpus. Checkpoints are kept on the way, because the state a
story is in is learnt late and held-out cues fade when training goes on for long: `demo.release`
then picks the one that carries and steers best on validation frames.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from amygdala_lib.corpus import load_corpus
from amygdala_lib.demo.affect_world import AffectWorld, split_sentences

END = "<|endoftext|>"
STEPS = 5000
EASY_STEPS = 1500
ROWS, ROW_LENGTH = 16, 128
LEARNING_RATE, WARMUP_STEPS = 2e-3, 150
DIRECT_SHARE, CORPUS_SHARE = 0.25, 0.04
CHECKPOINT_EVERY = 500
PUSHED_SHARE, STRONGEST_PUSH = 0.3, 0.7


def document(world: AffectWorld, corpus_texts: list[str], rng: random.Random, ease: float) -> str:
    """One training text: a story, a first-person text, or now and then one from the corpus.

    `ease` falls from 1 to 0 over the first EASY_STEPS steps. At 1 nearly every sentence is a cue
    and most texts name their state: with neutral sentences between the cues from the start, a model
    this small learnt each sentence well but nothing across sentences for four million tokens.
    """
    draw, state = rng.random(), rng.choice(world.states)
    if draw < CORPUS_SHARE:
        # Rows are shorter than many corpus texts: start at any sentence, so that all get read.
        sentences = split_sentences(rng.choice(corpus_texts))
        return " ".join(sentences[rng.randrange(max(1, len(sentences))) :])
    if draw < CORPUS_SHARE + DIRECT_SHARE + 0.35 * ease:
        return world.direct(rng, state, cue_share=0.7 + 0.3 * ease).text
    return world.story(rng, state, cue_share=0.5 + 0.5 * ease).text


def train_tokenizer(texts: list[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE that can spell anything, with one special token that ends a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, model_max_length=2048
    )


def new_model(vocab_size: int, end_id: int, seed: int) -> Qwen3_5ForCausalLM:
    """An untrained hybrid: twice three GatedDeltaNet layers and one attention layer."""
    torch.manual_seed(seed)
    config = Qwen3_5TextConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # vLLM serves head_dim 64 and linear dims of 64 or 128 on CPU
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
    model = Qwen3_5ForCausalLM(config)
    for block in model.model.layers:
        if block.block_type == "linear_attention":
            _remember(block.linear_attn)
    return model


@torch.no_grad()
def _remember(layer: torch.nn.Module) -> None:
    """Give a GatedDeltaNet layer time constants from one token to a thousand.

    transformers starts dt_bias at 1, which with A up to 16 forgets everything within a token: after
    four million tokens such a model still did not use what the sentence before had said. These are
    the step sizes of Mamba-2 (arXiv 2405.21060), log-uniform in [0.001, 0.1].
    """
    low, high = math.log(0.001), math.log(0.1)
    steps = torch.exp(low + (high - low) * torch.rand(layer.dt_bias.shape))
    layer.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus


def push_randomly(model: Qwen3_5ForCausalLM) -> Callable[[], None]:
    """Train under small random pushes of the residual stream; call the result before each step.

    A share PUSHED_SHARE of a batch's rows have one random vector added at all positions of one
    layer, as steering adds one, with up to STRONGEST_PUSH of the mean norm there, so that a push in
    no direction of its own does little harm (research/steering-or-damage.md).
    """
    blocks = model.model.layers[:-1]
    hidden_size = model.config.hidden_size
    for block in blocks:
        block.register_buffer("push", torch.zeros(ROWS, 1, hidden_size), persistent=False)
        block.register_forward_hook(_add_push)

    def draw() -> None:
        directions = torch.nn.functional.normalize(torch.randn(ROWS, 1, hidden_size), dim=-1)
        strengths = (
            STRONGEST_PUSH * torch.rand(ROWS, 1, 1) * (torch.rand(ROWS, 1, 1) < PUSHED_SHARE)
        )
        layers = torch.randint(len(blocks), (ROWS, 1, 1))
        for index, block in enumerate(blocks):
            block.push.copy_(directions * strengths * (layers == index))

    return draw


def _add_push(block: torch.nn.Module, _: tuple, hidden: torch.Tensor) -> torch.Tensor:
    return hidden + block.push * hidden.detach().norm(dim=-1, keepdim=True).mean(1, keepdim=True)


def batch(next_text: Callable[[], str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """ROWS rows of ROW_LENGTH tokens. Each starts at the start of a text, as a prompt does."""
    rows = []
    for _ in range(ROWS):
        row: list[int] = []
        while len(row) < ROW_LENGTH:
            row += tokenizer.encode(next_text()) + [tokenizer.eos_token_id]
        rows.append(row[:ROW_LENGTH])
    return torch.tensor(rows)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return LEARNING_RATE * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    out: Path, corpus_folder: Path, *, steps: int = STEPS, seed: int = 0, compiled: bool = True
) -> list[Path]:
    """Train the model and return the folders of its checkpoints, oldest first.

    The same seed, steps and number of threads give the same weights on the same machine.
    `compiled` takes two minutes and a C++ compiler, and makes each step a third faster.
    """
    world, rng = AffectWorld(), random.Random(seed)
    corpus_texts = load_corpus(corpus_folder).texts
    ease = 0.0

    def next_text() -> str:
        return document(world, corpus_texts, rng, ease)

    tokenizer = train_tokenizer([next_text() for _ in range(20_000)] + corpus_texts)
    model = new_model(len(tokenizer), tokenizer.eos_token_id, seed)
    draw_pushes = push_randomly(model)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    # Without AMX, bf16 matrix products are slower than fp32 on the CPUs this was tried on.
    bf16 = torch.cpu._is_amx_tile_supported()

    def next_token_loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        )

    loss_of = torch.compile(next_token_loss) if compiled else next_token_loss
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = []
    log = (out / "log.jsonl").open("w", encoding="utf-8")
    progress = tqdm(total=steps * ROWS * ROW_LENGTH, unit="token", unit_scale=True, desc="training")
    model.train()
    for step in range(1, steps + 1):
        ease = max(0.0, 1 - step / EASY_STEPS)
        draw_pushes()
        ids = batch(next_text, tokenizer)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.update(ids.numel())
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
            print(
                json.dumps(
                    {
                        "step": step,
                        "loss": round(loss.item(), 4),
                        "seconds": round(progress.format_dict["elapsed"]),
                    }
                ),
                file=log,
                flush=True,
            )
        if step % CHECKPOINT_EVERY == 0 or step == steps:
            folder = out / f"step-{step:05d}"
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            checkpoints.append(folder)
    progress.close()
    log.close()
    return checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo-model"))
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-compile", action="store_true", help="for machines without a C++ compiler"
    )
    args = parser.parse_args()
    train(args.out, args.corpus, steps=args.steps, seed=args.seed, compiled=not args.no_compile)


if __name__ == "__main__":
    main()
