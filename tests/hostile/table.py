"""The ten attacks that once stopped the server for everybody, sent again, with a victim beside them. 09f_app shows the table."""
import json, os, re, statistics, subprocess, sys, threading, time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from . import CORPUS
from .attack import Answer, Attack, MiB, Target, http

ROOT = Path(__file__).resolve().parents[2]
KEY = b"authorization: Bearer sesame\r\n"
# rows of the corpus, and what they did before: on one core, without the limits of today
BEFORE = {
    "330 random words": "2 to 10 s of blocked loop",
    "two JPEGs of 8,000 scans": "21 s; victim after 82 s",
    "a PNG of 1.9 million chunks": "7.5 s",
    "four PNGs of 16 Mpx RGBA, three times": "+600 MB; victim after 88 s (twelve times)",
    "a receipt's PNG of 13,300 x 13,300": "+700 MB a thread; victim after 18 s",
    "32 MiB of nested lists without the key": "17 to 25 s, +860 MB",
    "2.5 million keys": "no answer in 120 s, +4.4 GB",
    "1 million versions": "27 s, an answer of 65 MB",
    "eight bodies that stop one byte short of 32 MiB": "others refused for up to 34 minutes",
    "17 shapes": "+1.4 GB; victim 30 times as long",
    "17 aspect ratios": "the same",
    "60 jobs of 200 steps": "39 of 39 honest requests refused",
}


@dataclass
class Process:
    """A server with a key, and what the system tells about its process."""
    url: str
    system: psutil.Process

    def cpu(self) -> float:
        used = self.system.cpu_times()
        return used.user + used.system

    def forget_peak(self) -> None:
        with open(f"/proc/{self.system.pid}/clear_refs", "w") as f: f.write("5")

    def peak(self) -> int:
        with open(f"/proc/{self.system.pid}/status") as f: return int(re.search(r"VmHWM:\s+(\d+)", f.read())[1]) * 1024

    def send(self, path: str, body: bytes = b"", method: str = "POST", source: str = "127.0.0.2") -> Answer:
        target = Target(self.url)
        return target.exchange(with_key(http(target.host, path, body, method=method)), source, patience=300)

    def ask(self) -> float:
        """Seconds of an ordinary picture; it must be there."""
        start = time.monotonic()
        answer = self.send("/generate", json.dumps({"prompt": "a red apple", "seed": 11, "steps": 4}).encode())
        assert answer.status == 200, answer.start[:300]
        return time.monotonic() - start

    def idle(self, seconds: float = 120) -> None:
        """Wait until nothing is in the engine."""
        end = time.monotonic() + seconds
        while json.loads(self.send("/health", method="GET").body)["queue"]["length"] and time.monotonic() < end: time.sleep(0.1)


def with_key(message: bytes) -> bytes: return message.replace(b"\r\n", b"\r\n" + KEY, 1)


def prepared(attack: Attack, host: str) -> Attack:
    """The attack by somebody who has the key, unless it is about having none. Making its requests must not delay the victim."""
    messages = list(attack.requests(host))
    if not attack.keyed: messages = [with_key(message) for message in messages]
    return replace(attack, requests=lambda host: messages)


@contextmanager
def served() -> Iterator[Process]:
    """A server process with the embedded model on torch, ready."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SD_", "AURA_", "HOST"))}
    env |= {"PORT": "0", "AURA_API_KEY": "sesame", "SD_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(ROOT / "app.py")], env=env, stderr=subprocess.PIPE, text=True)
    try:
        url = None
        for line in process.stderr or ():
            if found := re.search(r"Uvicorn running on (http://[\d.:]+)", line): url = found[1]
            if '"event": "ready"' in line: break
        threading.Thread(target=process.stderr.read, daemon=True).start()
        server = Process(url, psutil.Process(process.pid))
        while server.send("/ready", method="GET").status != 200: time.sleep(0.1)     # it says so a moment after the log
        yield server
    finally:
        process.terminate()
        process.wait(60)


@dataclass(frozen=True)
class Seen:
    """What an attack cost: seconds of the server's processor, bytes it grew by, the victim's slowest picture against its usual one."""
    name: str
    cpu: float
    grown: int
    slower: float
    statuses: tuple[int, ...]

    def __str__(self) -> str:
        answers = ", ".join("none" if s == 0 else str(s) for s in self.statuses)
        return f"| {self.name} | {BEFORE[self.name]} | {self.cpu:.1f} s | +{max(self.grown, 0) // MiB} MiB | {self.slower:.1f} | {answers} |"


def measured(server: Process, attack: Attack, usual: float) -> Seen:
    """Send an attack while a victim asks for one picture after the other."""
    target, answers = Target(server.url), []
    ready = prepared(attack, target.host)
    server.forget_peak()
    cpu, before = server.cpu(), server.peak()
    work = threading.Thread(target=lambda: answers.extend(ready.run(target)))
    work.start()
    time.sleep(0.1)
    waits = [server.ask()]
    while work.is_alive(): waits.append(server.ask())
    spent, grown = server.cpu() - cpu, server.peak() - before
    for a in answers:
        if a.status == 202: server.send(f"/jobs/{json.loads(a.body)['id']}", method="DELETE")
    server.idle()
    return Seen(attack.name, spent, grown, max(waits) / usual, tuple(sorted({a.status for a in answers})))


def table(names: Iterable[str] = BEFORE) -> list[Seen]:
    """The attacks one after the other against one server."""
    rows = {attack.name: attack for attack in CORPUS}
    with served() as server:
        server.ask()
        usual = statistics.median(server.ask() for _ in range(9))
        return [measured(server, rows[name], usual) for name in names]


FLOODS = {"GET /openapi.json": b"", "GET /metrics": b"", "POST /generate": b'{"prompt":""}'}      # the last is refused


def flooded(server: Process, asked: str, usual: float, at_once: int = 64) -> str:
    """A row: the victim's pictures while one client has 64 cheap requests at once, again and again."""
    (method, path), over = asked.split(), threading.Event()

    def flood() -> None:
        while not over.is_set(): server.send(path, FLOODS[asked], method, source="127.0.0.3")

    threads = [threading.Thread(target=flood) for _ in range(at_once)]
    for thread in threads: thread.start()
    time.sleep(1)
    waits = [server.ask() / usual for _ in range(9)]
    over.set()
    for thread in threads: thread.join()
    return f"| {asked} | {statistics.median(waits):.1f} | {max(waits):.1f} |"


def floods() -> str:
    """The floods one after the other against one server, as a markdown table."""
    with served() as server:
        server.ask()
        rows = [flooded(server, asked, statistics.median(server.ask() for _ in range(9))) for asked in FLOODS]
    head = "| 64 at once | victim, times its usual | at worst |\n| --- | --- | --- |\n"
    return head + "\n".join(rows)


def as_markdown(seen: Iterable[Seen]) -> str:
    """The table as 09f_app shows it."""
    head = "| attack | before | processor | memory | victim, times its usual | answers |\n| --- | --- | --- | --- | --- | --- |\n"
    return head + "\n".join(map(str, seen))
