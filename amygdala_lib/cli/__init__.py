"""The `amygdala` command: what the notebooks do, for people without one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from amygdala_lib.cli import checkpoint, corpus, notebooks, reading, serving, training, vectors
from amygdala_lib.errors import AmygdalaError


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
    for module in (notebooks, vectors, reading, training, serving, checkpoint, corpus):
        module.add_commands(commands)
    return parser
