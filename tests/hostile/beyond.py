"""Tried after the list of the issue: what else the protocol, the jobs, the page and the numbers let a stranger do."""
import json
from dataclasses import dataclass

from .attack import SILENT, Answer, Attack, MiB, Siege, Target, http, question, row
from .wires import GOOD, chunked, head


@dataclass(frozen=True)
class Watchers(Attack):
    """Readers of one job's events who never read: `at_once` connections for a job that is long."""
    def run(self, target: Target, source: str = "127.0.0.1") -> list[Answer]:
        body = json.dumps({"route": "generate", "request": {"prompt": "an owl", "n": 4, "steps": 8}, "previews": True}).encode()
        job = target.exchange(http(target.host, "/jobs", body), source)
        where = f"/jobs/{json.loads(job.body)['id']}/events"
        readers = Siege(self.name, self.budget, lambda host: [http(host, where, kind="", method="GET")] * self.at_once, self.right, at_once=self.at_once)
        return [job, *readers.run(target, source)]


def get(path, n=1, **headers): return lambda host: [http(host, path, kind="", method="GET", **headers)] * n


def asked(*bodies): return lambda host: [http(host, "/generate", b.encode()) for b in bodies]


BIDI = "".join(chr(c) for c in (0x202A, 0x202B, 0x202D, 0x2066, 0x2067, 0x2068, 0x061C, 0x200F)) * 60
JOINED = "\U0001F9D1\u200D\U0001F680\uFE0F" * 140

BEYOND = (
    # HTTP
    row("thirty pictures in one breath", "requests of one connection", lambda host: [b"".join(http(host, "/generate", GOOD, connection="keep-alive") for _ in range(30)) + http(host, "/health", kind="", method="GET")], {200, 429}, cpu=20, answer=4 * MiB, to_the_end=True),
    row("a body in chunks of one byte, with 1,000 trailers", "headers after a body", lambda host: [head(host, "content-type: application/json", "transfer-encoding: chunked") + chunked(GOOD, 1)[:-2] + b"".join(b"x-%d: b\r\n" % i for i in range(1000)) + b"\r\n"], {SILENT, 200, 400, 431}, answer=MiB),
    row("a trailer that never ends", "headers after a body", lambda host: [head(host, "content-type: application/json", "transfer-encoding: chunked") + chunked(GOOD, 100)[:-2] + b"x: " + b"b" * 300_000], {SILENT, 200, 400, 431}, answer=MiB),
    row("a chunk of 16 digits", "chunks of a body", lambda host: [head(host, "content-type: application/json", "transfer-encoding: chunked") + b"ffffffffffffffff\r\n" + b" " * 100_000], {SILENT, 400, 408, 413, 422}),
    row("may I send 40 MiB?", "a body", lambda host: [head(host, "content-type: application/json", "content-length: 41943040", "expect: 100-continue", path="/refine")], {413}),
    row("expecting what nobody knows", "headers", lambda host: [http(host, "/generate", GOOD, expect="a miracle")], {200, 400, 417}, answer=MiB),
    row("other encodings, twice packed", "a compressed body", lambda host: [http(host, "/generate", b"\x1f\x8b" + bytes(500), content_encoding=kind) for kind in ("br", "zstd", "gzip, gzip", "identity, deflate", "x" * 4000)], {400, 413, 415, 422}),
    row("a WebSocket, HTTP/2 and a tunnel", "protocols", lambda host: [http(host, p, kind="", method="GET", connection="upgrade", upgrade=u, sec_websocket_key="dGhlIHNhbXBsZSBub25jZQ==", sec_websocket_version="13") for p, u in (("/", "websocket"), ("/jobs/0/events", "websocket"), ("/health", "h2c"))], {200, 400, 404, 426}, answer=MiB),
    row("a thousand ranges of the page", "files of the page", get("/studio/studio.js", range="bytes=" + ",".join(f"{i}-{i + 9}" for i in range(1000))), {200, 206, 416}, answer=MiB),
    row("files that are not of the page", "files of the page", lambda host: [http(host, p, kind="", method="GET") for p in ("/studio/..%2f..%2fapp.py", "/studio/%2e%2e/index.html", "/studio/index.html", "/studio/studio.js%00.css", "/studio/" + "a" * 5000)], {400, 404}),
    row("dates and tags of files, by the thousand", "headers", get("/", if_none_match=",".join(f'"{i}"' for i in range(2000)), if_modified_since="Thu, 99 Foo 99999 99:99:99 GMT"), {200, 304, 400, 431}, answer=MiB),

    # what needs no key
    row("300 times the numbers of /metrics", "work without a key", get("/metrics", 300), {200, 429}, cpu=10, at_once=8, answer=MiB),
    row("200 times the documents", "work without a key", lambda host: [m for p in ("/examples", "/openapi.json", "/docs", "/") for m in get(p, 50)(host)], {200, 429}, cpu=10, at_once=8, answer=4 * MiB),
    row("300 questions whether a page may ask", "work without a key", lambda host: [http(host, "/generate", kind="", method="OPTIONS", origin=f"http://evil{i}.example", access_control_request_method="POST", access_control_request_headers="a" * 4000) for i in range(300)], {400, 429}, cpu=8, at_once=4),

    # jobs
    row("150 readers of one job who never read", "readers of a job", lambda host: [], {SILENT, 200, 202, 429}, Watchers, at_once=150, cpu=15, rss=200 * MiB, answer=MiB),
    row("numbers of events that are none", "streams", lambda host: [http(host, "/jobs/0/events", kind="", method="GET", last_event_id=v) for v in ("9" * 9, "0x1", "-0", "1e9", "\x01", "١", "NaN")[:5]], {400, 404}),
    row("1,000 jobs that nobody has", "jobs that are asked after", lambda host: [http(host, f"/jobs/{i:032x}", kind="", method=m) for i in range(500) for m in ("GET", "DELETE")], {404, 429}, cpu=12, at_once=4),
    row("200 jobs that are taken back at once", "jobs that are kept", lambda host: [http(host, "/jobs", json.dumps({"route": "generate", "request": {"prompt": "an owl", "deadlineSeconds": 0.5, "n": 4, "steps": 50}}).encode())] * 200, {202, 422, 429}, cpu=30, at_once=4),

    # numbers and words
    row("deadlines at the edges", "deadlines", asked(*(f'{{"prompt":"a","steps":1,"deadlineSeconds":{v}}}' for v in ("0", "-0", "-0.0", "1e-300", "5e-324", "1e308", "-1e308", "true", '"9"', "null", "[]"))), {200, 422, 429}, answer=MiB),
    row("numbers that are not quite whole", "numbers", asked(*(f'{{"prompt":"a","steps":{s},"seed":{seed},"n":{n}}}' for s, seed, n in (("1.0", "2", "1"), ("1", "9007199254740991", "1"), ("1", "9007199254740992", "1"), ("1", "-0", "1"), ("1", "1e0", "1"), ("1.0000000001", "1", "1"), ("1", "1", "1.5"), ("1", "1", "-0.0"), ("true", "1", "1")))), {200, 422}, cpu=8, answer=MiB),
    row("temperatures and guidance at the edges", "numbers", asked(*(f'{{"prompt":"a","steps":1,"temperature":{t},"guidanceScale":{g}}}' for t, g in (("-0.0", "1"), ("5e-324", "1"), ("2", "1"), ("1.9999999999999999", "1"), ("0.7", "1e-320"), ("0.7", "-0.0"), ("0.7", "30")))), {200, 422}, cpu=8, answer=MiB),
    row("directions of writing that change 480 times", "tokens of one prompt", lambda host: [question(host, prompt=p, steps=1) for p in (BIDI, JOINED, "\u200b" * 600, "\U000E0041" * 400, "ﷺ" * 600)], {200, 422}, cpu=10, answer=MiB),
    row("2,000 spaces, and weights of endless digits", "reading of one prompt", lambda host: [question(host, prompt=p, steps=1) for p in (" " * 1999 + "x", "\n" * 1990 + "BREAK", "(a:" + "9" * 1990, "(a:" + "9" * 400 + ") b")], {200}, cpu=6, answer=MiB),
    row("the narrowest and the widest picture, four of each", "work of one request", lambda host: [question(host, prompt="an owl", n=4, steps=1, aspectRatio=r, resolution="high") for r in ("1:3", "3:1", "100:300", "999:333", "1000000:1000001")], {200, 422, 429}, cpu=12, answer=4 * MiB, at_once=2),

    # a flood of the smallest work there is
    row("100 pictures of one step", "work of one client", lambda host: [question(host, prompt="an owl", steps=1)] * 100, {200, 429}, cpu=30, at_once=16, answer=MiB),
)
