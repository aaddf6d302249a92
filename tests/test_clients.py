"""Client by operation: programs that people have, in the versions below, installed in throwaway environments and asked to draw.

Versions are pinned in tests/clients: a client that changes its ways is a matter for the day on which its number is raised there. Each client's
run writes the row of what it saw, with its own version. The rows are held against nbs/bench/clients.json, which 10d shows as
a table. `AURA_CLIENTS=1` writes that file from this run alone, so that nothing is in it that was not seen.
"""
import base64, contextlib, functools, http.server, json, os, re, shutil, subprocess, sys, threading, time

import httpx
import pytest

from conftest import ROOT, free_port
from edge import Edge

pytestmark = pytest.mark.slow
HERE = ROOT / "tests/clients"
PYTHON, NODE = HERE / "requirements.txt", HERE / "package.json"
PINNED_IN = {"Python)": dict(re.findall(r"^([\w.-]+)==(\S+)", PYTHON.read_text(), re.M)), "Node)": json.loads(NODE.read_text())["dependencies"]}


def run(*argv, cwd=None, **env):
    """The last line that a program prints, or what it said when it failed."""
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=400, env={**os.environ, **env})
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout.strip().rpartition("\n")[2]


TABLE = ROOT / "nbs/bench/clients.json"


ROWS = {}                        # {client: {"version", "seen": {operation: "works" or what its user reads}}} of this run


def noted(rows):
    """Hold the rows of a run against the table: what was seen, and in which version it is pinned here."""
    ROWS.update(rows)
    table = json.loads(TABLE.read_text())
    for client, row in rows.items():
        name, _, where = client.partition(" (")
        if where in ("Python)", "Node)"): assert row["version"] == PINNED_IN[where][name]
        if not os.environ.get("AURA_CLIENTS"): assert table[client]["seen"] == row["seen"], client


def row(client, version, **seen): return {client: {"version": version, "seen": {k.replace("_", " "): v for k, v in seen.items()}}}


def outcome(came, wanted=True): return "works" if came == wanted else f"not as asked: {came!r}"


@pytest.fixture(scope="module")
def locked(make_server):
    """An engine that wants a key."""
    return make_server(AURA_API_KEY="sesame-7")


def test_python_clients(server, locked, tmp_path):
    pytest.importorskip("uv")
    uv = (sys.executable, "-m", "uv")
    run(*uv, "venv", "-q", "--python", sys.executable, tmp_path / "env")
    python = tmp_path / "env/bin/python"
    run(*uv, "pip", "install", "-q", "--python", python, "-r", PYTHON)
    run(python.with_name("openapi-python-client"), "generate", "--path", ROOT / "openapi.json", "--output-path", tmp_path / "generated", "--meta", "none",
        PATH=f"{python.parent}:{os.environ['PATH']}")
    noted(json.loads(run(python, HERE / "speak.py", server.url, locked.url, tmp_path, PYTHONPATH="", HF_HUB_OFFLINE="0", LITELLM_LOCAL_MODEL_COST_MAP="True")))


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """A folder with the clients of npm, what the tests say to them, and types generated from openapi.json."""
    if not shutil.which("npm"): pytest.skip("npm is not installed")
    home = tmp_path_factory.mktemp("node")
    shutil.copy(NODE, home)
    run("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline", cwd=home)
    run(home / "node_modules/.bin/openapi-typescript", ROOT / "openapi.json", "-o", home / "api.d.ts")
    for name in ("speak.mts", "browse.ts"): shutil.copy(HERE / name, home)
    return home


def test_node_clients(server, locked, node):
    run(node / "node_modules/.bin/tsc", "--module", "nodenext", "--target", "es2022", "--strict", "--skipLibCheck", "--types", "node", "speak.mts", cwd=node)
    noted(json.loads(run("node", "speak.mjs", server.url, locked.url, cwd=node)))


def test_the_doors_of_the_notebook(monkeypatch):
    """10e with its slow cells: each client's own code, as a reader runs it."""
    pytest.importorskip("uv")
    if not shutil.which("npm"): pytest.skip("npm is not installed")
    import test_notebooks
    monkeypatch.setattr(test_notebooks, "FLAGS", test_notebooks.FLAGS - {"slow"})
    test_notebooks.test_notebook(ROOT / "nbs/10e_clients.ipynb", monkeypatch)


# in a browser

class Pages(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *said): pass


@pytest.fixture(scope="module")
def allowed(make_server):
    """(an engine, the origin of a page that it allows)."""
    origin = f"http://localhost:{free_port()}"
    return make_server(ALLOW_ORIGINS=f"{origin},app://aura,tauri://localhost", AURA_PROXIES="127.0.0.1"), origin


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


def test_openai_and_hugging_face_in_a_browser(allowed, page, node):
    """Clients of npm in a page, and the browser that it is open in."""
    version = lambda name: json.loads((node / "node_modules" / name / "package.json").read_text())["version"]
    seen = {name: tried(page, attempt, allowed[0].url) for name, attempt in (("openai", "openai"), ("@huggingface/inference", "huggingface"))}
    noted({f"{name} (Chromium, another origin)": {"version": version(name), "seen": seen[name]} for name in seen})


def test_event_source_in_a_browser_goes_on_after_a_cut(allowed, page):
    """The connection ends in the middle. The browser asks again with Last-Event-ID, and no event is lost or comes twice."""
    with Edge(target=allowed[0].url, cut=1500, once=True) as edge:
        ids, opened = tried(page, "events", allowed[0].url, edge.url)
        last = [headers.get("last-event-id") for _, headers, _ in edge.requests]
    assert last[0] is None and 0 < int(last[1]) < 64
    every = list(range(1, 2 * 30 + 4 + 1))
    noted(row("EventSource (Chromium, another origin)", page.context.browser.version,
              follow_a_job=outcome(ids, every), go_on_after_a_cut=outcome((ids, opened), (every, 2))))


def test_origins_in_a_browser(allowed, page):
    """Any header from an allowed page. Other pages are refused, and the log says what would allow them."""
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


NGINX = """
pid nginx.pid; error_log stderr; events {{ }}
http {{
  access_log off; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  upstream aura {{ server {engine}; }}
  server {{ listen {listen}; location / {{ proxy_pass http://aura; proxy_buffering off; {more} }} }}
}}"""


@contextlib.contextmanager
def nginx(engine, home, more="", host="localhost"):
    """The address of a real nginx before an engine. As it does by default, it puts the upstream's name into Host."""
    program = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin") or pytest.skip("nginx is not installed")
    port = free_port()
    (home / "nginx.conf").write_text(NGINX.format(engine=engine.removeprefix("http://"), listen=port, more=more))
    with subprocess.Popen([program, "-p", home, "-c", home / "nginx.conf", "-g", "daemon off;"], stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 10
            while True:
                try: assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200; break
                except httpx.TransportError: assert time.monotonic() < end; time.sleep(0.05)
            yield f"http://{host}:{port}"
        finally: process.terminate()


def test_the_engines_own_page_behind_a_proxy_that_rewrites_host(allowed, page, tmp_path):
    """Its own page draws: the browser says same-origin. A page of another site that calls through the same proxy is refused."""
    with nginx(allowed[0].url, tmp_path) as url:
        page.goto(url)
        page.locator("[name=prompt]").fill("a fox")
        with page.expect_request(lambda r: r.method == "POST") as asked: page.get_by_role("button", name="Generate", exact=True).click()
        page.locator(".tiles li").first.wait_for(timeout=60_000)
        assert asked.value.all_headers()["origin"] == url
        page.goto(allowed[0].url)                                                 # a page that is not allowed, beside the proxy
        assert tried_elsewhere(page, url) == "TypeError"
        ask = {"json": {"prompt": "a fox", "steps": 1}, "headers": {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}}
        assert httpx.post(url + "/generate", **ask).status_code == 403
    page.goto(allowed[1])


def test_a_proxy_that_says_the_name_it_has(allowed, tmp_path):
    """X-Forwarded-Host from a proxy in AURA_PROXIES: addresses lead back through it, its pages are known without Sec-Fetch-Site."""
    ask = {"model": "dall-e-3", "prompt": "a fox", "num_inference_steps": 1}
    with nginx(allowed[0].url, tmp_path, "proxy_set_header X-Forwarded-Host $http_host;", host="127.0.0.1") as url:
        found = httpx.post(url + "/v1/images/generations", json=ask, headers={"Origin": url}, timeout=60).json()["data"][0]["url"]
        assert found.startswith(url + "/pictures/") and httpx.get(found).headers["content-type"] == "image/png"
        assert httpx.post(url + "/generate", json={"prompt": "a fox"}, headers={"Origin": "http://192.0.2.7"}).status_code == 403


def tried_elsewhere(page, url):
    """What a POST to another origin comes to."""
    return page.evaluate("url => fetch(url + '/generate', {method: 'POST', headers: {'content-type': 'application/json'}, body: '{}'}).then(r => String(r.status), e => e.name)", url)


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
    """promtool finds nothing to say about the metrics. A real Prometheus scrapes them and answers questions about them."""
    server.post("/generate", {"prompt": "a fox", "steps": 1})
    text = httpx.get(server.url + "/metrics").text
    checked = subprocess.run([f"{prometheus}/promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    target, port = server.url.removeprefix("http://"), free_port()
    (tmp_path / "prometheus.yml").write_text(
        f"scrape_configs: [{{job_name: aura, scrape_interval: 1s, static_configs: [{{targets: ['{target}']}}]}}]")
    argv = [f"{prometheus}/prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with open(tmp_path / "log", "wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            def answer(path, **params):
                try: r = httpx.get(f"http://127.0.0.1:{port}/api/v1/{path}", params=params)
                except httpx.TransportError: return {}                            # it starts
                return r.json()["data"] if r.status_code == 200 else {}
            def value(query):
                found = answer("query", query=query).get("result")
                return float(found[0]["value"][1]) if found else None
            end = time.monotonic() + 30
            while value("aura_model_ready") is None: assert time.monotonic() < end, (tmp_path / "log").read_text()[-2000:]; time.sleep(0.2)
            up, drawn = value('up{job="aura"}'), value("sum(aura_generation_seconds_count)")
            version = answer("status/buildinfo")["version"]
        finally: process.terminate()
    noted(row("Prometheus", version, promtool_check_metrics=outcome((checked.returncode, checked.stderr), (0, "")), scrape=outcome((up, drawn >= 1), (1, True))))


# programs that are not installed here: their request shapes, as of November 2026

def test_request_shapes(server):
    from test_http_compat import LIBRECHAT, OPEN_WEBUI, SILLYTAVERN
    ask = lambda path, body: httpx.post(server.url + path, json=body, headers={"Authorization": "Bearer x"}, timeout=60).json()
    drawn = lambda picture: outcome(base64.b64decode(picture)[:4], b"\x89PNG")
    openai = {"model": "dall-e-3", "prompt": "a fox", "n": 1, "size": "1024x1024", "response_format": "b64_json"}
    for name, body in (("LibreChat", LIBRECHAT), ("Open WebUI", OPEN_WEBUI), ("SillyTavern", SILLYTAVERN)):
        answer = ask("/sdapi/v1/txt2img", body)
        seen = {"AUTOMATIC1111: txt2img": drawn(answer["images"][0])}
        if "sampler_name" in body: seen["AUTOMATIC1111: another sampler"] = next(w for w in json.loads(answer["info"])["warnings"] if w.startswith("sampler_name"))
        if name != "SillyTavern": seen["OpenAI: generate"] = drawn(ask("/v1/images/generations", openai)["data"][0]["b64_json"])
        noted({f"{name} (its request shape)": {"version": "November 2026", "seen": seen}})


def test_the_table_holds_what_was_seen_and_nothing_else(request):
    """Stands last. `AURA_CLIENTS=1` writes the rows of this run, so a whole run is needed for that."""
    if os.environ.get("AURA_CLIENTS"):
        assert not request.session.testsfailed and len(ROWS) > 15
        return TABLE.write_text(json.dumps(ROWS, indent=1, sort_keys=True) + "\n")
    table = json.loads(TABLE.read_text())
    unseen = sorted(table.keys() - ROWS.keys())
    if unseen and (request.session.testsfailed or len(ROWS) < 10): pytest.skip(f"not tried in this run: {', '.join(unseen)}")
    assert not unseen, "AURA_CLIENTS=1 with all tests of this file writes the table again"
