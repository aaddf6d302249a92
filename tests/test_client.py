"""The client against a real server process, and against what stands before one: proxies, sleep, full queues, sudden death."""
import asyncio, contextlib, io, json, time

import httpx
import numpy as np
import pytest
from PIL import Image

from aura_engine.client import AsyncAuraClient, AuraClient, Notice
from aura_engine.images import decode, from_base64
from aura_engine.transport import Remote, as_base64, cloud_url, engine_url, generation, proxy_for
from aura_engine.types import Asleep, Done, GenerateRequest, Invalid, NotReady, Preview, QueueFull, Queued, Step, Unauthorized, Unreachable
from aura_engine.types import Image as Finished
from conftest import free_port
from edge import Edge, answer, page, problem

READY = answer(200, json.dumps({"status": "ready", "ready": True, "gpu": True, "version": "0"}), x_aura_engine="0")


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch, tmp_path):
    """No engine, cloud or proxy from this machine's environment."""
    for name in ("VITE_CLOUD_ENGINE_URL", "AURA_API_KEY"): monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def client(server):
    with AuraClient(server.url, mode="local") as c: yield c


def dead(): return f"http://127.0.0.1:{free_port()}"


def pixels(im): return np.asarray(im, int)


def idle(url, seconds=20):
    end = time.monotonic() + seconds
    while httpx.get(url + "/health").json()["queue"]["length"]:
        assert time.monotonic() < end, "the engine still works for nobody"
        time.sleep(0.02)


def asked(events): return [e.engine for e in events if isinstance(e, Notice) and e.kind == "asks"]


# a healthy engine

def test_generate_refine_replay_save(client, tmp_path):
    made = client.generate("an owl", seed=3, n=2, aspect_ratio="4:3", temperature=1)
    assert made.engine == "local" and [r.seed for r in made.receipts] == [3, 4] and made.images[0].width > made.images[0].height
    first, second = made.save(tmp_path / "owl.png")
    assert (first.name, second.name) == ("owl-1.png", "owl-2.png")
    again = client.replay(second)
    assert np.abs(pixels(again.images[0]) - pixels(made.images[1])).max() <= 1 and again.warnings == ()
    for picture in (made.images[0], first, first.read_bytes(), str(first)):
        refined = client.refine("a fox", picture, strength=0.6, seed=1, steps=2)
        assert refined.receipts[0].strength == 0.6 and refined.receipts[0].init_sha256
    assert [made["prompt"] for made in client.aio.last] == ["an owl", "an owl"] + ["a fox"] * 4


def test_a_stream_has_all_events_in_order(client):
    events = list(client.stream("an owl", steps=3, seed=1))
    assert [type(e) for e in events] == [Notice, Queued, *[Step, Preview] * 3, Finished, Done]
    preview = next(e for e in events if isinstance(e, Preview)).image
    assert preview.dtype == np.uint8 and preview.ndim == 3
    assert client.aio.last[-1]["engine"] == "local"
    with pytest.raises(TypeError, match="options"): client.stream(generation("an owl"), steps=3)


def test_text_that_ends_lines_elsewhere_does_not_end_events_here(client):
    prompt = "an owl\u2028with\x85a hat"
    assert client.generate(prompt, steps=1).receipts[0].prompt == prompt


def test_sync_and_async_are_the_same(client, server):
    async def three():
        async with AsyncAuraClient(server.url, mode="local") as c: return await asyncio.gather(*(c.generate("a fox", seed=s) for s in range(3)))
    made = asyncio.run(three())
    for s in range(3): assert np.abs(pixels(made[s].images[0]) - pixels(client.generate("a fox", seed=s).images[0])).max() <= 1


def test_works_where_a_loop_is_running(client):
    async def cell(): return client.generate("a fox", steps=1)
    assert len(asyncio.run(cell()).images) == 1


def test_a_proxy_in_the_environment_is_not_for_this_machine(monkeypatch, server):
    monkeypatch.setenv("HTTP_PROXY", dead())
    with AuraClient(server.url, mode="local") as c: assert c.health()["local"].ready


@pytest.mark.parametrize("options, word", [({"n": 9}, "n: given 9"), ({"aspect_ratio": "9:1"}, "aspectRatio: given '9:1'"), ({"temperature": 9}, "temperature: given 9"), ({"seed": 2**60}, "seed")])
def test_wrong_values_are_refused_in_the_servers_words(client, options, word):
    with pytest.raises(Invalid, match=word) as e: client.generate("x", **options)
    assert e.value.errors
    with pytest.raises(TypeError, match="colour"): client.generate("x", colour="red")      # a slip of the caller's, as anywhere in Python


def test_leaving_a_stream_cancels(client, server):
    for e in client.stream("an owl", steps=50, n=4):
        if isinstance(e, Step): break
    start = time.monotonic()
    idle(server.url)
    assert time.monotonic() - start < 3


def test_cancelling_a_task_cancels(server):
    async def go():
        async with AsyncAuraClient(server.url, mode="local") as c:
            begun = asyncio.Event()
            task = asyncio.create_task(c.generate("an owl", steps=50, n=4, on_event=lambda e: isinstance(e, Step) and begun.set()))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError): await task
    asyncio.run(go())
    idle(server.url)


def test_an_older_backend_that_only_knows_the_guide(server):
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(out, "PNG")
    import base64
    with Edge(answer(200, json.dumps({"images": [base64.b64encode(out.getvalue()).decode()]}))) as old, AuraClient(old.url, mode="local") as c:
        made = c.generate("teal")
        assert made.images[0].getpixel((0, 0)) == (0, 128, 128) and made.receipts == [None]
        assert json.loads(old.requests[0][2]) == {"prompt": "teal", "aspectRatio": "1:1", "temperature": 0.7, "resolution": "standard"}


# which engine

def test_high_goes_only_to_a_gpu(client):
    made = client.generate("a fox", resolution="high", steps=1)
    assert any("no GPU" in w for w in made.warnings)
    with Edge(READY, problem(422, "invalid", "enough seen")) as gpu, AuraClient(gpu.url, mode="local") as c:
        with pytest.raises(Invalid): c.generate("a fox", resolution="high")
        assert json.loads(gpu.requests[1][2])["resolution"] == "high"


def test_auto_falls_back_remembers_and_probes_again(server):
    port, events = free_port(), []
    with AuraClient(f"http://127.0.0.1:{port}", server.url, rest=600) as c:
        assert c.generate("a fox", steps=1, on_event=events.append).engine == "cloud" and asked(events) == ["local", "cloud"]
        events.clear()
        assert c.generate("a fox", steps=1, on_event=events.append).engine == "cloud" and asked(events) == ["cloud"]       # remembered
        c.aio.doors[0].rests_until = 0                                                                                    # it has rested
        with Edge(target=server.url, port=port) as local:
            assert c.generate("a fox", steps=1).engine == "local"
            assert local.requests[0][0].startswith("GET /health")                                                            # probed first


def test_auto_goes_on_when_the_local_engine_dies_in_the_middle(make_server, server):
    local, events = make_server(wait=False), []            # it is still loading: the client waits for it
    def kill(e):
        events.append(e)
        if isinstance(e, Step) and local.process.poll() is None: local.process.kill(); local.process.wait()
    with AuraClient(local.url, mode="local") as c:
        end = time.monotonic() + 60
        while c.health()["local"].status == "unreachable": assert time.monotonic() < end; time.sleep(0.1)
        assert c.generate("a fox", steps=1).engine == "local"
    with AuraClient(local.url, server.url) as c: made = c.generate("a fox", steps=20, seed=5, on_event=kill)
    assert made.engine == "cloud" and asked(events) == ["local", "cloud"] and made.receipts[0].seed == 5
    failed = next(e for e in events if isinstance(e, Notice) and e.kind == "failed")
    assert any(isinstance(e, Step) for e in events[:events.index(failed)])


def test_a_cut_stream_is_not_an_answer(server):
    with Edge(target=server.url, cut=2000) as cut, AuraClient(cut.url, server.url) as c:
        made = c.generate("a fox", n=2, seed=1)
        assert made.engine == "cloud" and [r.seed for r in made.receipts] == [1, 2]
    with Edge(target=server.url, cut=2000) as cut, AuraClient(cut.url, mode="local") as c, pytest.raises(Unreachable): c.generate("a fox")


def test_the_questions_own_fault_is_not_taken_elsewhere(server):
    for raw, error in ((problem(422, "invalid", "wrong"), Invalid), (problem(401, "unauthorized", "a key"), Unauthorized)):
        with Edge(raw) as local, Edge(target=server.url) as cloud, AuraClient(local.url, cloud.url, api_key="sésame") as c:
            with pytest.raises(error): c.generate("a fox")
            assert cloud.requests == [] and local.requests[0][1]["authorization"].encode("latin-1").decode() == "Bearer sésame"


def test_both_down_says_what_to_do():
    with AuraClient(dead(), dead()) as c, pytest.raises(Unreachable) as e: c.generate("a fox")
    assert "aura serve" in str(e.value) and "VITE_CLOUD_ENGINE_URL" in str(e.value)
    with pytest.raises(Unreachable, match="VITE_CLOUD_ENGINE_URL"): AuraClient(mode="cloud")
    with pytest.raises(Invalid, match="auto, local, cloud"): AuraClient(mode="both")


# what stands before a Space

@pytest.mark.parametrize("raw, error, said", [
    (page(503, "<h1>Preparing Space</h1>"), Asleep, "asleep or starting"), (page(502, "Bad Gateway"), Asleep, "starting"), (page(504), Asleep, "starting"),
    (page(200, "<h1>Your Space is building</h1>"), Asleep, "starting"), (page(503, "<style>b{animation-play-state:paused}</style>Restarting"), Asleep, "starting"),
    (page(503, "This Space has been <b>paused</b> by its owner"), Unreachable, "restart it"), (page(503, "Build error"), Unreachable, "log"),
    (page(404, "Sorry, we can't find the page"), Unreachable, "address right"), (page(401, "Log in"), Unreachable, "public"), (page(200, "My blog"), Unreachable, "something else"),
    (answer(404, '{"detail": "Not Found"}'), Unreachable, "address right"), (answer(405, '{"detail": "Method Not Allowed"}'), Unreachable, "something else"),
    (page(307, "", location="https://example.com/"), Unreachable, "something else"), (answer(200, "{}"), Unreachable, "something else"), (answer(200, "oops", "application/json"), Unreachable, "something else"),
])
def test_a_proxys_page_is_told_from_the_engine(raw, error, said):
    with Edge(raw) as space, AuraClient(mode="cloud", cloud=space.url, patience=0) as c, pytest.raises(error, match=said): c.generate("a fox")


def test_a_sleeping_space_wakes(server):
    events = []
    with Edge(page(503, "sleeping"), page(503, "Preparing Space"), page(502, "starting"), target=server.url) as space, AuraClient(mode="cloud", cloud=space.url) as c:
        assert c.generate("a fox", steps=1, on_event=events.append).engine == "cloud"
        assert [r[0].split()[1] for r in space.requests] == ["/generate", "/health", "/health", "/health"]      # woken with small questions; then one connection is kept
    assert any(isinstance(e, Notice) and e.kind == "waits" and "cloud" in e.text for e in events)


def test_a_full_queue_is_waited_for_as_long_as_it_says(server):
    full = problem(429, "queue_full", "40 pictures are waiting.", retry_after=1)
    with Edge(full, target=server.url) as busy, AuraClient(busy.url, mode="local") as c:
        start = time.monotonic()
        assert c.generate("a fox", steps=1).engine == "local" and time.monotonic() - start >= 1
    with Edge(full) as busy, AuraClient(busy.url, mode="local", patience=0.5) as c, pytest.raises(QueueFull, match="40 pictures"): c.generate("a fox")
    with Edge(full) as busy, AuraClient(busy.url, server.url) as c: assert c.generate("a fox", steps=1).engine == "cloud"


def test_an_engine_that_will_never_be_ready_is_not_waited_for():
    failed = answer(200, json.dumps({"status": "failed", "ready": False, "reason": "no such model"}), x_aura_engine="0")
    with Edge(problem(503, "not_ready", "no such model", retry_after=60), failed) as broken, AuraClient(broken.url, mode="local") as c:
        with pytest.raises(NotReady, match="no such model"): c.generate("a fox")


def test_health_and_advice(server):
    with AuraClient(dead(), server.url) as c:
        said = c.health()
        assert said["cloud"].ready and said["cloud"].advice == [] and said["local"].status == "unreachable" and "aura serve" in said["local"].advice[0]
        cloud = c.aio.doors[1]
        assert c.wait(cloud.allows("http://localhost:5173")) and not c.wait(cloud.allows("https://evil.example"))
    with Edge(page(503, "sleeping")) as space, AuraClient(mode="cloud", cloud=space.url) as c: assert c.health()["cloud"].status == "asleep"


def test_the_clouds_address(monkeypatch, tmp_path):
    assert cloud_url() is None
    (tmp_path / ".env.local").write_text('VITE_CLOUD_ENGINE_URL="https://me-engine.hf.space"\n')
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    assert cloud_url() == "https://me-engine.hf.space"
    monkeypatch.setenv("VITE_CLOUD_ENGINE_URL", "https://other.hf.space/")
    assert AuraClient(mode="cloud").aio.doors[0].url == "https://other.hf.space"
    assert engine_url("https://huggingface.co/spaces/Me/Aura.Engine") == "https://me-aura-engine.hf.space"
    for bad in ("me/engine", "ftp://x", "http://", "", "http://127.0.0.1:99999", "127.0.0.1:65536"):
        with pytest.raises(Invalid): engine_url(bad)


# homes with proxies, and settings with slips

@pytest.mark.parametrize("env", [{"ALL_PROXY": "socks5://10.0.0.1:1080"}, {"ALL_PROXY": "nonsense://x"}, {"all_proxy": "http://["}, {"NO_PROXY": "[::1],10.0.0.0/8, ,*.local"},
                                 {"HTTP_PROXY": "", "NO_PROXY": "[::1]:80"}, {"SSL_CERT_FILE": "/nowhere/ca.pem"}, {"VITE_CLOUD_ENGINE_URL": "me/engine"}, {"VITE_CLOUD_ENGINE_URL": "ftp://x"}])
def test_the_homes_settings_never_break_a_local_engine(monkeypatch, server, env):
    for name, value in env.items(): monkeypatch.setenv(name, value)
    for mode in ("auto", "local"):
        with AuraClient(server.url, mode=mode, rest=0) as c: assert c.generate("a fox", steps=1).engine == "local"


def test_what_is_in_the_way_of_the_cloud_is_named(monkeypatch, tmp_path):
    for env, said in (({"ALL_PROXY": "socks5://10.0.0.1:1080"}, "ALL_PROXY"), ({"HTTPS_PROXY": "nonsense://x"}, "HTTPS_PROXY"), ({"SSL_CERT_FILE": "/nowhere/ca.pem"}, "SSL_CERT_FILE")):
        with monkeypatch.context() as m:
            for name, value in env.items(): m.setenv(name, value)
            with AuraClient(mode="cloud", cloud="https://me-engine.hf.space", patience=0) as c, pytest.raises(Unreachable, match=said): c.generate("a fox")
    monkeypatch.setenv("VITE_CLOUD_ENGINE_URL", "me/engine")
    with pytest.raises(Invalid, match="VITE_CLOUD_ENGINE_URL: given 'me/engine'"): AuraClient(mode="cloud")
    with AuraClient(dead(), patience=0) as c, pytest.raises(Unreachable, match="VITE_CLOUD_ENGINE_URL: given 'me/engine'"): c.generate("a fox")
    monkeypatch.delenv("VITE_CLOUD_ENGINE_URL")
    (tmp_path / ".env.local").write_bytes(b"VITE_CLOUD_ENGINE_URL=\xff\xfe\n")
    with pytest.raises(Invalid, match=r"\.env\.local cannot be read"): AuraClient(mode="cloud")


@pytest.mark.parametrize("address, direct", [("http://127.0.0.1:7860", True), ("http://[::1]:7860", True), ("http://192.168.1.5:7860", True), ("http://aura.local", True), ("http://box:7860", True),
                                             ("https://a.example.org", True), ("https://example.org", True), ("https://notexample.org", False), ("http://203.0.113.9", True), ("http://203.0.114.9", False), ("http://[2001:db8::5]", True),
                                             ("https://b.test:8443", True), ("https://b.test", False), ("https://me-engine.hf.space", False)])
def test_who_is_asked_through_a_proxy(monkeypatch, address, direct):
    monkeypatch.setenv("ALL_PROXY", "10.0.0.1:3128")
    monkeypatch.setenv("NO_PROXY", " .Example.org, 203.0.113.0/24,[2001:db8::]/32 ,2001:db8::/32,b.test:8443")
    found = proxy_for(address)
    assert (found is None) is direct and (direct or (found.url, found.variable) == ("http://10.0.0.1:3128", "ALL_PROXY"))


@pytest.mark.parametrize("written, meant", [("127.0.0.1:7860", "http://127.0.0.1:7860"), ("localhost", "http://localhost"), (":7860", "http://127.0.0.1:7860"), ("[::1]:7860/", "http://[::1]:7860"),
                                            ("me-engine.hf.space/", "https://me-engine.hf.space"), ("box:7860", "http://box:7860"), ("192.168.1.5:7860", "http://192.168.1.5:7860"), (" https://x.org/aura/ ", "https://x.org/aura")])
def test_addresses_as_people_write_them(written, meant): assert engine_url(written) == meant


# the same picture, however it is handed over

def test_a_pil_picture_is_seen_as_its_file_is():
    """Alpha goes over white, 16 bits stay, EXIF turns: what the engine decodes is the same for both."""
    gray16 = Image.fromarray((np.arange(80 * 96).reshape(80, 96) * 8).astype(np.uint16))
    turned = Image.new("RGB", (96, 64), "red")
    turned.getexif()[0x0112] = 6
    keyed = Image.new("P", (80, 80), 3)
    keyed.putpalette(bytes(range(256)) * 3)
    keyed.info["transparency"] = 3
    for im in (Image.new("RGBA", (80, 80), (255, 0, 0, 0)), Image.new("LA", (80, 80), (9, 100)), gray16, turned, keyed, Image.new("CMYK", (80, 80), (0, 255, 255, 0)), Image.new("1", (80, 80), 1), Image.new("F", (80, 80), 200.0)):
        seen = decode(from_base64(as_base64(im)))
        assert seen.mode == "RGB"
        if im.mode in ("RGBA", "P"): assert seen.getpixel((0, 0)) == (255, 255, 255)
        if im is gray16: assert np.asarray(seen)[..., 0].std() > 30
        if im is turned: assert seen.size == (64, 96)
        if im.mode == "CMYK": assert seen.getpixel((0, 0))[0] > 200 and seen.getpixel((0, 0))[1] < 60


def test_another_engine_makes_the_same_pictures_when_the_first_is_cut(server):
    """`queued` carries the seeds that the engine chose."""
    events = []
    with Edge(target=server.url, cut=2500) as cut, AuraClient(cut.url, server.url) as c: made = c.generate("a fox", n=2, temperature=1, on_event=events.append)
    chosen = next(e for e in events if isinstance(e, Queued)).seeds
    if not chosen: pytest.skip("this engine names no seeds in `queued`")
    assert made.engine == "cloud" and tuple(r.seed for r in made.receipts) == chosen


@pytest.mark.parametrize("said", ["event: step\ndata: {\"index\": 0", "event: image\ndata: {\"index\": 0, \"image\": \"AAAA\", \"receipt\": {}}", "event: done\ndata: []", "event: queued\ndata: {}", "\x00\x01"])
def test_a_stream_that_cannot_be_read_is_not_an_answer(said):
    raw = answer(200, said + "\n\n", "text/event-stream", x_aura_engine="0")
    with Edge(raw) as odd, AuraClient(odd.url, mode="local", patience=0) as c, pytest.raises(Unreachable): c.generate("a fox")


@pytest.mark.parametrize("body", ["[]", "7", '{"status": "ready", "queue": 3}', '{"status": []}', '{"status": "ready", "limits": "x", "loras": 7}'])
def test_a_health_that_cannot_be_read_is_a_report(body):
    with Edge(answer(200, body)) as odd, AuraClient(odd.url, mode="local") as c:
        report = c.health()["local"]
        assert not report.ready and report.status == "unreachable" and report.advice and json.dumps(report.to_json())


def test_what_is_no_picture_and_a_client_that_is_closed_are_told():
    client = AuraClient("127.0.0.1:9", mode="local")
    with pytest.raises(Invalid, match="given 'int', allowed: a PIL picture"): client.refine("a fox", 3)
    with pytest.raises(Invalid, match="images: given .., allowed: at least 1"): client.refine("a fox", [])
    client.close()
    with pytest.raises(RuntimeError, match="closed. Make another"): client.health()


@pytest.mark.parametrize("error", [
    OverflowError("port must be 0-65535"), UnicodeError("label too long"),
    ExceptionGroup("unhandled errors in a TaskGroup", [ExceptionGroup("", [OSError("port must be 0-65535")])])])
def test_whatever_breaks_a_connection_is_said_in_words(error):
    """Errors that are none of httpx, and a group of them, as the tasks that open a connection raise it."""
    class Down:
        async def get(self, *given, **more): raise error
        @contextlib.asynccontextmanager
        async def stream(self, *given, **more):
            raise error
            yield

    remote = Remote("local", "http://127.0.0.1:9")
    remote._http = Down()
    with pytest.raises(Unreachable, match="The local engine at http://127.0.0.1:9 cannot be reached: (port|label)"): asyncio.run(remote.health())
    with pytest.raises(Unreachable, match="cannot be reached: (port|label)"): asyncio.run(anext(remote.events(GenerateRequest(prompt="x"))))


@pytest.mark.parametrize("mode, told, not_told", [("local", "local=", "VITE_CLOUD"), ("cloud", "VITE_CLOUD", "local="), ("auto", "local=", "auto engine")])
def test_a_client_without_engines_says_what_to_set_for_its_mode(mode, told, not_told):
    with pytest.raises(Unreachable) as wrong: AuraClient(local=None, mode=mode)
    assert told in wrong.value.detail and not_told not in wrong.value.detail
