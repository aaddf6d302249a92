"""OpenTelemetry: spans from the door to the steps, the caller's trace, and nothing at all without the extra."""
import asyncio, subprocess, sys, time

import httpx
import pytest
from starlette.testclient import TestClient

from aura_engine.config import SettingsError, load_settings
from aura_engine.server import create_server
from aura_engine.traces import traced
from aura_engine.transport import Remote, generation
from aura_engine.types import AuraError
from conftest import ROOT, start

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


@pytest.fixture
def collector():
    """A receiver of OTLP over HTTP: the spans that were sent to it, with the name of their service."""
    import gzip, http.server, threading
    wire = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    got = []
    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip": body = gzip.decompress(body)
            for resource in wire.ExportTraceServiceRequest.FromString(body).resource_spans:
                name = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
                got.extend((self.path, name, span) for scope in resource.scope_spans for span in scope.spans)
            answer = wire.ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()


@pytest.mark.slow
def test_a_server_sends_its_spans_to_a_collector(collector, tmp_path):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    url, got = collector
    server = start([sys.executable, "app.py"], tmp_path / "server.log", OTEL_EXPORTER_OTLP_ENDPOINT=url, OTEL_BSP_SCHEDULE_DELAY=200)
    try:
        server.wait_ready()
        headers = {"traceparent": f"00-{CALLER}-00f067aa0ba902b7-01"}
        answer = httpx.post(server.url + "/generate", json={"prompt": "a fox", "steps": 3}, headers=headers, timeout=60)
        assert answer.status_code == 200
        end = time.monotonic() + 20
        while not any(span.name == "POST /generate" for *_, span in got): assert time.monotonic() < end; time.sleep(.1)
    finally: server.process.kill()
    mine = {span.name: span for *_, span in got if span.trace_id.hex() == CALLER}
    assert {"POST /generate", "plan", "queue", "steps", "decode", "encode"} <= set(mine) and len(mine["steps"].events) == 3
    assert {(path, name) for path, name, _ in got} == {("/v1/traces", "aura_engine")}
    assert not any("/ready" in span.name or "/health" in span.name for *_, span in got)


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
