"""`amygdala extract`, `quality` and `validate`: directions, and how far to trust them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from amygdala_lib.errors import AmygdalaError

if TYPE_CHECKING:  # importing torch for `amygdala --help` would take seconds
    from amygdala_lib import Activations, Corpus

POOLS = ("last", "mean", "tokens")


def add_commands(commands: argparse._SubParsersAction) -> None:
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


def _extract(arguments: argparse.Namespace) -> int:
    import amygdala_lib as amy
    from amygdala_lib.artefacts import check_run, run_folder

    check_run(arguments.run)
    acts, corpus, options = _read(arguments, [arguments.method], heldout=False)
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
    from amygdala_lib.evaluation_report import write_report

    check_run(arguments.run)
    names = arguments.methods.split(",")
    acts, corpus, options = _read(arguments, names, heldout=True)
    found = amy.evaluate(acts, corpus, names, **options)
    folder = run_folder(arguments.run)
    print(f"\n{found.recommend()}\nall figures: {found.save(folder)}")
    if arguments.report:
        print(f"report: {write_report(found, folder / 'report.html')}")
    return 0


def _read(
    arguments: argparse.Namespace, names: list[str], *, heldout: bool
) -> tuple[Activations, Corpus, dict[str, Activations]]:
    """Activations as the methods `names` need them, the corpus, and options for the methods."""
    import amygdala_lib as amy
    from amygdala_lib.directions import methods
    from amygdala_lib.models import EMBEDDING, default_layers

    if unknown := [name for name in names if name not in methods]:
        raise AmygdalaError(
            f"no method {', '.join(map(repr, unknown))}: choose among {', '.join(sorted(methods))}"
        )
    chosen = [methods[name] for name in names]
    reads_tokens = any(method.reads_tokens for method in chosen)
    pool = arguments.pool or ("tokens" if reads_tokens else "last")
    corpus = amy.load_corpus(arguments.corpus)
    print(corpus.summary())
    lm = amy.load_model(arguments.model)
    print(lm)
    texts = corpus.all_texts if heldout else corpus.texts
    layers = arguments.layers
    if layers is None and heldout:  # the embeddings stand beside every figure of a validation
        layers = [EMBEDDING, *default_layers(len(lm.layers))]
    acts = amy.capture(lm, texts, layers, pool=pool)
    options = {}
    if any("neutral" in method.options for method in chosen):
        options["neutral"] = amy.capture(lm, corpus.neutral, acts.layers, pool=pool)
    return acts, corpus, options


def _told(made: dict, fact: str, option: str) -> str:
    if fact not in made:
        raise AmygdalaError(f"readout.json does not say its {fact}: pass {option}")
    return made[fact]


def _layers(text: str) -> list[int]:
    return [int(index) for index in text.split(",")]
