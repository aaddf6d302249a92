"""The line of the engine: whose turn it is, what is promised, what a flood can do, and files that are damaged."""
import gc
import json
import os
import random
import socket
import subprocess
import sys
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image as Pillow

from aura_engine.batching import CurveFile, Entry, StepCost, choose, curve_from, read_curves, urgency, work
from aura_engine.candidates import Measured, TrialsFile
from aura_engine.config import load_settings
from aura_engine.engine import Engine, Pasting
from aura_engine.jobs import PREVIEW_BYTES, Job
from aura_engine.masks import Inpainting, Region
from aura_engine.queue import (
    MOST_PIXELS, MOST_TASKS, FairThread, Lateness, OwnLineFull, PixelsFull, Queue, Shares, Task, bytes_to_come, fair_order)
from aura_engine.types import (
    Cancelled, Done, Failed, Image, Invalid, JobStatus, Picture, Plan, Preview, Queued, QueueFull, ShuttingDown, Step)

SHAPE = (4, 64, 64, 77, None)
GPU = StepCost(SHAPE, {1: .020, 2: .022, 4: .026, 8: .040, 16: .072}, {1: .030, 2: .036, 4: .050, 8: .090})
CPU = StepCost(SHAPE, {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0, 16: 16.0}, {1: .7, 2: 1.4})
APPLE = Picture("a red apple", 128, 128, steps=4, guidance_scale=1.0, seed=7)


def asked(client="", steps=4, arrived=0.0, **more):
    return Entry(key=SHAPE, steps_left=steps, arrived=arrived, client=client, **more)


def submit(queue, client, steps, n=1, cost=GPU, deadline=None):
    job = Job(Plan((APPLE,) * n, deadline=deadline), client=client)
    tasks = [Task(key=SHAPE, steps_left=steps, arrived=queue.clock(), client=client, job=job, index=i, picture=APPLE) for i in range(n)]
    queue.submit(job, tasks, cost)
    return job


@pytest.mark.parametrize("seed", range(5))
def test_a_lone_client_is_served_as_if_there_were_no_clients(seed):
    rng, shares = random.Random(seed), Shares()
    tasks = [asked("me", rng.randint(0, 50), arrived=-100 * rng.random(), rows=rng.choice((1, 2))) for _ in range(60)]
    shares.pass_time(0.0, 1)
    shares.charge("me", 30.0)                     # it may owe as much as it will: nobody is there to pass it
    assert fair_order(tasks, CPU, 1.0, shares) == sorted(tasks, key=lambda t: urgency(t, CPU, 1.0))


def test_everybody_is_served_in_the_end():
    """A client in debt waits, and comes to its turn although others never stop asking."""
    shares, now, flood = Shares(), 0.0, asked("flood", 4)
    shares.pass_time(0.0, 2)
    shares.charge("flood", 50.0)
    while now < 2000:
        now += 1.0
        shares.pass_time(now, 2)
        if fair_order([flood, asked("others", 1, arrived=now)], CPU, now, shares)[0] is flood: break
    assert 50 < now < 50 * 33                     # a debt shrinks by 1/32 second a second, and the others owe nothing here


def simulate(cost, load, abused, n=250, flood=80, steps=50):
    """p95 of twenty clients whose pictures of 1 to 8 steps come at random, with one more that keeps `flood` pictures in line."""
    rng, now, tasks, times, shares, coming = random.Random(1), 0.0, [], [], Shares(), []
    rate, at = load / (4.5 * cost.step(SHAPE).per_row(16) + cost.decode(SHAPE).per_row(8)), 0.0
    for _ in range(n):
        at += rng.expovariate(rate)
        coming.append(asked(f"honest {rng.randrange(20)}", rng.randint(1, 8), at))
    coming.reverse()
    while len(times) < n:
        while coming and coming[-1].arrived <= now: tasks.append(coming.pop())
        if abused: tasks += [asked("abuser", steps, now) for _ in range(flood - sum(e.client == "abuser" for e in tasks))]
        if not tasks: now = coming[-1].arrived; continue
        shares.pass_time(now, len({e.client for e in tasks}))
        batch, bucket = choose(fair_order(tasks, cost, now, shares), cost, 16)
        stepping = batch[0].steps_left > 0
        took = (cost.step(SHAPE) if stepping else cost.decode(SHAPE))[bucket]
        now += took
        for e in batch:
            e.used += took / len(batch)
            if stepping: e.steps_left -= 1
            else:
                tasks.remove(e)
                shares.charge(e.client, e.used)
                if e.client != "abuser": times.append(now - e.arrived)
    return sorted(times)[int(n * .95)]


@pytest.mark.parametrize("flood", [(50, 80), (1, 80), (8, 500)], ids=["long pictures", "short ones", "hundreds"])
@pytest.mark.parametrize("cost", [GPU, CPU], ids=["sharing pays", "sharing does not pay"])
def test_what_others_wait_beside_an_abuser(cost, flood):
    """Twice as long at most."""
    steps, n = flood
    for load in (.3, .5, .8): assert simulate(cost, load, True, flood=n, steps=steps) <= 2 * simulate(cost, load, False), load


def test_pictures_under_way_count_for_their_client():
    """Sixteen pictures that are stepped together are all nearly done at once: only the first of them may profit from that."""
    under_way = [asked("flood", 1) for _ in range(16)]
    for task in under_way: task.used = 3.0
    line = fair_order([*under_way, asked("somebody", 8)], CPU, 1.0, Shares())
    assert line[0].client == "somebody" and fair_order([under_way[0], asked("somebody", 8)], CPU, 1.0, Shares())[0] is under_way[0]


def test_pictures_of_several_clients_share_calls():
    order = fair_order([asked(f"client {i}") for i in range(8)], GPU, 0.0, Shares())
    batch, bucket = choose(order, GPU, 16)
    assert bucket == 8 and len({e.client for e in batch}) == 8


def test_a_flood_is_refused_and_a_stranger_is_not():
    queue = Queue(limit=20, longest=600)
    with pytest.raises(QueueFull, match="of yours") as e:
        for _ in range(1000): submit(queue, "flood", 50, n=4)
    assert e.value.retry_after >= 1
    there = len(queue.tasks)
    assert work(queue.tasks, GPU) > 0.9 * 20
    short = submit(queue, "stranger", 4)
    assert isinstance(short.log[0], Queued) and short.log[0].eta_seconds < 2 and short.log[0].seeds == (7,)
    with pytest.raises(QueueFull): submit(queue, "flood", 50, n=4)
    assert len(queue.tasks) == there + 1
    # a deadline is checked with the turn of whoever asks
    assert submit(queue, "another", 4, deadline=5).log[0].eta_seconds < 5
    with pytest.raises(Invalid) as wrong: submit(queue, "another", 4, deadline=1e-4)
    assert wrong.value.errors[0].loc == "deadlineSeconds" and "at least" in wrong.value.errors[0].allowed


def test_leaving_early_does_not_pay():
    """Whoever cancels and asks again is charged for what the cancelled jobs had."""
    queue = Queue(limit=100, longest=600)
    job = submit(queue, "restless", 50)
    queue.tasks[0].used = 7.0
    submit(queue, "other", 50)
    queue.end(job, QueueFull("x"))
    assert queue.shares.debt("restless") == pytest.approx(7.0, abs=0.5) and queue.shares.debt("other") == 0


def test_the_line_is_bounded_whoever_fills_it():
    queue, n = Queue(limit=86400, longest=86400), 0
    with pytest.raises(QueueFull):
        for n in range(2 * MOST_TASKS): submit(queue, f"client {n}", 1)
    assert len(queue.tasks) == MOST_TASKS


def test_a_quarter_of_the_line_is_the_most_that_one_client_has():
    """A thousand pictures of one step are a few seconds of work, and would leave no place for others."""
    queue = Queue(limit=86400, longest=86400)
    with pytest.raises(OwnLineFull, match="256 pictures of yours"):
        for _ in range(MOST_TASKS): submit(queue, "many", 1)
    submit(queue, "victim", 4)
    assert len(queue.tasks) == MOST_TASKS // 4 + 1


def test_large_pictures_wait_at_the_door_until_others_are_answered():
    """Eleven pictures of 16 megapixels are what one client may hold. Others may hold as many, and nobody's memory is forgotten while it is held."""
    queue, large = Queue(limit=86400, longest=86400), np.zeros((4000, 4000, 3), np.uint8)
    def come(client):
        job = Job(Plan((replace(APPLE, init=large[:]),)), client=client)
        queue.submit(job, [Task(key=SHAPE, steps_left=1, arrived=queue.clock(), client=client, job=job, index=0, picture=APPLE)], GPU)
        return job
    mine = [come("mine") for _ in range(11)]
    with pytest.raises(PixelsFull, match="Your pictures that are being drawn take 503 MiB"): come("mine")
    theirs = [come("theirs") for _ in range(11)]
    assert len([come(f"stranger {i}") for i in range(5)]) == 5       # a quarter is for those who hold nothing
    with pytest.raises(PixelsFull, match="The pictures that are being drawn"): come("a third")
    assert len(theirs) == 11 and submit(queue, "mine", 1)            # what needs no pictures is taken
    for job in mine: queue.end(job)
    come("mine")


def test_each_picture_under_one_mask_counts_as_it_will_be():
    """Ten of them share what they start from, and are ten pictures in the end. Each counts until its file is made."""
    queue, (side, n) = Queue(limit=86400, longest=86400), (2000, 10)
    def come():
        whole = Inpainting(Pillow.new("RGB", (side, side)), Pillow.new("L", (side, side), 255), Region(0, 0, side, side))
        job = Job(Plan((replace(APPLE, inpainting=whole),) * n), client="me")
        queue.submit(job, [Task(key=SHAPE, steps_left=1, arrived=0.0, client="me", job=job, index=i, picture=p) for i, p in enumerate(job.plan.pictures)], GPU)
        return job
    jobs, full = [], (4 + 3 * n) * side * side
    with pytest.raises(PixelsFull, match="Your pictures"):
        while True: jobs.append(come())
    assert len(jobs) == MOST_PIXELS // 2 // full == 3 and bytes_to_come(jobs[0]) == full
    for i in range(n):
        jobs[0].free_inputs(i)
        jobs[0].emit(made := Image(i, Pillow.new("RGB", (side, side))))
        assert bytes_to_come(jobs[0]) == full - (4 * side * side if i == n - 1 else 0) - 3 * i * side * side
        jobs[0].free(made)                        # it is encoded
    assert not bytes_to_come(jobs[0]) and jobs[0].log[-1].image is None
    come()


def test_pasting_is_shared_fairly():
    thread, gate, order = FairThread("test"), threading.Event(), []
    greedy = [thread.submit("greedy", lambda i=i: (gate.wait(10), order.append(("greedy", i)))) for i in range(6)]
    modest = [thread.submit("modest", lambda i=i: order.append(("modest", i))) for i in range(2)]
    broken = thread.submit("modest", lambda: 1 / 0)
    gate.set()
    for chore in (*greedy, *modest): chore.result(10)
    assert isinstance(broken.exception(10), ZeroDivisionError)
    assert order.index(("modest", 1)) <= 3 and [i for who, i in order if who == "greedy"] == list(range(6))


def test_pastes_of_a_job_that_was_given_up_leave_the_line_with_their_pictures():
    """Twelve jobs of ten pictures are cancelled while their first picture is pasted. Nothing waits, and nothing is held."""
    class Whole:
        def paste(self, drawn):
            pasted.append(1)
            gate.wait(10)
            return drawn

    queue, gate, pasted, begun = Queue(limit=86400, longest=86400), threading.Event(), [], []
    pasting = Pasting(queue.wake)
    for _ in range(12):
        whole = Whole()
        job, held = submit(queue, "greedy", 1, n=10), weakref.ref(whole)
        for task in queue.tasks:
            if task.job is not job: continue
            task.picture = replace(APPLE, inpainting=whole)
            pasting.begin(task, (None, False))
        while not pasted: pass                    # the first is being pasted
        queue.end(job, Cancelled("gone"))
        begun.append(held)
        del whole, task, job
    assert not queue.tasks and not pasting.thread.waiting
    modest = pasting.thread.submit("modest", pasted.append, 2)
    gate.set()
    modest.result(10)
    assert pasted == [1, 2]
    gc.collect()
    assert not any(held() for held in begun)


def test_what_is_done_beside_the_device_makes_no_promise_late():
    """Masked pictures that are pasted for a long time: the factor that everybody shares stays where it is."""
    queue, now = Queue(limit=100, longest=600), 0.0
    queue.clock = lambda: now
    for _ in range(20):
        job = submit(queue, "masked", 1)
        promised = job.log[0].eta_seconds
        now += promised
        queue.admission.promises.decoded(job, now)
        now += 60
        queue.end(job)
    assert queue.admission.lateness.factor(False) == pytest.approx(1.0, abs=.01) and not queue.admission.promises


def test_one_client_moves_the_shared_factor_by_little():
    late = Lateness()
    for i in range(1000): late.observe(False, .01, 100.0, "greedy", now=i / 1000)
    assert late.factor(False) < 1.11
    for i in range(20): late.observe(False, 1.0, .1, f"client {i}", now=1.0)
    assert late.factor(False) < 1 and len(late._taught) == 21


def test_after_the_end_nobody_waits_for_ever():
    queue = Queue(limit=100, longest=600)
    job = submit(queue, "", 4)
    queue.stop(QueueFull("no more"))
    assert isinstance(job.log[-2], Failed) and isinstance(job.log[-1], Done) and job.status is JobStatus.failed
    with pytest.raises(QueueFull, match="no more"): submit(queue, "", 4)


# what a job holds

def test_previews_are_bounded_and_the_log_keeps_its_places():
    job, pixels = Job(Plan((APPLE,))), np.zeros((256, 256, 3), "uint8")
    for step in range(200):
        job.emit(Step(0, step, 200))
        job.emit(Preview(0, pixels))
    job.emit(Image(0, Pillow.new("RGB", (64, 64))))
    job.emit(Done())
    assert job.nbytes <= PREVIEW_BYTES + 64 * 64 * 3 and len(job.log) == 402
    assert [type(e) for e in job.log[:4]] == [Step, Preview, Step, Preview] and job.log[1].image is None
    read = list(job.events())
    assert not any(isinstance(e, Preview) and e.image is None for e in read) and isinstance(read[-3], Preview)
    assert len(read) == sum(not (isinstance(e, Preview) and e.image is None) for e in job.log)


@pytest.fixture(scope="module")
def engine():
    with Engine(load_settings(SD_MODEL_ID="embedded", SD_DEVICE="cpu", SD_BACKEND="torch")).start() as engine:
        assert engine.wait_ready(300), engine.reason
        yield engine


def test_a_picture_to_start_from_is_freed_once_it_is_encoded(engine):
    import hashlib
    photo = engine.submit(Plan((APPLE,))).result(60)[0].image
    job = engine.submit(Plan((replace(APPLE, init=photo, strength=0.5, steps=2, steps_asked=4),) * 2))
    first = job.result(60)[0]
    assert all(p.init is None for p in job.plan.pictures)
    assert job.nbytes == 2 * 128 * 128 * 3
    assert first.receipt.init_sha256 == hashlib.sha256(photo.tobytes()).hexdigest()
    assert (first.receipt.steps, first.receipt.steps_asked) == (2, 4)


def test_a_short_request_passes_a_flood_in_the_engine(engine, monkeypatch):
    """Counted in UNet calls: the stranger needs its own steps, and waits for the call that is running."""
    monkeypatch.setattr(engine.queue.admission, "limit", 1e6)      # however slow this machine is today
    gate, calls = threading.Event(), []
    hook = engine.parts.unet.register_forward_pre_hook(lambda m, args: (calls.append(1), gate.wait(60))[1] and None)
    engine.queue.shares.charge("flood", 60.0)
    flood = [engine.submit(Plan((replace(APPLE, steps=50),)), client="flood") for _ in range(6)]
    while not calls: pass
    stranger = engine.submit(Plan((APPLE,)), client="stranger")
    gate.set()
    stranger.result(120)
    hook.remove()
    for job in flood: job.cancel()
    assert len(calls) <= 1 + APPLE.steps + 2 and not any(job.status is JobStatus.succeeded for job in flood)


def test_health_knows_the_models_limits(engine):
    health = engine.health()
    assert health.limits.steps == engine.row.steps and health.limits.native == engine.row.native and health.limits.mask
    assert health.to_json()["limits"]["steps"] == list(engine.row.steps) and health.memory["rss"] > 0


# files

DAMAGE = {"a list": "[]", "null": "null", "no number": '{"1": "x"}', "a curve without numbers": '{"a": {"1": "x"}}', "cut": '{"a": {"1": 0.',
          "empty": "", "zeros": "\0" * 4096, "deep": "[" * 100_000, "negative": '{"a": {"1": -1}}', "infinite": '{"a": {"1": Infinity}}',
          "a gap": '{"a": {"1": 1, "4": 2}}', "not text": b"\xff\xfe\xff", "absurd later": '{"a": {"1": 0.5, "2": 900}}',
          "falling": '{"a": {"1": 0.5, "2": 0.1}}', "a number of 400 digits": '{"a": {"1": 1%s}}' % ("0" * 400), "texts": '{"a": {"1": "0.5"}}',
          "huge": b" " * 2**21}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_of_curves_is_measured_again_and_written_whole(tmp_path, how):
    path, data = tmp_path / "step_cost.json", DAMAGE[how]
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    file = CurveFile(path)
    curve = file.curve("ours", lambda rows: None, 4)
    assert curve_from(json.loads(json.dumps(curve))) == curve and len(file.notes) == 1 and "damaged" in file.notes[0]
    healed, whole = read_curves(path)
    assert whole and set(healed) == {"ours"} and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_one_damaged_entry_does_not_cost_the_others(tmp_path):
    path = tmp_path / "step_cost.json"
    path.write_text('{"good": {"1": 1.0, "2": 1.5}, "bad": {"1": "x"}}')
    CurveFile(path).curve("ours", lambda rows: None, 1)
    assert list(read_curves(path)[0]) == ["good", "ours"]


def test_the_file_of_curves_keeps_the_newest(tmp_path):
    file = CurveFile(tmp_path / "step_cost.json", keep=5)
    for i in range(12): file.curve(f"model {i}", lambda rows: None, 1)
    assert list(read_curves(file.path)[0]) == [f"model {i}" for i in range(7, 12)]


def test_a_disk_that_takes_nothing_costs_time_only(tmp_path):
    (tmp_path / "file").write_text("in the way")
    file = CurveFile(tmp_path / "file" / "step_cost.json")
    assert file.curve("ours", lambda rows: None, 2) and "measured times are not kept" in file.notes[-1]


def in_place_of(path, what):
    """Put something that is no file where a file should be."""
    if what == "folder": path.mkdir()
    elif what == "full folder": (path / "more").mkdir(parents=True)
    elif what == "pipe": os.mkfifo(path)
    elif what == "loop": path.symlink_to(path)
    elif what == "nowhere": path.symlink_to(path.with_name("nothing"))
    else:
        with socket.socket(socket.AF_UNIX) as s: s.bind(str(path))


@pytest.mark.parametrize("what", ["folder", "full folder", "pipe", "loop", "nowhere", "socket"])
def test_something_else_in_the_place_of_a_cache_file_heals_or_is_named(tmp_path, what):
    """None of them is waited for. A folder that holds something is somebody's: it stays, and its name is told."""
    path = tmp_path / "step_cost.json"
    in_place_of(path, what)
    file = CurveFile(path)
    assert file.curve("ours", lambda rows: None, 2)
    if what == "full folder": assert any("step_cost.json" in note and "directory" in note for note in file.notes)
    else: assert path.is_file() and list(read_curves(path)[0]) == ["ours"]
    trials = TrialsFile(tmp_path / "precision.json")
    in_place_of(trials.path, what)
    assert trials.read("ours") == []
    trials.write("ours", [Measured("torch", "fp32", 0.5, 99.0, 0)])
    assert bool(trials.read("ours")) is (what != "full folder")


TWO = """
import sys, pathlib
from aura_engine.batching import CurveFile
for i in range(40): CurveFile(pathlib.Path(sys.argv[1]), keep=200).curve(f"{sys.argv[2]} {i}", lambda rows: None, 1)
"""


def test_two_servers_on_one_cache_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "step_cost.json"
    both = [subprocess.Popen([sys.executable, "-c", TWO, str(path), name]) for name in "ab"]
    while any(p.poll() is None for p in both):
        curves, whole = read_curves(path)
        assert whole
    assert [p.returncode for p in both] == [0, 0]
    curves, whole = read_curves(path)
    assert whole and {"a 39", "b 39"} & set(curves) and not list(tmp_path.glob("*.part"))


def test_an_engine_starts_on_a_damaged_cache_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "aura_engine" / "step_cost.json"
    kept.parent.mkdir()
    kept.write_text("null")
    for noted in (True, False):
        with Engine(load_settings(SD_MODEL_ID="embedded", SD_DEVICE="cpu", SD_BACKEND="torch", SD_PRECISION="fp32", AURA_MAX_BATCH="2")).start() as engine:
            assert engine.wait_ready(300), engine.reason
            assert any("damaged" in w for w in engine.health().warnings) == noted


def test_nothing_follows_the_end_of_a_job_that_two_threads_write():
    """The engine is closed while its thread is about to append a step."""
    inside, go_on = threading.Event(), threading.Event()

    class Slow(Job):
        def append(self, event):
            if isinstance(event, Step):
                inside.set()
                go_on.wait(.2)                    # the other thread runs now
            super().append(event)

    queue, job = Queue(limit=120, longest=600), Slow(Plan((APPLE,)))
    stepping = threading.Thread(target=job.emit, args=(Step(0, 1, 4),))
    stepping.start()
    assert inside.wait(10)
    queue.end(job, ShuttingDown("closed"))
    go_on.set()
    stepping.join()
    assert [type(e) for e in job.log[-2:]] == [Failed, Done] and job.status is JobStatus.failed
    with pytest.raises(ShuttingDown): job.result(0)
