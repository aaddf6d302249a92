"""The deployer with the real huggingface_hub client against a Hub on the loopback interface.

What a person would do is run as a process. Variations call the same `main` in this one, which saves the imports.
"""
import contextlib, hashlib, io, json, multiprocessing, os, re, shutil, signal, stat, subprocess, sys, threading, time, zipfile
from dataclasses import replace
from datetime import date
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata, util
from pathlib import Path
from unittest.mock import patch

import huggingface_hub, pytest, yaml
from dotenv import dotenv_values
from hypothesis import given, settings, strategies as st

import lock
import nb
from aura_engine import bundle, deploy, deploy_plan, hub as room_hub
from conftest import ROOT, clean_env
from hub import READS, TOKEN, Hub

SPACE = "ada/aura"
GUIDE = ("--origins", "http://localhost:5173")
FILES = {
    ".dockerignore": "*\n!app.py\n!requirements.txt\n!aura_engine\n", "app.py": "import aura_engine.server\n", "requirements.txt": "fastapi\nuvicorn\n",
    "requirements.lock": "# Locked on 2026-11-26\nfastapi==0.165.0 --hash=sha256:00\nuvicorn==0.54.0 --hash=sha256:00\n",
    "locks/torch-cpu.lock": "# Locked on 2026-11-27\ntorch==2.13.0+cpu --hash=sha256:00\n",
    "aura_engine/__init__.py": "", "aura_engine/server.py": "import fastapi\n", "aura_engine/assets/page/index.html": "<title>aura</title>",
    "aura_engine/assets/embedded/model.safetensors": "weights",
}


@pytest.fixture
def tree(tmp_path):
    """A small project that can be deployed."""
    for name, text in {**FILES, "Dockerfile": (ROOT / "Dockerfile").read_text()}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def hub():
    """A quick Hub. Whatever a test does, no Space was paused, and none deleted but by the test that is about that."""
    with Hub(lag=0.05, build_seconds=0.1, start_seconds=0.05) as it:
        yield it
        assert not [w for w in it.writes if w.endswith("/pause") or w.endswith("repos/delete") and not getattr(it, "may_delete", False)]


def environment(hub, tree, env):
    return clean_env(**{"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": 1, "HF_HUB_OFFLINE": 0, "HF_HOME": tree / ".hf", **env})


def _forked(env, tree, log, args):
    os.environ.clear(); os.environ.update(env); os.chdir(tree)
    huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    sys.exit(deploy.run_deploy(["--space-id", SPACE, "--poll", "0.05", *args]))


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_deploy"])


def fork(hub, tree, *args):
    """A process as `start` makes it, out of one that has imported everything: a tenth of the time."""
    process = FORKS.Process(target=_forked, args=(environment(hub, tree, {}), tree, tree / ".log", args))
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)): process.start()          # the first one starts the server, which has to find test_deploy
    return process


def start(hub, tree, *args, **env):
    script = next(p for folder in (tree, ROOT) if (p := folder / "scripts/hf_space_deploy.py").exists())
    argv = [sys.executable, str(script), "--space-id", SPACE, "--poll", "0.05", *args]
    return subprocess.Popen(argv, cwd=tree, env=environment(hub, tree, env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True)


def run(hub, tree, *args, code=0, limit=60, **env):
    """The command's output, as a process. Another exit status than `code` fails the test."""
    process = start(hub, tree, *args, **env)
    try: out = process.communicate(timeout=limit)[0]
    finally: process.kill()
    assert process.returncode == code, out
    return out


def call(hub, tree, *args, code=0, **env):
    """The same within this process."""
    out = io.StringIO()
    with patch.dict(os.environ, environment(hub, tree, env), clear=True), patch.object(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True), \
         contextlib.chdir(tree), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = deploy.run_deploy(["--space-id", SPACE, "--poll", "0.05", *args])
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
    assert code is None or status == code, out.getvalue()
    return out.getvalue()


def running(hub, tree, files=None, **state):
    """A Space that has been running the tree as it is now (or `files`), put there without the deployer."""
    o = deploy.DeployOptions(SPACE, ("http://localhost:5173",))
    ours = bundle.stamp(bundle.upload_set(tree))
    state.setdefault("variables", {"ALLOW_ORIGINS": {"key": "ALLOW_ORIGINS", "value": "http://localhost:5173"}})
    return hub.space(SPACE, files or {**ours, "README.md": deploy_plan.space_readme(SPACE, o.variables())}, **state)


def edit(tree, text="", name="app.py"):
    with open(tree / name, "a") as f: f.write(f"\n# {text}\n")


def commits(hub): return [w for w in hub.writes if "/commit/" in w]


# the way it should go

def test_the_guides_line(hub, tree):
    hub.build_seconds = 2
    out = run(hub, tree, *GUIDE)
    space = hub.spaces[SPACE]
    assert (tree / ".env.local").read_text() == f"VITE_CLOUD_ENGINE_URL={space.host}\n"
    assert space.variables["ALLOW_ORIGINS"]["value"] == "http://localhost:5173" and not space.secrets
    assert set(FILES) | {"Dockerfile", "README.md"} <= set(space.tree) and len(commits(hub)) == 1
    assert space.tree["aura_engine/assets/embedded/model.safetensors"].lfs
    assert re.search(r"wait +RUNNING", out) and "build  --> Pushing image" in out and "a picture came, and a stranger was refused" in out
    receipt = json.loads((tree / "build/deploy/ada--aura.json").read_text())
    assert receipt["oid"] == space.head and receipt["health"]["buildId"] == receipt["build"]


def test_twice_writes_once(hub, tree):
    secret = {"AURA_API_KEY": "a-long-key-for-the-engine"}
    call(hub, tree, *GUIDE, "--secret", "AURA_API_KEY", "--preset", "cpu", **secret)
    before, env = len(hub.writes), (tree / ".env.local").stat().st_mtime_ns
    assert "nothing to change" in call(hub, tree, *GUIDE, "--secret", "AURA_API_KEY", "--preset", "cpu", **secret)
    assert len(hub.writes) == before and (tree / ".env.local").stat().st_mtime_ns == env
    call(hub, tree, *GUIDE, "--secret", "AURA_API_KEY", AURA_API_KEY="another-key-for-the-engine")
    assert hub.writes[before:] == [f"POST /api/spaces/{SPACE}/secrets"]


def test_a_log_that_breaks_off_is_said_once(hub, tree):
    hub.log_break, hub.build_seconds = 2, 2
    said = re.findall(r"build  (.*)", call(hub, tree, *GUIDE))
    assert said == ["===== Build Queued =====", "--> FROM python:3.11-slim", "--> RUN pip install -r requirements.txt", "--> Pushing image"] and hub.log_break is None


def test_a_sleep_time_alone_restarts_nothing(hub, tree):
    space = running(hub, tree, hardware="t4-small", variables={"ALLOW_ORIGINS": {"value": GUIDE[1]}, "TORCH_INDEX_URL": {"value": "cu126"}})
    call(hub, tree, *GUIDE, "--sleep-time", "600", "--timeout", "2")
    assert space.sleep_time == 600 and hub.writes == [f"POST /api/spaces/{SPACE}/sleeptime"]


def test_only_what_changed_travels(hub, tree):
    space = running(hub, tree)
    edit(tree)
    (tree / "aura_engine/assets/page/index.html").unlink()
    (tree / "aura_engine/assets/page/style.css").write_text("")
    first = dict(space.tree)
    call(hub, tree, *GUIDE)
    changed = {p for p in set(first) | set(space.tree) if first.get(p) != space.tree.get(p)}
    assert changed == {"app.py", "Dockerfile", "aura_engine/assets/page/index.html", "aura_engine/assets/page/style.css"}


def test_dry_run(hub, tree):
    out = call(hub, tree, *GUIDE, "--preset", "t4", "--dry-run")
    assert "SD_LCM_LORA_ID" in out and "t4-small costs $0.40 an hour" in out and not hub.writes and not (tree / ".env.local").exists()
    call(hub, tree, "--dry-run", "--detailed-exitcode", code=10)
    running(hub, tree)
    call(hub, tree, "--dry-run", "--detailed-exitcode")


def test_json_lines(hub, tree):
    lines = [json.loads(line) for line in call(hub, tree, *GUIDE, "--json").splitlines()]
    assert lines[-1]["step"] == "receipt" and lines[-1]["oid"] == hub.spaces[SPACE].head
    assert {"verb": "create", "what": "space", "name": SPACE, "now": "", "then": "docker, public, cpu-basic"} in lines[1]["plan"]


def test_a_secret_makes_room_for_the_variable(hub, tree):
    running(hub, tree, variables={}, secrets={"ALLOW_ORIGINS": {"key": "ALLOW_ORIGINS", "value": "http://old"}})
    call(hub, tree, *GUIDE)
    assert hub.writes == [f"DELETE /api/spaces/{SPACE}/secrets", f"POST /api/spaces/{SPACE}/variables"]


def test_what_took_a_secrets_place_stays_when_rolled_back(hub, tree):
    space = running(hub, tree, variables={}, secrets={"ALLOW_ORIGINS": {"key": "ALLOW_ORIGINS", "value": "http://old"}})
    edit(tree, "FAIL_RUN")
    assert "stays as it is now: secret ALLOW_ORIGINS" in call(hub, tree, *GUIDE, code=27)
    assert space.variables["ALLOW_ORIGINS"]["value"] == "http://localhost:5173"


def test_a_variable_that_becomes_a_secret_is_not_shown(hub, tree):
    running(hub, tree, variables={"MINE": {"key": "MINE", "value": "pl4nted"}})
    for flags in ((), ("--json",)): assert "pl4nted" not in call(hub, tree, "--secret", "MINE", "--dry-run", *flags, MINE="pl4nted")
    call(hub, tree, "--secret", "MINE", MINE="pl4nted")
    assert not hub.spaces[SPACE].variables and hub.spaces[SPACE].secrets["MINE"]["value"] == "pl4nted"


def test_what_is_unexpected_is_blacked_out_too(hub, tree):
    with patch.object(deploy, "plan_deployment", lambda *_: 1 / len(hub.token[99:])): assert "ZeroDivisionError" in call(hub, tree, code=1)
    with patch.object(deploy, "plan_deployment", side_effect=RuntimeError(f"Illegal header value b'Bearer {TOKEN}'")): assert TOKEN not in call(hub, tree, code=1)
    assert "--env-file" in call(hub, tree, "--env-file", "nowhere/.env.local", code=3)


def test_a_preset_clears_the_other_ones_variables_only(hub, tree):
    mine = {"MINE": {"key": "MINE", "value": "1"}, "SD_PRECISION": {"key": "SD_PRECISION", "value": "fp16"}}
    space = running(hub, tree, variables=mine)
    call(hub, tree, *GUIDE)
    assert "SD_PRECISION" in space.variables
    space.variables |= rows(EXTRA_PACKAGES="einops")
    call(hub, tree, *GUIDE, "--preset", "cpu")
    assert set(space.variables) == {"MINE", "ALLOW_ORIGINS", "EXTRA_PACKAGES"}


def test_settings_are_believed_only_when_the_new_process_answers(hub, tree):
    running(hub, tree)
    hub.lag, hub.start_seconds = 0.4, 0.3
    call(hub, tree, "--origins", "https://my.site")
    assert not commits(hub) and hub.spaces[SPACE].run.env["ALLOW_ORIGINS"] == "https://my.site"
    assert time.monotonic() - hub.spaces[SPACE].run.started > 0.7


def test_more_hardware_when_agreed(hub, tree):
    space = running(hub, tree)
    call(hub, tree, *GUIDE, "--preset", "t4", "--sleep-time", "600", "--yes")
    assert space.hardware == "t4-small" and space.sleep_time == 600 and space.variables["TORCH_INDEX_URL"]["value"] == "cu126"
    assert b"suggested_hardware: \"t4-small\"" in space.tree["README.md"].data
    assert "nothing to change" in call(hub, tree, *GUIDE, "--preset", "t4")


def test_private_and_asleep_and_slow(hub, tree):
    space = running(hub, tree, private=True)
    space.forced, hub.edge_pages, hub.log_delay = "SLEEPING", 3, 0.2
    out = call(hub, tree, *GUIDE)
    assert not hub.writes and "a picture came" in out


def test_a_key_that_is_on_the_space_but_not_here(hub, tree):
    running(hub, tree, secrets={"AURA_API_KEY": {"key": "AURA_API_KEY", "value": "somebody else set it"}})
    assert "it wants its key" in call(hub, tree, *GUIDE)


def test_status_logs_restart_and_back(hub, tree):
    space = running(hub, tree)
    first = space.head
    edit(tree)
    call(hub, tree, *GUIDE)
    assert f"head  {space.head}" in call(hub, tree, "--status")
    assert "serving with" in call(hub, tree, "--logs", "run")
    for look in (("--logs", "run"), ("--status",)): assert "not found" in call(hub, tree, *look, "--space-id", "ada/none", code=3)
    call(hub, tree, "--restart")
    before = len(hub.writes)
    for wrong in ("main", first[:6], "f" * 40): assert f"{first}  initial commit" in call(hub, tree, "--rollback-to", wrong, code=3)
    assert len(hub.writes) == before
    call(hub, tree, "--rollback-to", first[:7])
    assert space.tree == space.commits[first] and space.head != first


@pytest.mark.parametrize("look", ["--status", "doctor"])
def test_a_look_wakes_nobody(hub, tree, look):
    """The first visit to a Space that sleeps wakes it, and its hardware is paid for again."""
    space = running(hub, tree, hardware="t4-small", sleep_time=600)
    space.forced = "SLEEPING"
    out = call(hub, tree, look)
    assert "asleep; it was not asked" in out and space.forced == "SLEEPING" and not [p for _, p in hub.requests if p.startswith("host:")]


def visits(hub): return [path for _, path in hub.requests if path.startswith("host:")]


def test_a_space_that_costs_sleeps_on_when_nothing_is_to_change(hub, tree):
    """It is said, with what a test would cost. --prove asks for it. A folder that has tested this commit knows its address, another one does not."""
    again = (*GUIDE, "--preset", "t4", "--sleep-time", "600")
    call(hub, tree, *again, "--yes")
    space, written, seen = hub.spaces[SPACE], len(hub.writes), len(visits(hub))
    space.forced = "SLEEPING"
    (tree / ".env.local").unlink()
    out = call(hub, tree, *again)
    assert "It sleeps, and was not woken" in out and "tested from this folder before" in out and "so that costs $0.07 or more" in out
    assert space.host in (tree / ".env.local").read_text()
    shutil.rmtree(tree / "build")
    (tree / ".env.local").unlink()
    said = [json.loads(line) for line in call(hub, tree, *again, "--json").splitlines()]
    assert "was not tested from this folder" in said[-2]["text"] and "host" not in said[-1] and not (tree / ".env.local").exists()
    assert space.forced == "SLEEPING" and len(visits(hub)) == seen and len(hub.writes) == written
    assert "a picture came" in call(hub, tree, *again, "--prove") and not space.forced and len(hub.writes) == written


def test_a_run_that_is_not_over_wakes_the_space_that_it_changed(hub, tree):
    """Somebody who did not wait comes back for the proof."""
    space = running(hub, tree, hardware="t4-small", sleep_time=600, variables=rows(TORCH_INDEX_URL="cu126"))
    edit(tree)
    call(hub, tree, "--no-wait")
    while hub.stage(space)[0] != "RUNNING": time.sleep(0.05)
    space.forced = "SLEEPING"
    assert "a picture came" in call(hub, tree)


def test_programs_get_facts(hub, tree):
    running(hub, tree)
    for look in ("doctor", "--status"):
        said = json.loads(call(hub, tree, look, "--json"))
        assert said["facts"]["stage"] == "RUNNING" and said["facts"]["engine"].startswith("ready")
    plan = next(line for line in map(json.loads, call(hub, tree, "--var", "X=1", "--dry-run", "--json").splitlines()) if "plan" in line)
    call(hub, tree, "--var", "X=1", "--plan", plan["number"], "--no-wait")
    assert hub.spaces[SPACE].variables["X"]["value"] == "1"


# what goes wrong

def poor(hub): hub.user |= {"isPro": False, "canPay": False}
def reader(hub): hub.user["auth"]["accessToken"]["role"] = "read"
def gradio(hub): hub.space(SPACE, sdk="gradio")
def paused(hub): hub.space(SPACE).forced = "PAUSED"
def clash(hub): hub.space(SPACE, variables={"X": {"key": "X", "value": "1"}}, secrets={"X": {"key": "X", "value": "2"}})
def stranger(hub): hub.token = "hf_" + "other" * 7
def nothing(hub): pass


@pytest.mark.parametrize("prepare, args, says", [
    (poor, GUIDE, "402|paid plan"), (reader, GUIDE, "can only read"), (gradio, GUIDE, "gradio Space"), (paused, GUIDE, "PAUSED"), (clash, GUIDE, "X is a variable and a secret"),
    (nothing, ("--hardware", "l4x1"), "agree with --yes"), (nothing, ("--preset", "t4"), "t4-small costs .* agree with --yes"), (nothing, ("--hardware", "abacus"), "not on the Hub's list"),
    (nothing, ("--space-id", "grace/aura"), "may not write to grace"), (nothing, ("--space-id", "lurkers/aura"), "may not write to lurkers"),
], ids=lambda v: getattr(v, "__name__", None))
def test_preflight_online(hub, tree, prepare, args, says):
    prepare(hub)
    assert re.search(says, call(hub, tree, *args, code=3))
    assert [w for w in hub.writes if "repos/create" not in w] == [] and not (tree / ".env.local").exists()


def test_wrong_and_missing_token(hub, tree):
    assert "not accepted" in call(hub, tree, code=3, HF_TOKEN="hf_" + "wrong" * 7)
    assert "token is missing" in call(hub, tree, code=3, HF_TOKEN="")


@pytest.mark.parametrize("name, text, says", [
    ("aura_engine/keys.py", "key = 'hf_" + "q" * 34 + "'", "looks like a token"), ("aura_engine/assets/big.bin", "x" * 1_000_001, "only the embedded weights"),
    ("aura_engine/server.py", "import torch_of_tomorrow", "no line of requirements"), ("aura_engine/server.py", "def", "cannot read"), ("app.py", None, "app.py is missing"),
    ("Dockerfile", "ARG AURA_BUILD_ID=\nEXPOSE 8000\n", "EXPOSE"), ("Dockerfile", "EXPOSE 7860\n", "AURA_BUILD_ID"), ("Dockerfile", "ARG AURA_BUILD_ID=\nCOPY src ./\nEXPOSE 7860\n", "copies src"), ("requirements.lock", "fastapi==0.165.0 --hash=sha256:00\n", "lacks uvicorn"),
    ("locks/torch-cpu.lock", "torch==2.12.0+cpu --hash=sha256:00\n", "torch-cpu.lock is not of torch==2.13.0"),
    ("requirements.lock", "fastapi==0.165.0\nuvicorn==0.54.0 --hash=sha256:00\n", "fastapi has no hash"),
])
def test_preflight_offline(tree, name, text, says):
    (tree / name).unlink(missing_ok=True)
    if text is not None: (tree / name).write_text(text)
    with pytest.raises(deploy.DeployError, match=says) as e: deploy.Deployment(deploy.DeployOptions(SPACE, source=tree), lambda *_: None).check()
    assert e.value.code == 3


def test_the_lock_is_what_the_image_installs():
    """It holds all that the requirements bring, by version and hash, fits them, and the Dockerfile installs nothing beside it but torch and what is asked for."""
    locked = bundle.locked_versions((ROOT / "requirements.lock").read_text())
    bring, complete = bundle.installed_by((ROOT / "requirements.txt").read_text())
    of_torch = bundle.installed_by("torch\n")[0]
    elsewhere = {"colorama", "exceptiongroup", "httpx2-jsfetch", "tomli"}          # for Windows, a browser, an older Python
    assert complete and not bring - of_torch - set(locked) - elsewhere and "torch" not in locked
    docker = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"pip install --no-cache-dir (.*?)(?:;.*)?$", docker, re.M) == [
        "torch==2.13.0", '--no-deps --require-hashes -r "locks/torch-$name.lock" && \\', '--no-deps --require-hashes -r "locks/cuda-$name.lock"', "--no-deps --require-hashes -r requirements.lock",
        '--no-deps --require-hashes -r "locks/$name.lock"', "$rest"]
    assert bundle.lock_age((ROOT / "requirements.lock").read_text(), date(2027, 1, 1)) < 366


def dockerfile_step(begin, text=None):
    """The RUN step of the Dockerfile that begins so."""
    text = text or (ROOT / "Dockerfile").read_text()
    return re.search(rf"^RUN ({begin}.*\n(?:.*\\\n)*.*)$", text, re.M)[1]


def dry_step(folder, begin, programs=("pip",), **env):
    """What a step of the Dockerfile would do, run by sh: the lines that these programs would get."""
    for name in programs:
        (folder / name).write_text('#!/bin/sh\necho "$(basename "$0") $@"\n')
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:/bin:/usr/bin", **env}
    return subprocess.run(["sh", "-c", dockerfile_step(begin)], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


def test_extra_packages_with_a_lock_go_by_hash(tmp_path):
    """openvino by its lock, which fits what settings.ini asks for and brings what it needs. Others by name, in one call."""
    assert dry_step(tmp_path, "set -e; rest=", EXTRA_PACKAGES="") == []
    assert dry_step(tmp_path, "set -e; rest=", EXTRA_PACKAGES="einops openvino rich>=1") == [
        "pip install --no-cache-dir --no-deps --require-hashes -r locks/openvino.lock", "pip install --no-cache-dir einops rich>=1"]
    locked = bundle.locked_versions((ROOT / "locks/openvino.lock").read_text())
    wish = bundle.Requirement(nb.settings()["openvino_requirements"].strip())
    assert wish.name in deploy_plan.OPENVINO.split() and wish.specifier.contains(locked["openvino"])
    bring, complete = bundle.installed_by(str(wish) + "\n")
    elsewhere = bundle.locked_versions((ROOT / "requirements.lock").read_text())
    assert complete and bring <= set(locked) | set(elsewhere) and not set(locked) & set(elsewhere)


@pytest.mark.parametrize("cuda", ["None", "'12.6'"])
def test_a_compiler_is_in_the_image_for_a_gpu_only(tmp_path, cuda):
    (tmp_path / "torch.py").write_text(f"class version: cuda = {cuda}\n")
    (tmp_path / "python").symlink_to(sys.executable)
    said = dry_step(tmp_path, "if python -c", ("apt-get", "rm"), PYTHONPATH=str(tmp_path))
    assert any("gcc g++" in line for line in said) == (cuda != "None")


@pytest.mark.parametrize("named, locks", [
    ("cpu", ["torch-cpu"]), ("cu126", ["torch-cu126", "cuda-cu126"]), ("cu130", ["torch-cu130", "cuda-cu130"]), ("pypi", ["torch-pypi"]),
    ("cu999", []), ("https://my.wheels/cpu", [])])
def test_the_dockerfile_takes_the_lock_of_the_wheels(tmp_path, named, locks):
    """Its own lines, run by sh: every name that a deployment may give is installed by hash, torch from its index and what it needs from the usual
    one. Another name, or an index of your own, is installed by version."""
    (tmp_path / "pip").write_text('#!/bin/sh\necho "${PIP_INDEX_URL-usual} $@"\n')
    (tmp_path / "uname").write_text("#!/bin/sh\necho x86_64\n")
    for name in ("pip", "uname"): (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/bin:/usr/bin", "TORCH_INDEX_URL": named}
    done = subprocess.run(["sh", "-c", dockerfile_step("case")], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    index = {"pypi": "", "https://my.wheels/cpu": named}.get(named, lock.torch_index((ROOT / "Dockerfile").read_text(), named))
    words = [f"--no-deps --require-hashes -r locks/{name}.lock" for name in locks] or ["torch==2.13.0"]
    assert done.stdout.splitlines() == [f"{index if n == 0 else 'usual'} install --no-cache-dir {asked}" for n, asked in enumerate(words)]
    assert named in deploy_plan.WHEELS or not locks


def tiny_wheel(folder, name, version, text, needs=""):
    """A wheel with one module, whose content is `text` -> its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(f"{name}.py", f"said = {text!r}\n")
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def indexes(tmp_path):
    """Two package indexes on this machine: pip's usual one, and one of torch's wheels that has another triton too. Their wheels have a line each."""
    web = tmp_path / "web"
    sums = {"torch": tiny_wheel(web / "whl/cu126/torch", "torch", "2.13.0+cu126", "torch of its index", "Requires-Dist: triton==3.7.1\n"),
            "triton": tiny_wheel(web / "usual/triton", "triton", "3.7.1", "triton of the usual index")}
    tiny_wheel(web / "whl/cu126/triton", "triton", "3.7.1", "another triton")
    tiny_wheel(web / "usual/torch", "torch", "2.13.0", "torch of the usual index")
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=web)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        docker = (ROOT / "Dockerfile").read_text()
        yield {"web": web, "sums": sums, "usual": f"{here}/usual", "docker": docker.replace(lock.torch_index(docker, ""), f"{here}/whl/")}
        server.shutdown()


def test_the_locks_are_made_from_two_indexes(indexes, tmp_path, monkeypatch, capsys):
    """tools/lock.py: torch's hash is that of its own index, even if the usual one has a torch, and the others have the usual one's. An index without
    this torch leaves its locks alone."""
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks/torch-cu130.lock").write_text("mine\n")
    for name, value in {"ROOT": tmp_path, "WHEELS": ("cu126", "cu130")}.items(): monkeypatch.setattr(lock, name, value)
    for name, value in {"UV_DEFAULT_INDEX": indexes["usual"], "UV_CACHE_DIR": str(tmp_path / "uv"), "UV_NO_CONFIG": "1"}.items(): monkeypatch.setenv(name, value)
    for name in ("UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_INDEX", "UV_FIND_LINKS"): monkeypatch.delenv(name, raising=False)
    lock.write_torch_locks(indexes["docker"], date(2026, 11, 27))
    sums = indexes["sums"]
    assert (tmp_path / "locks/torch-cu126.lock").read_text().splitlines()[1:] == ["torch==2.13.0+cu126 \\", f"    --hash=sha256:{sums['torch']}"]
    assert (tmp_path / "locks/cuda-cu126.lock").read_text().splitlines()[1:] == ["triton==3.7.1 \\", f"    --hash=sha256:{sums['triton']}"]
    assert "torch-cu130.lock stays as it is" in capsys.readouterr().out and (tmp_path / "locks/torch-cu130.lock").read_text() == "mine\n"


@pytest.mark.parametrize("index_has", ["the locked torch", "another torch"])
def test_the_locks_of_two_indexes_are_installed_by_a_real_pip(indexes, tmp_path, index_has):
    """The step of the Dockerfile for `cu126`. A wheel that was exchanged since stops it."""
    sums = indexes["sums"]
    if index_has == "another torch": tiny_wheel(indexes["web"] / "whl/cu126/torch", "torch", "2.13.0+cu126", "changed since")
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks/torch-cu126.lock").write_text(f"torch==2.13.0+cu126 --hash=sha256:{sums['torch']}\n")
    (tmp_path / "locks/cuda-cu126.lock").write_text(f"triton==3.7.1 --hash=sha256:{sums['triton']}\n")
    (tmp_path / "pip").write_text(f'#!/bin/sh\nexec {sys.executable} -m pip "$@" --target {tmp_path}/site --disable-pip-version-check\n')
    (tmp_path / "uname").write_text("#!/bin/sh\necho x86_64\n")
    for program in ("pip", "uname"): (tmp_path / program).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/bin:/usr/bin", "TORCH_INDEX_URL": "cu126", "PIP_INDEX_URL": indexes["usual"], "PIP_CONFIG_FILE": os.devnull, "HOME": str(tmp_path)}
    done = subprocess.run(["sh", "-c", dockerfile_step("case", indexes["docker"])], cwd=tmp_path, env=env, capture_output=True, text=True)
    if index_has == "another torch":
        assert done.returncode and "DO NOT MATCH THE HASHES" in done.stderr and not (tmp_path / "site").exists()
    else:
        assert not done.returncode, done.stderr
        assert {n: (tmp_path / f"site/{n}.py").read_text() for n in sums} == {"torch": "said = 'torch of its index'\n", "triton": "said = 'triton of the usual index'\n"}


def test_each_lock_of_torch_is_whole():
    """torch of the Dockerfile's version and what only it needs, each with its hashes. The CUDA ones with NVIDIA's libraries. Every name has one."""
    pin = lock.torch_pin((ROOT / "Dockerfile").read_text())
    assert {path.stem for path in (ROOT / "locks").glob("torch-*")} == {f"torch-{name}" for name in deploy_plan.WHEELS} and lock.WHEELS == deploy_plan.WHEELS
    for name in deploy_plan.WHEELS:
        files = [path for path in (ROOT / f"locks/torch-{name}.lock", ROOT / f"locks/cuda-{name}.lock") if path.exists()]
        texts = [path.read_text() for path in files]
        blocks = re.findall(r"(?m)^[^#\s].*(?:\n[ \t]+.*)*", "".join(texts))
        assert all(re.search(r"--hash=sha256:[0-9a-f]{64}$", block) for block in blocks), name
        locked = {package: version for text in texts for package, version in bundle.locked_versions(text).items()}
        assert locked["torch"] == pin.removeprefix("torch==") + ("" if name == "pypi" else f"+{name}") and len(blocks) == len(locked)
        assert ("triton" in locked) == (name != "cpu") == any(package.startswith("nvidia-cublas") for package in locked), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch-pypi", "cuda-cu126", "cuda-cu130", "openvino"])
def test_a_lock_has_the_hashes_of_its_index(name):
    """What PyPI offers today under the locked versions has the locked hashes, and needs nothing that is not locked. torch's own index cannot be
    asked everywhere."""
    text = (ROOT / f"locks/{name}.lock").read_text()
    try: lock.compiled("packaging")
    except RuntimeError as e: pytest.skip(f"no package index: {e}")
    blocks = re.findall(r"(?m)^[^#\s].*(?:\n[ \t]+.*)*", text)
    offered = lock.compiled("\n".join(block.partition(" ")[0] for block in blocks))
    assert set(re.findall("sha256:[0-9a-f]{64}", "".join(blocks))) <= set(re.findall("sha256:[0-9a-f]{64}", "".join(offered)))
    elsewhere = bundle.locked_versions((ROOT / "requirements.lock").read_text())
    assert {lock.named(block) for block in offered} - set(elsewhere) == {lock.named(block) for block in blocks}


def test_the_base_is_named_by_its_digest(tmp_path, monkeypatch):
    """And tools/lock.py renews it where a program can ask the registry."""
    name, digest = lock.BASE.search((ROOT / "Dockerfile").read_text()).groups()
    assert name == "python:3.11-slim"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lock.base_of_today(name) is None
    (tmp_path / "skopeo").write_text(f"#!/bin/sh\n[ \"$4\" = docker://docker.io/library/{name} ] && echo {digest}\n")
    (tmp_path / "skopeo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert lock.base_of_today(name) == digest


def test_the_sbom_lists_what_the_image_has():
    text = (ROOT / "requirements.lock").read_text()
    made = json.loads(lock.sbom(text, (ROOT / "locks/torch-cpu.lock").read_text()))
    have = {bundle.plain_name(c["name"]): c for c in made["components"]}
    assert made["bomFormat"] == "CycloneDX" and {n: c["version"] for n, c in have.items()} == {**bundle.locked_versions(text), "torch": "2.13.0+cpu"}
    assert all(c["externalReferences"][0]["hashes"] for c in have.values())


def test_a_package_that_is_not_its_notebooks(tree):
    cells = [{"cell_type": "code", "source": ["#| default_exp server"]}, {"cell_type": "code", "source": ["#| export\n", "from aura_engine import extra\n", "import fastapi"]}]
    (tree / "nbs").mkdir()
    (tree / "nbs/11_server.ipynb").write_text(json.dumps({"cells": cells}))
    assert bundle.stale_modules(tree) == ["11_server.ipynb"]
    (tree / "aura_engine/server.py").write_text("# made\nfrom . import extra\nimport fastapi\n")
    assert bundle.stale_modules(tree) == []


def test_files_that_must_stay_at_home_do(tree):
    for name in (".env", ".env.local", "aura_engine/.env", "aura_engine/assets/.env.local", "notes.txt", "aura_engine/__pycache__/x.py", "tests/secret.py"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("SECRET=1")
    assert set(bundle.upload_set(tree)) == set(FILES) | {"Dockerfile"}


@pytest.mark.parametrize("args", [["--space-id", "aura"], ["--prove", "--no-wait"], ["--prove", "--smoke", "none"], ["--origins", "my.site"], ["--origins", "*"], ["--var", "A"], ["--model", "model.ckpt"], ["--secret", "NOT_SET"], ["--spaceid", "x"],
                                  ["--preset", "t9"], ["--var", "SD_DEVCE=cuda"], ["--var", "TORCH_COMPLIE=1"], ["--var", "ALOW_ORIGINS=x"], ["--var", "EXTRA_PACKAGE=x"], ["--var", "SD_PRECISION=fp99"], ["--model", "black-forest-labs/FLUX.1-dev"],
                                  ["--var", "SD_MODEL_ID=someone/else"], ["--var", "ALLOW_ORIGINS=*"], ["--var", "ALLOW_ORIGINS=https://a.b,*"], ["--secret", "ALLOW_ORIGINS"],
                                  ["--var", "TORCH_INDEX_URL=nonsense"], ["--var", "TORCH_INDEX_URL=http://my.wheels/cpu"], ["--var", "EXTRA_PACKAGES=--pre x"], ["--var", "BASE_IMAGE=a b"], ["--secret", "EXTRA_PACKAGES"],
                                  ["--origins", "https://*.my.site"], ["--origins", ""], ["--sleep-time", "0"], ["--sleep-time", "-5"], ["--secret", "PORT"], ["--secret", "HOME", "--var", "HOME=1"]], ids=" ".join)
def test_usage(args, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    for name, text in {"ALLOW_ORIGINS": "*", "EXTRA_PACKAGES": "rich", "PORT": "8000"}.items(): monkeypatch.setenv(name, text)       # what --secret reads
    assert deploy.run_deploy(["--space-id", SPACE, *args]) == 2
    assert capsys.readouterr().err


def test_somebody_was_faster(hub, tree):
    running(hub, tree)
    edit(tree)
    hub.fail("POST", "/commit/", (412, {"error": "A commit has happened since."}))
    assert "planning once more" in call(hub, tree, *GUIDE)
    edit(tree, "again")
    hub.fail("POST", "/commit/", *[(412, {"error": "A commit has happened since."})] * 2)
    call(hub, tree, *GUIDE, code=4)


def test_a_name_taken_meanwhile_and_a_create_that_is_refused(hub, tree):
    hub.fail("POST", "repos/create", (409, {"error": "You already created this space repo", "url": "x"}))
    assert "planning once more" in call(hub, tree, *GUIDE)
    hub.fail("POST", "repos/create", (403, {"error": "no rights"}))
    assert "may not write there" in call(hub, tree, "--space-id", "guild/aura", code=3)


def test_the_proxys_kindness_is_not_the_engines_refusal(hub, tree):
    edit(tree, "FAIL_ORIGIN")
    assert "a foreign origin was answered 200" in call(hub, tree, *GUIDE, "--timeout", "0.5", code=8)
    hub.edge_pages = 10**6
    assert "the Space's proxy answered 503, not the engine" in call(hub, tree, *GUIDE, "--timeout", "0.5", code=8)


@pytest.mark.parametrize("word, code, says", [("FAIL_BUILD", 5, "No matching distribution"), ("FAIL_RUN", 7, "RuntimeError: FAIL_RUN"), ("FAIL_SMOKE", 8, "of one colour")])
def test_a_version_that_fails(hub, tree, word, code, says):
    """A first one stays to be looked at. One that follows a good one makes way for it again."""
    edit(tree, word)
    quick = ("--timeout", "1.5")
    assert says in call(hub, tree, *GUIDE, *quick, code=code) and not (tree / ".env.local").exists() and len(commits(hub)) == 1
    hub.spaces.clear()
    (tree / "app.py").write_text(FILES["app.py"])
    space = running(hub, tree)
    good = dict(space.tree)
    edit(tree, word)
    (tree / "aura_engine/new.py").write_text("")
    out = call(hub, tree, "--origins", "https://new.site", "--secret", "EXTRA", *quick, code=20 + code, EXTRA="something")
    assert says in out and space.tree == good and hub.stage(space) == ("RUNNING", space.head) and len(space.commits) == 3
    assert space.variables["ALLOW_ORIGINS"]["value"] == "http://localhost:5173" and not space.secrets
    call(hub, tree, "--no-rollback", *quick, code=code)
    assert len(space.commits) == 4


def test_stuck_in_the_queue(hub, tree):
    hub.stuck = True
    assert "may be queued" in call(hub, tree, *GUIDE, "--timeout", "0.5", code=6)
    hub.stuck = False
    assert "nothing to change" in call(hub, tree, *GUIDE)


def test_a_collision_that_appears_after_the_plan(hub, tree):
    space = running(hub, tree)
    edit(tree)
    hub.watch = lambda n, method, path, phase: phase == "after" and "/commit/" in path and space.secrets.update(ALLOW_ORIGINS={"key": "ALLOW_ORIGINS", "value": "x"})
    assert "Collision on variables and secrets names" in call(hub, tree, *GUIDE, "--no-rollback", code=7)


def test_yesterdays_error_is_not_todays(hub, tree):
    """Right after the push the Hub still shows how the last commit failed."""
    edit(tree, "FAIL_RUN")
    running(hub, tree)
    (tree / "app.py").write_text(FILES["app.py"])
    hub.lag = 0.5
    assert "wait  RUNTIME_ERROR" in call(hub, tree, *GUIDE)


def test_a_busy_hub_is_waited_for_and_a_silent_one_is_not(hub, tree):
    hub.fail("GET", "whoami", (429, {"error": "slow down"}, {"retry-after": "1"}), (503, None))
    hub.fail("POST", "repos/create", (502, None))
    call(hub, tree, *GUIDE)
    hub.fail("GET", "whoami", *[(503, None)] * 9)
    assert "503" in call(hub, tree, *GUIDE, code=9)
    assert "no answer" in call(hub, tree, code=9, HF_ENDPOINT="http://127.0.0.1:9")


@pytest.mark.parametrize("word, code", [("FAIL_BUILD", 25), ("FAIL_RUN", 27), ("FAIL_SMOKE", 28)])
def test_cut_off_before_it_went_back(hub, tree, word, code):
    """Killed after the commit of a version that fails: the next run finds the way back, though it has nothing to change. So does the one after a timeout."""
    space = running(hub, tree)
    good = dict(space.tree)
    edit(tree, word)
    if word == "FAIL_RUN":
        process = start(hub, tree, "--origins", "https://new.site")
        while not commits(hub): time.sleep(0.02)
        process.kill()
        process.communicate()
    else: call(hub, tree, "--origins", "https://new.site", "--timeout", "0.01", code=6)
    time.sleep(0.5)
    out = call(hub, tree, "--origins", "https://new.site", "--timeout", "2", code=code)
    assert "nothing to change" in out and space.tree == good and space.variables["ALLOW_ORIGINS"]["value"] == "http://localhost:5173"
    assert "nothing to change" not in call(hub, tree, "--dry-run") and "journal" not in deploy.DeployRecord(deploy.DeployOptions(SPACE, source=tree)).read()


def test_two_plans_are_undone_as_one(hub, tree):
    """Settings of the first plan, a commit of the second one."""
    space = running(hub, tree)
    edit(tree, "FAIL_RUN")
    hub.fail("POST", "/commit/", (412, {"error": "A commit has happened since."}))
    call(hub, tree, "--origins", "https://new.site", "--secret", "EXTRA", EXTRA="something", code=27)
    assert space.variables["ALLOW_ORIGINS"]["value"] == "http://localhost:5173" and not space.secrets


def test_interrupted(hub, tree):
    hub.stuck = True
    process = start(hub, tree, *GUIDE)
    while not commits(hub): time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert "carries on" in process.communicate(timeout=60)[0] and process.returncode == 130


# crashes

def interesting(method, path): return method in ("POST", "DELETE") and not READS.search(path)


@pytest.mark.parametrize("new", [True, False], ids=["new", "existing"])
def test_killed_anywhere_then_run_again(tree, new):
    """The process is killed at each request that matters, once before the Hub acts on it and once after. The next run arrives."""
    (tree / ".env.local").write_text("MINE=1\n")
    edit(tree, "old")
    old = {**bundle.stamp(bundle.upload_set(tree)), "README.md": deploy_plan.space_readme(SPACE, {})}
    edit(tree, "new")
    (tree / "aura_engine/assets/embedded/model.safetensors").write_text("better weights")
    survived, at = False, 0
    while not survived:
        with Hub(lag=0.02, build_seconds=0.05, start_seconds=0.02) as hub:
            if not new: running(hub, tree, old, variables={}, secrets={"ALLOW_ORIGINS": {"key": "ALLOW_ORIGINS", "value": "http://old"}})
            hits, victim = [], []
            def kill(n, method, path, phase, hits=hits, victim=victim, at=at):
                if not interesting(method, path): return
                hits.append(path)
                if len(hits) == at + 1:
                    os.kill(victim[0].pid, signal.SIGKILL)                           # not join(): two threads that wait spoil the exit status
                    time.sleep(0.05)
                    if phase == "before": raise ConnectionAbortedError
            hub.watch = kill
            victim.append(fork(hub, tree, *GUIDE))
            victim[0].join(60)
            assert victim[0].exitcode in (0, -signal.SIGKILL), (tree / ".log").read_text()
            survived, at = victim[0].exitcode == 0, at + 1
            hub.watch = lambda *_: None
            if not survived: call(hub, tree, *GUIDE)
            space = hub.spaces[SPACE]
            assert hub.stage(space) == ("RUNNING", space.head) and len(space.commits) == 2
            assert {k: v["value"] for k, v in space.variables.items()} == {"ALLOW_ORIGINS": "http://localhost:5173"} and not space.secrets
            assert (tree / ".env.local").read_text() == f"MINE=1\nVITE_CLOUD_ENGINE_URL={space.host}\n"
            (tree / ".env.local").write_text("MINE=1\n")
    assert at > 5


# money, and other people's work

GPU = ("--preset", "t4", "--yes")


def state_of(space, tree=True):
    """All of a Space that a deployment may change."""
    values = lambda rows: {k: v["value"] for k, v in rows.items()}
    sleep = space.sleep_time if space.hardware != "cpu-basic" else None
    return space.hardware, sleep, space.private, space.volumes, values(space.variables), values(space.secrets), space.tree if tree else None


def test_hardware_is_asked_for_first(hub, tree):
    """Refused hardware leaves nothing behind: not a variable for a GPU that is not there."""
    space = running(hub, tree)
    before = state_of(space)
    hub.user["canPay"] = False
    assert "no payment method" in call(hub, tree, *GPU, code=3) and not hub.writes
    hub.user["canPay"] = True
    hub.fail("POST", "/hardware", (402, {"error": "add a payment method"}))
    assert "add a payment method" in call(hub, tree, *GPU, code=3)
    assert hub.writes == [f"POST /api/spaces/{SPACE}/hardware"] and state_of(space) == before
    assert "journal" not in deploy.DeployRecord(deploy.DeployOptions(SPACE, source=tree)).read()


def everything(hub, tree):
    """A Space, and a command that changes everything about it that can be changed."""
    secrets = {"ALLOW_ORIGINS": {"key": "ALLOW_ORIGINS", "value": "http://old"}, "AURA_API_KEY": {"key": "AURA_API_KEY", "value": "old"}}
    rows = {"MINE": {"key": "MINE", "value": "1"}, "SD_BACKEND": {"key": "SD_BACKEND", "value": "torch"}, "HIDE": {"key": "HIDE", "value": "me"}}
    mine = {"type": "dataset", "source": "ada/pictures", "mountPath": "/pictures", "readOnly": True, "revision": "main", "path": None}
    space = running(hub, tree, secrets=secrets, variables=rows, volumes=[mine])
    edit(tree)
    (tree / "aura_engine/new.py").write_text("")
    return space, (*GUIDE, *GPU, "--bucket", "ada/kept", "--visibility", "private", "--secret", "HIDE", "--secret", "AURA_API_KEY", "--rebuild", "--no-wait")


SECRETS = {"HIDE": "me", "AURA_API_KEY": "a new key for it"}


@pytest.mark.parametrize("phase", ["before", "after"])
def test_an_error_at_any_write_ends_before_or_after(tree, phase):
    """Each write of a deployment that changes everything is refused once, before the Hub acts or after it did: the Space ends as it was, or as it was to be."""
    with Hub() as hub:
        space, args = everything(hub, tree)
        before = state_of(space)
        call(hub, tree, *args, **SECRETS)
        after, writes = state_of(space), list(hub.writes)
    assert after[:2] == ("t4-small", 600) and after[2] and len(after[3]) == 4 and len(writes) > 14 and before != after
    ends = []
    for at in range(len(writes)):
        afresh(tree)
        with Hub() as hub:
            space, args = everything(hub, tree)
            seen = iter(range(len(writes)))
            hub.refuse = lambda method, path, when, seen=seen, at=at: when == phase and interesting(method, path) and next(seen, None) == at
            out = call(hub, tree, *args, code=None, **SECRETS)
            end = state_of(space)
            assert end in (before, after), (writes[at], out)
            ends.append(end == before)
            if end == before: assert "journal" not in deploy.DeployRecord(deploy.DeployOptions(SPACE, source=tree)).read()
    # Up to the first secret that cannot be brought back it goes back, from then on it goes forward.
    assert ends == sorted(ends, reverse=True) and ends[0] and not ends[-1]


def afresh(tree):
    """The tree as it was before `everything` edited it, and nothing remembered."""
    shutil.rmtree(tree / "build", ignore_errors=True)
    (tree / "app.py").write_text(FILES["app.py"])
    (tree / "aura_engine/new.py").unlink(missing_ok=True)


def all_writes(tree):
    """(before, after, the writes of a deployment that changes everything, each as (method, path, key))."""
    with Hub() as hub:
        space, args = everything(hub, tree)
        before, made = state_of(space), []
        hub.refuse = lambda method, path, when: made.append((method, path, hub.key)) if when == "before" and interesting(method, path) else None
        call(hub, tree, *args, **SECRETS)
        return before, state_of(space), made


@pytest.mark.parametrize("phase", ["before", "after"])
def test_a_write_that_is_always_refused(tree, phase):
    """Each of these writes is refused for good, its repetition and its undoing too. The Space ends as it was. When a secret's old value is gone by then,
    it cannot. It is left on the way, and that is said. The same command arrives once the refusal has ended."""
    before, after, writes = all_writes(tree)
    final = writes.index(("POST", f"/api/spaces/{SPACE}/secrets", "AURA_API_KEY"))
    for at, write in enumerate(writes):
        afresh(tree)
        with Hub() as hub:
            space, args = everything(hub, tree)
            hub.refuse = lambda method, path, when, write=write: when == phase and (method, path, hub.key) == write
            out = call(hub, tree, *args, code=None, **SECRETS)
            end = state_of(space)
            # The secret itself: refused before it is set, nothing is lost.
            lost = at > final or at == final and phase == "after"
            if not lost: assert end == before, (write, out)
            if end in (before, after): continue
            assert "is gone, so nothing was undone; the same command carries on" in out, (write, out)
            hub.refuse = lambda *_: False
            call(hub, tree, *args, **SECRETS)
            assert state_of(space) == after, write


def test_a_token_that_ends_on_the_way(tree):
    """From some write on the Hub refuses everything. Nothing can be undone, that is said, and the same command with a new token arrives."""
    _, after, writes = all_writes(tree)
    for at in range(len(writes)):
        afresh(tree)
        with Hub() as hub:
            space, args = everything(hub, tree)
            made = []
            def ended(method, path, when, at=at, made=made):
                if when == "before" and interesting(method, path): made.append(path)
                return when == "before" and len(made) > at
            hub.refuse = ended
            assert "may not write there" in call(hub, tree, *args, code=3, **SECRETS)
            hub.refuse = lambda *_: False
            call(hub, tree, *args, **SECRETS)
            assert state_of(space) == after


def test_a_new_space_whose_commit_is_refused_is_deleted_again(hub, tree):
    """Nothing of it is left. The answer to the creation may get lost, too: then the Space is taken up."""
    hub.may_delete = True
    hub.refuse = lambda method, path, phase: phase == "before" and path.endswith("/commit/main")
    assert "put back as it was: no Space" in call(hub, tree, *GUIDE, code=23) and not hub.spaces
    hub.refuse = lambda method, path, phase: path.endswith("/commit/main") or "repos/delete" in path
    assert "may not write there" in call(hub, tree, *GUIDE, code=3) and SPACE in hub.spaces
    hub.refuse = lambda *_: False
    call(hub, tree, *GUIDE)
    hub.spaces.clear()
    hub.fail("GET", f"/api/spaces/{SPACE}$", (404, {"error": "Repository not found"}))
    hub.refuse = lambda method, path, phase: phase == "after" and path.endswith("repos/create")
    assert "exists now; the same command carries on" in call(hub, tree, *GUIDE, code=3) and SPACE in hub.spaces
    hub.refuse = lambda *_: False
    call(hub, tree, *GUIDE)


def test_a_new_space_with_somebody_elses_commit_stays(hub, tree):
    """Between its creation and our commit, which is refused, somebody put a file there."""
    def meanwhile(n, method, path, phase):
        if phase == "before" and path.endswith("/commit/main"): hub.spaces[SPACE].commits["f" * 40] = {**hub.spaces[SPACE].tree, "mine.py": hub.spaces[SPACE].tree["README.md"]}
    hub.watch = meanwhile
    hub.refuse = lambda method, path, phase: phase == "before" and path.endswith("/commit/main")
    call(hub, tree, *GUIDE, code=3)
    assert "mine.py" in hub.spaces[SPACE].tree


def test_nothing_goes_back_when_told_so(hub, tree):
    space = running(hub, tree)
    hub.refuse = lambda method, path, phase: phase == "before" and path.endswith("/commit/main")
    edit(tree)
    call(hub, tree, "--origins", "https://new.site", "--no-rollback", code=3)
    assert space.variables["ALLOW_ORIGINS"]["value"] == "https://new.site"


def test_wheels_follow_the_hardware(hub, tree):
    """The guide's section 6, taken literally: a GPU gets CUDA wheels without being told to, and loses them with the GPU."""
    space = running(hub, tree)
    assert "on cuda" in call(hub, tree, "--hardware", "a10g-small", "--var", "SD_PRECISION=fp16", "--var", "SD_DEVICE=cuda", "--var", "TORCH_COMPILE=1", "--yes")
    assert space.variables["TORCH_INDEX_URL"]["value"] == "cu126" and space.run.image["TORCH_INDEX_URL"] == "cu126"
    assert "SD_DEVICE=cuda, but cpu-basic has no GPU" in call(hub, tree, "--hardware", "cpu-basic", code=3)
    assert "on cpu" in call(hub, tree, "--preset", "cpu", "--hardware", "cpu-basic") and space.hardware == "cpu-basic"
    assert not {"SD_DEVICE", "SD_PRECISION", "TORCH_COMPILE"} & set(space.variables) and space.variables.get("TORCH_INDEX_URL", {"value": "cpu"})["value"] == "cpu"


MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def mounts(space): return {v["mountPath"]: (v["type"], v["source"], v["readOnly"]) for v in space.volumes}


def test_models_are_mounted_and_follow_the_preset(hub, tree):
    """Read-only, where the image's AURA_MODELS looks. What else is mounted stays, and another preset takes them away."""
    mine = {"type": "dataset", "source": "ada/pictures", "mountPath": "/pictures", "readOnly": True}
    space = running(hub, tree, volumes=[mine])
    call(hub, tree, *GPU)
    assert mounts(space) == {f"/models/{MODEL}": ("model", MODEL, True), "/pictures": ("dataset", "ada/pictures", True),
                             "/models/latent-consistency/lcm-lora-sdv1-5": ("model", "latent-consistency/lcm-lora-sdv1-5", True)}
    assert re.search(r"ENV.*\n(.* \\\n)* +AURA_MODELS=/models\b", (ROOT / "Dockerfile").read_text())
    assert "nothing to change" in call(hub, tree, *GPU) and f"{MODEL} in /models/{MODEL}, read-only" in call(hub, tree, "doctor")
    assert "every start downloads gigabytes" in call(hub, tree, "--no-volumes") and list(mounts(space)) == ["/pictures"]
    assert "not mounted" in call(hub, tree, "doctor")
    call(hub, tree, "--preset", "lightning", "--yes", "--var", "SD_REVISION=abc")
    assert set(mounts(space)) == {"/pictures", "/models/ByteDance/SDXL-Lightning", "/models/stabilityai/stable-diffusion-xl-base-1.0"}
    assert [v["revision"] for v in space.volumes if "ByteDance" in v["source"]] == ["abc"]
    call(hub, tree, "--preset", "cpu", "--hardware", "cpu-basic")
    assert list(mounts(space)) == ["/pictures"]


@pytest.mark.parametrize("new", [True, False], ids=["new", "existing"])
def test_where_the_plan_has_no_volumes_it_does_without(hub, tree, new):
    hub.mounts = False
    space = None if new else running(hub, tree)
    out = call(hub, tree, *GUIDE, *GPU)
    assert "the Hub mounts no volume here" in out and "Volumes are not part of this plan" in out and "a picture came" in out
    assert not hub.spaces[SPACE].volumes and (space or hub.spaces[SPACE]).hardware == "t4-small"
    assert "mounts no volume" not in call(hub, tree, *GUIDE, *GPU, "--no-volumes")


def test_a_bucket_keeps_what_a_start_makes(hub, tree):
    """It is there because somebody asked: where it is missing or refused, nothing is changed."""
    space = running(hub, tree)
    before = state_of(space)
    assert "`hf buckets create ada/none` makes one" in call(hub, tree, "--bucket", "ada/none", code=3) and not hub.writes
    hub.mounts = False
    assert "not part of this plan" in call(hub, tree, "--bucket", "ada/kept", "--preset", "cpu-sd15", code=3) and state_of(space) == before
    hub.mounts = True
    out = call(hub, tree, "--bucket", "ada/kept", "--preset", "cpu-sd15")
    assert mounts(space)["/data"] == ("bucket", "ada/kept", False) and space.variables["XDG_CACHE_HOME"]["value"] == "/data" and "every start converts" not in out
    assert "nothing to change" in call(hub, tree, "--preset", "cpu-sd15")
    assert "every start converts" in call(hub, tree, "--bucket", "", "--preset", "cpu-sd15")
    assert "/data" not in mounts(space) and "XDG_CACHE_HOME" not in space.variables
    edit(tree, "FAIL_RUN")
    before = state_of(space)
    call(hub, tree, "--bucket", "ada/kept", "--preset", "cpu", code=27)
    assert state_of(space) == before


def test_a_device_without_its_hardware_is_refused(hub, tree):
    running(hub, tree)
    assert "has no GPU" in call(hub, tree, "--var", "SD_DEVICE=cuda", code=3) and not hub.writes


def test_a_gpu_that_draws_on_the_cpu_is_no_success(hub, tree):
    """A secret of the Space, which nobody can read, keeps the engine off the GPU: only the live engine tells."""
    space = running(hub, tree, secrets=rows(SD_DEVICE="cpu"))
    out = call(hub, tree, "--hardware", "a10g-small", "--yes", code=28)
    assert "a10g-small has a GPU, but the engine answers device: cpu" in out and space.hardware == "cpu-basic"


def test_a_gpu_that_could_only_draw_on_its_cpu_is_refused(hub, tree):
    """Whether the command asks for it, or the Space has it already."""
    space = running(hub, tree)
    for var, word in (("SD_DEVICE=cpu", "--var SD_DEVICE=auto"), ("TORCH_INDEX_URL=cpu", "the default is cu126"), ("TORCH_INDEX_URL=https://my.wheels/cpu", "leave it out")):
        out = call(hub, tree, "--hardware", "a10g-small", "--var", var, "--yes", code=3)
        assert f"{var}, but a10g-small has a GPU, for $1.00 an hour" in out and word in out
    space.variables |= rows(SD_DEVICE="cpu")
    assert "SD_DEVICE=cpu, but t4-small has a GPU" in call(hub, tree, "--hardware", "t4-small", "--yes", "--dry-run", code=3) and not hub.writes
    call(hub, tree, "--hardware", "t4-small", "--var", "SD_DEVICE=auto", "--yes")


@pytest.mark.parametrize("args, seconds", [(("--hardware", "l4x1"), 900), (("--hardware", "l4x1", "--sleep-time", "900"), 900), (("--hardware", "l4x1", "--sleep-time", "60"), 60),
                                           (("--preset", "lightning", "--hardware", "a10g-small"), 900), (("--preset", "cpu", "--hardware", "cpu-upgrade"), 900)])
def test_new_hardware_always_brings_a_sleep_time(hub, tree, args, seconds):
    """From paid to paid hardware too, dearer or cheaper: in the same request, as the plan says it, and as the last line does."""
    space = running(hub, tree, hardware="t4-small", sleep_time=900, variables=rows(TORCH_INDEX_URL="cu126"))
    out = call(hub, tree, *args, "--yes")
    assert space.sleep_time == seconds and hub.writes[0] == f"POST /api/spaces/{SPACE}/hardware" and not [w for w in hub.writes if "sleeptime" in w]
    assert re.search(rf"set +hardware +.*, sleeps after {seconds} s", out) and f"sleeps after {seconds} s" in out.splitlines()[-1]


def test_hardware_that_never_slept_sleeps_when_it_moves(hub, tree):
    """Unless somebody chose that, which is then said and agreed to."""
    space = running(hub, tree, hardware="t4-small", variables=rows(TORCH_INDEX_URL="cu126"))
    call(hub, tree, "--hardware", "l4x1", "--yes")
    assert space.sleep_time == 600
    space.sleep_time = -1
    assert "it would never sleep; agree with --yes" in call(hub, tree, "--hardware", "a10g-small", code=3)
    assert "a10g-small, never sleeps" in call(hub, tree, "--hardware", "a10g-small", "--yes") and space.sleep_time == -1


def test_the_sleep_time_is_part_of_the_plan(hub, tree):
    """A plan with ten minutes is not the one with an hour, nor the one that never sleeps, for a new Space and for one that is there."""
    for prepare in (lambda: None, lambda: running(hub, tree)):
        prepare()
        out = [call(hub, tree, *GPU, "--dry-run", *more) for more in ((), ("--sleep-time", "3600"), ("--sleep-time", "-1"))]
        number = [re.search(r"--plan (\w+)", text)[1] for text in out]
        assert len(set(number)) == 3 and "t4-small, never sleeps" in out[2]
        assert f"not {number[0]}" in call(hub, tree, *GPU, "--sleep-time", "-1", "--plan", number[0], code=4) and not hub.writes


def test_an_interruption_says_what_it_costs(hub, tree):
    """Ctrl-C while the image for the dearer hardware is built."""
    hub.stuck = True
    running(hub, tree, hardware="t4-small", sleep_time=600, variables=rows(TORCH_INDEX_URL="cu126"))
    edit(tree)
    process = start(hub, tree, "--hardware", "a10g-small", "--yes")
    while not commits(hub): time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    last = process.communicate(timeout=60)[0].splitlines()[-1]
    assert process.returncode == 130 and "a10g-small costs $1.00 an hour while it is awake, and sleeps after 600 s" in last and "--hardware cpu-basic ends that" in last


def test_not_waiting_says_what_it_costs(hub, tree):
    last = call(hub, tree, *GPU, "--no-wait").splitlines()[-1]
    assert "t4-small costs $0.40 an hour while it is awake, and sleeps after 600 s" in last and "--hardware cpu-basic ends that" in last


@pytest.mark.parametrize("new", [True, False], ids=["new", "existing"])
def test_hardware_of_a_run_that_was_killed_is_agreed_to_again(hub, tree, new):
    """Killed right after the paid hardware was there: the next run names the earlier one, and does not pay unasked."""
    if not new: running(hub, tree)
    victim = []
    def kill(n, method, path, phase):
        if phase == "after" and (path.endswith("/hardware") and method == "POST" or path.endswith("repos/create")): os.kill(victim[0].pid, signal.SIGKILL)
    hub.watch = kill
    victim.append(fork(hub, tree, *GUIDE, *GPU))
    victim[0].join(60)
    hub.watch = lambda *_: None
    space, writes = hub.spaces[SPACE], len(hub.writes)
    assert victim[0].exitcode == -signal.SIGKILL and space.hardware == "t4-small"
    out = call(hub, tree, code=3)
    assert "an earlier run, of 20" in out and "left the Space on paid hardware: t4-small costs $0.40 an hour" in out and "agree with --yes" in out
    assert "was not proven" in call(hub, tree, "doctor") and "was not proven" in call(hub, tree, "--dry-run") and len(hub.writes) == writes
    call(hub, tree, *GUIDE, *GPU)
    assert "an earlier run" not in call(hub, tree) and space.hardware == "t4-small"


def test_hardware_of_a_run_that_was_killed_can_go_again(hub, tree):
    space = running(hub, tree, hardware="t4-small", sleep_time=600)
    deploy.DeployRecord(deploy.DeployOptions(SPACE, source=tree)).begin(deploy.DeployJournal(space.head, "", space.head, hardware="cpu-basic"))
    call(hub, tree, "--preset", "cpu", "--hardware", "cpu-basic")
    assert space.hardware == "cpu-basic"


def test_without_a_journal_nothing_is_changed(hub, tree):
    """A file is where its folder should be. Who wants no way back may go on, and reads about it."""
    space = running(hub, tree)
    (tree / "build").write_text("")
    assert re.search(r"ada--aura.json cannot be written \(.+\), so a run that is cut off could not be undone", call(hub, tree, "--origins", "https://a.site", code=3)) and not hub.writes
    out = call(hub, tree, "--origins", "https://a.site", "--no-rollback")
    assert "could not be undone" in out and space.variables["ALLOW_ORIGINS"]["value"] == "https://a.site" and re.search(r"record +build/deploy/ada--aura.json cannot be written", out)


@pytest.mark.parametrize("given, says", [
    ("sd_device=cuda", "did you mean SD_DEVICE"), ("alow_origins=x", "did you mean ALLOW_ORIGINS"), ("Torch_Index_Url=pypi", "did you mean TORCH_INDEX_URL"), ("aura_api_ky=x", "did you mean AURA_API_KEY"),
    ("PORT=8000", "PORT must be 7860"), ("HOST=127.0.0.1", "HOST must be 0.0.0.0"), ("AURA_BUILD_ID=mine", "the image sets it"),
    ("AURA_API_KEY=pl4nted", "use --secret AURA_API_KEY"), ("AURA_REDIS_URL=redis://pl4nted", "use --secret AURA_REDIS_URL"), ("MINE=hf_" + "pl4nted" * 5, "use --secret MINE")])
def test_names_that_a_space_must_not_have(given, says):
    with pytest.raises(deploy.DeployError, match=says) as e: deploy_plan.parse_deploy(["--space-id", SPACE, "--var", given])
    assert e.value.code == 2 and "pl4nted" not in str(e.value)


def test_names_that_a_space_may_have():
    assert deploy_plan.parse_deploy(["--space-id", SPACE, "--var", "PORT=7860", "--var", "mine=1", "--var", "HF_HOME=/data"])[0].var["mine"] == "1"


def test_the_doctor_knows_a_pause(hub, tree):
    space = running(hub, tree, hardware="t4-small", sleep_time=600, variables=rows(TORCH_INDEX_URL="cu126", AURA_API_KEY="a-long-key-for-the-engine"))
    space.forced = "PAUSED"
    out = call(hub, tree, "doctor")
    assert "it is PAUSED until somebody starts it: --restart --yes, and t4-small then costs $0.40 an hour" in out and "it ended in" not in out and "use --secret AURA_API_KEY" in out


def test_another_app_is_not_replaced(hub, tree):
    """A Docker Space of the same owner that holds something else is left alone, and the plan says what would go."""
    files = {"README.md": b"---\ntitle: My shop\nsdk: docker\n---\nMine.\n", "Dockerfile": b"FROM x\n", "app.py": b"shop\n", "shop.py": b""}
    space = hub.space(SPACE, files)
    assert re.search("another app, of which this would replace (Dockerfile, app.py|app.py, Dockerfile)", call(hub, tree, *GUIDE, code=3)) and not hub.writes
    assert re.search(r"replace +files +Dockerfile, app.py, README.md +3 in one commit", call(hub, tree, "--take-over", "--dry-run"))
    call(hub, tree, *GUIDE, "--take-over")
    assert b"title: My shop" in space.tree["README.md"].data and b"Mine." in space.tree["README.md"].data and "shop.py" in space.tree
    assert "nothing to change" in call(hub, tree, *GUIDE)


def test_a_readme_that_was_edited_on_the_hub_stays(hub, tree):
    space = running(hub, tree)
    edited = space.tree["README.md"].data.replace(b'title: "aura"', b'title: "Ada\'s pictures"') + b"\nDrawn by Ada.\n"
    space.tree["README.md"] = replace(space.tree["README.md"], data=edited)
    assert "nothing to change" in call(hub, tree, *GUIDE)
    call(hub, tree, "--model", "stabilityai/sd-turbo")
    text = space.tree["README.md"].data.decode()
    assert "Ada's pictures" in text and "(stabilityai/sd-turbo)" in text and "Drawn by Ada." in text


def test_what_the_image_is_built_with_is_built(hub, tree):
    space = running(hub, tree)
    call(hub, tree, "--var", "TORCH_INDEX_URL=pypi")
    assert hub.writes == [f"POST /api/spaces/{SPACE}/variables", f"POST /api/spaces/{SPACE}/restart"] and space.run.image["TORCH_INDEX_URL"] == "pypi"
    first = space.run
    call(hub, tree, "--rebuild")
    assert space.run is not first and space.run.build and not commits(hub)


def test_a_rollback_brings_the_image_back_too(hub, tree):
    """Wheels alone were changed, so there is no commit to go back to. The image is built with the old ones again."""
    space = running(hub, tree)
    before = state_of(space)
    out = call(hub, tree, "--hardware", "a10g-small", "--var", "TORCH_INDEX_URL=https://my.wheels/too-new", "--yes", code=28)
    assert "a10g-small has a GPU, but the engine answers device: cpu" in out and "is back and answers" in out
    assert state_of(space) == before and space.run.build and not space.run.image.get("TORCH_INDEX_URL")


@pytest.mark.parametrize("phase", ["before", "after"])
def test_a_build_that_is_refused_is_undone(hub, tree, phase):
    """The Hub refuses to build, or builds and says that it refused: the variable goes back, and the image with it."""
    space = running(hub, tree)
    before = state_of(space)
    refused = iter([True])
    hub.refuse = lambda method, path, when: when == phase and path.endswith("/restart") and next(refused, False)
    assert "put back as it was: variable EXTRA_PACKAGES, image" in call(hub, tree, "--var", "EXTRA_PACKAGES=openvino", code=23)
    assert state_of(space) == before and "EXTRA_PACKAGES" not in space.run.image


def test_a_build_that_a_run_did_not_come_to_is_made_up_for(hub, tree):
    """Cut off between the variable and the build: the next run finds the variable there, and asks for the build."""
    space, ended = running(hub, tree), []
    def refuse(method, path, when):
        if when == "before" and path.endswith("/restart"): ended.append(path)
        return when == "before" and bool(ended) and interesting(method, path)
    hub.refuse = refuse
    call(hub, tree, "--var", "EXTRA_PACKAGES=openvino", code=3)
    assert "EXTRA_PACKAGES" in space.variables and "EXTRA_PACKAGES" not in space.run.image
    hub.refuse = lambda *_: False
    call(hub, tree, "--var", "EXTRA_PACKAGES=openvino")
    assert space.run.image["EXTRA_PACKAGES"] == "openvino"
    assert "nothing to change" in call(hub, tree, "--var", "EXTRA_PACKAGES=openvino")


def test_visibility_is_changed_and_its_consequence_said(hub, tree):
    space = running(hub, tree)
    out = call(hub, tree, "--visibility", "private")
    assert space.private and "answers 404 to everybody" in out and not (tree / ".env.local").exists()
    assert "nothing to change" in call(hub, tree)
    call(hub, tree, "--visibility", "public")
    assert not space.private and (tree / ".env.local").exists()


def test_what_it_costs_is_the_last_word(hub, tree):
    """A first GPU deployment that fails sleeps by default, and says its price and how to end it."""
    edit(tree, "FAIL_RUN")
    out = call(hub, tree, *GPU, code=7)
    assert "t4-small costs $0.40 an hour while it is awake, and sleeps after 600 s" in out.splitlines()[-1] and "--preset cpu --hardware cpu-basic" in out.splitlines()[-1]
    assert hub.spaces[SPACE].sleep_time == 600
    (tree / "app.py").write_text(FILES["app.py"])
    assert "t4-small costs $0.40 an hour" in call(hub, tree, *GPU, "--sleep-time", "-1").splitlines()[-1] and hub.spaces[SPACE].sleep_time == -1
    assert "costs" not in call(hub, tree, "--preset", "cpu", "--hardware", "cpu-basic").splitlines()[-1]


def test_a_preset_that_is_rolled_back_gives_its_hardware_back(hub, tree):
    space = running(hub, tree)
    before = state_of(space)
    edit(tree, "FAIL_RUN")
    assert "costs" not in call(hub, tree, *GPU, code=27).splitlines()[-1]
    assert state_of(space) == before


def test_a_proxy_is_named_without_its_password(hub, tree):
    """One that is not there, and one of a kind that the client has no package for. NO_PROXY leads around the first."""
    wrong = {"HTTP_PROXY": "http://me:s3cret@127.0.0.1:9"}
    out = call(hub, tree, *GUIDE, code=9, **wrong)
    assert "through the proxy 127.0.0.1:9" in out and "(ConnectError); nothing was changed" in out and "s3cret" not in out
    if not util.find_spec("socksio"):
        out = call(hub, tree, *GUIDE, code=3, ALL_PROXY="socks5://me:s3cret@127.0.0.1:9")
        assert "the proxy 127.0.0.1:9, and a SOCKS proxy needs the package socksio" in out and "s3cret" not in out
    assert not hub.writes
    call(hub, tree, *GUIDE, NO_PROXY="127.0.0.1", **wrong)


def test_an_address_that_cannot_be_reached_from_here_proves_nothing(hub, tree):
    """The new version stays: a firewall between here and the Space is not its fault."""
    space = running(hub, tree)
    first = space.head
    edit(tree)
    space.host = "http://127.0.0.1:9"
    out = call(hub, tree, *GUIDE, "--timeout", "2", code=9)
    assert "no connection to http://127.0.0.1:9/ (ConnectError)" in out and "was left as it is" in out and space.head != first and len(commits(hub)) == 1


def test_a_space_that_was_renamed(hub, tree):
    """The Hub leads from the old name to the new one."""
    space = running(hub, tree)
    hub.spaces["ada/new"] = hub.spaces.pop(SPACE)
    space.id, hub.moved = "ada/new", {SPACE: "ada/new"}
    told = "ada/aura is named ada/new now: use --space-id ada/new"
    out = call(hub, tree, *GUIDE, "--var", "X=1")
    assert told in out and "a picture came" in out and space.variables["X"]["value"] == "1"
    assert told in call(hub, tree, "doctor") and told not in call(hub, tree, *GUIDE, "--space-id", "ada/new")


def test_what_no_commit_has_is_named(hub, tree):
    """In a repository, and in a folder of one. A folder without git says nothing."""
    assert "no commit" not in call(hub, tree, *GUIDE, "--dry-run")
    project = tree / "inner"
    shutil.copytree(tree, project, ignore=shutil.ignore_patterns("inner", ".hf"))
    for line in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm x"): subprocess.run(["git", *line.split()], cwd=tree, check=True)
    assert "no commit" not in call(hub, tree, *GUIDE, "--dry-run")
    (project / "aura_engine/assets/new").mkdir()
    (project / "aura_engine/assets/new/a.css").write_text("a")
    edit(project)
    says = "no commit of this repository has app.py, aura_engine/assets/new/a.css as they are here"
    assert says in call(hub, tree, *GUIDE, "--dry-run", "--source", str(project)) and "no commit" not in call(hub, tree, *GUIDE, "--dry-run")


def test_a_clock_that_was_set_back(hub, tree):
    """The journal of the run before is of tomorrow, then."""
    running(hub, tree)
    call(hub, tree, *GUIDE, "--var", "X=1", "--no-wait")
    path = tree / "build/deploy/ada--aura.json"
    known = json.loads(path.read_text())
    known["journal"]["time"] += 86400
    path.write_text(json.dumps(known))
    assert "a picture came" in call(hub, tree, *GUIDE, "--timeout", "20")


@pytest.mark.parametrize("wheels, codes", [("cu126", (27, 0)), ("https://my.wheels/too-new", (7, 8))])
def test_what_comes_back_on_a_gpu_has_to_use_it(hub, tree, wheels, codes):
    """After a rollback, by itself and by hand. Some wheels are too new for a driver, and draw on the CPU at a GPU's price."""
    space = running(hub, tree, hardware="t4-small", sleep_time=600, variables=rows(TORCH_INDEX_URL=wheels))
    first, wrong = space.head, "t4-small has a GPU, but the engine answers device: cpu"
    edit(tree, "FAIL_RUN")
    out = call(hub, tree, code=codes[0])
    assert (f"was put back and fails its test: {wrong}" if codes[1] else f"{first[:12]}, is back and answers") in out and space.tree == space.commits[first]
    assert (wrong in call(hub, tree, "--rollback-to", first, code=codes[1])) == bool(codes[1])


def test_a_checkout_with_crlf(hub, tree):
    call(hub, tree, *GUIDE)
    for path in tree.rglob("*"):
        if path.is_file() and path.suffix in (".py", ".txt", "", ".html"): path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert b"\r\n" in (tree / "Dockerfile").read_bytes() and "nothing to change" in call(hub, tree, *GUIDE)


def test_the_slower_of_two_deployments_ends(hub, tree):
    """Another commit comes while this one is built: exit status 4 at once, and nothing is undone."""
    hub.build_seconds = 30
    space = running(hub, tree)
    edit(tree)
    def another(n, method, path, phase):
        if phase == "after" and "/commit/" in path: space.commits["f" * 40] = dict(space.tree)
    hub.watch = another
    assert "superseded: commit ffffffffffff" in call(hub, tree, "--origins", "https://new.site", code=4)
    assert space.variables["ALLOW_ORIGINS"]["value"] == "https://new.site" and len(commits(hub)) == 1


def test_a_wait_is_not_silent_and_a_failure_brings_its_log(hub, tree):
    edit(tree, "FAIL_LOADING")
    out = call(hub, tree, *GUIDE, "--timeout", "1", code=8)
    assert re.search(r"smoke +not yet: the engine is loading; --timeout SECONDS waits longer \(\d+ s\)", out) and "Downloading shards" in out


def test_the_doctor_explains_and_changes_nothing(hub, tree):
    space = running(hub, tree, hardware="t4-small", private=True, variables={"SD_PRECISION": {"value": "fp99"}, "SD_DEVCE": {"value": "cuda"}, "X": {"value": "1"}},
                    secrets={"X": {"value": "2"}})
    out = call(hub, tree, "doctor")
    for says in ("SD_PRECISION: given 'fp99'", "did you mean SD_DEVICE", "X is a variable and a secret", "--var TORCH_INDEX_URL=cu126", "t4-small never sleeps", "404", "CONFIG_ERROR", "$0.40"):
        assert says in out, (says, out)
    assert not hub.writes
    space.secrets, space.variables, space.private = {}, {"TORCH_INDEX_URL": {"value": "cu126"}}, False
    space.sleep_time, space.run.image = 600, {"TORCH_INDEX_URL": "cu126"}
    edit(tree)
    out = call(hub, tree, "doctor", "--json")
    assert "the same line without doctor ends the drift" in out and re.search("replace files app.py, Dockerfile|replace files Dockerfile, app.py", out) and not hub.writes
    assert "there is no Space ada/none" in call(hub, tree, "doctor", "--space-id", "ada/none", code=3)


def test_the_doctor_knows_what_cannot_be_deployed_to(hub, tree):
    hub.space("ada/cells", {"app.py": b"import gradio"}, sdk="gradio")
    out = call(hub, tree, "doctor", "--space-id", "ada/cells")
    assert "needs a Docker Space: take another name" in out and "not compared" in out and "--take-over" not in out
    hub.space("ada/empty")
    assert "it has no app yet" in call(hub, tree, "doctor", "--space-id", "ada/empty")


def rows(**values): return {name: {"key": name, "value": text} for name, text in values.items()}


def test_settings_that_were_changed_since_the_plan_are_seen(hub, tree):
    """Another deployment sets the same variable between our plan and our first write: we plan again, and say why. When that happens
    once more, nothing is written and nothing is put back."""
    space = running(hub, tree)
    others = iter(["https://b.site", "https://c.site", "https://d.site"])
    looks = []
    def another(n, method, path, phase):
        if path.endswith("whoami-v2") and phase == "before":
            looks.append(n)
            if len(looks) in changes: space.variables |= rows(ALLOW_ORIGINS=next(others))
    hub.watch, changes = another, {2}
    out = call(hub, tree, "--origins", "https://a.site")
    assert "changed by somebody else since this was planned: variable ALLOW_ORIGINS; planning once more" in out
    assert re.search(r"ALLOW_ORIGINS +https://b.site +https://a.site", out) and space.variables["ALLOW_ORIGINS"]["value"] == "https://a.site"
    writes, changes = len(hub.writes), {2, 4}
    looks.clear()
    assert "changed by somebody else" in call(hub, tree, "--origins", "https://e.site", code=4)
    assert len(hub.writes) == writes and space.variables["ALLOW_ORIGINS"]["value"] == "https://d.site"


@pytest.mark.parametrize("word", ["", "FAIL_RUN"])
def test_settings_that_somebody_else_changes_end_a_deployment(hub, tree, word):
    """Another deployment sets our variable while ours starts: exit status 4. Nothing is put back over it, also when our version fails."""
    space = running(hub, tree)
    if word: edit(tree, word)
    path_of_ours = "/commit/" if word else "/variables"
    def another(n, method, path, phase):
        if phase == "after" and method == "POST" and path_of_ours in path: space.variables |= rows(ALLOW_ORIGINS="https://b.site")
    hub.watch = another
    out = call(hub, tree, "--origins", "https://a.site", code=4)
    assert "superseded: somebody else has changed variable ALLOW_ORIGINS since" in out and space.variables["ALLOW_ORIGINS"]["value"] == "https://b.site"
    assert len(hub.writes) == 1 + bool(word) and not (tree / ".env.local").exists()


@pytest.mark.parametrize("change", [
    lambda space: space.secrets.update(rows(AURA_API_KEY="theirs")), lambda space: setattr(space, "hardware", "l4x1"), lambda space: setattr(space, "private", True),
], ids=["secret", "hardware", "visibility"])
def test_other_settings_end_it_too(hub, tree, change):
    """What is proven is then not what was asked for: it is seen before the address is recorded."""
    space = running(hub, tree)
    hub.watch = lambda n, method, path, phase: change(space) if path == "host:/generate" else None
    assert "superseded: " in call(hub, tree, *GPU, "--secret", "AURA_API_KEY", "--timeout", "2", AURA_API_KEY="a key of ours, for it", code=4) and not (tree / ".env.local").exists()


def test_every_origin_only_when_it_is_meant(hub, tree):
    space = running(hub, tree)
    assert "every web page may use the engine" in call(hub, tree, "--var", "ALLOW_ORIGINS=*", "--any-origin")
    assert space.variables["ALLOW_ORIGINS"]["value"] == "*" and "every web page may use the engine" in call(hub, tree, "doctor")


@pytest.mark.parametrize("verb", [("--restart",), ("--rollback-to", "0" * 40)], ids=lambda v: v[0])
def test_what_changes_a_space_asks_whose_it_is(hub, tree, verb):
    """Another app is not restarted, nor is one that is paused on hardware with a price. A dry run does nothing."""
    space = hub.space(SPACE, {"README.md": b"---\ntitle: My shop\nsdk: docker\n---\nMine.\n", "Dockerfile": b"FROM x\n", "shop.py": b""})
    assert "holds another app" in call(hub, tree, *verb, code=3)
    assert "there is no Space ada/none" in call(hub, tree, *verb, "--space-id", "ada/none", code=3)
    assert "nothing was changed" in call(hub, tree, *verb, "--take-over", "--dry-run")
    space.hardware, space.forced = "t4-small", "PAUSED"
    assert "t4-small costs $0.40 an hour while it is awake; agree with --yes" in call(hub, tree, *verb, "--take-over", code=3) and not hub.writes
    if verb == ("--restart",): assert "t4-small costs $0.40" in call(hub, tree, *verb, "--take-over", "--yes") and len(hub.writes) == 1


def test_never_to_sleep_is_agreed_to(hub, tree):
    running(hub, tree, hardware="t4-small", sleep_time=600, variables=rows(TORCH_INDEX_URL="cu126"))
    assert "it would never sleep; agree with --yes" in call(hub, tree, "--sleep-time", "-1", code=3) and not hub.writes


def test_only_the_plan_that_was_agreed_to(hub, tree):
    """The number of a dry run carries out that plan. When the Space or the folder is another one by then, nothing."""
    space = running(hub, tree)
    args = ("--origins", "https://a.site")
    number = re.search(r"--plan (\w+)", call(hub, tree, *args, "--dry-run"))[1]
    space.variables |= rows(ALLOW_ORIGINS="https://b.site")
    assert f"not {number}" in call(hub, tree, *args, "--plan", number, code=4) and not hub.writes
    space.variables |= rows(ALLOW_ORIGINS=GUIDE[1])
    edit(tree)
    assert f"not {number}" in call(hub, tree, *args, "--plan", number, code=4) and not hub.writes
    (tree / "app.py").write_text(FILES["app.py"])
    call(hub, tree, *args, "--plan", number)
    assert "nothing to change" in call(hub, tree, *args, "--plan", number)


def test_a_plan_names_every_file(hub, tree):
    files = {name: b"theirs" for name in bundle.upload_set(tree)} | {"README.md": b"---\ntitle: My shop\nsdk: docker\n---\nMine.\n"}
    hub.space(SPACE, files)
    out = call(hub, tree, "--take-over", "--dry-run")
    named = re.search(r"replace, all (\d+): (.*(?:\n +\S.*,?)*?)(?=\n +(note|done)|$)", out)
    assert int(named[1]) == len(files) and {name.strip() for name in named[2].split(",")} == set(files)


def test_a_hub_that_breaks_down_says_what_was_done(hub, tree):
    running(hub, tree)
    hub.fail("GET", "/variables", *[(500, {"error": "oh"})] * 4)
    out = call(hub, tree, *GUIDE, "--dry-run", code=9)
    assert "nothing was changed" in out and "what was done" not in out
    edit(tree)
    hub.fail("POST", "/commit/", *[(500, {"error": "oh"})] * 4)
    assert "what was done so far stays" in call(hub, tree, "--origins", "https://a.site", "--no-rollback", code=9)


def test_a_wait_for_the_hub_is_said(hub, tree):
    """A Hub that is down, in no mood for more, or hidden behind a page: why, for how long, and in the end whose fault it was."""
    running(hub, tree)
    hub.fail("GET", "whoami", (500, "<h1>oops</h1>"), (429, {"error": "slow down"}, {"retry-after": "0"}), (200, "<h1>maintenance</h1>"))
    out = call(hub, tree, "--dry-run")
    for why in ("the Hub answered with status 500", "too many requests from here", "something else than JSON"): assert re.search(f"hub  .*{why}.*; the next try is in 0 s", out), out
    hub.fail("GET", "whoami", *[(200, "<h1>maintenance</h1>")] * 4)
    assert "something else than JSON: a proxy's page, or maintenance; nothing was changed" in call(hub, tree, code=9)


def test_a_refused_write_says_which(hub, tree):
    space = running(hub, tree)
    hub.fail("POST", "/hardware", (402, {"error": "Payment required"}))
    out = call(hub, tree, "--preset", "t4", "--yes", code=3)
    assert re.search("set hardware t4-small: .*paid hardware a payment method.*Payment required", out) and "nothing was changed" in out
    hub.refuse = lambda method, path, phase: phase == "before" and hub.key == "SD_PRECISION"
    assert "set variable SD_PRECISION: the token may not write there" in call(hub, tree, "--var", "SD_PRECISION=fp32", code=3)
    assert set(space.variables) == {"ALLOW_ORIGINS"}


def test_an_env_file_that_could_not_be_written_is_refused_first(hub, tree, monkeypatch):
    (tree / "folder").mkdir()
    for name, says in (("folder", "it is not a file"), ("none/x", "there is no such folder")):
        assert says in call(hub, tree, *GUIDE, "--env-file", name, code=3) and not hub.writes
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(deploy, "swap_file", full)
    running(hub, tree)
    monkeypatch.setattr(deploy.DeployRecord, "write", lambda *_: "")
    assert f"No space left on device; the address is {NAME}=http" in call(hub, tree)


@pytest.mark.parametrize("args, says", [(["--presett", "t4"], "there is no --presett; did you mean --preset?"), (["--dry"], "did you mean --"), (["docter"], "choose from 'doctor'"), (["--poll=-1"], "--poll -1: write seconds"),
                                        (["--timeout", "nan"], "--timeout nan: write seconds"), (["--detailed-exitcode"], "goes with --dry-run"), (["--space-id", "ada/-x"], "cannot start or end with '-'")])
def test_a_slip_is_answered_in_a_line(args, says, capsys):
    assert deploy.run_deploy(["--space-id", SPACE, *args]) == 2
    said = capsys.readouterr().err
    assert says in said and "usage:" not in said and len(said.strip().splitlines()) <= 2
    assert deploy.run_deploy(["--space-id", SPACE, *args, "--json"]) == 2 and says in json.loads(capsys.readouterr().out)["text"]


def test_the_address_of_a_space_that_became_private_is_taken_out(hub, tree):
    env = tree / ".env.local"
    env.write_text("MINE=1\n")
    call(hub, tree, *GUIDE)
    assert f"{NAME}=" in env.read_text()
    assert f".env.local: {NAME} is taken out: a private Space answers 404" in call(hub, tree, "--visibility", "private") and env.read_text() == "MINE=1\n"
    env.write_text(f"{NAME}=https://another.host\n")
    assert "stays as it is" in call(hub, tree) and env.read_text() == f"{NAME}=https://another.host\n"


def test_front_matter_of_your_own_stays(hub, tree):
    """Models, a start-up time, comments and keys that were written on the Hub. Ours are added, and go again with the preset."""
    space = running(hub, tree)
    mine = b"---\ntitle: Mine  # by Ada\nmodels:\n- ada/mine\nstartup_duration_timeout: 2h\nsdk: gradio\ncustom: {a: 1}\ntags: [aura_engine]\napp_port: 7860\n---\n\nText.\n"
    space.tree["README.md"] = replace(space.tree["README.md"], data=mine)
    call(hub, tree, *GPU)
    text = space.tree["README.md"].data.decode()
    head = deploy_plan.front_matter(text)[0]
    assert head["models"] == ["ada/mine", MODEL, "latent-consistency/lcm-lora-sdv1-5"] and head["sdk"] == "docker" and "title: Mine  # by Ada" in text
    assert head["startup_duration_timeout"] == "2h" and head["custom"] == {"a": 1} and head["suggested_hardware"] == "t4-small" and text.endswith("Text.\n")
    call(hub, tree, "--preset", "cpu", "--hardware", "cpu-basic")
    head = deploy_plan.front_matter(space.tree["README.md"].data.decode())[0]
    assert head["models"] == ["ada/mine"] and head["suggested_hardware"] == "cpu-basic" and head["startup_duration_timeout"] == "2h"


# the workflow

WORKFLOW = ROOT / ".github/workflows/deploy.yml"


def deploy_step(hub, folder, **env):
    """The step of the workflow that deploys, run by bash as GitHub runs it."""
    step = next(s for s in yaml.safe_load(WORKFLOW.read_text())["jobs"]["deploy"]["steps"] if s.get("name") == "Deploy")
    given = {"HF_TOKEN": "", "SPACE_ID": SPACE, "ORIGINS": GUIDE[1], "PRESET": "", "PAID": "", "DRY_RUN": "", "GITHUB_STEP_SUMMARY": folder / "summary.md", **env}
    assert set(step["env"]) <= set(given)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], cwd=folder, env={**environment(hub, folder, given), "PATH": path},
                          capture_output=True, text=True, timeout=300)


def test_the_workflow_deploys_and_shows_plan_and_proof(hub, tmp_path):
    """By a proof of who it is instead of a stored token, and with the summary that a person reads."""
    for name, data in {**bundle.upload_set(ROOT), "scripts/hf_space_deploy.py": (ROOT / "scripts/hf_space_deploy.py").read_bytes()}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    done = deploy_step(hub, tmp_path, HF_OIDC_ID_TOKEN="somebody else", DRY_RUN="yes")
    assert done.returncode == 3 and "gave this job no token for spaces/ada/aura" in done.stdout
    proof = {"HF_OIDC_ID_TOKEN": f"this job is spaces/{SPACE}"}
    assert deploy_step(hub, tmp_path, DRY_RUN="yes", **proof).returncode == 0 and not hub.spaces
    done = deploy_step(hub, tmp_path, **proof)
    assert done.returncode == 0, done.stdout + done.stderr
    unpaid = deploy_step(hub, tmp_path, PRESET="t4", DRY_RUN="", **proof)
    assert unpaid.returncode == 3 and "agree with --yes" in unpaid.stdout
    assert deploy_step(hub, tmp_path, PRESET="t4", PAID="yes", DRY_RUN="yes", **proof).returncode == 0
    summary = (tmp_path / "summary.md").read_text()
    assert "create" in summary and "a picture came" in summary and hub.spaces[SPACE].run and TOKEN not in summary + done.stdout


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("argv", [["zizmor", "--offline", "--no-progress", "--persona", "regular"], ["check-jsonschema", "--builtin-schema", "vendor.github-workflows"]], ids=lambda a: a[0])
def test_the_workflows_are_safe_and_well_formed(argv):
    tool = shutil.which(argv[0], path=Path(sys.executable).parent) or argv[0]
    done = subprocess.run([tool, *argv[1:], *WORKFLOWS], capture_output=True, text=True)
    assert len(WORKFLOWS) == 3 and done.returncode == 0, done.stdout + done.stderr


def nameless(value, path=""):
    """Where a mapping has a key without a value: in `{a: b, c}` a comma that belonged to the text has cut it in two, and GitHub refuses the file."""
    if isinstance(value, list): return [found for i, item in enumerate(value) for found in nameless(item, f"{path}/{i}")]
    if not isinstance(value, dict): return []
    return [f"{path}/{k}" for k, v in value.items() if v is None] + [found for k, v in value.items() for found in nameless(v, f"{path}/{k}")]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_no_text_of_a_workflow_is_cut_by_a_comma(path):
    # YAML reads the key `on` as true. An event may have no settings.
    assert [found for found in nameless(yaml.safe_load(path.read_text())) if not re.fullmatch("/True/[a-z_]+", found)] == []
    assert nameless(yaml.safe_load("inputs: {dry-run: {description: Show the plan, change nothing, type: boolean}}")) == ["/inputs/dry-run/change nothing"]


def test_the_tests_that_the_guide_names_exist():
    text = "".join((ROOT / "tests" / name).read_text() for name in ("test_deploy.py", "test_optimize.py"))
    named = re.findall(r"`(test_\w+)`", (ROOT / "nbs/15e_deploy.ipynb").read_text())
    assert len(named) > 20 and [name for name in named if f"def {name}(" not in text] == []


# secrets

def test_no_secret_in_any_output(hub, tree):
    """Planted in the token, a secret, the app's log, the Hub's error messages and the engine's answers. None of our outputs says them."""
    planted = "pl4nted/ secret+value"
    hub.user["auth"]["accessToken"]["role"] = "write"
    outputs = [run(hub, tree, *GUIDE, "--secret", "PLANTED", "--json", HF_TOKEN=TOKEN + "\n", PLANTED=planted + "\n")]
    hub.spaces[SPACE].logs["run"].append(f"the environment is {planted} {TOKEN}\n")
    outputs.append(call(hub, tree, "--logs", "run", "--secret", "PLANTED", PLANTED=planted))
    for status in (400, 401, 403, 412, 500):
        hub.fail("GET", "whoami", *[(status, {"error": f"{TOKEN} {planted} is no good"})] * 4)
        outputs.append(call(hub, tree, "--secret", "PLANTED", code={412: 4, 500: 9}.get(status, 3), PLANTED=planted))
        hub.answers.clear()
    edit(tree, "FAIL_RUN")
    hub.spaces.clear()
    outputs.append(call(hub, tree, "--secret", "PLANTED", "--var", "FAIL=1", code=7, PLANTED=planted))
    for text in outputs: assert not re.search(r"pl4nted|hf_loopback|cGw0bnRlZ", text)
    files = [p for p in tree.rglob("*") if p.is_file()]
    assert not [p for p in files if TOKEN.encode() in p.read_bytes() or planted.encode() in p.read_bytes()]
    assert planted not in repr(deploy.DeployOptions(SPACE, secret={"PLANTED": planted}))


def test_a_secret_of_the_machine_is_not_uploaded(hub, tree):
    call(hub, tree, *GUIDE)
    assert not [p for p, b in hub.spaces[SPACE].tree.items() if TOKEN.encode() in b.data]


# .env.local

NAME = "VITE_CLOUD_ENGINE_URL"
value = st.from_regex(r"https?://[a-z0-9.-]{1,30}(:\d{2,5})?", fullmatch=True)
line = st.one_of(st.from_regex(r"[A-Z_]{1,8}=[ -~äé]{0,12}", fullmatch=True), st.from_regex(r"# ?[ -~ü]{0,15}", fullmatch=True), st.just(""), st.just(f"# {NAME}=commented"),
                 st.builds("{}{}={}".format, st.sampled_from(["", "export ", "  "]), st.just(NAME), value), st.builds("{}_2={}".format, st.just(NAME), value))


@settings(deadline=None, max_examples=300)
@given(lines=st.lists(line, max_size=6), newline=st.sampled_from(["\n", "\r\n"]), end=st.booleans(), url=value)
def test_the_env_writer_touches_one_line(tmp_path_factory, lines, newline, end, url):
    text = newline.join(lines) + (newline if end and lines else "")
    new = deploy.set_line(text, NAME, url)
    assert deploy.set_line(new, NAME, url) == new
    ours = [i for i, x in enumerate(lines) if re.match(rf"\s*(export )?{NAME}=", x)]
    after = new.split(newline)
    if ours: assert after[: ours[-1]] + after[ours[-1] + 1:] == text.split(newline)[: ours[-1]] + text.split(newline)[ours[-1] + 1:]
    newline = newline if newline in text else "\n"
    if not ours: assert new == text + ("" if not text or text.endswith("\n") else newline) + f"{NAME}={url}{newline}"
    if not re.search("['\"]", text):                      # an open quote makes what follows part of its value
        path = tmp_path_factory.getbasetemp() / "env"
        path.write_bytes(new.encode())
        assert dotenv_values(path)[NAME] == url


def test_the_env_file_keeps_mode_bytes_and_itself(tmp_path, monkeypatch):
    path, link = tmp_path / "real.env", tmp_path / ".env.local"
    path.write_bytes(b"\xff not utf-8\r\nA=1\r\n")
    path.chmod(0o640)
    link.symlink_to(path)
    assert deploy.write_env(link, NAME, "https://x") and not deploy.write_env(link, NAME, "https://x")
    assert path.read_bytes() == b"\xff not utf-8\r\nA=1\r\n" + NAME.encode() + b"=https://x\r\n" and stat.S_IMODE(path.stat().st_mode) == 0o640 and link.is_symlink()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): deploy.write_env(link, NAME, "https://y")
    assert b"https://x" in path.read_bytes() and len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    deploy.write_env(tmp_path / "new", NAME, "https://x")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600


# rules that need no process

def test_plan_is_pure_and_says_what_a_gpu_costs(tree):
    o = deploy.DeployOptions(SPACE, preset="lightning", source=tree)
    found = room_hub.SpaceState({"name": "ada", "isPro": True}, {"cpu-basic": 0, "l4x1": 0.8})
    plan = deploy_plan.plan_deployment(found, bundle.upload_set(tree), o)
    assert plan == deploy_plan.plan_deployment(found, bundle.upload_set(tree), o) and "l4x1 costs $0.80 an hour" in "".join(plan.notes)
    on_cpu = deploy_plan.plan_deployment(replace(found, head="x"), bundle.upload_set(tree), deploy.DeployOptions(SPACE, var={"TORCH_INDEX_URL": "pypi"}))
    assert plan.target.hardware == "l4x1" and deploy_plan.hardware_for(replace(found, head="x", hardware="a100-large", prices={"l4x1": 0.8, "a100-large": 2.5}), o) is None
    assert "has no GPU" in "".join(on_cpu.notes) and "removed from the Hub" in str(deploy_plan.plan_deployment(found, bundle.upload_set(tree), replace(o, model="runwayml/stable-diffusion-v1-5")))


def test_openvino_is_the_extra_of_the_package(tree):
    """However it is asked for, the image gets the extra, and the plan says what each start then costs."""
    found = room_hub.SpaceState({"name": "ada", "isPro": True}, {"cpu-basic": 0})
    for o in (deploy.DeployOptions(SPACE, preset="cpu-sd15"), deploy.DeployOptions(SPACE, var={"SD_BACKEND": "openvino"})):
        plan = deploy_plan.plan_deployment(found, bundle.upload_set(tree), o)
        assert plan.target.variables["EXTRA_PACKAGES"] == deploy_plan.OPENVINO and "every start converts" in "".join(plan.notes)
        assert b'startup_duration_timeout: "1h"' in plan.files["README.md"]
    running = replace(found, head="x", variables=plan.target.variables)
    assert {"SD_BACKEND", "EXTRA_PACKAGES"} == {c.name for c in deploy_plan.plan_deployment(running, bundle.upload_set(tree), deploy.DeployOptions(SPACE, preset="cpu")).changes if c.verb == "delete"}


ALONE = """
import sys, runpy
root, *allowed = sys.argv[1:]
class Only:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {*allowed, *sys.stdlib_module_names, "aura_engine"} and not name.startswith("_sysconfigdata"): raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Only())
sys.prefix, sys.argv = f"{root}/.venv", ["hf_space_deploy.py", "--help"]
runpy.run_path(f"{root}/scripts/hf_space_deploy.py", run_name="__main__")
"""


def test_it_runs_where_only_its_own_packages_are():
    """The script names what it needs, and does with that. Where torch is not installed, the check of requirements.txt gives way."""
    needs = re.search(r'NEEDS = "(.*)"', (ROOT / "scripts/hf_space_deploy.py").read_text())[1].replace(" ", "\n")
    have, known = bundle.installed_by(needs)
    allowed = [m for m, d in metadata.packages_distributions().items() if have & {bundle.plain_name(x) for x in d}]
    alone = lambda *names: subprocess.run([sys.executable, "-c", ALONE, ROOT, *names], cwd=ROOT, env=clean_env(), capture_output=True, text=True)
    assert known and "torch" not in allowed and "usage: hf_space_deploy.py" in alone(*allowed).stdout
    bare = alone()
    assert bare.returncode == 1 and "Traceback" not in bare.stderr and all(n in bare.stderr for n in needs.split())
    files = bundle.upload_set(ROOT)
    bad = {**files, "requirements.txt": b"fastapi\n"}
    tomorrow = {"requirements.txt": b"package-of-tomorrow\n", "requirements.lock": b"package-of-tomorrow==1 --hash=sha256:00\n"}
    assert bundle.faults(bad, ROOT / "tests") and not bundle.faults({**bad, **tomorrow}, ROOT / "tests")


def test_the_build_id_names_the_content(tree):
    a = bundle.upload_set(tree)
    edit(tree)
    b = bundle.upload_set(tree)
    assert bundle.build_id(a) != bundle.build_id(b) and bundle.build_id(a) == bundle.build_id(dict(reversed(a.items())))


def test_a_lock_without_a_date_says_so(hub, tree):
    lock = (tree / "requirements.lock").read_text()
    (tree / "requirements.lock").write_text(lock.replace("# Locked on ", "# Locked "))
    assert "requirements.lock does not say how old it is" in call(hub, tree, *GUIDE, "--dry-run")
