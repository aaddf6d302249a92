"""OpenTelemetry: spans from the door to the steps, the caller's trace, and nothing at all without the extra."""
import asyncio, subprocess, sys

import pytest
from starlette.testclient import TestClient

from aura_engine.config import SettingsError, load_settings
from aura_engine.server import create_server
from aura_engine.traces import traced
from aura_engine.transport import Remote, generation
from aura_engine.types import AuraError
from conftest import ROOT

trace = pytest.importorskip("opentelemetry.trace")
instrumentation = pytest.importorskip("opentelemetry.instrumentation.fastapi")
CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture(scope="module")
def seen():
    """An exporter that keeps spans in memory, at the provider of this process."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    if not isinstance(trace.get_tracer_provider(), TracerProvider): trace.set_tracer_provider(TracerProvider())
    exporter = InMemorySpanExporter()
    trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


@pytest.fixture(scope="module")
def web(seen):
    app, engine = create_server(load_settings(SD_MODEL_ID="embedded", SD_BACKEND="torch", SD_PRECISION="fp32"))
    instrumentation.FastAPIInstrumentor.instrument_app(app, exclude_spans=["receive", "send"])
    engine.start()
    assert engine.wait_ready(120), engine.reason
    with TestClient(app) as client: yield client
    engine.close()


def spans_of(seen): return {span.name: span for span in seen.get_finished_spans()}


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_one_request_is_one_trace_from_the_door_to_the_steps(web, seen, accept):
    seen.clear()
    headers = {"traceparent": f"00-{CALLER}-00f067aa0ba902b7-01", "accept": accept}
    assert web.post("/generate", json={"prompt": "a fox", "steps": 3}, headers=headers).status_code == 200
    spans = spans_of(seen)
    assert {"POST /generate", "plan", "queue", "steps", "decode", "encode"} <= set(spans)
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {CALLER}
    door, steps = spans["POST /generate"], spans["steps"]
    assert all(span.parent.span_id == door.context.span_id for name, span in spans.items() if name != door.name)
    assert [event.attributes["aura.step"] for event in steps.events] == [1, 2, 3] and door.start_time <= steps.start_time < steps.end_time
    assert spans["plan"].end_time <= spans["queue"].end_time == steps.start_time and steps.end_time == spans["decode"].start_time


def test_a_request_that_fails_says_so_in_its_trace(web, seen):
    seen.clear()
    assert web.post("/generate", json={"prompt": "a fox", "steps": 50, "deadlineSeconds": 0.2}).status_code in (422, 504)
    assert all(span.attributes["aura.code"] == "deadline" for span in seen.get_finished_spans() if span.name == "failed")


def test_the_client_passes_its_span_on(seen, echo):
    url, got = echo
    async def go():
        with trace.get_tracer("a program").start_as_current_span("mine") as mine:
            with pytest.raises(AuraError):
                async for _ in Remote("local", url).events(generation("a fox")): pass
        return f"{mine.get_span_context().trace_id:032x}"
    assert asyncio.run(go()) in got[-1]


@pytest.fixture
def echo():
    """A server that keeps the `traceparent` of each request."""
    import http.server, threading
    got = []
    class Echo(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(self.headers.get("traceparent", ""))
            self.send_error(404)
        do_GET = do_POST
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()


def test_the_environment_switches_it_on(monkeypatch):
    app, _ = create_server(load_settings(SD_MODEL_ID="embedded"))
    assert not traced(app, {}) and not traced(app, {"OTEL_SERVICE_NAME": "x"})
    monkeypatch.setitem(sys.modules, "opentelemetry.instrumentation.fastapi", None)
    with pytest.raises(SettingsError, match="otel"): traced(app, {"OTEL_TRACES_EXPORTER": "console"})


def test_nothing_of_it_is_needed():
    code = """
import sys
sys.modules["opentelemetry"] = None
from aura_engine.jobs import Job
from aura_engine.traces import spanned, trace_headers, trace_job
from aura_engine.types import Plan, Queued
job = Job(Plan(()), seconds=1)
job.emit(Queued(0, 1.0))
trace_job(job)
with spanned("x"): print(trace_headers())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "{}\n", done.stderr
