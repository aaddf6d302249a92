"""Shared by all tests: the slow mark, no network, and servers as real processes."""
import json, os, random, shutil, signal, socket, subprocess, sys, time, urllib.error, urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"
# What is tested must not depend on whether OpenVINO is installed, nor on what this machine is fast in;
# test_optimize and test_candidates name theirs.
FIXED = {"SD_BACKEND": "torch", "SD_PRECISION": "fp32"}
os.environ |= FIXED
for p in (str(ROOT / "tools"), str(ROOT)):
    if p not in sys.path: sys.path.insert(0, p)

OURS = ("SD_", "AURA_", "SPACE_", "ALLOW_ORIGINS", "TORCH_COMPILE", "PORT", "HOST", "DEPLOY_TO")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes or a tool that is not everywhere; run by `make test-slow`")
    # A background job ignores Ctrl-C, and so would all its children: tests that press it need the ordinary behaviour.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


def repo_files(root=ROOT):
    """Files under version control or about to be. Where there is no git, all that are not made by make."""
    ls = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True)
    files = [root / f for f in ls.stdout.split("\0") if f] if ls.returncode == 0 else root.rglob("*")
    made = {".git", ".venv", "build", "dist", "__pycache__"}
    return sorted(f for f in files if f.is_file() and not made & set(f.relative_to(root).parts))


def clean_env(**env):
    """This process's environment without what would configure an engine, plus `env`."""
    return {k: v for k, v in os.environ.items() if not k.startswith(OURS)} | FIXED | {k: str(v) for k, v in env.items()}


def free_port():
    """A port nobody listens on, below those that the system gives to outgoing connections, which could take it meanwhile."""
    while True:
        with socket.socket() as s:
            try: s.bind(("127.0.0.1", random.randrange(10_000, 32_000)))
            except OSError: continue
            return s.getsockname()[1]


@dataclass
class Server:
    """A running engine: `url`, its `process`, everything it printed in `log`."""
    url: str
    process: subprocess.Popen
    log: Path

    def status(self, path):
        """HTTP status of GET `path`. None while nothing listens."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as r: return r.status
        except urllib.error.HTTPError as e: return e.code
        except OSError: return None

    def post(self, path, body, timeout=120):
        """POST `body` as JSON, return the decoded answer. An error status raises."""
        req = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(req, timeout=timeout) as r: return json.load(r)

    def wait_ready(self, seconds=180):
        """Return when GET /ready says 200. A process that dies, or takes too long, fails the test with its own words."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None: pytest.fail(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            if self.status("/ready") == 200: return self
            time.sleep(0.2)
        pytest.fail(f"the server was not ready after {seconds} s:\n{self.tail()}")

    def tail(self): return self.log.read_text(encoding="utf-8", errors="replace")[-4000:]

    def stop(self, seconds=30):
        """SIGTERM, then SIGKILL for what ignores it -> the exit status."""
        self.process.terminate()
        try: return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def start(argv, log, cwd=ROOT, port=None, **env):
    """Start a server process on `port`, or on a free one. The caller waits for it and stops it."""
    port = port or free_port()
    with open(log, "wb") as out:
        process = subprocess.Popen(argv, cwd=cwd, env=clean_env(PORT=port, **env), stdout=out, stderr=subprocess.STDOUT)
    return Server(f"http://127.0.0.1:{port}", process, Path(log))


@pytest.fixture(scope="session")
def make_server(tmp_path_factory):
    """`make_server(AURA_MAX_BATCH=1)`: a ready `python app.py` with that environment. All are stopped at the end."""
    running = []

    def make(wait=True, **env):
        running.append(start([sys.executable, "app.py", "--host", "127.0.0.1"], tmp_path_factory.mktemp("server") / "log.txt", **env))
        return running[-1].wait_ready() if wait else running[-1]

    yield make
    for s in running: s.stop()


@pytest.fixture(scope="session")
def server(make_server):
    """The one default server that tests share. A test that configures or stops a server makes its own."""
    return make_server()


@pytest.fixture(scope="session")
def locked(make_server, tmp_path_factory):
    """A server that asks for its key, "sesame", and has a LoRA, "ink"."""
    lora = tmp_path_factory.mktemp("loras") / "ink.safetensors"
    shutil.copy(ROOT / "aura_engine/assets/embedded/lcm-lora/pytorch_lora_weights.safetensors", lora)
    return make_server(AURA_API_KEY="sesame", SD_LORAS=f"ink={lora}")
