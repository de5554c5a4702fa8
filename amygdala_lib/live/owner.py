"""Owner: the process whose memory the weights are, told from a later one with the same number."""

from __future__ import annotations

from pathlib import Path


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None if it does not run.

    A process that has ended and waits to be collected by its parent (a zombie) does not run: its
    memory is gone. Linux only.
    """
    try:
        # The second field, the name, is in brackets and may hold spaces and brackets itself.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], int(fields[19])
    return None if state in "ZXx" else started
