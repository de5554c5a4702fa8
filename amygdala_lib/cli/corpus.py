"""`amygdala corpus`: look after the texts directions are made of."""

from __future__ import annotations

import argparse
from pathlib import Path

from amygdala_lib.errors import AmygdalaError


def add_commands(commands: argparse._SubParsersAction) -> None:
    corpus = commands.add_parser("corpus", help="look after the corpus")
    actions = corpus.add_subparsers(title="actions", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check", help="list every problem of a corpus", description="List every problem at once."
    )
    check.add_argument("path", nargs="?", type=Path, help="the corpus (this repository's)")
    check.set_defaults(function=_corpus_check)

    graph = actions.add_parser(
        "from-memory-graph",
        help="make training pairs of tagged journal entries",
        description='JOURNAL has one {"text": "...", "tags": "calm:8 anxious:2"} a line.',
        epilog="example: amygdala corpus from-memory-graph journal.jsonl pairs.jsonl "
        "--threshold calm 7",
    )
    graph.add_argument("journal", type=Path, help="tagged entries (JSONL)")
    graph.add_argument("out", type=Path, help="the pairs (JSONL)")
    graph.add_argument("--high", type=float, default=6, help="positive from this score on (6)")
    graph.add_argument("--low", type=float, default=2, help="negative up to this score (2)")
    graph.add_argument(
        "--threshold",
        nargs=2,
        action="append",
        default=[],
        metavar=("EMOTION", "SCORE"),
        help="instead of --high for one emotion; may be repeated",
    )
    graph.add_argument("--seed", type=int, default=0, help="order of the negatives (0)")
    graph.set_defaults(function=_from_memory_graph)


def _corpus_check(arguments: argparse.Namespace) -> int:
    from amygdala_lib.corpus import preflight
    from amygdala_lib.corpus_prose import check_prose
    from amygdala_lib.notebook_sources import ROOT

    found = preflight(arguments.path or ROOT / "corpus")
    print(found.report())
    if found.problems:
        return 1
    prose = check_prose(found.root)
    print(prose.report())
    return 1 if prose.problems else 0


def _from_memory_graph(arguments: argparse.Namespace) -> int:
    from amygdala_lib.memory_graph import from_memory_graph

    try:
        thresholds = {name: float(score) for name, score in arguments.threshold}
    except ValueError as error:
        raise AmygdalaError(f"--threshold takes an emotion and a number: {error}") from error
    pairs = from_memory_graph(
        arguments.journal,
        arguments.out,
        high=arguments.high,
        low=arguments.low,
        thresholds=thresholds,
        seed=arguments.seed,
    )
    concepts = len({pair.concept for pair in pairs})
    print(f"{len(pairs)} pairs for {concepts} emotions: {arguments.out}")
    return 0
