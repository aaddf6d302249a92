"""What happens to requests on Ray Serve, told as JSON on the last line. test_ray.py runs it in a network of its own.

Ray listens on the address of the machine. In a namespace that has only a loopback nobody else can reach it."""
import json, os, shutil, signal, subprocess, sys, tempfile, threading, time
from collections import Counter
from pathlib import Path

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_raylet_start_wait_time_s": "180", "RAY_agent_register_timeout_ms": "180000"}

import httpx
import ray
from ray import serve

from aura_engine.scale import app
from crowd import listens, under_load, until

PORT, SHIELD, REDIS, GCS = 18000, 18001, 6389, 6399
URL, BEHIND = f"http://127.0.0.1:{PORT}", f"http://127.0.0.1:{SHIELD}"
FOX = {"prompt": "a fox", "steps": 8}
ROOT = Path(__file__).parent.parent
ENV = {"SD_MODEL_ID": "embedded", "SD_BACKEND": "torch", "SD_PRECISION": "fp32", "AURA_REDIS_URL": f"redis://127.0.0.1:{REDIS}/0", "AURA_GRACE_SECONDS": "20", "AURA_MAX_QUEUE_SECONDS": "3600"}
door = httpx.Client(base_url=URL, timeout=120, trust_env=False, limits=httpx.Limits(max_connections=20))
began = time.monotonic()


def say(*words): print(f"{time.monotonic() - began:.0f} s", *words, file=sys.stderr, flush=True)


def pids():
    """The processes of the replicas by name."""
    details = serve.context._get_global_client().get_serve_details()["applications"]["aura"]["deployments"]["engine"]
    return {one["replica_id"]: one["pid"] for one in details["replicas"] if one["state"] == "RUNNING"}


def post_job(**more):
    answer = door.post("/jobs", json={"route": "generate", "request": {"prompt": "an owl", "steps": 2} | more})
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def ended(id, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = door.get(f"/jobs/{id}")
        if answer.status_code != 200 or answer.json()["status"] in ("succeeded", "failed", "cancelled"): return answer
        time.sleep(.2)
    return answer


def doors():
    """Each kind of answer once."""
    picture = door.post("/generate", json={"prompt": "an owl", "steps": 2, "seed": 3})
    png = door.post("/generate", json={"prompt": "an owl", "steps": 2, "seed": 3}, headers={"Accept": "image/png"})
    with door.stream("POST", "/generate", json={"prompt": "an owl", "steps": 3}, headers={"Accept": "text/event-stream"}) as stream:
        events = [line[7:] for line in stream.iter_lines() if line.startswith("event: ")]
    wrong = door.post("/generate", json={"prompt": "an owl", "steps": -1})
    openai = door.post("/v1/images/generations", json={"prompt": "an owl"})
    return {"page": door.get("/").headers["content-type"], "health": door.get("/health").json()["status"], "ready": door.get("/ready").status_code,
            "picture": picture.json()["receipts"][0]["seed"], "png": png.headers["content-type"], "events": events,
            "wrong": [wrong.status_code, wrong.headers["content-type"]], "openai": openai.status_code}


def jobs():
    """Jobs of both replicas, asked for at the door."""
    ids = [post_job() for _ in range(10)]
    states = [ended(id).json()["status"] for id in ids]
    return {"owners": len({id.split("-")[0] for id in ids}), "states": dict(Counter(states))}


def replicas(deployment="engine"): return serve.status().applications["aura"].deployments[deployment].replica_states


def hung_up():
    """A client leaves in the middle of a long picture -> seconds until the engine has nothing to do."""
    with httpx.Client(base_url=URL, trust_env=False) as web:
        try: web.post("/generate", json={"prompt": "an owl", "steps": 50, "n": 4}, timeout=httpx.Timeout(30, read=1.5))
        except httpx.ReadTimeout: left = time.monotonic()
    until(lambda: all(door.get("/health").json()["queue"]["length"] == 0 for _ in range(6)), 60)
    return {"seconds": round(time.monotonic() - left, 1)}


def ended_by(signal_number, url=URL):
    """A replica's process ends under eight clients, and has a job."""
    owner = {}
    def end():
        owner["id"] = post_job(steps=50, n=2)
        name = owner["id"].split("-")[0][4:]
        until(lambda: door.get(f"/jobs/{owner['id']}").json()["status"] == "running")
        os.kill(pids()[name], signal_number)
        until(lambda: name not in pids())
        until(lambda: replicas() == {"RUNNING": 2}, 400)
    answers = under_load(url, 8, {"prompt": "a fox", "steps": 4}, end)
    job = ended(owner["id"], 60)
    return {"answers": answers, "job": job.status_code, "ask": "ask" in job.json()}


def killed(): return ended_by(signal.SIGKILL)


def told_to_stop(): return ended_by(signal.SIGTERM)


def loading():
    """A replica is gone and the next one loads, under eight clients, who are counted only meanwhile."""
    name, pid = next(iter(pids().items()))
    os.kill(pid, signal.SIGKILL)
    until(lambda: name not in pids() and replicas().get("STARTING"))
    before = replicas()
    answers = under_load(URL, 8, {"prompt": "a fox", "steps": 4}, lambda: until(lambda: replicas() == {"RUNNING": 2}, 400), lead=0)
    return {"answers": answers, "before": before}


def full():
    """Two engines that promise two seconds at most, and eight clients who ask for more."""
    serve.run(app({"engines": "2", **ENV, "AURA_MAX_QUEUE_SECONDS": "2"}), name="aura")
    answers = under_load(URL, 8, {"prompt": "a fox", "steps": 50, "n": 4}, lambda: time.sleep(15))
    after = door.get("/health").json()["status"]
    serve.run(app({"engines": "2", **ENV}), name="aura")
    return {"answers": answers, "after": after}


def redis_away():
    """Redis goes away under three clients and comes back: pictures do not need it, and its engine knows a job without it."""
    global store
    said = {}
    def away():
        global store
        store.kill()
        store.wait()
        id = post_job()
        said["job while away"] = ended(id).json()["status"]
        store = start_redis()
        until(lambda: listens(REDIS))
        said["job after"] = ended(id).status_code
        said["new job"] = ended(post_job()).json()["status"]
    answers = under_load(URL, 3, FOX, away)
    return {"answers": answers, **said}


def models():
    """Two models as two deployments behind one door: by address, by `model`, in OpenAI's words, and their jobs."""
    serve.run(app({"models": {"ink": {"SD_MODEL_ID": "embedded"}, "oil": {"SD_MODEL_ID": "embedded", "SD_STEPS": "3"}}, **ENV}), name="aura")
    def steps(path, **body): return door.post(path, json={"prompt": "an owl", "seed": 3} | body).json()["receipts"][0]["steps"]
    oil_job = door.post("/models/oil/jobs", json={"route": "generate", "request": {"prompt": "an owl"}}).json()
    wrong = door.post("/generate", json={"prompt": "an owl", "model": "water"})
    said = {"default": steps("/generate"), "by model": steps("/generate", model="oil"), "by address": steps("/models/oil/generate"),
            "deployments": sorted(serve.status().applications["aura"].deployments), "listed": [row["id"] for row in door.get("/v1/models").json()["data"]],
            "openai": door.post("/v1/images/generations", json={"prompt": "an owl", "model": "oil"}).status_code,
            "theirs": door.post("/v1/images/generations", json={"prompt": "an owl", "model": "gpt-image-1"}).status_code,
            "huggingface": door.post("/models/oil", json={"inputs": "an owl"}).headers["content-type"],
            "job": ended(oil_job["id"]).json()["result"]["receipts"][0]["steps"], "wrong": [wrong.status_code, wrong.json()["detail"]]}
    serve.run(app({"engines": "2", **ENV}), name="aura")
    return said


SHAPES = ("1:1", "2:3", "3:2", "4:3")


def warm():
    """Two engines and eight clients who ask for four shapes in turn: with the preference for an engine that has drawn a shape, and without it."""
    told = {}
    for name, cold in (("without", 0.), ("with", 5.)):
        made = app({"engines": "2", **ENV})
        engines = made._bound_deployment.init_args[0][""]._bound_deployment
        how = engines._deployment_config.request_router_config
        how.request_router_kwargs = {"cold": cold}
        serve.run(made, name="aura")
        until(lambda: replicas() == {"RUNNING": 2})
        told[name] = jobs_by_shape(16 * len(SHAPES))
    return told


def jobs_by_shape(count):
    """`count` jobs, as many of each shape -> pictures a second, and how many came to an engine that had drawn their shape among its last two jobs' shapes."""
    drawn, hits, began = {}, 0, time.monotonic()
    waiting = [(shape, n) for n in range(count // len(SHAPES)) for shape in SHAPES]
    order = [waiting[i::8] for i in range(8)]
    lock = threading.Lock()
    def one(mine):
        nonlocal hits
        with httpx.Client(base_url=URL, timeout=120, trust_env=False) as web:
            for shape, n in mine:
                id = web.post("/jobs", json={"route": "generate", "request": {"prompt": "a fox", "steps": 4, "aspectRatio": shape, "seed": n}}).json()["id"]
                with lock:
                    last = drawn.setdefault(id.split("-")[0], [])
                    hits += shape in last
                    if shape in last: last.remove(shape)
                    last.append(shape)
                    del last[:-2]
                while web.get(f"/jobs/{id}").json()["status"] not in ("succeeded", "failed"): time.sleep(.03)
    threads = [threading.Thread(target=one, args=(mine,)) for mine in order]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return {"hits": hits, "of": count, "rate": round(count / (time.monotonic() - began), 2), "engines": len(drawn)}


def deployed():
    """deploy/ray/serve.yaml, given to `serve deploy`, with engines that need no GPU: they take the place of those that run."""
    text = (ROOT / "deploy/ray/serve.yaml").read_text()
    for given, here in (("gpus: 1 ", "gpus: 0 "), ("0.0.0.0, port: 8000", f"127.0.0.1, port: {PORT}"), ("EveryNode", "HeadOnly")):
        assert given in text
        text = text.replace(given, here)
    command = str(Path(sys.executable).with_name("serve"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "serve.yaml"
        file.write_text(text)
        subprocess.run([command, "deploy", "-a", "http://127.0.0.1:8265", str(file)], check=True, stdout=sys.stderr)
    until(lambda: serve.status().applications["aura"].status == "RUNNING" and set(replicas()) == {"RUNNING"}, 400)
    status = subprocess.run([command, "status", "-a", "http://127.0.0.1:8265"], check=True, capture_output=True, text=True).stdout
    return {"status": status.count("HEALTHY"), "picture": door.post("/generate", json={"prompt": "an owl", "seed": 3}).status_code}


def shielded():
    """The same behind the nginx of deploy/, which sends again what Ray answers with 500."""
    with tempfile.TemporaryDirectory() as folder:
        conf = Path(shutil.copytree(ROOT / "deploy/nginx", Path(folder) / "nginx"))
        engines, settings = (conf / "engines.conf").read_text(), (conf / "nginx.conf").read_text()
        (conf / "engines.conf").write_text(engines.replace("engine1:7860", f"127.0.0.1:{PORT}").replace("engine2:7860", f"127.0.0.1:{PORT}"))
        (conf / "nginx.conf").write_text(settings.replace("error timeout http_503", "error timeout http_500 http_503"))
        (conf / "listen.conf").write_text(f"listen 127.0.0.1:{SHIELD};")
        nginx = subprocess.Popen(["nginx", "-p", folder, "-c", str(conf / "nginx.conf"), "-g", "daemon off; user root;"])
        try:
            until(lambda: listens(SHIELD))
            return ended_by(signal.SIGKILL, BEHIND)
        finally: nginx.terminate()


def updated():
    """Every replica is replaced because a setting changed, under three clients."""
    before = set(pids())
    answers = under_load(URL, 3, {"prompt": "a fox", "steps": 2}, lambda: serve.run(app({"engines": "2", "SD_STEPS": "3", **ENV}), name="aura"))
    return {"answers": answers, "kept": len(before & set(pids())), "steps": door.post("/generate", json={"prompt": "an owl"}).json()["receipts"][0]["steps"]}


def scaled():
    """From one engine to two and back, as work waits."""
    made = app({"engines": "1-2", **ENV})
    engines = made._bound_deployment.init_args[0][""]
    quick = {"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 1, "downscale_delay_s": 3, "look_back_period_s": 3, "metrics_interval_s": 1, "policy": {"policy_function": "aura_engine.scale:engines_wanted"}}
    engines._bound_deployment = engines._bound_deployment.options(autoscaling_config=quick)
    serve.run(made, name="aura")
    until(lambda: replicas() == {"RUNNING": 1})
    answers = under_load(URL, 12, {"prompt": "a fox", "steps": 50, "n": 4}, lambda: until(lambda: replicas().get("RUNNING") == 2))
    until(lambda: replicas() == {"RUNNING": 1})
    return {"answers": answers, "after": door.post("/generate", json={"prompt": "an owl"}).status_code}


def start_redis():
    return subprocess.Popen(["redis-server", "--port", str(REDIS), "--bind", "127.0.0.1", "--save", ""], stdout=subprocess.DEVNULL)


def start_head():
    """A Ray head, as `ray start` makes it. Its agents have ports from the start: it gives up when they are slow to choose their own."""
    ports = {"port": GCS, "dashboard-port": 8265, "dashboard-agent-listen-port": 52365, "dashboard-agent-grpc-port": 52366, "metrics-export-port": 52367, "runtime-env-agent-port": 52368}
    given = [f"--{name}={port}" for name, port in ports.items()]
    ray_command = str(Path(sys.executable).with_name("ray"))
    head = subprocess.Popen([ray_command, "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=6", "--object-store-memory=157286400", *given], stdout=sys.stderr)
    until(lambda: listens(GCS) and listens(8265) and listens(52365), 180)
    return head


PARTS = ["doors", "jobs", "hung_up", "killed", "told_to_stop", "loading", "updated", "full", "redis_away", "models", "warm", "scaled", "deployed"]


def main(names):
    global store
    store, told, head = start_redis(), {}, start_head()
    try:
        ray.init(address=f"127.0.0.1:{GCS}", log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": PORT}, proxy_location="HeadOnly")
        say("Ray is there")
        serve.run(app({"engines": "2", **ENV}), name="aura")
        for name in names:
            say(name)
            try: told[name] = globals()[name]()
            except Exception as error: told[name] = {"error": repr(error)}
            say(told[name])
        serve.delete("aura")
    finally:
        ray.shutdown()
        head.terminate()
        try: head.wait(120)
        except subprocess.TimeoutExpired: head.kill()
        store.kill()
    print(json.dumps(told))


if __name__ == "__main__": main(sys.argv[1:] or PARTS)
