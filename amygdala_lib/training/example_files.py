"""Files of training examples: JSONL of texts, conversations, preferences or token ids."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..artefacts import replacing
from ..errors import TrainingError
from ..models import LanguageModel
from .conversations import from_messages
from .examples import Example, checked, from_text

_FORMS = {
    "context_ids": ({"context_ids", "continuation_ids"}, {"rejected_ids"}),
    "messages": ({"messages"}, {"rejected", "instruction"}),
    "prompt": ({"prompt", "chosen", "rejected"}, set()),
    "context": ({"context", "continuation"}, {"rejected", "instruction"}),
}
"""The fields a line of a file must and may have, by the field its form is known by."""


def read_examples(
    lm: LanguageModel, path: Path | str, *, progress: bool = True, **template: Any
) -> list[Example]:
    """Examples from a JSONL file, one object a line, in any of these forms.

    - `{"context": text, "continuation": text}`, as in `from_text`
    - `{"messages": [...]}`, as in `from_messages`, which gets the further arguments
    - `{"prompt": ..., "chosen": ..., "rejected": ...}`, texts or lists of messages, as TRL has it
    - `{"context_ids": [...], "continuation_ids": [...]}`, as `write_examples` writes it

    The first two may have `rejected` and `instruction`, the last `rejected_ids`, all `source`.
    Empty lines are passed over.

    Raises TrainingError naming every line that is none of these, with its number and all that is
    wrong with it.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read as text ({error}): give a JSONL file") from None
    examples, problems = [], []
    bar = tqdm(
        lines,
        desc=f"reading {path.name}",
        unit="line",
        mininterval=0.1 if sys.stderr.isatty() else 10,
        disable=not progress,
        leave=False,
    )
    for number, line in enumerate(bar, start=1):
        if line.strip():
            try:
                examples.append(_from_line(lm, line, template))
            except TrainingError as error:
                problems += [f"line {number}: {problem}" for problem in str(error).split("\n")]
    if not examples and not problems:
        problems.append("it has no examples")
    if problems:
        raise TrainingError(f"{path} cannot be trained on:\n" + "\n".join(problems))
    return examples


def write_examples(path: Path | str, examples: Iterable[Example]) -> None:
    """Write examples as JSONL of token ids, which `read_examples` reads back as they were."""
    with replacing(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
        for example in examples:
            known = {key: value for key, value in asdict(example).items() if value is not None}
            file.write(json.dumps(known, ensure_ascii=False) + "\n")


def _from_line(lm: LanguageModel, line: str, template: dict[str, Any]) -> Example:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise TrainingError(f"not JSON ({error})") from None
    form = next((key for key in _FORMS if isinstance(fields, dict) and key in fields), None)
    if form is None:
        raise TrainingError(
            f"no example: give an object with {' or '.join(_FORMS)}, see `read_examples`"
        )
    needed, optional = _FORMS[form]
    problems = [f"{name} is missing" for name in sorted(needed - fields.keys())]
    if unknown := sorted(fields.keys() - needed - optional - {"source"}):
        problems.append(f"{', '.join(unknown)}: no such field beside {form}")
    if problems:
        raise TrainingError("\n".join(problems))
    if form == "context_ids":
        as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return checked(lm, Example(**as_tuples))
    if form == "context":
        return from_text(lm, **fields)
    if form == "messages":
        return from_messages(lm, **fields, **template)
    prompt, chosen, rejected = fields["prompt"], fields["chosen"], fields["rejected"]
    if all(isinstance(text, str) for text in (prompt, chosen, rejected)):
        return from_text(lm, prompt, chosen, rejected=rejected, source=fields.get("source"))
    return _from_trl(lm, prompt, chosen, rejected, fields.get("source"), template)


def _from_trl(
    lm: LanguageModel,
    prompt: object,
    chosen: object,
    rejected: object,
    source: str | None,
    template: dict[str, Any],
) -> Example:
    """Conversational preferences: the prompt's messages, then one answer each."""
    answers = (chosen, rejected)
    if not isinstance(prompt, list) or not all(
        isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict)
        for answer in answers
    ):
        raise TrainingError(
            "prompt, chosen and rejected are three texts, or a list of messages and two lists of "
            "one message each"
        )
    kept, refused = (
        from_messages(lm, [*prompt, *answer], source=source, **template) for answer in answers
    )
    return checked(lm, replace(kept, rejected_ids=refused.continuation_ids))
