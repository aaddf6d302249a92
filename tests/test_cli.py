"""`aura` as a terminal sees it: files, JSON, exit statuses, Ctrl-C; and `aura serve` as a process."""
import json, re, signal, subprocess, sys, time
from pathlib import Path

import httpx
import pytest
from PIL import Image

import nb
from conftest import ROOT, clean_env, free_port, start

AURA = [sys.executable, "-c", "from aura_engine.cli import main; main()"]


def launch(*argv, cwd, **env):
    env = clean_env(PYTHONPATH=ROOT, COLUMNS=200, TERM="dumb", **env)
    return subprocess.Popen([*AURA, *map(str, argv)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def aura(tmp_path):
    """Run a command in an empty folder -> (status, stdout, stderr)."""
    def run(*argv, **env):
        process = launch(*argv, cwd=tmp_path, **env)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err
    return run


def test_pictures_from_words_pictures_and_receipts(aura, server, tmp_path):
    status, out, err = aura("generate", "a red apple", "-o", "apple.png", "--seed", 7, "--local", server.url)
    assert (status, err) == (0, "") and re.fullmatch(r"apple\.png  128x128, seed 7, 4 steps, local engine, [\d.]+ s\n", out)
    status, out, _ = aura("generate", "A fox, on white!", "-n", 2, "--seed", 5, "--aspect", "4:3", "--json", "--local", server.url)
    assert status == 0 and json.loads(out)["files"] == ["a-fox-on-white-5.png", "a-fox-on-white-6.png"] and all((tmp_path / f).exists() for f in json.loads(out)["files"])
    status, out, _ = aura("refine", "a green apple", "apple.png", "-o", "green.jpg", "--strength", 0.6, "--json", "--local", server.url)
    assert status == 0 and json.loads(out)["receipts"][0]["strength"] == 0.6 and Image.open(tmp_path / "green.jpg").format == "JPEG"
    status, out, err = aura("replay", "apple.png", "-o", "again.png", "--local", server.url)
    assert (status, err) == (0, "") and Image.open(tmp_path / "again.png").tobytes() == Image.open(tmp_path / "apple.png").tobytes()


def test_what_was_done_differently_is_said(aura, server):
    status, out, err = aura("generate", "a fox", "--resolution", "high", "--negative", "blur", "--local", server.url)
    assert status == 0 and "no GPU" in err and "negative prompt" in err and out.startswith("a-fox-")


@pytest.mark.parametrize("argv, said", [
    (["generate", ""], "prompt"), (["generate", "x", "--seed", "-1"], "seed: given -1"), (["generate", "x", "-o", "x.bmp"], r"\.png"), (["replay", "plain.png"], "made by this engine"),
    (["generate", "x", "--local", "nowhere"], "nowhere"),
])
def test_wrong_values_end_with_status_1_and_a_sentence(aura, server, tmp_path, argv, said):
    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    argv = argv if "--local" in argv else [*argv, "--local", server.url]
    status, out, err = aura(*argv)
    assert status == 1 and out == "" and re.search(said, err) and "Traceback" not in err
    status, out, err = aura(*argv, "--json")
    assert status == 1 and json.loads(out)["detail"] and err == ""


def test_no_engine_says_how_to_get_one(aura):
    nowhere = f"http://127.0.0.1:{free_port()}"
    status, out, err = aura("generate", "a fox", "--local", nowhere)
    assert status == 1 and out == "" and all(word in err for word in (nowhere, "aura serve", "--offline"))
    assert aura("generate", "a fox", "--mode", "cloud")[0] == 1
    status, out, _ = aura("health", "--local", nowhere, "--json")
    assert status == 1 and json.loads(out)["local"]["status"] == "unreachable"


def test_health(aura, server):
    status, out, _ = aura("health", "--local", server.url, "--origin", "https://my.site")
    assert status == 0 and all(word in out for word in ("ready", "embedded", "LCMScheduler", "page may call", "False"))
    assert json.loads(aura("health", "--local", server.url, "--json")[1])["local"]["ready"]


def test_the_cloud_address_of_the_guide(aura, server, tmp_path):
    (tmp_path / ".env.local").write_text(f"VITE_CLOUD_ENGINE_URL={server.url}\n")
    status, out, _ = aura("generate", "a fox", "--json", "--local", f"http://127.0.0.1:{free_port()}")
    assert status == 0 and json.loads(out)["engine"] == "cloud"


def test_ctrl_c_cancels_on_the_engine(server, tmp_path):
    process = launch("generate", "an owl", "-n", 4, "--steps", 50, "--local", server.url, cwd=tmp_path)
    queue, end = (lambda: httpx.get(server.url + "/health").json()["queue"]["length"]), time.monotonic() + 60
    while not queue(): assert time.monotonic() < end and process.poll() is None; time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode != 0 and "Traceback" not in err and list(tmp_path.iterdir()) == []
    end = time.monotonic() + 5
    while queue(): assert time.monotonic() < end; time.sleep(0.02)


def test_serve_is_an_engine_on_this_machine_only(tmp_path):
    served = start([*AURA, "serve"], tmp_path / "log.txt", PYTHONPATH=ROOT)
    try:
        end = time.monotonic() + 60
        while served.status("/health") is None: assert time.monotonic() < end and served.process.poll() is None, served.tail(); time.sleep(0.1)
        assert f"starting at {served.url}" in served.tail()
    finally: assert served.stop() == 0


def test_help_is_quick_and_complete(aura):
    status, out, _ = aura("--help")
    assert status == 0 and all(re.search(rf"\b{c}\b", out) for c in ("generate", "refine", "replay", "health", "serve", "bench", "deploy"))
    code = "import sys; sys.argv = ['aura', 'generate', '--help']\nfrom aura_engine.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_env(), capture_output=True).returncode == 0


def test_the_command_is_installed():
    assert nb.settings()["console_scripts"] == "aura=aura_engine.cli:main"
    aura = Path(sys.executable).parent / "aura"
    if not aura.exists(): pytest.skip("the package is not installed in this environment (pip install -e .)")
    assert subprocess.run([aura, "--version"], capture_output=True, text=True, env=clean_env()).stdout.strip() == nb.settings()["version"]
