"""Jobs in a real Redis: what another engine's clients read, and how much of it."""
import asyncio, shutil, subprocess, threading, time

import pytest

from aura_engine.answers import ClientEvent
from aura_engine.job_routes import KeptJob
from aura_engine import shared_jobs
from aura_engine.shared_jobs import ALIVE_KEPT, ALIVE_SECONDS, FarJobs, Writer
from conftest import free_port

pytestmark = pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not installed")
ID, PICTURE = "e1-" + "0" * 32, "x" * 20_000


@pytest.fixture(scope="module")
def port():
    port = free_port()
    process = subprocess.Popen(["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)
    yield port
    process.kill()


async def connected(port):
    from redis.asyncio import Redis
    from redis.exceptions import ConnectionError
    redis = Redis.from_url(f"redis://127.0.0.1:{port}/0", socket_timeout=2, decode_responses=True)
    end = time.monotonic() + 10
    while True:
        try: await redis.ping(); break
        except ConnectionError: assert time.monotonic() < end; await asyncio.sleep(.05)
    await redis.flushall()
    return redis


async def added(writer, kept, *events):
    for event in events: kept.add(event)
    await writer.write(kept)


async def read(far, kept, after=0):
    return [frame.decode() async for frame in far.follow(kept, after)]


def numbers(frames): return [int(line[4:]) for frame in frames for line in frame.splitlines() if line.startswith("id: ")]


def test_readers_of_a_far_job_read_what_is_new_and_share_it(port):
    async def go():
        redis = await connected(port)
        writer, kept, far = Writer(redis, 60), KeptJob(ID, ask={"route": "generate", "request": {"prompt": "x"}}), FarJobs(redis)
        await writer.say_alive()
        await added(writer, kept, ClientEvent("queued", {"position": 0, "etaSeconds": 1.0, "seeds": [7]}), *(ClientEvent("image", {"index": i, "image": PICTURE}, i) for i in range(10)))
        readers = [asyncio.create_task(read(far, await far.job(ID))) for _ in range(8)]
        late = asyncio.create_task(read(far, await far.job(ID), 11))
        await asyncio.sleep(.1)
        assert list(far.followed) == [ID] and far.followed[ID].readers == 9
        sent = (await redis.info("stats"))["total_net_output_bytes"]
        for step in range(20):                                # two seconds in which the old readers read everything eight times each
            await added(writer, kept, ClientEvent("preview", {"index": 10 + step}, 10 + step), ClientEvent("image", {"index": 10 + step, "image": "small"}, 10 + step))
            await asyncio.sleep(.05)
        await added(writer, kept, ClientEvent("done", {"warnings": []}))
        every = await asyncio.wait_for(asyncio.gather(*readers, late), 10)
        sent = (await redis.info("stats"))["total_net_output_bytes"] - sent
        assert all(frames == every[0] for frames in every[:8]) and len(numbers(every[0])) == 32        # previews are not told
        assert numbers(every[0])[:12] == [*range(1, 12), 13] and numbers(every[0])[-1] == 52 and every[8] == every[0][11:]
        assert sent < len(PICTURE), sent                      # of 10 pictures not one was sent again
        assert not far.followed                               # the last reader has left
        await redis.aclose()
    asyncio.run(go())


@pytest.mark.parametrize("end", ["deleted", "forgotten", "engine gone", "reader gone"])
def test_a_far_job_that_ends_otherwise_ends_its_streams(port, end):
    async def go():
        redis = await connected(port)
        writer, kept, far = Writer(redis, 60), KeptJob(ID, ask={"route": "generate", "request": {"prompt": "x"}}), FarJobs(redis)
        await writer.say_alive()
        await added(writer, kept, ClientEvent("queued", {"position": 0, "etaSeconds": 1.0, "seeds": [7]}))
        reader = asyncio.create_task(read(far, await far.job(ID)))
        await asyncio.sleep(.05)
        if end == "deleted": kept.forget(); await writer.write(kept)
        if end == "forgotten": await writer.forget({})
        if end == "engine gone": await redis.delete(f"aura:alive:{writer.process}")
        if end == "reader gone":
            reader.cancel()
            await asyncio.wait({reader})
            assert not far.followed
        else:
            frames = await asyncio.wait_for(reader, 5)
            assert numbers(frames) == ([1, 2, 3] if end == "engine gone" else [1])
            assert ("urn:aura:engine_gone" in "".join(frames)) == (end == "engine gone")
        assert not far.followed and len([t for t in asyncio.all_tasks() if not t.done()]) <= 2
        await redis.aclose()
    asyncio.run(go())


def test_a_running_far_job_is_read_once_however_often_it_is_asked_for(port):
    async def go():
        redis = await connected(port)
        writer, kept, far = Writer(redis, 60), KeptJob(ID, ask={"route": "generate", "request": {"prompt": "x"}}), FarJobs(redis)
        await writer.say_alive()
        await added(writer, kept, ClientEvent("queued", {"position": 0, "etaSeconds": 1.0, "seeds": [7]}), ClientEvent("image", {"index": 0, "image": PICTURE}, 0))
        await far.job(ID)
        sent = (await redis.info("stats"))["total_net_output_bytes"]
        for step in range(20):
            await added(writer, kept, ClientEvent("step", {"index": 1, "step": step, "steps": 20}, 1))
            seen = await far.job(ID)
            assert [event.name for event in seen.events] == ["queued", "image", *["step"] * (step + 1)]
        await asyncio.gather(*(far.job(ID) for _ in range(5)))           # at the same time: each event is taken once
        assert len(seen.events) == 22
        sent = (await redis.info("stats"))["total_net_output_bytes"] - sent
        assert sent < len(PICTURE), sent
        await added(writer, kept, ClientEvent("done", {"warnings": []}))
        kept.end()
        assert (await far.job(ID)).status == "succeeded" and not far.known.jobs
        kept.forget()
        await writer.write(kept)
        assert (await far.job(ID)).deleted
        await writer.forget({})
        assert await far.job(ID) is None
        await redis.aclose()
    asyncio.run(go())


@pytest.mark.parametrize("end", ["deleted", "forgotten", "engine gone"])
def test_a_far_job_that_ends_between_two_questions(port, end):
    async def go():
        redis = await connected(port)
        writer, kept, far = Writer(redis, 60), KeptJob(ID, ask={"route": "generate", "request": {"prompt": "x"}}), FarJobs(redis)
        await writer.say_alive()
        await added(writer, kept, ClientEvent("queued", {"position": 0, "etaSeconds": 1.0, "seeds": [7]}))
        assert (await far.job(ID)).status == "queued" and far.known.jobs
        if end == "deleted": kept.forget(); await writer.write(kept)
        if end == "forgotten": await writer.forget({})
        if end == "engine gone": await redis.delete(f"aura:alive:{writer.process}")
        seen = await far.job(ID)
        assert (seen is None) == (end == "forgotten") and not far.known.jobs
        if seen: assert (seen.deleted, seen.lost) == (end == "deleted", end == "engine gone")
        await writer.say_alive()
        if end == "engine gone":                              # it was only slow: its job goes on
            await added(writer, kept, ClientEvent("step", {"index": 0, "step": 1, "steps": 4}, 0))
            assert (await far.job(ID)).status == "running"
        await redis.aclose()
    asyncio.run(go())


def test_the_keys_of_engines_outlive_those_of_jobs(port, monkeypatch):
    """A full Redis drops first what would end first. A process that is silent is taken for lost long before its key ends."""
    async def go():
        redis = await connected(port)
        writer, kept, far = Writer(redis, 600), KeptJob(ID, ask={"route": "generate", "request": {"prompt": "x"}}), FarJobs(redis)
        await writer.say_alive()
        await added(writer, kept, ClientEvent("queued", {"position": 0, "etaSeconds": 1.0, "seeds": [7]}))
        key = f"aura:alive:{writer.process}"
        assert await redis.ttl(key) > await redis.ttl(f"aura:job:{ID}") > 0
        assert await far.lives(writer.process) and not (await far.job(ID)).lost
        await redis.expire(key, ALIVE_KEPT - ALIVE_SECONDS - 1)         # as after sixteen seconds of silence
        assert not await far.lives(writer.process) and (await far.job(ID)).lost
        await writer.say_alive()
        assert not (await FarJobs(redis).job(ID)).lost
        await redis.aclose()
    asyncio.run(go())


def test_a_far_picture_is_read_beside_the_event_loop(port, monkeypatch):
    async def go():
        redis, threads, whole = await connected(port), [], shared_jobs.event_in
        monkeypatch.setattr(shared_jobs, "event_in", lambda entry: (threads.append(threading.current_thread()), whole(entry))[1])
        writer, kept, far = Writer(redis, 60), KeptJob(ID), FarJobs(redis)
        await writer.say_alive()
        await added(writer, kept, ClientEvent("image", {"index": 0, "image": PICTURE}, 0))
        first = await far.job(ID)
        await added(writer, kept, ClientEvent("done", {"warnings": []}))
        assert (await far.job(ID)).events[0].data["image"] == PICTURE and first.log.closed
        assert len(threads) >= 2 and threading.main_thread() not in threads
        await redis.aclose()
    asyncio.run(go())
