"""A Hub of models on the loopback interface, and a process in which the real huggingface_hub client loads from it.

`ModelHub` serves repositories as huggingface.co does (listing, HEAD with hashes, Range) and has bad days on request.
`Worker` imports torch once and forks for each task, so that a cold cache and another environment cost no new start.
Run as a script this file is the worker.
"""
import functools, hashlib, json, os, re, signal, subprocess, sys, tempfile, threading, time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


class ModelHub:
    """`with ModelHub({"owner/name": {path: bytes}}) as hub`: `hub.url`. `hub.seen` is [(method, path, range)]. `hub.bad` holds [regex, how many times, what]."""

    def __init__(self, repos=()):
        self.repos, self.seen, self.bad, self.token = dict(repos), [], [], None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def log_message(self, *a): pass
            def do_GET(self): hub.answer(self)
            do_HEAD = do_GET
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def goes_wrong(self, pattern, times, what):
        """The next requests "METHOD path" that match: a (status, headers) answer, "cut", "stall" or "corrupt"."""
        self.bad.append([re.compile(pattern), times, what])

    def calm(self):
        self.bad, self.seen = [], []

    def counts(self, pattern=""):
        """How often each path was really fetched (GET) that matches."""
        return Counter(p for m, p, _ in self.seen if m == "GET" and re.search(pattern, p))

    def answer(self, h):
        path = h.path.split("?")[0]
        self.seen.append((h.command, path, h.headers.get("Range")))
        what = None
        for row in self.bad:
            if row[1] and row[0].search(f"{h.command} {path}"):
                row[1] -= 1
                what = row[2]
                break
        if isinstance(what, tuple): return send(h, what[0], b"{}", what[1])
        if what == "stall" and "/resolve/" not in path: return time.sleep(30)
        if self.token and h.headers.get("authorization") != f"Bearer {self.token}": return send(h, 401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        listing, file = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path), re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo, rev = (listing or file).groups()[:2] if listing or file else ("", None)
        if repo not in self.repos: return send(h, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if rev not in (None, "main", COMMIT): return send(h, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if listing: return send(h, 200, json.dumps({"id": repo, "sha": COMMIT, "siblings": [sibling(p, d) for p, d in self.repos[repo].items()]}).encode(), {"Content-Type": "application/json"})
        data = self.repos[repo].get(file[3])
        if data is None: return send(h, 404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        marks = {"ETag": f'"{etag(file[3], data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if what == "corrupt": data = data[:len(data) // 2] + b"\xff" * (len(data) - len(data) // 2)
        begin = int(m[1]) if (m := re.match(r"bytes=(\d+)-", h.headers.get("Range") or "")) else 0
        if begin: marks["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        send(h, 206 if begin else 200, data[begin:], marks, what)


def send(h, status, data, headers, what=None):
    """Answer. "cut" closes the line halfway, "stall" falls silent there, "slow" takes its time."""
    try:
        h.send_response(status)
        for k, v in {**headers, "Content-Length": str(len(data))}.items(): h.send_header(k, v)
        h.end_headers()
        if h.command == "HEAD": return
        if what == "slow": time.sleep(0.3)
        h.wfile.write(data[:len(data) // 2] if what in ("cut", "stall") else data)
        if what == "stall": h.wfile.flush(); time.sleep(60)
        if what in ("cut", "stall"): h.close_connection = True
    except OSError: pass


def etag(path, data):
    """The Hub's hash of a file: sha256 for large ones (LFS), git's sha1 for the others."""
    return hashlib.sha256(data).hexdigest() if path.endswith((".safetensors", ".bin")) else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sibling(path, data):
    more = {"lfs": {"sha256": etag(path, data), "size": len(data), "pointerSize": 100}} if path.endswith((".safetensors", ".bin")) else {}
    return {"rfilename": path, "size": len(data), "blobId": etag("", data), **more}


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


class Worker:
    """A process with torch, diffusers and the engine imported, that does each `worker(task, cache, **arguments)` in a fork of its own."""

    def __init__(self, hub, folder, **env):
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("SD_", "AURA_", "HF_"))}
        env = {**ours, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder), "XDG_CACHE_HOME": str(folder), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "2", "OMP_NUM_THREADS": "1", **env}
        self.process = subprocess.Popen([sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(folder / "worker.log", "w"), text=True)
        self.log = folder / "worker.log"

    def __call__(self, task, cache, **arguments):
        self.process.stdin.write(json.dumps({"task": task, "cache": str(cache), "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)


@functools.cache
def shared():
    """(hub, worker) that all tests of this process share. The hub is empty and calm until a test fills it."""
    hub = ModelHub()
    hub.__enter__()
    return hub, Worker(hub, Path(tempfile.mkdtemp(prefix="modelhub-")))


# inside the worker

def small_disk(folder, size):
    """Mount a tmpfs of `size` on `folder`, or make it "read-only", for this process alone. False where that is not allowed."""
    import ctypes
    os.makedirs(folder, exist_ok=True)
    mount = lambda *argv: subprocess.run(["mount", *argv], capture_output=True).returncode == 0
    if size == "read-only": return ctypes.CDLL(None).unshare(0x20000) == 0 and mount("--make-rprivate", "/") and mount("--bind", str(folder), str(folder)) and mount("-o", "remount,ro,bind", str(folder))
    return ctypes.CDLL(None).unshare(0x20000) == 0 and mount("--make-rprivate", "/") and mount("-t", "tmpfs", "-o", f"size={size}", "none", str(folder))


def load(patience=20, disk=None, env=None, **settings):
    """Load -> {"row", "revision", ...} or {"reason"}, with what Progress said on the way. `disk`: the size of a small one for the cache, or read-only."""
    import huggingface_hub
    os.environ.update(env or {})
    if disk and not small_disk(huggingface_hub.constants.HF_HUB_CACHE, disk): return {"skip": "mounting a tmpfs is not allowed here"}
    from aura_engine.config import load_settings
    from aura_engine.loader import Progress, load
    from aura_engine.types import AuraError
    seen, progress, begin = [], Progress(patience, every=0), time.monotonic()
    done = threading.Event()

    def watch():
        while not done.wait(0.02):
            now = {**progress.said(), "reason": progress.reason}
            if not seen or seen[-1] != now: seen.append(now)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        parts = load(load_settings(SD_DEVICE="cpu", **settings), progress)
        out = {"row": parts.row.name, "revision": parts.revision, "notes": parts.notes, "dtype": str(parts.dtype), "unet": fingerprint(parts.unet), "vae": type(parts.vae).__name__}
    except AuraError as e: out = {"reason": e.detail}
    done.set()
    watcher.join()
    left = [str(p) for p in Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("*.incomplete")]
    return {**out, "seconds": time.monotonic() - begin, "seen": seen, "unfinished": left}


def killed(**settings):
    """Load in a process that is killed as soon as a large file has begun to arrive -> {name: bytes} of what it left."""
    import huggingface_hub
    if (pid := os.fork()) == 0: load(**settings)
    left, end = {}, time.monotonic() + 60
    while not any(left.values()) and time.monotonic() < end:
        time.sleep(0.1)
        left = {p.name: p.stat().st_size for p in Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("*.incomplete")}
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return {"left": {p.name: p.stat().st_size for p in Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("*.incomplete")}}


def fingerprint(model): return round(sum(p.double().abs().sum().item() for p in model.parameters()), 4)


def serve(requests=(), **settings):
    """An engine asked through its routes: [(route, body)] -> statuses, sizes, warnings and /health."""
    import asyncio, base64, io
    import httpx
    from PIL import Image
    from aura_engine.app import create_app
    from aura_engine.config import load_settings
    from aura_engine.engine import Engine
    engine = Engine(load_settings(**{"SD_DEVICE": "cpu", "SD_BACKEND": "torch", "AURA_MAX_BATCH": 1, **settings})).start()
    engine.wait_ready(120)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(engine)), base_url="http://engine", timeout=120) as web:
            return [await web.post(route, json=body) for route, body in requests], (await web.get("/health")).json()
    answers, health = asyncio.run(ask())
    def told(r):
        body = r.json()
        if r.status_code != 200: return {"status": r.status_code, "detail": body["detail"]}
        images = [Image.open(io.BytesIO(base64.b64decode(t))) for t in body["images"]]
        return {"status": 200, "sizes": [im.size for im in images], "colours": [len(im.getcolors(1 << 24)) for im in images], "warnings": body["warnings"], "receipts": body["receipts"]}
    return {"health": health, "answers": [told(r) for r in answers]}


def work():
    import huggingface_hub
    from aura_engine import app, engine                                  # noqa: F401  the slow imports, once
    from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline    # noqa: F401
    for line in sys.stdin:
        task = json.loads(line)
        into, out = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(into)
            try:
                huggingface_hub.constants.HF_HUB_CACHE = task["cache"]
                huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 2**18      # it hands over 10 MB at a time; these files are smaller than that
                answer = {"load": load, "killed": killed, "serve": serve}[task["task"]](**task["arguments"])
            except BaseException:
                import traceback
                answer = {"error": traceback.format_exc()}
            with os.fdopen(out, "w") as f: f.write(json.dumps(answer))
            os._exit(0)
        os.close(out)
        with os.fdopen(into) as f: text = f.read()
        os.waitpid(pid, 0)
        print(text or json.dumps({"error": "the worker's child died"}), flush=True)


if __name__ == "__main__": work()
