"""Two engines on one machine: their curves, alone and beside each other, and what requests at random times take.

`python tests/two_engines.py` keeps it for 19b_capacity, in about nine minutes. Nothing else should run meanwhile, and what was measured beside other programs is not kept."""
import json, os, statistics, subprocess, sys, threading, time
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from aura_engine.capacity import OpenLoad
from aura_engine.fleet import StepCurve
from conftest import ROOT, clean_env, free_port

KEPT = ROOT / "nbs/bench/two_engines.json"
STEPS, CLIENTS = 8, {1: 10, 2: 5, 4: 3, 8: 2, 16: 1}          # pictures asked for at once, and how often
SHARES, SECONDS = (.3, .6), 90


def engine_on(core, port, cache):
    env = clean_env(PORT=port, OMP_NUM_THREADS=1, AURA_LOG_LEVEL="error", XDG_CACHE_HOME=cache, SD_BACKEND="torch", AURA_MAX_QUEUE_SECONDS=600)
    return subprocess.Popen(["taskset", "-c", str(core), sys.executable, "app.py"], cwd=ROOT, env=env, stderr=subprocess.DEVNULL)


def wait_ready(url):
    end = time.monotonic() + 300
    while True:
        assert time.monotonic() < end, url
        try:
            if httpx.get(url + "/ready", trust_env=False).status_code == 200: return
        except httpx.HTTPError: pass
        time.sleep(.3)


def seconds_together(web, clients, steps):
    """Seconds until as many requests as `clients`, which come together, have their pictures."""
    body = {"prompt": "a red apple", "steps": steps, "seed": 1}
    threads = [threading.Thread(target=lambda: web.post("/generate", json=body).raise_for_status()) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return time.perf_counter() - began


def usual_seconds(web, clients, steps): return statistics.median(seconds_together(web, clients, steps) for _ in range(CLIENTS[clients]))


def curve_of(url):
    """A step and a decode by what pictures of 2 and of 32 steps take: 30 steps are the difference, with all that is around them."""
    with httpx.Client(base_url=url, timeout=120, trust_env=False, limits=httpx.Limits(max_connections=64)) as web:
        seconds_together(web, 16, 2)
        few, many = ({n: usual_seconds(web, n, steps) for n in CLIENTS} for steps in (2, 32))
    step = {n: (many[n] - few[n]) / 30 for n in CLIENTS}
    return StepCurve(step, decode=sum(few[n] - 2 * step[n] for n in CLIENTS) / sum(CLIENTS))


def both(urls):
    """The curves of all engines, measured at the same time."""
    curves = {}
    def one(url): curves[url] = curve_of(url)
    threads = [threading.Thread(target=one, args=(url,)) for url in urls]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return list(curves.values())


def mean_curve(curves):
    return StepCurve({n: statistics.mean(curve.step[n] for curve in curves) for n in CLIENTS}, statistics.mean(curve.decode for curve in curves))


def busy_seconds(pids):
    """Processor seconds of this machine so far, and of these processes."""
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, soft, stolen, *_ = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    ours = sum(sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])) for pid in pids)
    return (user + nice + system + irq + soft + stolen) / tick, ours / tick


def row_of_load(urls, pids, share, most, seconds):
    rate = share * most
    pictures = round(seconds * rate)
    before, own = busy_seconds(pids), time.process_time()
    began = time.monotonic()
    made = OpenLoad(urls, STEPS).run(rate, pictures)
    took, after = time.monotonic() - began, busy_seconds(pids)
    cores = len(urls) * took
    mine = (after[1] - before[1]) / cores
    load = (time.process_time() - own) / cores
    return {"share": share, "rate": rate, "pictures": pictures, "failed": made.failed, "mean": made.mean, "p95": made.p95,
            "engines": mine, "load": load, "others": (after[0] - before[0]) / cores - mine - load}


def machine():
    names = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {"name": names[0], "cores": len(names)}


def main(seconds=SECONDS):
    began = time.monotonic()
    def say(*words): print(f"{time.monotonic() - began:.0f} s", *words, file=sys.stderr, flush=True)
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    with TemporaryDirectory() as cache:
        engines = [engine_on(core, port, cache) for core, port in enumerate(ports)]
        try:
            for url in urls: wait_ready(url)
            say("both are ready")
            alone = mean_curve([curve_of(url) for url in urls])
            say("alone", alone)
            beside = mean_curve(both(urls))
            slow = statistics.mean(beside.step[n] / alone.step[n] for n in CLIENTS)
            say("beside each other", beside, f"{slow:.2f} times")
            most = len(urls) * alone.most_a_second(STEPS) / slow
            kept = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "steps": STEPS, "most": most,
                    "alone": vars(alone), "beside": vars(beside), "slow": slow, "loads": []}
            for share in SHARES:
                kept["loads"].append(row_of_load(urls, [engine.pid for engine in engines], share, most, seconds))
                say(kept["loads"][-1])
        finally:
            for engine in engines: engine.kill()
    return kept


if __name__ == "__main__":
    made = main(*map(float, sys.argv[1:2]))
    busiest = max(load["others"] for load in made["loads"])
    if busiest < .1 and len(sys.argv) == 1: KEPT.write_text(json.dumps(made, indent=1) + "\n")
    else: sys.exit(f"not kept: other programs had {busiest:.0%} of the cores, or this was a trial\n{json.dumps(made, indent=1)}")
