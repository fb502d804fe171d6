"""The metrics of a server, in Prometheus' text format. Labels are the model and small sets of words, never names."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from fastdiff import __version__
from fastdiff.serving.process import Supervisor

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
OUTCOMES = ("ok", "invalid", "refused", "cancelled", "deadline", "failed")


class Metrics:
    """Counts what happens to requests, and reads the rest from the drawing process's signs of life.

    Args:
        supervisor: The drawing process.
    """

    def __init__(self, supervisor: Supervisor):
        self._supervisor = supervisor
        self.registry = r = CollectorRegistry()
        self.requests = Counter("fastdiff_requests", "Requests for images, by outcome.", ["outcome"], registry=r)
        self.duration = Histogram(
            "fastdiff_request_duration_seconds", "From a request's arrival to its images.", buckets=SECONDS, registry=r
        )
        self.queue = Histogram(
            "fastdiff_queue_duration_seconds",
            "From a job's submission to its first step.",
            buckets=SECONDS,
            registry=r,
        )
        self.cancelled = Counter(
            "fastdiff_cancelled", "Jobs that ended because their client left or cancelled them.", ["stage"], registry=r
        )
        self.deadline = Counter("fastdiff_deadline", "Jobs with a deadline, by result.", ["result"], registry=r)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        for stage in ("waiting", "running", "streaming"):
            self.cancelled.labels(stage)
        for result in ("met", "missed", "impossible"):
            self.deadline.labels(result)
        r.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the drawing process: prometheus_client's interface."""
        supervisor, prefix = self._supervisor, "fastdiff_"
        for name, text, key in (
            ("jobs_running", "Jobs whose images are in flight.", "running"),
            ("jobs_waiting", "Jobs whose first step has not begun.", "waiting"),
            ("queued_work_seconds", "Seconds of work in all jobs.", "queued_s"),
            ("images_running", "Images in flight.", "images"),
        ):
            gauge = GaugeMetricFamily(prefix + name, text, labels=["model"])
            for model in supervisor.models:
                gauge.add_metric([model], supervisor.pulse.stats.get(model, {}).get(key, 0.0))
            yield gauge
        seconds = SummaryMetricFamily(prefix + "step_duration_seconds", "Duration of a step.", labels=["model"])
        rows = SummaryMetricFamily(prefix + "step_rows", "Network rows of a step.", labels=["model"])
        steps = CounterMetricFamily(prefix + "image_steps", "Rows of step tables that images took.", labels=["model"])
        for model, totals in supervisor.totals.items():
            seconds.add_metric([model], count_value=totals["steps"], sum_value=totals["busy_s"])
            rows.add_metric([model], count_value=totals["steps"], sum_value=totals["rows"])
            steps.add_metric([model], totals["image_steps"])
        yield from (seconds, rows, steps)
        dropped = supervisor.dropped + sum(t["previews_dropped"] for t in supervisor.totals.values())
        yield CounterMetricFamily(prefix + "previews_dropped", "Previews that nobody read in time.", value=dropped)
        yield CounterMetricFamily(
            prefix + "engine_restarts", "Drawing processes that ended and were replaced.", value=supervisor.restarts
        )
        yield GaugeMetricFamily(prefix + "ready", "Whether requests can be answered.", value=not supervisor.trouble)
        build = GaugeMetricFamily(
            prefix + "build_info", "The server's version, and its models.", labels=["version", "model", "backend"]
        )
        for m in supervisor.models.values():
            build.add_metric([__version__, m.name, m.backend], 1.0)
        yield build

    def text(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self.registry)
