"""Conversations as training examples, in the model's chat template, with or without instruction."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from ..errors import TrainingError
from ..models import LanguageModel
from .examples import Example, checked, cut_out, end_ids, only_place, tokenized

Message = Mapping[str, Any]
"""A turn of a conversation as chat templates take it: `{"role": "user", "content": "..."}`."""

_MARK = "\ue000"
"""Stands for the instruction in a chat template; of no language, so no template contains it."""


def from_messages(
    lm: LanguageModel,
    messages: Sequence[Message],
    *,
    rejected: str | None = None,
    instruction: str | None = None,
    source: str | None = None,
    **template: Any,
) -> Example:
    """An example of a conversation in the model's chat template; the last message is the answer.

    The context ends with the generation prompt, the continuation with the token that ends a turn.
    `rejected` is what the answer should not have been. Further arguments go to the template
    (`enable_thinking=False`, `tools=...`).

    `instruction` is a message, or a part of one, that brought the answer about; the example is of
    the conversation without it (context distillation: Snell et al. 2022, arXiv 2209.15189). It is
    checked on the rendered text that only the instruction went, with the frame of its message if
    it was all of it.

    Raises TrainingError if the model has no chat template, the messages do not end with an answer,
    the template refuses them, or what it renders for the whole does not begin with the context (a
    template that opens a thought for the model but leaves it out of a finished answer); if more
    than the instruction went, or something came in its place (a template's own system prompt); or
    if `check_examples` would refuse the example.
    """
    if problems := _message_problems(lm, messages, rejected):
        raise TrainingError("\n".join(problems))
    *context, answer = messages
    if instruction is not None:
        context = _strip(lm, context, answer, instruction, template)
    answers = [answer]
    if rejected is not None:
        answers.append({"role": "assistant", "content": rejected})
    opening = _render(lm, context, template, prompt=True)
    wholes = [_render(lm, [*context, answer], template) for answer in answers]
    for whole in wholes:
        if not whole.startswith(opening):
            shared = len(os.path.commonprefix([opening, whole]))
            raise TrainingError(
                f"the chat template of {lm.name} asks for an answer with {opening[shared:]!r}, but "
                f"a finished answer goes on with {whole[shared:][:60]!r} there: pass options for "
                "the template (enable_thinking=False, say), or give the answer with its thought"
            )
    context_ids, continuations = tokenized(lm, (), opening, wholes)
    turns = [_until_end_of_turn(lm, ids) for ids in continuations]
    return checked(lm, Example(context_ids, *turns, source=source))


def _message_problems(lm: LanguageModel, messages: object, rejected: object) -> list[str]:
    if lm.tokenizer.chat_template is None:
        return [f"{lm.name} has no chat template: give `context` and `continuation` as plain text"]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return [f"messages are a list of at least one message, not {str(messages)[:60]}"]
    problems = [
        f"message {number} has no role or no content: {str(message)[:60]}"
        for number, message in enumerate(messages)
        if not isinstance(message, Mapping)
        or not isinstance(message.get("role"), str)
        or not (message.get("content") is not None or message.get("tool_calls"))
    ]
    if problems:
        return problems
    last = messages[-1]
    if last["role"] != "assistant":
        problems.append(f"the last message is of the {last['role']}, not the assistant's answer")
    if not (last.get("tool_calls") or str(last.get("content") or "").strip()):
        problems.append("the answer is empty: there is nothing to train")
    if rejected is not None and not (isinstance(rejected, str) and rejected.strip()):
        problems.append(f"the rejected answer is {rejected!r}: leave it out, or give its text")
    return problems


def _render(
    lm: LanguageModel,
    messages: Sequence[Message],
    template: Mapping[str, Any],
    *,
    prompt: bool = False,
) -> str:
    try:
        return lm.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, **template
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise TrainingError(
            f"the chat template of {lm.name} refuses these messages: {error}"
        ) from error


def _strip(
    lm: LanguageModel,
    context: list[Message],
    answer: Message,
    instruction: str,
    template: Mapping[str, Any],
) -> list[Message]:
    """The messages without the instruction; refused unless only that goes from what is rendered."""
    place, span = only_place(instruction, [message.get("content") for message in context])
    host = context[place]
    rest = cut_out(host["content"], span)
    is_part = bool(rest.strip())
    without = [{**host, "content": rest}] if is_part else []
    bare = [*context[:place], *without, *context[place + 1 :]]
    marked = host["content"][: span.start] + _MARK + host["content"][span.stop :]
    stand_in = [*context[:place], {**host, "content": marked}, *context[place + 1 :]]

    before = _render(lm, context, template, prompt=True)
    framed = _render(lm, stand_in, template, prompt=True)
    after = _render(lm, bare, template, prompt=True)
    if before != framed.replace(_MARK, instruction.strip()):
        raise TrainingError(
            f"the chat template of {lm.name} rewrites {instruction.strip()[:60]!r}: word the "
            "instruction as the template leaves it"
        )
    start = len(os.path.commonprefix([framed, after]))
    end = start + len(framed) - len(after)
    if end < start or framed[end:] != after[start:]:
        raise TrainingError(
            f"without the instruction, the chat template of {lm.name} puts "
            f"{after[start:][:80]!r} there: if that should stand there, write it into the message "
            "too, before the instruction"
        )
    if more := _beyond_frame(
        lm, framed[start:end].replace(_MARK, ""), "" if is_part else host["role"]
    ):
        raise TrainingError(
            f"with the instruction, the chat template of {lm.name} also leaves out {more!r}: write "
            "the instruction into a message that stays"
        )
    answered = [_render(lm, [*turns, answer], template) for turns in (context, bare)]
    if answered[0][len(before) :] != answered[1][len(after) :]:
        raise TrainingError(
            f"without the instruction, the chat template of {lm.name} renders another answer"
        )
    return bare


def _beyond_frame(lm: LanguageModel, text: str, role: str) -> str:
    """What of `text` is more than the special tokens, signs and role name around a message."""
    for token in _special_tokens(lm).values():
        text = text.replace(token, "")
    left = re.sub(r"[\W_]+", "", text).casefold()
    name, short = (re.escape(word.casefold()) for word in (role, role[:3]))
    # Llama 2 frames its system message in <<SYS>>.
    return "" if re.fullmatch(f"({name}|{short})*", left) else text.strip()


def _until_end_of_turn(lm: LanguageModel, ids: tuple[int, ...]) -> tuple[int, ...]:
    """Without the line break that many templates put after the end of a turn.

    A model never writes it: it has stopped by then.
    """
    ends = end_ids(lm) | _special_tokens(lm).keys()
    last = max((place for place, token in enumerate(ids) if token in ends), default=len(ids))
    return ids if lm.tokenizer.decode(ids[last + 1 :]).strip() else ids[: last + 1]


def _special_tokens(lm: LanguageModel) -> dict[int, str]:
    added = lm.tokenizer.added_tokens_decoder
    return {number: token.content for number, token in added.items() if token.special}
