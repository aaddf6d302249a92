"""A proxy on loopback, as it stands before a Space: plays prepared answers, then relays to a real engine."""
import json, socket, threading
from urllib.parse import urlsplit


def page(status, html="", **headers): return answer(status, f"<html><body>{html}</body></html>", "text/html", **headers)


def problem(status, code, detail, **headers):
    """An engine's own error."""
    body = json.dumps({"type": f"urn:aura:{code}", "title": code, "status": status, "detail": detail, "errors": []})
    return answer(status, body, "application/problem+json", x_aura_engine="0", **headers)


def answer(status, body, kind="application/json", **headers):
    """A raw HTTP answer. Header names are written with underscores."""
    body = body.encode()
    lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", f"content-length: {len(body)}", "connection: close", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def hang_up(s):
    """Close a socket at once, also under a thread that reads from it."""
    try: s.shutdown(socket.SHUT_RDWR)
    except OSError: pass
    s.close()


class Edge:
    """`script`: raw answers, one a connection. Then connections go to `target`. `cut`: a relayed answer ends after so many bytes, or only the first (`once`).
    `host`: what Host is rewritten to. `requests`: [(first line, headers, body)]."""

    def __init__(self, *script, target=None, cut=None, once=False, host=None, port=0):
        self.script, self.target, self.cut, self.requests, self.open = list(script), target, cut, [], []
        self.once, self.host = once, host
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc):
        for s in (self.listener, *self.open): hang_up(s)

    def _accept(self):
        while True:
            try: conn, _ = self.listener.accept()
            except OSError: return
            self.open.append(conn)
            threading.Thread(target=self._answer, args=(conn,), daemon=True).start()

    def _answer(self, conn):
        data = b""
        while b"\r\n\r\n" not in data:
            if not (more := conn.recv(65536)): return conn.close()
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (ln.partition(":") for ln in lines)}
        while len(body) < int(headers.get("content-length", 0)): body += conn.recv(65536)
        self.requests.append((first, headers, body))
        if self.script: conn.sendall(self.script.pop(0))
        elif self.target: self._relay(conn, self._rewritten(head) + b"\r\n\r\n" + body)
        hang_up(conn)

    def _rewritten(self, head):
        """One request a connection, so that each has its Host rewritten."""
        if self.host is None: return head
        lines = [ln for ln in head.split(b"\r\n") if not ln.lower().startswith((b"host:", b"connection:"))]
        return b"\r\n".join([*lines, b"Host: " + self.host.encode(), b"Connection: close"])

    def _relay(self, conn, data):
        where = urlsplit(self.target)
        with socket.create_connection((where.hostname, where.port)) as engine:
            engine.sendall(data)
            threading.Thread(target=self._hangup, args=(conn, engine), daemon=True).start()
            sent = 0
            try:
                while (self.cut is None or sent < self.cut) and (more := engine.recv(65536)):
                    conn.sendall(more)
                    sent += len(more)
            except OSError: pass
        if self.once and self.cut is not None and sent >= self.cut: self.cut = None

    def _hangup(self, conn, engine):
        """What the client sends goes on to the engine, its leaving too."""
        try:
            while more := conn.recv(65536): engine.sendall(more)
            engine.shutdown(socket.SHUT_RDWR)
        except OSError: pass
