"""What comes in at the same time: forms that give way, posts that race for a place, and what a job holds meanwhile."""
import asyncio, io, threading, time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from PIL import Image as Pillow

from aura_engine.answers import Api, Metrics, Order, OrderedJob, let_go, pictures_in
from aura_engine.config import load_settings
from aura_engine.dialects import remade_mask
from aura_engine.images import to_base64
from aura_engine.intake import ESCAPES, LARGE, SMALL, Arrivals, BodiesFull, DecodeCost, PicturesFull, parse_json, read_form
from aura_engine.job_routes import JobsFull, JobStore, held_by
from aura_engine.jobs import Job
from aura_engine.planning import ReplayRequest
from aura_engine.shared_jobs import StoreUnreachable
from aura_engine.types import Cancelled, DeadlineExceeded, EngineFailed, Malformed, Picture, Plan, RefineRequest

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
    assert ordered.init is None and not ordered.references and held_by(kept) > 6 * 512 * 512
    job.free_inputs()                                         # it is encoded
    assert held_by(kept) < 10_000


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
        free = threading.Event()
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


def test_one_client_holds_a_quarter_of_all_bodies():
    async def go():
        room = Arrivals()
        with room.body("greedy") as first, room.body("greedy") as second, room.body("greedy") as third, room.body("modest") as other:
            for body in (first, second): room.add(body, LARGE)
            room.add(other, LARGE)
            with pytest.raises(BodiesFull): room.add(third, 1)
    asyncio.run(go())
