"""How the texts of a corpus are written: everything about prose that a program can check."""

from __future__ import annotations

import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import snowballstemmer
from sklearn.feature_extraction.text import CountVectorizer

from .corpus_files import HARD_KINDS, Concept, CorpusFiles, Text

WORDS = {  # by kind: fewest and most words
    "story": (50, 150),
    "paired": (50, 150),
    "direct": (30, 80),
    **dict.fromkeys(HARD_KINDS, (15, 90)),
}
AIM = {"stories": 2, "direct": 5, "heldout/stories": 1, "heldout/direct": 1}  # texts per concept
STOCK_WORDS, STOCK_TIMES = 5, 6
SHARED_WORDS = 8
ALIKE = 0.2  # Jaccard index of three-word sequences; unrelated texts stay under 0.02
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_FIRST = frozenset(["i", "me", "my", "mine", "myself", "we", "us", "our", "ours"])
_SECOND = frozenset(["you", "your", "yours", "yourself"])


@dataclass(frozen=True)
class Prose:
    """What was found in the texts of a corpus; `tables` are for reading, `problems` for mending."""

    problems: list[str]
    tables: list[str]

    def report(self) -> str:
        """Tables, then problems, for a terminal."""
        lines = [*self.tables, f"problems of prose: {len(self.problems) or 'none'}"]
        lines += [f"  - {problem}" for problem in self.problems]
        return "\n".join(
            textwrap.fill(line, 100, subsequent_indent="    ", break_on_hyphens=False)
            for line in lines
        )


def check_prose(folder: str | Path) -> Prose:
    """Look for named states, wrong lengths, near-duplicates and stock phrases in a corpus folder.

    Every text is looked at, held-out ones too. Near-duplicates
    are exact: every pair that shares eight words in a row, and every pair whose three-word
    sequences have a Jaccard index of 0.2 or more. (At this size nothing is gained by MinHash, which
    estimates the same index.) Tellings of one scenario may share words: that is their purpose.
    """
    files = CorpusFiles(Path(folder))
    manifest, texts = files.manifest, files.texts
    return Prose(
        problems=[
            *_named_states(manifest, texts),
            *_lengths(texts),
            *_shared_words(texts),
            *_alike(texts),
            *_stock(texts, "begin", lambda words: words[:STOCK_WORDS]),
            *_stock(texts, "end", lambda words: words[-STOCK_WORDS:]),
        ],
        tables=[
            _most_repeated(texts, "beginnings", lambda words: words[:STOCK_WORDS]),
            _most_repeated(texts, "endings", lambda words: words[-STOCK_WORDS:]),
            _narrators(texts),
            _short_of_aim(manifest, texts),
        ],
    )


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))


@cache
def _stem(word: str) -> str:
    return snowballstemmer.stemmer("english").stemWord(word.removesuffix("'s"))


def family_uses(concept: Concept, text: str) -> list[str]:
    """Words of `text` of the concept's word family: its name, inflected, or a `family` word.

    A name of several words (`at_ease`) counts where they stand in this order.
    """
    words = words_of(text)
    stems = [_stem(word) for word in words]
    phrases = [
        [_stem(part) for part in name.split("_")] for name in (concept.name, *concept.family)
    ]
    phrases.sort(key=len, reverse=True)  # grief_stricken before grief: each use is told once
    found, start = [], 0
    while start < len(stems):
        told = next((p for p in phrases if stems[start : start + len(p)] == p), None)
        if told:
            found.append(" ".join(words[start : start + len(told)]))
        start += len(told or " ")
    return found


def _numbered(texts: Sequence[Text]) -> Iterator[tuple[str, Text]]:
    """Each text with the words that point a writer to it."""
    seen: Counter = Counter()
    for text in texts:
        seen[text.path] += 1
        yield f"{text.path}, text {seen[text.path]}", text


def _named_states(manifest: dict[str, Concept], texts: Sequence[Text]) -> Iterator[str]:
    for where, text in _numbered(texts):
        concept = manifest.get(text.concept or "")
        if concept is None or text.kind not in ("story", "paired", "direct"):
            continue
        used = family_uses(concept, text.text)
        allowed = 1 if text.kind == "direct" else 0
        if len(used) > allowed:
            rule = "once at most" if allowed else "not at all"
            yield f"{where}: names its state ({', '.join(used)}); a {text.kind} text may {rule}"


def _lengths(texts: Sequence[Text]) -> Iterator[str]:
    for where, text in _numbered(texts):
        if text.kind in WORDS:
            fewest, most = WORDS[text.kind]
            number = len(text.text.split())
            if not fewest <= number <= most:
                yield f"{where}: {number} words; a {text.kind} text has {fewest} to {most}"


def _may_share(one: Text, other: Text) -> bool:
    return one.scenario is not None and one.scenario == other.scenario


def _shared_words(texts: Sequence[Text]) -> Iterator[str]:
    places: dict[tuple[str, ...], dict[int, None]] = defaultdict(dict)
    numbered = list(_numbered(texts))
    for index, text in enumerate(texts):
        words = words_of(text.text)
        for start in range(len(words) - SHARED_WORDS + 1):
            places[tuple(words[start : start + SHARED_WORDS])][index] = None
    told = set()
    for phrase, found in places.items():
        for pair in combinations(found, 2):
            if pair not in told and not _may_share(texts[pair[0]], texts[pair[1]]):
                told.add(pair)
                (one, _), (other, _) = (numbered[index] for index in pair)
                yield f'{one} and {other} share "{" ".join(phrase)}"'


def _alike(texts: Sequence[Text]) -> Iterator[str]:
    spelled = [" ".join(words_of(text.text)) for text in texts]
    if not any(len(text.split()) >= 3 for text in spelled):
        return
    counter = CountVectorizer(
        ngram_range=(3, 3), binary=True, token_pattern=r"\S+", lowercase=False, dtype="int32"
    )
    shingles = counter.fit_transform(spelled)
    shared = (shingles @ shingles.T).tocoo()
    number = shingles.sum(axis=1).A1
    numbered = list(_numbered(texts))
    for i, j, both in zip(shared.row, shared.col, shared.data, strict=True):
        index = both / (number[i] + number[j] - both)
        if i < j and index >= ALIKE and not _may_share(texts[i], texts[j]):
            yield f"{numbered[i][0]} and {numbered[j][0]} are nearly the same (Jaccard {index:.2f})"


def short_of_aim(manifest: dict[str, Concept], texts: Sequence[Text]) -> dict[str, list[str]]:
    """For each folder: the concepts with fewer texts there than `AIM` asks for."""
    number = Counter(text.path for text in texts)
    return {
        folder: [name for name in manifest if number[f"{folder}/{name}.txt"] < aim]
        for folder, aim in AIM.items()
    }


def _short_of_aim(manifest: dict[str, Concept], texts: Sequence[Text]) -> str:
    short = [
        f"{len(names)} with fewer than {AIM[folder]} in {folder}/ ({_first_of(names)})"
        for folder, names in short_of_aim(manifest, texts).items()
        if names
    ]
    return f"concepts short of texts: {'; '.join(short) or 'none'}"


def _first_of(names: list[str], number: int = 8) -> str:
    return ", ".join(names[:number]) + ", ..." * (len(names) > number)


def _repeated(texts: Sequence[Text], part: Callable[[list[str]], list[str]]) -> Counter:
    return Counter(" ".join(part(words_of(text.text))) for text in texts)


def _stock(
    texts: Sequence[Text], verb: str, part: Callable[[list[str]], list[str]]
) -> Iterator[str]:
    for phrase, times in _repeated(texts, part).items():
        if times > STOCK_TIMES:
            yield f'{times} texts {verb} "{phrase}"; {STOCK_TIMES} at most'


def _most_repeated(texts: Sequence[Text], what: str, part: Callable[[list[str]], list[str]]) -> str:
    top = [f'{times} "{phrase}"' for phrase, times in _repeated(texts, part).most_common(5)]
    return f"most repeated {what}: {', '.join(top)}"


def narrator(text: str) -> str:
    """Who tells a text, by its pronouns: `first`, `second` or `third` person.

    Words in quotation marks are somebody else's and do not count.
    """
    words = words_of(re.sub(r'"[^"]*"', " ", text))
    first = sum(word.split("'")[0] in _FIRST for word in words)
    second = sum(word.split("'")[0] in _SECOND for word in words)
    if first:
        return "first"
    return "second" if second else "third"


def _narrators(texts: Sequence[Text]) -> str:
    stories = [text for text in texts if text.kind == "story"]
    number = Counter(narrator(text.text) for text in stories)
    total = max(1, len(stories))
    shares = ", ".join(f"{n / total:.0%} {person}" for person, n in number.most_common())
    by_concept: dict[str | None, set[str]] = defaultdict(set)
    for text in stories:
        by_concept[text.concept].add(narrator(text.text))
    alike = sum(len(persons) == 1 for persons in by_concept.values())
    return textwrap.shorten(
        f"narrators of stories: {shares or 'none'} person; {alike} of {len(by_concept)} concepts "
        "have all their stories told in the same person",
        200,
    )
