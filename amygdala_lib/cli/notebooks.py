"""`amygdala run` and `doctor`: the notebooks without a browser, and the machine they run on."""

from __future__ import annotations

import argparse
import json

from amygdala_lib.errors import AmygdalaError


def add_commands(commands: argparse._SubParsersAction) -> None:
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
