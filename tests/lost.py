"""What is lost when engines stop: `python tests/lost.py` tells the answers of each event, behind nginx and on Ray Serve, and keeps them.

Redis and nginx have to be installed. Without Ray, or without Linux namespaces, the column of Ray is what was kept before."""
import json, subprocess, sys, tempfile, time
from pathlib import Path

from conftest import ROOT, clean_env, free_port
from crowd import under_load, until
from test_many_engines import LONG, STARTED, House, post, wait
from test_ray import can_run, in_own_network

KEPT = ROOT / "nbs/bench/lost.json"
FOX = {"prompt": "a fox", "steps": 8}
EVENTS = ("killed", "told_to_stop", "restarted", "scaled", "loading", "full", "redis_away")


def ask(house, during, clients=8, body=FOX): return {"answers": under_load(f"http://127.0.0.1:{house.port}", clients, body, during)}


def with_job(house, end):
    """An engine ends under eight clients, and has a job."""
    jobs = {}
    def during():
        with house.of("e1") as e1, house.of("e2") as e2:
            jobs["id"] = post(e1)["id"]
            wait(e2, jobs["id"], over=STARTED)
        end(house.engines["e1"].process)
        house.engines["e1"].process.wait(120)
    told = ask(house, during)
    with house.of("e2") as e2: job = wait(e2, jobs["id"], 60)
    house.engines["e1"] = house.engine("e1").wait_ready()
    return told | {"job": job.status_code, "ask": "ask" in job.json()}


def killed(house): return with_job(house, lambda process: process.kill())


def told_to_stop(house): return with_job(house, lambda process: process.terminate())


def restart(house, name, **more):
    house.engines[name].process.terminate()
    assert house.engines[name].process.wait(120) == 0
    house.engines[name] = house.engine(name, **more).wait_ready()


def restarted(house): return ask(house, lambda: [restart(house, name) for name in ("e1", "e2")])


def scaled(house):
    """A third engine comes and goes."""
    port = house.ports["e3"] = free_port()
    def during():
        more = house.engine("e3").wait_ready()
        del house.ports["e3"]
        house.name_engines(("e3", port))
        house.reload()
        time.sleep(5)
        house.name_engines()
        house.reload()
        more.process.terminate()
        assert more.process.wait(60) == 0
    return ask(house, during)


def loading(house):
    """An engine is killed, and another one loads at its address, which the balancer asks all the time."""
    def during():
        house.engines["e1"].process.kill()
        house.engines["e1"].process.wait()
        house.engines["e1"] = house.engine("e1").wait_ready()
    return ask(house, during)


def full(house):
    for name in ("e1", "e2"): restart(house, name, AURA_MAX_QUEUE_SECONDS=2)
    told = ask(house, lambda: time.sleep(15), body={"prompt": "a fox", "steps": 50, "n": 4})
    for name in ("e1", "e2"): restart(house, name)            # the next event finds engines that promise what they usually do
    return told


def redis_away(house):
    said = {}
    def during():
        house.redis.kill()
        house.redis.wait()
        short = LONG | {"request": {"prompt": "an owl", "steps": 2}}
        id = post(house.door, short)["id"]
        said["job while away"] = wait(house.door, id).json()["status"]
        house.redis = house.start_redis()
        until(lambda: house.door.get(f"/jobs/{id}").status_code == 200)
        said["job after"] = house.door.get(f"/jobs/{id}").status_code
        said["new job"] = wait(house.door, post(house.door, short)["id"]).json()["status"]
    return ask(house, during, clients=3) | said


def behind_nginx():
    with tempfile.TemporaryDirectory() as folder:
        house = House(Path(folder))
        told = {}
        try:
            for name in EVENTS:
                told[name] = globals()[name](house)
                print("nginx", name, told[name], file=sys.stderr, flush=True)
        finally: house.stop()
    return told


def on_ray():
    parts = {"killed": "killed", "told_to_stop": "told_to_stop", "updated": "restarted", "scaled": "scaled", "loading": "loading", "full": "full", "redis_away": "redis_away"}
    with tempfile.TemporaryDirectory() as cache:
        command = in_own_network([sys.executable, str(ROOT / "tests/ray_house.py"), *parts])
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=clean_env(PYTHONPATH=ROOT, XDG_CACHE_HOME=cache), check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    return {name: told[part] for part, name in parts.items()}


def main():
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    kept["date"] = time.strftime("%Y-%m-%d")
    columns = {"nginx": behind_nginx} | ({"ray": on_ray} if can_run() else {})
    for name, measure in columns.items():
        kept[name] = measure()
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")       # kept even if the other one fails


if __name__ == "__main__": main()
