"""Machines that look for trouble: schemathesis over the OpenAPI schema, hypothesis over raw JSON, mutated pictures."""
import base64, io, json, random, shutil, subprocess, sys, threading, time
from pathlib import Path

import httpx
import pytest
import uvicorn
from conftest import clean_env
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from aura_engine import types
from aura_engine.api import create_app
from aura_engine.compat import routes as compat_routes, shapes
from aura_engine.config import load_settings
from aura_engine.engine import Job
from aura_engine.models import ROWS
from aura_engine.types import Done, Queued, Step

HEADERS = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def web(server):
    with httpx.Client(base_url=server.url, timeout=180) as client: yield client


def file(fmt="PNG", size=(64, 64)):
    out = io.BytesIO()
    Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 20).convert("RGB").save(out, fmt)
    return out.getvalue()


# raw JSON: what Python can write and a schema cannot say

numbers = st.one_of(st.integers(), st.floats(), st.just(10**400))
texts = st.text(st.characters(), max_size=30)                              # lone surrogates included
values = st.recursive(st.one_of(st.none(), st.booleans(), numbers, texts), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8)
names = st.one_of(st.sampled_from(["prompt", "aspectRatio", "temperature", "resolution", "seed", "n", "steps", "guidanceScale", "negativePrompt", "format", "refinePrompt", "images", "config", "receipt", "image", "route", "request", "inputs", "parameters", "size"]), texts)
bodies = st.dictionaries(names, values, max_size=6)
routes = st.sampled_from(["/generate", "/refine", "/replay", "/jobs", "/v1/images/generations", "/"])
patient = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@patient
@given(route=routes, body=bodies)
def test_raw_json(web, route, body):
    """Nothing that is JSON to Python is an error of the server; refusals are in the house's shape."""
    text = json.dumps({**body, "steps": 1} if body.get("prompt") and route == "/generate" else body).encode()
    r = web.post(route, content=text, headers=HEADERS)
    assert r.status_code in (200, 202, 400, 422, 429), (r.status_code, r.text)
    if r.status_code in (400, 422): assert r.json().get("detail") or r.json()["error"]["message"]


@patient
@given(route=routes, raw=st.binary(max_size=200))
def test_raw_bytes(web, route, raw): assert web.post(route, content=raw, headers=HEADERS).status_code in (400, 422)


# mutated pictures

def mutants(count, seed):
    rng, originals = random.Random(seed), [file(f) for f in ("PNG", "JPEG", "WEBP")]
    for _ in range(count):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            match rng.randrange(4):
                case 0: data[at] = rng.randrange(256)
                case 1: del data[at:at + rng.randint(1, 50)]
                case 2: data[at:at] = rng.randbytes(rng.randint(1, 20))
                case 3: data[at:at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
            if not data: data = bytearray(b"x")
        yield bytes(data)


def throw(web, count, seed):
    """Each mutant with a wrong picture behind it, so that no UNet runs: only decoding is under test. -> the statuses seen."""
    wrong = base64.b64encode(b"no picture").decode()
    return {web.post("/refine", json={"refinePrompt": "x", "images": [base64.b64encode(m).decode(), wrong]}).status_code for m in mutants(count, seed)}


def test_mutated_pictures(web): assert throw(web, 600, 0) == {422}


@pytest.mark.slow
def test_5000_mutated_pictures(web): assert throw(web, 5000, 1) == {422}


# the schema

class Instant:
    """An engine that paints at once: the schema is about HTTP, and thousands of real pictures would only take time."""
    settings, ready, gpu, row = load_settings(), True, False, ROWS["embedded"]
    def health(self): return {"status": "ready", "ready": True, "reason": None, "queue": {"length": 0, "seconds": 0.0}}

    def submit(self, plan, previews=False):
        job = Job(plan)
        job.emit(Queued(0, 0.0))
        for i, p in enumerate(plan.pictures):
            job.emit(Step(i, p.steps, p.steps))
            job.emit(types.Image(i, Image.new("RGB", (p.width, p.height), "teal"), types.Receipt(p.prompt, p.negative_prompt, p.width, p.height, p.steps, p.guidance_scale,
                     p.strength, p.seed, p.temperature, "lcm", "embedded", None, None, "fp32", "torch", "cpu", {})))
        job.emit(Done(()))
        return job


@pytest.fixture(scope="module")
def instant():
    server = uvicorn.Server(uvicorn.Config(create_app(Instant(), compat_routes, shapes), host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started: time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


HOOKS = """
import base64, io, schemathesis
from hypothesis import strategies as st
from PIL import Image
out = io.BytesIO()
Image.new("RGB", (64, 64), "teal").save(out, "PNG")
schemathesis.openapi.format("picture", st.just(base64.b64encode(out.getvalue()).decode()))
schemathesis.openapi.format("aspect-ratio", st.sampled_from(["1:1", "4:3", "9:16"]))
"""
# A schema cannot say "the receipt of a picture made here" or "a PNG of at least 64 pixels": there, valid by the schema may still be refused.
UNSAYABLE = ("/replay", "/v1/images/edits")
RUNS = {"most": [a for p in UNSAYABLE for a in ("--exclude-path", p)], "unsayable": ["--exclude-checks", "use_after_free,positive_data_acceptance", *(a for p in UNSAYABLE for a in ("--include-path", p))]}


@pytest.mark.parametrize("run", RUNS)
def test_schemathesis(instant, tmp_path, run):
    """Every check on but one: DELETE on a job cancels it, and what became of it can still be read."""
    command = shutil.which("schemathesis", path=str(Path(sys.executable).parent)) or shutil.which("schemathesis") or pytest.skip("schemathesis is not installed")
    (tmp_path / "hooks.py").write_text(HOOKS)
    argv = [command, "run", instant + "/openapi.json", "--checks", "all", "--max-examples", "40", "--seed", "1", "--continue-on-failure", "--no-color", *(["--exclude-checks", "use_after_free"] if run == "most" else []), *RUNS[run]]
    done = subprocess.run(argv, cwd=tmp_path, env=clean_env(SCHEMATHESIS_HOOKS="hooks"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:]
