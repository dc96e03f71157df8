"""What `/metrics` returns: HTTP requests counted here, and the engines' own counters.

No label is an adapter or a tenant, so the number of series stays small. Engines are told apart by `replica`.
"""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from serving.engine.job import EngineStats

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class _Engines:
    """Turns the last reports of the engines into metrics when they are scraped."""

    def __init__(self) -> None:
        self.reports: Mapping[str, EngineStats] = {}

    def collect(self) -> Iterator[Metric]:
        counters: dict[str, CounterMetricFamily] = {}
        gauges: dict[str, GaugeMetricFamily] = {}

        def count(name: str, text: str, value: float, replica: str, label: tuple[str, str] | None = None) -> None:
            names = ["replica", *([label[0]] if label else [])]
            family = counters.setdefault(name, CounterMetricFamily(f"dreamfleet_{name}", text, labels=names))
            family.add_metric([replica, *([label[1]] if label else [])], value)

        for replica, stats in self.reports.items():
            count("steps", "Denoising forwards", stats.steps, replica)
            count("rows", "Rows of all denoising forwards; rows / steps is the batch occupancy", stats.rows, replica)
            count("images", "Images finished", stats.images, replica)
            count("queue_seconds", "Time requests waited before their first step", stats.queue_seconds, replica)
            for outcome in ("requests", "failed", "cancelled", "refused"):
                count("jobs", "Requests by outcome", getattr(stats, outcome), replica, ("outcome", outcome))
            for stage, seconds in stats.seconds.items():
                count("stage_seconds", "Time of the compute thread by stage", seconds, replica, ("stage", stage))
            for event, number in stats.adapters.items():
                count(
                    "adapter_events",
                    "Hits, loads and evictions of the adapter tiers",
                    number,
                    replica,
                    ("event", event),
                )
            for name, value in stats.gauges.items():
                gauge = gauges.setdefault(
                    name,
                    GaugeMetricFamily(f"dreamfleet_{name}", f"Engine: {name.replace('_', ' ')}", labels=["replica"]),
                )
                gauge.add_metric([replica], value)
        yield from counters.values()
        yield from gauges.values()


class Metrics:
    """The metrics of one HTTP app."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._engines = _Engines()
        self._registry.register(self._engines)
        self.requests = Counter(
            "dreamfleet_http_requests", "HTTP requests", ["route", "method", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "dreamfleet_http_seconds",
            "Time to the end of the reply",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self.damaged = Gauge(
            "dreamfleet_damaged_adapters",
            "Adapters left out of lists because one of their files cannot be read; the log names them",
            registry=self._registry,
        )
        self.open = Gauge("dreamfleet_http_open", "HTTP requests being handled", registry=self._registry)

    def render(self, reports: Mapping[str, EngineStats]) -> bytes:
        """Prometheus' text format."""
        self._engines.reports = reports
        return generate_latest(self._registry)
