"""What comes in at the same time: forms that give way, posts that race for a place, and what a job holds meanwhile."""
import asyncio, base64, binascii, io, json, logging, random, re, threading, time
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from PIL import Image as Pillow
from uvicorn import Config
from uvicorn.server import ServerState

from aura_engine.answers import (
    LEAST_RATE, PIECE, STILL, Api, Backlog, Backlogs, ClientEvent, Files, Metrics, NotRead, Order, OrderedJob, backlogs, begin,
    client_events, cost_of, files_of, heartbeat, json_answer, let_go, ordering, taken_parts, pictures_in, respond_with, sse_frame)
from aura_engine.config import load_settings
from aura_engine.dialects import remade_mask
from aura_engine.images import PNG_SIGNATURE, STEP, decode_cost, encode, facts_of, from_base64, to_base64
from aura_engine.intake import ESCAPES, LARGE, SMALL, Arrivals, BodiesFull, DecodeCost, FairPool, PictureLine, PicturesFull, parse_json, read_form
from aura_engine import job_routes
from aura_engine.job_routes import JobsFull, JobStore, KeptJob, watch_job
from aura_engine.jobs import Job
from aura_engine.openai import EditRequest, ImagesRequest, Shelf, json_edit, openai_json
from aura_engine.planning import ReplayRequest
from aura_engine.server import Connection, Forwarded
from aura_engine.shared_jobs import StoreUnreachable
from aura_engine.models import ROWS
from aura_engine.types import Cancelled, DeadlineExceeded, Done, GenerateRequest, Image, EngineFailed, Invalid, Malformed, Picture, Plan, RefineRequest
from aura_engine.walls import Allowances, FewLines, Guard, Origins

APPLE = Picture("a red apple", 512, 512, steps=4, guidance_scale=1.0, seed=7)
HEAD = b'--xyz\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
HEADERS = [(b"content-type", b"multipart/form-data; boundary=xyz")]


class Form:
    """A client that sends `parts` of a form. A `stuck` one stalls before the end."""
    def __init__(self, *parts, stuck=False):
        self.scope, self.headers = {"type": "http", "headers": HEADERS}, {"content-type": HEADERS[0][1].decode()}
        self.parts, self.stuck = list(parts), stuck

    async def receive(self):
        if not self.parts: await asyncio.sleep(60)
        return {"type": "http.request", "body": self.parts.pop(0), "more_body": bool(self.parts) or self.stuck}


async def sent(room, client, form, work=0.0):
    with room.body(client) as body:
        async with read_form(form, LARGE, room, body, 4) as fields:
            await asyncio.sleep(work)                         # its pictures are handled
            return len(await fields["image"].read())


@pytest.mark.parametrize("text", ['\\"', "\\\\"])
def test_a_text_of_escapes_is_not_walked_to_its_end(text):
    few, many = ('{"a":"%s%s"}' % ("x" * SMALL, text * n) for n in (ESCAPES // 2 - 1, ESCAPES))
    assert len(parse_json(few.encode())["a"]) == SMALL + ESCAPES // 2 - 1
    with pytest.raises(Malformed, match="too many quotation marks or backslashes"): parse_json(many.encode())


def test_a_long_text_of_escapes_is_not_parsed():
    """Pictures from PHP, and in lines, are read as they are. Sixteen times as many escapes as PHP has are refused."""
    picture = to_base64(random.Random(7).randbytes(3 * SMALL))
    for text in (picture.replace("/", "\\/"), re.sub("(.{76})", r"\1\\r\\n", picture)):
        assert "".join(parse_json(b'{"a":"%s"}' % text.encode())["a"].split()) == picture
    for text in ("\\/" * 8, "\\/" + "x" * 5, "\\n" + "x" * 8):
        with pytest.raises(Malformed, match="too many backslashes"): parse_json(b'{"a":"%s"}' % (text.encode() * 2 * SMALL))


def test_base64_is_read_and_made_in_pieces(monkeypatch):
    """No call of Python's own holds the others for more than a piece, and the result is that of one call."""
    sizes, read = [], binascii.a2b_base64
    monkeypatch.setattr("aura_engine.images.binascii.a2b_base64", lambda text, **more: (sizes.append(len(text)), read(text, **more))[1])
    for size in (1, 2, 3, STEP - 1, STEP, STEP + 1, 5 * STEP + 2):
        data = random.Random(size).randbytes(size)
        text = base64.b64encode(data).decode()
        assert to_base64(data) == text and from_base64(text) == data == from_base64(" \n".join((text[:9], text[9:])))
    assert max(sizes) == STEP // 3 * 4 and len(sizes) > 20
    piece = "A" * (STEP // 3 * 4 - 4)
    for wrong in (piece + "AA==" + "AAAA", piece + "AAA=" + piece, piece + "AAAAA", piece + "AAA!" + piece, piece + "AAA\xe4"):
        with pytest.raises(Invalid): from_base64(wrong)


def test_a_form_that_gives_way_is_told_so():
    async def go():
        room = Arrivals(most=850_000, grace=.05)
        slow = [asyncio.create_task(sent(room, f"10.0.0.{i}", Form(HEAD + b"x" * 100_000, stuck=True))) for i in range(8)]
        await asyncio.sleep(.1)
        assert await sent(room, "192.0.2.1", Form(HEAD + b"x" * 100_000, b"\r\n--xyz--\r\n")) == 100_000
        await asyncio.sleep(.05)
        ended = [task for task in slow if task.done()]
        for task in slow: task.cancel()
        assert len(ended) == 1 and not ended[0].cancelled() and isinstance(ended[0].exception(), BodiesFull)
    asyncio.run(go())


def test_a_form_that_has_come_is_left_alone():
    async def go():
        room, end = Arrivals(most=850_000, grace=.02), b"\r\n--xyz--\r\n"
        whole = [asyncio.create_task(sent(room, f"10.0.0.{i}", Form(HEAD + b"x" * 100_000, end), work=.2)) for i in range(8)]
        await asyncio.sleep(.1)
        with pytest.raises(BodiesFull): await sent(room, "192.0.2.1", Form(HEAD + b"x" * 100_000, end))
        assert await asyncio.gather(*whole) == [100_000] * 8
    asyncio.run(go())


@dataclass
class Taken:
    """A job of the engine, as far as the store looks at it."""
    id: str
    start_bytes: int = 0


def test_posts_that_come_together_take_no_more_places_than_there_are():
    async def go():
        store, full = JobStore(replica="e1", most=8), 0

        async def post(n, breaks=False):
            nonlocal full
            try:
                with store.place("greedy"):
                    await asyncio.sleep(.01)                  # its pictures are read
                    if breaks: raise ValueError("its request was wrong")
                    store.add(OrderedJob(Taken(f"{n}"), Order(Plan(()))), "greedy")
            except JobsFull: full += 1
            except ValueError: pass
        await asyncio.gather(*(post(n, breaks=True) for n in range(2)))
        await asyncio.gather(*(post(n) for n in range(9)))
        assert (len(store.kept), full) == (2, 7) and not store.reserved      # a quarter of eight
    asyncio.run(go())


def test_running_jobs_that_hold_too_much_leave_no_place():
    store = JobStore(replica="e1", bytes=10_000_000)
    store.add(OrderedJob(Taken("a", 6_000_000), Order(Plan(()))), "greedy")
    store.kept["e1-a"].add(ClientEvent("image", {"index": 0, "image": "A" * 6_000_000}, 0))
    with pytest.raises(JobsFull, match="of your jobs are running and hold 6 MiB"):
        with store.place("greedy"): pass
    with store.place("modest"): pass                          # half of the room is for the others
    store.kept["e1-a"].end()
    with store.place("greedy"): pass


def test_what_a_job_starts_from_is_freed_while_it_runs():
    start, beside = Pillow.new("RGB", (512, 512)), Pillow.new("RGB", (512, 512))
    job = Job(Plan((replace(APPLE, init=start, references=(beside,)),)))
    store = JobStore(replica="e1")
    kept = store.add(OrderedJob(job, Order(job.plan).without_starts()), "me")
    ordered = kept.work.order.plan.pictures[0]
    assert ordered.init is None and not ordered.references and job.start_bytes >= 6 * 512 * 512
    job.free_inputs()                                         # it is encoded
    assert job.start_bytes == 0


def test_a_redis_that_is_away_is_not_counted_as_a_bug():
    metrics = Metrics()
    metrics.failed(StoreUnreachable("Redis is away"))
    metrics.failed(EngineFailed("a bug"))
    said = metrics.text().decode()
    assert 'reason="store"} 1.0' in said and 'reason="internal"} 1.0' in said


class Asked:
    """A request of a client that stays, as far as planning looks at it."""
    def __init__(self, api, seconds_ago=0.0):
        self.client, self.headers = None, {}
        self.app = SimpleNamespace(state=SimpleNamespace(api=api))
        self.state = SimpleNamespace(arrived=time.monotonic() - seconds_ago)

    async def receive(self): await asyncio.sleep(60)


def mask():
    out = io.BytesIO()
    Pillow.new("RGBA", (64, 64)).save(out, "PNG")
    return to_base64(out.getvalue())


def test_a_mask_of_another_door_is_read_within_the_deadline():
    """Its line is not waited for when the request is over, nor when the client has left."""
    async def go():
        api = Api(SimpleNamespace(settings=load_settings(SD_MODEL_ID="embedded", AURA_DEADLINE_SECONDS="30")))
        keep = lambda picture: picture.getchannel("A")
        assert await remade_mask(Asked(api), mask(), keep)
        with pytest.raises(DeadlineExceeded): await remade_mask(Asked(api, seconds_ago=31), mask(), keep)
        api.line, free = PictureLine(), threading.Event()     # one thread
        busy = asyncio.create_task(api.line.decode("another", DecodeCost(1.0, 1), free.wait))
        await asyncio.sleep(.05)
        late = asyncio.create_task(remade_mask(Asked(api, seconds_ago=29.4), mask(), keep))
        with pytest.raises((PicturesFull, DeadlineExceeded)): await late
        gone = Asked(api)
        gone.receive = lambda: asyncio.sleep(.1, {"type": "http.disconnect"})
        with pytest.raises(Cancelled): await remade_mask(gone, mask(), keep)
        await asyncio.sleep(.05)
        assert not api.line.waiting
        free.set()
        await busy
    asyncio.run(go())


def test_a_planned_request_holds_its_pictures_no_longer():
    async def go():
        api = Api(SimpleNamespace(settings=load_settings(SD_MODEL_ID="embedded")))
        request, given = Asked(api), {"mask": mask(), "references": [mask(), mask()]}
        for ask in (RefineRequest(refine_prompt="a fox", images=[mask()], **given),
                    ReplayRequest(image=mask(), init=mask(), **given)):
            with api.arrivals.body("me") as request.state.body:
                api.arrivals.add(request.state.body, 1000)
                let_go(request, ask)
                assert not api.arrivals.bodies and pictures_in(ask) == {} and not getattr(ask, "image", None)
    asyncio.run(go())


# turns for pictures

def pieces(client, n, order):
    """Work of `n` pictures."""
    for _ in range(n):
        time.sleep(.01)
        order.append(client)
        yield


def picture(side, format="JPEG", mode="RGB"):
    out = io.BytesIO()
    Pillow.new(mode, (side, side)).save(out, format, **({"lossless": True, "quality": 0, "method": 0} if format == "WEBP" else {}))
    return to_base64(out.getvalue())


def test_a_turn_is_one_picture():
    """Two requests of five pictures: whoever comes then waits for one of them, and the two take turns."""
    async def go():
        line, order = PictureLine(), []
        ask = lambda client, n: asyncio.create_task(line.decode_each(client, DecodeCost(n, 1), pieces(client, n, order)))
        asked = [ask("greedy", 5), ask("greedy", 5)]
        while not order: await asyncio.sleep(0)
        await asyncio.gather(ask("modest", 1), *asked)
        assert order.index("modest") <= 2 and len(order) == 11
        assert not line.readings and not line.waiting and not line.spent
    asyncio.run(go())


def test_nobody_is_refused_because_one_client_holds_the_memory():
    """A small request does not wait for it, a large one waits, and the memory is never given twice."""
    async def go():
        line, gate, order, held = PictureLine(most=DecodeCost(20.0, 160)), threading.Event(), [], []

        async def ask(client, size, *waits):
            async with line.place(client, DecodeCost(1.0, size)):
                held.append(sum(r.cost.bytes for r in line.readings if r.begin.done()))
                await line.run(client, lambda: (order.append(client), *(w.wait(10) for w in waits)))
        tasks = [asyncio.create_task(ask(*asked)) for asked in (("greedy", 150, gate), ("large", 120), ("small", 10))]
        await asyncio.sleep(.05)
        assert [r.client for r in line.readings if r.begin.done()] == ["greedy", "small"] and order == ["greedy"]
        gate.set()
        await asyncio.gather(*tasks)
        assert order == ["greedy", "small", "large"] and max(held) <= 160
        late = asyncio.create_task(line.decode("gone", DecodeCost(1.0, 100), order.append, "gone"))
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        assert not line.readings                              # whoever leaves gives its place back
    asyncio.run(go())


def test_what_never_fits_is_refused_with_numbers():
    """Four pictures of 16 megapixels: as JPEG and PNG, with or without a mask, they fit. As WebP under a mask they do not."""
    async def go():
        line, row, rgba = PictureLine(), ROWS["embedded"], picture(4000, "WEBP", "RGBA")
        of = lambda text, mask=None: cost_of(RefineRequest(refine_prompt="x", images=[text] * 4, mask=mask), row)
        jpeg, png = picture(4000), picture(4000, "PNG", "RGBA")
        fit = [of(jpeg), of(jpeg, jpeg), of(png), of(png, png), of(rgba)]
        assert max(cost.bytes for cost in fit) <= line.most.bytes
        for cost in fit: await line.decode("somebody", cost, int)
        with pytest.raises(Invalid, match=r"given pictures that take \d+ MiB to read, allowed: at most 512 MiB"): await line.decode("somebody", of(rgba, rgba), int)
    asyncio.run(go())


def test_a_request_pauses_after_each_picture_that_it_decodes():
    """Three pictures and a mask: four decodings and three preparations, and the plan is that of one go."""
    ask = RefineRequest(refine_prompt="x", images=[picture(s) for s in (128, 160, 192)], mask=picture(64, "PNG", "L"), config={"seed": 7})
    bright = io.BytesIO()
    Pillow.new("L", (64, 64), 200).save(bright, "PNG")
    ask = ask.model_copy(update={"mask": to_base64(bright.getvalue())})
    work, pauses = ordering(ask, ROWS["embedded"], False), 0
    try:
        while True: next(work); pauses += 1
    except StopIteration as end: order = end.value
    assert pauses == 7 and [p.inpainting.picture.width for p in order.plan.pictures] == [128, 160, 192]


def test_pictures_that_cannot_be_read_in_time_are_not_begun():
    """Alone in the line: its own deadline is wrong, and that is no failure of the server. The same when the body came too late."""
    async def go():
        line, order = PictureLine(), []
        with pytest.raises(Invalid, match="^deadlineSeconds"): await line.decode("me", DecodeCost(5.0, 1), order.append, 1, left=1.0)
        api = Api(SimpleNamespace(settings=load_settings(SD_MODEL_ID="embedded")))
        ask = RefineRequest(refine_prompt="x", images=[mask()], config={"deadline_seconds": 1})
        with pytest.raises(Invalid, match="^config.deadlineSeconds: given 1.0, allowed: a later one"): await begin(Asked(api, seconds_ago=1.1), ask)
        assert not order
    asyncio.run(go())


def test_one_client_leaves_a_thread_to_the_others():
    async def go():
        pool, gate, order = FairPool(2, "test"), threading.Event(), []
        greedy = [asyncio.create_task(pool.run("greedy", gate.wait, 10)) for _ in range(6)]
        await asyncio.sleep(.02)
        assert len(pool.running) == 1
        for i in range(3): await pool.run("modest", order.append, i)
        assert order == [0, 1, 2] and not any(task.done() for task in greedy)
        gate.set()
        await asyncio.gather(*greedy)
    asyncio.run(go())


def test_a_client_that_sends_large_pictures_leaves_a_slot_for_others():
    """On every machine. What its line takes is counted as one thread reads it."""
    async def go():
        line, gate = Api(SimpleNamespace(settings=load_settings(SD_MODEL_ID="embedded"))).line, threading.Event()
        cost = DecodeCost(1.0, 2**20)
        greedy = [asyncio.create_task(line.decode("greedy", cost, gate.wait, 10)) for _ in range(line.slots)]
        await asyncio.sleep(.02)
        assert line.seconds == len(greedy) / (line.slots - 1) and len(line.running) == line.slots - 1
        assert await line.decode("modest", cost, int) == 0 and not any(task.done() for task in greedy)
        gate.set()
        await asyncio.gather(*greedy)
    asyncio.run(go())


def test_a_png_of_16_bits_with_alpha_is_known_to_take_longer():
    def costs(colour, depth):
        header = bytes.fromhex("00000fa0") * 2 + bytes([depth, colour, 0, 0, 0])
        png = PNG_SIGNATURE + (13).to_bytes(4, "big") + b"IHDR" + header + bytes(4) + bytes(12)
        return decode_cost(facts_of(png))[0]
    plain, deep, clear, both = costs(2, 8), costs(2, 16), costs(6, 8), costs(6, 16)
    assert 3 < deep / plain < 4 and 1.5 < clear / plain < 2 and 6 < both / plain < 8


def test_a_planned_request_of_another_door_is_freed_in_its_own_form_too():
    async def go():
        api = Api(SimpleNamespace(settings=load_settings(SD_MODEL_ID="embedded")))
        edit = EditRequest(prompt="a fox", image=[mask()], mask=mask())
        own = RefineRequest(refine_prompt="a fox", images=json_edit(edit).pictures)
        with api.arrivals.body("me") as body:
            request = Asked(api)
            request.state.body = body
            let_go(request, own, edit)
            assert not own.images and not edit.image and not edit.mask and not api.arrivals.bodies
    asyncio.run(go())


# what goes out

def test_a_large_webp_is_made_by_the_quickest_method():
    def saved(im, **more):
        out = io.BytesIO()
        im.save(out, "WEBP", quality=90, **more)
        return out.getvalue()
    for side, more in ((2049, {"method": 0}), (640, {})):
        im = Pillow.effect_noise((side, side), 30).convert("RGB").resize((side, 2048 if more else side))
        assert encode(im, "webp") == saved(im, **more)
        if more: break
    small = Pillow.effect_noise((256, 256), 30).convert("RGB")
    assert encode(small, "webp") == saved(small) != saved(small, method=0)


def test_a_large_event_leaves_in_pieces():
    """Whole it would be the same bytes. No piece is larger than a quarter of a megabyte, and others have a turn between two of them."""
    async def go():
        data, turns = {"index": 0, "image": "A" * (5 * PIECE + 7), "note": 'said "so"'}, []

        async def source(): yield sse_frame("image", data, 3)

        async def others():
            while True: turns.append(1); await asyncio.sleep(0)
        other, sent = asyncio.create_task(others()), []
        async for part in heartbeat(source()): sent.append((len(turns), part))
        other.cancel()
        small = sse_frame("image", data | {"image": "A"}, 3)
        assert b"".join(part for _, part in sent) == small.replace(b'"A"', b'"%s"' % data["image"].encode())
        assert max(len(part) for _, part in sent) <= PIECE and len(sent) >= 7
        assert all(after > before for (before, _), (after, _) in zip(sent, sent[1:]))
    asyncio.run(go())


def answered(client, size, sent, gate):
    """A large JSON answer to a client that takes one part, and the next ones when `gate` is open."""
    async def send(message):
        sent.append(len(message.get("body", b"")))
        if len(sent) > 2: await gate.wait()

    async def nothing(): await asyncio.sleep(60)
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "client": (client, 1), "headers": []}
    return asyncio.create_task(json_answer({"image": "A" * size})(scope, nothing, send))


def test_answers_that_wait_for_their_reader_are_counted_by_client(monkeypatch):
    """Beyond a half of the room the oldest of the greediest is forgotten at once, although its reader stands still."""
    async def go():
        monkeypatch.setattr("aura_engine.answers.backlogs", room := Backlogs(most=40 * PIECE))
        gate, lists = asyncio.Event(), [[] for _ in range(4)]
        tasks = [answered(*asked, sent, gate) for asked, sent in zip((("10.0.0.1", 9 * PIECE), ("10.0.0.2", 15 * PIECE), ("10.0.0.1", 9 * PIECE)), lists)]
        await asyncio.sleep(.05)
        first, other, second = room.answers
        assert [one.client for one in room.answers] == ["10.0.0.1", "10.0.0.2", "10.0.0.1"] and first.size == 8 * PIECE + 2
        tasks.append(answered("10.0.0.1", 9 * PIECE, lists[3], gate))
        await asyncio.sleep(.05)
        assert not first.pieces and first.ousted and not first.size and second.size and other.size
        gate.set()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert ends == [None] * 4 and not room.answers        # it ends, and nothing breaks
        assert sum(lists[0]) < 3 * PIECE and lists[0][-1] and not lists[1][-1] and all(sum(sent) == len('{"image":""}') + n * PIECE for sent, n in zip(lists[1:], (15, 9, 9)))
    asyncio.run(go())


def test_a_reader_takes_as_much_as_a_sender_brings(monkeypatch):
    """Each part has its own time: no pause between two of them begins it anew for all that is left."""
    async def go():
        monkeypatch.setattr("aura_engine.answers.time", clock := SimpleNamespace(monotonic=lambda: now))
        now, full = 0.0, STILL + PIECE / LEAST_RATE
        for pause, parts in ((full - 1, 5), (full + 1, 1)):
            taken = 0
            try:
                async for _ in taken_parts(Backlog("me", [b"x" * 5 * PIECE])):
                    taken += 1
                    now += pause
            except NotRead: assert pause > full
            assert taken == parts and clock

        async def source(): yield sse_frame("image", {"image": "A" * (5 * PIECE)})
        left, parts = [], []
        async for part in heartbeat(source(), left=lambda: left.append(1)):
            parts.append(part)
            now += full + 1
        assert len(parts) == 1 and left                       # it ends before its time, and nothing breaks
    asyncio.run(go())


def test_a_stream_keeps_one_large_event_and_its_source_waits():
    """Its reader stands still. The next event is not made, and leaving ends the source."""
    async def go():
        made, ended = [], []

        async def source():
            try:
                for i in range(9):
                    made.append(i)
                    yield sse_frame("image", {"image": "A" * (3 * PIECE)}, i)
            finally: ended.append(1)
        stream = heartbeat(source(), left=lambda: ended.append(2), client="me")
        await anext(stream)
        await asyncio.sleep(.05)
        [backlog] = backlogs.answers
        assert made == [0] and backlog.client == "me" and 2 * PIECE < backlog.size <= 4 * PIECE
        for _ in range(4): await anext(stream)
        await asyncio.sleep(.05)
        assert made == [0, 1] and backlog.size <= 4 * PIECE
        await stream.aclose()
        await asyncio.sleep(.05)
        assert made == [0, 1] and sorted(ended) == [1, 2] and not backlogs.answers
    asyncio.run(go())


def test_a_finished_picture_is_freed_when_its_file_is_made(monkeypatch):
    async def go():
        api, noise = Api(SimpleNamespace(settings=load_settings(SD_MODEL_ID="embedded"))), Pillow.effect_noise((256, 256), 90).convert("RGB")
        job, held, receipt = Job(Plan((APPLE,) * 3)), [], SimpleNamespace(width=256, height=256, steps=1)

        def file_of(event, output):
            held.append(job.pixel_bytes)
            return b"file", receipt
        monkeypatch.setattr("aura_engine.answers.file_of", file_of)
        job.emit(*(Image(i, noise, receipt) for i in range(3)), Done())
        assert (await files_of(api, OrderedJob(job, Order(job.plan)))).files == [b"file"] * 3
        assert held == [n * 3 * 256 * 256 for n in (3, 2, 1)] and not job.pixel_bytes
    asyncio.run(go())


def test_the_base64_of_a_picture_is_made_beside_the_loop(monkeypatch):
    async def go():
        api, noise, threads = Api(SimpleNamespace(settings=load_settings(SD_MODEL_ID="embedded"))), Pillow.new("RGB", (64, 64)), []

        def to_text(data):
            threads.append(threading.current_thread().name.partition("_")[0])
            return to_base64(data)
        monkeypatch.setattr("aura_engine.answers.to_base64", to_text)
        monkeypatch.setattr("aura_engine.answers.file_of", lambda event, output: (b"file", SimpleNamespace(to_json=dict)))
        receipt, jobs = SimpleNamespace(width=64, height=64, steps=1), [Job(Plan((APPLE,) * 2)) for _ in range(2)]
        for job in jobs: job.emit(*(Image(i, noise, receipt) for i in range(2)), Done())
        works = [OrderedJob(job, Order(job.plan)) for job in jobs]
        events = [event async for event in client_events(api, works[0])]
        monkeypatch.setattr("aura_engine.answers.begin", lambda *given, **more: asyncio.sleep(0, works[1]))
        answer = await respond_with(api, Asked(api), GenerateRequest(prompt="a fox", n=2))
        assert [event.data["image"] for event in events[:2]] == json.loads(answer.body)["images"] == ["ZmlsZQ=="] * 2
        made = Files("png", [b"file"] * 2, [], [])
        openai = await openai_json(Asked(api), ImagesRequest(prompt="a fox", n=2), made, (64, 64))
        assert [one["b64_json"] for one in openai["data"]] == ["ZmlsZQ=="] * 2
        assert threads == ["encode"] * 6
    asyncio.run(go())


def test_a_shelf_is_bounded_in_number_and_the_greediest_loses():
    shelf = Shelf(most=1000, number=10)
    other = shelf.put(b"x", "png", "modest")
    mine = [shelf.put(b"x", "png", "greedy") for _ in range(50)]
    assert len(shelf.kept) == 10 and other in shelf.kept and list(shelf.kept)[1:] == mine[-9:]
    shelf.put(bytes(900), "png", "large")
    assert shelf.held.total() == sum(max(len(p.data), shelf.least) for p in shelf.kept.values()) <= 1000
    old = Shelf(seconds=-1)
    for _ in range(3): old.put(b"x", "png", "me")
    assert len(old.kept) <= 1 and old.held.total() == old.least * len(old.kept)


def test_a_job_that_grows_too_large_fails_and_holds_nothing(monkeypatch):
    async def go():
        monkeypatch.setattr(job_routes, "MOST_RESULT", 300_000)
        api = Api(SimpleNamespace(settings=load_settings(SD_MODEL_ID="embedded")))
        job, noise = Job(Plan((APPLE,) * 3)), Pillow.effect_noise((256, 256), 90).convert("RGB")
        receipt = SimpleNamespace(width=256, height=256, steps=1)
        kept = KeptJob("e1-a", OrderedJob(job, Order(job.plan)))
        monkeypatch.setattr("aura_engine.answers.file_of", lambda event, output: (bytes(150_000), SimpleNamespace(to_json=dict)))
        job.emit(*(Image(i, noise, receipt) for i in range(3)), Done())
        await watch_job(api, kept, kept.work)
        assert kept.status == "failed" and kept.ended and kept.log.bytes < 10_000
        failed = next(event for event in kept.events if event.name == "failed").data["problem"]
        assert failed["type"] == "urn:aura:too_large" and "jpeg or webp" in failed["detail"]
    asyncio.run(go())


# lines in the log

def test_a_client_writes_so_many_lines_and_then_one_that_counts(caplog):
    async def go():
        few = FewLines(most=20, seconds=.2)
        for i in range(500): few.log(logging.INFO, "request", "10.0.0.1", path=i)
        for client in ("10.0.0.2", "2001:db8::1"): few.log(logging.INFO, "request", client)
        for i in range(30): few.log(logging.INFO, "request", f"2001:db8::{i:x}")            # one client, whatever its address
        assert len(caplog.records) == 20 + 1 + 20
        await asyncio.sleep(.4)
        told = [record for record in caplog.records if record.message == "lines were left out"]
        assert sorted((record.client, record.count) for record in told) == [("10.0.0.1", 480), ("2001:db8::/64", 11)] and not few.seen
        few.log(logging.INFO, "request", "10.0.0.1")
        assert caplog.records[-1].message == "request"
    with caplog.at_level(logging.INFO, "aura_engine.walls"): asyncio.run(go())


def test_tracebacks_are_few(caplog, monkeypatch):
    """A request that breaks the server is answered each time, and its traceback is written ten times."""
    async def go():
        monkeypatch.setattr("aura_engine.walls.few_lines", FewLines())

        async def broken(scope, receive, send): raise KeyError("a bug")

        async def answered(scope, receive, send): answers.append(1)
        answers = []
        guard = Guard(broken, Origins(()), lambda request, error: answered)
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "client": ("10.0.0.1", 1)}
        for _ in range(40): await guard(scope, None, None)
        assert len(answers) == 40
    asyncio.run(go())
    assert len([record for record in caplog.records if record.message == "unforeseen" and record.exc_info]) == 10


class Line:
    """A connection that came from `peer`, as far as the protocol looks at it."""
    def __init__(self, peer): self.peer, self.ended, self.sent = peer, False, b""
    def get_extra_info(self, name, default=None): return {"peername": (self.peer, 1234), "sockname": ("10.9.9.9", 80)}.get(name, default)
    def abort(self): self.ended = True
    def close(self): self.ended = True
    def is_closing(self): return self.ended
    def write(self, data): self.sent += data


def test_new_connections_of_one_client_are_counted():
    """Beyond its allowance they end without a word, as soon as they come. Others, and proxies, are not asked."""
    async def go():
        class Few(Connection): newcomers, held = Allowances(3, 0.0), Counter()
        config = Config(Forwarded(None, ["10.0.0.9"]), http=Few, ws="none", lifespan="off", log_config=None, proxy_headers=False)
        config.load()

        def come(peer):
            protocol, line = Few(config=config, server_state=ServerState(), app_state={}), Line(peer)
            protocol.connection_made(line)
            ended = line.ended, line.sent
            protocol.connection_lost(None)                    # it does not hold a place: only its coming counts
            return ended
        assert [come("10.0.0.1") for _ in range(5)] == [(False, b"")] * 3 + [(True, b"")] * 2
        assert not come("10.0.0.2")[0] and not any(come("10.0.0.9")[0] for _ in range(9)) and not Few.held
    asyncio.run(go())


def test_garbage_writes_few_lines(caplog, monkeypatch):
    async def go():
        few = FewLines(most=5)
        monkeypatch.setattr("aura_engine.server.few_lines", few)
        class Few(Connection): held = Counter()
        config = Config(Forwarded(None, []), http=Few, ws="none", lifespan="off", log_config=None)
        config.load()
        for _ in range(30):
            protocol, line = Few(config=config, server_state=ServerState(), app_state={}), Line("10.0.0.1")
            protocol.connection_made(line)
            protocol.data_received(b"\x16\x03\x01 garbage\r\n\r\n")
            assert b"400" in line.sent and line.ended
            protocol.connection_lost(None)
        assert list(few.left_out.values()) == [25]
    with caplog.at_level(logging.INFO): asyncio.run(go())
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == ["not HTTP"] * 5


def test_one_client_holds_a_quarter_of_all_bodies():
    async def go():
        room = Arrivals()
        with room.body("greedy") as first, room.body("greedy") as second, room.body("greedy") as third, room.body("modest") as other:
            for body in (first, second): room.add(body, LARGE)
            room.add(other, LARGE)
            with pytest.raises(BodiesFull): room.add(third, 1)
    asyncio.run(go())
