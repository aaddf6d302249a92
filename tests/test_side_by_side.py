"""Several models in one process: what a request names, what is loaded and unloaded, and what happens meanwhile."""
import asyncio, gc, io, json, weakref
from base64 import b64decode
from types import SimpleNamespace

import pytest
from PIL import Image as Pillow
from starlette.testclient import TestClient

import tiny
from aura_engine.config import load_settings
from aura_engine.engine import Engine
from aura_engine.server import create_server
from aura_engine.side_by_side import Debts, Known, KnownFile, LoadsFull, Models, check_wait
from aura_engine.types import EngineState, Health, Invalid, NotReady, Picture, Plan, QueueFull, ShuttingDown

APPLE = Plan((Picture("a red apple", 128, 128, steps=2, guidance_scale=1.0, seed=7),))
LONG = Plan(tuple(Picture("a red apple", 128, 128, steps=40, guidance_scale=1.0, seed=seed) for seed in range(6)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tiny.save(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of its own: what is known of models is part of what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def settings(folder, memory="0.03", **more):
    env = {"SD_MODEL_ID": "embedded", "SD_MODELS": f"noise={folder}, broken={folder / 'nowhere'}", "SD_BACKEND": "torch", "SD_PRECISION": "fp32"}
    return load_settings(**env | ({"AURA_MODELS_MEMORY": memory} if memory else {}) | more)


@pytest.fixture(scope="module")
def web(cache, folder):
    """A server with the embedded model, a tiny one and one that cannot be loaded. Only one fits into memory."""
    app, models = create_server(settings(folder, "0.02"))
    models.start()
    assert models.wait_ready(120)
    with TestClient(app, client=("127.0.0.1", 5000)) as client: yield client
    models.close()


def told(web): return {m["name"]: m for m in web.get("/health").json()["models"]}


def ask(web, **body): return web.post("/generate", json={"prompt": "an owl", "steps": 1, "seed": 3} | body)


def pixels(text): return Pillow.open(io.BytesIO(b64decode(text))).tobytes()


def drawn_by(answer):
    assert answer.status_code == 200, answer.text
    return "embedded" if answer.json()["receipts"][0]["model"] == "embedded" else "noise"


def test_requests_name_a_model_and_the_least_used_one_is_unloaded(web):
    assert drawn_by(ask(web)) == "embedded" and told(web)["noise"]["status"] == "unloaded"
    assert drawn_by(ask(web, model="noise")) == "noise"
    now = told(web)
    assert now["noise"]["status"] == "ready" and now["noise"]["bytes"] > 100_000 and now["noise"]["loadSeconds"] > 0
    assert now["embedded"]["status"] == "unloaded" and now["embedded"]["loadSeconds"] > 0
    health = Health.from_json(web.get("/health").json())
    assert health.ready and health.model == "embedded" and web.get("/ready").status_code == 200       # the default is back when it is asked for
    assert {m.name: m.status for m in health.models} == {"embedded": "unloaded", "noise": "ready", "broken": "unloaded"}
    assert drawn_by(ask(web)) == "embedded" and told(web)["noise"]["status"] == "unloaded"


def test_every_door_takes_the_name(web, folder, monkeypatch):
    monkeypatch.setattr(web.app.state.api.models.seats, "budget", 2**30)         # both fit, so none has to be loaded again
    picture = ask(web, model="noise").json()["images"][0]
    refined = web.post("/refine", json={"refinePrompt": "a fox", "images": [picture], "config": {"model": "noise", "steps": 1}})
    assert drawn_by(refined) == "noise"
    again = web.post("/replay", json={"image": picture})              # the receipt in the picture names its model
    assert drawn_by(again) == "noise" and pixels(again.json()["images"][0]) == pixels(picture)
    job = web.post("/jobs", json={"route": "generate", "request": {"prompt": "an owl", "steps": 1, "model": "noise"}})
    assert job.status_code == 202
    listed = web.get("/v1/models").json()["data"]
    assert [m["id"] for m in listed] == ["embedded", "noise", "broken"]
    theirs = {"prompt": "an owl", "num_inference_steps": 1, "model": "noise"}
    assert drawn_by(web.post("/v1/images/generations", json=theirs)) == "noise"
    assert drawn_by(web.post("/v1/images/generations", json=theirs | {"model": "gpt-image-1"})) == "embedded"
    assert [m["title"] for m in web.get("/sdapi/v1/sd-models").json()] == ["embedded", "noise", "broken"]
    one = {"prompt": "an owl", "steps": 1, "override_settings": {"sd_model_checkpoint": "noise"}}
    def a1111(body): return json.loads(web.post("/sdapi/v1/txt2img", json=body).json()["info"])["sd_model_name"] == str(folder)
    assert a1111(one) and not a1111({"prompt": "an owl", "steps": 1})
    assert web.post("/sdapi/v1/options", json={"sd_model_checkpoint": "noise"}).status_code == 200
    assert web.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "noise" and a1111({"prompt": "an owl", "steps": 1})
    assert web.post("/sdapi/v1/options", json={"sd_model_checkpoint": "embedded"}).status_code == 200
    png = web.post("/models/noise", json={"inputs": "an owl", "parameters": {"num_inference_steps": 1}})
    assert png.headers["content-type"] == "image/png" and told(web)["noise"]["status"] == "ready"


def test_a_stranger_who_asks_for_models_in_turn_waits_and_nobody_else(web):
    """Only one model fits. A stranger pushes the neighbour's model out once, and then has to wait."""
    models, stranger = web.app.state.api.models, TestClient(web.app, client=("198.51.100.7", 5000))
    models.debts = Debts()
    models.unload_idle(models.seats.default)                                               # a test before had room for two
    for name in ("noise", "embedded"): assert ask(web, model=name).status_code == 200      # how long they take is known
    models.debts = Debts()
    models.debts.clock = lambda: 0.0                                                       # nothing is paid back meanwhile
    assert drawn_by(ask(web)) == "embedded"
    made, make = [], models.make
    models.make = lambda settings: made.append(settings.model_id) or make(settings)
    try:
        for turn in range(4):
            first = ask(stranger, model="noise")
            assert ask(stranger).status_code == 200                                        # of the model that is there
            assert drawn_by(ask(web)) == "embedded"
            if turn: assert first.status_code == 429 and int(first.headers["retry-after"]) >= 1 and "embedded" in first.json()["detail"]
    finally: models.make = make
    assert len(made) <= 2, made
    models.debts.clock = lambda: 1000.0
    assert drawn_by(ask(stranger, model="noise")) == "noise"                               # all is paid back
    models.debts = Debts()


class Clock:
    """Time that passes when it is told to."""
    def __init__(self): self.now = 0.0
    def monotonic(self): return self.now
    def sleep(self, seconds): self.now += seconds


class Desk:
    """The claims of three models that load in `seconds` of a clock. `day` is loaded, and room is for one."""
    def __init__(self, clock, file, seconds=3.0, budget=100):
        self.clock, self.seconds = clock, seconds
        self.models = Models(load_settings(SD_MODELS="day=owner/day, night=owner/night, noon=owner/noon"), self.make, budget, KnownFile(file))
        for seat in self.models.seats.by_name.values(): seat.known = Known(100, seconds)
        self.load()

    def make(self, settings):
        engine = SimpleNamespace(status=EngineState.ready, ready=True, queue=SimpleNamespace(tasks=[]), turns=None, row=None, gpu=False, reason="", weights=100)
        engine.health, engine.close, engine.wait_ready = lambda: None, lambda: None, lambda: True
        engine.start = lambda: self.clock.sleep(self.seconds) or engine
        return engine

    def load(self):
        """What the loading thread does until nobody waits."""
        while wished := self.models.seats.wished:
            if self.models.make_room(wished[0]): self.models._load(wished[0])

    def ask(self, name, client):
        with self.models.claim(name, client=client) as claim:
            self.load()
            assert self.models.grant(claim)

    def refused(self, name, client):
        with pytest.raises(LoadsFull) as full: self.models.claim(name, client=client).__enter__()
        return full.value

    def debt(self, client): return self.models.debts.seconds_in_debt(client)


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr("aura_engine.side_by_side.time", made)
    return made


@pytest.fixture
def desk(clock, tmp_path): return Desk(clock, tmp_path / "models.json")


def test_a_model_counts_as_used_for_two_minutes_and_the_refusal_says_so(clock, tmp_path):
    desk = Desk(clock, tmp_path / "models.json", seconds=30.0)
    desk.ask("day", "neighbour")
    desk.ask("night", "stranger")
    desk.ask("day", "neighbour")                                      # asked at 60, there at 90
    clock.now = 100.0
    full = desk.refused("night", "stranger")
    assert desk.debt("stranger") == 230 and full.retry_after == 80    # two minutes after the neighbour asked
    assert "place of day" in full.detail and "in 80 seconds" in full.detail and "Loaded now: day." in full.detail
    clock.now = 179.9
    desk.refused("night", "stranger")
    clock.now = 180.1                                                 # nobody has asked for anything meanwhile
    desk.ask("night", "stranger")


def test_a_refusal_says_when_the_debt_is_over(desk, clock):
    desk.ask("day", "neighbour")
    desk.ask("night", "stranger")
    desk.ask("day", "neighbour")
    wait = desk.refused("night", "stranger").retry_after
    assert 20 < wait < 30
    clock.sleep(wait - .1)
    desk.refused("night", "stranger")
    clock.sleep(.2)
    desk.ask("night", "stranger")


def test_only_what_another_client_pushed_out_comes_back_free(desk, clock):
    desk.ask("day", "one")
    desk.ask("night", "one")
    clock.sleep(40)
    assert desk.debt("one") == 0
    desk.ask("day", "one")                                            # it pushed that out itself
    assert desk.debt("one") == pytest.approx(27)                      # 30, of which the loading took 3
    clock.sleep(40)
    desk.ask("night", "two")
    desk.ask("day", "one")
    assert desk.debt("one") == 0
    clock.sleep(40)
    desk.ask("night", "two")                                          # nobody was charged for pushing that out
    assert desk.debt("two") == pytest.approx(27)


def test_a_first_loading_is_charged_when_its_time_is_known(desk):
    desk.models.seats.by_name["night"].known = None
    desk.ask("night", "stranger")
    assert desk.debt("stranger") == 30
    desk.seconds = 5.0                                                # day takes longer than the last time
    desk.ask("day", "stranger")
    assert desk.debt("stranger") == pytest.approx(30 + 50 - 5)


def test_who_is_alone_is_never_refused(desk):
    for turn in range(12): desk.ask(("night", "noon", "day")[turn % 3], "one")
    assert desk.debt("one") > 300


def test_what_was_withdrawn_or_has_failed_is_not_charged(desk, clock):
    models, night = desk.models, desk.models.seats.by_name["night"]
    with models.claim("night", client="one"): assert desk.debt("one") == 30
    assert desk.debt("one") == 0
    with models.claim("night", client="one"): models.tell_to_leave(models.seats.default, night)
    assert desk.debt("one") == 30                                     # a model was told to leave for it
    models.tell_to_leave(None, night)
    night.problem = NotReady("It is gone.")
    with models.claim("night", client="two"): assert desk.debt("two") == 0


def test_a_client_in_debt_is_measured_by_all_that_would_leave(clock, tmp_path):
    desk = Desk(clock, tmp_path / "models.json", budget=200)
    desk.ask("noon", "stranger")
    clock.sleep(1)
    desk.ask("day", "neighbour")                                      # used later, so noon would leave first
    desk.models.seats.by_name["night"].known = Known(200, 3.0)
    assert [seat.name for seat in desk.models.seats.victims(desk.models.seats.by_name["night"])] == ["noon", "day"]
    assert "place of day" in desk.refused("night", "stranger").detail


def test_a_model_that_is_leaving_does_not_come_back_free(desk):
    models, (day, night, _) = desk.models, desk.models.seats.by_name.values()
    desk.ask("day", "neighbour")
    desk.ask("night", "stranger")
    with models.claim("day", client="neighbour"):
        models.tell_to_leave(night, day)
        assert "place of day" in desk.refused("night", "stranger").detail
        desk.load()
    assert day.usable and desk.debt("neighbour") == 0


@pytest.mark.parametrize("path, body, status, loc", [
    ("/generate", {"prompt": "x", "model": "water"}, 422, "model"),
    ("/refine", {"refinePrompt": "x", "images": ["eA=="], "config": {"model": "water"}}, 422, "config.model"),
    ("/jobs", {"route": "generate", "request": {"prompt": "x", "model": "water"}}, 422, "request.model"),
    ("/v1/images/generations", {"prompt": "x", "model": "water"}, 404, None),
    ("/sdapi/v1/txt2img", {"prompt": "x", "override_settings": {"sd_model_checkpoint": "water"}}, 422, None),
    ("/sdapi/v1/options", {"sd_model_checkpoint": "water"}, 422, None),
    ("/models/water", {"inputs": "x"}, 404, None)])
def test_a_wrong_name_is_an_error_that_lists_the_names(web, path, body, status, loc):
    answer = web.post(path, json=body)
    assert answer.status_code == status and "embedded, noise, broken" in answer.text and "water" in answer.text
    if loc: assert answer.json()["errors"][0]["loc"] == loc


def test_a_model_that_cannot_be_loaded_says_why_and_others_go_on(web, folder):
    answer = ask(web, model="broken")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "60" and "broken" in answer.json()["detail"]
    assert str(folder) not in answer.text or "nowhere" in answer.text
    assert told(web)["broken"]["status"] == "failed" and told(web)["broken"]["reason"] == answer.json()["detail"]
    assert ask(web, model="broken").status_code == 503                # at once, without another try
    assert drawn_by(ask(web)) == "embedded" and web.get("/ready").status_code == 200


def events(web, **body):
    """The stream of a request as (name, data)."""
    with web.stream("POST", "/generate", json={"prompt": "an owl", "steps": 1, "seed": 3} | body, headers={"Accept": "text/event-stream"}) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line.startswith(("event: ", "data: "))]
    return [(name[7:], json.loads(data[6:])) for name, data in zip(lines[::2], lines[1::2])]


def test_a_stream_begins_before_its_model_is_loaded(web):
    assert drawn_by(ask(web)) == "embedded"
    seen = events(web, model="noise")
    assert [name for name, _ in seen] == ["queued", "queued", "step", "preview", "image", "done"]
    assert seen[0][1]["etaSeconds"] > 0 and seen[0][1]["seeds"] == [] and seen[1][1]["seeds"] == [3]
    seen = events(web, model="broken")
    assert [name for name, _ in seen] == ["queued", "failed", "done"] and seen[1][1]["problem"]["status"] == 503
    assert web.post("/generate", json={"prompt": "x", "model": "water"}, headers={"Accept": "text/event-stream"}).status_code == 422


def job_ended(web, id):
    """A job when it is over, and the names of its events."""
    with web.stream("GET", f"/jobs/{id}/events") as answer: names = [line[7:] for line in answer.iter_lines() if line.startswith("event: ")]
    return web.get(f"/jobs/{id}").json(), names


def test_a_job_is_there_before_its_model_is_loaded(web):
    assert ask(web, model="noise").status_code == 200                 # from here on it is known how long that takes
    assert drawn_by(ask(web)) == "embedded" and told(web)["noise"]["status"] == "unloaded"
    def post(**more): return web.post("/jobs", json={"route": "generate", "request": {"prompt": "an owl", "steps": 1, "seed": 3, "model": "noise"} | more})
    answer = post()
    assert answer.status_code == 202 and answer.json()["status"] == "queued" and told(web)["noise"]["status"] != "ready"
    waiting = web.get(answer.json()["statusUrl"]).json()
    assert waiting["status"] == "queued" and waiting["etaSeconds"] > 0
    made, names = job_ended(web, answer.json()["id"])
    assert names == ["queued", "queued", "step", "image", "done"] and made["status"] == "succeeded"
    assert [r["seed"] for r in made["result"]["receipts"]] == [3] and told(web)["noise"]["status"] == "ready"

    assert drawn_by(ask(web)) == "embedded"                           # "noise" has to be loaded again
    unwanted, wrong = post().json()["id"], post(steps=10_000)
    assert web.delete(f"/jobs/{unwanted}").json()["status"] == "cancelled" and web.get(f"/jobs/{unwanted}").status_code == 410
    assert wrong.status_code == 422 and wrong.json()["errors"][0]["loc"] == "request.steps"
    pictured = web.post("/jobs", json={"route": "refine", "request": {"refinePrompt": "x", "images": ["eA=="], "config": {"model": "noise"}}})
    assert pictured.status_code == 202                                # its picture is read when there is a model to say how
    failed, names = job_ended(web, pictured.json()["id"])
    assert names[-2:] == ["failed", "done"] and failed["problem"]["errors"][0]["loc"] == "request.images.0"
    assert ask(web, model="broken").status_code == 503                # whoever comes soon after is told at once
    broken = web.post("/jobs", json={"route": "generate", "request": {"prompt": "x", "model": "broken"}})
    assert broken.status_code == 503 and "broken" in broken.json()["detail"]


def test_an_engine_with_one_model_knows_its_own_name_only():
    app, _ = create_server(load_settings(SD_MODEL_ID="embedded"))
    with TestClient(app) as client:
        answer = client.post("/generate", json={"prompt": "x", "model": "noise"})
    assert answer.status_code == 422 and "SD_MODELS" in answer.json()["detail"] and answer.json()["errors"][0]["loc"] == "model"


async def until(so, seconds=60):
    async with asyncio.timeout(seconds):
        while not so(): await asyncio.sleep(.005)


async def draw(models, name, plan=APPLE):
    with models.claim(name) as claim:
        engine = await claim.wait()
        job = engine.submit(plan, client=name)
    async for _ in job: pass
    return engine.settings.model_id == "embedded"


@pytest.fixture
def models(web):
    """The models of the same server, with the embedded one loaded and room for one."""
    made = web.app.state.api.models
    made.debts = Debts()                                              # of the tests before, which came from another address
    if not made.seats.default.usable: asyncio.run(draw(made, "embedded"))
    return made


def test_two_models_in_demand_take_turns_and_nobody_starves(models):
    async def go(): return await asyncio.wait_for(asyncio.gather(*(draw(models, name) for name in ("noise", "embedded") * 8)), 120)
    assert asyncio.run(go()) == [False, True] * 8


def test_an_unloaded_model_leaves_no_weights_behind(models):
    weights = weakref.ref(models.seats.default.engine.parts.unet)
    asyncio.run(draw(models, "noise"))
    gc.collect()
    assert weights() is None


def test_who_leaves_while_a_model_is_not_yet_loaded_is_not_waited_for(models):
    async def go():
        long = asyncio.create_task(draw(models, "embedded", LONG))
        await until(lambda: models.seats.default.busy)
        waits = asyncio.create_task(draw(models, "noise"))
        await asyncio.sleep(.05)
        waits.cancel()
        assert await long
        await asyncio.sleep(.1)
        seat = models.seats.by_name["noise"]
        assert seat.engine is None and not seat.claims and models.seats.default.usable
        waits = asyncio.create_task(draw(models, "noise"))
        await until(lambda: seat.engine is not None)
        waits.cancel()                                                # while it is being loaded: it is loaded to the end
        await asyncio.gather(waits, return_exceptions=True)
        assert await draw(models, "noise") is False and not seat.claims
    asyncio.run(go())


def test_loading_is_part_of_what_is_promised(models, monkeypatch):
    async def go():
        seat, default = models.seats.by_name["noise"], models.seats.default
        monkeypatch.setattr(seat, "known", Known(default.known.bytes, 100.0))
        if seat.engine: pytest.fail("the embedded model should have taken its place")
        assert models.wait_for(seat) == 100.0
        check_wait(models.seats, seat, 600.0, None)                               # it is alone, so it may take its time
        with pytest.raises(Invalid, match="deadlineSeconds.*100.*has to be loaded"): check_wait(models.seats, seat, 20.0, 20.0)
        busy = default.engine.submit(LONG)
        assert models.wait_for(seat) > 100.0
        with pytest.raises(QueueFull) as full: check_wait(models.seats, seat, 100.0, None)
        busy.cancel()
        assert full.value.retry_after >= 1
    asyncio.run(go())


def test_both_at_once_where_both_fit_and_each_counts_the_others_work(models, monkeypatch):
    monkeypatch.setattr(models.seats, "budget", 2**30)
    async def go():
        await draw(models, "noise")
        mine, theirs = (models.seats.by_name[name].engine for name in ("embedded", "noise"))
        alone = mine.submit(APPLE)
        alone.result(60)
        with models.stile.hold("test"):                               # nobody works meanwhile
            busy, beside = theirs.submit(LONG), mine.submit(APPLE)
            assert models.health().queue.length == 7
        assert beside.log[0].eta_seconds > 1.5 * alone.log[0].eta_seconds
        assert beside.result(60) and not busy.done                    # it did not wait for all of the other's work
        busy.cancel()
    asyncio.run(go())
    assert [s.status for s in models.states()][:2] == ["ready", "ready"]


def test_what_loading_took_is_remembered(cache, folder, tmp_path):
    file = KnownFile(tmp_path / "models.json")
    file.add("embedded", Known(5, 2.5))
    first = Models(settings(folder), Engine, file=file)
    assert first.seats.default.known == Known(5, 2.5) and first.health().models[0].load_seconds == 2.5
    (tmp_path / "models.json").write_text("[1]")
    assert Models(settings(folder), Engine, file=file).seats.default.known is None


def test_who_waits_when_the_process_stops_is_told(cache, folder):
    models = Models(settings(folder), Engine).start()
    async def go():
        waits = asyncio.create_task(draw(models, "embedded"))
        await asyncio.sleep(.1)
        await asyncio.to_thread(models.drain, 1.0)
        with pytest.raises((ShuttingDown, NotReady)): await asyncio.wait_for(waits, 10)
    loading = models.seats.default.engine
    asyncio.run(go())
    assert models.status == "draining" and not models.ready
    models.thread.join(60)
    if loading: loading.thread.join(60)                               # a thread that still loads cannot be left at the end of a process
