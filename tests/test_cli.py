"""`aura` as a terminal sees it: files, JSON, exit statuses, Ctrl-C, and `aura serve` as a process."""
import json, re, signal, subprocess, sys, time
from pathlib import Path

import httpx
import pytest
from PIL import Image

import nb
from aura_engine.cli import cli
from conftest import ROOT, clean_env, free_port, start
from edge import Edge, page

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


def test_a_mask_from_a_file(aura, server, tmp_path):
    picture, mask = Image.effect_mandelbrot((160, 128), (-2, -1, 1, 1), 50).convert("RGB"), Image.new("L", (160, 128))
    mask.paste(255, (40, 40, 100, 100))
    picture.save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    status, out, err = aura("refine", "a fish", "photo.png", "--mask", "mask.png", "--padding-mask-crop", 10, "-o", "new.png", "--local", server.url)
    assert (status, err) == (0, ""), err
    new = Image.open(tmp_path / "new.png")
    new.paste(0, (40, 40, 100, 100)), picture.paste(0, (40, 40, 100, 100))
    assert new.size == (160, 128) and new.tobytes() == picture.tobytes()
    status, _, err = aura("replay", "new.png", "--init", "photo.png", "--mask", "mask.png", "-o", "again.png", "--local", server.url)
    assert (status, err) == (0, "") and Image.open(tmp_path / "again.png").tobytes() == Image.open(tmp_path / "new.png").tobytes()


def test_what_was_done_differently_is_said(aura, server):
    status, out, err = aura("generate", "a fox", "--resolution", "high", "--negative", "blur", "--local", server.url)
    assert status == 0 and "no GPU" in err and "negative prompt" in err and out.startswith("a-fox-")


@pytest.mark.parametrize("argv, said", [
    (["generate", ""], "prompt"), (["generate", "x", "--seed", "-1"], "seed: given -1"), (["generate", "x", "-o", "x.bmp"], r"\.png"), (["replay", "plain.png"], "made by this engine"),
    (["generate", "x", "--local", "nowhere"], "nowhere"), (["generate", "x", "--mode", "local", "--local", "http://127.0.0.1:99999"], "local: given port 99999, allowed: 0 to 65535"), (["generate", "x", "--aspect", "9"], "--aspect: given '9'"),
    (["refine", "x", *["plain.png"] * 5], "images: given 5 items, allowed: at most 4"), (["refine", "x", "text.txt"], "text.txt: given"),
])
def test_wrong_values_end_with_status_1_and_a_sentence(aura, server, tmp_path, argv, said):
    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    (tmp_path / "text.txt").write_text("no picture")
    argv = argv if "--local" in argv else [*argv, "--local", server.url]
    status, out, err = aura(*argv)
    assert status == 1 and out == "" and re.search(said, err) and "Traceback" not in err
    status, out, err = aura(*argv, "--json")
    assert status == 1 and json.loads(out)["detail"] and err == ""


def test_no_engine_says_how_to_get_one(aura):
    nowhere = f"http://127.0.0.1:{free_port()}"
    status, out, err = aura("generate", "a fox", "--local", nowhere)
    assert status == 1 and out == "" and all(word in err for word in (nowhere, "aura serve", "--offline"))
    status, out, err = aura("generate", "a fox", "--mode", "cloud", "--cloud", nowhere)
    assert status == 1 and "--offline" in err and "--cloud" not in err
    assert aura("generate", "a fox", "--mode", "cloud")[0] == 1
    status, out, _ = aura("health", "--local", nowhere, "--json")
    assert status == 1 and json.loads(out)["local"]["status"] == "unreachable"


@pytest.mark.parametrize("address", ["http://me:s3cret@127.0.0.1:9", "me:s3cret@127.0.0.1:9", "http://me:s3c#ret@host", "http://me:s3cret@[::1", "htp://me:s3cret@x"])
def test_a_password_in_an_address_is_not_shown(capsys, address):
    """In this process: a start of the command for each would take a second."""
    for argv in (["generate", "a fox", "--local", address], ["health", "--local", address], ["generate", "a fox", "--mode", "cloud", "--cloud", address, "--json"]):
        with pytest.raises(SystemExit) as end: cli(argv)
        said = "".join(capsys.readouterr())
        assert end.value.code == 1 and "s3c" not in said and "…" in said.replace("\\u2026", "…"), said


def test_health(aura, server):
    status, out, _ = aura("health", "--local", server.url, "--origin", "https://my.site")
    assert status == 0 and all(word in out for word in ("ready", "embedded", "LCMScheduler", "page may call", "False"))
    assert json.loads(aura("health", "--local", server.url, "--json")[1])["local"]["ready"]


def test_several_engines(aura, server):
    """A row each, and the exit status says whether all are ready."""
    status, out, _ = aura("fleet", server.url, server.url)
    assert status == 0 and out.count("ready") == 2 and "together" in out and "cost" not in out
    assert server.url in out and "1,000" in aura("fleet", server.url, "--price", "0.8")[1]
    nobody = f"http://127.0.0.1:{free_port()}"
    status, out, _ = aura("fleet", server.url, nobody, "--json")
    assert status == 1 and [e["url"] for e in json.loads(out)] == [server.url, nobody] and "problem" in json.loads(out)[1]
    assert json.loads(out)[0]["made"] >= 0
    status, _, err = aura("fleet", "not an address")
    assert status == 1 and "aura fleet" in err and "not an address" in err


def test_a_load_on_an_engine(aura, server, tmp_path):
    """`aura bench --url` counts pictures and refusals apart, and `--compare` reads what it wrote."""
    load = ("bench", "--url", server.url, "--clients", 2, "--requests", 4, "--runs", 1, "--steps", 1)
    status, out, err = aura(*load, "--door", "openai", "--out", "a.json")
    row, = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert status == 0 and row["without"] == {} and row["throughput"]["median"] > 0 and "pictures/s" in out, err
    status, out, _ = aura("bench", "--compare", "a.json", "a.json")
    assert status == 0 and "1.00" in out and "the ranges touch" in out
    status, out, _ = aura("bench", "--url", f"http://127.0.0.1:{free_port()}", *load[3:])
    assert status == 0 and "4 × ConnectError" in out
    for wrong, said in ((("--url", server.url, "--door", "back"), "door"), (("--compare", "a.json", "b.json"), "b.json"), (("--url", "no address"), "--url"), (("--url", server.url, "--out", "/proc/a.json"), "/proc/a.json cannot be written")):
        status, out, err = aura("bench", *wrong)
        assert status == 1 and said in err and "Traceback" not in err, err


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
        again = subprocess.run([*AURA, "serve", "--port", served.url.rpartition(":")[2]], env=clean_env(PYTHONPATH=ROOT), capture_output=True, text=True, timeout=60)
        assert again.returncode == 2 and "already in use" in again.stderr and "--port" in again.stderr
    finally: assert served.stop() == 0


def test_help_is_quick_and_complete(aura):
    status, out, _ = aura("--help")
    assert status == 0 and all(re.search(rf"\b{c}\b", out) for c in ("generate", "refine", "batch", "replay", "health", "serve", "bench", "deploy"))
    code = "import sys; sys.argv = ['aura', 'generate', '--help']\nfrom aura_engine.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_env(), capture_output=True).returncode == 0


def test_the_module_is_the_command(tmp_path):
    """Where the script is not installed. Another module's help names the command that gave it."""
    done = subprocess.run([sys.executable, "-m", "aura_engine.cli", "deploy", "--help"], cwd=tmp_path, env=clean_env(PYTHONPATH=ROOT), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: aura deploy") and "--sleep-time" in done.stdout


def test_the_command_is_installed():
    assert nb.settings()["console_scripts"] == "aura=aura_engine.cli:main"
    aura = Path(sys.executable).parent / "aura"
    if not aura.exists(): pytest.skip("the package is not installed in this environment (pip install -e .)")
    assert subprocess.run([aura, "--version"], capture_output=True, text=True, env=clean_env()).stdout.strip() == nb.settings()["version"]


# before, beside and after the picture

def test_the_destination_is_checked_before_a_picture_is_made(aura, tmp_path):
    """No engine is asked: nothing listens at the address, and the message is about the file."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for name, said in (("out.gif", ".webp"), ("out", ".webp"), ("/proc/x.png", "cannot be written"), ("file/x.png", "cannot be written"), ("/dev/null/x.png", "cannot be written")):
        status, out, err = aura("generate", "x", "-o", name, "--local", "http://127.0.0.1:9", "--mode", "local")
        assert status == 1 and out == "" and said in err and "Traceback" not in err and "aura serve" not in err, (name, err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_folder_takes_the_prompts_name(aura, server, tmp_path):
    (tmp_path / "pictures").mkdir()
    status, out, _ = aura("generate", "A fox!", "-o", "pictures", "--seed", 5, "--steps", 1, "--json", "--local", server.url)
    assert status == 0 and json.loads(out)["files"] == ["pictures/a-fox-5.png"] and (tmp_path / "pictures/a-fox-5.png").exists()
    assert aura("generate", "x", "-o", "new/deep/x.webp", "--steps", 1, "--local", server.url)[0] == 0 and (tmp_path / "new/deep/x.webp").exists()
    _, out, _ = aura("generate", "a", "red", "fox", "-o", "made/", "--seed", 5, "--steps", 1, "--local", server.url)     # no quotes, a folder to make
    assert out.startswith("made/a-red-fox-5.png  128x128, seed 5, 1 step, ")


def test_a_pipe_carries_one_picture_and_a_prompt(server, tmp_path):
    env = clean_env(PYTHONPATH=ROOT, TERM="dumb")
    run = lambda *argv, words=b"": subprocess.run([*AURA, *map(str, argv), "--local", server.url], input=words, cwd=tmp_path, env=env, capture_output=True, timeout=120)
    done = run("generate", "-", "-o", "-", "--seed", 3, "--steps", 1, words="ein Fuchs 🦊\n".encode())
    assert done.returncode == 0 and done.stdout.startswith(b"\x89PNG") and b"seed 3" in done.stderr
    (tmp_path / "piped.png").write_bytes(done.stdout)
    assert json.loads(run("replay", "piped.png", "-o", "again.png", "--json").stdout)["receipts"][0]["prompt"] == "ein Fuchs 🦊"
    for bad in (run("generate", "x", "-n", 2, "-o", "-"), run("generate", "-", words=b"\xff\xfe"), run("generate", "-", words=b""), run("generate", "-", words=b"x" * 3000)):
        assert bad.returncode == 1 and bad.stdout == b"" and bad.stderr and b"Traceback" not in bad.stderr


def test_addresses_keys_and_help_as_people_write_them(aura, server, make_server):
    bare = server.url.removeprefix("http://")
    assert aura("generate", "x", "--steps", 1, "--local", bare)[0] == 0
    assert aura("health", "--local", f":{bare.split(':')[1]}")[0] == 0
    locked = make_server(AURA_API_KEY="sésame")
    status, _, err = aura("generate", "x", "--steps", 1, "--local", locked.url)
    assert status == 1 and "API key" in err
    assert aura("generate", "x", "--steps", 1, "--local", locked.url, "--api-key", "sésame")[0] == 0
    assert aura("generate", "x", "--steps", 1, "--local", locked.url, AURA_API_KEY="sésame\n")[0] == 0
    assert aura("-h")[0] == aura("generate", "-h")[0] == 0


def test_another_program_on_the_port_is_told_in_local_words(aura):
    with Edge(page(404, "not here"), page(200, "my router"), page(502)) as other:
        for _ in range(3):
            status, _, err = aura("generate", "x", "--mode", "local", "--local", other.url)
            assert status == 1 and "not an engine of ours" in err and "Another program" in err and "Space public" not in err and "asleep" not in err


def test_a_fault_of_the_program_is_a_sentence(tmp_path):
    code = "import aura_engine.cli as c\ndef broken(*a, **k): raise RuntimeError('who knows')\nc.client_for = broken\nimport sys; sys.argv = ['aura', 'health']\nc.main()"
    for level, trace in (("info", False), ("debug", True)):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=clean_env(PYTHONPATH=ROOT, AURA_LOG_LEVEL=level), capture_output=True, text=True, timeout=60)
        assert "who knows" in done.stderr and ("Traceback" in done.stderr) is trace and done.returncode == (1 if trace else 70)


def test_many_prompts_from_a_file(aura, server, tmp_path):
    (tmp_path / "list.txt").write_text("# my list\na fox\n\nein Eulenbaum 🦉\n" + "x" * 3000 + "\nan owl\n", encoding="utf-8")
    status, out, err = aura("batch", "list.txt", "-o", "made", "--steps", 1, "--seed", 4, "--local", server.url)
    assert status == 1 and "3 of 4 pictures in made" in out and "line 3: prompt" in err and "Traceback" not in err
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["001 a-fox.png", "002 ein-eulenbaum.png", "004 an-owl.png", "sheet.png"]
    assert Image.open(tmp_path / "made/sheet.png").width > 400
    for content, said in ((b"# nothing\n", "holds no prompt"), (b"\xff\xfe", "UTF-8")):
        (tmp_path / "bad.txt").write_bytes(content)
        status, _, err = aura("batch", "bad.txt", "--local", server.url)
        assert status == 1 and said in err
    assert aura("batch", "list.txt", "-o", "/proc/made", "--local", "http://127.0.0.1:9")[0] == 1
