"""A request's id is its trace: every stage is found by it, and no word of a request stands in a
span.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.helpers.one_process import FORBIDDEN, Platform

PROMPT = "a red circle beside a zeppelin"


@pytest.fixture(scope="module")
def spans() -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)  # once in a process: later tests make spans for nobody
    yield exporter
    exporter.shutdown()


def test_a_requests_stages_are_found_by_its_id(
    served: Platform, spans: InMemorySpanExporter
) -> None:
    # A client's own trace is not joined: it could be anybody's.
    answer = served.call(
        "POST",
        "/v1/images/generations",
        {"prompt": PROMPT},
        traceparent=f"00-{'1' * 32}-{'2' * 16}-01",
    )
    assert answer.status == 200
    number = int(answer.headers["x-request-id"].removeprefix("req_"), 16)
    of_request = [span for span in spans.get_finished_spans() if span.context.trace_id == number]
    # The framework's own are in the same trace.
    assert {span.name for span in of_request} > {
        "guard prompts",
        "count tokens",
        "draw",
        "decode",
        "finish",
    }
    assert not any(
        span.context.trace_id == int("1" * 32, 16) for span in spans.get_finished_spans()
    )


def test_a_refusal_is_named_and_its_words_are_not(
    served: Platform, spans: InMemorySpanExporter
) -> None:
    refused = served.draw(f"{FORBIDDEN} on a zeppelin")
    number = int(refused.headers["x-request-id"].removeprefix("req_"), 16)
    of_request = [span for span in spans.get_finished_spans() if span.context.trace_id == number]
    assert {span.name: span.status.description for span in of_request}[
        "guard prompts"
    ] == "moderation_blocked"
    assert "draw" not in {span.name for span in of_request}
    assert not any("zeppelin" in span.to_json() for span in spans.get_finished_spans())
