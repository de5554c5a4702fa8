"""Read the residual stream: one forward per distinct text, cached on disk by content."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from .activation_cache import ActivationCache, Pooled
from .components import SITES, Site, find_output, layers_with
from .corpus import Corpus
from .errors import ModelError
from .models import EMBEDDING, LanguageModel, check_layers, weight_hash

Pool = Literal["last", "mean", "tokens"]
POOLS = ("last", "mean", "tokens")
_CACHE_VERSION = "2"
_MARK = "\ue000"
"""Stands for the text in a chat template; of no language, so no template contains it."""


@dataclass(frozen=True, eq=False)
class Activations:
    """The residual stream of many texts at some layers, or what their heads or neurons put out.

    `acts[layer]` is float32 on the CPU: (n_texts, hidden) for the pools `last` and `mean`, a list
    of (n_tokens, hidden) for `tokens`; rows in the order of `texts`. `residual_norms[layer]` is the
    mean L2 norm over all tokens, the unit steering strengths are given in. At the sites
    `attn_heads` and `mlp_neurons`, heads' outputs side by side or neurons stand for `hidden`.
    """

    texts: list[str]
    layers: list[int]
    pool: Pool
    skip: int
    chat_template: bool
    residual_norms: dict[int, float]
    model_name: str
    model_revision: str
    model_hash: str
    n_layers: int
    reused: int
    _by_layer: dict[int, Tensor | list[Tensor]]
    tokens: list[list[str]] | None = None
    """What each row of the pool `tokens` is the activation of, for each text."""
    site: Site = "residual"

    def __getitem__(
        self, layer: int
    ) -> Float[Tensor, "texts hidden"] | list[Float[Tensor, "tokens hidden"]]:
        if layer not in self._by_layer:
            raise ModelError(
                f"layer {layer} was not captured (layers: {self.layers}): capture it first"
            )
        return self._by_layer[layer]

    def select(self, texts: Collection[str]) -> Activations:
        """The same activations, of these texts only, in the order they are held in.

        `residual_norms` stay those of all texts: they describe the model. Raises ModelError for
        texts that were not captured.
        """
        if absent := set(texts) - set(self.texts):
            shown = _shown(min(absent))
            raise ModelError(f"{len(absent)} texts were not captured ({shown}): capture them first")
        rows = [row for row, text in enumerate(self.texts) if text in set(texts)]
        return replace(
            self,
            texts=[self.texts[row] for row in rows],
            tokens=self.tokens and [self.tokens[row] for row in rows],
            _by_layer={
                layer: [held[row] for row in rows] if isinstance(held, list) else held[rows]
                for layer, held in self._by_layer.items()
            },
        )


def capture(
    lm: LanguageModel,
    texts: Corpus | Sequence[str],
    layers: Iterable[int] | None = None,
    *,
    pool: Pool = "last",
    site: Site = "residual",
    skip: int = 0,
    chat_template: bool = False,
    batch_tokens: int = 4096,
    cache: Path | str | None = "default",
    progress: bool = True,
) -> Activations:
    """Run each distinct text once and keep what `pool` asks for at each layer.

    `layers` are indices of `lm.layers`, with -1 for the embeddings; None gives a spread over depth.
    `last` is the last token, as a readout sees it at decode time; `mean` averages over the tokens
    from the `skip`-th on (all of them in a shorter text); `tokens` keeps every token. Special
    tokens that a tokenizer adds are run but never read.

    `site` is what is read in each layer: `residual`, the stream after the block; `attn_heads`, what
    the heads of its attention or GatedDeltaNet hand to the output projection; `mlp_neurons`, what
    the neurons of its MLP hand to the down projection.

    `chat_template` wraps each text as a user message and still reads the text's own tokens only. It
    is off for good reason: with the template's last token read, vectors encoded "end of turn" and
    had a cosine of 0.003 with the good ones.

    Batches hold up to `batch_tokens` tokens, padding included; results do not depend on it beyond
    rounding. Texts already in `cache` for these very weights are not run again; the default cache
    is `$AMYGDALA_CACHE`, or `runs/cache` in the repository; None turns it off. It is also off while
    hooks are set that may change the model (within `steer`, say): the weights do not tell of them.

    Raises ModelError, before anything is run, for an unknown pool or site, layers the model does
    not have or that lack the site (the neurons of routed experts, say), something that is not a
    text, an empty text, or a text longer than the model can read.
    """
    if isinstance(texts, Corpus):
        texts = texts.texts
    if not isinstance(texts, str):
        texts = list(texts)
    wanted = _check_arguments(lm, texts, layers, pool, site, skip)
    texts = list(dict.fromkeys(texts))
    rows = _tokenize(lm, texts, chat_template)

    model_hash = weight_hash(lm.model)
    setting = json.dumps(
        [_CACHE_VERSION, model_hash, str(lm.dtype), pool, skip if pool == "mean" else 0, site]
    )
    keys = [_text_key(setting, row) for row in rows]
    store = ActivationCache(None if _changed_by_hooks(lm.model) else cache, setting)
    found = store.find(keys, wanted)
    missing = [i for i, key in enumerate(keys) if key not in found]
    if missing:
        fresh = _run(
            lm, [rows[i] for i in missing], wanted, pool, site, skip, batch_tokens, progress
        )
        _refuse_overflow(lm, fresh)
        store.add([keys[i] for i in missing], fresh)
        found |= {keys[i]: pooled for i, pooled in zip(missing, fresh, strict=True)}
    if found and len(missing) < len(texts) and progress:
        reused = len(texts) - len(missing)
        print(f"reused activations of {reused} texts from {store.folder}", file=sys.stderr)

    pooled = [found[key] for key in keys]
    tokens = sum(text.n_tokens for text in pooled)
    by_layer: dict[int, Tensor | list[Tensor]] = {}
    norms = {}
    for layer in wanted:
        values = [text.values[layer] for text in pooled]
        by_layer[layer] = values if pool == "tokens" else torch.stack(values)
        norms[layer] = sum(text.norm_sums[layer] for text in pooled) / tokens
    return Activations(
        texts=texts,
        layers=wanted,
        pool=pool,
        skip=skip,
        chat_template=chat_template,
        residual_norms=norms,
        model_name=lm.name,
        model_revision=lm.revision,
        model_hash=model_hash,
        n_layers=len(lm.layers),
        reused=len(texts) - len(missing),
        _by_layer=by_layer,
        tokens=[_spelt(lm, row) for row in rows] if pool == "tokens" else None,
        site=site,
    )


@contextmanager
def residual_stream(
    lm: LanguageModel, layers: Sequence[int], site: Site = "residual"
) -> Iterator[dict[int, Tensor]]:
    """Within the block, each forward leaves the residual stream of `layers` in the yielded dict.

    Tensors are (batch, tokens, hidden), in the model's dtype, on the layer's device. Another `site`
    gives what that layer's heads or neurons put out.
    """
    stream: dict[int, Tensor] = {}
    hooks = []

    def keep(layer: int):
        def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            stream[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_input(layer: int):
        def hook(module: nn.Module, inputs: tuple, keywords: dict) -> None:
            stream[layer] = inputs[0] if inputs else keywords["hidden_states"]

        return hook

    try:
        for layer in layers:
            if site != "residual":
                module = find_output(lm, layer, site).module
                hooks.append(module.register_forward_pre_hook(keep_input(layer), with_kwargs=True))
            elif layer == EMBEDDING:
                first = lm.layers[0]
                hooks.append(first.register_forward_pre_hook(keep_input(layer), with_kwargs=True))
            else:
                hooks.append(lm.layers[layer].register_forward_hook(keep(layer)))
        yield stream
    finally:
        for hook in hooks:
            hook.remove()


class _Enough(Exception):
    """Ends a forward once the last wanted layer has been read."""


@contextmanager
def _stopping_after(lm: LanguageModel, layer: int) -> Iterator[None]:
    def stop(module: nn.Module, inputs: tuple, output: object) -> None:
        raise _Enough

    hook = lm.layers[max(layer, 0)].register_forward_hook(stop)
    try:
        yield
    finally:
        hook.remove()


class _Row(NamedTuple):
    """A tokenised text: its ids, and which of them belong to the text itself."""

    ids: list[int]
    content: list[bool]


def _check_arguments(
    lm: LanguageModel,
    texts: list[str] | str,
    layers: Iterable[int] | None,
    pool: str,
    site: str,
    skip: int,
) -> list[int]:
    """The layers in order; raises ModelError with all that is wrong with the arguments."""
    problems, wanted = [], []
    if isinstance(texts, str):
        problems.append(f"texts is the one string {_shown(texts)}: give a list, [text]")
    elif wrong := [number for number, text in enumerate(texts) if not isinstance(text, str)]:
        problems.append(f"texts {wrong} are not strings (the first is {texts[wrong[0]]!r})")
    elif not texts:
        problems.append("no texts to capture: give a corpus or a list of at least one text")
    if pool not in POOLS:
        problems.append(f"no pool {pool!r}: choose one of {', '.join(POOLS)}")
    if skip < 0:
        problems.append(f"skip is {skip}: it is how many tokens of a text to pass over, 0 or more")
    if site not in SITES:
        problems.append(f"no site {site!r}: choose one of {', '.join(SITES)}")
    try:
        wanted = check_layers(layers, len(lm.layers))
    except ModelError as error:
        problems.append(str(error))
    if site in SITES and (lacking := sorted({*wanted} - {*layers_with(lm, wanted, site)})):
        problems.append(
            f"layers {lacking} of {lm.name} have no {site} to read (routed experts and the "
            "embeddings have none): leave them out"
        )
    if problems:
        raise ModelError("\n".join(problems))
    return wanted


def _changed_by_hooks(model: nn.Module) -> bool:
    """Whether anyone's hooks but those transformers reads its own outputs with are set."""
    return any(
        not getattr(hook, "__module__", "").startswith("transformers.")
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _tokenize(lm: LanguageModel, texts: list[str], chat_template: bool) -> list[_Row]:
    if chat_template:
        rows = _in_chat(lm, texts)
    else:
        encoded = lm.tokenizer(texts, return_special_tokens_mask=True, return_attention_mask=False)
        rows = [
            _Row(ids, [not special for special in mask])
            for ids, mask in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
        ]
    config = lm.model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
    problems = []
    for number, (text, row) in enumerate(zip(texts, rows, strict=True)):
        if not any(row.content):
            problems.append(f"text {number} ({_shown(text)}) has no tokens: remove it")
        if len(row.ids) > longest:
            problems.append(
                f"text {number} ({_shown(text)}) has {len(row.ids)} tokens, "
                f"{lm.name} reads {longest}: split it"
            )
    if problems:
        raise ModelError("\n".join(problems))
    return rows


def _spelt(lm: LanguageModel, row: _Row) -> list[str]:
    return [lm.tokenizer.decode([i]) for i, own in zip(row.ids, row.content, strict=True) if own]


def _in_chat(lm: LanguageModel, texts: list[str]) -> list[_Row]:
    if lm.tokenizer.chat_template is None:
        raise ModelError(f"{lm.name} has no chat template: leave chat_template off")

    def wrap(text: str) -> str:
        message = [{"role": "user", "content": text}]
        return lm.tokenizer.apply_chat_template(message, tokenize=False)

    # Not the place where the text is found: "user" or "I" stands elsewhere in a template too.
    before, _, after = wrap(_MARK).partition(_MARK)
    bare = [text.strip() for text in texts]  # as many templates do
    wrapped = [wrap(text) for text in bare]
    if rewritten := [t for t, w in zip(bare, wrapped, strict=True) if w != before + t + after]:
        raise ModelError(
            f"the chat template of {lm.name} rewrites {', '.join(map(_shown, rewritten))}: "
            "leave chat_template off"
        )
    encoded = lm.tokenizer(wrapped, add_special_tokens=False, return_offsets_mapping=True)
    start = len(before)
    return [
        _Row(ids, [max(a, start) < min(b, start + len(text)) for a, b in offsets])
        for text, ids, offsets in zip(
            bare, encoded["input_ids"], encoded["offset_mapping"], strict=True
        )
    ]


def _batches(rows: list[_Row], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, longest first: memory runs out soon or never."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids), reverse=True)
    while order:
        size = max(1, batch_tokens // len(rows[order[0]].ids))
        yield order[:size]
        order = order[size:]


def _pad(
    rows: list[_Row], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """Ids, attention mask and content mask, padded right whatever side the tokenizer prefers."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [pad_id] * (width - len(row.ids)) for row in rows])
    mask = torch.tensor([[True] * len(row.ids) + [False] * (width - len(row.ids)) for row in rows])
    content = torch.tensor([row.content + [False] * (width - len(row.content)) for row in rows])
    return ids.to(device), mask.to(device), content.to(device)


@torch.no_grad()
def _run(
    lm: LanguageModel,
    rows: list[_Row],
    layers: list[int],
    pool: Pool,
    site: Site,
    skip: int,
    batch_tokens: int,
    progress: bool,
) -> list[Pooled]:
    results: list[Pooled | None] = [None] * len(rows)
    pad_id = lm.tokenizer.pad_token_id or 0
    bar = tqdm(
        total=sum(len(row.ids) for row in rows),
        desc=f"reading {len(rows)} texts at layers {', '.join(map(str, layers))}",
        unit="token",
        unit_scale=True,
        mininterval=0.1 if sys.stderr.isatty() else 10,
        disable=not progress,
    )
    with bar, residual_stream(lm, layers, site) as stream, _stopping_after(lm, layers[-1]):
        for batch in _batches(rows, batch_tokens):
            ids, mask, content = _pad([rows[i] for i in batch], pad_id, lm.device)
            with suppress(_Enough):
                lm.model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
            for i, pooled in zip(batch, _pool(stream, content, pool, skip), strict=True):
                results[i] = pooled
            stream.clear()
            bar.update(sum(len(rows[i].ids) for i in batch))
    return results


def _pool(
    stream: dict[int, Tensor], content: Bool[Tensor, "batch tokens"], pool: Pool, skip: int
) -> list[Pooled]:
    """Reduce a batch to what is kept of each text, on the CPU in float32."""
    counts = content.sum(1)
    if pool == "mean":
        seen = content.cumsum(1)
        read = content & ((seen > skip) | (counts <= skip)[:, None])
    values, norms = {}, {}
    for layer, hidden in stream.items():
        here = content.to(hidden.device)
        lengths = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
        norms[layer] = (lengths * here).sum(1).cpu()
        if pool == "last":
            positions = torch.arange(here.shape[1], device=here.device)
            last = torch.where(here, positions, -1).amax(1)
            values[layer] = hidden[torch.arange(len(last), device=last.device), last].float().cpu()
        elif pool == "mean":
            weights = (read / read.sum(1, keepdim=True)).to(hidden.device)
            values[layer] = torch.einsum("bt,bth->bh", weights, hidden.float()).cpu()
        else:
            values[layer] = [
                tokens[keep].float().cpu() for tokens, keep in zip(hidden, here, strict=True)
            ]
    return [
        Pooled(
            {layer: rows[i].clone() for layer, rows in values.items()},
            {layer: sums[i].item() for layer, sums in norms.items()},
            int(counts[i]),
        )
        for i in range(len(counts))
    ]


def _refuse_overflow(lm: LanguageModel, fresh: list[Pooled]) -> None:
    totals = [text.norm_sums for text in fresh]
    if wild := [n for n in totals[0] if not all(math.isfinite(total[n]) for total in totals)]:
        raise ModelError(
            f"the residual stream of {lm.name} is not finite at layers {wild}: {lm.dtype} may be "
            "too narrow for it; load the model with dtype=torch.bfloat16 or torch.float32"
        )


def _text_key(setting: str, row: _Row) -> str:
    record = json.dumps([setting, row.ids, [int(c) for c in row.content]])
    return hashlib.sha256(record.encode()).hexdigest()[:32]
