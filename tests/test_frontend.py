"""examples/frontend in a real Chromium, from another origin than its engines: what the deployment guide says that a person sees."""
import functools, http.server, shutil, subprocess, threading

import pytest

from conftest import ROOT, free_port

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (CHROMIUM and shutil.which("npm")), reason="no Chromium or no npm on this machine")]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *said): pass


@pytest.fixture(scope="module")
def engines(make_server):
    """(the page's port, the local engine, the cloud engine): both allow the page."""
    port = free_port()
    origin = f"http://localhost:{port}"
    return port, make_server(ALLOW_ORIGINS=origin), make_server(ALLOW_ORIGINS=origin)


@pytest.fixture(scope="module")
def origin(engines, tmp_path_factory):
    """The page, checked, linted and built as its README says, at an address of its own."""
    port, local, cloud = engines
    repo = tmp_path_factory.mktemp("frontend")
    home = shutil.copytree(ROOT / "examples/frontend", repo / "examples/frontend", ignore=shutil.ignore_patterns("node_modules", "dist"))
    shutil.copy(ROOT / "openapi.json", repo)
    (home / ".env.local").write_text(f"VITE_LOCAL_ENGINE_URL={local.url}\nVITE_CLOUD_ENGINE_URL={cloud.url}/\n")       # with a slash at its end
    for argv in (["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"], ["npm", "run", "build"]):
        done = subprocess.run(argv, cwd=home, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    pages = http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Quiet, directory=home / "dist"))
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    yield f"http://localhost:{port}"
    pages.shutdown()


def test_local_cloud_auto_and_the_engine_status(engines, origin):
    _, local, cloud = engines
    asked = []
    with playwright.sync_playwright() as p, p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda r: asked.append(r.url) if r.method == "POST" else None)
        page.goto(origin)
        panel, said, picture = page.locator("#engines dd"), page.get_by_role("status"), page.locator("#pictures img")

        def draw(mode, button="Generate"):
            page.get_by_label(mode).check()
            page.get_by_role("button", name=button, exact=True).click()
            expect(page.get_by_role("button", name=button, exact=True)).to_be_enabled(timeout=60_000)
            return said.inner_text()

        for i in (0, 1): expect(panel.nth(i)).to_contain_text("ready on cpu\nembedded")
        assert "Drawn by the local engine." in draw("Local") and picture.get_attribute("alt") == "a red apple"
        assert picture.evaluate("e => e.decode().then(() => e.naturalWidth)") == 128
        before = picture.get_attribute("src")
        page.get_by_label("Change the picture to").fill("a green apple")
        assert "Drawn by the cloud engine." in draw("Cloud", "Refine") and picture.get_attribute("src") != before
        assert "Drawn by the cloud engine." in draw("Cloud") and "Drawn by the local engine." in draw("Auto (fallback)")
        assert asked == [local.url + "/generate", cloud.url + "/refine", cloud.url + "/generate", local.url + "/generate"]

        local.stop()
        assert "Drawn by the cloud engine." in draw("Auto (fallback)")
        assert f"ALLOW_ORIGINS name {origin}?" in draw("Local")
        expect(panel.nth(0)).to_contain_text("cannot be reached")
        expect(panel.nth(1)).to_contain_text("ready on cpu")
        page.get_by_label("Prompt").fill(" ")
        assert "prompt" in draw("Cloud")                                        # the engine's own words
