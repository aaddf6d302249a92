"""What happens to requests on Ray Serve, told as JSON on the last line. test_ray.py runs it in a network of its own.

Ray listens on the address of the machine. In a namespace that has only a loopback nobody else can reach it."""
import json, os, shutil, signal, socket, subprocess, sys, tempfile, threading, time
from collections import Counter
from pathlib import Path

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}

import httpx
import ray
from ray import serve

from aura_engine.scale import app

PORT, SHIELD, REDIS = 18000, 18001, 16379
ROOT = Path(__file__).parent.parent
ENV = {"SD_MODEL_ID": "embedded", "SD_BACKEND": "torch", "SD_PRECISION": "fp32", "AURA_REDIS_URL": f"redis://127.0.0.1:{REDIS}/0", "AURA_GRACE_SECONDS": "20"}
door = httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=120, trust_env=False, limits=httpx.Limits(max_connections=20))
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


def under_load(clients, body, during, port=PORT):
    """Clients that ask again and again while `during()` runs -> how often each kind of answer came."""
    answers, over = Counter(), threading.Event()
    def one(seed):
        while not over.is_set():
            try:
                got = door.post(f"http://127.0.0.1:{port}/generate", json=body | {"seed": seed})
                answers[f"{got.status_code} {got.headers.get('content-type')}"] += 1
            except httpx.HTTPError as error: answers[type(error).__name__] += 1
    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(clients)]
    for thread in threads: thread.start()
    time.sleep(2)
    try: during()
    finally:
        over.set()
        for thread in threads: thread.join(120)
    return dict(answers)


def replicas(): return serve.status().applications["aura"].deployments["engine"].replica_states


def until(so, seconds=120):
    end = time.monotonic() + seconds
    while not so():
        if time.monotonic() > end: raise TimeoutError
        time.sleep(.5)


def killed(port=PORT):
    """kill -9 of one replica under eight clients, and of its job."""
    owner = {}
    def kill():
        id = post_job(steps=50, n=4)
        name = id.split("-")[0]
        os.kill(pids()[name], signal.SIGKILL)
        owner.update(id=id)
        until(lambda: name not in pids())
        until(lambda: replicas() == {"RUNNING": 2})
    answers = under_load(8, {"prompt": "a fox", "steps": 8}, kill, port)
    lost = ended(owner["id"], 30)
    return {"answers": answers, "job": lost.status_code, "ask": "ask" in lost.json()}


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
            return killed(SHIELD)
        finally: nginx.terminate()


def listens(port):
    with socket.socket() as s: return s.connect_ex(("127.0.0.1", port)) == 0


def updated():
    """Every replica is replaced because a setting changed, under three clients."""
    before = set(pids())
    answers = under_load(3, {"prompt": "a fox", "steps": 2}, lambda: serve.run(app({"engines": "2", "SD_STEPS": "3", **ENV}), name="aura"))
    return {"answers": answers, "kept": len(before & set(pids())), "steps": door.post("/generate", json={"prompt": "an owl"}).json()["receipts"][0]["steps"]}


def scaled():
    """From one engine to two and back, as work waits."""
    made = app({"engines": "1-2", **ENV})
    quick = {"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 1, "downscale_delay_s": 3, "look_back_period_s": 3, "metrics_interval_s": 1, "policy": {"policy_function": "aura_engine.scale:engines_wanted"}}
    made._bound_deployment = made._bound_deployment.options(autoscaling_config=quick)
    serve.run(made, name="aura")
    until(lambda: replicas() == {"RUNNING": 1})
    answers = under_load(12, {"prompt": "a fox", "steps": 50, "n": 4}, lambda: until(lambda: replicas().get("RUNNING") == 2))
    until(lambda: replicas() == {"RUNNING": 1})
    return {"answers": answers, "after": door.post("/generate", json={"prompt": "an owl"}).status_code}


def main(names):
    store = subprocess.Popen(["redis-server", "--port", str(REDIS), "--bind", "127.0.0.1", "--save", ""], stdout=subprocess.DEVNULL)
    told = {}
    try:
        ray.init(include_dashboard=False, num_cpus=6, log_to_driver=False, object_store_memory=150 * 2**20)
        serve.start(http_options={"host": "127.0.0.1", "port": PORT}, proxy_location="HeadOnly")
        say("Ray is there")
        serve.run(app({"engines": "2", **ENV}), name="aura")
        for name in names:
            say(name)
            told[name] = globals()[name]()
            say(told[name])
        serve.delete("aura")
    finally:
        ray.shutdown()
        store.kill()
    print(json.dumps(told))


if __name__ == "__main__": main(sys.argv[1:] or ["doors", "jobs", "killed", "shielded", "updated", "scaled"])
