"""Traces by request id: a request's id is its trace, so whoever has the id of an answer finds what
it went through.

Serve makes spans of its proxies and replicas; ours, below the same trace, are an order's stages.
Spans go to the collector that OpenTelemetry's own variables name, OTEL_EXPORTER_OTLP_ENDPOINT first
of all, where the settings ask for them (`traces`). No words of a request stand in a span: facts are
numbers and names of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.trace import NonRecordingSpan, SpanContext, Status, StatusCode, TraceFlags

from pipelines.serving.errors import ApiError

EXPORTER = f"{__name__}:processors"
PREFIX = "req_"  # 32 hexadecimal digits follow: as long as a trace's id


def traceparent(request_id: str) -> str:
    """The header by which Serve's spans become parts of the request's trace."""
    digits = request_id.removeprefix(PREFIX)
    return f"00-{digits}-{digits[:16]}-01"


@contextmanager
def stage(request_id: str, name: str, **facts: int) -> Iterator[None]:
    """A span of a request. An error is named by its code alone: its text could hold
    what was asked.
    """
    span = trace.get_tracer(__name__).start_span(name, _trace(request_id), attributes=facts or None)
    try:
        yield
    except BaseException as error:
        code = error.problem.code if isinstance(error, ApiError) else type(error).__name__
        span.set_status(Status(StatusCode.ERROR, code))
        raise
    finally:
        span.end()


def processors() -> list[SpanProcessor]:
    """For Serve, in each of its processes."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


def _trace(request_id: str) -> Context | None:
    """The request's trace as the parent of a span; None for an id that the door has not given."""
    digits = request_id.removeprefix(PREFIX)
    try:
        parent = SpanContext(
            int(digits, 16), int(digits[:16], 16), True, TraceFlags(TraceFlags.SAMPLED)
        )
    except ValueError:
        return None
    return trace.set_span_in_context(NonRecordingSpan(parent)) if parent.is_valid else None
