"""A Hub on the loopback interface: what huggingface.co does for a Docker Space, and on request what it does on a bad day.

The real huggingface_hub client speaks to it (HF_ENDPOINT=hub.url). A Space's life is told by the clock: the old version
runs on while the new one is queued, built and started, and the reported commit lags. What goes wrong is decided by the
commit (a file that contains FAIL_BUILD, FAIL_RUN, FAIL_SMOKE or FAIL_ORIGIN), by `answers` put in front of an endpoint, or by the
fields of `Hub`. A `builder` may really build and serve a commit. Without one a stub with the engine's manners answers.
"""
import asyncio, base64, hashlib, io, json, os, re, secrets, threading, time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime

import httpx, uvicorn, yaml
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

TOKEN = "hf_" + "loopback" * 4
HARDWARE = {"cpu-basic": 0, "cpu-upgrade": 0.03, "t4-small": 0.40, "l4x1": 0.80, "a10g-small": 1.00, "l40sx1": 1.80, "a100-large": 2.50}
EDGE_PAGE = "<!doctype html><html><head><title>503</title></head><body><h1>This Space is not answering</h1></body></html>"
READS = re.compile(r"/(validate-yaml|preupload/\S+|paths-info/\S+|objects/batch)$")


def git_oid(data): return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool = False

    @property
    def sha256(self): return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self): return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self): return git_oid(self.pointer if self.lfs else self.data)

    def row(self, path):
        more = {"lfs": {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.data), "oid": self.oid, **more}


@dataclass
class Run:
    """One attempt to build and serve a commit with the variables and secrets of its time."""
    sha: str
    tree: dict
    env: dict
    image: dict                                     # the variables at the time when its image was built
    hardware: str
    started: float
    build: bool
    previous: "Run | None"
    was: tuple = ("NO_APP_FILE", None)              # what the Hub reported before, and still does for a moment
    served: Future | None = None

    def says(self, word): return any(word.encode() in b.data for p, b in self.tree.items() if p.endswith((".py", "Dockerfile")))

    @property
    def device(self):
        """What the engine finds: a GPU needs the hardware and wheels for it, and to be wanted."""
        wheels = self.image.get("TORCH_INDEX_URL", "cpu")
        without = self.hardware.startswith("cpu") or wheels.endswith(("cpu", "too-new"))
        return "cpu" if without or self.env.get("SD_DEVICE") == "cpu" else "cuda"

    @property
    def build_id(self):
        arg = re.search(rb"^ARG AURA_BUILD_ID=(\S*)", self.tree["Dockerfile"].data, re.M)
        return self.env.get("AURA_BUILD_ID") or (arg[1].decode() if arg else None)


@dataclass
class Space:
    id: str
    sdk: str = "docker"
    private: bool = False
    hardware: str = "cpu-basic"
    sleep_time: int | None = None
    variables: dict = field(default_factory=dict)
    secrets: dict = field(default_factory=dict)
    volumes: list = field(default_factory=list)     # as the API speaks of them
    commits: dict = field(default_factory=dict)     # oid -> {path: Blob}, in order
    titles: dict = field(default_factory=dict)      # oid -> what the commit says about itself
    run: Run | None = None
    forced: str | None = None                       # a stage that overrides the clock: PAUSED, SLEEPING
    logs: dict = field(default_factory=lambda: {"build": [], "run": []})
    host: str = ""

    @property
    def head(self): return next(reversed(self.commits))

    @property
    def tree(self): return self.commits[self.head]


class Hub:
    """`with Hub() as hub:` serves `hub.url`. `hub.requests` and `hub.writes` tell what was asked of it."""

    def __init__(self, builder=None, lag=0.1, build_seconds=0.2, start_seconds=0.1, stuck=False, log_delay=0.0):
        self.builder, self.lag, self.build_seconds, self.start_seconds = builder, lag, build_seconds, start_seconds
        self.stuck, self.log_delay, self.log_break, self.edge_pages = stuck, log_delay, None, 0    # log_break: the first log stream ends after so many lines
        self.user = {"name": "ada", "type": "user", "isPro": True, "canPay": True, "orgs": [{"name": "guild", "roleInOrg": "write"}, {"name": "lurkers", "roleInOrg": "read"}],
                     "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}}}
        self.token, self.spaces, self.lfs, self.answers, self.requests = TOKEN, {}, {}, [], []
        self.buckets, self.mounts = {"ada/kept"}, True          # mounts: does this account's plan allow volumes?
        self.watch = lambda n, method, path, phase: None        # called around every request; may raise to drop its effect
        self.key = None                                         # of the variable or secret that the last request is about
        self.refuse = lambda method, path, phase: False         # asked "before" a request is acted on, and "after": then it was, and the answer says it was not
        self.moved = {}                                         # old name of a Space -> its new one
        self.servers, self.runs, self.closing, self.pool = [], [], False, ThreadPoolExecutor(2)

    # running

    def __enter__(self):
        self.url = self._serve(Starlette(routes=[Route(p, self._guard(f), methods=m.split()) for m, p, f in self._routes()]))
        return self

    def __exit__(self, *_):
        self.closing = True
        for server, thread in self.servers:
            server.should_exit = True
            thread.join(5)
        self.pool.shutdown(cancel_futures=True)
        for run in self.runs: self._stop(run)

    def enter_environment(self):
        """For a notebook: the client of this process speaks with this Hub. The environment as it was, to be put back at the end."""
        before = dict(os.environ)
        os.environ |= {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_DISABLE_XET": "1"}
        os.environ.pop("HF_HUB_OFFLINE", None)
        return before

    def _serve(self, app):
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started: time.sleep(0.005)
        self.servers.append((server, thread))
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    def _stop(self, run):
        if run.served and run.served.done() and not run.served.cancelled() and not run.served.exception(): run.served.result()[1]()

    @property
    def writes(self): return [f"{m} {p}" for m, p in self.requests if m not in ("GET", "HEAD") and p.startswith(("/api", "/lfs", "/spaces")) and not READS.search(p)]

    def fail(self, method, path, *answers):
        """The next requests that match get these answers: (status, body, headers) each, a dict is JSON."""
        self.answers.append((method, re.compile(path), list(answers)))

    # what a Space is doing now

    def space(self, id, files=None, **state):
        """A Space that is there already. With files, it has been running them for a while."""
        s = self.spaces[id] = Space(id, **state)
        s.host = self._serve(Starlette(routes=[Route("/{path:path}", self._edge(s), methods="GET HEAD POST OPTIONS DELETE".split())]))
        initial = {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"), "README.md": Blob(b"---\nsdk: docker\n---\n")}
        s.commits[secrets.token_hex(20)] = initial | {p: Blob(d) for p, d in (files or {}).items()}
        self._trigger(s)
        if s.run: s.run.started -= 1000
        return s

    def _trigger(self, s, rebuild=False):
        """A commit or a change of settings: build if this commit is not what runs, and start."""
        if "Dockerfile" not in s.tree: return
        live, was = self._live(s), self.stage(s)
        if live: live.previous = None
        env = {k: v["value"] for k, v in (s.variables | s.secrets).items()}
        build = rebuild or not live or live.sha != s.head
        s.run = Run(s.head, s.tree, env, env if build else live.image, s.hardware, time.monotonic(), build=build, previous=live, was=was)
        self.runs.append(s.run)
        s.logs = {"build": ["===== Build Queued =====\n"] if s.run.build else s.logs["build"], "run": []}
        if self.builder: s.run.served = self.pool.submit(self.builder, s.run, lambda kind, line, logs=s.logs: logs[kind].append(line))
        elif s.run.build and not self.stuck:
            s.logs["build"] += ["--> FROM python:3.11-slim\n", "--> RUN pip install -r requirements.txt\n"]
            s.logs["build"] += ["ERROR: No matching distribution found for nonsense==1\n", "error: failed to solve\n"] if s.run.says("FAIL_BUILD") else ["--> Pushing image\n"]
        if s.run.says("FAIL_LOADING"): s.logs["run"].append("Downloading shards: 1 of 9\n")
        s.logs["run"] += ["INFO starting\n", "RuntimeError: FAIL_RUN\n"] if s.run.says("FAIL_RUN") else [f"serving with {s.run.env}\n"]

    def stage(self, s):
        """(stage, reported sha) by the clock."""
        run = s.run
        if s.forced: return s.forced, run.sha if run else s.head
        if set(s.variables) & set(s.secrets): return "CONFIG_ERROR", run.sha if run else None
        if run is None: return "NO_APP_FILE", None
        t, old = time.monotonic() - run.started - self.lag, run.previous
        if t < 0: return run.was
        up = "RUNNING_" if old else ""
        building = not run.served.done() if run.served else t < self.build_seconds
        if run.build and (self.stuck or building): return up + "BUILDING", old.sha if old else run.sha
        if run.build and (run.says("FAIL_BUILD") or run.served and run.served.exception()): return "BUILD_ERROR", run.sha
        if t < self.start_seconds + run.build * self.build_seconds: return up + "APP_STARTING", run.sha
        return ("RUNTIME_ERROR" if run.says("FAIL_RUN") else "RUNNING"), run.sha

    def _live(self, s):
        """The run that answers requests now, or None."""
        stage, sha = self.stage(s)
        if not stage.startswith("RUNNING") or not s.run: return None
        return s.run if stage == "RUNNING" and sha == s.run.sha and (not s.run.previous or time.monotonic() > s.run.started + self.lag) else s.run.previous

    def runtime(self, s):
        stage, sha = self.stage(s)
        more = {"errorMessage": "Collision on variables and secrets names"} if stage == "CONFIG_ERROR" else {}
        return {"stage": stage, "sha": sha, "hardware": {"current": s.hardware, "requested": s.hardware}, "gcTimeout": s.sleep_time if HARDWARE.get(s.hardware) else 172800, "storage": None, "volumes": s.volumes or None, "replicas": {"requested": 1}, **more}

    # the API

    def _guard(self, handler):
        """Count the request, look at the token, give the answer that a test asked for, and words to what is not found."""
        async def answer(request: Request):
            method, path = request.method, request.url.path
            self.requests.append((method, path))
            n = len(self.requests)
            self.watch(n, method, path, "before")
            for m, pattern, answers in self.answers:
                if answers and m == method and pattern.search(path):
                    status, body, headers = (*answers.pop(0), None, None)[:3]
                    return JSONResponse(body, status, headers) if isinstance(body, dict) else HTMLResponse(body or EDGE_PAGE, status, headers)
            if not path.startswith(("/lfs", "/oauth")) and request.headers.get("authorization") != f"Bearer {self.token}":
                return error(401, "Invalid credentials in Authorization header")
            s = None
            if "owner" in request.path_params:
                old = f"{request.path_params['owner']}/{request.path_params['name']}"
                if old in self.moved: return RedirectResponse(str(request.url).replace(old, self.moved[old], 1), 307)
                s = self.spaces.get(f"{request.path_params['owner']}/{request.path_params['name']}")
                if s is None: return error(404, "Repository not found", "RepoNotFound")
                if (rev := request.path_params.get("rev", "main")) != "main" and rev not in s.commits: return error(404, "Invalid rev id", "RevisionNotFound")
            self.key = await key_of(request)
            if self.refuse(method, path, "before"): return error(403, "This was refused by the test")
            done = handler(request, s) if s else handler(request)
            done = await done if asyncio.iscoroutine(done) else done
            self.watch(n, method, path, "after")
            if self.refuse(method, path, "after"): return error(403, "This was done, and the test says it was not")
            return done if isinstance(done, Response) else JSONResponse(done)
        return answer

    def _routes(self):
        one = "/api/spaces/{owner}/{name}"
        return [
            ("GET", "/api/whoami-v2", lambda r: self.user), ("GET", "/api/spaces/hardware", lambda r: hardware()),
            ("POST", "/api/repos/create", self._create), ("DELETE", "/api/repos/delete", self._delete), ("GET", "/api/buckets/{bucket_owner}/{bucket}", self._bucket),
            ("POST", "/oauth/token", self._exchange), ("POST", "/api/validate-yaml", validate_yaml), ("PUT", "/lfs/{oid}", self._put_lfs),
            ("POST", "/spaces/{owner}/{name}.git/info/lfs/objects/batch", self._lfs_batch), ("GET", "/spaces/{owner}/{name}/resolve/{rev}/{path:path}", resolve),
            ("GET", one, self._info), ("GET", one + "/revision/{rev}", self._info), ("GET", one + "/runtime", lambda r, s: self.runtime(s)),
            ("GET", one + "/tree/{rev}", lambda r, s: [b.row(p) for p, b in tree_of(r, s).items()]), ("POST", one + "/paths-info/{rev}", paths_info),
            ("GET", one + "/commits/{rev}", commit_list), ("POST", one + "/preupload/{rev}", preupload), ("POST", one + "/commit/{rev}", self._commit), ("GET", one + "/logs/{kind}", self._logs),
            ("GET POST DELETE", one + "/variables", self._settings("variables")), ("GET POST DELETE", one + "/secrets", self._settings("secrets")),
            ("POST", one + "/hardware", self._hardware), ("POST", one + "/sleeptime", self._sleep), ("POST", one + "/restart", self._restart), ("PUT", one + "/settings", self._visibility), ("PUT DELETE", one + "/volumes", self._volumes), ("POST", one + "/pause", self._pause),
        ]

    async def _exchange(self, request):
        """A Trusted Publisher's proof for a token. Its proof here is any text that names the resource."""
        ask = await request.json()
        if not ask["subject_token"].endswith(ask["resource"]): return error(400, "invalid_grant")
        return {"access_token": self.token, "token_type": "bearer", "expires_in": 3600}

    async def _create(self, request):
        ask = await request.json()
        owner = ask.get("organization") or self.user["name"]
        allowed = [self.user["name"], *(o["name"] for o in self.user["orgs"] if o["roleInOrg"] != "read")]
        id = f"{owner}/{ask['name']}"
        if owner not in allowed: return error(403, f"You don't have the rights to create a space under the namespace {owner!r}")
        if id in self.spaces: return JSONResponse({"error": "You already created this space repo", "url": f"{self.url}/spaces/{id}"}, 409)
        paid = HARDWARE.get(ask.get("hardware", "cpu-basic"), 0) > 0 and self.user["canPay"]
        if ask["sdk"] != "static" and not (self.user["isPro"] or paid): return error(402, "Creating a Docker Space needs a PRO subscription or paid hardware")
        if ask.get("volumes") and not self.mounts: return error(402, "Volumes are not part of this plan")
        pairs = {kind: {v["key"]: v for v in ask.get(kind, [])} for kind in ("variables", "secrets")}
        self.space(id, sdk=ask["sdk"], private=ask.get("visibility") == "private", hardware=ask.get("hardware", "cpu-basic"), sleep_time=ask.get("sleepTimeSeconds"), volumes=told(ask.get("volumes", [])), **pairs)
        return {"url": f"{self.url}/spaces/{id}", "name": id}

    def _info(self, r, s):
        rev = r.path_params.get("rev", "main")
        return {"id": s.id, "author": s.id.split("/")[0], "sha": s.head if rev == "main" else rev, "private": s.private, "sdk": s.sdk, "host": s.host,
                "subdomain": s.id.replace("/", "-"), "runtime": self.runtime(s), "siblings": [{"rfilename": p} for p in s.tree]}

    async def _commit(self, request, s):
        head, *lines = [json.loads(line) for line in (await request.body()).splitlines() if line]
        if head["value"].get("parentCommit") not in (None, s.head): return error(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(s.tree)
        for line in lines:
            v = line["value"]
            if line["key"] == "file": tree[v["path"]] = Blob(base64.b64decode(v["content"]))
            if line["key"] == "lfsFile": tree[v["path"]] = Blob(self.lfs[v["oid"]], True)
            if line["key"] == "deletedFile": del tree[v["path"]]
        oid = secrets.token_hex(20)
        s.commits[oid], s.titles[oid] = tree, head["value"]["summary"]
        self._trigger(s)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/spaces/{s.id}/commit/{oid}", "hookOutput": ""}

    def _settings(self, kind):
        async def handler(request, s):
            had = getattr(s, kind)
            if request.method == "POST":
                ask = await request.json()
                had[ask["key"]] = ask
            if request.method == "DELETE": had.pop((await request.json())["key"], None)
            if request.method != "GET": self._trigger(s)
            return {k: {x: v[x] for x in v if x != "key" and (kind == "variables" or x != "value")} for k, v in had.items()}
        return handler

    async def _lfs_batch(self, request, s):
        asked = (await request.json())["objects"]
        action = lambda o: {} if o["oid"] in self.lfs else {"actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}}
        return {"transfer": "basic", "objects": [{"oid": o["oid"], "size": o["size"], "authenticated": True, **action(o)} for o in asked]}

    async def _put_lfs(self, request):
        data = await request.body()
        if hashlib.sha256(data).hexdigest() != request.path_params["oid"]: return error(400, "checksum mismatch")
        self.lfs[request.path_params["oid"]] = data
        return {}

    async def _hardware(self, request, s):
        ask = await request.json()
        flavor = ask["flavor"]
        if HARDWARE[flavor] and not self.user["canPay"]: return error(402, "Payment required: add a payment method")
        s.hardware, s.sleep_time = flavor, ask.get("sleepTimeSeconds")          # new hardware does not sleep unless it is told to
        self._trigger(s)
        return self.runtime(s)

    async def _sleep(self, request, s):
        s.sleep_time = (await request.json())["seconds"]
        return self.runtime(s)

    async def _volumes(self, request, s):
        if request.method == "DELETE" and not s.volumes: return error(400, "This Space has no volumes")
        asked = (await request.json())["volumes"] if request.method == "PUT" else []
        if asked and not self.mounts: return error(403, "Volumes are not part of this plan")
        s.volumes = told(asked)
        self._trigger(s)
        return {}

    def _bucket(self, request):
        name = "{bucket_owner}/{bucket}".format(**request.path_params)
        if name not in self.buckets: return error(404, "Bucket not found", "RepoNotFound")
        return {"id": name, "private": True, "createdAt": "2026-02-06T17:37:57.000Z", "size": 0, "totalFiles": 0}

    async def _delete(self, request):
        ask = await request.json()
        del self.spaces[f"{ask.get('organization') or self.user['name']}/{ask['name']}"]
        return {}

    async def _visibility(self, request, s):
        s.private = (await request.json())["visibility"] == "private"
        return {}

    def _restart(self, request, s):
        s.forced = None
        self._trigger(s, rebuild=request.query_params.get("factory") == "true")
        return self.runtime(s)

    def _pause(self, request, s):
        s.forced = "PAUSED"
        return self.runtime(s)

    def _logs(self, request, s):
        async def stream():
            sent, quiet, kind = 0, time.monotonic(), request.path_params["kind"]
            while not self.closing and not await request.is_disconnected():
                if sent < len(s.logs[kind]):
                    await asyncio.sleep(self.log_delay)
                    when = datetime.fromtimestamp((s.run.started if s.run else 0) + sent / 1000, UTC).isoformat()
                    yield f"data: {json.dumps({'data': s.logs[kind][sent], 'timestamp': when})}\n\n"
                    if sent + 1 == self.log_break: self.log_break = None; return
                    sent, quiet = sent + 1, time.monotonic()
                elif time.monotonic() - quiet > 15: yield "data:\n\n"; quiet = time.monotonic()
                else: await asyncio.sleep(0.02)
        return StreamingResponse(stream(), media_type="text/event-stream")

    # the Space's own address

    def _edge(self, s):
        """The proxy in front of a Space: HTML when nothing is there, 404 for strangers to a private one, and every origin told it is welcome."""
        async def answer(request: Request):
            self.requests.append((request.method, "host:" + request.url.path))
            self.watch(len(self.requests), request.method, "host:" + request.url.path, "before")
            cors = {"access-control-allow-origin": o, "access-control-allow-credentials": "true"} if (o := request.headers.get("origin")) else {}
            if self.edge_pages:
                self.edge_pages -= 1
                return HTMLResponse(EDGE_PAGE, 503, cors)
            if s.private and request.headers.get("authorization") != f"Bearer {self.token}": return HTMLResponse("<h1>404</h1>", 404, cors)
            if request.method == "OPTIONS": return Response(status_code=200, headers=cors)
            if s.forced == "SLEEPING": s.forced = None; s.run.started = time.monotonic()
            live = self._live(s)
            if not live or live.served and not live.served.done(): return HTMLResponse(EDGE_PAGE, 503, cors)
            return await (self._forward(live, request, cors) if live.served else stub(live, request, cors))
        return answer

    async def _forward(self, live, request, cors):
        async with httpx.AsyncClient(timeout=60) as client:
            kept = {k: v for k, v in request.headers.items() if k not in ("host", "content-length", "connection")}
            try: r = await client.request(request.method, live.served.result()[0] + request.url.path, content=await request.body(), headers=kept)
            except httpx.HTTPError: return HTMLResponse(EDGE_PAGE, 503, cors)
        kept = {k: v for k, v in r.headers.items() if k not in ("content-length", "content-encoding", "transfer-encoding", "connection")}
        return Response(r.content, r.status_code, kept | cors)


async def key_of(request):
    if not request.url.path.endswith(("/variables", "/secrets")) or request.method == "GET": return None
    return (await request.json())["key"]


def error(status, text, code=None):
    return JSONResponse({"error": text}, status, {"X-Error-Message": text} | ({"X-Error-Code": code} if code else {}))


def told(volumes):
    """Volumes as the Hub tells them: with every default written out."""
    return [{"revision": "main" if v["type"] != "bucket" else None, "path": None, **v, "readOnly": v["type"] != "bucket" or v.get("readOnly", False)} for v in volumes]


def hardware():
    row = lambda name, price: {"name": name, "prettyName": name.upper(), "cpu": "2 vCPU", "ram": "16 GB", "accelerator": None, "unitCostMicroUSD": round(price / 60 * 1e6), "unitCostUSD": price / 60, "unitLabel": "minute"}
    return [row(*item) for item in HARDWARE.items()]


async def validate_yaml(request):
    text = (await request.json())["content"]
    meta = re.match(r"---\n(.*?)\n---", text, re.S)
    try: card = yaml.safe_load(meta[1]) if meta else {}
    except yaml.YAMLError: return JSONResponse({"errors": [{"message": "the front matter is not YAML"}], "warnings": []}, 400)
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    wrong = [f'"{k}" must be one of {sorted(colors)}' for k in ("colorFrom", "colorTo") if card.get(k) not in colors]
    if card.get("sdk") not in ("docker", "gradio", "static"): wrong.append('"sdk" must be one of [gradio, docker, static]')
    if len(card.get("short_description", "")) > 60: wrong.append('"short_description" length must be less than or equal to 60 characters long')
    return JSONResponse({"errors": [{"message": w} for w in wrong], "warnings": []}, 400 if wrong else 200)


def commit_list(request, s):
    row = lambda oid: {"id": oid, "title": s.titles.get(oid, "initial commit"), "message": "", "date": "2026-11-27T12:00:00.000Z", "authors": [{"user": s.id.split("/")[0]}]}
    return [row(oid) for oid in reversed(s.commits)]


def tree_of(request, s): return s.commits.get(request.path_params["rev"], s.tree)


async def paths_info(request, s):
    wanted = (await request.form()).getlist("paths")
    return [b.row(p) for p, b in tree_of(request, s).items() if p in wanted]


async def preupload(request, s):
    asked = (await request.json())["files"]
    big = lambda f: f["path"].endswith(".safetensors") or f["size"] > 10_000_000
    had = lambda f: {"oid": s.tree[f["path"]].oid} if f["path"] in s.tree else {}
    return {"files": [{"path": f["path"], "uploadMode": "lfs" if big(f) else "regular", "shouldIgnore": False, **had(f)} for f in asked], "commitOid": s.head}


def resolve(request, s): return Response(tree_of(request, s)[request.path_params["path"]].data, media_type="application/octet-stream")


async def stub(run, request, cors):
    """The engine's manners without the engine: health with its build id, the page, origins, the key, a picture."""
    ours = cors | {"x-aura-engine": "stub"}
    refuse = lambda status, code: JSONResponse({"type": f"urn:aura:{code}", "status": status}, status, ours)
    if request.url.path == "/health":
        loading = run.says("FAIL_LOADING")
        return JSONResponse({"status": "loading" if loading else "ready", "ready": not loading, "device": run.device, "gpu": run.device == "cuda", "model": run.env.get("SD_MODEL_ID", "embedded"),
                             "buildId": run.build_id, "uptimeSeconds": time.monotonic() - run.started, "warnings": []}, headers=ours)
    if request.url.path == "/": return HTMLResponse("<title>aura</title>", headers=ours)
    if request.url.path != "/generate" or request.method != "POST": return refuse(404, "not_found")
    origins = run.env.get("ALLOW_ORIGINS", "http://localhost:5173,http://127.0.0.1:5173").split(",")
    if "*" not in origins and not run.says("FAIL_ORIGIN") and request.headers.get("origin", origins[0]) not in origins: return refuse(403, "foreign_origin")
    if (key := run.env.get("AURA_API_KEY")) and request.headers.get("authorization") != f"Bearer {key}": return refuse(401, "unauthorized")
    picture = Image.new("RGB", (64, 64)) if run.says("FAIL_SMOKE") else Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    picture.save(out := io.BytesIO(), "PNG")
    return JSONResponse({"images": [base64.b64encode(out.getvalue()).decode()], "receipts": [{}], "warnings": []}, headers=ours)
