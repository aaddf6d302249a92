"""The widgets without a browser or a kernel: the same on an engine of this process and over HTTP."""
import threading, time

import numpy as np
import pytest
from PIL import Image

from aura_engine.client import AuraClient, Pictures
from aura_engine.types import AuraError, Invalid
from aura_engine.widgets import Compare, EngineStatus, Gallery, Studio, tile
from conftest import free_port
from edge import Edge, page, problem


@pytest.fixture(scope="module")
def engine():
    from aura_engine.config import load_settings
    from aura_engine.engine import Engine
    with Engine(load_settings(SD_MODEL_ID="embedded", SD_DEVICE="cpu")).start() as engine: yield engine


@pytest.fixture(params=["in process", "over HTTP"])
def source(request): return request.getfixturevalue("engine") if request.param == "in process" else request.getfixturevalue("server").url


@pytest.fixture
def studio(source, tmp_path):
    studio = Studio(source, folder=tmp_path)
    yield studio
    studio.client.close()


def fill(studio, **values):
    for name, value in values.items(): studio.inputs[name].value = value


def press(studio, name): studio.buttons[name].click()


def states(studio): return {name: not button.disabled for name, button in studio.buttons.items()}


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition(): assert time.monotonic() < end; time.sleep(0.01)


def test_generate_refine_save(studio, tmp_path):
    assert states(studio) == {"Generate": True, "Refine": False, "Cancel": False, "Save": False}
    stage = []
    studio.stage.observe(lambda c: stage.append(c["new"]), "tiles")
    fill(studio, prompt="a red apple", count=2, seed="7", aspect="4:3", temperature=1.0)
    begun = time.monotonic()
    press(studio, "Generate")
    assert time.monotonic() - begun < 0.3                        # the kernel is free
    studio.wait(120)
    assert len(stage) >= 2 * 4 + 2                               # a preview a step, then the pictures
    assert [m.receipt.seed for m in studio.made] in ([7, 8], [8, 7]) and studio.made[0].image.width > studio.made[0].image.height
    assert studio.bar.value == 1 and "done in" in studio.line.value and all(states(studio)[b] for b in ("Generate", "Refine", "Save"))
    studio.history.chosen = 1
    started_from = studio.chosen
    assert "a red apple" in studio.facts.value and studio.chosen is studio.made[1]
    fill(studio, prompt="a green apple", strength=0.3)
    press(studio, "Refine")
    studio.wait(120)
    assert studio.made[0].receipt.strength == 0.3 and len(studio.history.tiles) == 3
    assert studio.chosen is started_from                         # the choice stays with its picture
    press(studio, "Save")
    file, = tmp_path.glob("*.png")
    again = studio.client.replay(file).images[0]
    assert file.name in studio.line.value and np.abs(np.asarray(again, int) - np.asarray(Image.open(file), int)).max() <= 1


def test_cancel(studio):
    fill(studio, prompt="an owl", count=4)
    for _ in range(2):                                           # at once, and in the middle
        press(studio, "Generate")
        assert states(studio)["Cancel"] and not states(studio)["Generate"]
        press(studio, "Cancel")
        studio.wait(20)
        assert "Cancelled." in studio.line.value and states(studio)["Generate"] and not states(studio)["Cancel"]
    until(lambda: studio.client.health()["local"].health.queue.length == 0, 5)


def test_errors_are_said_and_work_goes_on(studio):
    fill(studio, prompt="", seed="seven")
    press(studio, "Generate")
    assert "seed" in studio.line.value and "#d32f2f" in studio.line.value
    fill(studio, seed="")
    press(studio, "Generate")
    assert "prompt" in studio.line.value
    fill(studio, prompt="<b>bold</b>")
    press(studio, "Generate")
    studio.wait(60)
    studio.history.chosen = 0
    assert "&lt;b&gt;" in studio.facts.value                     # text of a receipt is text


def test_nobody_there():
    with AuraClient(f"http://127.0.0.1:{free_port()}", mode="local") as client:
        studio = Studio(client)
        fill(studio, prompt="a fox")
        press(studio, "Generate")
        studio.wait(20)
        assert "aura serve" in studio.line.value and states(studio)["Generate"]


def test_offline_needs_no_server(monkeypatch, tmp_path):
    monkeypatch.setenv("SD_MODEL_ID", "embedded")
    studio = Studio("offline", folder=tmp_path)
    fill(studio, prompt="a fox")
    press(studio, "Generate")
    studio.wait(300)
    assert studio.made[0].engine == "local" and studio.client.aio.doors[0].url == "this process"
    studio.client.aio.doors[0].engine.close()
    studio.client.close()


def test_updates_do_not_come_from_the_main_thread(studio):
    threads = set()
    studio.line.observe(lambda c: threads.add(threading.current_thread().name), "value")
    fill(studio, prompt="a fox")
    press(studio, "Generate")
    studio.wait(60)
    assert threads == {"aura-client"}


def test_status_follows_an_engine_that_goes_and_comes_back(server):
    port = free_port()
    with AuraClient(f"http://127.0.0.1:{port}", server.url) as client:
        status = EngineStatus(client, every=0.1, origin="https://my.site")
        until(lambda: "unreachable" in status.panel.value)
        assert "aura serve" in status.panel.value and "ALLOW_ORIGINS" in status.panel.value and "LCMScheduler" in status.panel.value
        with Edge(target=server.url, port=port): until(lambda: "unreachable" not in status.panel.value)
        until(lambda: "unreachable" in status.panel.value)
        client.generate("a fox", steps=1)
        until(lambda: "last pictures: a fox (cloud" in status.panel.value)
        status.stop()


def test_status_of_a_healthy_engine(source):
    with AuraClient(source, mode="local") as client:
        client.generate("a fox", steps=1)
        status = EngineStatus(client, every=60)
        said = client.wait(status.look())["local"]
        for word in ("ready", "cpu", "embedded", "LCMScheduler", "optimizations", "0 pictures", "GiB", "last pictures: a fox", "mode local: the local engine is asked first"): assert word in status.panel.value, word
        assert 50 * 2**20 < said["memory"]["rss"] < 50 * 2**30 and said["memory"]["gpu"] is None and said["advice"] == []
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
        assert advice in status.panel.value, status.panel.value
        status.stop()


def test_compare(source):
    with AuraClient(source, mode="local") as client:
        grid = Compare(client, "a fox", x=("steps", [1, 2]), y=("scheduler", ["lcm", "ddim"])).wait(120)
        assert set(grid.results) == {(1, "lcm"), (2, "lcm"), (1, "ddim"), (2, "ddim")} and all(isinstance(r, Pictures) for r in grid.results.values())
        assert len({r.images[0].tobytes() for r in grid.results.values()}) > 2 and [t["label"] for t in grid.gallery.tiles][1] == "steps 2 · lcm"
        receipts = [r.receipts[0] for r in grid.results.values()]
        assert len({(r.seed, r.temperature, r.prompt) for r in receipts}) == 1
        assert grid.grid().image.width > 200
        refused = Compare(client, "a fox", x=("steps", [1, 900]), y=("guidance_scale", [1.0])).wait(60)
        assert isinstance(refused.results[900, 1.0], AuraError) and isinstance(refused.results[1, 1.0], Pictures) and "900" in refused.gallery.tiles[1]["label"]
        with pytest.raises(Invalid, match="colour"): Compare(client, "a fox", x=("colour", ["red"]), y=("steps", [1]))


def test_gallery_tiles_are_small():
    gallery = Gallery(tiles=[tile(Image.effect_noise((2000, 1000), 90).convert("RGB"), "noise")])
    assert len(gallery.tiles[0]["src"]) < 400_000
