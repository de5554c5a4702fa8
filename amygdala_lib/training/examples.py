"""Training examples: token ids of what was said and of what should have been said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from ..errors import TrainingError
from ..models import LanguageModel


@dataclass(frozen=True)
class Example:
    """A context and how it should go on; `rejected_ids` is how it should not.

    The ids are what the model sees: context and continuation one after the other are the tokens of
    the whole text. `source` says where the example comes from.
    """

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...] | None = None
    source: str | None = None


def from_text(
    lm: LanguageModel,
    context: str,
    continuation: str,
    *,
    rejected: str | None = None,
    instruction: str | None = None,
    source: str | None = None,
) -> Example:
    """An example of plain text, for models without a chat template.

    The context begins as the tokenizer begins a text (with BOS, if it has one). Nothing is added at
    the end: write the end token, such as `<|endoftext|>`, where the model should learn to stop.
    `instruction` is a part of the context that brought the continuation about; the example is of
    the context without it.

    Raises TrainingError if the text is one token across the boundary (`"I fe"` and `"el"`, or a
    space at the end of the context), the instruction is not in the context exactly once, or
    `check_examples` would refuse the example.
    """
    given = {"context": context, "continuation": continuation}
    given |= {"rejected": rejected} if rejected is not None else {}
    if wrong := [f"{name} is {v!r}" for name, v in given.items() if not isinstance(v, str)]:
        raise TrainingError(f"{', '.join(wrong)}: give text")
    if instruction is not None:
        context = cut_out(context, only_place(instruction, [context])[1])
    wholes = [context + given[name] for name in ("continuation", "rejected") if name in given]
    context_ids, continuations = tokenized(lm, text_beginning(lm), context, wholes)
    return checked(lm, Example(context_ids, *continuations, source=source))


def check_examples(lm: LanguageModel, examples: Iterable[Example]) -> None:
    """Refuse examples this model cannot be trained on.

    Raises TrainingError naming every one that has an empty continuation, ids that are not in the
    model's vocabulary, more tokens than the model reads, or a rejected answer that is the chosen
    one.
    """
    found = [
        f"example {number}: {problem}"
        for number, example in enumerate(examples)
        for problem in example_problems(lm, example)
    ]
    if found:
        raise TrainingError("\n".join(found))


def checked(lm: LanguageModel, example: Example) -> Example:
    """The example as it is; raises TrainingError with all that is wrong with it."""
    if problems := example_problems(lm, example):
        raise TrainingError("\n".join(problems))
    return example


def tokenized(
    lm: LanguageModel, beginning: tuple[int, ...], context: str, wholes: Sequence[str]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Ids of the context, and of how each whole text goes on from it.

    Raises TrainingError unless the tokens of every whole text begin with those of the context.
    """
    context_ids = (*beginning, *token_ids(lm, context))
    rows = [(*beginning, *token_ids(lm, whole)) for whole in wholes]
    across = [
        f"a token spans the boundary between {context[-30:]!r} and "
        f"{whole[len(context) :][:30]!r}: begin the continuation with a whole word and the space "
        "before it (if a chat template opens a thought there, give an answer with its thought)"
        for whole, row in zip(wholes, rows, strict=True)
        if row[: len(context_ids)] != context_ids
    ]
    if across:
        raise TrainingError("\n".join(across))
    return context_ids, [row[len(context_ids) :] for row in rows]


def token_ids(lm: LanguageModel, text: str) -> list[int]:
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"]


def text_beginning(lm: LanguageModel) -> tuple[int, ...]:
    """What the tokenizer puts before a text: BOS, or nothing."""
    encoded = lm.tokenizer("a", return_special_tokens_mask=True)
    marked = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return tuple(token for token, _ in takewhile(lambda pair: pair[1], marked))


def end_ids(lm: LanguageModel) -> set[int]:
    """The tokens after which this model is done: end of text, end of turn."""
    ends = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    return {*ends, lm.tokenizer.eos_token_id} - {None}


def example_problems(lm: LanguageModel, example: Example) -> list[str]:
    """Why this model cannot be trained on the example; see `check_examples`."""
    problems = []
    known = lm.model.get_input_embeddings().num_embeddings
    named = {
        "context_ids": example.context_ids,
        "continuation_ids": example.continuation_ids,
        "rejected_ids": () if example.rejected_ids is None else example.rejected_ids,
    }
    for name, ids in named.items():
        if not isinstance(ids, tuple) or not all(type(token) is int for token in ids):
            problems.append(f"{name} must be whole numbers, not {str(ids)[:60]}")
        elif outside := [token for token in ids if not 0 <= token < known]:
            problems.append(f"{name} {outside} are not in the vocabulary of 0 to {known - 1}")
    if problems:
        return problems
    if not example.continuation_ids:
        problems.append("the continuation is empty: there is nothing to train")
    elif not example.context_ids and min(map(len, filter(None, named.values()))) == 1:
        problems.append("one token and no context: nothing predicts it")
    if example.rejected_ids == ():
        problems.append("the rejected continuation is empty: leave it out, or say what it is")
    elif example.rejected_ids == example.continuation_ids:
        problems.append("the chosen and the rejected continuation are the same")
    longest = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    length = len(named["context_ids"]) + max(
        len(named["continuation_ids"]), len(named["rejected_ids"])
    )
    if longest is not None and length > longest:
        problems.append(f"{length} tokens, but {lm.name} reads {longest}: shorten the context")
    return problems


def only_place(instruction: object, texts: Sequence[object]) -> tuple[int, slice]:
    """Which text the instruction is in, and where, without the space around it."""
    wanted = instruction.strip() if isinstance(instruction, str) else ""
    if not wanted:
        raise TrainingError(f"the instruction is {instruction!r}: give the text that is to go")
    counts = [text.count(wanted) if isinstance(text, str) else 0 for text in texts]
    if sum(counts) != 1:
        raise TrainingError(
            f"the instruction {wanted[:60]!r} is {sum(counts)} times in the context, which must "
            "hold it exactly once"
        )
    place = counts.index(1)
    start = texts[place].index(wanted)
    return place, slice(start, start + len(wanted))


def cut_out(text: str, span: slice) -> str:
    """`text` without the span, and without one of the two spaces that would then meet."""
    before, after = text[: span.start], text[span.stop :]
    if not after.strip():
        return before.rstrip() + after if before.strip() else after.lstrip()
    return before + after.lstrip() if not before or before[-1].isspace() else before + after
