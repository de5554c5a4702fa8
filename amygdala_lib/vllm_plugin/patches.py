"""Patches: functions of vLLM wrapped in place, each once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap_once(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Let `owner.name(...)` be `around(original, ...)`; a second time nothing is changed.

    `owner` is a class or a module of vLLM that looks the function up there whenever it calls it.
    """
    original = getattr(owner, name)
    if getattr(original, "_wrapped_by_amygdala", False):
        return

    @functools.wraps(original)
    def wrapped(*given: Any, **named: Any) -> Any:
        return around(original, *given, **named)

    wrapped._wrapped_by_amygdala = True
    setattr(owner, name, wrapped)
