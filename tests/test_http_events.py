"""Events, jobs, cancelling and replays over a real socket."""
import base64, io, json, re, time
from contextlib import ExitStack

import httpx
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from aura_engine.images import receipt_of

LONG = {"prompt": "an owl", "steps": 50, "n": 4}


@pytest.fixture(scope="module")
def web(server):
    with httpx.Client(base_url=server.url, timeout=180) as client: yield client


def pixels(text): return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"), int)


def events(web, path, body):
    """[(name, data), …] of an SSE answer."""
    with web.stream("POST", path, json=body, headers={"Accept": "text/event-stream"}) as r:
        assert r.status_code == 200 and r.headers["content-type"].startswith("text/event-stream") and r.headers["x-accel-buffering"] == "no"
        text = r.read().decode()
    return [(re.search(r"^event: (.*)", b, re.M)[1], json.loads(re.search(r"^data: (.*)", b, re.M)[1])) for b in text.split("\n\n") if "data: " in b]


def counted(web, line): return float(next((ln.split()[-1] for ln in web.get("/metrics").text.splitlines() if ln.startswith(line)), 0))


def idle(web, seconds=20):
    """Wait until nothing is in the engine -> how many steps were run on the way."""
    end, before = time.monotonic() + seconds, counted(web, "aura_step_seconds_count")
    while web.get("/health").json()["queue"]["length"]:
        assert time.monotonic() < end, "the engine still works for nobody"
        time.sleep(0.02)
    return counted(web, "aura_step_seconds_count") - before


def test_a_stream_tells_everything_in_order(web):
    body = {"prompt": "an owl", "seed": 3, "steps": 4, "n": 2}
    seen = events(web, "/generate", body)
    names = [n for n, _ in seen]
    assert names[0] == "queued" and names[-1] == "done" and names.count("step") == names.count("preview") == 8 and names.count("image") == 2
    assert set(seen[0][1]) == {"position", "etaSeconds", "seeds"} and seen[0][1]["seeds"] == [3, 4] and set(seen[-1][1]) == {"warnings"}
    for i in range(2): assert [e["step"] for n, e in seen if n == "step" and e["index"] == i] == [1, 2, 3, 4]
    made = {e["index"]: e for n, e in seen if n == "image"}
    lone = web.post("/generate", json=body).json()
    assert all(np.abs(pixels(made[i]["image"]) - pixels(lone["images"][i])).max() <= 1 and made[i]["receipt"]["seed"] == 3 + i for i in range(2))
    assert pixels(next(e["image"] for n, e in seen if n == "preview")).shape == (128, 128, 3)


def test_a_refinement_streams_too(web):
    picture = web.post("/generate", json={"prompt": "an owl", "steps": 1}).json()["images"][0]
    names = [n for n, _ in events(web, "/refine", {"refinePrompt": "a fox", "images": [picture], "config": {"steps": 2}})]
    assert names == ["queued", "step", "preview", "step", "preview", "image", "done"]


def test_wrong_requests_have_a_status_not_a_stream(web):
    r = web.post("/generate", json={"prompt": ""}, headers={"Accept": "text/event-stream"})
    assert r.status_code == 422 and r.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream", "image/png"])
def test_hanging_up_stops_the_work(web, server, accept):
    """Whatever kind of answer was being waited for: at most a step or two later nothing runs any more."""
    before = counted(web, 'aura_request_failures_total{reason="cancelled"}')
    body = LONG if accept != "image/png" else {**LONG, "n": 1}
    with httpx.Client(base_url=server.url) as client, client.stream("POST", "/generate", json=body, headers={"Accept": "text/event-stream"}) if accept == "text/event-stream" else Hangup(server, body, accept):
        while not web.get("/health").json()["queue"]["length"]: time.sleep(0.01)
        time.sleep(0.5)
    assert idle(web) <= 12                       # 4 pictures, 2 steps each, and what was on its way; not 200
    assert counted(web, 'aura_request_failures_total{reason="cancelled"}') == before + 1


class Hangup:
    """A raw request whose connection is closed without reading the answer."""
    def __init__(self, server, body, accept): self.url, self.body, self.accept = httpx.URL(server.url), json.dumps(body).encode(), accept

    def __enter__(self):
        import socket
        self.socket = socket.create_connection((self.url.host, self.url.port))
        self.socket.sendall(f"POST /generate HTTP/1.1\r\nHost: x\r\nAccept: {self.accept}\r\nContent-Type: application/json\r\nContent-Length: {len(self.body)}\r\n\r\n".encode() + self.body)

    def __exit__(self, *exc): self.socket.close()


def test_hanging_up_in_the_queue(web, server):
    """A request that never began its first step leaves without having cost one."""
    before = counted(web, 'aura_request_failures_total{reason="cancelled"}')
    with Hangup(server, LONG, "*/*"):
        while not web.get("/health").json()["queue"]["length"]: time.sleep(0.01)
        with Hangup(server, {"prompt": "a fox", "steps": 50}, "*/*"): time.sleep(0.2)
    idle(web)
    assert counted(web, 'aura_request_failures_total{reason="cancelled"}') == before + 2


def test_a_job(web):
    body = {"prompt": "a fox", "seed": 9, "steps": 3}
    r = web.post("/jobs", json={"route": "generate", "request": body})
    assert r.status_code == 202 and set(r.json()) == {"id", "status", "statusUrl"} and r.headers["location"] == r.json()["statusUrl"]
    while (state := web.get(r.json()["statusUrl"]).json())["status"] in ("queued", "running"): time.sleep(0.05)
    assert state["status"] == "succeeded" and state["progress"] == [{"index": 0, "step": 3, "steps": 3}]
    assert set(state["result"]) == {"images", "receipts", "warnings"}
    assert np.abs(pixels(state["result"]["images"][0]) - pixels(web.post("/generate", json=body).json()["images"][0])).max() <= 1
    assert web.delete(r.json()["statusUrl"]).json()["status"] == "succeeded"
    gone = web.get(r.json()["statusUrl"])
    assert gone.status_code == 410 and gone.json()["status"] == "succeeded" and "result" not in gone.json()


def test_a_job_is_cancelled(web):
    url = web.post("/jobs", json={"route": "generate", "request": LONG}).json()["statusUrl"]
    assert web.get(url).json()["status"] in ("queued", "running")
    web.delete(url)
    idle(web)
    r = web.get(url)
    state = r.json()
    assert r.status_code == 410 and web.delete(url).status_code == 200 and state["status"] == "cancelled" and state["problem"]["type"] == "urn:aura:cancelled" and "result" not in state


def job_events(web, url, last=None, most=None):
    """[(number, name, data), …] of a job's stream. At most `most`, then the connection is closed."""
    seen, headers = [], {"Last-Event-ID": str(last)} if last is not None else {}
    with web.stream("GET", url + "/events", headers=headers) as r:
        if r.status_code != 200: return r.status_code
        fields = {}
        for line in r.iter_lines():
            key, _, value = line.partition(": ")
            if key: fields[key] = value
            if not line and "event" in fields: seen.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
            if not line: fields = {}
            if most and len(seen) == most: break
    return seen


def test_a_jobs_events_from_the_first_and_again_after_a_cut(web):
    body = {"prompt": "an owl", "seed": 3, "steps": 6}
    url = web.post("/jobs", json={"route": "generate", "request": body, "previews": True}).json()["statusUrl"]
    first = job_events(web, url, most=4)                                     # then the reader leaves, which cancels nothing
    rest = job_events(web, url, last=first[-1][0])
    names = [n for _, n, _ in first + rest]
    numbers = [i for i, _, _ in first + rest]
    assert names[0] == "queued" and first[0][2]["seeds"] == [3] and names[-2:] == ["image", "done"] and names.count("step") == 6
    assert numbers == sorted(set(numbers)) and "preview" in names
    again = job_events(web, url)                                             # whoever comes late gets everything but the previews
    assert [n for _, n, _ in again] == ["queued", *["step"] * 6, "image", "done"]
    assert again[-2][2]["image"] == web.get(url).json()["result"]["images"][0]
    assert job_events(web, url, last=again[-1][0]) == 204
    web.delete(url)
    assert job_events(web, url) == 410 and web.get("/jobs/none/events").status_code == 404


def test_a_replay_and_a_refinement_as_jobs(web):
    made = web.post("/generate", json={"prompt": "a rocket", "steps": 2, "seed": 8}).json()
    asks = {"replay": {"receipt": {**made["receipts"][0], "device": "cuda"}}, "refine": {"refinePrompt": "a fox", "images": made["images"], "config": {"steps": 1}}}
    for route, request in asks.items():
        url = web.post("/jobs", json={"route": route, "request": request}).json()["statusUrl"]
        seen = job_events(web, url)
        result = web.get(url).json()["result"]
        assert [n for _, n, _ in seen][-2:] == ["image", "done"] and "preview" not in [n for _, n, _ in seen]
        assert result["images"] == [seen[-2][2]["image"]] and result["warnings"] == seen[-1][2]["warnings"]
        if route == "replay":
            assert np.abs(pixels(result["images"][0]) - pixels(made["images"][0])).max() <= 1 and "device was 'cuda' then" in result["warnings"][0]


def test_a_deleted_job_holds_nothing(web):
    url = web.post("/jobs", json={"route": "generate", "request": LONG, "previews": True}).json()["statusUrl"]
    while not web.get(url).json()["progress"]: time.sleep(0.02)
    web.delete(url)
    idle(web)
    assert web.get(url).status_code == 410 and "result" not in web.get(url).json()


def test_examples_and_limits(web):
    prompts = web.get("/examples").json()["examples"]
    assert len(prompts) >= 10 and web.post("/generate", json={"prompt": prompts[0], "steps": 1}).json()["warnings"] == []
    limits = web.get("/health").json()["limits"]
    assert limits["steps"] == [1, 4, 50] and limits["native"] == limits["most"] == 128 and limits["mask"] is True and limits["loras"] == []


def test_wrong_jobs(web):
    assert web.get("/jobs/none").status_code == web.delete("/jobs/none").status_code == 404
    r = web.post("/jobs", json={"route": "generate", "request": {"prompt": "x", "n": 9}})
    assert r.status_code == 422 and r.json()["errors"][0]["loc"] == "request.n"
    assert web.post("/jobs", json={"route": "dance", "request": {}}).status_code == 422
    picture = web.post("/jobs", json={"route": "refine", "request": {"refinePrompt": "x", "images": ["aGk="]}})
    assert picture.status_code == 422 and "PNG, JPEG or WebP" in picture.json()["detail"]


@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_a_receipt_has_the_time_of_every_stage(web, format):
    """From the queue to the file, which is encoded off the engine's thread. The PNG holds the receipt that stands beside it, whichever way it was asked for."""
    body, stages = {"prompt": "a rocket", "steps": 2, "seed": 5, "format": format}, {"queue", "text", "steps", "decode", "encode"}
    made = web.post("/generate", json=body).json()
    job = web.post("/jobs", json={"route": "generate", "request": body}).json()
    end = time.monotonic() + 60
    while (state := web.get(job["statusUrl"]).json())["status"] != "succeeded": assert time.monotonic() < end; time.sleep(0.02)
    image = next(e for n, e in events(web, "/generate", body) if n == "image")
    for text, receipt in ((made["images"][0], made["receipts"][0]), (state["result"]["images"][0], state["result"]["receipts"][0]), (image["image"], image["receipt"])):
        assert set(receipt["timings"]) == stages and all(0 <= s < 60 for s in receipt["timings"].values()) and receipt["timings"]["encode"] > 0
        if format == "png": assert receipt_of(base64.b64decode(text)).to_json() == receipt
    if format == "png":
        alone = receipt_of(web.post("/generate", json=body, headers={"Accept": "image/png"}).content)
        assert set(alone.timings) == stages and alone.seed == 5


def test_a_replay_from_json_or_from_the_file(web):
    made = web.post("/generate", json={"prompt": "a rocket", "steps": 3}).json()
    for body in ({"receipt": made["receipts"][0]}, {"image": made["images"][0]}):
        again = web.post("/replay", json=body).json()
        assert np.abs(pixels(again["images"][0]) - pixels(made["images"][0])).max() <= 1 and again["warnings"] == []


def test_a_replay_of_a_refinement_needs_its_picture(web):
    start = web.post("/generate", json={"prompt": "a rocket", "steps": 2}).json()["images"][0]
    made = web.post("/refine", json={"refinePrompt": "a fox", "images": [start]}).json()
    assert web.post("/replay", json={"receipt": made["receipts"][0]}).json()["errors"][0]["loc"] == "init"
    again = web.post("/replay", json={"receipt": made["receipts"][0], "init": start}).json()
    assert np.abs(pixels(again["images"][0]) - pixels(made["images"][0])).max() <= 1 and again["warnings"] == []
    other = web.post("/replay", json={"receipt": made["receipts"][0], "init": made["images"][0]}).json()
    assert "init_sha256" in other["warnings"][0]


@pytest.mark.parametrize("change", [{"steps": 900}, {"width": 4096}, {"width": 130}, {"seed": -1}, {"guidanceScale": 99}, {"scheduler": "os"}, {"temperature": "hot"}, {"prompt": "x" * 9999}])
def test_a_receipt_from_elsewhere_is_checked(web, change):
    made = web.post("/generate", json={"prompt": "a rocket", "steps": 1}).json()
    r = web.post("/replay", json={"receipt": {**made["receipts"][0], **change}})
    assert r.status_code == 422 and r.json()["errors"][0]["loc"].startswith("receipt.")


def test_a_replay_says_what_differs(web):
    made = web.post("/generate", json={"prompt": "a rocket", "steps": 1}).json()
    said = web.post("/replay", json={"receipt": {**made["receipts"][0], "model": "another", "device": "cuda"}}).json()["warnings"]
    model, device = said
    assert "model was 'another' then" in model and "device was 'cuda' then" in device
    for wrong in ({"versions": 5}, {"versions": {"torch": 2}}, {"corrections": 5}, {"model": None}, {"device": ["cpu"]}):
        r = web.post("/replay", json={"receipt": {**made["receipts"][0], **wrong}})
        assert r.status_code == (200 if "corrections" in wrong else 422), (wrong, r.text[:200])
    for text in ("no JSON", "[1]", "{}", json.dumps({**made["receipts"][0], "corrections": 5})):            # a file that says it is ours
        out, info = io.BytesIO(), PngImagePlugin.PngInfo()
        info.add_itxt("aura", text)
        Image.new("RGB", (64, 64)).save(out, "PNG", pnginfo=info)
        assert web.post("/replay", json={"image": base64.b64encode(out.getvalue()).decode()}).status_code == 422
    assert web.post("/replay", json={}).status_code == web.post("/replay", json={"receipt": {"a": 1}}).status_code == 422


def test_a_job_has_so_many_readers_at_a_time(web):
    from aura_engine.job_routes import MOST_READERS, MOST_STREAMS
    where = web.post("/jobs", json={"route": "generate", "request": LONG}).json()["statusUrl"]
    with ExitStack() as open_ones:
        for _ in range(MOST_READERS): assert open_ones.enter_context(web.stream("GET", where + "/events")).status_code == 200
        refused = web.get(where + "/events")
        assert refused.status_code == 429 and refused.json()["title"] == "Too many clients follow this job" and "retry-after" in refused.headers
        assert web.get(where).json()["status"] in ("queued", "running")
        second = web.post("/jobs", json={"route": "generate", "request": LONG}).json()["statusUrl"] + "/events"
        for _ in range(MOST_STREAMS - MOST_READERS - 1): assert open_ones.enter_context(web.stream("GET", second)).status_code == 200
        third = web.post("/jobs", json={"route": "generate", "request": LONG}).json()["statusUrl"] + "/events"
        assert open_ones.enter_context(web.stream("GET", third)).status_code == 200
        assert web.get(third).status_code == 429 and web.get(third).json()["title"] == "You follow too many jobs"
        for other in (second, third): web.delete(other.removesuffix("/events"))
    end = time.monotonic() + 20
    while True:                                               # those who left count no more
        with web.stream("GET", where + "/events") as again:
            if again.status_code == 200: break
        assert time.monotonic() < end
        time.sleep(0.1)
    assert web.delete(where).json()["status"] == "cancelled"
