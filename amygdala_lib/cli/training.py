"""`amygdala train`: behaviour into the weights, of a model or of a running server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from amygdala_lib.errors import AmygdalaError

if TYPE_CHECKING:  # importing torch for `amygdala --help` would take seconds
    from amygdala_lib import LanguageModel
    from amygdala_lib.training import TrainingResult

OBJECTIVES = ("sft", "dpo", "dpop", "orpo")
SHOWN = 12


def add_commands(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train",
        help="train examples into the weights",
        description="Train a model on examples, with gradient through their continuations only. "
        "Figures and states are kept under runs/NAME/training/; a run that was stopped is gone on "
        "with by the same command. With --server, the model that is being served is trained, where "
        "it lies. Try --dry-run first: it computes everything and writes nothing.",
        epilog="examples: amygdala train examples.jsonl --model path/to/model --lr 1e-5 "
        "--replay general.jsonl --run mine --out path/to/tuned; "
        "amygdala train examples.jsonl --server http://127.0.0.1:8000 --lr 1e-5",
    )
    train.add_argument(
        "examples",
        type=Path,
        help='JSONL: {"context", "continuation", "rejected"}, {"messages"} or '
        '{"prompt", "chosen", "rejected"} a line',
    )
    train.add_argument(
        "--model", help="demo, a folder or a Hugging Face id (demo; with --server, its own)"
    )
    train.add_argument(
        "--server", metavar="URL", help="train the model that this server has, as `serve` prints it"
    )
    train.add_argument(
        "--token-file", type=Path, metavar="FILE", help="of the server (AMYGDALA_TOKEN, the text)"
    )
    train.add_argument("--objective", choices=OBJECTIVES, default="sft", help="the loss (sft)")
    train.add_argument("--lr", type=float, default=1e-5, help="learning rate (1e-5)")
    train.add_argument("--rank", type=int, default=64, help="of Apollo's projections (64)")
    train.add_argument("--steps", type=int, help="how many (one epoch)")
    train.add_argument("--batch-size", type=int, default=16, help="examples a step (16)")
    train.add_argument("--replay", type=Path, metavar="FILE", help="general examples to mix in")
    train.add_argument("--dry-run", action="store_true", help="compute everything, write nothing")
    train.add_argument("--run", metavar="NAME", help="folder under runs/ (demo)")
    train.add_argument("--out", type=Path, metavar="FOLDER", help="save the trained model here")
    train.set_defaults(function=_train)


def _train(arguments: argparse.Namespace) -> int:
    if arguments.server is not None:
        return _train_server(arguments)
    if arguments.token_file is not None:
        raise AmygdalaError("--token-file is for a server: name it with --server")
    return _train_model(arguments)


def _train_server(arguments: argparse.Namespace) -> int:
    """The server's own model, in its memory; there is no run to be kept here."""
    from amygdala_lib.live.client import Client
    from amygdala_lib.live.connection import read_token
    from amygdala_lib.live.texts import without_weights
    from amygdala_lib.training.example_files import read_examples

    if given := [f"--{name}" for name in ("run", "out") if getattr(arguments, name) is not None]:
        raise AmygdalaError(
            f"{' and '.join(given)}: a server's weights are kept in its own folder, by a checkpoint"
        )
    token = None if arguments.token_file is None else read_token(arguments.token_file)
    with Client(arguments.server, token) as client:
        served = client.status().get("model")
        model = arguments.model or served
        if not model:
            raise AmygdalaError("the server does not say which model it serves: give --model")
        lm = without_weights(model)
        examples = read_examples(lm, arguments.examples)
        replay = [] if arguments.replay is None else read_examples(lm, arguments.replay)
        print(f"{served}: {len(examples)} examples, {len(replay)} to replay")
        result = client.train(
            examples,
            replay=replay,
            objective=arguments.objective,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            dry_run=arguments.dry_run,
            label=arguments.examples.name,
            lr=arguments.lr,
            rank=arguments.rank,
        )
        print(result)
        if arguments.dry_run:
            print("nothing was written; leave out --dry-run to train")
        else:
            print("the server answers with the new weights; its folder has them after a checkpoint")
    return 0


def _train_model(arguments: argparse.Namespace) -> int:
    import amygdala_lib as amy
    from amygdala_lib.artefacts import check_run, run_folder
    from amygdala_lib.training import train
    from amygdala_lib.training.example_files import read_examples

    run = check_run("demo" if arguments.run is None else arguments.run)
    out = arguments.out
    if out is not None and out.exists():
        raise AmygdalaError(f"{out} exists: name a new folder, nothing is overwritten")
    lm = amy.load_model(arguments.model or "demo")
    print(lm)
    examples = read_examples(lm, arguments.examples)
    replay = [] if arguments.replay is None else read_examples(lm, arguments.replay)
    print(f"{len(examples)} examples, {len(replay)} to replay")
    result = train(
        lm,
        examples,
        objective=arguments.objective,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        replay=replay,
        dry_run=arguments.dry_run,
        folder=None if arguments.dry_run else run_folder(run) / "training",
        lr=arguments.lr,
        rank=arguments.rank,
    )
    print(_account(result))
    if arguments.dry_run:
        wanted = "" if out is None else f", nor {out}"
        print(f"nothing was written{wanted}; leave out --dry-run to train")
    else:
        print(f"figures and state: {result.folder}")
        if out is not None:
            _save(lm, out)
            print(f"trained model: {out}")
    return 1 if len(result.skipped) == len(result.steps) else 0


def _account(result: TrainingResult) -> str:
    """The summary, what became likelier, and which parameters went furthest."""
    changes = result.changes.sort_values("relative_change", ascending=False).head(SHOWN)
    columns = ["relative_gradient", "relative_change", "changed"]
    if result.dry_run:
        columns.append("loss_change")
    watched = result.log_probabilities.head(SHOWN)
    return "\n\n".join(
        [
            result.summary(),
            f"log-probability per token (first {len(watched)} examples)",
            watched.to_string(float_format="{:.4f}".format),
            f"parameters that {'would move' if result.dry_run else 'moved'} most (of "
            f"{len(result.changes)})",
            changes[columns].to_string(float_format="{:.3g}".format),
        ]
    )


def _save(lm: LanguageModel, folder: Path) -> None:
    """A folder that load_model reads, there whole or not at all."""
    import shutil

    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        lm.model.save_pretrained(unfinished)
        lm.tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
