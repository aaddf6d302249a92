"""A row of the corpus, and how its requests are sent: raw, so that nothing corrects them on the way."""
import json, re, select, socket, time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

MiB = 2**20
SILENT = 0                                   # the connection ended without an answer
HANGS = -1                                   # nothing came for as long as anybody would wait
INTERIM = re.compile(rb"\A(?:HTTP/1\.1 1\d\d [^\r]*\r\n(?:[^\r]+\r\n)*\r\n)+")      # every client reads over these


@dataclass(frozen=True)
class Answer:
    """What came back: `status` (SILENT and HANGS are none), all bytes that were read, and the beginning of them."""
    status: int
    size: int
    start: bytes = b""

    @property
    def head(self) -> str: return self.start.partition(b"\r\n\r\n")[0].decode("latin-1").lower()

    @property
    def body(self) -> bytes: return self.start.partition(b"\r\n\r\n")[2]


@dataclass(frozen=True)
class Target:
    """The server under attack. `key`: its API key, which an attacker does not have."""
    url: str

    @property
    def host(self) -> str: return urlsplit(self.url).netloc

    def connect(self, source: str = "127.0.0.1", timeout: float = 120) -> socket.socket:
        """A connection from an address of this machine: each 127.x.y.z is another client to the server."""
        where = urlsplit(self.url)
        return socket.create_connection((where.hostname, where.port), timeout=timeout, source_address=(source, 0))

    def exchange(self, data: bytes, source: str = "127.0.0.1", half_close: bool = False, patience: float = 120, to_the_end: bool = False) -> Answer:
        """Send `data` and read at the same time: one answer, or all until the server closes. HANGS: silent for `patience` seconds."""
        with self.connect(source) as s:
            s.setblocking(False)
            return _talk(s, memoryview(data), half_close, patience, to_the_end)


def _talk(s: socket.socket, left: memoryview, half_close: bool, patience: float, to_the_end: bool) -> Answer:
    start, size = b"", 0
    while True:
        can_read, can_write, _ = select.select([s], [s] if left else [], [], patience)
        if not can_read and not can_write: return Answer(HANGS, size, start)
        try:
            if can_write:
                left = left[s.send(left[:MiB]):]
                if not left and half_close: s.shutdown(socket.SHUT_WR)
            if can_read:
                data = s.recv(MiB)
                if not data: break
                size += len(data)
                if len(start) < MiB: start = INTERIM.sub(b"", start + data)
                if not to_the_end and _whole(start): break
        except (BrokenPipeError, ConnectionResetError): break
    first = start.split(b"\r\n", 1)[0].split(b" ")
    return Answer(int(first[1]) if len(first) > 1 and first[1].isdigit() else SILENT, size, start)


def _whole(start: bytes) -> bool:
    """Whether an answer with a Content-Length is there to its end. A longer one than MiB is read until the server closes."""
    head, sep, _ = start.partition(b"\r\n\r\n")
    if not sep: return False
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"): return len(start) >= len(head) + 4 + int(line.split(b":")[1])
    return False


def http(host: str, path: str, body: bytes = b"", kind: str = "application/json", method: str = "POST", length: int | None = None, **headers: str) -> bytes:
    """A raw request; header names are written with underscores. `length`: what Content-Length says, if not the truth."""
    lines = {"host": host, "connection": "close", "content-length": str(len(body) if length is None else length)}
    if kind: lines["content-type"] = kind
    lines |= {k.replace("_", "-").lower(): v for k, v in headers.items()}
    return (f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n").encode("latin-1") + body


def question(host: str, path: str = "/generate", **fields) -> bytes:
    """An ordinary JSON request."""
    return http(host, path, json.dumps(fields).encode())


@dataclass(frozen=True)
class Attack:
    """What is sent, which budget it attacks, and what a server that holds the budget does.

    `requests(host)` gives raw HTTP messages; `right`: the statuses that are right for them. The server may spend at most
    `cpu` seconds of processor time in all, grow by at most `rss` bytes meanwhile, and answer with at most `answer` bytes.
    `keyed`: the server has an API key and the attacker does not.
    """
    name: str
    budget: str
    requests: Callable[[str], Iterable[bytes]]
    right: frozenset[int]
    cpu: float = 4.0
    rss: int = 160 * MiB
    answer: int = 64 * 1024
    at_once: int = 1
    half_close: bool = False
    to_the_end: bool = False
    keyed: bool = False

    def run(self, target: Target, source: str = "127.0.0.1") -> list[Answer]:
        """Send everything and give the answers."""
        with ThreadPoolExecutor(self.at_once) as pool:
            send = lambda data: target.exchange(data, source, self.half_close, to_the_end=self.to_the_end)
            return list(pool.map(send, self.requests(target.host)))

    def __str__(self) -> str: return self.name


@dataclass(frozen=True)
class Siege(Attack):
    """Connections that are kept open while others want to be served: `requests` are sent, then `drip` more bytes a while."""
    drip: bytes = b""

    def run(self, target: Target, source: str = "127.0.0.1") -> list[Answer]:
        """Open all, say what there is to say, hold on for two seconds, and read what came."""
        sockets = [target.connect(source) for _ in range(self.at_once)]
        try:
            for s, data in zip(sockets, self.requests(target.host)):
                try: s.sendall(data)
                except OSError: pass         # refused while it was sending: the answer is read below
            for _ in range(20):
                time.sleep(0.1)
                for s in sockets if self.drip else ():
                    try: s.sendall(self.drip)
                    except OSError: pass
            return [_so_far(s) for s in sockets]
        finally:
            for s in sockets: s.close()


def _so_far(s: socket.socket) -> Answer:
    s.settimeout(0.05)
    try: data = INTERIM.sub(b"", s.recv(65536))
    except OSError: return Answer(SILENT, 0)
    first = data.split(b"\r\n", 1)[0].split(b" ")
    return Answer(int(first[1]) if len(first) > 1 and first[1].isdigit() else SILENT, len(data), data)


def row(name: str, budget: str, requests: Callable[[str], Iterable[bytes]], right: Iterable[int], kind: type[Attack] = Attack, **more) -> Attack:
    """A row of the corpus."""
    return kind(name, budget, requests, frozenset(right), **more)
