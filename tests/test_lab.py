"""00_start in a real JupyterLab, used by a real Chromium. `AURA_PICTURES=1` keeps the screenshot for the README."""
import os, secrets, shutil, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

from conftest import ROOT, clean_env, free_port

pytestmark = pytest.mark.slow
IDLE = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


def chromium():
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    return path or pytest.skip("no chromium on this machine: JupyterLab was not opened")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the notebook."""
    home, port, token = tmp_path_factory.mktemp("lab"), free_port(), secrets.token_hex(8)
    (home / "nbs").mkdir()
    shutil.copy(ROOT / "nbs/00_start.ipynb", home / "nbs/00_start.ipynb")
    quiet = home / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}', encoding="utf-8")
    argv = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}", "--allow-root",
            f"--ServerApp.root_dir={home}", "--LabApp.expose_app_in_browser=True", f"--LabApp.user_settings_dir={home / 'settings'}"]
    env = clean_env(PYTHONPATH=ROOT, HOME=home, JUPYTER_RUNTIME_DIR=home / "runtime", IPYTHONDIR=home / "ipython",
                    XDG_CACHE_HOME=os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    with open(home / "log.txt", "wb") as log: process = subprocess.Popen(argv, env=env, stdout=log, stderr=subprocess.STDOUT)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while True:
        try: urllib.request.urlopen(f"{url}/api?token={token}", timeout=5).read(); break
        except OSError:
            if process.poll() is not None or time.monotonic() > end: pytest.fail((home / "log.txt").read_text()[-3000:])
            time.sleep(0.3)
    yield f"{url}/doc/tree/nbs/00_start.ipynb?token={token}"
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def page(lab):
    """The notebook, opened, with all its cells run."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: JupyterLab was not opened")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(180_000)
        page.goto(lab)
        page.wait_for_function(IDLE)
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.locator("[data-lm-suppress-shortcuts]").nth(2).wait_for(state="attached")
        page.wait_for_function(IDLE)
        yield page
        browser.close()


@pytest.fixture
def studio(page):
    """The live Studio of the second cell."""
    studio = page.locator("[data-lm-suppress-shortcuts]").first
    studio.scroll_into_view_if_needed()
    return studio


def tiles(studio): return studio.locator(".tiles li")


def finished(studio, n):
    tiles(studio).nth(n - 1).wait_for()
    studio.locator(".meter").wait_for(state="detached")


def test_a_prompt_becomes_a_picture(studio):
    """What cells made is in the history; what is asked here joins it, with a preview before it."""
    before = tiles(studio).count()
    assert before >= 3
    studio.locator("[name=prompt]").fill("a rocket on a black background")
    studio.get_by_role("button", name="Generate", exact=True).click()
    studio.locator(".frame img.preview").wait_for()
    finished(studio, before + 1)
    assert studio.locator(".receipt > p").inner_text() == "a rocket on a black background"


def test_labs_letters_change_no_cell(page, studio):
    cells = page.locator(".jp-Cell").count()
    tiles(studio).first.click()
    for key in "abdx": page.keyboard.press(key)
    page.wait_for_timeout(500)
    assert page.locator(".jp-Cell").count() == cells


def test_stop(studio):
    before = tiles(studio).count()
    studio.locator("input[name=steps]").evaluate("e => { e.value = 50; e.dispatchEvent(new Event('input', {bubbles: true})) }")
    studio.get_by_role("button", name="Generate", exact=True).click()
    studio.locator(".said", has_text="step").wait_for()
    studio.get_by_role("button", name="Stop", exact=True).click()
    studio.locator(".meter").wait_for(state="detached")
    assert tiles(studio).count() == before


def test_the_theme_is_followed(page, studio):
    for theme, dark in (("JupyterLab Dark", True), ("JupyterLab Light", False)):
        page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
        page.wait_for_function("dark => document.querySelector('[data-lm-suppress-shortcuts]').hasAttribute('data-dark') === dark", arg=dark)


def test_compare_and_the_panel_are_there(page):
    shown = page.locator("[data-lm-suppress-shortcuts]")
    compare, panel = shown.nth(1), shown.nth(2)
    compare.scroll_into_view_if_needed()
    assert compare.locator(".cell img:not(.preview)").count() == 8
    compare.locator(".cell").nth(3).click()
    assert compare.locator(".receipt .fact-steps dd").inner_text() == "8"
    panel.scroll_into_view_if_needed()
    for said in ("ready", "embedded"): panel.get_by_text(said).first.wait_for()          # inner_text() of a host is empty


def test_screenshot(studio, tmp_path):
    out = ROOT / "nbs/images/studio.png" if os.environ.get("AURA_PICTURES") else tmp_path / "studio.png"
    studio.screenshot(path=out)
    assert out.stat().st_size > 10_000
