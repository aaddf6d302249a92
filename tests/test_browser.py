"""The page in a real Chromium: what a person sees and does. `AURA_PICTURES=1` keeps the screenshots for the README."""
import os, shutil, signal, sys, time

import httpx
import pytest
from conftest import ROOT, clean_env, free_port, start
from test_faults import Hub

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield b
        b.close()


@pytest.fixture
def page(browser, server):
    """The page of the shared server; an error on its console fails the test."""
    with browser.new_context(viewport={"width": 1200, "height": 900}) as context:
        page, said = context.new_page(), []
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda e: said.append(str(e)))
        page.goto(server.url)
        expect(page.locator("#state")).to_contain_text("ready")
        yield page
        assert not said, said


def ask(page, prompt, **more):
    page.get_by_label("Prompt", exact=True).fill(prompt)
    if more:
        if page.locator("form details").get_attribute("open") is None: page.get_by_text("More", exact=True).click()
        for label, value in more.items(): page.get_by_label(label, exact=True).fill(str(value))
    page.get_by_role("button", name="Generate").click()


def finished(page, n=1):
    expect(page.locator("#gallery li")).to_have_count(n, timeout=120_000)
    expect(page.locator("#go")).to_be_enabled(timeout=60_000)


def test_a_picture_and_its_preview_before_it(page):
    page.evaluate("""() => { window.seen = []; new MutationObserver(() => { const p = document.getElementById('picture');
        window.seen.push(p.className === 'preview' ? 'preview' : p.hidden ? 'none' : 'picture'); }).observe(document.getElementById('picture'), {attributes: true}); }""")
    ask(page, "a red apple", Steps=6, Seed=3)
    finished(page)
    seen = [s for s in page.evaluate("window.seen") if s != "none"]
    assert "preview" in seen and seen[-1] == "picture" and seen.index("preview") < seen.index("picture")
    assert page.locator("#picture").get_attribute("alt") == "a red apple" and page.evaluate("document.getElementById('picture').naturalWidth") == 128


def test_keyboard_alone(page):
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("a fox")
    page.keyboard.press("Control+Enter")
    finished(page)


def test_several_pictures_and_a_shape(page):
    page.get_by_label("Aspect ratio").select_option("16:9")
    ask(page, "a fish", Pictures=3, Steps=2)
    finished(page, 3)
    assert page.evaluate("(p => p.naturalWidth > p.naturalHeight)(document.getElementById('picture'))")
    assert page.get_by_label("Resolution").locator("option[value=high]").is_disabled()      # no GPU: not offered


def test_the_place_in_the_queue_is_shown(page, server):
    page.evaluate("() => { window.notes = []; new MutationObserver(() => window.notes.push(document.getElementById('note').textContent)).observe(document.getElementById('note'), {childList: true}); }")
    with httpx.Client(base_url=server.url) as others:
        url = others.post("/jobs", json={"route": "generate", "request": {"prompt": "an owl", "steps": 50, "n": 4}}).json()["statusUrl"]
        ask(page, "a fox", Steps=2)
        end = time.monotonic() + 30                                              # not wait_for_function: the page's policy forbids eval
        while not page.evaluate("window.notes.some(t => t.startsWith('4 ahead of you, about'))"): assert time.monotonic() < end; page.wait_for_timeout(20)
        others.delete(url)
    finished(page)


def test_cancel(page):
    ask(page, "an owl", Steps=50, Pictures=4)
    expect(page.locator("#note")).to_contain_text("step")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#note")).to_have_text("Cancelled.")
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    expect(page.locator("#state")).to_have_text("ready", timeout=20_000)                     # the engine let go of it too
    assert page.locator("#gallery li").count() == 0


def test_refine_by_clicking(page):
    ask(page, "a red apple", Steps=2)
    finished(page)
    page.locator("#gallery button").first.click()
    expect(page.get_by_label("What should it become?")).to_be_focused()
    page.get_by_label("What should it become?").fill("a green apple")
    page.get_by_role("button", name="Refine", exact=True).click()
    finished(page, 2)
    assert page.locator("#picture").get_attribute("alt") == "a green apple"
    page.get_by_role("button", name="Start anew").click()
    expect(page.get_by_role("button", name="Generate")).to_be_visible()


def test_an_error_is_said_to_a_person(page):
    page.get_by_label("Prompt", exact=True).fill("x")
    page.evaluate("document.getElementById('aspect').options[0].textContent = '9:1'; document.getElementById('aspect').options[0].value = '9:1'")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("aspectRatio: given '9:1'")
    page.route("**/generate", lambda r: r.fulfill(status=502, body="<html>Bad gateway</html>"))
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("not as an engine")


def test_a_prompt_is_text_not_markup(page):
    ask(page, "<img src=x onerror=alert(1)> owl", Steps=1)
    finished(page)
    assert page.locator("#picture").get_attribute("alt").startswith("<img") and page.locator("main img").count() == 2


def test_a_shared_link_makes_the_same_picture(page, browser, server):
    ask(page, "a rocket", Steps=3)
    finished(page)
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("#note")).to_contain_text("link is")
    pixels = "(async () => { const p = document.getElementById('picture'); await p.decode(); const c = new OffscreenCanvas(128, 128).getContext('2d'); c.drawImage(p, 0, 0); return Array.from(c.getImageData(0, 0, 128, 128).data); })()"
    first, link = page.evaluate(pixels), page.url
    assert "#r=" in link
    with browser.new_context() as other:
        friend = other.new_page()
        friend.goto(link)
        expect(friend.locator("#note")).to_contain_text("shared")
        friend.get_by_role("button", name="Generate").click()
        finished(friend)
        assert max(abs(a - b) for a, b in zip(first, friend.evaluate(pixels), strict=True)) <= 1


def test_the_engine_dies_and_comes_back(browser, tmp_path):
    """kill -9 in the middle of a picture: the page says so, shows it in the panel, and recovers without a reload."""
    first = start([sys.executable, "app.py", "--host", "127.0.0.1"], tmp_path / "log1.txt").wait_ready()
    port = first.url.rsplit(":", 1)[1]
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(first.url)
        page.get_by_text("Engine Status").click()
        expect(page.locator("#local-facts")).to_contain_text("embedded", timeout=60_000)
        ask(page, "an owl", Steps=50, Pictures=4)
        expect(page.locator("#note")).to_contain_text("step", timeout=60_000)
        first.process.send_signal(signal.SIGKILL)
        expect(page.get_by_role("alert")).to_be_visible(timeout=30_000)
        expect(page.locator("#state")).to_have_text("not reachable", timeout=20_000)
        expect(page.locator("#local-facts")).to_contain_text("What to do")
        again = start_on(port, tmp_path / "log2.txt")
        try:
            expect(page.locator("#state")).to_have_text("ready", timeout=120_000)
            ask(page, "an owl", Steps=1, Pictures=1)
            finished(page)
        finally: again.stop()


def start_on(port, log):
    import subprocess
    from conftest import Server
    with open(log, "wb") as out:
        return Server(f"http://127.0.0.1:{port}", subprocess.Popen([sys.executable, "app.py", "--host", "127.0.0.1"], cwd=ROOT, env=clean_env(PORT=port), stdout=out, stderr=out), log)


def test_loading_is_shown(browser, tmp_path):
    """A model that takes for ever to arrive: the page is there at once, says so, and tells who does not wait."""
    hub = Hub()
    hub.mode = "stall"
    loading = start([sys.executable, "app.py", "--host", "127.0.0.1"], tmp_path / "log.txt", **hub.env(tmp_path))
    try:
        with browser.new_context() as context:
            page = context.new_page()
            while loading.status("/") != 200: page.wait_for_timeout(100)
            assert httpx.head(loading.url).status_code == 200
            page.goto(loading.url)
            expect(page.locator("#state")).to_have_text("loading the model", timeout=20_000)
            page.get_by_label("Prompt", exact=True).fill("a fox")
            page.get_by_role("button", name="Generate").click()
            expect(page.get_by_role("alert")).to_contain_text("loading")
            expect(page.get_by_role("alert")).to_contain_text("Try again in")
    finally:
        loading.stop()
        hub.server.shutdown()


def test_a_model_that_is_not_there_is_said(browser, tmp_path):
    loading = start([sys.executable, "app.py", "--host", "127.0.0.1"], tmp_path / "log.txt", SD_MODEL_ID="nobody/nothing")
    try:
        with browser.new_context() as context:
            page = context.new_page()
            while loading.status("/") != 200: page.wait_for_timeout(100)
            page.goto(loading.url)
            expect(page.locator("#state")).to_have_text("not working", timeout=60_000)
            expect(page.get_by_role("alert")).to_contain_text("nobody/nothing", timeout=60_000)
    finally: loading.stop()


def test_auto_falls_back_to_the_cloud(page, browser, server, tmp_path):
    """Local answers 503, the second engine (another origin, allowed by its ALLOW_ORIGINS) makes the picture."""
    cloud = start([sys.executable, "app.py", "--host", "127.0.0.1"], tmp_path / "log.txt", ALLOW_ORIGINS=server.url).wait_ready()
    try:
        page.get_by_text("Engine Status").click()
        page.get_by_label("Address of the cloud engine").fill(cloud.url)
        page.get_by_label("Auto").check()
        page.route(server.url + "/generate", lambda r: r.fulfill(status=503, content_type="application/problem+json", body='{"detail": "The engine is stopping.", "status": 503}'))
        ask(page, "a fox", Steps=1)
        finished(page)
        expect(page.locator("#note")).to_contain_text("made by the cloud engine")
        expect(page.locator("#cloud-facts")).to_contain_text("embedded")
        page.get_by_label("Address of the cloud engine").fill(f"http://127.0.0.1:{free_port()}")
        page.get_by_label("Cloud", exact=True).check()
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("alert")).to_contain_text("ALLOW_ORIGINS")
    finally: cloud.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_width(browser, server, scheme):
    with browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True) as context:
        page = context.new_page()
        page.goto(server.url)
        expect(page.locator("#state")).to_contain_text("ready")
        ask(page, "a red apple", Steps=2)
        finished(page)
        page.get_by_text("Engine Status").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_in_a_frame(browser, server):
    """As a Space shows it: inside a page of another origin, without storage it could rely on."""
    with browser.new_context() as context:
        page = context.new_page()
        page.set_content(f'<iframe src="{server.url}" width="900" height="900" sandbox="allow-scripts allow-same-origin allow-forms"></iframe>')
        frame = page.frame_locator("iframe")
        expect(frame.locator("#state")).to_contain_text("ready", timeout=20_000)
        frame.get_by_label("Prompt", exact=True).fill("a fox")
        frame.get_by_role("button", name="Generate").click()
        expect(frame.locator("#gallery li")).to_have_count(1, timeout=60_000)


def test_nothing_is_loaded_from_elsewhere(browser, server):
    with browser.new_context() as context:
        page, urls = context.new_page(), []
        page.on("request", lambda r: urls.append(r.url))
        page.goto(server.url)
        expect(page.locator("#state")).to_contain_text("ready")
        assert {u for u in urls if not u.startswith((server.url, "data:"))} == set()


def test_docs_without_a_network(page, server):
    """Swagger UI comes from this server alone, and lists the routes."""
    elsewhere = []
    page.route("**/*", lambda r: r.continue_() if r.request.url.startswith((server.url, "data:")) else (elsewhere.append(r.request.url), r.abort()))
    page.goto(server.url + "/docs")
    expect(page.locator(".opblock-summary", has_text="/generate").first).to_be_visible()
    page.locator(".opblock-summary", has_text="/refine").first.click()
    expect(page.locator(".opblock-body").first).to_contain_text("refinePrompt")
    assert elsewhere == []


SCREENS = {"page": dict(viewport={"width": 1040, "height": 760}, color_scheme="light"), "phone": dict(viewport={"width": 390, "height": 844}, color_scheme="dark", device_scale_factor=1.5, has_touch=True)}


@pytest.mark.parametrize("name", SCREENS)
def test_screenshots(browser, server, tmp_path, name):
    """As the README shows it: some pictures, one of them large, the engine's state below."""
    with browser.new_context(**SCREENS[name]) as context:
        page = context.new_page()
        page.goto(server.url)
        expect(page.locator("#state")).to_contain_text("ready")
        things = ("a penguin on blue", "a pineapple on purple", "a rocket on a black background", "a fox on a green background", "a red apple on a blue background")
        for n, thing in enumerate(things[-3:] if name == "phone" else things, 1):
            ask(page, thing, Seed=11 + n)
            finished(page, n)
        page.get_by_text("More", exact=True).click()
        if name == "page": page.get_by_text("Engine Status").click()
        out = (ROOT / "nbs/images" if os.environ.get("AURA_PICTURES") else tmp_path) / f"{name}.png"
        page.screenshot(path=out, full_page=True)
        assert out.stat().st_size > 20_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(browser, server, scheme):
    """axe finds nothing serious, on the fresh page and with everything open."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed").Axe()
    with browser.new_context(color_scheme=scheme, bypass_csp=True) as context:
        page = context.new_page()
        page.goto(server.url)
        expect(page.locator("#state")).to_contain_text("ready")
        def serious(): return [(v["id"], v["nodes"][0]["html"][:120]) for v in axe.run(page).response["violations"] if v["impact"] in ("serious", "critical")]
        assert serious() == []
        ask(page, "a red apple", Steps=1, Seed=1)
        finished(page)
        page.locator("#gallery button").first.click()
        page.get_by_text("Engine Status").click()
        page.evaluate("fail('Something went wrong.'); document.getElementById('key-box').hidden = false")
        assert serious() == []
