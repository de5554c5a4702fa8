"""`amygdala read`: which states a text brings up, word by word, in a terminal."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, TextIO

from amygdala_lib.errors import AmygdalaError

if TYPE_CHECKING:  # importing torch for `amygdala --help` would take seconds
    from torch import Tensor

    from amygdala_lib import LanguageModel
    from amygdala_lib.readout import Reading, Readout

COLOURS = (203, 39, 178, 77, 170, 208, 44, 141, 149, 211, 110, 137)
"""Of the 256 of a terminal: twelve, apart from one another, readable on black and on white."""
SHOWS = 1.0
"""A token takes the colour of its strongest state if that is so many standard deviations up."""
TOP = 3
TEMPERATURE = 0.8
COMPARED = 120
"""Texts whose tokens give the deviations: a full stop, say, is calm in any text."""
_END = re.compile(r"[.!?…][\"'”’)\]]*\s*$")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""A text could otherwise write escape sequences to the terminal."""


def add_commands(commands: argparse._SubParsersAction) -> None:
    read = commands.add_parser(
        "read",
        help="which states does a text bring up?",
        description="Read a text with the directions that `amygdala extract` or notebook 02 left "
        "under runs/NAME/. Tokens have the colour of their strongest state; after each sentence "
        "stand those that are strongest over its tokens, in standard deviations.",
        epilog='example: amygdala read "She counted the stairs again." --generate 60',
    )
    read.add_argument("text", help="what is read")
    read.add_argument(
        "--generate", type=int, default=0, metavar="N", help="let the model go on for N tokens"
    )
    read.add_argument("--concepts", help="by name, with commas (all)")
    read.add_argument("--layer", type=int, help="where it is read (nearest two thirds of depth)")
    read.add_argument("--run", default="demo", metavar="NAME", help="folder under runs/ (demo)")
    read.add_argument("--model", help="where the model is, if not where it was")
    read.add_argument("--seed", type=int, default=0, help="of what is generated (0)")
    read.set_defaults(function=_read)


def _read(arguments: argparse.Namespace) -> int:
    import torch

    import amygdala_lib as amy
    from amygdala_lib.artefacts import check_run, repository_root
    from amygdala_lib.readout.generation import check_length
    from amygdala_lib.readout.sampling import sampled

    if arguments.generate < 0:
        raise AmygdalaError(f"--generate is {arguments.generate}: pass 0 tokens or more")
    readout = amy.Readout.load(repository_root() / "runs" / check_run(arguments.run))
    source = arguments.model or readout.directions.provenance.get("model_source")
    if source is None:
        raise AmygdalaError("readout.json does not say its model_source: pass --model")
    lm = amy.load_model(source)
    layer = arguments.layer
    if layer is None:
        depth = len(lm.layers)
        layer = min(readout.directions.layers, key=lambda n: abs(n + 1 - 2 / 3 * depth))
    concepts = arguments.concepts.split(",") if arguments.concepts else None
    readout = _compared(readout.fitted(lm, layers=[layer], concepts=concepts), lm)
    inputs = lm.tokenizer(arguments.text, return_tensors="pt").to(lm.device)
    check_length(lm, inputs["input_ids"].shape[1], arguments.generate)
    read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    shown = Transcript(
        readout.directions.concepts,
        sys.stdout,
        coloured=_takes_colour(sys.stdout),
        hidden=lm.tokenizer.all_special_tokens,
    )
    with torch.no_grad(), readout.attach(lm, prompt=True, on_token=shown.token):
        if arguments.generate:
            lm.model.generate(
                **read,
                max_new_tokens=arguments.generate,
                pad_token_id=lm.tokenizer.pad_token_id,
                **sampled(arguments.seed, TEMPERATURE),
            )
        else:
            lm.model(**read)
    shown.end()
    return 0


def _compared(readout: Readout, lm: LanguageModel) -> Readout:
    """With deviations of single tokens, if the corpus the directions come from is here."""
    import amygdala_lib as amy
    from amygdala_lib.errors import CorpusError

    folder = readout.directions.provenance.get("corpus_folder")
    try:
        texts = amy.load_corpus(folder).all_texts if folder else []
    except CorpusError:
        texts = []
    if not texts:
        print("no corpus to compare with: deviations are those of whole texts", file=sys.stderr)
        return readout
    texts = texts[:: max(1, len(texts) // COMPARED)]
    return readout.calibrated(amy.capture(lm, texts, readout.directions.layers, pool="tokens"))


class Transcript:
    """Writes tokens as they come, and after each sentence the states that are strongest over it.

    Tokens in `hidden`, such as that for the end of a text, are passed over.
    """

    def __init__(
        self, concepts: list[str], out: TextIO, *, coloured: bool, hidden: Collection[str] = ()
    ):
        self._concepts = concepts
        self._out = out
        self._coloured = coloured
        self._hidden = hidden
        self._colours: dict[int, int] = {}
        self._sentence = ""
        self._scores: list[Tensor] = []

    def token(self, reading: Reading) -> None:
        if reading.token in self._hidden:
            return
        token = _CONTROL.sub("", reading.token)
        # Not before a space: a quotation mark may follow, or the digits after a decimal point.
        if _END.search(self._sentence) and re.search(r"\s", self._sentence[-1] + token[:1]):
            self._states()
        if not self._sentence:
            token = token.lstrip()
        self._sentence += token
        self._out.write(self._painted(token, self._strongest(reading)))
        self._out.flush()
        if not reading.zscores.isnan().any():
            self._scores.append(reading.zscores[0])

    def end(self) -> None:
        """The states after the last sentence, whole or not."""
        if self._sentence:
            self._states()

    def _states(self) -> None:
        self._out.write("\n")
        if self._scores:
            scores = sum(self._scores) / len(self._scores)
            top = scores.topk(min(TOP, len(scores))).indices.tolist()
            states = (self._painted(f"{self._name(i)} {scores[i]:+.1f}", i) for i in top)
            self._out.write(f"    {', '.join(states)}\n")
        self._sentence, self._scores = "", []
        self._out.flush()

    def _name(self, concept: int) -> str:
        return self._concepts[concept].replace("_", " ")

    def _strongest(self, reading: Reading) -> int | None:
        scores = reading.zscores[0]
        if scores.isnan().any() or scores.max() < SHOWS:
            return None
        return int(scores.argmax())

    def _painted(self, text: str, concept: int | None) -> str:
        """A state keeps the colour it first comes in."""
        if not self._coloured or concept is None or not text:
            return text
        colour = self._colours.setdefault(concept, COLOURS[len(self._colours) % len(COLOURS)])
        return f"\x1b[38;5;{colour}m{text}\x1b[0m"


def _takes_colour(out: TextIO) -> bool:
    """Whether this is a terminal, and nobody asked for none (https://no-color.org)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
