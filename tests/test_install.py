"""The package as a user gets it: an sdist, the wheel made from it, installed where no source tree is near, serving a picture."""
import base64, email, io, shutil, subprocess, sys, sysconfig, venv, zipfile

import pytest
from PIL import Image

import nb
from conftest import ROOT, clean_env, repo_files, start

SDIST = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"


def call(*argv, cwd):
    done = subprocess.run(argv, cwd=cwd, env=clean_env(PYTHONSAFEPATH=1), capture_output=True, text=True)
    if done.returncode: pytest.fail((done.stdout + done.stderr)[-4000:], pytrace=False)
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from the sdist, in a copy of the tree: building leaves build/ and egg-info behind."""
    tmp = tmp_path_factory.mktemp("wheel")
    for f in repo_files():
        copy = tmp / "src" / f.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, copy)
    call(sys.executable, "-c", SDIST, str(tmp), cwd=tmp / "src")
    sdist, = tmp.glob("*.tar.gz")
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", tmp, sdist, cwd=tmp)
    return next(tmp.glob("*.whl"))


def test_wheel_holds_the_package_and_its_data(wheel):
    lib = ROOT / "aura_engine"
    want = {p.relative_to(ROOT).as_posix() for p in lib.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    with zipfile.ZipFile(wheel) as z:
        assert {n for n in z.namelist() if n.startswith("aura_engine/")} == want
        meta = email.message_from_bytes(z.read(next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))))
    cfg = nb.settings()
    assert (meta["Name"], meta["Version"], meta["Requires-Python"]) == ("aura-engine", cfg["version"], ">=" + cfg["min_python"])
    need = {r.split(";")[0].split(">")[0].split("<")[0] for r in meta.get_all("Requires-Dist") if "extra ==" not in r}
    assert need == {r.split(">")[0].split("<")[0] for r in cfg["requirements"].split()}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Python of a fresh environment with the wheel. The dependencies are borrowed from this one, its editable installs are not."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home / "venv", with_pip=False, symlinks=True)
    python = home / "venv/bin/python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=home)
    site = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    with open(f"{site}/borrowed.pth", "w", encoding="utf-8") as f: f.write(sysconfig.get_path("purelib") + "\n")
    return python


def test_installed_package_serves_a_picture(installed, tmp_path):
    where = call(installed, "-c", "import aura_engine; print(aura_engine.__file__)", cwd=tmp_path).strip()
    assert where.startswith(str(installed.parents[1])), f"imported from {where}, not from the wheel"
    served = start([installed, "-c", "from aura_engine.server import main; main()"], tmp_path / "log.txt", cwd=tmp_path)
    try:
        answer = served.wait_ready().post("/generate", {"prompt": "a red apple"})
        picture = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
        assert picture.format == "PNG" and min(picture.size) >= 64
        assert max(hi - lo for lo, hi in picture.convert("RGB").getextrema()) > 32, "a picture of one flat colour"
    finally: served.stop()
