"""The engine under load: invariance, cancel, recovery, admission. One engine on the embedded model serves all tests here."""
import gc
import platform
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from aura_engine.batching import Curve, Entry, eta
from aura_engine.config import load_settings
from aura_engine.engine import Engine
from aura_engine.masks import Inpainting, Region
from aura_engine.queue import Lateness
from aura_engine.runner import key_of
from aura_engine.trajectory import TextCache, Trajectory, advance
from aura_engine.types import AuraError, Cancelled, DeadlineExceeded, Degenerate, EngineFailed, Image, Invalid, NotReady, OutOfMemory, Picture, Plan, Preview, QueueFull, ShuttingDown, Step

APPLE = Picture("a red apple", 128, 128, steps=4, guidance_scale=1.0, seed=7)


def make(**env):
    """On torch, where hooks into the model can provoke what has to be survived."""
    engine = Engine(load_settings(SD_MODEL_ID="embedded", SD_DEVICE="cpu", **{"SD_BACKEND": "torch"} | env)).start()
    assert engine.wait_ready(300), engine.reason
    return engine


@pytest.fixture(scope="module")
def engine():
    engine = make()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def photo(engine):
    return picture(engine, APPLE)


def picture(engine, p):
    return engine.submit(Plan((p,))).result(120)[0].image


def pixels(im):
    return np.asarray(im, dtype=int)


def random_picture(rng, photo):
    init = photo if rng.random() < 0.4 else None
    return replace(APPLE, prompt=rng.choice(["a fox", "a red apple on a blue background", "an owl and a cat " * 9]), seed=rng.randrange(10**6),
                   steps=rng.randint(1, 8), guidance_scale=rng.choice([1.0, 1.0, 2.0, 4.0]), temperature=rng.choice([0, 0.5, 1.0, 2.0]),
                   scheduler=rng.choice([None, "ddim", "euler", "dpm"]), init=init, strength=rng.choice([0.3, 0.5, 1.0]) if init else None)


@pytest.mark.parametrize("seed", range(3))
def test_the_picture_does_not_depend_on_company(engine, photo, seed):
    """Random mixes, arriving at random, some cancelled at random steps: each that finished equals its lone run."""
    rng = random.Random(seed)
    asked = [random_picture(rng, photo) for _ in range(14)]
    jobs = []
    for p in asked:
        jobs.append(engine.submit(Plan((p,))))
        if rng.random() < 0.4: time.sleep(rng.random() * 0.1)
        if rng.random() < 0.2: rng.choice(jobs).cancel()
    for job in jobs: list(job.events(120))
    finished = [(p, j) for p, j in zip(asked, jobs) if j.status == "succeeded"]
    assert len(finished) >= 5
    wrong = places = total = 0
    for p, job in finished:
        gap = np.abs(pixels(job.result()[0].image) - pixels(picture(engine, p)))
        wrong, places, total = max(wrong, gap.max()), places + (gap > 0).sum(), total + gap.size
    assert wrong <= 1 and places <= 1e-4 * total, (wrong, places, total)


@pytest.mark.parametrize("bucket", [4, 8])
def test_same_bucket_same_bits(engine, photo, bucket):
    """In calls of one size, whoever else is in them and in whatever place, latents are equal to the last bit."""
    rng, texts = random.Random(bucket), TextCache(engine.parts)
    asked = [replace(random_picture(rng, photo), prompt="a fox") for _ in range(10)]

    def run(pictures, shuffle):
        crowd = [Trajectory(engine.parts, p, texts) for p in pictures]
        while waiting := [t for t in crowd if not t.done]:
            if shuffle: rng.shuffle(waiting)
            batch = []
            for t in waiting:
                if sum(b.rows for b in batch) + t.rows <= bucket and rng.random() < 0.8: batch.append(t)
            if batch: advance(batch, engine.parts.unet, bucket)
        return [t.latents for t in crowd]

    assert all(torch.equal(a, b) for a, b in zip(run(asked, True), [x for p in asked for x in run([p], False)]))


def test_pictures_of_one_request_are_reproducible_alone(engine):
    plan = Plan(tuple(replace(APPLE, seed=50 + i) for i in range(4)))
    images = engine.submit(plan).result(120)
    assert [im.receipt.seed for im in images] == [50, 51, 52, 53]
    assert len({im.image.tobytes() for im in images}) == 4
    assert np.abs(pixels(images[2].image) - pixels(picture(engine, replace(APPLE, seed=52)))).max() <= 1


def test_pictures_that_finish_together_are_decoded_together(engine, monkeypatch):
    """Where the decode's curve pays: one VAE call for several, the same pictures. One that went wrong fails alone."""
    asked = [replace(APPLE, seed=70 + i) for i in range(4)]
    alone, sizes = [picture(engine, p) for p in asked], []
    native = engine.cost.native
    monkeypatch.setitem(engine.cost.decode.known, native, Curve({1: 10.0, 2: 10.0, 4: 10.0}))
    monkeypatch.setitem(engine.cost.step.known, native, Curve({1: 0.1, 2: 0.1, 4: 0.1, 8: 0.1}))
    hook = engine.parts.vae.decoder.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    try:
        images = engine.submit(Plan(tuple(asked))).result(120)
        assert max(sizes) == 4, sizes
        assert all(np.abs(pixels(im.image) - pixels(ref)).max() <= 1 for im, ref in zip(images, alone))
    finally: hook.remove()


def test_temperature_zero_is_the_prompt_alone(engine):
    cold = [picture(engine, replace(APPLE, temperature=0, seed=s)).tobytes() for s in (1, 2)]
    warm = [picture(engine, replace(APPLE, temperature=1.0, seed=s)).tobytes() for s in (1, 2)]
    assert cold[0] == cold[1] and warm[0] != warm[1]


def test_cancel_wastes_at_most_one_call(engine):
    """After cancel() returns, at most the UNet call that is running is lost. A queued job never starts."""
    running = engine.submit(Plan((replace(APPLE, steps=50),)))
    next(e for e in running.events(60) if isinstance(e, Step) and e.step == 2)
    queued = engine.submit(Plan((replace(APPLE, prompt="never begun", steps=50),)))
    queued.cancel(); running.cancel()
    before = engine.runner.unet_calls
    assert isinstance(list(running.events(60))[-2].error, Cancelled)
    list(queued.events(60))
    assert engine.runner.unet_calls - before <= 1
    assert not any(isinstance(e, Step) for e in queued.log)


def test_deadline():
    engine = make(AURA_DEADLINE_SECONDS="0.05")
    job = engine.submit(Plan((replace(APPLE, steps=50),)))
    with pytest.raises(AuraError) as e: job.result(60)
    assert e.value.code == "deadline" and job.done
    engine.close()


@pytest.fixture
def gate(engine):
    """UNet calls wait for it -> (calls begun, event). Afterwards the engine forgets what the waiting taught it of costs."""
    calls, opened, steps, late = [], threading.Event(), dict(engine.cost.step.known), engine.queue.admission.lateness
    engine.queue.admission.lateness = Lateness()
    hook = engine.parts.unet.register_forward_pre_hook(lambda m, args: (calls.append(1), opened.wait(60))[1] and None)
    yield calls, opened
    opened.set()
    while engine.health().queue.length: time.sleep(0.01)
    hook.remove()
    engine.cost.step.known, engine.queue.admission.lateness = steps, late


def alone(engine, p):
    """Predicted seconds of one picture with nobody else there."""
    key, rows = key_of(engine.runner.texts, p)
    mine = [Entry(key=key, rows=rows, steps_left=p.steps, arrived=0.0, begin=engine.cost.begin(key, False))]
    return eta(mine, mine, engine.cost)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition(): assert time.monotonic() < end; time.sleep(0.005)


def test_a_requests_own_deadline_stops_it_at_the_next_step(engine, gate):
    """The running one loses no more than the call it is in. The queued one never begins."""
    calls, opened = gate
    long = replace(APPLE, steps=20)
    running = engine.submit(Plan((long,), deadline=1.2 * alone(engine, long)))
    wait_for(lambda: calls)
    patient = engine.submit(Plan((replace(APPLE, seed=8),)))
    queued = engine.submit(Plan((replace(APPLE, prompt="never begun"),), deadline=3 * (patient.log[0].eta_seconds + alone(engine, APPLE))))
    time.sleep(max(running.deadline, queued.deadline) + 0.01 - time.monotonic())
    opened.set()
    for job in (running, queued):
        with pytest.raises(DeadlineExceeded, match=f"{job.seconds:g}"): job.result(60)
    assert [e.step for e in running.log if isinstance(e, Step)] == [1] and not any(isinstance(e, Step) for e in queued.log)
    assert len(patient.result(60)) == 1 and patient.seconds == engine.settings.deadline_seconds


def test_a_deadline_that_cannot_be_kept_is_refused_at_once(engine, gate):
    """By the others' work: 429, with when to come back. By the engine itself: what it takes at least, and at most."""
    calls, _ = gate
    long = replace(APPLE, steps=50)
    crowd = [engine.submit(Plan((long,))) for _ in range(8)]
    wait_for(lambda: calls)
    there, least = engine.health().queue.length, alone(engine, long)
    with pytest.raises(QueueFull) as e: engine.submit(Plan((long,), deadline=1.05 * least))
    assert e.value.retry_after >= 1 and "deadline" in e.value.detail
    for wrong, said in ((0.5 * least, "at least"), (2 * engine.settings.deadline_seconds, f"at most {engine.settings.deadline_seconds:g}")):
        with pytest.raises(Invalid) as e: engine.submit(Plan((long,), deadline=wrong))
        assert e.value.errors[0].loc == "deadlineSeconds" and said in e.value.errors[0].allowed
    assert engine.health().queue.length == there
    for job in crowd: job.cancel()


def test_admission_refuses_by_predicted_seconds(engine):
    tight = make(AURA_MAX_QUEUE_SECONDS="0.5")
    jobs = []
    with pytest.raises(QueueFull) as e:
        for _ in range(500): jobs.append(tight.submit(Plan((replace(APPLE, steps=8),))))
    assert e.value.retry_after > 0 and jobs and tight.health().queue.length <= len(jobs)
    for job in jobs: job.cancel()
    tight.close()
    with pytest.raises(ShuttingDown): tight.submit(Plan((APPLE,)))


def test_previews_lead_to_the_picture(engine):
    """One preview a step, and the last one is close to the finished picture."""
    job = engine.submit(Plan((APPLE,)), previews=True)
    final = pixels(job.result(60)[0].image)
    previews = [e.image for e in job.log if isinstance(e, Preview)]
    assert len(previews) == 4 and previews[0].shape == (16, 16, 3)
    small = final.reshape(16, 8, 16, 8, 3).mean((1, 3))
    assert np.abs(previews[-1] - small).mean() < np.abs(small - small.mean()).mean() + 10


@pytest.fixture
def fault(engine):
    hooks = []
    yield lambda f: hooks.append(engine.parts.unet.register_forward_pre_hook(f))
    for h in hooks: h.remove()
    engine.turns.recovery.rows = engine.settings.max_batch


def test_out_of_memory_makes_the_batch_smaller(engine, fault):
    reference = [picture(engine, replace(APPLE, seed=s)) for s in range(5)]

    def small_device(module, args):
        if args[0].shape[0] > 1: raise torch.OutOfMemoryError("provoked")
    fault(small_device)
    jobs = [engine.submit(Plan((replace(APPLE, seed=s),))) for s in range(5)]
    for job, ref in zip(jobs, reference): assert np.abs(pixels(job.result(120)[0].image) - pixels(ref)).max() <= 1


def test_out_of_memory_in_the_decode_is_survived(engine, photo):
    """First try without memory: the picture comes, its receipt says how. The next one is made as ever."""
    failing = [1]

    def full(module, args):
        if failing and failing.pop(): raise torch.OutOfMemoryError("provoked")
    hook = engine.parts.vae.decoder.register_forward_pre_hook(full)
    try: saved = engine.submit(Plan((APPLE,))).result(120)[0]
    finally: hook.remove()
    assert not failing and saved.image.tobytes() == photo.tobytes() and any("memory" in c for c in saved.receipt.corrections)
    after = engine.submit(Plan((APPLE,))).result(120)[0]
    assert after.image.tobytes() == photo.tobytes() and not after.receipt.corrections and not engine.parts.vae.use_tiling


def test_out_of_memory_for_good_is_an_answer_and_leaves_no_trace(engine, fault, photo):
    def full(module, args): raise torch.OutOfMemoryError("provoked, 17 GiB at /dev/secret")
    fault(full)
    with pytest.raises(OutOfMemory) as e: picture(engine, APPLE)
    assert e.value.retry_after and "secret" not in e.value.detail
    engine.parts.unet._forward_pre_hooks.clear()
    assert picture(engine, APPLE).tobytes() == photo.tobytes()


def test_one_poisoned_request_does_not_take_its_neighbours(engine, fault, caplog):
    """A request whose own latents make the model raise fails alone, even when it shared a call. The log has the traceback."""
    gate = threading.Event()

    def poison(module, args):
        gate.wait(20)
        if (args[0].abs() > 1e5).any(): raise RuntimeError("boom")
    fault(poison)
    jobs = [engine.submit(Plan((replace(APPLE, seed=s),))) for s in range(4)]
    bad = engine.submit(Plan((replace(APPLE, seed=99),)))
    while not (entries := [t for t in engine.queue.tasks if t.job is bad]): time.sleep(0.01)
    t = Trajectory(engine.parts, entries[0].picture, TextCache(engine.parts)); t.latents = t.latents * 1e6
    entries[0].trajectory = t
    gate.set()
    with pytest.raises(EngineFailed) as failed: bad.result(60)
    assert all(len(j.result(60)) == 1 for j in jobs)
    told = next(r for r in caplog.records if getattr(r, "incident", "?") in failed.value.detail)
    assert told.exc_info[2].tb_frame.f_code.co_name == "turn"


def test_a_preview_that_fails_costs_nobody_a_step(engine, fault, monkeypatch):
    """Pictures that shared the call have taken their step, so they are not stepped again."""
    gate, preview, calls = threading.Event(), engine.turns.runner.preview, []

    def once(task):
        calls.append(task.index)
        if len(calls) == 1: raise RuntimeError("no preview")
        return preview(task)
    monkeypatch.setattr(engine.turns.runner, "preview", once)
    monkeypatch.setitem(engine.cost.step.known, engine.cost.native, Curve({1: 0.1, 2: 0.1, 4: 0.1, 8: 0.1}))
    fault(lambda module, args: gate.wait(20) and None)
    first = engine.submit(Plan((APPLE,)))                   # while it waits at the gate, the others come
    two = [engine.submit(Plan((replace(APPLE, seed=s),)), previews=True) for s in (40, 41)]
    gate.set()
    images = [job.result(60)[0].image for job in (first, *two)]
    references = [picture(engine, replace(APPLE, seed=s)) for s in (7, 40, 41)]
    assert len(calls) > 2 and all(np.abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(images, references))


def test_a_black_picture_is_an_error(engine):
    hook = engine.parts.unet.register_forward_hook(lambda m, a, out: (out[0] * float("nan"),))
    try:
        with pytest.raises(Degenerate): picture(engine, APPLE)
    finally: hook.remove()


def test_damaged_weights_of_the_right_size_never_become_ready(tmp_path):
    """They load without an error. The self-test picture is what catches them."""
    import shutil
    from safetensors.torch import load_file, save_file
    from aura_engine.models import EMBEDDED
    shutil.copytree(EMBEDDED, tmp_path / "m")
    f = tmp_path / "m/unet/diffusion_pytorch_model.safetensors"
    save_file({k: v * float("nan") for k, v in load_file(f).items()}, f, metadata={"format": "pt"})
    engine = Engine(load_settings(SD_MODEL_ID=str(tmp_path / "m"))).start()
    assert not engine.wait_ready(120) and engine.health().status == "failed"
    with pytest.raises(NotReady): engine.submit(Plan((APPLE,)))


def test_a_crash_of_the_thread_fails_everybody_at_once(monkeypatch):
    engine = make()
    job = engine.submit(Plan((replace(APPLE, steps=50),)))
    next(e for e in job.events(60) if isinstance(e, Step))
    monkeypatch.setattr(engine.turns, "_fail", None)
    monkeypatch.setattr(engine.turns, "step", None)
    with pytest.raises(EngineFailed): job.result(30)
    assert not engine.ready and engine.health().reason


def test_health_stays_quick_while_the_engine_works(engine):
    """No bound on time here (benchmarks measure it): health never waits for a step."""
    job = engine.submit(Plan(tuple(replace(APPLE, steps=50, seed=s) for s in range(4))))
    next(e for e in job.events(60) if isinstance(e, Step))
    calls = engine.runner.unet_calls
    for _ in range(200): assert engine.health().queue.length >= 1
    assert engine.runner.unet_calls - calls < 100
    job.cancel()


HEAP = """
import ctypes, re
from aura_engine.config import load_settings
from aura_engine.engine import Engine
malloc, at = ctypes.CDLL(None).malloc, []
malloc.restype = ctypes.c_void_p
Engine._run = lambda self: at.append(malloc(100_000))
Engine(load_settings(SD_MODEL_ID="embedded")).start().thread.join()
print(any(int(a, 16) <= at[0] < int(b, 16) for a, b in re.findall(r"^(\\w+)-(\\w+) .*\\[heap\\]$", open("/proc/self/maps").read(), re.M)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_the_engines_thread_uses_the_main_heap():
    """Its own would be the one that loading the model left full of holes. Calls there were measurably slower."""
    done = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, timeout=300)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.slow
def test_memory_is_flat_over_500_mixed_requests(engine, photo):
    """RSS after requests with cancels and failures: the second half may not lie more than 5 % above the first."""
    def rss(): gc.collect(); return int(open("/proc/self/statm").read().split()[1]) * 4096
    rng, marks = random.Random(0), []
    for i in range(500):
        job = engine.submit(Plan((random_picture(rng, photo),)), previews=rng.random() < 0.5)
        if rng.random() < 0.2: job.cancel()
        if i % 8 == 7: list(job.events(120))
        if i % 50 == 49:
            while engine.health().queue.length: time.sleep(0.01)
            marks.append(rss())
    assert max(marks[5:]) < 1.05 * max(marks[2:5]), [m // 2**20 for m in marks]


def test_images_come_in_the_log_of_the_job(engine):
    job = engine.submit(Plan((APPLE, replace(APPLE, seed=8))))
    list(job.events(60))
    assert sorted(e.index for e in job.log if isinstance(e, Image)) == [0, 1] and job.status == "succeeded"
    assert list(job.events()) == list(job.events())          # any number of readers, from the first event


@pytest.fixture
def no_engines(monkeypatch):
    """The environment of a notebook, no engine shared yet -> the list of loads that will have been made."""
    import aura_engine.engine as room
    from aura_engine.album import close_desks
    close_desks()
    for name, value in {"SD_MODEL_ID": "embedded", "SD_DEVICE": "cpu", "SD_BACKEND": "torch"}.items(): monkeypatch.setenv(name, value)
    loads, load = [], room.load
    monkeypatch.setattr(room, "load", lambda *args: (loads.append(args[0]), load(*args))[1])
    yield loads
    close_desks()
    room.close_engines()


def three_cells():
    """What somebody who opens JupyterLab runs first."""
    from aura_engine.widgets import Compare, EngineStatus, Studio
    return [lambda: Studio("offline"), lambda: EngineStatus("offline"), lambda: Compare("offline", "a red apple", x=("steps", [1, 2]), y=("seed", [7]))]


@pytest.mark.parametrize("together", [False, True], ids=["in a row", "at once"])
def test_three_cells_share_one_engine(no_engines, photo, together):
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(3) as pool: widgets = list(pool.map(lambda f: f(), three_cells())) if together else [f() for f in three_cells()]
    studio, status, compare = widgets
    compare.wait(300)
    engines = {w.client.aio.doors[0].engine for w in widgets}
    assert len(engines) == 1 and len(no_engines) == 1
    assert pixels(studio.client.generate("a red apple", seed=7, steps=4, temperature=APPLE.temperature).images[0]).shape == (128, 128, 3)
    shared, = engines
    assert picture(shared, APPLE).tobytes() == photo.tobytes() and len(no_engines) == 1
    status.stop()


def test_a_cell_run_ten_times_costs_no_thread(no_engines):
    for cell in three_cells()[:2]: cell()
    before, threads = len(no_engines), threading.active_count()
    for _ in range(10):
        for cell in three_cells()[:2]: cell()
    wait_for(lambda: threading.active_count() <= threads)
    assert len(no_engines) <= 1 and before <= 1


def test_engines_that_start_at_once_have_the_same_weights(no_engines, photo):
    """Loads that overlap in a process may come out with wrong weights and no word: they do not overlap."""
    from concurrent.futures import ThreadPoolExecutor
    from aura_engine.engine import shared_engine
    settings = [load_settings(AURA_MAX_QUEUE_SECONDS=str(100 + i)) for i in range(3)]
    with ThreadPoolExecutor(6) as pool: leases = list(pool.map(shared_engine, settings * 2))
    assert all(lease.engine.wait_ready(300) for lease in leases)
    assert len({lease.engine for lease in leases}) == len(no_engines) == 3
    for lease in leases[:3]: assert picture(lease.engine, APPLE).tobytes() == photo.tobytes()
    for lease in leases[:3]: lease.close()
    assert all(lease.engine.ready for lease in leases[3:])
    for lease in leases[3:]: lease.close(); lease.close()
    assert not any(lease.engine.ready or lease.engine.thread.is_alive() for lease in leases)


def test_a_failed_shared_engine_says_why_and_is_replaced(no_engines, monkeypatch):
    import aura_engine.engine as room
    from aura_engine.widgets import Studio
    def broken(*args): raise RuntimeError("first line\nno room at /data/someone/models/thing.bin for hf_abcdef")
    with monkeypatch.context() as m:
        m.setattr(room, "load", broken)
        lease = room.shared_engine(load_settings())
        assert not lease.engine.wait_ready(60)
        said = lease.engine.health().reason
    assert "RuntimeError: no room at …/thing.bin for hf_…" in said and "someone" not in said and "abcdef" not in said
    studio = Studio("offline")
    engine = studio.client.aio.doors[0].engine
    assert engine is not lease.engine and engine.wait_ready(300)
    lease.close()
    assert engine.ready


def test_a_large_picture_is_pasted_beside_the_engine(engine, monkeypatch):
    """The engine's thread neither pastes nor reads the whole picture. Others are served meanwhile, and a drain waits for it."""
    pasted, go_on, paste = [], threading.Event(), Inpainting.paste
    def held(self, drawn):
        pasted.append(threading.current_thread().name)
        assert go_on.wait(60)
        return paste(self, drawn)
    photo = Pillow.effect_noise((1000, 800), 60).convert("RGB")
    mask = Pillow.new("L", photo.size)
    mask.paste(255, (100, 100, 300, 300))
    under = Inpainting(photo, mask, Region(50, 50, 350, 350), 50)
    start = replace(APPLE, init=under.ready((APPLE.width, APPLE.height)), inpainting=under, strength=0.5)
    monkeypatch.setattr(Inpainting, "paste", held)
    assert "digests" in vars(under) and under.part_mask((APPLE.width, APPLE.height)) is under.part_mask((APPLE.width, APPLE.height))
    job = engine.submit(Plan((start,)))
    other = engine.submit(Plan((APPLE,)))
    assert other.result(60) and not job.done and engine.health().queue.length == 1
    go_on.set()
    made = job.result(60)[0].image
    assert pasted == ["paste_0"] and made.size == photo.size and not engine.queue.tasks and job.nbytes == 3 * 1000 * 800
    assert (pixels(made)[np.asarray(mask) == 0] == pixels(photo)[np.asarray(mask) == 0]).all()
    monkeypatch.setattr(Inpainting, "paste", lambda self, drawn: 1 / 0)
    with pytest.raises(EngineFailed): engine.submit(Plan((start,))).result(60)
    assert engine.ready and picture(engine, APPLE).size == (APPLE.width, APPLE.height)
