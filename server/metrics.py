"""What /metrics reports, named after https://prometheus.io/docs/practices/naming/"""

from collections.abc import Sequence

import prometheus_client as prometheus

from server.scheduler import InferenceEngine


class ServerMetrics:
    """Counters, gauges and histograms of one server, in a registry of their own."""

    media_type: str = prometheus.CONTENT_TYPE_LATEST

    def __init__(self, engine: InferenceEngine) -> None:
        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> prometheus.Counter:
            return prometheus.Counter(f"nano_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, first: float) -> prometheus.Histogram:
            buckets = [first * 2**i for i in range(16)]
            return prometheus.Histogram(f"nano_{name}_seconds", text, buckets=buckets, registry=registry)

        def gauge(name: str, text: str) -> prometheus.Gauge:
            return prometheus.Gauge(f"nano_requests_{name}", text, registry=registry)

        self.requests = counter("requests", "HTTP requests (499: the client left)", ("route", "status"))
        self.prompt_tokens = counter("prompt_tokens", "tokens in prompts")
        self.completion_tokens = counter("completion_tokens", "tokens in answers")
        self.first_token = histogram("time_to_first_token", "from the request to each answer's first", 0.002)
        self.step = histogram("step", "one step of the model: a token for each running answer", 0.0005)
        gauge("running", "answers being generated").set_function(lambda: engine.n_running)
        gauge("waiting", "answers waiting for a slot").set_function(lambda: engine.n_waiting)
        engine.on_step = self.step.observe

    def count_request(self, route: str | None, status: int) -> None:
        """Count an HTTP request. route: None if there is none, or if it was refused before routing."""
        self.requests.labels(route or "none", status).inc()

    @property
    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return prometheus.generate_latest(self.registry)
