"""Front ends: is there anybody who could move a slider?"""

from __future__ import annotations

import os
import sys

from IPython import get_ipython


def has_front_end() -> bool:
    """Whether this kernel belongs to a notebook that somebody has open.

    A Jupyter server tells its kernels the notebook's name, VS Code and Colab leave traces of their
    own. Kernels of papermill, nbconvert and the like have none of these, and show widgets to
    nobody.
    """
    shell = get_ipython()
    if getattr(shell, "kernel", None) is None:
        return False
    return (
        "JPY_SESSION_NAME" in os.environ
        or "__vsc_ipynb_file__" in shell.user_ns
        or "google.colab" in sys.modules
    )
