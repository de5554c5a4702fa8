"""Metrics: what training does, for Prometheus, on the server's own /metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from .operations import Operations


class TrainingMetrics:
    """A collector that reads the last status whenever Prometheus asks; it starts nothing.

    `amygdala_up` is 1 while the training worker is attached to the served weights.
    """

    def __init__(self, operations: Operations):
        self._operations = operations

    def describe(self) -> list[Metric]:
        return []  # names are told when collected

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        operations = self._operations
        known = operations.known
        worker = known.get("worker") or {}
        checkpoint = known.get("checkpoint") or {}
        memory = known.get("memory") or {}
        attached = known.get("state") in ("ready", "training", "checkpoint", "rollback", "history")
        for name, value, what in (
            ("up", attached and not known.get("stale", True), "the training worker is attached"),
            ("training", known.get("running") is not None, "a job runs"),
            ("jobs_waiting", len(known.get("waiting") or []), "jobs that wait"),
            ("unsaved_jobs", checkpoint.get("unsaved_jobs"), "jobs that no checkpoint has"),
            ("worker_memory_bytes", memory.get("own"), "memory of the worker alone"),
            ("loss", _loss(known), "of the running job's last step"),
            ("steered", bool(operations.arrivals.default), "there is a steering for all requests"),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"amygdala_{name}", what, float(value))
        for name, value, what in (
            ("weights_version", operations.arrivals.version, "changes of the served weights"),
            ("worker_restarts", worker.get("restarts"), "times the worker was started again"),
        ):
            if value is not None:
                yield CounterMetricFamily(f"amygdala_{name}", what, float(value))


def publish(operations: Operations) -> None:
    """Add the metrics to the registry that vLLM serves."""
    from prometheus_client import REGISTRY

    REGISTRY.register(TrainingMetrics(operations))


def _loss(known: dict[str, Any]) -> float | None:
    running = known.get("running")
    return None if running is None else running.get("loss")
