"""The Studio as the page at `/`, in a real Chromium: what a person sees and does. `AURA_PICTURES=1` keeps the screenshots."""
import base64, gzip, io, json, os, re, shutil, signal, subprocess, sys, time

import httpx
import pytest
from PIL import Image

import accessible
from hands import give, narrow_sliders, noise, slide, watch_the_bar
from conftest import ROOT, clean_env, start
from edge import Edge
from test_faults import Hub

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
STUDIO = ROOT / "aura_engine/assets/studio"
APP = [sys.executable, "app.py", "--host", "127.0.0.1"]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield b
        b.close()


@pytest.fixture
def context(browser):
    with browser.new_context(viewport={"width": 1040, "height": 940}, color_scheme="light") as context:
        context.set_default_timeout(20_000)
        yield context


@pytest.fixture
def page(context, server):
    """The page of the shared server. An exception in it, or a request to anywhere else, fails the test."""
    page, said, elsewhere = context.new_page(), [], []
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("request", lambda r: elsewhere.append(r.url) if not r.url.startswith(("http://127.0.0.1:", "data:", "blob:")) else None)
    page.goto(server.url)
    expect(state(page)).to_contain_text("ready")
    yield page
    assert not said and not elsewhere, (said, elsewhere)


def state(page): return page.locator(".state")
def prompt(page): return page.locator("[name=prompt]")
def tiles(page): return page.locator(".tiles li")
def meter(page): return page.locator(".meter")
def fact(page, name): return page.locator(f".receipt .fact-{name} dd")
def big(page): return page.locator(".frame img")
def press(page, name): page.get_by_role("button", name=name, exact=True).click()


def ask(page, text, steps=None, seed=None, n=None, shape=None):
    prompt(page).fill(text)
    if steps: slide(page, "steps", steps)
    if seed is not None: page.locator("[name=seed]").fill(str(seed))
    if n: page.get_by_role("radio", name=str(n), exact=True).check()
    if shape: page.get_by_role("radio", name=shape, exact=True).check()
    page.get_by_role("button", name="Generate", exact=True).click()


def finished(page, n=1):
    expect(tiles(page)).to_have_count(n, timeout=120_000)
    expect(meter(page)).to_have_count(0, timeout=120_000)


def saved(page):
    """What Save gives: the bytes of the PNG."""
    with page.expect_download() as download: press(page, "Save")
    return download.value.path().read_bytes()


def same(a, b, most=1):
    a, b = (Image.open(io.BytesIO(x)).convert("RGB").tobytes() for x in (a, b))
    return len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b, strict=True)) <= most


def copied(page, kind):
    """Press one of the copy links -> the clipboard's text."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name=kind, exact=True).click()
    expect(page.locator(".note")).to_have_text("Copied.")
    return page.evaluate("navigator.clipboard.readText()")


def test_a_preview_comes_before_the_picture(page):
    page.evaluate("""() => { window.seen = []; const root = document.getElementById('studio').shadowRoot;
        new MutationObserver(() => { const img = root.querySelector('.frame img'); if (img?.src) window.seen.push(img.className || 'picture'); })
            .observe(root, {subtree: true, childList: true, attributes: true}); }""")
    ask(page, "a red apple", steps=8, seed=3)
    finished(page)
    seen = page.evaluate("window.seen")
    assert "preview" in seen and seen[-1] == "picture" and seen.index("preview") < seen.index("picture")
    assert big(page).get_attribute("alt") == "a red apple" and big(page).evaluate("e => e.naturalWidth") == 128


def test_the_receipt_says_how_it_was_made(page):
    ask(page, "a red apple", steps=2)
    finished(page)
    assert fact(page, "steps").inner_text() == "2" and fact(page, "size").inner_text() == "128 × 128"
    seed = int(fact(page, "seed").inner_text())                              # a random seed can be learned
    assert re.fullmatch(r"[\d.]+ s", fact(page, "time").inner_text())
    receipt = json.loads(copied(page, "JSON"))
    assert receipt["seed"] == seed and receipt["prompt"] == "a red apple" and receipt["steps"] == 2


def test_one_selection(page):
    """The newest is the choice. An old one chosen stays the choice until the next is made. Save takes the choice."""
    ask(page, "a red apple", steps=1, seed=1)
    finished(page)
    ask(page, "an owl", steps=1, seed=2)
    finished(page, 2)
    tiles(page).nth(1).click()
    expect(fact(page, "seed")).to_have_text("1")
    assert b'"a red apple"' in saved(page)
    ask(page, "a fox", steps=1, seed=3)
    finished(page, 3)
    expect(fact(page, "seed")).to_have_text("3")
    assert b'"a fox"' in saved(page)


def test_several_pictures_and_a_shape(page):
    watch_the_bar(page, 3)
    ask(page, "a fish", steps=2, seed=10, n=3, shape="16:9")
    finished(page, 3)
    assert 0 < page.evaluate("window.fullest") < 0.99                         # full only when all are there
    assert big(page).count() == 3 and big(page).first.evaluate("p => p.naturalWidth > p.naturalHeight")
    page.locator(".frame button").nth(2).click()                            # a large picture is chosen by clicking it
    expect(big(page)).to_have_count(1)
    expect(fact(page, "seed")).to_have_text("12")
    press(page, "Use these settings")
    assert page.locator("[name=seed]").input_value() == "12" and page.get_by_role("radio", name="16:9", exact=True).is_checked()


def test_again_and_use_settings(page):
    ask(page, "a fox", steps=2, seed=5)
    finished(page)
    prompt(page).fill("something that is being typed")
    press(page, "Again")
    finished(page, 2)
    assert prompt(page).input_value() == "something that is being typed"
    assert fact(page, "steps").inner_text() == "2" and fact(page, "seed").inner_text() != "5"
    tiles(page).nth(1).click()
    first = saved(page)
    press(page, "Use these settings")
    assert prompt(page).input_value() == "a fox" and page.locator("[name=seed]").input_value() == "5"
    press(page, "Generate")
    finished(page, 3)
    assert same(first, saved(page))


def test_keyboard_alone(page):
    assert prompt(page).evaluate("e => e === e.getRootNode().activeElement")
    keys = page.keyboard
    keys.type("a fox")
    keys.press("Control+Enter")
    finished(page)
    keys.press("Control+Enter")
    finished(page, 2)
    tiles(page).first.focus()
    chosen = lambda: tiles(page).evaluate_all("all => all.findIndex(e => e.getAttribute('aria-selected') === 'true')")
    for key, at in (("ArrowRight", 1), ("ArrowRight", 1), ("Home", 0), ("End", 1), ("ArrowLeft", 0)):
        keys.press(key)
        page.wait_for_timeout(50)
        assert chosen() == at and tiles(page).nth(at).evaluate("e => e === e.getRootNode().activeElement"), key
    keys.press("f")
    expect(page.get_by_role("button", name="Keep")).to_have_attribute("aria-pressed", "true")
    keys.press("v")
    finished(page, 3)
    tiles(page).first.focus()
    keys.press("Delete")
    finished(page, 2)
    assert tiles(page).first.evaluate("e => e === e.getRootNode().activeElement")
    page.get_by_role("button", name="Undo").press("Enter")
    finished(page, 3)
    keys.press("c")
    expect(page.locator(".compare")).to_be_visible()
    keys.press("Escape")
    expect(page.locator(".compare")).to_have_count(0)
    keys.press("/")
    keys.type("v c r e ")                                                   # letters are letters where somebody types
    assert prompt(page).input_value().endswith("v c r e ") and tiles(page).count() == 3


def test_the_place_in_the_queue_is_shown(page, server):
    page.evaluate("""() => { window.notes = []; const root = document.getElementById('studio').shadowRoot;
        new MutationObserver(() => window.notes.push(root.querySelector('.said')?.textContent ?? '')).observe(root, {subtree: true, childList: true, characterData: true}); }""")
    with httpx.Client(base_url=server.url) as others:
        url = others.post("/jobs", json={"route": "generate", "request": {"prompt": "an owl", "steps": 50, "n": 4}}).json()["statusUrl"]
        ask(page, "a fox", steps=50)                                            # a short one would go first
        end = time.monotonic() + 30
        while not page.evaluate("window.notes.some(t => /^[1-4] ahead of you, about/.test(t))"):
            assert time.monotonic() < end
            page.wait_for_timeout(20)
        others.delete(url)
    finished(page)


def test_stop(page, server):
    """Stop ends the job itself, keeps what is finished, and leaves the focus where the work goes on."""
    ask(page, "an owl", steps=50, n=4)
    expect(page.locator(".said")).to_contain_text("step")
    press(page, "Stop")
    expect(meter(page)).to_have_count(0)
    expect(page.locator(".note")).to_have_text("Stopped.")
    assert page.evaluate("document.getElementById('studio').shadowRoot.activeElement !== null")
    end = time.monotonic() + 20
    while httpx.get(server.url + "/health").json()["queue"]["length"]: assert time.monotonic() < end; time.sleep(0.1)
    ask(page, "an owl", steps=50, n=1)
    expect(page.locator(".said")).to_contain_text("step")
    prompt(page).press("Escape")
    expect(meter(page)).to_have_count(0)


def test_start_from_a_picture(page):
    ask(page, "a red apple", steps=4, seed=8)
    finished(page)
    press(page, "Start from it")
    expect(page.get_by_label("What should it become?")).to_be_focused()
    page.get_by_label("What should it become?").fill("a green apple")
    slide(page, "strength", 0.6)
    press(page, "Generate")
    finished(page, 2)
    assert fact(page, "strength").inner_text() == "0.6" and big(page).get_attribute("alt") == "a green apple"
    assert page.get_by_role("button", name="link", exact=True).count() == 0      # a link cannot carry the picture it started from
    expect(page.locator(".receipt")).to_contain_text("A link cannot hold its start picture.")
    first = saved(page)
    page.get_by_role("button", name="Take the picture off").click()
    expect(page.get_by_label("What should it be?")).to_be_visible()
    press(page, "Use these settings")                                       # brings the start picture back, too
    expect(page.locator(".start")).to_be_visible()
    press(page, "Generate")
    finished(page, 3)
    assert same(first, saved(page))
    tiles(page).nth(2).click()
    press(page, "Use these settings")                                       # and takes it off where there was none
    expect(page.locator(".start")).to_have_count(0)


def stroke(page, *points):
    """Draw a line over the picture, through points in shares of it."""
    box = page.locator("canvas").bounding_box()
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*at[0])
    page.mouse.down()
    for x, y in at[1:]: page.mouse.move(x, y, steps=4)
    page.mouse.up()


def painted(page):
    """How many percent may change, as the Studio says."""
    said = page.locator(".start").get_by_role("button").first
    expect(said).to_contain_text(re.compile(r"\d+ % may change"))
    return int(re.match(r"(\d+) %", said.inner_text())[1])


def test_the_brush(page):
    """Paint, erase, undo, invert, clear, by mouse and by keys. What is outside comes back as it was. A reload keeps it."""
    ask(page, "a red apple", steps=1, seed=8)
    finished(page)
    before = Image.open(io.BytesIO(saved(page))).convert("RGB")
    press(page, "Start from it")
    press(page, "Paint what may change")
    canvas = page.get_by_role("application", name="Mask")
    expect(canvas).to_be_focused()
    stroke(page, (0.1, 0.1), (0.4, 0.1))
    one = painted(page)
    assert 3 <= one <= 12
    press(page, "Erase")
    stroke(page, (0.3, 0.1), (0.4, 0.1))
    assert painted(page) < one
    press(page, "Undo")
    assert painted(page) == one
    press(page, "Invert")
    assert abs(painted(page) + one - 100) <= 1
    canvas.press("Control+z")
    assert painted(page) == one
    press(page, "Clear")
    expect(page.get_by_role("button", name="Paint what may change")).to_have_attribute("aria-pressed", "true")
    press(page, "Undo")
    press(page, "Erase")                                   # the brush paints again
    canvas.focus()
    for key in ["ArrowDown"] * 4 + ["ArrowRight", "Space"]: page.keyboard.press(key)
    assert painted(page) > one
    page.keyboard.press("Control+z")
    press(page, "Close-up")
    page.keyboard.press("Escape")                          # done: the picture is back, the words have the focus
    expect(canvas).to_have_count(0)
    page.reload()
    assert painted(page) == one                            # nothing painted is lost
    prompt(page).fill("a green apple")
    press(page, "Generate")
    finished(page, 2)
    assert fact(page, "strength").inner_text() == "1" and re.fullmatch("[0-9a-f]{8}", fact(page, "mask").inner_text())
    assert fact(page, "closeUp").inner_text() == "32 px"
    after = Image.open(io.BytesIO(saved(page))).convert("RGB")
    assert after.size == before.size and after.crop((0, 64, 128, 128)).tobytes() == before.crop((0, 64, 128, 128)).tobytes()
    assert after.crop((20, 8, 40, 16)).tobytes() != before.crop((20, 8, 40, 16)).tobytes()
    python = copied(page, "Python")
    assert '"start.png", mask="mask.png"' in python and "padding_mask_crop=32" in python and "strength=1" in python
    press(page, "Again")                                   # the same mask, another seed
    finished(page, 3)
    assert fact(page, "mask").count() == 1


def test_painting_by_touch(browser, server):
    with browser.new_context(viewport={"width": 360, "height": 800}, has_touch=True, is_mobile=True) as context:
        page = context.new_page()
        page.goto(server.url)
        expect(state(page)).to_contain_text("ready")
        give(page, "drop", noise(96, 64))
        page.get_by_role("button", name="Paint what may change").tap()
        page.locator("canvas").scroll_into_view_if_needed()
        box = page.locator("canvas").bounding_box()
        at = [{"x": box["x"] + share * box["width"], "y": box["y"] + box["height"] / 2} for share in (0.3, 0.5, 0.7)]
        touches = context.new_cdp_session(page)
        touches.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": at[:1]})
        for point in at[1:]: touches.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
        touches.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        assert painted(page) > 8


@pytest.mark.parametrize("how", ["drop", "paste", "file"])
def test_pictures_in(page, how, tmp_path):
    """A large photo, as a file of 20 MB, becomes the start picture, small enough to travel. What is no picture is said."""
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(noise(3300, 2200) if how == "file" else noise(1800, 1200, "JPEG"))
    if how == "file": page.locator("input[type=file]").set_input_files(photo)
    else: give(page, how, photo.read_bytes(), photo.name, "image/jpeg")
    expect(page.get_by_role("img", name="photo.jpg")).to_be_visible()
    sent = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.url.endswith("/jobs") else None)
    ask(page, "an owl", steps=2)
    finished(page)
    width, height = Image.open(io.BytesIO(base64.b64decode(sent[0]["request"]["images"][0]))).size
    assert max(width, height) <= 256 and abs(width / height - 1.5) < 0.02
    give(page, "drop", b"not a picture")
    expect(page.get_by_role("alert")).to_contain_text("not a PNG")
    give(page, "drop", noise(600, 30), "strip.png")
    expect(page.get_by_role("img", name="strip.png")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()                         # what was wrong before is over
    press(page, "Generate")
    expect(page.get_by_role("alert")).to_contain_text("Start picture: sides of at least 64")


def test_one_of_our_pictures_brings_its_settings_back(page, context, server):
    ask(page, "a rocket", steps=3, seed=77)
    finished(page)
    png = saved(page)
    other = context.browser.new_context().new_page()
    other.goto(server.url)
    give(other, "drop", png)
    expect(other.locator(".offer")).to_contain_text("receipt")
    other.get_by_role("button", name="Use these settings").first.click()
    expect(other.locator(".start")).to_have_count(0)
    assert prompt(other).input_value() == "a rocket" and other.locator("[name=seed]").input_value() == "77"
    press(other, "Generate")
    finished(other)
    assert same(png, saved(other))
    other.context.close()


def test_a_link_makes_the_same_picture(page, browser):
    ask(page, "a rocket", steps=3)
    finished(page)
    link, png = copied(page, "link"), saved(page)
    assert "#r=" in link and "#" not in page.url                            # the author's own page stays as it is
    page.reload()
    expect(tiles(page)).to_have_count(1)
    assert page.locator(".offer").count() == 0
    with browser.new_context() as other:
        friend = other.new_page()
        friend.goto(link)
        expect(friend.locator(".offer")).to_contain_text("a rocket")
        press(friend, "Make it")
        finished(friend)
        assert same(png, saved(friend))


def test_copied_curl_and_python_make_the_same_picture(page, server, tmp_path):
    ask(page, "it's a “fox”", steps=2)
    finished(page)
    png, curl, python = saved(page), copied(page, "curl"), copied(page, "Python")
    subprocess.run(["bash", "-c", curl], cwd=tmp_path, check=True, timeout=60)
    file, = tmp_path.glob("*.png")
    assert same(png, file.read_bytes())
    file.unlink()
    assert server.url in python
    subprocess.run([sys.executable, "-c", python], cwd=tmp_path, check=True, timeout=120, env=clean_env(PYTHONPATH=ROOT))
    file, = tmp_path.glob("*.png")
    assert same(png, file.read_bytes())


def test_a_link_where_there_is_no_clipboard(page):
    ask(page, "a fox", steps=1)
    finished(page)
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.get_by_role("button", name="link", exact=True).click()
    expect(page.locator("[name=copied]")).to_have_value(re.compile("#r="))
    expect(page.locator("[name=copied]")).to_be_focused()


PROBLEM = {"type": "urn:aura:invalid", "title": "The request has a wrong value", "status": 422, "detail": "seed: given -1, allowed: at least 0.",
           "errors": [{"loc": "request.seed", "given": "-1", "allowed": "at least 0", "msg": ""}], "requestId": "x"}


def test_a_wrong_value_is_shown_where_it_is(page):
    """In a narrow window the settings are folded: they open, and the field is marked and focused."""
    page.set_viewport_size({"width": 620, "height": 900})
    expect(page.locator("[name=seed]")).to_be_hidden()
    page.route("**/jobs", lambda r: r.fulfill(status=422, content_type="application/problem+json", body=json.dumps(PROBLEM)))
    prompt(page).fill("a fox")
    press(page, "Generate")
    expect(page.get_by_role("alert")).to_have_text("Seed: at least 0.")       # in the form's words, and nothing to try again
    expect(page.locator("[name=seed]")).to_be_focused()
    expect(page.locator("[name=seed]")).to_have_attribute("aria-invalid", "true")
    page.unroute("**/jobs")
    page.locator("[name=seed]").fill("12x")
    expect(page.get_by_role("alert")).to_be_hidden()                        # stale errors go
    press(page, "Generate")
    expect(page.get_by_role("alert")).to_contain_text("whole number")
    expect(page.locator("[name=seed]")).to_be_focused()
    page.locator("[name=seed]").fill("12")
    press(page, "Generate")
    finished(page)
    prompt(page).fill(" ")
    press(page, "Generate")
    expect(page.get_by_role("alert")).to_contain_text("Say first")
    expect(prompt(page)).to_be_focused()


def test_a_full_queue_is_asked_again(page):
    full = {"type": "urn:aura:queue_full", "title": "Full", "status": 429, "detail": "40 are waiting.", "errors": [], "requestId": "x"}
    answers = [2, 2]

    def busy(route):
        if route.request.method == "POST" and answers:
            return route.fulfill(status=429, content_type="application/problem+json", headers={"retry-after": str(answers.pop())}, body=json.dumps(full))
        return route.continue_()
    page.route("**/jobs", busy)
    ask(page, "a fox", steps=1)
    expect(page.locator(".said")).to_contain_text(re.compile("busy. Asking again in [12] s"))
    expect(page.get_by_role("alert")).to_be_hidden()
    prompt(page).fill("the form stays free")
    finished(page)
    answers.append(60)
    press(page, "Again")
    expect(page.locator(".said")).to_contain_text("Asking again in")
    press(page, "Stop")
    expect(meter(page)).to_have_count(0)


def test_a_key(browser, locked):
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(locked.url)
        expect(state(page)).to_contain_text("ready")
        ask(page, "a fox", steps=1)
        expect(page.get_by_role("alert")).to_contain_text("asks for its key")
        page.get_by_label("Key", exact=True).fill("mellon")
        press(page, "Use key")
        expect(page.get_by_role("alert")).to_contain_text("not this engine's key")
        page.get_by_label("Key", exact=True).fill("sesame")
        page.get_by_label("Key", exact=True).press("Enter")
        finished(page)
        page.reload()                                                       # the key is still known
        finished(page)
        page.get_by_label("Style (LoRA)").select_option("ink")
        press(page, "Generate")
        finished(page, 2)
        assert fact(page, "lora").inner_text() == "ink"


def test_limits_come_from_the_model(page):
    edge = lambda name: page.locator(f"input[name={name}]").evaluate("e => [e.min, e.max].map(Number)")
    assert edge("steps") == [1, 50] and edge("guidance") == [1, 4] and edge("temperature") == [0, 2]
    without = page.locator("[name=negative]")
    assert without.is_disabled() and "guidance above 1" in without.get_attribute("placeholder")
    slide(page, "guidance", 2)
    expect(without).to_be_enabled()
    without.fill("circle")
    ask(page, "a fox", steps=2)
    finished(page)
    assert fact(page, "guidance").inner_text() == "2" and fact(page, "negative").inner_text() == "circle"


def test_a_prompt_is_text_not_markup(page):
    ask(page, "<img src=x onerror=alert(1)> owl", steps=1)
    finished(page)
    assert big(page).get_attribute("alt").startswith("<img") and page.locator(".receipt img").count() == 0


def test_examples(page):
    press(page, "an owl")
    assert prompt(page).input_value() == "an owl"
    press(page, "Surprise me")
    finished(page)


def test_a_reload_loses_nothing(page):
    """The form, the pictures, and the work under way, which goes on without the page."""
    ask(page, "a red apple", steps=1, seed=4)
    finished(page)
    ask(page, "an owl", steps=50, seed=6, n=2)
    expect(page.locator(".said")).to_contain_text("step")
    prompt(page).fill("typed but not asked")
    page.reload()
    expect(prompt(page)).to_have_value("typed but not asked")
    expect(page.locator(".note")).to_have_text("Went on while you were away.")
    expect(tiles(page).last).to_have_attribute("title", "a red apple")
    finished(page, 3)
    seeds = []
    for i in range(3):
        tiles(page).nth(i).click()
        seeds.append(fact(page, "seed").inner_text())
    assert seeds == ["7", "6", "4"]
    page.reload()
    finished(page, 3)
    press(page, "Clear all")
    expect(tiles(page)).to_have_count(0)
    press(page, "Undo")
    finished(page, 3)
    press(page, "Clear all")
    expect(page.locator(".note")).to_contain_text("Deleted.")      # said when it is true
    page.reload()
    expect(state(page)).to_contain_text("ready")
    expect(prompt(page)).to_have_value("typed but not asked")
    assert tiles(page).count() == 0


def test_what_is_typed_around_a_reload_stays(page, context, server):
    """The form is there when it is first seen, so nothing typed then is overwritten. What was typed just before is kept."""
    held = []
    page.route("**/health", lambda r: held.append(r))                       # an engine that takes its time
    with page.expect_navigation():
        page.evaluate("""() => { const e = document.getElementById('studio').shadowRoot.querySelector('[name=prompt]');
            e.value = 'the very last word'; e.dispatchEvent(new Event('input', {bubbles: true})); setTimeout(() => location.reload()); }""")
    expect(prompt(page)).to_have_value("the very last word")
    expect(prompt(page)).to_be_focused()
    page.keyboard.press("End")
    page.keyboard.type(", and more")
    expect(state(page)).not_to_contain_text("ready")
    if held: held[-1].continue_()                                           # earlier ones went with the page that asked
    page.unroute("**/health")
    expect(state(page)).to_contain_text("ready")
    expect(prompt(page)).to_have_value("the very last word, and more")
    other = context.new_page()                                              # a new tab begins with the form used last ...
    other.goto(server.url)
    expect(prompt(other)).to_have_value("the very last word, and more")
    prompt(other).fill("another tab")
    page.reload()                                                           # ... and each keeps its own
    expect(prompt(page)).to_have_value("the very last word, and more")


def test_two_tabs(page, context, server):
    """Each tab keeps its own choice, no picture gets lost or doubled."""
    other = context.new_page()
    other.goto(server.url)
    ask(page, "a fox", steps=1)
    finished(page)
    ask(other, "an owl", steps=1)
    finished(other)
    for tab in (page, other):
        tab.reload()
        finished(tab, 2)


def test_the_engine_dies_and_comes_back(context, server, tmp_path):
    """kill -9 in the middle of a picture: its preview stays, the Studio says when it tries again, and the picture comes.

    After it, another engine, which knows of no such job, answers at the same address."""
    first = start(APP, tmp_path / "log1.txt").wait_ready()
    port = int(first.url.rsplit(":", 1)[1])
    page = context.new_page()
    page.goto(first.url)
    expect(state(page)).to_contain_text("ready")
    ask(page, "an owl", steps=50, seed=9)
    expect(page.locator(".frame img.preview")).to_be_visible()
    first.process.send_signal(signal.SIGKILL)
    expect(page.locator(".said")).to_contain_text("Trying again in", timeout=20_000)
    expect(page.locator(".frame img.preview")).to_be_visible()
    expect(state(page)).to_contain_text("not reachable", timeout=20_000)
    with Edge(target=server.url, port=port, host=f"127.0.0.1:{port}") as again:
        finished(page)
        assert fact(page, "seed").inner_text() == "9" and page.get_by_role("alert").is_hidden()
        asked = [first.split()[0] for first, _, _ in again.requests if "/jobs" in first]
        assert asked[0] == "GET" and "POST" in asked        # for the job, which is forgotten, and for the picture again


def test_generate_while_loading(page):
    """The click waits, the loader's progress is seen, the picture starts by itself, no error is left."""
    left = [6]

    def loading(route):
        if not left[0]: return route.continue_()
        left[0] -= 1
        said = {"stage": "fetching", "file": "unet/model.safetensors", "bytesDone": 1.2e9, "bytesTotal": 3.4e9}
        return route.fulfill(json={"status": "loading", "ready": False, "model": "a/b", "device": None, "loading": said, "queue": {"length": 0, "seconds": 0}})
    page.route("**/health", loading)
    ask(page, "a fox", steps=1)
    expect(page.locator(".said")).to_contain_text("starts by itself")
    expect(page.locator(".said")).to_contain_text("1.2 of 3.4 GB")
    expect(page.get_by_role("alert")).to_be_hidden()
    finished(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_model_that_takes_for_ever(context, tmp_path):
    hub = Hub()
    hub.mode = "stall"
    loading = start(APP, tmp_path / "log.txt", **hub.env(tmp_path))
    try:
        page = context.new_page()
        while loading.status("/") != 200: page.wait_for_timeout(100)
        page.goto(loading.url)
        expect(state(page)).to_contain_text("loading", timeout=20_000)
        ask(page, "a fox")
        expect(page.locator(".said")).to_contain_text("starts by itself")
        press(page, "Stop")
        expect(meter(page)).to_have_count(0)
    finally:
        loading.stop()
        hub.server.shutdown()


def test_a_model_that_is_not_there_is_said(context, tmp_path):
    failing = start(APP, tmp_path / "log.txt", SD_MODEL_ID="nobody/nothing")
    try:
        page = context.new_page()
        while failing.status("/") != 200: page.wait_for_timeout(100)
        page.goto(failing.url)
        expect(state(page)).to_contain_text("not working", timeout=60_000)
        expect(page.get_by_role("alert")).to_contain_text("nobody/nothing", timeout=60_000)
        expect(page.get_by_role("button", name="Generate", exact=True)).to_be_disabled()
    finally: failing.stop()


def test_an_address_that_is_no_engine(page):
    page.route("**/jobs", lambda r: r.fulfill(status=404, body="<html>nothing</html>"))
    ask(page, "a fox")
    expect(page.get_by_role("alert")).to_contain_text("not as an engine")
    page.unroute("**/jobs")
    press(page, "Try again")
    finished(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_engine_panel(page):
    state(page).click()
    panel = page.locator(".engine")
    for words in ("ready", "embedded", "cpu", "GiB", "LCMScheduler"): expect(panel).to_contain_text(words)
    assert panel.get_by_role("img").get_attribute("aria-label").startswith("1: ")      # the step cost, as a chart


def test_compare(page):
    ask(page, "a lion on yellow", steps=2, seed=3)
    finished(page)
    prompt(page).fill("typed meanwhile")
    press(page, "Compare")
    caption = "e => { const words = new Range(); words.selectNodeContents(e); return words.getBoundingClientRect().bottom; }"
    end = page.locator(".scroll").evaluate("e => e.getBoundingClientRect().bottom")
    assert page.locator("caption").evaluate(caption) <= end                 # what is compared can be read before there is a grid
    page.get_by_label("Over (x)").fill("1, 2, 300")
    press(page, "Make 0")
    expect(page.get_by_role("alert")).to_contain_text("1–50")
    page.get_by_label("Over (x)").fill("1, 2")
    page.get_by_label("Over (y)").fill("0, 1.5")
    press(page, "Make 4")
    cells = page.locator(".cell")
    expect(cells).to_have_count(4)
    expect(page.locator("caption")).to_contain_text("4 of 4", timeout=60_000)
    expect(page.get_by_role("columnheader", name="steps 2")).to_be_visible()
    expect(page.get_by_role("rowheader", name="temperature 1.5")).to_be_visible()
    assert tiles(page).count() == 1                                         # they are no part of the history ...
    page.get_by_role("button", name="steps 1, temperature 1.5").click()
    expect(tiles(page)).to_have_count(2)                                    # ... until one is chosen
    assert [fact(page, name).inner_text() for name in ("steps", "temperature", "seed")] == ["1", "1.5", "3"]
    assert prompt(page).input_value() == "typed meanwhile"
    page.get_by_label("Vary (y)").select_option("words")
    page.get_by_label("Over (y)").fill("a lion on yellow | a fox on green")
    press(page, "Make 4")
    expect(page.locator("caption")).to_contain_text("4 of 4", timeout=60_000)
    page.get_by_role("button", name="steps 2, a fox on green").click()
    expect(page.locator(".receipt > p")).to_have_text("a fox on green")
    page.locator(".axes").get_by_role("button", name="Close").click()
    assert big(page).get_attribute("alt") == "a fox on green"


def test_compare_stops(page, server):
    ask(page, "an owl", steps=1)
    finished(page)
    press(page, "Compare")
    page.get_by_label("Over (x)").fill("47, 48, 49, 50")
    press(page, "Make 16")
    page.wait_for_timeout(300)
    page.locator(".axes").get_by_role("button", name="Close").click()
    end = time.monotonic() + 20
    while httpx.get(server.url + "/health").json()["queue"]["length"]: assert time.monotonic() < end; time.sleep(0.1)


CLICKS = """() => { window.clicks = window.clicks ?? 0;
    addEventListener('click', e => { if (e.isTrusted && e.detail) window.clicks++; }, true) }"""


def clicks(page):
    """Presses of the mouse since the last question."""
    return page.evaluate("() => { const n = window.clicks; window.clicks = 0; return n; }")


def test_a_newcomers_tasks(page, browser, server):
    """The tasks of 00_start's table, done by mouse and counted in clicks. Typing is not counted. The fifth is in test_lab."""
    page.evaluate(CLICKS)
    counted = {}
    prompt(page).press_sequentially("a fox on a green background")
    press(page, "Generate")
    finished(page)
    counted["make a picture"] = clicks(page)
    link, png = copied(page, "link"), saved(page)
    clicks(page)
    page.get_by_role("button", name="link", exact=True).click()
    with browser.new_context() as elsewhere:
        friend = elsewhere.new_page()
        friend.add_init_script(f"({CLICKS})()")
        friend.goto(link)
        press(friend, "Make it")
        finished(friend)
        counted["make it again on another machine"] = clicks(page) + clicks(friend)
        assert same(png, saved(friend))
    press(page, "Start from it")
    page.keyboard.press("Control+A")
    page.keyboard.type("a fox on a yellow background")
    press(page, "Generate")
    finished(page, 2)
    counted["change the background"] = clicks(page)
    press(page, "Start from it")
    press(page, "Paint what may change")
    stroke(page, (0.3, 0.5), (0.7, 0.5))
    press(page, "Invert")
    press(page, "Generate")
    finished(page, 3)
    counted["by brush"] = clicks(page) - 1                  # painting is not counted
    press(page, "Compare")
    page.get_by_role("button", name=re.compile("^Make ")).click()
    expect(page.locator("caption")).to_contain_text(re.compile(r" (\d+) of \1$"), timeout=60_000)
    page.get_by_role("button", name="steps 8").first.click()
    counted["find the best step count"] = clicks(page)
    assert counted == {"make a picture": 1, "make it again on another machine": 2, "change the background": 2, "by brush": 4, "find the best step count": 3}


def test_without_storage(browser, server):
    with browser.new_context() as context:
        context.add_init_script("for (const name of ['indexedDB', 'localStorage', 'sessionStorage']) Object.defineProperty(window, name, {get() { throw new DOMException('no', 'SecurityError') }})")
        page = context.new_page()
        page.goto(server.url)
        expect(state(page)).to_contain_text("ready")
        expect(page.locator(".note")).to_contain_text("Not stored")
        ask(page, "a fox", steps=1)
        finished(page)
        press(page, "Again")
        finished(page, 2)


def test_a_full_browser(page):
    """No room for a picture: it is there all the same, and a person is told to save it."""
    page.evaluate("() => { IDBObjectStore.prototype.put = () => { throw new DOMException('no room', 'QuotaExceededError') } }")
    ask(page, "🦊 ثعلب", steps=1)                                                # and the words read from right to left
    expect(page.locator(".note")).to_contain_text("Save what you want to keep")
    finished(page)
    assert page.locator(".receipt > p").evaluate("e => getComputedStyle(e).unicodeBidi") == "plaintext"
    with page.expect_download() as download: press(page, "Save")
    assert re.fullmatch(r"ثعلب-\d+\.png", download.value.suggested_filename)


def test_in_a_frame(browser, server):
    """As a Space shows it: inside a page of another origin."""
    with browser.new_context() as context:
        page = context.new_page()
        page.set_content(f'<iframe src="{server.url}" width="900" height="900" sandbox="allow-scripts allow-same-origin allow-forms"></iframe>')
        frame = page.frame_locator("iframe")
        expect(frame.locator(".state")).to_contain_text("ready", timeout=20_000)
        frame.locator("[name=prompt]").fill("a fox")
        frame.get_by_role("button", name="Generate", exact=True).click()
        expect(frame.get_by_role("option")).to_have_count(1, timeout=60_000)


def test_the_policy_is_strict(server):
    policy = httpx.get(server.url).headers["content-security-policy"]
    assert "unsafe" not in policy and "require-trusted-types-for 'script'" in policy and "default-src 'none'" in policy
    html = httpx.get(server.url).text
    assert "<style" not in html and "style=" not in html and not re.search(r"<script(?![^>]*src=)", html)
    assert httpx.get(server.url + "/studio/../app.py").status_code == httpx.get(server.url + "/studio/x.js").status_code == 404


def test_docs_without_a_network(page, server):
    """Swagger UI comes from this server alone, and lists the routes."""
    page.goto(server.url + "/docs")
    expect(page.locator(".opblock-summary", has_text="/generate").first).to_be_visible()
    page.locator(".opblock-summary", has_text="/refine").first.click()
    expect(page.locator(".opblock-body").first).to_contain_text("refinePrompt")


KEPT = ROOT / "nbs/images" if os.environ.get("AURA_PICTURES") else None
WIDTHS, SCHEMES = (320, 360, 620, 1040, 1600, 1680), ("light", "dark")
THINGS = ("a penguin on blue", "a lion on yellow", "a cupcake on pink", "an owl", "a rocket on a black background", "a fox on a green background")


@pytest.fixture(scope="module")
def gallery(browser, server, tmp_path_factory):
    """A browser profile with pictures in its history."""
    with browser.new_context(viewport={"width": 1040, "height": 940}, bypass_csp=True) as context:
        page = context.new_page()
        page.goto(server.url)
        expect(state(page)).to_contain_text("ready")
        for n, thing in enumerate(THINGS, 1):
            ask(page, thing, seed=10 + n, steps=None if KEPT else 1)
            finished(page, n)
        page.locator("[name=seed]").fill("")
        yield page


def keep(page, name, tmp_path):
    """A screenshot, for the notebooks if they are to be made again."""
    out = (KEPT or tmp_path) / f"{name}.webp"
    Image.open(io.BytesIO(page.screenshot(full_page=True))).save(out, quality=80)
    assert out.stat().st_size > 5_000


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths_and_themes(gallery, width, scheme, tmp_path):
    """No line of it runs out of the window, and axe finds nothing. The picture of it is kept."""
    gallery.set_viewport_size({"width": width, "height": 940})
    accessible.wear(gallery, scheme)
    assert gallery.evaluate("document.documentElement.scrollWidth") <= width
    wide = gallery.evaluate("""w => [...document.getElementById('studio').shadowRoot.querySelectorAll('.card, .head, .row, .actions, .options, .box')]
        .filter(e => { const b = e.getBoundingClientRect(); return b.width && (b.right > w + 1 || b.left < -1) }).map(e => e.className)""", width)
    assert wide == []
    if gallery.locator(".fold").is_visible():
        gallery.locator(".fold").click()
        assert narrow_sliders(gallery) == []
        gallery.locator(".fold").click()
        gallery.mouse.move(0, 0)                            # nothing looks pointed at
        gallery.wait_for_timeout(200)
    if width in (360, 620, 1040, 1600): keep(gallery, f"studio-{width}-{scheme}", tmp_path)
    assert big(gallery).bounding_box()["width"] >= min(width - 56, 314)
    assert accessible.violations(gallery) == []


def test_the_accessibility_tree(gallery):
    """Roles and names as Chromium tells them to a screen reader."""
    gallery.set_viewport_size({"width": 1040, "height": 940})
    nodes = accessible.tree(gallery, "#studio")
    accessible.check(nodes, ("heading", "Aura"), ("textbox", "What should it be?"), ("button", "Generate"), ("slider", "Steps"), ("radio", "16:9"),
                     ("group", "Picture"), ("group", "Receipt"), ("listbox", "Pictures"), ("button", "Keep (F)"))
    roles = [role for role, _ in nodes]
    assert roles.count("option") == len(THINGS) and "status" in roles


@pytest.mark.parametrize("what", ["settings", "panel", "compare", "alert", "start", "brush", "offer", "several", "copied", "empty"])
def test_axe_in_other_states(gallery, browser, server, what, tmp_path):
    page = gallery
    page.set_viewport_size({"width": 620, "height": 940})
    if what == "settings": page.locator(".fold").click()
    if what == "panel": state(page).click()
    if what == "compare": press(page, "Compare")
    if what == "alert": prompt(page).fill(""); press(page, "Generate")
    if what in ("start", "brush"): press(page, "Start from it")
    if what == "offer": give(page, "drop", saved(page))
    if what == "several":
        page.locator(".fold").click()
        ask(page, "a fish", steps=1, n=2)
        finished(page, len(THINGS) + 2)
    if what == "copied":
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})")
        press(page, "JSON")
    if what == "brush":
        press(page, "Paint what may change")
        stroke(page, (0.3, 0.3), (0.6, 0.4))
        for width, scheme in ((360, "light"), (1040, "dark")) if KEPT else ():
            page.set_viewport_size({"width": width, "height": 940})
            accessible.wear(page, scheme)
            keep(page, f"brush-{width}-{scheme}", tmp_path)
    if what == "empty":
        page = browser.new_context(bypass_csp=True, viewport={"width": 620, "height": 940}).new_page()
        page.goto(server.url)
        expect(state(page)).to_contain_text("ready")
    accessible.no_violations(page, schemes=("light",))
    if what == "settings": page.locator(".fold").click()
    if what == "panel": state(page).click()
    if what == "compare": page.locator(".axes").get_by_role("button", name="Close").click()
    if what == "alert": page.get_by_role("alert").get_by_role("button", name="Close").click()
    if what in ("start", "brush", "offer"): page.get_by_role("button", name="Take the picture off").click()
    if what == "offer": page.locator(".offer").get_by_role("button", name="Close").click()
    if what == "several":
        page.get_by_role("radio", name="1", exact=True).check()
        page.locator(".fold").click()
        for _ in range(2): press(page, "Delete (Delete)")
    if what == "empty": page.context.close()


def answers(page, path, body, status=200):
    """From now on this path answers so."""
    kind = "application/problem+json" if status >= 400 else "application/json"
    page.route(path, lambda r: r.fulfill(status=status, content_type=kind, headers={"retry-after": "30"}, body=json.dumps(body)))


LOADING = {"status": "loading", "ready": False, "model": "a/b", "device": None, "queue": {"length": 0, "seconds": 0},
           "loading": {"stage": "fetching", "file": "unet/model.safetensors", "bytesDone": 1.2e9, "bytesTotal": 3.4e9}}
FULL = {"type": "urn:aura:queue_full", "title": "Full", "status": 429, "detail": "40 are waiting.", "errors": []}
FAILED = {"status": "failed", "ready": False, "reason": "nobody/nothing is not there.", "queue": {"length": 0, "seconds": 0}}
STATES = {"loading": "starts by itself", "queued": "ahead of you", "running": "step", "busy": "busy. Asking again", "offline": "Trying again",
          "failed": "could not be loaded", "key missing": "asks for its key", "key wrong": "not this engine's key"}


@pytest.mark.parametrize("what", STATES)
def test_axe_in_the_states_of_the_engine(browser, server, what):
    """What is shown while something is the matter is as accessible as the rest, light and dark."""
    with browser.new_context(viewport={"width": 620, "height": 940}, bypass_csp=True) as context, httpx.Client(base_url=server.url) as others:
        page, ahead = context.new_page(), []
        if what == "key wrong": context.add_init_script("sessionStorage.setItem('aura.key', JSON.stringify('mellon'))")
        page.goto(server.url)
        expect(state(page)).to_contain_text("ready")
        if what == "loading": answers(page, "**/health", LOADING)
        if what == "busy": answers(page, "**/jobs", FULL, 429)
        if what == "offline": page.route("**/*", lambda r: r.abort())
        if what == "failed": answers(page, "**/health", FAILED)
        if what.startswith("key"): answers(page, "**/jobs", {"title": "no"}, 401)
        if what == "queued":
            ahead = [others.post("/jobs", json={"route": "generate", "request": {"prompt": "an owl", "steps": 50, "n": 4}}).json()["statusUrl"] for _ in range(2)]
        prompt(page).fill("a fox")
        if what in ("queued", "running"): slide(page, "steps", 50)
        if what != "failed": press(page, "Generate")
        where = page.get_by_role("alert") if what in ("failed", "key missing", "key wrong") else page.locator(".said")
        expect(where).to_contain_text(STATES[what])
        if what == "running": expect(page.locator(".frame img.preview")).to_be_visible()
        accessible.no_violations(page)
        for url in ahead: others.delete(url)
        if page.locator(".meter").count() and what in ("queued", "running"): press(page, "Stop")


def test_four_thousand_pixels(gallery):
    gallery.set_viewport_size({"width": 3840, "height": 2160})
    box = gallery.locator(".frame").bounding_box()
    assert box["width"] > 900 and gallery.evaluate("document.documentElement.scrollWidth") <= 3840


def test_reduced_motion(gallery):
    gallery.emulate_media(reduced_motion="reduce")
    moving = gallery.evaluate("[...document.getElementById('studio').shadowRoot.querySelectorAll('*')].filter(e => getComputedStyle(e).animationName !== 'none').length")
    assert moving == 0


def in_module(page, code, *args):
    """Run `code` with the Studio's module as `m` and `a` for the arguments -> what it gives."""
    both = "Promise.all(['studio', 'page'].map(name => import(`/studio/${name}.js`)))"
    return page.evaluate(f"([code, a]) => {both}.then(([m, page]) => window.run({{...m, ...page}}, a, code))", [code, list(args)])


@pytest.fixture
def module(gallery):
    """The module inside a page, to be called function by function."""
    gallery.evaluate("window.run = (m, a, code) => eval(code)")
    return lambda code, *args: in_module(gallery, code, *args)


def test_form_request_receipt_round_trip(module):
    """For every row of the table: a form becomes a request, the plan's receipt becomes the form again."""
    from aura_engine.models import ROWS
    from aura_engine.planning import plan
    from aura_engine.types import GenerateRequest
    pairs, rows = [], []                                   # the browser is asked twice: for all bodies, then for all forms
    for row in ROWS.values():
        for aspect in ("1:1", "4:3", "3:2", "16:9", "3:4", "2:3", "9:16"):
            limits = {"steps": row.steps, "guidance": row.guidance, "native": row.native, "loras": [], "gpu": False}
            form = {"prompt": "a fox", "negative": "", "aspect": aspect, "n": 1, "seed": 7, "steps": row.steps[2], "guidance": row.guidance[2], "temperature": 1.25, "strength": None, "lora": None, "high": False}
            pairs.append((form, limits))
            rows.append(row)
    bodies = module("a[0].map(([form, limits]) => m.requestOf(form, limits).body)", pairs)
    receipts = []
    for body, row in zip(bodies, rows, strict=True):
        picture = plan(GenerateRequest.model_validate(body), row).pictures[0]
        receipts.append({"prompt": picture.prompt, "negativePrompt": picture.negative_prompt, "width": picture.width, "height": picture.height, "steps": picture.steps,
                         "guidanceScale": picture.guidance_scale, "strength": None, "seed": picture.seed, "temperature": picture.temperature, "loraAlias": None})
    forms = module("a[0].map((receipt, i) => m.formOf(receipt, a[1][i][1]))", receipts, pairs)
    for form, (asked, _), row in zip(forms, pairs, rows, strict=True): assert form == asked, (row.name, asked["aspect"])


def test_generate_before_anything_is_known(module):
    """In a notebook the kernel may not have looked at its engine yet: the picture waits, nothing has failed."""
    code = """(async () => { let looks = 0, asked = 0;
        const store = {form: () => null, keepForm() {}, put() {}, remove() {}};
        const engine = {store, health: async () => (looks++ ? {ready: true} : {status: "connecting"}), async* generate() { asked++; }, examples: async () => []};
        const s = new m.Studio(engine);
        s.set({prompt: "a fox"});
        await s.generate();
        return [looks, asked, s.trouble]; })()"""
    assert module(code) == [3, 1, None]                     # two looks before it is asked, and one when it is over


def test_events_cut_at_every_byte(module):
    """Server-sent events are read the same wherever the network cuts them, with either line ending and between two bytes of a letter."""
    text = 'id: 1\r\nevent: step\r\ndata: {"step": 1, "word": "ü☀"}\r\n\r\n: heartbeat\n\nid: 2\nevent: done\ndata: {"warnings":\ndata: []}\n\n'
    code = """(async () => { const bytes = new TextEncoder().encode(a[0]), all = [];
        for (let cut = 0; cut <= bytes.length; cut++) {
            const body = new ReadableStream({start(c) { c.enqueue(bytes.slice(0, cut)); c.enqueue(bytes.slice(cut)); c.close(); }}), got = [];
            for await (const e of m.eventsIn(body)) got.push(e);
            all.push(JSON.stringify(got)); }
        return [...new Set(all)]; })()"""
    answers = module(code, text)
    assert len(answers) == 1
    assert json.loads(answers[0]) == [{"event": "step", "data": {"step": 1, "word": "ü☀"}}, {"event": "done", "data": {"warnings": []}}]


def test_receipts_in_pictures(module):
    from aura_engine.images import encode
    from aura_engine.types import Receipt
    receipt = Receipt(prompt="ein Füchslein ☀", negative_prompt="", width=64, height=64, steps=1, guidance_scale=1.0, strength=None, seed=2**53 - 1, temperature=0.7, scheduler="lcm",
                      model="embedded", revision=None, lora=None, precision="fp32", backend="torch", device="cpu", versions={})
    png = encode(Image.new("RGB", (64, 64)), "png", receipt)
    read = lambda data: module("m.receiptIn(new Blob([Uint8Array.from(a[0])]))", list(data))
    assert read(png) == json.loads(json.dumps(receipt.to_json()))
    for other in (b"", b"abc", png[:20], png[:60], encode(Image.new("RGB", (64, 64)), "png"), noise(64, 64, "JPEG")): assert read(other) is None


def test_sizes():
    """What the browser loads is what lies here: no build step, and still small, all scripts together as well as what a host loads."""
    size = {path.name: len(path.read_bytes()) for path in STUDIO.iterdir()}
    zipped = {path.name: len(gzip.compress(path.read_bytes(), 9)) for path in STUDIO.iterdir()}
    assert sum(n for name, n in size.items() if name.endswith(".js")) <= 60_000 and size["studio.css"] <= 18_000, size
    for host in ("page.js", "kernel.js"):                  # a page loads the one, a notebook the other
        assert sum(zipped[name] for name in ("studio.js", host, "studio.css", "texts.json")) <= 25_000, zipped
    together = b"".join((STUDIO / name).read_bytes() for name in ("studio.js", "page.js", "kernel.js", "studio.css"))
    assert len(gzip.compress(together, 9)) <= 25_000


def test_limits_of_an_engine_that_does_not_say(module):
    limits = module("m.limitsOf({loras: ['a']})")
    assert limits["steps"] == [1, None, 100] and limits["loras"] == ["a"]
    assert module("m.limitsOf()")["guidance"] == [0, None, 30]
