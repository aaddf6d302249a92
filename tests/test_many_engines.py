"""Two engines behind nginx with one Redis, as deploy/ has them: jobs are found on any, and nothing is lost."""
import asyncio, shutil, subprocess, sys, threading, time
from collections import Counter

import httpx
import pytest

from aura_engine.shared_jobs import ALIVE_KEPT, StoreUnreachable, shared_jobs
from conftest import ROOT, free_port, start

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (shutil.which("nginx") and shutil.which("redis-server")), reason="nginx and redis-server are not installed")]
STARTED = ("running", "succeeded", "failed")
LONG = {"route": "generate", "request": {"prompt": "an owl", "steps": 50, "n": 2, "seed": 7}}


class House:
    """Redis, two engines named e1 and e2, and nginx before them."""
    def __init__(self, folder):
        self.folder, self.redis_port, self.port = folder, free_port(), free_port()
        self.ports = {"e1": free_port(), "e2": free_port()}
        self.redis = self.start_redis()
        self.engines = {name: self.engine(name) for name in self.ports}
        self.nginx = self.start_nginx()
        self.door = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)
        for engine in self.engines.values(): engine.wait_ready()

    def start_redis(self):
        return subprocess.Popen(["redis-server", "--port", str(self.redis_port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)

    def engine(self, name, **more):
        env = more | {"AURA_REPLICA": name, "AURA_PROXIES": "127.0.0.1", "AURA_GRACE_SECONDS": 90, "AURA_REDIS_URL": f"redis://127.0.0.1:{self.redis_port}/0"}
        log = self.folder / f"{name}-{time.monotonic_ns()}.log"
        return start([sys.executable, "app.py"], log, port=self.ports[name], **env)

    def start_nginx(self):
        conf = self.folder / "nginx"
        shutil.copytree(ROOT / "deploy/nginx", conf)
        self.name_engines()
        (conf / "listen.conf").write_text(f"listen 127.0.0.1:{self.port};")
        return subprocess.Popen(["nginx", "-p", str(self.folder), "-c", str(conf / "nginx.conf"), "-g", "daemon off;"])

    def name_engines(self, more=None):
        """engines.conf with the two engines, and with `more` (name, port), as a person adds one."""
        engines = (ROOT / "deploy/nginx/engines.conf").read_text()
        for i, port in enumerate(self.ports.values(), 1): engines = engines.replace(f"engine{i}:7860", f"127.0.0.1:{port}")
        if more:
            server = f"server 127.0.0.1:{more[1]} max_fails=0;"
            engines = engines.replace("least_conn;", f"least_conn;\n  {server}", 1).replace("map $uri", f"upstream {more[0]} {{ {server} }}\nmap $uri", 1)
            engines = engines.replace("  ~^/jobs/e1-", f"  ~^/jobs/{more[0]}-   {more[0]};\n  ~^/jobs/e1-", 1)
        (self.folder / "nginx/engines.conf").write_text(engines)

    def reload(self):
        subprocess.run(["nginx", "-p", str(self.folder), "-c", str(self.folder / "nginx/nginx.conf"), "-s", "reload"], check=True)
        time.sleep(.5)

    def of(self, name): return httpx.Client(base_url=self.engines[name].url, timeout=60)

    def stop(self):
        self.door.close()
        for process in (self.nginx, *(e.process for e in self.engines.values()), self.redis): process.kill()


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    house = House(tmp_path_factory.mktemp("house"))
    yield house
    house.stop()


def post(client, body=LONG):
    answer = client.post("/jobs", json=body)
    assert answer.status_code == 202, answer.text
    return answer.json()


def wait(client, id, seconds=60, over=("succeeded", "failed", "cancelled")):
    end = time.monotonic() + seconds
    while True:
        answer = client.get(f"/jobs/{id}")
        if answer.json()["status"] in over: return answer
        assert time.monotonic() < end, answer.text
        time.sleep(.1)


def test_a_job_is_found_behind_the_balancer_and_on_the_other_engine(house):
    owners = set()
    with house.of("e1") as e1, house.of("e2") as e2:
        for _ in range(6):
            job = post(house.door, {"route": "generate", "request": {"prompt": "an owl", "steps": 2, "seed": 3}})
            owners.add(job["id"][:2])
            here = wait(house.door, job["id"]).json()
            there = wait(e2 if job["id"].startswith("e1") else e1, job["id"]).json()
            assert here["result"] == there["result"] and here["progress"] == there["progress"]
    assert owners == {"e1", "e2"}


def test_the_other_engine_streams_and_cancels(house):
    with house.of("e1") as e1, house.of("e2") as e2:
        id = post(e1)["id"]
        assert wait(e2, id, over=STARTED).json()["status"] == "running"
        with e2.stream("GET", f"/jobs/{id}/events") as stream:
            seen = [line[7:] for line in stream.iter_lines() if line.startswith("event: ")]
        assert seen[0] == "queued" and seen[-1] == "done" and seen.count("step") == 100 and seen.count("image") == 2
        last = e2.get(f"/jobs/{id}/events", headers={"Last-Event-ID": str(10**6)})
        assert last.status_code == 204

        id = post(e1)["id"]
        wait(e2, id, over=STARTED)
        assert e2.delete(f"/jobs/{id}").json()["status"] == "cancelled"
        assert e1.get(f"/jobs/{id}").status_code == e2.get(f"/jobs/{id}").status_code == 410
        assert e2.get("/jobs/e1-" + "0" * 32).status_code == 404


def ask_all(house, count, during):
    """`count` clients ask for pictures through the balancer while `during()` happens -> their statuses and types."""
    answers = []
    def one(seed):
        got = house.door.post("/generate", json={"prompt": "a fox", "steps": 30, "seed": seed})
        answers.append((got.status_code, got.headers["content-type"]))
    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(count)]
    for t in threads: t.start()
    time.sleep(.7)
    during()
    for t in threads: t.join(120)
    return answers


def test_a_killed_engine_loses_no_request_and_its_jobs_say_so(house):
    with house.of("e1") as e1, house.of("e2") as e2:
        job = post(e1)
        wait(e2, job["id"], over=STARTED)
        answers = ask_all(house, 8, house.engines["e1"].process.kill)
        assert answers == [(200, "application/json")] * 8
        gone = wait(e2, job["id"], seconds=40)
        assert gone.status_code == 410 and gone.json()["problem"]["type"] == "urn:aura:engine_gone"
        assert wait(house.door, job["id"]).status_code == 410
        again = post(house.door, gone.json()["ask"])
        made = wait(house.door, again["id"]).json()["result"]
        assert [r["seed"] for r in made["receipts"]] == [7, 8]
    house.engines["e1"] = house.engine("e1").wait_ready()


def test_an_engine_that_is_told_to_stop_finishes_its_jobs(house):
    with house.of("e1") as e1, house.of("e2") as e2:
        id = post(e1)["id"]
        wait(e2, id, over=STARTED)
        assert ask_all(house, 4, house.engines["e1"].process.terminate) == [(200, "application/json")] * 4
        assert house.engines["e1"].process.wait(120) == 0
        assert len(wait(e2, id).json()["result"]["images"]) == 2
    house.engines["e1"] = house.engine("e1")                  # while it loads, the other one serves
    assert all(house.door.get("/ready").status_code == 200 for _ in range(4))
    house.engines["e1"].wait_ready()


def test_a_cancel_that_redis_refuses_is_said_as_such(house):
    async def cancel():
        store = shared_jobs(f"redis://127.0.0.1:{house.redis_port}/0")
        await store.redis.xadd("aura:job:e9-" + "0" * 32, {"process": "p9", "ask": "null"}, id="0-1")
        await store.redis.set("aura:alive:p9", 1, ex=ALIVE_KEPT)
        await store.redis.set("aura:cancel:p9", "not a set", ex=60)
        try: await store.far.cancel("e9-" + "0" * 32)
        finally: await store.redis.aclose()
    with pytest.raises(StoreUnreachable): asyncio.run(cancel())


def test_a_redis_that_goes_away_and_comes_back(house):
    with house.of("e1") as e1, house.of("e2") as e2:
        before = post(e1, {"route": "generate", "request": {"prompt": "an owl", "steps": 2}})["id"]
        wait(e2, before)
        house.redis.kill()
        house.redis.wait()
        mine = post(e1, {"route": "generate", "request": {"prompt": "a fox", "steps": 2}})["id"]
        assert wait(e1, mine).json()["status"] == "succeeded"                 # an engine knows its own jobs
        answer = e2.get(f"/jobs/{mine}")
        assert answer.status_code == 503 and answer.json()["type"] == "urn:aura:store_unreachable" and "retry-after" in answer.headers
        assert house.door.get(f"/jobs/{mine}").status_code == 200             # and nginx finds the engine
        house.redis = house.start_redis()
        end = time.monotonic() + 30
        while e2.get(f"/jobs/{mine}").status_code != 200: assert time.monotonic() < end; time.sleep(.2)
        assert e2.get(f"/jobs/{before}").json() == e1.get(f"/jobs/{before}").json()


def under_load(house, clients, during, body):
    """Clients who ask again and again while `during()` runs -> how often each kind of answer came."""
    answers, over = Counter(), threading.Event()
    def one(seed):
        while not over.is_set():
            got = house.door.post("/generate", json=body | {"seed": seed})
            answers[got.status_code, got.headers["content-type"]] += 1
            if got.status_code != 200: assert got.json()["type"].startswith("urn:aura:") and got.headers["retry-after"]; time.sleep(.2)
    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(clients)]
    for t in threads: t.start()
    try: during()
    finally:
        over.set()
        for t in threads: t.join(120)
    return answers


def test_scaling_up_a_rolling_restart_and_scaling_down_lose_nothing(house):
    """With three clients all the time. The restart brings a new setting: the engines promise one second at most."""
    port = house.ports["e3"] = free_port()
    def during():
        more = house.engine("e3").wait_ready()
        house.name_engines(("e3", port))
        house.reload()
        end, owners = time.monotonic() + 90, set()      # the engine with the fewest requests is asked: the new one, at first
        while owners != {"e1", "e2", "e3"}:
            assert time.monotonic() < end, owners
            owners.add(post(house.door, {"route": "generate", "request": {"prompt": "an owl", "steps": 1}})["id"][:2])
        for name in ("e1", "e2"):
            house.engines[name].process.terminate()
            assert house.engines[name].process.wait(60) == 0
            house.engines[name] = house.engine(name, AURA_MAX_QUEUE_SECONDS=1).wait_ready()
        house.name_engines()
        house.reload()
        more.process.terminate()
        assert more.process.wait(60) == 0
    answers = under_load(house, 3, during, {"prompt": "a fox", "steps": 2})
    del house.ports["e3"]
    assert set(answers) == {(200, "application/json")} and answers.total() > 10


def test_full_engines_say_when_to_come_back_and_nothing_else(house):
    """Eight clients, each with more than the second that an engine promises."""
    answers = under_load(house, 8, lambda: time.sleep(5), {"prompt": "a fox", "steps": 50, "n": 4})
    assert set(answers) == {(200, "application/json"), (429, "application/problem+json")}
    assert house.door.get("/health").json()["status"] == "ready"


def test_without_an_engine_the_balancer_says_so_as_an_engine_would(house):
    for engine in house.engines.values(): engine.process.kill(); engine.process.wait()
    answer = house.door.post("/generate", json={"prompt": "an owl"}, headers={"Origin": "http://localhost:5173"})
    assert answer.status_code == 503 and answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == "urn:aura:unreachable" and answer.headers["access-control-allow-origin"] and answer.headers["retry-after"]
