"""The image, really built and really run, without a Docker engine, and one command from source to a picture at the "Space".

buildah, podman, runc and mmdebstrap are installed with apt-get where they are missing and that is possible. Otherwise the
tests skip and say why. The base image (a Debian with Python under the name that the Dockerfile asks for) and the layers are
kept in AURA_TEST_CACHE, by default ~/.cache/aura_engine_test, so that only the first run takes minutes.
"""
import base64, functools, io, json, os, re, resource, shutil, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest
from PIL import Image

from aura_engine import bundle
from conftest import ROOT, free_port, repo_files, start
from hub import Hub
from test_deploy import SPACE, run

pytestmark = pytest.mark.slow
CACHE = Path(os.environ.get("AURA_TEST_CACHE") or Path.home() / ".cache/aura_engine_test")
STORE = ["--root", str(CACHE / "storage"), "--runroot", str(CACHE / "run"), "--storage-driver", "overlay"]
PODMAN = ["podman", *STORE, "--events-backend", "file", "--runtime", "runc", "--cgroup-manager", "cgroupfs"]
BASE = "docker.io/library/python:3.11-slim"
TOOLS = ("buildah", "podman", "runc", "mmdebstrap", "ip")
ASK = """
import json, sys, urllib.request
body = json.dumps({"prompt": "a red apple", "seed": 1}).encode()
print(urllib.request.urlopen(urllib.request.Request(sys.argv[1] + "/generate", body, {"content-type": "application/json"}), timeout=120).read().decode())
"""


def sh(*argv, timeout=900, **more):
    """The output of a command. One that fails fails the test with its last words."""
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, timeout=timeout, **more)
    if done.returncode: pytest.fail(f"{' '.join(map(str, argv[:8]))}: {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}", pytrace=False)
    return done.stdout


@pytest.fixture(scope="session")
def tools():
    if os.geteuid(): pytest.skip("building an image without a Docker engine needs root")
    if missing := [t for t in TOOLS if not shutil.which(t)]:
        if not shutil.which("apt-get"): pytest.skip(f"{', '.join(missing)}: not installed, and there is no apt-get")
        names = ["iproute2" if t == "ip" else t for t in missing]
        for argv in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *names]):
            done = subprocess.run(argv, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, text=True, timeout=600)
            if done.returncode: pytest.skip(f"{', '.join(missing)} could not be installed: {done.stderr.strip()[-200:]}")
    if subprocess.run(["unshare", "-n", "-m", "true"], capture_output=True).returncode: pytest.skip("this machine allows no namespaces")
    CACHE.mkdir(parents=True, exist_ok=True)


@pytest.fixture(scope="session")
def base(tools):
    """The image that the Dockerfile starts from: bookworm with Python 3.11 and pip, not the registry's own."""
    if subprocess.run([*PODMAN, "image", "exists", BASE], capture_output=True).returncode == 0: return
    tar = CACHE / "base.tar"
    if not tar.exists():
        hooks = ['rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED', 'ln -s /usr/bin/python3 "$1"/usr/local/bin/python', 'ln -sf /usr/bin/pip3 "$1"/usr/local/bin/pip']
        argv = ["mmdebstrap", "--variant=minbase", "--include=python3,python3-pip,ca-certificates", *(f"--customize-hook={h}" for h in hooks), "bookworm", tar.with_suffix(".part.tar")]
        done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, timeout=900)
        if done.returncode: pytest.skip(f"no base image: {done.stderr.strip()[-300:]}")
        tar.with_suffix(".part.tar").rename(tar)
    sh(*PODMAN, "import", tar, BASE)


def pip_mounts(folder):
    """This machine's pip configuration, certificates and local wheels, for the build to see and the image not to keep."""
    pairs = pip_config()
    if not pairs: return []
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{k} = {v}\n" for k, v in dict(reversed(pairs)).items()))
    named = {Path(p) for _, v in pairs for p in re.findall(r"(?:^|\s|file://)(/[^\s']+)", v)}
    local = {p.parent if p.name == "simple" else p for p in named if p.exists()}          # an index has its files beside it
    return [x for p, to in [(folder / "pip.conf", "/etc/pip.conf"), *((p, p) for p in sorted(local))] for x in ("--volume", f"{p}:{to}:ro")]


def pip_config(): return re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", sh(sys.executable, "-m", "pip", "config", "list"), re.M)


@functools.cache
def torch_index():
    """Which wheels of torch the build gets: the Dockerfile's own, unless TORCH_INDEX_URL says otherwise, or neither their index nor a folder of wheels has them."""
    text = (ROOT / "Dockerfile").read_text()
    own = re.search(r"^ARG TORCH_INDEX_URL=(.*)$", text, re.M)[1]
    address = re.search(r'index="(https.*?)\$TORCH_INDEX_URL"', text)[1] + own
    if (given := os.environ.get("TORCH_INDEX_URL", "").rstrip("/")) not in ("", address): return given
    version, = re.findall(r"^torch==(\S+)", (ROOT / f"locks/torch-{own}.lock").read_text(), re.M)
    folders = [Path(folder) for name, folders in pip_config() if name == "find-links" for folder in folders.split()]
    if any(True for folder in folders for _ in folder.glob(f"torch-{version}-cp311-*")): return own
    try: urllib.request.urlopen(address + "/torch/", timeout=10).close()
    except OSError: return "pypi"
    return own


def build(folder, tag, mounts, say=lambda line: None, **args):
    """`docker build`, as buildah does it. RuntimeError when it fails."""
    args.setdefault("TORCH_INDEX_URL", torch_index())
    args.setdefault("BASE_IMAGE", BASE)         # no registry is asked for the digest
    given = [x for k, v in args.items() for x in ("--build-arg", f"{k}={v}")]
    argv = ["buildah", *STORE, "bud", "--isolation", "chroot", "--network", "host", "--pull-never", "--layers", "--format", "docker", *mounts, *given, "-t", tag, str(folder)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout: say(line)
    if process.wait(): raise RuntimeError(f"the build of {tag} failed")


def unpack(files, folder):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="session")
def image(base, tmp_path_factory):
    """The image of what would be uploaded, and the seconds that a rebuild takes after a change of code alone."""
    tmp, lines = tmp_path_factory.mktemp("image"), []
    files = bundle.upload_set(ROOT)
    folder = unpack(bundle.stamp(files), tmp / "source")
    mounts = pip_mounts(tmp)
    try: build(folder, "localhost/aura", mounts, lines.append)
    except RuntimeError: pytest.fail("".join(lines)[-4000:], pytrace=False)
    (folder / "app.py").write_text((folder / "app.py").read_text() + "\n# changed\n")
    begin = time.monotonic()
    build(folder, "localhost/aura-changed", mounts)
    return {"name": "localhost/aura", "mounts": mounts, "again": time.monotonic() - begin, "id": bundle.build_id(files)}


def container(image, name, *options, command=(), alone=True, memory="4g"):
    """`podman run` in the foreground. `alone` gives it a network of its own, in which it may listen where it likes."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    inside = ["unshare", "-n", "-m", "sh", "-c", 'ip link set lo up; exec "$0" "$@"'] if alone else []
    argv = [*inside, *PODMAN, "run", "--rm", "--name", name, "--network", "host", "--no-healthcheck", "--ulimit", f"nofile={most}:{most}", "--ulimit", "nproc=4096:4096",
            "--memory", memory, "--cpus", "2", *options, image, *command]
    subprocess.run([*PODMAN, "rm", "-f", name], capture_output=True)
    return subprocess.Popen(argv, cwd=CACHE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)      # conmon leaves a file "oom" where it is


def inside(process, *argv, timeout=130):
    """A program of this machine, in the container's network."""
    return subprocess.run(["nsenter", "-t", str(process.pid), "-n", *argv], capture_output=True, text=True, timeout=timeout)


def guides_line():
    """The `docker run` that the guide gives to other clouds."""
    line, = re.findall(r'"    (docker run [^"]*? aura)\\n"', (ROOT / "nbs/15e_deploy.ipynb").read_text())
    return line


def docker(folder):
    """An environment in which `docker` is podman, set up for a machine without systemd, so that the guide's lines run as they stand."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    (folder / "containers.conf").write_text(f'[containers]\ndefault_ulimits = ["nofile={most}:{most}", "nproc=4096:4096"]\n'
                                            '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n')
    (folder / "storage.conf").write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{CACHE}/storage"\nrunroot = "{CACHE}/run"\n')
    (folder / "docker").write_text('#!/bin/sh\nexec podman "$@"\n')
    (folder / "docker").chmod(0o755)
    confs = {"CONTAINERS_CONF": f"{folder}/containers.conf", "CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf"}
    return {**os.environ, **confs, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def wait_ready(process, seconds=120):
    end = time.monotonic() + seconds
    look = "import urllib.request as r, sys; sys.exit(r.urlopen('http://127.0.0.1:7860/ready', timeout=3).status != 200)"
    while process.poll() is None and time.monotonic() < end:
        if inside(process, sys.executable, "-c", look).returncode == 0: return
        time.sleep(0.5)
    process.terminate()
    pytest.fail(f"not ready:\n{process.communicate()[0][-4000:]}", pytrace=False)


def healthcheck(name):
    """The program that the image names as its health check."""
    kind, *argv = json.loads(sh(*PODMAN, "image", "inspect", "--format", "{{json .HealthCheck.Test}}", name))
    assert kind == "CMD"
    return argv


def picture(answer):
    im = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
    assert im.format == "PNG" and max(hi - lo for lo, hi in im.convert("RGB").getextrema()) > 32
    return im


def layers(name): return json.loads(sh(*PODMAN, "image", "inspect", "--format", "{{json .RootFS.Layers}}", name))


def test_size_and_layers(image):
    """A change of code makes the layers of the code anew, and none of those that hold packages."""
    size = int(sh(*PODMAN, "image", "inspect", "--format", "{{.Size}}", image["name"]))
    assert size < 1.6e9, f"{size / 1e9:.2f} GB"
    before, after = layers(image["name"]), layers(image["name"] + "-changed")
    assert before != after and before[:-2] == after[:-2] and len(before) > 5
    print(f"{size / 1e9:.2f} GB, rebuilt in {image['again']:.1f} s")


def test_the_guides_docker_run_gives_a_picture(image, tmp_path):
    """The very line, its port published, and, as the guide says of it, as uid 1000 and on a read-only disk."""
    line = guides_line().replace("docker run", "docker run --name aura-picture --read-only --tmpfs /tmp")
    assert "-p 7860:7860" in line
    subprocess.run([*PODMAN, "rm", "-f", "aura-picture"], capture_output=True)
    # In a network of its own, so that the port is free there.
    process = subprocess.Popen(["unshare", "-n", "-m", "sh", "-c", f"ip link set lo up; exec {line}"], cwd=CACHE, env=docker(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_ready(process)
        asked = inside(process, sys.executable, "-c", ASK, "http://127.0.0.1:7860")
        assert asked.returncode == 0, asked.stderr[-2000:]
        picture(json.loads(asked.stdout))
        pid = sh(*PODMAN, "inspect", "--format", "{{.State.Pid}}", "aura-picture").strip()
        assert re.search(r"^Uid:\s+1000\s+1000", Path(f"/proc/{pid}/status").read_text(), re.M)
        health = inside(process, sys.executable, "-c", "import urllib.request as r; print(r.urlopen('http://127.0.0.1:7860/health').read().decode())")
        assert json.loads(health.stdout)["buildId"] == image["id"]
        kept = "import os, pathlib; p = pathlib.Path(os.environ['HF_HOME']); p.mkdir(exist_ok=True); (p / 'x').write_text('x')"
        for program in (["python", "-c", kept], healthcheck(image["name"])):
            done = inside(process, *PODMAN, "exec", "aura-picture", *program)
            assert done.returncode == 0, done.stderr[-2000:]
        process.terminate()
        out = process.communicate(timeout=40)[0]
        assert process.returncode == 0 and '"event": "stopping"' in out, out[-2000:]
    finally:
        process.kill()
        subprocess.run([*PODMAN, "volume", "rm", "-f", "aura"], capture_output=True)


CUDA_LOOK = """
import shutil, torch
assert torch.version.cuda and not torch.cuda.is_available() and shutil.which("gcc") and shutil.which("g++"), (torch.version.cuda, shutil.which("gcc"))
from aura_engine import loader
from aura_engine.types import ModelError
print(loader.pick_device("auto")[0].type)
try: loader.pick_device("cuda")
except ModelError as e: print(e)
"""


def index_of(wheels):
    """The address that the Dockerfile makes of a name of wheels. None for pip's usual one."""
    return None if wheels == "pypi" else re.search(r'index="(https.*?)\$TORCH_INDEX_URL"', (ROOT / "Dockerfile").read_text())[1] + wheels


@pytest.mark.parametrize("wheels", ["cu126", "pypi"])
def test_a_cuda_image_as_far_as_it_goes_without_a_gpu(wheels, image, tmp_path):
    """It is built, imports torch for CUDA, has a compiler, takes the CPU by itself, and refuses SD_DEVICE=cuda with wheel and driver. That is 6 GB and
    ten minutes, so only when it is asked for. What needs a GPU is not seen here."""
    if not os.environ.get("AURA_TEST_CUDA"): pytest.skip("builds an image of 6 GB: AURA_TEST_CUDA=1 asks for it")
    if address := index_of(wheels):
        try: urllib.request.urlopen(address + "/torch/", timeout=10).close()
        except OSError as e: pytest.skip(f"the wheels' index {address} does not answer: {e}")
    folder, lines, tag = unpack(bundle.stamp(bundle.upload_set(ROOT)), tmp_path / "source"), [], f"localhost/aura-{wheels}"
    begin = time.monotonic()
    try: build(folder, tag, image["mounts"], lines.append, TORCH_INDEX_URL=wheels)
    except RuntimeError: pytest.fail("".join(lines)[-4000:], pytrace=False)
    built = time.monotonic() - begin
    try:
        process = container(tag, "aura-cuda", command=("python", "-c", CUDA_LOOK))
        out = process.communicate(timeout=180)[0]
        assert process.returncode == 0 and re.search(r"^cpu$", out, re.M), out[-2000:]
        assert re.search(r"SD_DEVICE=cuda: this machine has cpu \(torch \S+, CUDA [\d.]+; NVIDIA driver not found\)", out), out[-2000:]
        print(f"{int(sh(*PODMAN, 'image', 'inspect', '--format', '{{.Size}}', tag)) / 1e9:.2f} GB, built in {built:.0f} s")
    finally: sh(*PODMAN, "rmi", "-f", tag)


def test_the_memory_limit_holds(image):
    """As the guide's `--memory 4g`: what wants more is killed. (Not the app itself: its libraries are pages of files, which a small limit
    makes slow for minutes before it kills.)"""
    process = container(image["name"], "aura-small", "--memory-swap", "150m", memory="150m", command=("python", "-c", "len(b'x' * (400 << 20))"))
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 137, out[-2000:]


# from source to a picture at the Space

def as_process(tmp, image):
    """Serve a commit by its own app.py, with the packages of this environment."""
    def builder(run, log):
        folder = unpack({p: b.data for p, b in run.tree.items()}, tmp / run.sha)
        s = start([sys.executable, "app.py", "--host", "127.0.0.1"], tmp / f"{run.sha}.log", cwd=folder, AURA_BUILD_ID=run.build_id, **run.env)
        log("build", "--> no image here, only a process\n")
        s.wait_ready()
        return s.url, s.stop
    return builder


def as_image(tmp, image):
    """Build a commit's Dockerfile and run the image."""
    def builder(run, log):
        folder = unpack({p: b.data for p, b in run.tree.items()}, tmp / run.sha)
        build(folder, f"localhost/space:{run.sha}", image["mounts"], lambda line: log("build", line), **run.env)
        port, env = free_port(), [x for k, v in run.env.items() for x in ("--env", f"{k}={v}")]
        process = container(f"localhost/space:{run.sha}", f"space-{run.sha[:8]}", "--env", f"PORT={port}", *env, command=("python", "app.py", "--host", "127.0.0.1"), alone=False)
        for _ in range(240):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=3)
            except OSError: time.sleep(0.5)
            else: return f"http://127.0.0.1:{port}", lambda: (process.terminate(), process.wait(40), sh(*PODMAN, "rmi", "-f", f"localhost/space:{run.sha}"))
        process.terminate()
        raise RuntimeError(process.communicate()[0][-2000:])
    return builder


@pytest.mark.parametrize("kind", [as_process, as_image], ids=["process", "image"])
def test_one_command_from_source_to_a_picture(kind, request, tmp_path):
    """The guide's line in a fresh copy of the repository. Then a change of code, deployed again."""
    made = request.getfixturevalue("image") if kind is as_image else None
    tree = unpack({f.relative_to(ROOT).as_posix(): f.read_bytes() for f in repo_files()}, tmp_path / "tree")
    with Hub(builder=kind(tmp_path, made), lag=0.5) as hub:
        out = run(hub, tree, "--origins", "http://localhost:5173", limit=900)
        host = hub.spaces[SPACE].host
        assert "a picture came, and a stranger was refused" in out and (tree / ".env.local").read_text() == f"VITE_CLOUD_ENGINE_URL={host}\n"
        body = json.dumps({"prompt": "an owl"}).encode()
        with urllib.request.urlopen(urllib.request.Request(host + "/generate", body, {"content-type": "application/json"}), timeout=60) as r: picture(json.load(r))
        with open(tree / "app.py", "a") as f: f.write("\n# second version\n")
        begin = time.monotonic()
        run(hub, tree, "--origins", "http://localhost:5173", limit=300)
        print(f"the second version was proven after {time.monotonic() - begin:.0f} s")
