"""Guard: ends a command, and removes its folder, when whoever started it goes, however that ends.

`python guard.py FOLDER COMMAND...`; it lives as long as its standard input. It imports nothing but
the standard library, so that it costs next to nothing.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread

ENDED = "ended"
"""The file in the folder that says that the command has ended by itself."""

_PATIENCE = 60.0, 15.0, 5.0  # seconds after each signal; the last one is SIGKILL


def main() -> None:
    """Until standard input is closed, which the system does for a process that was killed too."""
    folder, *command = sys.argv[1:]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit())
    Thread(target=_tell, args=(process, Path(folder)), daemon=True).start()
    try:
        sys.stdin.buffer.read()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _tell(process: subprocess.Popen, folder: Path) -> None:
    status = process.wait()
    with suppress(OSError):
        (folder / ENDED).write_text(str(status))


def _end(process: subprocess.Popen) -> None:
    ways = (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL)
    for how, seconds in zip(ways, _PATIENCE, strict=True):
        process.send_signal(how)  # nothing, to one that has ended
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return


if __name__ == "__main__":
    main()
