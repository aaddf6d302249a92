"""Machines that look for trouble: schemathesis over the OpenAPI schema, hypothesis over raw JSON, mutated pictures."""
import base64, io, json, random, shutil, subprocess, sys
from pathlib import Path

import httpx
import pytest
from conftest import clean_env
from hypothesis import example, HealthCheck, given, settings, strategies as st
from PIL import Image

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
@example(route="/replay", body={" ": None})                                      # its error began with a space, in a header too
def test_raw_json(web, route, body):
    """Nothing that is JSON to Python is an error of the server. Refusals are in the house's shape."""
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

HOOKS = """
import base64, io, json, os, schemathesis
from hypothesis import strategies as st
from PIL import Image
out = io.BytesIO()
Image.new("RGB", (96, 64), "teal").save(out, "PNG")
PNG, MADE = out.getvalue(), json.loads(os.environ["MADE"])
out = io.BytesIO()
Image.new("L", (96, 64), "white").save(out, "PNG")
WHITE = base64.b64encode(out.getvalue()).decode()
schemathesis.openapi.format("picture", st.just(base64.b64encode(PNG).decode()))
schemathesis.openapi.format("binary", st.just(schemathesis.openapi.Binary(PNG)) if hasattr(schemathesis.openapi, "Binary") else st.just(PNG))
schemathesis.openapi.format("aspect-ratio", st.sampled_from(["1:1", "4:3", "9:16"]))

INPUTS = ("/", "/models/{name}")                            # Hugging Face's

def quick(body):
    '''Fifty steps say no more about HTTP than one; wrong numbers stay as they are.'''
    for k, v in (body.items() if isinstance(body, dict) else ()):
        if k in ("steps", "num_inference_steps") and type(v) in (int, float) and 1 < v <= 100 and v == int(v): body[k] = 1
        if k == "deadlineSeconds" and type(v) in (int, float) and 0 < v <= 86400: body[k] = 600      # which of them an engine can keep, no schema knows
        if k in ("config", "request", "parameters"): quick(v)

def alone(body):
    '''How many other pictures a model looks at is in its limits. The embedded one looks at none.'''
    if isinstance(body, dict): body.pop("references", None)

def masked(body):
    '''A mask has white in it, and what comes with one is left out without one.'''
    if not isinstance(body, dict): return
    if body.get("mask") is not None: body["mask"] = WHITE
    elif isinstance(body.get("config"), dict): body["config"].pop("paddingMaskCrop", None)

@schemathesis.hook
def before_load_schema(ctx, raw_schema):
    # A stream is a text, and its `contentSchema` tells of a frame. The tool holds each frame against the schema of the stream.
    answers = [a for ways in raw_schema["paths"].values() for way in ways.values() if isinstance(way, dict) for a in way.get("responses", {}).values()]
    for stream in (a.get("content", {}).get("text/event-stream") for a in answers):
        if stream: stream["schema"] = stream["schema"]["contentSchema"]

@schemathesis.hook
def before_call(ctx, case, kwargs):
    body = case.body
    quick(body)
    # A form knows only text: an object there is its JSON, a fine prompt. An empty one is as wrong as the tool wanted it to be.
    if case.operation.path == "/v1/images/edits" and isinstance(body, dict):
        for k in ("prompt", "model", "user"):
            if k in body and not isinstance(body[k], str): body[k] = ""
    # What a schema cannot say: the receipt of a picture made here.
    positive = case.meta and case.meta.generation.mode.is_positive
    replay = body if case.operation.path == "/replay" else None
    if case.operation.path == "/jobs" and isinstance(body, dict) and body.get("route") == "replay": replay = body.get("request")
    if positive and isinstance(replay, dict):
        for k in ("receipt", "image", "init"):
            if replay.get(k) is not None: replay[k] = MADE[k]
        replay.pop("mask", None)
    # What to draw, where a body of bare bytes has no place for it.
    if positive and case.operation.path in INPUTS and not isinstance(body, dict): case.query, case.body = {"prompt": "a fox"}, PNG
    # With a prompt among the parameters the input is a picture.
    if positive and case.operation.path in INPUTS and isinstance(body, dict) and isinstance(body.get("parameters"), dict): body["parameters"].pop("prompt", None)
    # Two numbers that are multiplied, a mask that is turned round: each is right alone.
    if positive and case.operation.path.startswith("/sdapi/") and isinstance(body, dict):
        for k in ("n_iter", "batch_size", "inpainting_mask_invert"): body.pop(k, None)
        if type(body.get("steps")) in (int, float) and body["steps"] > 100: body["steps"] = 1      # this API cuts them to its most
    if positive and isinstance(body, dict):
        own = body.get("request", body) if case.operation.path == "/jobs" else body
        masked(own)
        alone(own)
    # An edit has a picture under either name, and a JSON body may name files that only their servers keep.
    if positive and case.operation.path == "/v1/images/edits" and isinstance(body, dict):
        body.pop("mask", None)
        if "size" in body: body.pop("n", None)               # ten pictures of 2048x2048 are too many
        if "json" in (case.media_type or ""):
            body.pop("images", None)
            body["image"] = base64.b64encode(PNG).decode()
"""


# A job that was deleted is gone; the tool knows 404 for that, and 410 says it more precisely. A1111's interrupt ends work with 499.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "401", "403", "404", "409", "410", "429", "499", "5xx"]

[checks.negative_data_rejection]
expected-statuses = ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429", "5xx"]

# A form knows only text, and bytes are bytes: what the tool means to be wrong there may be fine.
[[operations]]
include-path = "/v1/images/edits"
checks.negative_data_rejection.expected-statuses = ["2xx", "4xx"]

[[operations]]
include-path = "/"
checks.negative_data_rejection.expected-statuses = ["2xx", "4xx"]

# Its clients send numbers as texts, which are taken.
[[operations]]
include-path-regex = "^/sdapi/"
checks.negative_data_rejection.expected-statuses = ["2xx", "4xx"]

# Always refused, in OpenAI's words.
[[operations]]
include-path = "/v1/images/variations"
checks.positive_data_acceptance.expected-statuses = ["400", "401", "403", "429"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("phases, examples, seed", [("coverage,fuzzing,stateful", 5, 1), ("fuzzing,stateful", 15, 2)])
def test_schemathesis(make_server, tmp_path, phases, examples, seed):
    """Every check on, against the real engine: what the schema allows is done, what it forbids is refused, and all is documented."""
    command = shutil.which("schemathesis", path=str(Path(sys.executable).parent)) or shutil.which("schemathesis") or pytest.skip("schemathesis is not installed")
    server = make_server(AURA_MAX_QUEUE_SECONDS=3600)
    made = server.post("/generate", {"prompt": "a red apple", "steps": 1})
    (tmp_path / "hooks.py").write_text(HOOKS)
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    env = clean_env(SCHEMATHESIS_HOOKS="hooks", MADE=json.dumps({"receipt": made["receipts"][0], "image": made["images"][0], "init": None}))
    argv = [command, "run", server.url + "/openapi.json", "--checks", "all", "--phases", phases, "--request-timeout", "120", "--max-response-time", "60", "--max-examples", str(examples), "--seed", str(seed), "--workers", "2", "--continue-on-failure", "--no-color"]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1150)
    assert done.returncode == 0, done.stdout[-6000:]
