"""The widgets without a browser or a kernel: the same on an engine of this process and over HTTP."""
import json, re, subprocess, sys, threading, time

import numpy as np
import pytest
from PIL import Image

from aura_engine.album import Shot, close_desks, desk_of
from aura_engine.client import AuraClient
from aura_engine.images import receipt_of
from aura_engine.types import AuraError, Invalid
from aura_engine.widgets import Compare, EngineStatus, Studio
from conftest import ROOT, clean_env, free_port
from edge import Edge, page, problem

SETTINGS = {"SD_MODEL_ID": "embedded", "SD_DEVICE": "cpu"}


@pytest.fixture(scope="module")
def engine():
    """The engine that "offline" means in this process, with SETTINGS."""
    from aura_engine.config import load_settings
    from aura_engine.engine import shared_engine
    with shared_engine(load_settings(**SETTINGS)) as engine: yield engine


@pytest.fixture(params=["in process", "over HTTP"])
def source(request): return request.getfixturevalue("engine") if request.param == "in process" else request.getfixturevalue("server").url


class Browser:
    """What stands for the browser: it sends messages to a widget and keeps what comes back."""
    def __init__(self, widget):
        self.widget, self.heard = widget, []
        widget.send = lambda body, buffers=None: self.heard.append((body, [bytes(b) for b in buffers or ()]))

    def say(self, pictures=(), **message): self.widget._hear(self.widget, message, list(pictures))
    def of(self, type, id=None): return [(b, p) for b, p in list(self.heard) if b["type"] == type and id in (None, b["id"])]


@pytest.fixture
def studio(source):
    studio = Studio(AuraClient(source, mode="local"))
    yield studio
    studio.close()
    studio.client.close()
    close_desks()                                           # the next one begins with an empty album


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition(): assert time.monotonic() < end; time.sleep(0.01)


def test_a_form_becomes_pictures(studio, tmp_path):
    began = time.monotonic()
    studio.value = {**studio.value, "prompt": "a red apple", "n": 2, "seed": 7, "aspect": "4:3", "temperature": 1.0}
    progress = []
    studio.observe(lambda c: progress.append(c["new"]), "progress")
    work = studio.generate()
    assert time.monotonic() - began < 1 and studio.busy and [j["job"] for j in studio.jobs] == [work.id]     # the kernel is free
    shots = work.wait(120)
    assert sorted(s.receipt.seed for s in shots) == [7, 8] and shots[0].image.width > shots[0].image.height
    worked = sum(seconds for stage, seconds in shots[0].receipt.timings.items() if stage != "queue")
    assert abs(shots[0].seconds - worked) < 0.01            # waiting is no part of the time that is shown, as on the page
    assert not studio.busy and studio.jobs == [] and progress[-1] == 1.0 and len(progress) > 4
    assert studio.pictures[0].at >= studio.pictures[1].at and studio.chosen is studio.pictures[0]
    studio.choice = studio.pictures[1].id
    assert studio.chosen is studio.pictures[1] and studio.chosen._repr_png_().startswith(b"\x89PNG")
    path = studio.chosen.save(tmp_path / "apple.png")
    assert receipt_of(path.read_bytes()) == studio.chosen.receipt
    refined = studio.generate(start=studio.chosen).wait(120)
    assert len(refined) == 2 and refined[0].receipt.strength == 0.5


def test_the_browser_asks(studio):
    """An ask is accepted, its events and pictures come back under its id. Sent twice, it is worked on once."""
    browser = Browser(studio)
    ask = dict(type="ask", id="q", route="generate", images=[], body={"prompt": "a fox", "seed": 3, "n": 2, "steps": 3})
    browser.say(**ask)
    browser.say(**ask)
    until(lambda: len(browser.of("done", "q")) == 2, 120)
    assert browser.heard[0][0] == {"id": "q", "type": "accepted"}
    pictures = browser.of("image", "q")
    assert {b["picture"] for b, _ in pictures} == {"q-0", "q-1"} and len(studio.pictures) == 2
    body, (png,) = pictures[0]
    assert receipt_of(png).to_json()["seed"] == body["receipt"]["seed"] and body["mime"] == "image/png"
    assert all(p[0].startswith(b"\xff\xd8") for _, p in browser.of("preview", "q"))
    browser.say(type="ask", id="r", route="refine", images=[0, 0], body={"refinePrompt": "a blue fox", "config": {"seed": 5}}, pictures=[png])
    until(lambda: browser.of("done", "r"), 120)
    assert len(browser.of("image", "r")) == 2
    browser.say(type="ask", id="s", route="replay", images=[], body={"receipt": body["receipt"]})
    until(lambda: browser.of("done", "s"), 120)


def test_a_reloaded_page_hears_everything(studio):
    studio.value = {**studio.value, "prompt": "an owl", "seed": 1, "steps": 6}
    work = studio.generate()
    late = Browser(studio)
    late.say(type="resume", id="again", job=work.id)
    work.wait(120)
    late.say(type="resume", id="later", job=work.id)
    for id in ("again", "later"):
        until(lambda id=id: late.of("done", id), 5)
        assert len(late.of("image", id)) == 1
    assert len(late.of("preview", "later")) == 1                  # those that were overtaken are dropped
    late.say(type="resume", id="none", job="unknown")
    assert late.of("failed", "none")[0][0]["problem"]["type"] == "urn:aura:not_found"
    late.say(type="history", id="h")
    assert [b["picture"] for b, _ in late.of("image", "h")] == [s.id for s in studio.pictures] and late.heard[-1][0]["type"] == "end"


def test_the_album(studio):
    """Keep, delete, undo. What is made aside is part of it when somebody picks it."""
    browser = Browser(studio)
    browser.say(type="ask", id="a", route="generate", images=[], aside=True, body={"prompt": "a fox", "steps": 1})
    until(lambda: browser.of("done", "a"), 120)
    assert studio.pictures == []
    browser.say(type="put", picture="a-0", star=True)
    assert studio.pictures[0].star
    browser.say(type="remove", picture="a-0")
    assert studio.pictures == []
    browser.say(type="put", picture="a-0", star=False)
    assert [s.id for s in studio.pictures] == ["a-0"]
    browser.say(type="remove", picture="nothing of ours")


def test_what_is_picked_elsewhere_is_told_once(studio):
    """A tile of a comparison that is picked, and a picture that is deleted, reach the other views of the desk, not their own."""
    other, picker = Browser(studio), Compare(studio.client, "a fox", x=("steps", [1])).wait(60)
    own, shot = Browser(picker), picker.results[1, None]
    for _ in range(2): own.say(type="put", picture=shot.id, star=False)
    (body, (png,)), = other.of("image", "album")
    assert body["picture"] == shot.id and png == shot.file and own.of("image", "album") == []
    own.say(type="remove", picture=shot.id)
    assert [b["picture"] for b, _ in other.of("gone", "album")] == [shot.id] and studio.pictures == []
    other.say(type="put", picture=shot.id, star=False)                      # its own undo is no news to it
    assert studio.pictures == [shot] and len(other.of("image", "album")) == 1
    studio.close()
    assert studio.desk.viewers == []
    assert studio.looking.cancelled()                       # it asks no engine any more


def test_stop(studio):
    browser = Browser(studio)
    browser.say(type="ask", id="q", route="generate", images=[], body={"prompt": "an owl", "n": 4, "steps": 50})
    until(lambda: browser.of("step"), 300)
    browser.say(type="cancel", job="q")
    until(lambda: browser.of("failed", "q"), 20)
    assert browser.of("failed", "q")[0][0]["problem"]["type"] == "urn:aura:cancelled"
    work = studio.desk.begin(studio.desk.works["q"].ask)
    studio.stop()
    with pytest.raises(AuraError, match="Stopped"): work.wait(20)
    until(lambda: all(r.health.queue.length == 0 for r in studio.client.health().values()), 20)


def test_errors_are_said(studio):
    with pytest.raises(Invalid, match="promt"): studio.value = {"promt": "a fox"}
    studio.value = {**studio.value, "prompt": "a fox", "seed": "seven"}
    with pytest.raises(Invalid, match="seed"): studio.generate()
    browser = Browser(studio)
    browser.say(type="ask", id="q", route="generate", images=[], body={"prompt": "", "steps": 4})
    assert "prompt" in browser.of("failed", "q")[0][0]["problem"]["detail"]
    browser.say(type="ask", id="r", route="generate", images=[], body={"prompt": "x", "lora": "watercolour"})
    until(lambda: browser.of("failed", "r"), 30)
    assert browser.of("failed", "r")[0][0]["problem"]["errors"][0]["loc"] == "lora"


def test_cells_run_again_cost_nothing(monkeypatch, engine):
    """The three obvious cells, five times over: one engine, one client, its pictures kept."""
    for name, value in SETTINGS.items(): monkeypatch.setenv(name, value)
    first = Studio("offline", prompt="a fox")
    made = first.generate().wait(300)
    threads = threading.active_count()
    for _ in range(5):
        studio, status = Studio("offline"), EngineStatus("offline")
        Compare("offline", "a fox", x=("steps", [1])).wait(60)
        assert studio.desk is first.desk is status.desk and studio.pictures == made
        assert studio.client.aio.doors[0].engine is engine
    assert threading.active_count() <= threads + 2
    close_desks()
    assert first.client.loop.is_closed() and desk_of("offline") is not first.desk
    close_desks()


def test_the_three_obvious_cells_at_once(tmp_path):
    """In a fresh process, started together while nothing is loaded yet: the same seed gives the same picture. Two levels of
    255 are rounding, because one of them shared its steps with others. Wrong weights were 108 levels apart."""
    code = """
from aura_engine.widgets import Compare, EngineStatus, Studio
studio, status, grid = Studio("offline", prompt="a fox", seed=1), EngineStatus("offline"), Compare("offline", "a fox", x=("steps", [4]), seed=1)
a, b = studio.generate().wait(300)[0], grid.wait(300).results[4, None]
assert max(abs(p - q) for p, q in zip(a.image.tobytes(), b.image.tobytes())) <= 2, "the same seed, another picture"
assert studio.client.health()["local"].ready
print("fine")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=clean_env(PYTHONPATH=ROOT, SD_MODEL_ID="embedded"), capture_output=True, text=True, timeout=400)
    assert run.stdout.strip() == "fine", run.stdout + run.stderr


def test_the_reason_of_a_failed_engine_reaches_the_widget(monkeypatch):
    monkeypatch.setenv("SD_MODEL_ID", "nobody/nothing")
    studio = Studio("offline", prompt="a fox")
    with pytest.raises(AuraError, match="nobody/nothing"): studio.generate().wait(120)
    studio.client.wait(studio.look())
    assert studio.health["status"] == "failed" and "nobody/nothing" in studio.health["reason"]
    monkeypatch.setenv("SD_MODEL_ID", "embedded")
    assert Studio("offline").desk is not studio.desk
    close_desks()


def test_nobody_there():
    with AuraClient(f"http://127.0.0.1:{free_port()}", mode="local") as client:
        with pytest.raises(AuraError, match="aura serve"): Studio(client, prompt="a fox").generate().wait(20)
    close_desks()


def test_updates_do_not_come_from_the_main_thread(studio):
    names = set()
    studio.observe(lambda c: names.add(threading.current_thread().name), "progress")
    studio.value = {**studio.value, "prompt": "a fox", "steps": 4}
    studio.generate().wait(60)
    assert names == {"aura-client"}


def test_status_follows_an_engine_that_goes_and_comes_back(server):
    port = free_port()
    with AuraClient(f"http://127.0.0.1:{port}", server.url) as client:
        status = EngineStatus(client, every=0.1, origin="https://my.site")
        until(lambda: status.engines.get("local", {}).get("status") == "away")
        assert "aura serve" in " ".join(status.engines["local"]["advice"])
        until(lambda: "ALLOW_ORIGINS" in " ".join(status.engines["cloud"]["advice"]))
        with Edge(target=server.url, port=port): until(lambda: status.engines["local"]["status"] == "ready")
        until(lambda: status.engines["local"]["status"] == "away")
        client.generate("a fox", steps=1)
        until(lambda: "a fox" in status.engines["cloud"]["lately"])
        assert status.mode == "auto"
        status.mode = "cloud"                                      # the panel's choice of engine
        assert [d.name for d in client.aio.doors] == ["cloud"] and set(status.engines) == {"local", "cloud"}
        status.close()


def test_status_of_a_healthy_engine(source):
    with AuraClient(source, mode="local") as client:
        client.generate("a fox", steps=1)
        status = EngineStatus(client, every=60)
        client.wait(status.look())
        told = status.engines["local"]
        assert told["status"] == "ready" and told["device"] == "cpu" and told["scheduler"] == "LCMScheduler" and told["advice"] == []
        assert 50 * 2**20 < told["memory"]["rss"] < 50 * 2**30 and told["stepCost"] and "a fox" in told["lately"]
        assert status.health["limits"]["guidance"] == [1, 1, 4] and status.examples
        assert "| local | ready |" in status._repr_markdown_()
        status.stop()


@pytest.mark.parametrize("said, advice", [(page(503, "<h1>Preparing Space</h1>"), "wakes when it is asked"), (problem(503, "out_of_memory", "It does not fit.", retry_after=1), "SD_PRECISION=fp16"),
                                          (page(503, "This Space has been paused"), "its page"), (problem(429, "queue_full", "40 are waiting.", retry_after=1), "Others are being served")])
def test_status_says_what_to_do(server, said, advice):
    """After a question that went wrong, the panel has the reason and the next step, for a Space and for memory alike."""
    with Edge(said, target=server.url) as space, AuraClient(mode="cloud", cloud=space.url, patience=0) as client:
        with pytest.raises(AuraError): client.generate("a fox", steps=1)
        if b"Space" in said: space.script += [said] * 5            # still so when the panel looks
        status = EngineStatus(client, every=60)
        client.wait(status.look())
        assert advice in " ".join(status.engines["cloud"]["advice"]), status.engines
        status.stop()


def test_compare(source):
    with AuraClient(source, mode="local") as client:
        table = Compare(client, "a fox", x=("steps", [1, 2]), y=("scheduler", ["lcm", "ddim"])).wait(120)
        assert set(table.results) == {(1, "lcm"), (2, "lcm"), (1, "ddim"), (2, "ddim")} and all(isinstance(r, Shot) for r in table.results.values())
        assert len({r.image.tobytes() for r in table.results.values()}) > 2 and table.axes.label((2, "lcm")) == "steps 2 · lcm"
        receipts = [r.receipt for r in table.results.values()]
        assert len({(r.seed, r.temperature, r.prompt) for r in receipts}) == 1
        assert table.grid().image.width > 200 and len(table.table["jobs"]) == 4 and table.desk.album.shots == []
        browser = Browser(table)                                   # a page that comes late is shown all tiles
        for job in table.table["jobs"]: browser.say(type="resume", id=job, job=job)
        assert len(browser.of("image")) == 4
        refused = Compare(client, "a fox", x=("steps", [1, 900])).wait(60)
        assert isinstance(refused.results[900, None], AuraError) and isinstance(refused.results[1, None], Shot)
        with pytest.raises(Invalid, match="colour"): Compare(client, "a fox", x=("colour", ["red"]), y=("steps", [1]))


def test_compare_from_the_chosen_picture(studio):
    with pytest.raises(Invalid, match="no picture"): studio.compare(x=("steps", [1]))
    studio.value = {**studio.value, "prompt": "a fox", "seed": 3, "steps": 2}
    shot = studio.generate().wait(60)[0]
    table = studio.compare(x=("steps", [1, 2])).wait(60)
    # Its two pictures may share steps, which rounds otherwise than a picture alone: two levels of 255.
    again, alone = (np.asarray(one.image).astype(int) for one in (table.results[2, None], shot))
    assert np.abs(again - alone).max() <= 2 and studio.pictures == [shot]


def test_a_mask_from_a_cell(studio):
    """What is black in the mask stays exactly as it was."""
    studio.value = {**studio.value, "prompt": "a fox", "seed": 3, "steps": 2}
    shot = studio.generate().wait(60)[0]
    mask = Image.new("L", shot.image.size, 0)
    mask.paste(255, (0, 0, 64, 128))
    painted = studio.generate(start=shot, mask=mask).wait(60)[0]
    sides = [[image.crop(box).tobytes() for image in (shot.image, painted.image)] for box in ((0, 0, 60, 128), (72, 0, 128, 128))]
    assert sides[0][0] != sides[0][1] and sides[1][0] == sides[1][1]


def test_a_still_stands_in_for_the_widget(studio):
    """A notebook that is read without a kernel, on a web page or converted to HTML, shows what was made."""
    assert "text/html" not in studio._repr_mimebundle_()[0]
    studio.value = {**studio.value, "prompt": "a fox", "steps": 1}
    studio.generate().wait(60)
    data, _ = studio._repr_mimebundle_()
    assert data["text/html"].startswith("<img") and "application/vnd.jupyter.widget-view+json" in data
    assert "| engine |" in EngineStatus(studio.client)._repr_mimebundle_()[0]["text/markdown"]


def test_what_is_sent_stays_small(studio):
    """No trait holds a picture: traits are stored in the notebook, and sent again with each change."""
    studio.value = {**studio.value, "prompt": "a fox", "steps": 1}
    studio.generate(start=Image.effect_noise((600, 400), 90).convert("RGB")).wait(60)
    state = studio.get_state()
    assert sum(len(str(v)) for k, v in state.items() if k not in ("_esm", "_css", "styles")) < 10_000


def test_the_faults_name_their_tests():
    """13b's table of faults: each has a test on the page and one in JupyterLab, or says why not, and those tests exist."""
    text = "\n".join("".join(cell["source"]) for cell in json.loads((ROOT / "nbs/13b_widgets.ipynb").read_text(encoding="utf-8"))["cells"])
    rows = [row.split("|")[2:4] for row in text.split("## Faults that")[1].split("\n## ")[0].splitlines() if row.startswith("| ")][2:]
    assert len(rows) > 20
    for cells in rows:
        for cell, file in zip(cells, ("test_browser", "test_lab"), strict=True):
            named = re.findall(r"`(test_\w+)`", cell)
            there = (ROOT / f"tests/{file}.py").read_text(encoding="utf-8")
            assert named or len(cell) > 20, cell
            assert not [name for name in named if f"\ndef {name}(" not in there], (cell, file)


def test_make_lab_opens_the_start():
    """The first notebook of a newcomer makes a picture in its first code cell."""
    assert "jupyterlab nbs/00_start.ipynb" in (ROOT / "Makefile").read_text(encoding="utf-8")
    cells = json.loads((ROOT / "nbs/00_start.ipynb").read_text(encoding="utf-8"))["cells"]
    first = next(cell for cell in cells if cell["cell_type"] == "code")
    assert any("image/png" in out.get("data", {}) for out in first["outputs"])


def test_without_torch():
    """The widgets import without torch and without FastAPI."""
    code = "import sys; sys.modules['torch'] = sys.modules['fastapi'] = None; import aura_engine.widgets; print('fine')"
    assert subprocess.run([sys.executable, "-c", code], env=clean_env(PYTHONPATH=ROOT), capture_output=True, text=True).stdout.strip() == "fine"
