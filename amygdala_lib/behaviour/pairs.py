"""A behaviour: conversations with two ways to go on, as a folder of YAML that people write."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import PreTrainedTokenizerBase

from ..artefacts import repository_root
from ..corpus_files import CorpusLoader, did_you_mean, white_space_normalised
from ..errors import CorpusError, ModelError

Split = Literal["train", "held_out", "control"]
SPLITS: tuple[Split, ...] = ("train", "held_out", "control")
CHAT_ROLES = {"person": "user", "assistant": "assistant"}
FEWEST = 2
"""Pairs besides mirrors that `train` and `held_out` need, so that one can be left out."""
_SNAKE_CASE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


@dataclass(frozen=True)
class Turn:
    """What one side of a conversation said; `role` is `person` or `assistant`."""

    role: str
    text: str


@dataclass(frozen=True)
class Pair:
    """A conversation that waits for an answer, and an answer at each pole, in their order.

    A mirror has another conversation and the answers of the pair `mirror_of` the other way round.
    """

    id: str
    split: Split
    context: tuple[Turn, ...]
    answers: tuple[str, str]
    mirror_of: str | None = None

    @property
    def group(self) -> str:
        """What it shares with its mirrors: together they are one observation, not several."""
        return self.mirror_of or self.id


@dataclass(frozen=True, eq=False)
class Behaviour:
    """Two poles, each with a description, and the pairs that show them.

    `train` makes the direction, `held_out` tries it; in `control` the first pole is the wrong
    thing to do.
    """

    root: Path
    poles: dict[str, str]
    pairs: list[Pair]

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def train(self) -> list[Pair]:
        return self.of("train")

    @property
    def held_out(self) -> list[Pair]:
        return self.of("held_out")

    @property
    def control(self) -> list[Pair]:
        return self.of("control")

    def of(self, split: Split) -> list[Pair]:
        """The pairs of one split, in the order of its file."""
        return [pair for pair in self.pairs if pair.split == split]

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) over poles and pairs, whatever folder they lie in."""
        pairs = [
            [p.id, p.split, [[t.role, t.text] for t in p.context], p.answers, p.mirror_of]
            for p in self.pairs
        ]
        return hashlib.sha256(json.dumps([list(self.poles), pairs]).encode()).hexdigest()

    def summary(self) -> str:
        """What it holds, in one line."""
        counts = ", ".join(f"{len(self.of(split))} {split}" for split in SPLITS)
        mirrors = sum(pair.mirror_of is not None for pair in self.pairs)
        return (
            f"{self.name}, {' against '.join(self.poles)}: {counts} pairs, "
            f"{mirrors} of them mirrors; hash {self.hash[:8]}"
        )


def rendered(
    context: Sequence[Turn], answer: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[str, str]:
    """A conversation up to the answer, and the answer as it follows: joined, what a model reads.

    Raw, as `Person: ...` and `Assistant: ...` paragraphs; or, given a tokenizer, by its chat
    template, where thinking, if the model does any, is over. Nothing follows the answer: an
    end-of-turn token would be the same after every one.

    Raises ModelError if the tokenizer has no chat template.
    """
    if tokenizer is None:
        turns = [f"{turn.role.capitalize()}: {turn.text}" for turn in context]
        return "\n\n".join([*turns, "Assistant:"]), f" {answer}"
    if tokenizer.chat_template is None:
        raise ModelError("this model has no chat template: leave chat_template off")
    messages = [{"role": CHAT_ROLES[turn.role], "content": turn.text} for turn in context]
    before = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return before, answer


def load_behaviour(folder: str | Path) -> Behaviour:
    """Read a behaviour, or raise CorpusError with everything that is wrong with it.

    The folder holds `behaviour.yaml` (`version: 1` and two `poles`, each with a description) and
    lists of pairs in `train.yaml`, `held_out.yaml` and, if there are any, `control.yaml`; the
    README.md of `corpus/behaviours/listening` shows the form. A relative path is looked for here,
    then in the repository.
    """
    root = Path(folder).expanduser()
    if not root.exists() and (repository_root() / root).is_dir():
        root = repository_root() / root  # notebooks run in their own folder
    reader = _Reader(root)
    if reader.problems:
        raise CorpusError(
            f"the behaviour in {root} has {len(reader.problems)} problem(s):\n"
            + "\n".join(f"  - {problem}" for problem in reader.problems)
        )
    return Behaviour(root.resolve(), reader.poles, reader.pairs)


class _Reader:
    """What a behaviour's folder holds: `poles`, `pairs`, and all `problems` with either."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[str] = []
        self.poles: dict[str, str] = {}
        self.pairs: list[Pair] = []
        if not root.is_dir():
            self.problems.append(f"no folder {root}: give one that holds behaviour.yaml")
            return
        self.poles = self._read_poles()
        for split in SPLITS if self.poles else ():
            self._read_split(split)
        self.problems += self._repeated()
        expected = {"behaviour.yaml", *(f"{split}.yaml" for split in SPLITS)}
        for path in sorted({*root.glob("*.y*ml")}):
            if path.name not in expected:
                hint = did_you_mean(path.name, expected)
                self.problems.append(f"{path.name}: unexpected here{hint}; name it or move it")

    def _read_poles(self) -> dict[str, str]:
        content = self._yaml("behaviour.yaml")
        if content is None:
            return {}
        content = content if isinstance(content, dict) else {}
        wrong = []
        if content.get("version") != 1:
            wrong.append(f"version is {content.get('version')!r}; this library reads `version: 1`")
        if unknown := sorted(map(str, set(content) - {"version", "poles"})):
            wrong.append(f"unknown fields {', '.join(unknown)}")
        poles = content.get("poles")
        described = isinstance(poles, dict) and all(
            isinstance(name, str) and _SNAKE_CASE.fullmatch(name) and _is_text(text)
            for name, text in poles.items()
        )
        if not described or len(poles) != 2 or {*poles} & {"id", "context", "mirror_of"}:
            wrong.append(f"poles is {poles!r}: map two names in snake_case, each to what it means")
        self.problems += [f"behaviour.yaml: {problem}" for problem in wrong]
        return {} if wrong else poles

    def _read_split(self, split: Split) -> None:
        name = f"{split}.yaml"
        if split == "control" and not (self.root / name).exists():
            return
        if (content := self._yaml(name)) is None:
            return
        if not isinstance(content, list):
            self.problems.append(f"{name}: must be a list of pairs, each with `- id: ...`")
            return
        entries = []
        for number, entry in enumerate(content, 1):
            wrong = list(self._wrong_entry(entry))
            label = entry["id"] if isinstance(entry, dict) and "id" in entry else f"pair {number}"
            self.problems += [f"{name}, {label}: {problem}" for problem in wrong]
            if not wrong:
                entries.append(entry)
        answered = sum("mirror_of" not in entry for entry in content if isinstance(entry, dict))
        if split != "control" and answered < FEWEST:
            self.problems.append(
                f"{name}: {answered} pairs besides mirrors, needs {FEWEST} or more"
            )
        if len(entries) == len(content):
            self._add(split, entries)

    def _add(self, split: Split, entries: list[dict]) -> None:
        """Turn entries whose fields are right into pairs; a mirror takes another one's answers."""
        answered = {entry["id"]: entry for entry in entries if "mirror_of" not in entry}
        for entry in entries:
            mirrored = entry.get("mirror_of")
            if mirrored is not None and mirrored not in answered:
                self.problems.append(
                    f"{split}.yaml, {entry['id']}: mirror_of names {mirrored!r}, which is no pair "
                    f"with answers in this file{did_you_mean(mirrored, answered)}"
                )
                continue
            source = answered[mirrored or entry["id"]]
            first, second = (source[pole].strip() for pole in self.poles)
            turns = (next(iter(turn.items())) for turn in entry["context"])
            self.pairs.append(
                Pair(
                    id=entry["id"],
                    split=split,
                    context=tuple(Turn(role, text.strip()) for role, text in turns),
                    answers=(second, first) if mirrored else (first, second),
                    mirror_of=mirrored,
                )
            )

    def _wrong_entry(self, entry: object) -> Iterator[str]:
        if not isinstance(entry, dict):
            yield f"is {entry!r}: give id, context and {', '.join(self.poles)}"
            return
        answers = {"mirror_of"} if "mirror_of" in entry else {*self.poles}
        if "mirror_of" in entry and {*self.poles} & {*entry}:
            yield "has mirror_of and answers too: a mirror takes those of the other pair"
            return
        known = {"id", "context", *answers}
        for field in sorted(map(str, set(entry) - known)):
            yield f"unknown field {field!r}{did_you_mean(field, known)}"
        if not (_is_text(entry.get("id")) and _SNAKE_CASE.fullmatch(entry["id"])):
            yield f"id is {entry.get('id')!r}: give a name in snake_case"
        for field in sorted(answers):
            if not _is_text(entry.get(field)):
                yield f"{field} is {entry.get(field)!r}: give a text"
        yield from _wrong_context(entry.get("context"))

    def _repeated(self) -> Iterator[str]:
        """Ids and texts that stand twice, in whatever files."""
        for name, number in Counter(pair.id for pair in self.pairs).items():
            if number > 1:
                yield f"{name}: {number} pairs have this id, give each its own"
        seen: dict[str, str] = {}
        for pair in self.pairs:
            before = "\n".join(f"{turn.role}: {turn.text}" for turn in pair.context)
            for text in (before, *(() if pair.mirror_of else pair.answers)):
                key = white_space_normalised(text)
                if key in seen:
                    yield (
                        f"{pair.id}: has a text of {seen[key]} again: {key[:40]!r}; write another, "
                        "or use mirror_of for the same answers in a new conversation"
                    )
                seen.setdefault(key, pair.id)

    def _yaml(self, name: str) -> Any:
        """The content of a file; None, and a problem, if it cannot be had."""
        try:
            source = (self.root / name).read_bytes().decode("utf-8")
            content = yaml.load(source, Loader=CorpusLoader)
        except FileNotFoundError:
            self.problems.append(f"{name} is missing")
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.problems.append(f"{name} cannot be read: {' '.join(str(error).split())}")
        else:
            return {} if content is None else content
        return None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _wrong_context(context: object) -> Iterator[str]:
    if not isinstance(context, list) or not context:
        yield f"context is {context!r}: give a list of turns, such as `- person: ...`"
        return
    roles = []
    for turn in context:
        if not isinstance(turn, dict) or len(turn) != 1 or not _is_text(*turn.values()):
            yield f"a turn is {turn!r}: give one role and a text"
            return
        roles += turn
    expected = ["person", "assistant"] * len(roles)
    if roles != expected[: len(roles)] or roles[-1] != "person":
        yield f"turns of {', '.join(map(str, roles))}: they alternate and end with a person's"
