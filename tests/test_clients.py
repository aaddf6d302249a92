"""Client by operation: programs that people have, in the versions below, installed in throwaway environments and asked to draw.

Versions are pinned: a client that changes its ways is a matter for the day on which its number is raised here. What is seen is
held against nbs/bench/clients.json, which 10d shows as a table; `AURA_CLIENTS=1` writes it again.
"""
import functools, http.server, json, os, re, shutil, subprocess, sys, threading, time

import httpx
import pytest

from conftest import ROOT, free_port
from edge import Edge

pytestmark = pytest.mark.slow
HERE = ROOT / "tests/clients"
PYTHON = ("webuiapi==0.9.17", "litellm==1.110.2", "langchain-community==0.4.2", "openai==3.57.0", "huggingface_hub==2.4.0", "openapi-python-client==0.29.1")
NODE = ("openai@6.49.0", "@huggingface/inference@4.13.30", "ai@6.0.326", "@ai-sdk/openai@3.0.141", "@langchain/openai@1.5.8", "@langchain/core@1.4.0",
        "openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "eventsource@4.1.1", "typescript@5.9.3", "esbuild@0.28.2")


def run(*argv, cwd=None, **env):
    """The last line that a program prints; what it said when it failed."""
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=400, env={**os.environ, **env})
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout.strip().rpartition("\n")[2]


TABLE = ROOT / "nbs/bench/clients.json"


def version_of(name, among=PYTHON + NODE):
    """The pinned version of a client."""
    return next(re.split("==|@(?=[0-9])", pin)[1] for pin in among if re.match(re.escape(name) + "(==|@[0-9])", pin))


def noted(client, seen):
    """Hold {operation: "works" or what was said} of a client against the table."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if os.environ.get("AURA_CLIENTS"): TABLE.write_text(json.dumps(table | {client: seen}, indent=1, sort_keys=True) + "\n")
    else: assert table.get(client) == seen


def test_python_clients(server, tmp_path):
    uv = shutil.which("uv") or shutil.which("uv", path=os.path.dirname(sys.executable))
    if not uv: pytest.skip("uv is not installed")
    run(uv, "venv", "-q", "--python", sys.executable, tmp_path / "env")
    python = tmp_path / "env/bin/python"
    run(uv, "pip", "install", "-q", "--python", python, *PYTHON)
    run(python.with_name("openapi-python-client"), "generate", "--path", ROOT / "openapi.json", "--output-path", tmp_path / "generated", "--meta", "none",
        PATH=f"{python.parent}:{os.environ['PATH']}")
    said = json.loads(run(python, HERE / "speak.py", server.url, tmp_path, PYTHONPATH="", HF_HUB_OFFLINE="0", LITELLM_LOCAL_MODEL_COST_MAP="True"))
    print(json.dumps(said, indent=1))
    assert said.pop("versions")["litellm"] == "1.110.2"
    table = said.pop("table")
    assert said == {
        "webuiapi txt2img": [[96, 64], [96, 64]], "webuiapi info": [3, 4], "webuiapi img2img": [96, 64], "webuiapi mask": [96, 64],
        "webuiapi png-info": "a fox", "webuiapi models": ["embedded"], "webuiapi samplers": ["LCM"], "webuiapi options": "embedded",
        "webuiapi interrupt": {}, "webuiapi progress": 0.0, "litellm image_generation": True, "LangChain DallEAPIWrapper": True,
        "generated Python client": [True, 128, 1, "a fox"]}
    for client in ("webuiapi", "litellm", "langchain-community", "openai", "huggingface_hub", "openapi-python-client"):
        noted(f"{client} {version_of(client, PYTHON)} (Python)", table[client])


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """A folder with the clients of npm, what the tests say to them, and types generated from openapi.json."""
    if not shutil.which("npm"): pytest.skip("npm is not installed")
    home = tmp_path_factory.mktemp("node")
    (home / "package.json").write_text('{"type": "module", "private": true}')
    run("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline", *NODE, cwd=home)
    run(home / "node_modules/.bin/openapi-typescript", ROOT / "openapi.json", "-o", home / "api.d.ts")
    for name in ("speak.mts", "browse.ts"): shutil.copy(HERE / name, home)
    return home


def test_node_clients(server, node):
    run(node / "node_modules/.bin/tsc", "--module", "nodenext", "--target", "es2022", "--strict", "--skipLibCheck", "speak.mts", cwd=node)
    said = json.loads(run("node", "speak.mjs", server.url, cwd=node))
    print(json.dumps(said, indent=1))
    table = said.pop("table")
    assert said == {
        "OpenAI generate": "image/png", "OpenAI edit": True, "OpenAI stream": ["image_generation.partial_image", "image_generation.completed"],
        "OpenAI errors": [400, "n"], "Hugging Face textToImage": "image/png", "Hugging Face imageToImage": "image/png",
        "AI SDK generateImage": "image/png", "LangChain DallEAPIWrapper": True, "generated TypeScript client": [True, False, 1, "a fox"],
        "EventSource": ["queued", "image", "done"]}
    for client in ("openai", "@huggingface/inference", "ai", "@langchain/openai", "openapi-typescript", "eventsource"):
        noted(f"{client} {version_of(client, NODE)} (Node)", table[client])


# in a browser

class Pages(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *said): pass


@pytest.fixture(scope="module")
def allowed(make_server):
    """(an engine, the origin of a page that it allows)."""
    origin = f"http://localhost:{free_port()}"
    return make_server(ALLOW_ORIGINS=f"{origin},app://aura,tauri://localhost"), origin


@pytest.fixture(scope="module")
def page(allowed, node):
    """A Chromium page of that origin, with `tries` of tests/clients/browse.ts."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or pytest.skip("no Chromium on this machine")
    bundle = node / "page"
    bundle.mkdir()
    run(node / "node_modules/.bin/esbuild", "browse.ts", "--bundle", "--platform=browser", "--format=iife", f"--outfile={bundle / 'browse.js'}", cwd=node)
    (bundle / "index.html").write_text('<!doctype html><link rel="icon" href="data:,"><script src="browse.js"></script>')
    pages = http.server.ThreadingHTTPServer(("127.0.0.1", int(allowed[1].rpartition(":")[2])), functools.partial(Pages, directory=bundle))
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    with playwright.sync_playwright() as p, p.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as browser:
        page = browser.new_page()
        page.goto(allowed[1])
        yield page
    pages.shutdown()


def tried(page, name, *args): return page.evaluate("([name, args]) => window.tries[name](...args)", [name, args])


def test_openai_and_hugging_face_in_a_browser(allowed, page):
    assert tried(page, "openai", allowed[0].url) == [
        "image/png", True, ["image_generation.partial_image", "image_generation.completed"], [400, "n"], ["embedded"]]
    assert tried(page, "huggingface", allowed[0].url) == "image/png"
    noted(f"openai {version_of('openai', NODE)} (Chromium, another origin)", dict.fromkeys(("generate", "edit", "stream", "errors", "models"), "works"))
    noted(f"@huggingface/inference {version_of('@huggingface/inference', NODE)} (Chromium, another origin)", {"textToImage": "works"})


def test_event_source_in_a_browser_goes_on_after_a_cut(allowed, page):
    """The connection ends in the middle; the browser asks again with Last-Event-ID, and no event is lost or comes twice."""
    with Edge(target=allowed[0].url, cut=1500, once=True) as edge:
        ids, opened = tried(page, "events", allowed[0].url, edge.url)
        last = [headers.get("last-event-id") for _, headers, _ in edge.requests]
    assert ids == list(range(1, len(ids) + 1)) and len(ids) == 2 * 30 + 4 and opened == 2
    assert last[0] is None and 0 < int(last[1]) < 64
    noted("EventSource (Chromium, another origin)", {"follow a job": "works", "go on after a cut": "works"})


def test_origins_in_a_browser(allowed, page):
    """Any header from an allowed page; other pages are refused, and the log says what would allow them."""
    engine, origin = allowed
    names = ("traceparent", "sentry-trace", "baggage", "x-requested-with", "cache-control", "x-stainless-os", "x-anything-at-all")
    assert tried(page, "post", engine.url, dict.fromkeys(names, "1")) == "200"
    assert tried(page, "post", engine.url + "/", {}) == "200"                     # //generate
    other = origin.replace("localhost", "127.0.0.1")
    page.goto(other)
    assert tried(page, "post", engine.url, {}) == "TypeError"
    line = next(x for x in map(json.loads, engine.log.read_text().splitlines()) if x.get("origin") == other)
    assert line["toAllow"].endswith("," + other)
    page.goto(origin)
    for app, status in (("app://aura", 200), ("tauri://localhost", 200), ("app://other", 400)):       # windows of Electron and Tauri
        ask = {"Origin": app, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        assert httpx.options(engine.url + "/generate", headers=ask).status_code == status


def test_the_engines_own_page_behind_a_proxy_that_rewrites_host(allowed, page):
    with Edge(target=allowed[0].url, host="aura:7860") as edge:
        page.goto(edge.url)
        page.locator("[name=prompt]").fill("a fox")
        page.get_by_role("button", name="Generate", exact=True).click()
        page.locator(".tiles li").first.wait_for(timeout=60_000)
        first, headers, _ = next(r for r in edge.requests if r[0].startswith("POST"))
        assert headers["origin"] == edge.url and headers["sec-fetch-site"] == "same-origin"
    page.goto(allowed[1])


# Prometheus

@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """The folder of `prometheus` and `promtool`: installed, or unpacked from Debian's package."""
    if path := shutil.which("promtool"): return os.path.dirname(path)
    if not shutil.which("apt-get"): pytest.skip("Prometheus is not installed, and there is no apt-get")
    home = tmp_path_factory.mktemp("prometheus")
    got = subprocess.run(["apt-get", "download", "-q", "prometheus"], cwd=home, capture_output=True, text=True, timeout=120)
    if got.returncode: pytest.skip(f"Debian's package of Prometheus cannot be had: {got.stderr[-200:]}")
    subprocess.run(["dpkg", "-x", next(home.glob("*.deb")), home / "root"], check=True)
    return home / "root/usr/bin"


def test_prometheus(server, prometheus, tmp_path):
    """promtool finds nothing to say about the metrics; a real Prometheus scrapes them and answers questions about them."""
    server.post("/generate", {"prompt": "a fox", "steps": 1})
    text = httpx.get(server.url + "/metrics").text
    done = subprocess.run([f"{prometheus}/promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    target, port = server.url.removeprefix("http://"), free_port()
    (tmp_path / "prometheus.yml").write_text(
        f"scrape_configs: [{{job_name: aura, scrape_interval: 1s, static_configs: [{{targets: ['{target}']}}]}}]")
    argv = [f"{prometheus}/prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with open(tmp_path / "log", "wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            def value(query):
                try: r = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query})
                except httpx.TransportError: return None                          # it starts
                found = r.json()["data"]["result"] if r.status_code == 200 else []
                return float(found[0]["value"][1]) if found else None
            end = time.monotonic() + 30
            while value("aura_model_ready") is None: assert time.monotonic() < end, (tmp_path / "log").read_text()[-2000:]; time.sleep(0.2)
            assert value('up{job="aura"}') == value("aura_model_ready") == 1
            assert value("sum(aura_generation_seconds_count)") >= 1
        finally: process.terminate()
    noted("Prometheus 2 (Debian)", {"promtool check metrics": "works", "scrape": "works"})


# programs that are not installed here: their request shapes, as of November 2026

def test_request_shapes(server):
    from test_http_compat import LIBRECHAT, OPEN_WEBUI, SILLYTAVERN
    draw = lambda body: httpx.post(server.url + "/sdapi/v1/txt2img", json=body, timeout=60).json()
    for name, body in (("LibreChat", LIBRECHAT), ("Open WebUI", OPEN_WEBUI), ("SillyTavern", SILLYTAVERN)):
        info = json.loads(draw(body)["info"])
        told = next((said for said in info["warnings"] if said.startswith("sampler_name")), "works")
        seen = {"AUTOMATIC1111: txt2img": "works", "AUTOMATIC1111: another sampler": told} if "sampler_name" in body else {"AUTOMATIC1111: txt2img": "works"}
        if name != "SillyTavern":
            ask = {"model": "dall-e-3", "prompt": "a fox", "n": 1, "size": "1024x1024", "response_format": "b64_json"}
            answer = httpx.post(server.url + "/v1/images/generations", json=ask, headers={"Authorization": "Bearer x"}, timeout=60).json()
            seen["OpenAI: generate"] = "works" if answer["data"][0]["b64_json"] else "no picture"
        noted(f"{name} (request shape)", seen)
