"""The widget notebook in a real JupyterLab, used by a real Chromium. `AURA_PICTURES=1` keeps the screenshot for the README."""
import json, os, secrets, shutil, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

from conftest import ROOT, clean_env, free_port

pytestmark = pytest.mark.slow
SLOWLY = "hook = engine.parts.unet.register_forward_pre_hook(lambda module, args: time.sleep(1))"


def chromium():
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    return path or pytest.skip("no chromium on this machine: JupyterLab was not opened")


def cell(source): return {"cell_type": "code", "id": secrets.token_hex(4), "metadata": {}, "source": source, "outputs": [], "execution_count": None}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the notebook whose engine is made slow enough for a person to press Cancel."""
    home, port, token = tmp_path_factory.mktemp("lab"), free_port(), secrets.token_hex(8)
    notebook = json.loads((ROOT / "nbs/13_widgets.ipynb").read_text(encoding="utf-8"))
    notebook["cells"][-3:-3] = [cell(SLOWLY)]
    (home / "nbs").mkdir()
    (home / "nbs/13_widgets.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    quiet = home / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}', encoding="utf-8")
    argv = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}", "--allow-root", f"--ServerApp.root_dir={home}",
            "--LabApp.expose_app_in_browser=True", f"--LabApp.user_settings_dir={home / 'settings'}"]
    env = clean_env(PYTHONPATH=ROOT, IN_TEST=1, HOME=home, JUPYTER_RUNTIME_DIR=home / "runtime", IPYTHONDIR=home / "ipython", XDG_CACHE_HOME=os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    with open(home / "log.txt", "wb") as log: process = subprocess.Popen(argv, env=env, stdout=log, stderr=subprocess.STDOUT)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while True:
        try: urllib.request.urlopen(f"{url}/api?token={token}", timeout=5).read(); break
        except OSError:
            if process.poll() is not None or time.monotonic() > end: pytest.fail((home / "log.txt").read_text()[-3000:])
            time.sleep(0.3)
    yield f"{url}/doc/tree/nbs/13_widgets.ipynb?token={token}"
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def page(lab):
    """The notebook, opened, with all its cells run."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: JupyterLab was not opened")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1500})
        page.set_default_timeout(120_000)
        page.goto(lab)
        page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for_function("document.querySelector('.aura-gallery') && window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")
        yield page
        browser.close()


def tiles(page): return page.locator(".aura-gallery").nth(1).locator("button")


def wait_for_tiles(page, n):
    page.wait_for_function("n => { const t = document.querySelectorAll('.aura-gallery')[1].querySelectorAll('img'); return t.length === n && t[0].naturalWidth > 0 }", arg=n)


def press(page, name): page.locator("button.jupyter-button:enabled", has_text=name).first.click()


def says(page, text): page.locator("[role=status]", has_text=text).first.wait_for()


WATCH = """() => {
  const line = document.querySelector('[role=status]').closest('.widget-html-content'), stage = document.querySelector('.aura-gallery');
  const note = () => window.seen.push([line.textContent, stage.querySelectorAll('img').length]);
  window.seen = [];
  for (const place of [line, stage]) new MutationObserver(note).observe(place, { childList: true, subtree: true, characterData: true, attributes: true });
}"""


def test_a_prompt_becomes_a_picture_and_the_kernel_stays_free(page):
    before = tiles(page).count()
    page.evaluate(WATCH)
    page.get_by_placeholder("what to draw").fill("an owl")
    page.get_by_placeholder("what to draw").press("Tab")
    press(page, "Generate")
    says(page, "step")
    assert page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status") == "idle"
    wait_for_tiles(page, before + 1)
    says(page, "done in")
    seen = page.evaluate("window.seen")
    assert any(text.startswith("step") and pictures for text, pictures in seen), seen      # a preview, before the picture


def test_a_click_shows_the_receipt_and_refine_starts_from_it(page):
    before = tiles(page).count()
    tiles(page).nth(0).click()
    page.locator(".widget-html td", has_text="an owl").first.wait_for()
    press(page, "Refine")
    wait_for_tiles(page, before + 1)
    says(page, "done in")


def test_cancel(page):
    before = tiles(page).count()
    press(page, "Generate")
    says(page, "step")
    press(page, "Cancel")
    says(page, "Cancelled.")
    assert tiles(page).count() == before
    page.locator("button.jupyter-button:enabled", has_text="Generate").first.wait_for()


def test_the_status_panel_is_there(page):
    page.locator(".widget-html th", has_text="local").first.wait_for()
    assert "ready" in page.locator(".widget-html table", has=page.locator("th", has_text="local")).first.inner_text()


def test_screenshot(page, tmp_path):
    page.get_by_label("count").fill("4")
    page.get_by_placeholder("what to draw").fill("a red apple")
    page.get_by_placeholder("what to draw").press("Enter")
    page.locator("button.jupyter-button:enabled", has_text="Cancel").first.wait_for()
    says(page, "done in")
    tiles(page).nth(0).click()
    out = ROOT / "nbs/images/studio.png" if os.environ.get("AURA_PICTURES") else tmp_path / "studio.png"
    out.parent.mkdir(exist_ok=True)
    page.locator(".jp-OutputArea-output", has=page.get_by_placeholder("what to draw")).first.screenshot(path=out)
    assert out.stat().st_size > 10_000
