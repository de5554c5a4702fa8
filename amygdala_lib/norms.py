"""Norms: ratings of words by people, from files that everyone has to fetch for themselves."""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from .errors import AmygdalaError


@dataclass(frozen=True)
class NormsFormat:
    """What a published file looks like, what may be done with it, and where it is to be had.

    `columns` are the file's names of valence, arousal and dominance, of which the last may be
    absent; `entry` the column of what was rated. Names of columns are compared in lower case.
    """

    entry: tuple[str, ...]
    columns: tuple[str, str, str]
    separator: str
    scale: Callable[[str], tuple[float, float]]
    licence: str
    source: str
    sentences: bool = False


FORMATS = {
    "warriner": NormsFormat(
        entry=("word",),
        columns=("v.mean.sum", "a.mean.sum", "d.mean.sum"),
        separator=",",
        scale=lambda entry: (1, 9),
        licence=(
            "Warriner, Kuperman and Brysbaert (2013): CC BY-NC-ND 3.0, not for commercial use, "
            "not to be passed on in changed form"
        ),
        source="Ratings_Warriner_et_al.csv at https://crr.ugent.be/archives/1003",
    ),
    "nrc-vad": NormsFormat(
        entry=("word", "term"),
        columns=("valence", "arousal", "dominance"),
        separator="\t",
        # The first version is headed Word and goes from 0; the second, headed term, from -1.
        scale=lambda entry: (0, 1) if entry == "word" else (-1, 1),
        licence=(
            "NRC VAD Lexicon, Mohammad (2018, 2025): free for research, commercial use by "
            "agreement with the NRC, not to be passed on"
        ),
        source="NRC-VAD-Lexicon*.txt at https://saifmohammad.com/WebPages/nrc-vad.html",
    ),
    "emobank": NormsFormat(
        entry=("text",),
        columns=("v", "a", "d"),
        separator=",",
        scale=lambda entry: (1, 5),
        licence="EmoBank, Buechel and Hahn (2017): CC BY-SA 4.0, to be shared alike, with credit",
        source="corpus/emobank.csv at https://github.com/JULIELab/EmoBank",
        sentences=True,
    ),
}

RATINGS = ("valence", "arousal", "dominance")

OTHER_SPELLINGS = {
    "awestruck": ("awe-struck", "awestricken"),
    "cozy": ("cosy",),
    "dumbstruck": ("dumb-struck",),
    "grief_stricken": ("griefstricken",),
    "heartbroken": ("broken-hearted", "brokenhearted"),
    "on_edge": ("edgy",),
    "panicked": ("panic-stricken",),
    "skeptical": ("sceptical",),
    "worn_out": ("wornout",),
}
"""Tried when a concept's own name is not rated: the same word otherwise spelt or formed."""

OTHER_WORDS = {
    "han": "a Korean grief, not the surname",
    "naz": "the airs of one who knows they are loved (Persian and Urdu), not the name",
    "song": "an Ifaluk anger at a wrong, not something sung",
    "ubuntu": "being a person through others, not the software",
}
"""Concepts whose name means something else in English: a rating of that would be of no use."""


def load_norms(path: Path | str, format: str | None = None) -> pd.DataFrame:
    """Ratings from a downloaded file, rescaled linearly to [-1, 1]: valence, arousal, dominance.

    The index, `word`, is in lower case; for the sentences of EmoBank it is `text`, as written.
    Dominance is there if the file has it. `format` is one of "warriner" (1 to 9), "nrc-vad" (0 to
    1 in version 1, -1 to 1 in versions 2 and 2.1) and "emobank" (1 to 5); None tells them apart by
    their first line. Something rated several times gets the mean, with a warning. The licence is
    said on stderr: none of these files comes with this library.

    Raises AmygdalaError with all that is wrong: no such file (and where to get it), an unknown
    format, absent columns, ratings that are missing or outside the scale, rows without a word.
    """
    path = Path(path).expanduser()
    if format is not None and format not in FORMATS:
        raise AmygdalaError(f"no format {format!r}: choose one of {', '.join(FORMATS)}, or None")
    if not path.is_file():
        wanted = [format] if format else list(FORMATS)
        raise AmygdalaError(
            f"no file {path}: norms are not part of this library, download them yourself:\n"
            + "\n".join(f"  {n}: {FORMATS[n].source} ({FORMATS[n].licence})" for n in wanted)
        )
    header = _first_line(path)
    name = format or _detected(path, header)
    form = FORMATS[name]
    table = _read(path, name)
    norms = _rescaled(path, name, table)
    print(f"{name}: {form.licence}", file=sys.stderr)
    if repeated := int(norms.index.duplicated().sum()):
        shown = ", ".join(map(repr, norms.index[norms.index.duplicated()].unique()[:5]))
        warnings.warn(
            f"{path}: {repeated} rows repeat an earlier {norms.index.name} ({shown}): "
            "the mean is taken",
            stacklevel=2,
        )
        norms = norms.groupby(level=0, sort=False).mean()
    return norms


def match_norms(concepts: Sequence[str], norms: pd.DataFrame) -> pd.DataFrame:
    """The ratings of concepts, as far as there are any: concepts by columns of `norms`, and `word`.

    A concept is looked for as its name with spaces for underscores, then with hyphens, then in
    `OTHER_SPELLINGS`: always the whole entry, in lower case. `word` is the entry that was found;
    where there is none it is missing and the ratings are NaN. Concepts in `OTHER_WORDS` are not
    looked for; words of two meanings, such as content or kind, have one rating for both. How many
    were found is said on stderr. Raises AmygdalaError for norms of sentences, norms with several
    rows for a word, and a concept given twice.
    """
    problems = []
    if norms.index.name == "text":
        problems.append("these are norms of sentences: concepts need norms of words")
    if not norms.index.is_unique:
        problems.append(
            f"the norms have several rows for {norms.index[norms.index.duplicated()][0]!r}: "
            "use load_norms, or norms.groupby(level=0).mean()"
        )
    if repeated := sorted({name for name in concepts if list(concepts).count(name) > 1}):
        problems.append(f"concepts given more than once: {', '.join(repeated)}")
    if problems:
        raise AmygdalaError("\n".join(problems))
    words = [_found(concept, norms.index) for concept in concepts]
    matched = norms.reindex(words).set_axis(pd.Index(concepts, name="concept"))
    matched["word"] = pd.Series(words, index=matched.index, dtype=object)
    missing = [c for c, word in zip(concepts, words, strict=True) if word is None]
    message = f"norms for {len(words) - len(missing)} of {len(words)} concepts"
    if missing:
        more = f" and {len(missing) - 12} more" if len(missing) > 12 else ""
        message += f"; none for {', '.join(missing[:12])}{more}"
    print(message, file=sys.stderr)
    return matched


def _found(concept: str, words: pd.Index) -> str | None:
    if concept in OTHER_WORDS:
        return None
    name = concept.lower()
    tried = (name.replace("_", " "), name.replace("_", "-"), *OTHER_SPELLINGS.get(name, ()))
    return next((word for word in tried if word in words), None)


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.readline().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise AmygdalaError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error


def _columns(header: str, separator: str) -> list[str]:
    row = header.split("\t") if separator == "\t" else next(csv.reader([header]), [])
    return [name.strip().lower() for name in row]


def _detected(path: Path, header: str) -> str:
    for name, form in FORMATS.items():
        columns = _columns(header, form.separator)
        if {*form.columns[:2]} <= {*columns} and {*form.entry} & {*columns}:
            return name
    known = "\n".join(
        f"  {name}: {form.separator.join((' or '.join(form.entry), *form.columns))!r}"
        for name, form in FORMATS.items()
    )
    raise AmygdalaError(
        f"{path} begins with {header[:80]!r}, which is none of the known headers (in any case, "
        f"with other columns among them):\n{known}\nGive the original file, with its first line"
    )


def _read(path: Path, name: str) -> pd.DataFrame:
    separator = FORMATS[name].separator
    try:
        # All as text: "null" and "nan" are words, and a quote in a tab-separated file is a quote.
        table = pd.read_csv(
            path,
            sep=separator,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
            quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL,
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise AmygdalaError(
            f"{path} cannot be read as {name} ({error}): download it anew"
        ) from None
    return table.rename(columns=lambda column: str(column).strip().lower())


def _rescaled(path: Path, name: str, table: pd.DataFrame) -> pd.DataFrame:
    """The ratings of the table by entry; raises with everything in it that is not as it should."""
    form, problems = FORMATS[name], []
    entry = next((column for column in form.entry if column in table.columns), None)
    if entry is None:
        problems.append(f"no column {' or '.join(form.entry)}")
    problems += [f"no column {column}" for column in form.columns[:2] if column not in table]
    if problems:
        there = ", ".join(table.columns)
        problems.append(f"it has the columns {there}: choose another format, or download it anew")
    elif table.empty:
        problems.append("it has no rows after the first line: download it anew")
    else:
        entries = table[entry].str.strip()
        if len(empty := np.flatnonzero(entries == "")):
            problems.append(f"no {entry} in {_lines(empty)}: remove them")
    low, high = form.scale(entry or form.entry[0])
    ratings = {}
    for rating, column in zip(RATINGS, form.columns, strict=True):
        if column not in table:
            continue
        values = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float)
        if len(bad := np.flatnonzero(~np.isfinite(values))):
            problems.append(f"{column} is not a number in {_lines(bad)}: mend or remove them")
        if len(bad := np.flatnonzero((values < low) | (values > high))):
            problems.append(
                f"{column} is outside {low:g} to {high:g} in {_lines(bad)} (first: "
                f"{values[bad[0]]:g}): is this file {name}, as downloaded?"
            )
        ratings[rating] = 2 * (values - low) / (high - low) - 1
    if problems:
        raise AmygdalaError(
            f"{path} is not usable as {name}:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    index = entries.rename("text") if form.sentences else entries.str.lower().rename("word")
    return pd.DataFrame(ratings).set_axis(pd.Index(index))


def _lines(rows: np.ndarray) -> str:
    """`line 3`, or `5 rows (lines 2, 3, ...)`, counted from the header as 1."""
    numbers = [int(row) + 2 for row in rows]
    if len(numbers) == 1:
        return f"line {numbers[0]}"
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"{len(numbers)} rows (lines {shown})"
