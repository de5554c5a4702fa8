"""The model folder is the checkpoint: see which bytes changed, write only those, and go back."""

from .access import reading
from .difference import Difference, diff
from .exchange import apply_delta, export_delta
from .history import history
from .rollback import rollback
from .sync import sync
from .transaction import Change
from .verification import Verification, verify

__all__ = [
    "Change",
    "Difference",
    "Verification",
    "apply_delta",
    "diff",
    "export_delta",
    "history",
    "reading",
    "rollback",
    "sync",
    "verify",
]
