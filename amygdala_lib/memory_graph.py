"""Tagged journal entries as training pairs: JSONL in, JSONL out."""

from __future__ import annotations

import json
import math
import random
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .artefacts import replacing
from .corpus_files import did_you_mean, white_space_normalised
from .errors import CorpusError

HIGHEST_SCORE = 10
_TAG = re.compile(r"([a-z][a-z0-9_-]*):(\S+)")


@dataclass(frozen=True)
class TrainingPair:
    """A text that has the emotion and one that does not."""

    concept: str
    positive: str
    negative: str


@dataclass(frozen=True)
class _Entry:
    text: str
    scores: dict[str, float]
    line: int


def from_memory_graph(
    journal: str | Path,
    out: str | Path | None = None,
    *,
    high: float = 6,
    low: float = 2,
    thresholds: Mapping[str, float] | None = None,
    seed: int = 0,
) -> list[TrainingPair]:
    """Pair journal entries that score high on an emotion with entries that score low on it.

    `journal` is JSONL, one `{"text": "...", "tags": "calm:8 anxious:2"}` a line, scores from 0 to
    10. For each emotion an entry is a positive at or above its threshold (`thresholds`, else
    `high`), a negative at or below `low`, and skipped in between; an entry that does not mention an
    emotion says nothing about it and is skipped too. Every positive comes once; negatives are drawn
    in an order set by `seed`, and again once all were used. `out` receives one JSON object per
    pair, with the keys concept, positive, negative.

    Warns about emotions that lack positives or negatives. Raises CorpusError with every faulty
    line at once; `out` is then left as it was.
    """
    thresholds = dict(thresholds or {})
    journal = Path(journal)
    entries, problems = _read(journal)
    emotions = sorted({emotion for entry in entries for emotion in entry.scores})
    problems += _wrong_thresholds(high, low, thresholds, emotions)
    if problems:
        raise CorpusError(
            f"{journal} cannot be made into pairs, {len(problems)} problem(s):\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    pairs, lacking = [], []
    for emotion in emotions:
        scored = [(e.text, e.scores[emotion]) for e in entries if emotion in e.scores]
        positives = [t for t, score in scored if score >= thresholds.get(emotion, high)]
        negatives = [t for t, score in scored if score <= low]
        if not positives or not negatives:
            lacking.append(f"{emotion} ({len(positives)} positive, {len(negatives)} negative)")
            continue
        random.Random(f"{seed} {emotion}").shuffle(negatives)
        for index, positive in enumerate(positives):
            pairs.append(TrainingPair(emotion, positive, negatives[index % len(negatives)]))
    if lacking:
        warnings.warn(
            f"{journal}: no pairs for {', '.join(lacking)}; tag more entries or move the "
            "thresholds",
            stacklevel=2,
        )
    if out is not None:
        with replacing(Path(out)) as temporary:
            lines = (json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs)
            temporary.write_text("".join(lines), encoding="utf-8")
    return pairs


def _read(journal: Path) -> tuple[list[_Entry], list[str]]:
    """The distinct entries, and what is wrong with any line."""
    try:
        lines = journal.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CorpusError(f"{journal} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{journal} is not UTF-8; save it again as UTF-8") from error
    entries: dict[str, _Entry] = {}
    problems: dict[int, list[str]] = defaultdict(list)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            problems[number].append(f"not JSON: {error.msg}")
            continue
        text = entry.get("text") if isinstance(entry, dict) else None
        tags = entry.get("tags") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text.strip() or not isinstance(tags, str):
            problems[number].append('give {"text": "...", "tags": "calm:8 anxious:2"}')
            continue
        scores, wrong = _scores(tags)
        problems[number] += wrong
        first = entries.setdefault(white_space_normalised(text), _Entry(text, scores, number))
        if first.scores != scores:
            problems[number].append(f"the text of line {first.line} again, with other tags")
    found = [f"line {n}: {message}" for n, wrong in problems.items() for message in wrong]
    return list(entries.values()), found


def _scores(tags: str) -> tuple[dict[str, float], list[str]]:
    scores: dict[str, float] = {}
    wrong = []
    for tag in tags.split():
        match = _TAG.fullmatch(tag)
        if not match:
            wrong.append(f"tag {tag!r}: write emotion:score, such as calm:8")
            continue
        emotion = match[1].replace("-", "_")
        try:
            score = float(match[2])
        except ValueError:
            wrong.append(f"tag {tag!r}: {match[2]!r} is not a number")
            continue
        if not 0 <= score <= HIGHEST_SCORE:  # also refuses nan
            wrong.append(f"tag {tag!r}: scores go from 0 to {HIGHEST_SCORE}")
        elif emotion in scores:
            wrong.append(f"tag {tag!r}: {emotion} is scored twice")
        else:
            scores[emotion] = score
    return scores, wrong


def _wrong_thresholds(
    high: float, low: float, thresholds: dict[str, float], emotions: list[str]
) -> list[str]:
    wrong = [
        f"threshold for {name!r}, which no entry is tagged with{did_you_mean(name, emotions)}"
        for name in thresholds
        if name not in emotions
    ]
    for name, value in {"high": high, **thresholds}.items():
        if not math.isfinite(value) or not low < value <= HIGHEST_SCORE:
            wrong.append(f"{name} is {value:g}: give a score above low ({low:g}), up to 10")
    if not low >= 0:  # nan too
        wrong.append(f"low is {low:g}: give a score from 0")
    return wrong
