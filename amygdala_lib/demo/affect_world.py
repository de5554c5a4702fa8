"""The affect world: a probabilistic grammar of little stories that carry an unnamed state.

About half of a story's sentences are *cues*: they can only be said in the story's state. To
predict the next cue, a model has to remember the state through neutral sentences, so the state is
really there to be read and steered. Because the grammar is finite, `classify` tells exactly which
state a written sentence belongs to, or that the grammar cannot write it.

Frames, phrases, settings and names are split three ways: `train`, `validation` (for choosing) and
`test` (for reporting). A held-out cue is a held-out phrase in a held-out frame.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Literal

import yaml

from ..corpus import Concept, Corpus, Text

Split = Literal["train", "validation", "test"]
Role = Literal["opening", "cue", "neutral", "colour", "turn", "anchor"]

KINDS = ("body", "action", "thought", "speech")
HOLES = {"x": "\0", "m": "\1"}  # the phrase and the manner of a frame
PRONOUNS = {
    "she": {"S": "She", "s": "she", "P": "Her", "p": "her", "o": "her"},
    "he": {"S": "He", "s": "he", "P": "His", "p": "his", "o": "him"},
    "i": {"S": "I", "s": "I", "P": "My", "p": "my", "o": "me"},
}
_CHOICE = re.compile(r"\(([^()]*)\)")
_SLOT = re.compile(r"<(\w[,.]?)>")
# A spoken question ends in ?" and its sentence may go on: `"Where is it?" I said.`
_SENTENCE_END = re.compile(r"""(?:(?<=[.?])|(?<=[.?]"))\s+(?=["A-Z])(?!I (?:said|told)(?!,))""")


@dataclass(frozen=True)
class Narrator:
    """Who a story is about: a pronoun set and how it is named (`I` in the first person)."""

    person: Literal["she", "he", "i"]
    name: str


@dataclass(frozen=True)
class Sentence:
    """One sentence of the affect world: its text, what it does, and the state it tells, if any."""

    text: str
    role: Role
    state: str | None = None


@dataclass(frozen=True)
class Frame:
    """A cue frame as it is recognised: its holes in order, and the first letter's case."""

    pattern: re.Pattern
    person: str
    holes: tuple[str, ...]
    opens_with_hole: bool


@dataclass(frozen=True)
class Story:
    """Sentences in order, and the state the story starts in."""

    state: str
    sentences: tuple[Sentence, ...]

    @property
    def text(self) -> str:
        return " ".join(sentence.text for sentence in self.sentences)


class AffectWorld:
    """Writes and recognises the sentences of `affect_world.yaml`."""

    def __init__(self) -> None:
        path = Path(__file__).with_name("affect_world.yaml")
        self.grammar = yaml.safe_load(path.read_text(encoding="utf-8"))
        self.states: list[str] = list(self.grammar["states"])

    # Writing

    def narrator(
        self, rng: random.Random, split: Split = "train", person: str | None = None
    ) -> Narrator:
        person = person or rng.choice(("she", "he", "i"))
        return Narrator(
            person, "I" if person == "i" else rng.choice(self.grammar["names"][person][split])
        )

    def opening(self, rng: random.Random, narrator: Narrator, place: str) -> Sentence:
        template = _placed(rng.choice(self.grammar["openings"]), place)
        return Sentence(self._write(rng, template, narrator), "opening")

    def cue(
        self, rng: random.Random, state: str, narrator: Narrator, split: Split = "train"
    ) -> Sentence:
        """A sentence that can only be said in `state`, all of whose parts are of `split`."""
        kind = rng.choice(KINDS)
        frame = rng.choice(self.grammar["frames"][kind][split])
        entry = self.grammar["states"][state]
        holes = {"x": rng.choice(entry[kind][split]), "m": rng.choice(entry["manner"][split])}
        text = self._write(rng, frame, narrator, split, holes)
        return Sentence(_capitalised(text), "cue", state)

    def neutral(
        self, rng: random.Random, narrator: Narrator, place: str, split: Split = "train"
    ) -> Sentence:
        """A sentence that is as likely in every state."""
        local, anywhere = self.grammar["places"][split][place], self.grammar["neutral"][split]
        template = rng.choice(local if rng.random() < 0.4 else anywhere)
        return Sentence(self._write(rng, template, narrator, split), "neutral")

    def colour(self, rng: random.Random, state: str, narrator: Narrator) -> Sentence:
        """A sentence shared by all states of the same valence or arousal."""
        axes = [axis for axis in ("valence", "arousal") if self.grammar["states"][state][axis]]
        axis = rng.choice(axes)
        templates = self.grammar["colour"][axis][self.grammar["states"][state][axis]]
        return Sentence(self._write(rng, rng.choice(templates), narrator), "colour")

    def story(
        self,
        rng: random.Random,
        state: str,
        split: Split = "train",
        *,
        cue_split: Split | None = None,
        cue_share: float = 0.5,
        turns: float = 0.06,
    ) -> Story:
        """A story of six to ten sentences in `state`, which it never names.

        `cue_share` of its sentences can only be said in this state; `turns` is the chance that the
        state changes once on the way, announced by a turn sentence.
        """
        narrator = self.narrator(rng, split)
        place = rng.choice(list(self.grammar["places"][split]))
        sentences = [self.opening(rng, narrator, place)]
        length, now = rng.randint(6, 10), state
        turn_at = rng.randint(4, length - 1) if rng.random() < turns else None
        for position in range(1, length):
            if position == turn_at:
                now = rng.choice([other for other in self.states if other != state])
                turn = self._write(rng, rng.choice(self.grammar["turns"]), narrator)
                sentences.append(Sentence(turn, "turn", now))
                continue
            sentences.append(
                self._next(
                    rng, sentences, now, narrator, place, split, cue_split or split, cue_share
                )
            )
        return Story(state, tuple(sentences))

    def direct(self, rng: random.Random, state: str, *, cue_share: float = 0.7) -> Story:
        """A first-person text that names its state once: first, in the middle or last."""
        narrator = Narrator("i", "I")
        place = rng.choice(list(self.grammar["places"]["train"]))
        sentences: list[Sentence] = []
        for _ in range(rng.randint(2, 6)):
            sentences.append(
                self._next(rng, sentences, state, narrator, place, "train", "train", cue_share)
            )
        anchor = rng.choice(self.grammar["anchors"]).replace("<state>", state)
        sentences.insert(
            rng.choice((0, 0, len(sentences), len(sentences) // 2)),
            Sentence(anchor, "anchor", state),
        )
        return Story(state, tuple(sentences))

    def stateless(self, rng: random.Random, *, sentences: int = 7) -> str:
        """A text that is as likely in every state."""
        narrator, place = self.narrator(rng), rng.choice(list(self.grammar["places"]["train"]))
        told = [self.opening(rng, narrator, place)]
        while len(told) < sentences:
            sentence = self.neutral(rng, narrator, place)
            if sentence not in told:
                told.append(sentence)
        return " ".join(sentence.text for sentence in told)

    def corpus(self, *, per_state: int = 40, neutral: int = 60, seed: int = 1) -> Corpus:
        """Stories as a corpus, for models that know only this world; `test` ones are held out."""
        rng = random.Random(seed)
        splits: dict[Split, list[Text]] = {"train": [], "test": []}
        for split, texts in splits.items():
            for state in self.states:
                for _ in range(per_state):
                    story = self.story(rng, state, split, turns=0).text
                    path = f"{split}/{state}"
                    texts.append(Text(story, "story", state, None, None, path))
        return Corpus(
            root=Path("affect_world"),
            manifest={state: self._concept(state) for state in self.states},
            concepts=self.states,
            entries=splits["train"],
            neutral=[self.stateless(rng) for _ in range(neutral)],
            heldout=splits["test"],
            min_positives=2,
        )

    def _concept(self, state: str) -> Concept:
        valence, arousal = (self.grammar["states"][state][axis] for axis in ("valence", "arousal"))
        pleasant = {1: "pleasant", 0: "neither pleasant nor not", -1: "unpleasant"}[valence]
        cluster = f"{pleasant}, {'roused' if arousal > 0 else 'quiet'}"
        gloss = "a state of the affect world"
        return Concept(state, gloss, cluster, ("affect_world",), float(valence), float(arousal), ())

    def _next(
        self,
        rng: random.Random,
        told: list[Sentence],
        state: str,
        narrator: Narrator,
        place: str,
        split: Split,
        cue_split: Split,
        cue_share: float,
        colour_share: float = 0.08,
    ) -> Sentence:
        """The next sentence of a text; nothing is told twice."""
        while True:
            draw = rng.random()
            if draw < cue_share:
                sentence = self.cue(rng, state, narrator, cue_split)
            elif draw < cue_share + colour_share:
                sentence = self.colour(rng, state, narrator)
            else:
                sentence = self.neutral(rng, narrator, place, split)
            if sentence not in told:
                return sentence

    def _write(
        self,
        rng: random.Random,
        template: str,
        narrator: Narrator,
        split: Split = "train",
        holes: dict[str, str] | None = None,
    ) -> str:
        def fill(match: re.Match) -> str:
            slot = match[1]
            if slot[0] in HOLES:
                return _spoken(self._write(rng, holes[slot[0]], narrator, split), slot)
            if slot == "N":
                return narrator.name
            if slot == "q":
                pool = self.grammar["names"][rng.choice(("she", "he"))][split]
                return rng.choice([name for name in pool if name != narrator.name])
            return PRONOUNS[narrator.person][slot]

        chosen = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
        return _SLOT.sub(fill, chosen)

    # Recognising

    def classify(self, sentence: str) -> Sentence | None:
        """What a sentence does and which state it tells; None if the grammar cannot write it."""
        key = self._names.sub("@", sentence)
        if key in self._fixed:
            role, state = self._fixed[key]
            return Sentence(sentence, role, state)
        for frame in self._frames:
            match = frame.pattern.fullmatch(key)
            if not match:
                continue
            told = {
                self._phrases[hole, frame.person, frame.opens_with_hole and not index].get(phrase)
                for index, (hole, phrase) in enumerate(
                    zip(frame.holes, match.groups(), strict=True)
                )
            }
            if len(told) == 1 and None not in told:
                return Sentence(sentence, "cue", told.pop())
        return None

    def read(self, text: str) -> list[Sentence | None]:
        """`classify` for each sentence of a text; an unfinished last sentence is left out."""
        return [self.classify(sentence) for sentence in split_sentences(text)]

    @cached_property
    def _names(self) -> re.Pattern:
        names = [
            name
            for group in self.grammar["names"].values()
            for split in group.values()
            for name in split
        ]
        return re.compile(rf"\b(?:{'|'.join(names)})\b")

    @cached_property
    def _fixed(self) -> dict[str, tuple[Role, str | None]]:
        """Every sentence without a cue phrase, names replaced by @."""
        grammar, fixed = self.grammar, {}
        places = [place for split in grammar["places"].values() for place in split]
        for opening, place in product(grammar["openings"], places):
            fixed |= self._all(_placed(opening, place), "opening")
        local = [templates for split in grammar["places"].values() for templates in split.values()]
        for template in (t for group in [*local, *grammar["neutral"].values()] for t in group):
            fixed |= self._all(template, "neutral")
        for template in (
            t for axis in grammar["colour"].values() for sign in axis.values() for t in sign
        ):
            fixed |= self._all(template, "colour")
        for template in grammar["turns"]:
            fixed |= self._all(template, "turn")
        for anchor, state in product(grammar["anchors"], self.states):
            fixed[anchor.replace("<state>", state)] = ("anchor", state)
        return fixed

    def _all(self, template: str, role: Role) -> dict[str, tuple[Role, None]]:
        return {text: (role, None) for person in PRONOUNS for text in _expand(template, person)}

    @cached_property
    def _phrases(self) -> dict[tuple[str, str, bool], dict[str, str]]:
        """Every phrase the grammar can form, and its state: by kind, by person, and by whether the
        phrase opens its sentence and is capitalised."""
        table: dict = {key: {} for key in product((*KINDS, "manner"), PRONOUNS, (False, True))}
        for state, entry in self.grammar["states"].items():
            for kind, person, opens in table:
                for template in (t for split in entry[kind].values() for t in split):
                    for phrase in _expand(template, person):
                        for slot in (",", ".") if kind == "speech" else ("",):
                            spoken = _spoken(phrase, "x" + slot)
                            key = _capitalised(spoken) if opens else spoken
                            owner = table[kind, person, opens].setdefault(key, state)
                            if owner != state:
                                raise ValueError(f"{key!r} is said by both {owner} and {state}")
        return table

    @cached_property
    def _frames(self) -> list[Frame]:
        frames = []
        for kind, person in product(KINDS, PRONOUNS):
            kinds = {HOLES["x"]: kind, HOLES["m"]: "manner"}
            for template in (t for split in self.grammar["frames"][kind].values() for t in split):
                for frame in _expand(template, person):
                    pattern = re.escape(_capitalised(frame))
                    for hole in kinds:
                        pattern = pattern.replace(hole, "(.+)")
                    holes = tuple(kinds[letter] for letter in frame if letter in kinds)
                    frames.append(Frame(re.compile(pattern), person, holes, frame[0] in kinds))
        return frames


def split_sentences(text: str) -> list[str]:
    """The finished sentences of a text."""
    sentences = [part.strip() for part in _SENTENCE_END.split(text.strip())]
    return [s for s in sentences if s.endswith((".", "?", '."', '?"'))]


def _spoken(phrase: str, slot: str) -> str:
    """A phrase with the punctuation its slot asks for; a question keeps its mark."""
    return phrase if phrase.endswith("?") else phrase + slot[1:]


def _placed(opening: str, place: str) -> str:
    """An opening at a place; `place` comes with its preposition."""
    return opening.replace("<the place>", place.partition(" ")[2]).replace("<place>", place)


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _expand(template: str, person: str) -> Iterator[str]:
    """Every sentence a template stands for: names written as @, holes as their control letter."""
    parts = _CHOICE.split(template)
    words = PRONOUNS[person] | {"N": "I" if person == "i" else "@", "q": "@"} | HOLES
    options = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    for choice in product(*options):
        yield _SLOT.sub(lambda match: words[match[1].rstrip(",.")], "".join(choice))
