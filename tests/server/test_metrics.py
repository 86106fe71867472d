"""The numbers that Prometheus reads."""

from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from server.metrics import ServerMetrics


def test_numbers_are_reported():
    engine = SimpleNamespace(n_running=2, n_waiting=3, on_step=None)
    metrics = ServerMetrics(engine)
    metrics.count_request("/health", 200)
    metrics.count_request(None, 404)
    metrics.completion_tokens.inc(7)
    engine.on_step(0.25)
    values = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.text.decode())
        for sample in family.samples
    }
    assert (
        values["nano_requests_total", "/health", "200"] == values["nano_requests_total", "404", "none"] == 1
    )
    assert values["nano_completion_tokens_total",] == 7 and values["nano_step_seconds_sum",] == 0.25
    assert (values["nano_requests_running",], values["nano_requests_waiting",]) == (2, 3)
    assert metrics.media_type.startswith("text/plain")
