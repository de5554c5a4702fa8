"""The `amygdala` command: what the notebooks do, for people without one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from amygdala_lib.errors import AmygdalaError

POOLS = ("last", "mean", "tokens")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status: 0, 1 (something checked is wrong), 2 (error)."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.function(arguments)
    except AmygdalaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amygdala", description="Find, read, steer and train what a language model feels."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run notebooks headlessly",
        description="Run notebooks in order; what is up to date is left out. Executed notebooks, "
        "their pages and a summary are left under runs/NAME/notebooks/.",
        epilog="example: amygdala run 02 06 --run mine -p model path/to/model",
    )
    run.add_argument(
        "notebooks",
        nargs="*",
        metavar="NOTEBOOK",
        help="number, name, pattern or path; all of notebooks/ if none is named",
    )
    run.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a parameter in the notebooks that have it; may be repeated",
    )
    run.add_argument("--run", default="demo", metavar="NAME", help="folder under runs/ (demo)")
    run.add_argument(
        "--from", dest="start", metavar="NOTEBOOK", help="leave out what stands before this one"
    )
    run.add_argument("--fresh", action="store_true", help="run also what is up to date")
    run.set_defaults(function=_run)

    doctor = commands.add_parser(
        "doctor", help="check this machine", description="Check this machine; say how to mend it."
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(function=_doctor)

    extract = commands.add_parser(
        "extract",
        help="a direction per concept and layer",
        description="Read every text of a corpus once, make directions of the activations, and "
        "write readout.safetensors and readout.json under runs/NAME/.",
        epilog="example: amygdala extract --model path/to/model --layers 20,30,40 --run mine",
    )
    _add_reading(extract)
    extract.add_argument("--method", default="pooled", help="how directions are made (pooled)")
    extract.set_defaults(function=_extract)

    quality = commands.add_parser(
        "quality",
        help="which directions to trust",
        description="Judge the directions that `amygdala extract` or notebook 02 left under "
        "runs/NAME/: prints a triage and writes quality.json beside them.",
        epilog="example: amygdala quality --run mine",
    )
    quality.add_argument("--run", default="demo", metavar="NAME", help="folder under runs/ (demo)")
    quality.add_argument("--model", help="where the model is, if not where it was")
    quality.add_argument("--corpus", help="where the corpus is, if not where it was")
    quality.add_argument("--layer", type=int, help="of the triage (nearest two thirds of depth)")
    quality.set_defaults(function=_quality)

    validate = commands.add_parser(
        "validate",
        help="do directions hold on texts they were not made of?",
        description="Extract and try directions on held-out texts, in folds and in scenarios, with "
        "nulls, intervals and baselines; writes evaluation.json under runs/NAME/.",
        epilog="example: amygdala validate --model path/to/model --layers=-1,20,30,40 "
        "--methods pooled,centred --report --run mine",
    )
    _add_reading(validate)
    validate.add_argument("--methods", default="pooled", help="by name, with commas (pooled)")
    validate.add_argument("--report", action="store_true", help="write report.html beside it")
    validate.set_defaults(function=_validate)

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
    return parser


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """What is read, by what, and where the results go."""
    parser.add_argument("--model", default="demo", help="demo, a folder or a Hugging Face id")
    parser.add_argument(
        "--corpus", default="corpus", help="a folder, or affect_world, the bundled model's (corpus)"
    )
    parser.add_argument(
        "--layers", type=_layers, help="such as 20,30,40; -1 is the embeddings (a spread)"
    )
    parser.add_argument("--pool", choices=POOLS, help="what is read of a text (last)")
    parser.add_argument("--run", default="demo", metavar="NAME", help="folder under runs/ (demo)")


def _run(arguments: argparse.Namespace) -> int:
    from amygdala_lib.notebooks import run_notebooks

    names = [name for name, _ in arguments.parameters]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise AmygdalaError(f"-p is given twice for {', '.join(twice)}. Keep one value each.")
    run_notebooks(
        arguments.notebooks,
        run=arguments.run,
        parameters=dict(arguments.parameters),
        start=arguments.start,
        resume=not arguments.fresh,
    )
    return 0


def _extract(arguments: argparse.Namespace) -> int:
    import amygdala_lib as amy
    from amygdala_lib.artefacts import check_run, run_folder
    from amygdala_lib.directions import methods

    check_run(arguments.run)

    if arguments.method not in methods:
        known = ", ".join(sorted(methods))
        raise AmygdalaError(f"no method {arguments.method!r}: choose one of {known}")
    chosen = methods[arguments.method]
    pool = arguments.pool or ("tokens" if chosen.reads_tokens else "last")
    corpus = amy.load_corpus(arguments.corpus)
    print(corpus.summary())
    lm = amy.load_model(arguments.model)
    print(lm)
    acts = amy.capture(lm, corpus, arguments.layers, pool=pool)
    options = {}
    if "neutral" in chosen.options:
        options["neutral"] = amy.capture(lm, corpus.neutral, acts.layers, pool=pool)
    directions = amy.extract(acts, corpus, arguments.method, **options)
    folder = run_folder(arguments.run)
    directions.save(folder, corpus_folder=arguments.corpus, model_source=arguments.model)
    n, layers = len(directions.concepts), ", ".join(map(str, directions.layers))
    print(f"{n} directions by {arguments.method} at layers {layers}: {folder}")
    return 0


def _quality(arguments: argparse.Namespace) -> int:
    import amygdala_lib as amy
    from amygdala_lib.artefacts import check_run, repository_root

    folder = repository_root() / "runs" / check_run(arguments.run)
    directions = amy.Directions.load(folder)
    made = directions.provenance
    corpus = amy.load_corpus(arguments.corpus or _told(made, "corpus_folder", "--corpus"))
    lm = amy.load_model(arguments.model or _told(made, "model_source", "--model"))
    read = {name: made[name] for name in ("pool", "skip", "chat_template") if name in made}
    acts = amy.capture(lm, corpus, directions.layers, **read)
    report = amy.quality_report(lm, acts, corpus, directions)
    path = report.save(folder)
    print(report.triage(arguments.layer))
    print(f"\nall figures: {path}")
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    import amygdala_lib as amy
    from amygdala_lib.artefacts import check_run, run_folder
    from amygdala_lib.directions import methods
    from amygdala_lib.evaluation_report import write_report

    check_run(arguments.run)
    names = arguments.methods.split(",")
    if unknown := [name for name in names if name not in methods]:
        known = ", ".join(sorted(methods))
        raise AmygdalaError(f"no methods {', '.join(unknown)}: choose among {known}")
    tokens = any(methods[name].reads_tokens for name in names)
    pool = arguments.pool or ("tokens" if tokens else "last")
    corpus = amy.load_corpus(arguments.corpus)
    print(corpus.summary())
    lm = amy.load_model(arguments.model)
    print(lm)
    acts = amy.capture(lm, corpus.all_texts, arguments.layers, pool=pool)
    options = {}
    if any("neutral" in methods[name].options for name in names):
        options["neutral"] = amy.capture(lm, corpus.neutral, acts.layers, pool=pool)
    found = amy.evaluate(acts, corpus, names, **options)
    folder = run_folder(arguments.run)
    print(f"\n{found.recommend()}\nall figures: {found.save(folder)}")
    if arguments.report:
        print(f"report: {write_report(found, folder / 'report.html')}")
    return 0


def _told(made: dict, fact: str, option: str) -> str:
    if fact not in made:
        raise AmygdalaError(f"readout.json does not say its {fact}: pass {option}")
    return made[fact]


def _layers(text: str) -> list[int]:
    return [int(index) for index in text.split(",")]


def _doctor(arguments: argparse.Namespace) -> int:
    from amygdala_lib.doctor import examine

    findings = []
    for finding in examine():
        findings.append(finding)
        if not arguments.json:
            print(finding, flush=True)
    healthy = all(finding.status != "fail" for finding in findings)
    if arguments.json:
        content = {"healthy": healthy, "findings": [vars(finding) for finding in findings]}
        print(json.dumps(content, indent=2))
    return 0 if healthy else 1


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


if __name__ == "__main__":
    sys.exit(main())
