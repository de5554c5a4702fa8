"""The files of a corpus folder: texts with their labels, and whatever is wrong with any file."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

Kind = Literal["story", "direct", "paired", "neutral", "negated", "mentioned", "observed"]
KINDS: tuple[Kind, ...] = ("story", "direct", "paired")
HARD_KINDS: tuple[Kind, ...] = ("negated", "mentioned", "observed")
_POSITIVES: dict[str, Kind] = {"stories": "story", "direct": "direct"}
_HARD_NEGATIVES: dict[str, Kind] = {kind: kind for kind in HARD_KINDS}
_FOLDERS = {"stories", "direct", "paired", "neutral", "heldout", "behaviours"}
_FILES = {"manifest.yaml", "LICENSE", "memory_graph_example.jsonl"}
_SNAKE_CASE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


@dataclass(frozen=True)
class Concept:
    """One emotion or cognitive state, as `manifest.yaml` describes it.

    `valence` and `arousal` lie in [-1, 1]; `near` names concepts it is easily taken for; `family`
    lists words of its word family that a stemmer does not find (pride for proud).
    """

    name: str
    gloss: str
    cluster: str
    sources: tuple[str, ...]
    valence: float
    arousal: float
    near: tuple[str, ...]
    family: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """One text and its labels.

    `concept` is None for a baseline, for `_*.txt` and for neutral prose. `scenario` and `version`
    are set for paired texts only: version k (from 0) of a framing tells the same content as
    version k of that scenario's baseline. `path` is relative to the corpus folder.
    """

    text: str
    kind: Kind
    concept: str | None
    scenario: str | None
    version: int | None
    path: str


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A hint with the known name closest to a mistaken one, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def white_space_normalised(text: str) -> str:
    """The text as it is compared: two texts that differ in white space alone are the same."""
    return " ".join(text.split())


def _repetitions(
    entries: Sequence[Text], neutral: Sequence[Text], heldout: Sequence[Text]
) -> list[str]:
    places: dict[str, list[Text]] = defaultdict(list)
    for text in (*entries, *neutral, *heldout):
        places[white_space_normalised(text.text)].append(text)
    problems = []
    for key, group in places.items():
        if len(group) == 1:
            continue
        paths = [text.path for text in group]
        where, excerpt = ", ".join(dict.fromkeys(paths)), f'"{textwrap.shorten(key, 60)}"'
        for path in dict.fromkeys(path for path in paths if paths.count(path) > 1):
            problems.append(f"{path}: the same text twice, keep one: {excerpt}")
        labels = dict.fromkeys(text.concept or "no concept" for text in group)
        if len(labels) > 1:
            problems.append(f"{where}: the same text under {' and '.join(labels)}: {excerpt}")
        if 0 < sum(path.startswith("heldout/") for path in paths) < len(paths):
            problems.append(f"{where}: a held-out text may not be used elsewhere: {excerpt}")
    return problems


class CorpusLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that refuses a key written twice, of which YAML would keep the last unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is written twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _in_unit_range(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1 <= value <= 1


_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "gloss": (_is_text, "a line of text"),
    "cluster": (_is_text, "the name of a cluster"),
    "sources": (lambda value: _is_texts(value) and bool(value), "a list of one or more texts"),
    "valence": (_in_unit_range, "a number from -1 to 1"),
    "arousal": (_in_unit_range, "a number from -1 to 1"),
    "near": (_is_texts, "a list of concepts, [] if none"),
    "family": (_is_texts, "a list of words of the same family, or leave it out"),
}
_OPTIONAL = {"family": []}


class CorpusFiles:
    """What a corpus folder holds: `manifest`, `entries`, `neutral`, `heldout`, `hard_negatives`.

    All in a fixed order.
    `problems` and `warnings` name every faulty file; none of them stops the reading.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._list(root, lambda p: p.name in (_FOLDERS if p.is_dir() else _FILES))
        self._names: set[str] = set()
        self.manifest = self._read_manifest()
        self.entries = [*self._by_concept(root), *self._paired()]
        self.neutral = self._neutral()
        heldout = root / "heldout"
        folders = {**_POSITIVES, **_HARD_NEGATIVES}
        self._list(heldout, lambda p: p.is_dir() and p.name in folders)
        self.heldout = self._by_concept(heldout)
        self.hard_negatives = self._by_concept(heldout, _HARD_NEGATIVES)
        self.problems += _repetitions(
            self.entries, self.neutral, [*self.heldout, *self.hard_negatives]
        )

    @property
    def texts(self) -> list[Text]:
        """Every text of the folder, whatever its role."""
        return [*self.entries, *self.neutral, *self.heldout, *self.hard_negatives]

    def _read_manifest(self) -> dict[str, Concept]:
        """Concepts whose fields are right, in file order."""

        def problem(message: str) -> None:
            self.problems.append(f"manifest.yaml: {message}")

        source = self._decode(self.root / "manifest.yaml")
        if source is None:
            return {}
        try:
            content = yaml.load(source, Loader=CorpusLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f"line {mark.line + 1}, " if mark else ""
            problem(f"{line}not valid YAML: {getattr(error, 'problem', None) or error}")
            return {}
        content = content if isinstance(content, dict) else {}
        if content.get("version") != 1:
            problem(f"version is {content.get('version')!r}; this library reads `version: 1`")
        clusters, concepts = content.get("clusters"), content.get("concepts")
        if not isinstance(clusters, dict) or not clusters:
            problem("`clusters` must map the name of each cluster to its description")
            clusters = None
        if not isinstance(concepts, dict) or not concepts:
            problem("`concepts` must map the name of each concept to its fields")
            return {}
        self._names = {name for name in concepts if isinstance(name, str)}

        manifest = {}
        for name, fields in concepts.items():
            if not isinstance(name, str) or not _SNAKE_CASE.fullmatch(name) or name == "baseline":
                problem(f"{name!r} cannot name a concept: use snake_case (quoted if YAML needs it)")
            elif wrong := self._wrong_fields(name, fields, clusters):
                problem(f"{name}: {'; '.join(wrong)}")
            else:
                manifest[name] = Concept(
                    name=name,
                    gloss=fields["gloss"],
                    cluster=fields["cluster"],
                    sources=tuple(fields["sources"]),
                    valence=float(fields["valence"]),
                    arousal=float(fields["arousal"]),
                    near=tuple(fields["near"]),
                    family=tuple(fields.get("family", ())),
                )
        return manifest

    def _wrong_fields(self, name: str, fields: object, clusters: dict | None) -> list[str]:
        if not isinstance(fields, dict):
            return [f"must have the fields {', '.join(_FIELDS)}"]
        wrong = [
            f"unknown field {field!r}{did_you_mean(field, _FIELDS)}"
            for field in fields
            if field not in _FIELDS
        ]
        for field, (is_right, expected) in _FIELDS.items():
            value = fields.get(field, _OPTIONAL.get(field))
            if value is None:
                wrong.append(f"{field} is missing: give {expected}")
            elif not is_right(value):
                wrong.append(f"{field} is {value!r}: give {expected}")
            elif field == "cluster" and clusters is not None and value not in clusters:
                hint = did_you_mean(value, map(str, clusters))
                wrong.append(f"cluster {value!r} is not under `clusters`{hint}")
            elif field == "near":
                wrong += [
                    f"near names {other!r}, which is no other concept"
                    f"{did_you_mean(other, self._names - {name})}"
                    for other in value
                    if other not in self._names - {name}
                ]
        return wrong

    def _by_concept(self, folder: Path, kinds: dict[str, Kind] = _POSITIVES) -> list[Text]:
        """Texts of stories/ and direct/ (or what `kinds` names) in the corpus or its heldout/."""
        return [
            Text(text, kind, concept, None, None, self._relative(file))
            for name, kind in kinds.items()
            for file in self._text_files(folder / name)
            for concept in [self._concept(file)]
            for text in self._texts(file)
        ]

    def _paired(self) -> list[Text]:
        entries = []
        for folder in self._well_named(self._list(self.root / "paired", Path.is_dir)):
            files = self._text_files(folder)
            texts = {file: self._texts(file) for file in files}
            number = len(texts.get(folder / "baseline.txt", []))
            if not number:
                self.problems.append(
                    f"{self._relative(folder)}/baseline.txt: no text; a paired scenario needs "
                    "the neutral telling of each version"
                )
            for file in files:
                concept = None if file.stem == "baseline" else self._concept(file)
                if number and texts[file] and len(texts[file]) != number:
                    self.problems.append(
                        f"{self._relative(file)}: {len(texts[file])} texts where baseline.txt has "
                        f"{number}; version k of a framing belongs to version k of the baseline"
                    )
                entries += [
                    Text(text, "paired", concept, folder.name, version, self._relative(file))
                    for version, text in enumerate(texts[file])
                ]
        return entries

    def _neutral(self) -> list[Text]:
        return [
            Text(text, "neutral", None, None, None, self._relative(file))
            for file in self._text_files(self.root / "neutral")
            for text in self._texts(file)
        ]

    def _concept(self, file: Path) -> str | None:
        name = file.stem
        if name.startswith("_"):
            return None
        if self._names and name not in self._names:  # none known: the manifest itself is at fault
            self.problems.append(
                f"{self._relative(file)}: concept {name!r} is not in manifest.yaml"
                f"{did_you_mean(name, self._names)}; add it there or rename the file"
            )
        return name

    def _list(self, folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
        """Wanted children of `folder`, sorted; a warning for what else lies there."""
        if not folder.is_dir():
            return []
        found = []
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or path.name == "README.md":
                continue
            if wanted(path):
                found.append(path)
            else:
                self.warnings.append(f"{self._relative(path)}: unexpected here, not read")
        return found

    def _text_files(self, folder: Path) -> list[Path]:
        return self._well_named(self._list(folder, lambda p: p.is_file() and p.suffix == ".txt"))

    def _well_named(self, paths: Iterable[Path]) -> list[Path]:
        good = []
        for path in paths:
            if _SNAKE_CASE.fullmatch(path.name.removesuffix(".txt").removeprefix("_")):
                good.append(path)
            else:
                self.problems.append(f"{self._relative(path)}: rename it in snake_case")
        return good

    def _texts(self, file: Path) -> list[str]:
        source = self._decode(file)
        if source is None:
            return []
        texts = [text for part in re.split(r"\n\s*\n", source) if (text := part.strip())]
        if not texts:
            self.warnings.append(f"{self._relative(file)}: the file is empty")
        return texts

    def _decode(self, file: Path) -> str | None:
        try:
            source = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            self.problems.append(
                f"{self._relative(file)}: not UTF-8, byte 0x{byte:02x} at offset {error.start}; "
                "save it again as UTF-8"
            )
        except OSError as error:
            self.problems.append(f"{self._relative(file)}: cannot be read: {error.strerror}")
        else:
            return source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        return None

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()
