"""The contract, asked of a real `python app.py` over a real socket, as a frontend would."""
import base64, io, json, os
from types import SimpleNamespace
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from aura_engine.app import create_app
from aura_engine.compat import compat_routes, compat_shapes
from aura_engine.config import load_settings
from conftest import ROOT


def picture(text):
    """Base64 without a data: prefix -> an opened PNG."""
    im = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    assert im.format == "PNG" and im.mode == "RGB"
    return im


def pixels(text): return np.asarray(picture(text), int)


@pytest.fixture(scope="module")
def web(server):
    with httpx.Client(base_url=server.url, timeout=180) as client: yield client


@pytest.fixture(scope="module")
def apple(web): return web.post("/generate", json={"prompt": "a red apple", "seed": 1}).json()


def test_the_guides_generate(web):
    r = web.post("/generate", json={"prompt": "a red apple", "aspectRatio": "1:1", "temperature": 0.7, "resolution": "standard"})
    assert r.status_code == 200 and r.headers["content-type"] == "application/json"
    body = r.json()
    assert set(body) == {"images", "receipts", "warnings"} and len(body["images"]) == len(body["receipts"]) == 1
    assert picture(body["images"][0]).size == (128, 128)


@pytest.mark.parametrize("aspect, wide", [("16:9", True), ("4:3", True), ("9:16", False), ("1:3", False)])
def test_sizes_follow_the_aspect_ratio(web, aspect, wide):
    w, h = picture(web.post("/generate", json={"prompt": "an owl", "aspectRatio": aspect, "steps": 1}).json()["images"][0]).size
    assert (w > h) is wide and w % 8 == h % 8 == 0 and 0.75 < w * h / 128**2 < 1.25


def test_temperature_zero_is_always_the_same_picture(web):
    a, b = (web.post("/generate", json={"prompt": "a fox", "temperature": 0}).json() for _ in range(2))
    assert a["receipts"][0]["seed"] != b["receipts"][0]["seed"]
    assert np.array_equal(pixels(a["images"][0]), pixels(b["images"][0]))


def test_temperature_one_is_a_fresh_one(web):
    a, b = (pixels(web.post("/generate", json={"prompt": "a fox", "temperature": 1}).json()["images"][0]) for _ in range(2))
    assert not np.array_equal(a, b)


def test_a_seed_repeats_and_n_counts_on(web):
    four = web.post("/generate", json={"prompt": "a fox", "seed": 40, "n": 4}).json()
    assert [r["seed"] for r in four["receipts"]] == [40, 41, 42, 43]
    lone = web.post("/generate", json={"prompt": "a fox", "seed": 42}).json()
    assert np.abs(pixels(four["images"][2]) - pixels(lone["images"][0])).max() <= 1


def test_high_without_a_gpu_is_standard_and_says_so(web):
    body = web.post("/generate", json={"prompt": "a fox", "resolution": "high", "steps": 1}).json()
    assert len(body["images"]) == 1 and picture(body["images"][0]).size == (128, 128)


def test_the_guides_refine(web, apple):
    body = {"refinePrompt": "a green apple", "images": apple["images"] * 2, "config": {"steps": 4, "guidanceScale": 1.0}}
    r = web.post("/refine", json=body)
    assert r.status_code == 200, r.text
    assert len(r.json()["images"]) == 2 and all(picture(t).size == (128, 128) for t in r.json()["images"])
    assert web.post("/refine", json={k: body[k] for k in ("refinePrompt", "images")}).status_code == 200


def test_a_mask_keeps_what_is_black(web, apple):
    """The same body with `mask`: pixels outside are the input's. Wrong masks name their field. /replay makes it again. /health says that masks are taken."""
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 32, 96, 96))
    (out := io.BytesIO(), mask.save(out, "PNG"))
    text = base64.b64encode(out.getvalue()).decode()
    body = {"refinePrompt": "a banana", "images": apple["images"] * 2, "mask": "data:image/png;base64," + text, "config": {"seed": 1, "paddingMaskCrop": 8}}
    made = web.post("/refine", json=body).json()
    for picture in made["images"]: assert np.abs(pixels(picture) - pixels(apple["images"][0]))[np.asarray(mask) == 0].max() == 0
    receipt = made["receipts"][1]
    assert receipt["maskSha256"] and receipt["paddingMaskCrop"] == 8 and receipt["strength"] == 1 and receipt["seed"] == 2
    again = web.post("/replay", json={"receipt": receipt, "init": apple["images"][0], "mask": text}).json()
    assert np.abs(pixels(again["images"][0]) - pixels(made["images"][1])).max() <= 1 and not again["warnings"]
    assert web.get("/health").json()["limits"]["mask"] is True
    for wrong, field in (({"mask": apple["images"][0][:40]}, "mask"), ({"config": {"paddingMaskCrop": 513}}, "config.paddingMaskCrop"), ({"mask": None}, "config.paddingMaskCrop"), ({"mask": "http://x/y.png"}, "mask")):
        r = web.post("/refine", json=body | wrong)
        assert r.status_code == 422 and r.json()["errors"][0]["loc"] == field, r.text


def test_a_refinement_keeps_the_aspect(web):
    out = io.BytesIO()
    Image.new("RGB", (300, 150), "teal").save(out, "JPEG")
    text = "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
    w, h = picture(web.post("/refine", json={"refinePrompt": "a fish", "images": [text]}).json()["images"][0]).size
    assert 1.75 < w / h < 2.25                                # on the grid of the family


@pytest.mark.parametrize("accept, format", [("image/png", "PNG"), ("image/jpeg", "JPEG"), ("image/webp", "WEBP"), ("image/*", "PNG")])
def test_bytes_when_asked(web, accept, format):
    r = web.post("/generate", json={"prompt": "a fox", "steps": 1}, headers={"Accept": accept})
    assert Image.open(io.BytesIO(r.content)).format == format and r.headers["content-type"] == f"image/{format.lower()}"
    assert web.post("/generate", json={"prompt": "a fox", "n": 2}, headers={"Accept": accept}).status_code == 422


def test_format_of_the_json(web):
    text = web.post("/generate", json={"prompt": "a fox", "steps": 1, "format": "webp"}).json()["images"][0]
    assert Image.open(io.BytesIO(base64.b64decode(text))).format == "WEBP"


def test_health(web):
    h = web.get("/health").json()
    need = {"status", "ready", "device", "gpu", "gpuName", "model", "revision", "lora", "scheduler", "precision", "backend", "optimizations", "warnings",
            "reason", "queue", "stepCost", "version", "buildId", "uptimeSeconds"}
    assert need <= set(h) and h["status"] == "ready" and h["ready"] is True and h["gpu"] is False and h["device"] == "cpu"
    assert set(h["memory"]) == {"rss", "gpu", "predicted"} and h["memory"]["rss"] > 50 * 2**20 and h["memory"]["predicted"] > 40 * 2**20 and h["memory"]["gpu"] is None
    assert set(h["queue"]) == {"length", "seconds"} and all(isinstance(x, str) for x in h["optimizations"])


def test_ready_and_marks(web):
    r = web.get("/ready", headers={"x-request-id": "abc-1"})
    assert r.status_code == 200 and r.headers["x-request-id"] == "abc-1" and r.headers["x-aura-engine"]


def test_the_page_answers_get_and_head(web):
    got, head = web.get("/"), web.head("/")
    assert got.status_code == head.status_code == 200 and head.content == b"" and got.headers["content-type"].startswith("text/html")
    assert "<title>" in got.text and not [w for w in ("http://", "https://") if f'src="{w}' in got.text or f'href="{w}' in got.text]


def test_metrics_and_docs(web):
    text = web.get("/metrics").text
    for name in ("aura_requests_total", "aura_queue_depth", "aura_queue_wait_seconds", "aura_step_seconds", "aura_generation_seconds", "aura_model_ready 1.0", "aura_gpu_memory_bytes", "process_resident_memory_bytes", "process_open_fds"): assert name in text
    assert web.get("/docs").status_code == 200 and "//cdn" not in web.get("/docs").text and "/generate" in web.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize("body, field, given, allowed", [
    ({"prompt": "x", "temperature": 3}, "temperature", "3", "at most 2"), ({"prompt": "x", "resolution": "huge"}, "resolution", "'huge'", "'high' or 'standard'"),
    ({"prompt": "x", "aspectRatio": "9:1"}, "aspectRatio", "'9:1'", "1:3"), ({"prompt": "x", "colour": 1}, "colour", "1", "no such field"), ({}, "prompt", "nothing", "required")])
def test_a_wrong_value_is_named(web, body, field, given, allowed):
    r = web.post("/generate", json=body)
    assert r.status_code == 422 and r.headers["content-type"] == "application/problem+json"
    problem = r.json()
    assert set(problem) == {"type", "title", "status", "detail", "errors", "requestId"} and problem["requestId"] == r.headers["x-request-id"]
    error, = problem["errors"]
    assert error["loc"] == field and error["given"] == given and allowed in error["allowed"] and error["msg"]


def test_nothing_there_and_not_so(web):
    assert [web.get("/generate").status_code, web.get("/nowhere").status_code, web.post("/generate/", json={}).status_code, web.post("/generate", content=b"{", headers={"content-type": "application/json"}).status_code] == [405, 404, 422, 400]
    assert web.get("/nowhere").json()["type"] == "urn:aura:not_found" and web.get("/generate").headers["allow"] == "POST"


# many at once

ASKS = [{"prompt": p, "seed": s, "steps": 1 + s % 4, "temperature": s % 3 / 2} for s, p in enumerate(["a fox", "a red apple", "an owl", "a rocket"] * 2)]


def together(url):
    """All ASKS at once, and one after the other."""
    def ask(body): return httpx.post(url + "/generate", json=body, timeout=300).json()["images"][0]
    with ThreadPoolExecutor(8) as pool: crowd = list(pool.map(ask, ASKS))
    return crowd, [ask(body) for body in ASKS]


def test_company_changes_nothing(server):
    crowd, lone = together(server.url)
    gaps = [np.abs(pixels(a) - pixels(b)) for a, b in zip(crowd, lone, strict=True)]
    assert max(g.max() for g in gaps) <= 1 and sum((g > 0).sum() for g in gaps) <= 1e-4 * sum(g.size for g in gaps)


def test_to_the_last_bit_at_one_batch_size(make_server):
    crowd, lone = together(make_server(AURA_MAX_BATCH=1).url)
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(crowd, lone, strict=True))


# the published description

def test_openapi_json_is_true():
    """`AURA_OPENAPI=1` writes it again."""
    app = create_app(SimpleNamespace(settings=load_settings(SD_MODEL_ID="embedded", SD_LORAS="", AURA_API_KEY="")), compat_routes, compat_shapes)
    file, text = ROOT / "openapi.json", json.dumps(app.openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if os.environ.get("AURA_OPENAPI"): file.write_text(text, encoding="utf-8")
    assert file.read_text(encoding="utf-8") == text, "AURA_OPENAPI=1 python -m pytest tests/test_contract.py -k openapi"


def test_openapi_is_typed():
    """Everything that answers or is read has a schema. Problems are everywhere. No field with a default is required."""
    document = json.loads((ROOT / "openapi.json").read_text(encoding="utf-8"))
    schemas = document["components"]["schemas"]
    assert {"Health", "Receipt", "StreamEvent", "Problem", "OpenAIImages", "A1111Progress"} <= set(schemas) and "HTTPValidationError" not in schemas
    assert len(schemas["StreamEvent"]["oneOf"]) == 6 and "gpuName" in schemas["Health"]["properties"] and schemas["GenerateRequest"]["required"] == ["prompt"]
    assert not [name for name, s in schemas.items() if name.endswith(("Request", "Config", "Img")) for f in s.get("properties", {}).values() if "default" in f]
    form = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert set(form) == set(schemas["EditRequest"]["properties"]) - {"images"} and not any("anyOf" in field for field in form.values())
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "4XX" in operation["responses"], (path, method)
            answers = [r.get("content") for code, r in operation["responses"].items() if code in ("200", "202")]
            assert method == "head" or all(answers) or path == "/v1/images/variations", (path, method)
            assert not [media for r in operation["responses"].values() for media, said in r.get("content", {}).items() if not said["schema"]], (path, method)
            assert method != "head" or not any(answers), path


def test_openapi_names_the_types_that_are_sent(web, apple):
    """What a client is told to expect of a 200 is what comes: each GET and HEAD without a choice, and what has several types."""
    document = web.get("/openapi.json")
    assert document.content == web.get("/openapi.json").content and document.headers["content-type"] == "application/json"
    paths = document.json()["paths"]
    url = web.post("/v1/images/generations", json={"prompt": "a fox", "num_inference_steps": 1, "response_format": "url"}).json()["data"][0]["url"]
    job = web.post("/jobs", json={"route": "generate", "request": {"prompt": "a fox", "steps": 1}}).json()["statusUrl"]
    real = {"/pictures/{name}": [url], "/jobs/{id}/events": [job + "/events"], "/jobs/{id}": [job], "/studio/{name}": ["/studio/page.js", "/studio/studio.css"], "/v1/models/{id}": ["/v1/models/embedded"]}
    for path, operations in paths.items():
        for address in real.get(path, [path]):
            r = web.get(address) if "get" in operations else None
            if r is not None: assert r.status_code == 200 and r.headers["content-type"].partition(";")[0] in operations["get"]["responses"]["200"]["content"], (path, r.text[:80])
            if "head" in operations: assert web.head(address).content == b"" and not operations["head"]["responses"]["200"].get("content"), path
    said = lambda path: set(paths[path]["post"]["responses"]["200"]["content"])
    assert said("/") == {"image/png", "image/jpeg", "image/webp"} and web.post("/", json={"inputs": "a fox"}).headers["content-type"] in said("/")
    assert web.post("/sdapi/v1/refresh-loras").headers["content-type"] in said("/sdapi/v1/refresh-loras")


def test_openapi_has_something_optional_beside_several_bodies():
    """openapi-python-client 0.29 forgets an import otherwise, and the module dies of a NameError."""
    document = json.loads((ROOT / "openapi.json").read_text(encoding="utf-8"))
    several = [o for path in document["paths"].values() for o in path.values() if len(o.get("requestBody", {}).get("content", ())) > 1]
    assert len(several) == 3 and all([p for p in o["parameters"] if not p["required"]] for o in several)
