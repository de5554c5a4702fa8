"""The plugin that vLLM loads in each of its processes: share, read and steer the served model."""

from __future__ import annotations


def register() -> None:
    """Make ready for what the environment asks for; entry point of `vllm.general_plugins`.

    vLLM calls it in the API server, the engine core, every worker and the process that inspects
    models. Called again it changes nothing, and without AMYGDALA_RUNTIME and AMYGDALA_READOUT it
    does nothing at all, so that having the package installed changes no server.

    Raises LiveError for a setting that cannot be meant.
    """
    from .settings import Settings

    settings = Settings.from_environment()
    if not settings.active:
        return
    from vllm.platforms import current_platform

    from . import arrivals, cpu, export, hooks

    if current_platform.is_cpu():
        cpu.keep_weights_plain()
    export.wrap_loader(settings)
    if settings.readout is not None:
        hooks.wrap_runner()
    arrivals.wrap_engine(settings)
