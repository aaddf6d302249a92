"""Sockets and headers: requests that come slowly, in the wrong order, half, or from where they should not."""
import json

from .attack import SILENT, MiB, Siege, http, question, row

GOOD = json.dumps({"prompt": "an owl", "steps": 1}).encode()


def chunked(body, size): return b"".join(b"%x\r\n%s\r\n" % (len(body[i:i + size]), body[i:i + size]) for i in range(0, len(body), size)) + b"0\r\n\r\n"


def head(host, *lines, path="/generate", method="POST"): return "\r\n".join([f"{method} {path} HTTP/1.1", f"host: {host}", "connection: close", *lines, "", ""]).encode("latin-1")


WIRES = (
    # bodies that do not come
    row("eight bodies that stop one byte short of 32 MiB", "bytes that wait", lambda host: [http(host, "/refine", b"{" + b" " * (2 * MiB), length=32 * MiB)] * 8, {SILENT, 408, 413, 429}, Siege, at_once=8, rss=400 * MiB),
    row("forty small bodies that stop one byte short", "connections that wait", lambda host: [http(host, "/generate", GOOD[:-1], length=len(GOOD))] * 40, {SILENT, 408, 413, 429}, Siege, at_once=40),
    row("forty bodies that come a byte at a time", "connections that wait", lambda host: [http(host, "/generate", b"{", length=60_000)] * 40, {SILENT, 400, 408, 413, 422, 429}, Siege, at_once=40, drip=b" ", cpu=6),
    row("forty headers that never end", "headers that wait", lambda host: [f"POST /generate HTTP/1.1\r\nhost: {host}\r\nx-a: ".encode()] * 40, {SILENT, 400, 408, 431}, Siege, at_once=40, drip=b"b", cpu=6),
    row("forty connections that say nothing", "connections that wait", lambda host: [b""] * 40, {SILENT, 408}, Siege, at_once=40),
    row("four readers who never read", "answers that wait", lambda host: [http(host, "/generate", json.dumps({"prompt": "an owl", "steps": 4, "n": 4}).encode(), accept="text/event-stream")] * 4, {SILENT, 200, 429}, Siege, at_once=4, cpu=12),

    # bodies that are not what their headers say
    row("a client that closes its half after asking", "a client's right", lambda host: [http(host, "/generate", GOOD)], {200}, half_close=True, answer=MiB),
    row("a body in chunks of one byte", "chunks of a body", lambda host: [head(host, "content-type: application/json", "transfer-encoding: chunked") + chunked(GOOD + b" " * 20_000, 1)], {200, 400, 413}, cpu=6, answer=MiB),
    row("a picture in 300,000 chunks of one byte", "chunks of a body", lambda host: [head(host, "content-type: application/json", "transfer-encoding: chunked", path="/refine") + b"1\r\nx\r\n" * 300_000], {400}),
    row("300,000 chunks for a question without a body", "chunks of a body", lambda host: [head(host, "transfer-encoding: chunked", path="/health", method="GET") + b"1\r\nx\r\n" * 300_000], {SILENT, 200, 400}),
    row("40 MiB that nobody asked for", "a body after the answer", lambda host: [head(host, f"content-length: {40 * MiB}", path=p, method=m) + bytes(40 * MiB) for m, p in (("GET", "/health"), ("OPTIONS", "/generate"))], {SILENT, 200, 405}, cpu=6),
    row("a body in chunks of 40 MiB in all", "a body", lambda host: [head(host, "content-type: application/json", "transfer-encoding: chunked", path="/refine") + chunked(b" " * (40 * MiB), MiB)], {413}, cpu=6),
    row("chunks with long extensions", "chunks of a body", lambda host: [head(host, "content-type: application/json", "transfer-encoding: chunked") + b"1;" + b"x" * 100_000 + b"\r\n{\r\n0\r\n\r\n"], {SILENT, 400, 413, 422, 431}),
    row("two lengths, and a length beside chunks", "one meaning for a request", lambda host: [head(host, "content-length: 5", "content-length: 6") + b"{}   ", head(host, "content-length: 5", "transfer-encoding: chunked", "content-type: application/json") + b"0\r\n\r\nGET /health HTTP/1.1\r\n\r\n"], {SILENT, 400, 422}),
    row("lengths that are none", "one meaning for a request", lambda host: [head(host, f"content-length: {n}") for n in ("-1", "0x10", "1e3", "9" * 400, "١")[:4]], {SILENT, 400, 413}),
    row("a request that is none", "one meaning for a request", lambda host: [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300), b"GET\r\n\r\n", b"\r\n" * 1000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"A" * 200_000], {SILENT, 400, 404, 405, 431, 505}),

    # headers
    row("a header of 200 KB", "headers", lambda host: [http(host, "/generate", GOOD, x_a="b" * 200_000)], {SILENT, 400, 431}),
    row("a header of 15 KB", "headers", lambda host: [http(host, "/generate", GOOD, x_a="b" * 15_000)], {200, 400, 431}, answer=MiB),
    row("5,000 headers", "headers", lambda host: [head(host, *[f"x-{i}: b" for i in range(5000)], "content-length: 0")], {SILENT, 400, 422, 431}),
    row("an Accept of 3,000 kinds", "headers", lambda host: [http(host, "/generate", GOOD, accept="a/b;q=0.1," * 3000)], {200, 400, 406, 431}, answer=MiB),
    row("an id of 10 KB and a key of 10 KB", "headers", lambda host: [http(host, "/generate", GOOD, x_request_id="\x01" * 10_000, authorization="Bearer " + "k" * 10_000)], {200, 400, 431}, answer=MiB),
    row("a key of every byte", "the key", lambda host: [http(host, "/generate", GOOD, authorization="Bearer " + bytes(range(128, 256)).decode("latin-1"))], {401}, keyed=True),
    row("a thousand keys", "the key", lambda host: [http(host, "/generate", GOOD, authorization=f"Bearer {i}") for i in range(300)], {401, 429}, keyed=True, cpu=8, at_once=4),
    row("a whole address for a path", "addresses", lambda host: [http(host, f"http://{host}{p}", kind="", method="GET") for p in ("/health", "/v1/models?a=b", "")], {200}),
    row("a whole address of another host", "web pages of others", lambda host: [http(host, "http://evil.example/sdapi/v1/progress", kind="", method="GET"), http(host, "http://127.0.0.1@evil.example/sdapi/v1/progress", kind="", method="GET"), http("127.0.0.1", "http://evil.example/generate", GOOD, origin="http://evil.example")], {403}),
    row("paths of every kind", "addresses", lambda host: [http(host, p, b"", kind="", method="GET") for p in ("/" + "a" * 50_000, "/jobs/" + "f" * 5000, "/jobs/..%2f..%2fetc%2fpasswd", "/jobs/%00", "/%ff%fe", "//evil.example/", "/health?" + "a=1&" * 5000)], {SILENT, 200, 307, 400, 401, 404, 414, 431}, cpu=6),
    row("methods of every kind", "addresses", lambda host: [http(host, "/generate", b"", kind="", method=m) for m in ("TRACE", "CONNECT", "PUT", "X" * 5000, "GET")], {SILENT, 400, 404, 405, 431, 501}, cpu=6),

    row("500 connections that ask nothing more", "connections that wait", lambda host: [f"GET /health HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()] * 500, {SILENT, 200, 503}, Siege, at_once=500, cpu=8),
    row("2,000 questions in one breath", "connections", lambda host: [f"GET /health HTTP/1.1\r\nhost: {host}\r\n\r\n".encode() * 2000 + head(host, path="/health", method="GET")], {200, 429}, cpu=20, answer=8 * MiB, to_the_end=True),
    row("fifty streams that are left at once", "work for nobody", lambda host: [http(host, "/generate", json.dumps({"prompt": "an owl", "steps": 50, "n": 4}).encode(), accept="text/event-stream")] * 50, {SILENT, 200, 429}, Siege, at_once=50, cpu=20),
    row("1,000 kinds of an address", "addresses that are remembered", lambda host: [http(host, f"/nowhere/{i}", b"", kind="", method="GET") for i in range(1000)], {404, 429}, cpu=12, at_once=4),

    # who asks
    row("a page that calls itself this host", "web pages of others", lambda host: [http("evil.example", "/generate", GOOD, origin="http://evil.example"), http("evil.example:7860", "/generate", GOOD, origin="http://evil.example:7860")], {403, 421}),
    row("a page of another origin", "web pages of others", lambda host: [http(host, "/generate", GOOD, origin=o) for o in ("http://evil.example", "null", "file://", "http://127.0.0.1.evil.example", f"http://{host}.evil.example")], {403}),
    row("forwarded for somebody else", "web pages of others", lambda host: [http(host, "/generate", GOOD, origin="http://evil.example", x_forwarded_host="evil.example", x_forwarded_proto="http", forwarded="host=evil.example")], {403}),
    row("a last event of long ago", "streams", lambda host: [http(host, "/jobs/0/events", b"", kind="", method="GET", last_event_id="9" * 5000), http(host, "/jobs/0/events", b"", kind="", method="GET", last_event_id="-1")], {400, 401, 404, 405, 410, 422}),
    row("an ordinary question", "nothing: it must not be refused", lambda host: [question(host, prompt="an owl", steps=1)], {200}, answer=MiB),
)
