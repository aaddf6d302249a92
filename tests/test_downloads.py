"""Downloads: the real huggingface_hub client against a Hub on the loopback interface, on good days and bad ones."""
import json, os, re, signal, subprocess, sys, time

import httpx
import modelhub
import pytest
import tiny
from conftest import ROOT, clean_env, start
from aura_engine.models import ROWS, SD15_ID
from modelhub import COMMIT


REPO, WEIGHTS = "tester/small", "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A repository with all that lies about in real ones."""
    made = modelhub.files_of(tiny.save(tmp_path_factory.mktemp("repo") / "model"))
    made |= {"unet/diffusion_pytorch_model.bin": b"pickle", "unet/diffusion_pytorch_model.non_ema.safetensors": b"x" * 99, "v1-5-pruned.safetensors": b"x" * 99, "README.md": b"# hello",
             "safety_checker/model.safetensors": b"x" * 99, "safety_checker/config.json": b"{}", "text_encoder/model.fp16.safetensors": b"half"}
    return made


@pytest.fixture
def hub(files):
    hub, _ = modelhub.shared()
    hub.calm()
    hub.repos, hub.token = {REPO: dict(files)}, None
    return hub


@pytest.fixture
def load(tmp_path):
    _, worker = modelhub.shared()
    def load(cache="cache", **kw): return worker("load", tmp_path / cache, **{"SD_MODEL_ID": REPO, **kw})
    return load


def waits(answer): return [s["reason"] for s in answer["seen"] if s["reason"]]


def test_a_download_takes_what_it_needs_and_tells_how_far_it_is(hub, load, files):
    hub.goes_wrong(f"GET .*{WEIGHTS}", 1, "slow")                # long enough to be seen
    answer = load()
    got = {p.split(f"/resolve/{COMMIT}/")[1] for p in hub.counts(COMMIT + "/")}
    assert answer["row"] == "sd15" and answer["revision"] == COMMIT
    wanted = {n for n in files if n.split("/")[0] in ("unet", "vae", "text_encoder", "tokenizer", "scheduler") and n.endswith((".json", "model.safetensors"))}
    assert got == wanted
    told = [s for s in answer["seen"] if s["stage"] == "fetching"]
    assert told[-1]["bytesDone"] <= told[-1]["bytesTotal"] == sum(len(files[n]) for n in wanted) + len(files["model_index.json"])
    assert [s["bytesDone"] for s in told] == sorted(s["bytesDone"] for s in told) and any(s["file"] == f"{REPO}/{WEIGHTS}" for s in told)
    assert answer["seen"][-1]["stage"] == "reading" and not answer["unfinished"]


def test_a_pinned_revision_never_asks_for_main(hub, load):
    assert load(SD_REVISION=COMMIT)["revision"] == COMMIT
    assert not [p for _, p, _ in hub.seen if "/resolve/main/" in p]


ENDINGS = {"no such model": (dict(SD_MODEL_ID="tester/none"), None), "no such revision": (dict(SD_REVISION="v9"), None), "HF_TOKEN is missing or wrong": ({}, (401, {"X-Error-Message": "Invalid credentials in Authorization header"})),
           "gated": ({}, (403, {"X-Error-Code": "GatedRepo"})), "refuses access .* .403.": ({}, (403, {}))}


@pytest.mark.parametrize("words", ENDINGS)
def test_what_does_not_pass_ends_at_once_with_its_cause(hub, load, words):
    settings, answer = ENDINGS[words]
    if answer: hub.goes_wrong("resolve", 99, answer)
    told = load(**settings)
    assert "SD_MODEL_ID=tester/" in told["reason"] and re.search(words, told["reason"]), told["reason"]
    assert told["seconds"] < 20 and not waits(told)


@pytest.mark.parametrize("where", ["HEAD .*model_index.json", "GET /api/models", f"HEAD .*{WEIGHTS}", f"GET .*{WEIGHTS}"])
@pytest.mark.parametrize("answer", [(503, {}), (429, {"Retry-After": "2"})], ids=["503", "429"])
def test_what_passes_is_waited_for(hub, load, where, answer):
    """503: again after a second. 429: not before the two seconds that the Hub asked for. Wherever it happens, loading goes on."""
    hub.goes_wrong(where, 2 if where.startswith("HEAD") else 1, answer)
    told = load()
    assert told.get("row") == "sd15", told
    assert told["seconds"] > (2 if answer[0] == 429 else 1)
    if "api" in where: assert waits(told) == [{503: "the Hub answered 503; trying again in 1 s", 429: "the Hub asks us to slow down (429); trying again in 2 s"}[answer[0]]]
    assert all(n == 1 for p, n in hub.counts(r"\.json").items() if "/resolve/" in p)                # nothing complete is fetched twice


def test_patience_ends(hub, load):
    hub.goes_wrong("GET /api/models", 99, (503, {}))
    told = load(patience=2.5)
    assert "the Hub answered 503" in told["reason"] and len(waits(told)) == 1


@pytest.mark.parametrize("how", ["cut", "stall"])
def test_a_broken_download_goes_on_where_it_stopped(hub, load, how, files):
    hub.goes_wrong(f"GET .*{WEIGHTS}", 2, how)
    told = load()
    assert told["row"] == "sd15"
    size = len(files[WEIGHTS])
    ranges = [int(r.split("=")[1].strip("-")) if r else 0 for m, p, r in hub.seen if m == "GET" and p.endswith(WEIGHTS)]
    assert len(ranges) == 3 and ranges[0] == 0 < size * 0.3 < ranges[1] < ranges[2] < size
    assert told["seen"][-1]["bytesDone"] == told["seen"][-1]["bytesTotal"]


def weights_asked(hub): return [int(r.split("=")[1].strip("-")) if r else 0 for m, p, r in hub.seen if m == "GET" and p.endswith(WEIGHTS)]


@pytest.mark.parametrize("spoilt", [False, True], ids=["whole", "spoilt"])
def test_a_killed_download_goes_on_where_it_stopped(hub, load, tmp_path, files, spoilt):
    """SIGKILL with half of the weights on the disk: the next process asks for the other half. Where that half is not what the Hub has, all is fetched again."""
    whole = load("first")["unet"]
    hub.calm()
    hub.goes_wrong(f"GET .*{WEIGHTS}", 9, "stall")
    left = modelhub.shared()[1]("killed", tmp_path / "cache", SD_MODEL_ID=REPO)["left"]
    half = max(left.values())
    assert 0.3 * len(files[WEIGHTS]) < half < len(files[WEIGHTS])
    part = next(p for p in (tmp_path / "cache").rglob("*.incomplete") if p.stat().st_size == half)
    if spoilt: part.write_bytes(b"\xff" * half)
    hub.calm()
    told = load()
    assert told["unet"] == whole and not told["unfinished"]
    assert weights_asked(hub) == ([half, 0] if spoilt else [half])
    assert told["seen"][-1]["bytesDone"] >= told["seen"][-1]["bytesTotal"]


def test_a_long_outage_does_not_begin_again(hub, load, files):
    """More failures in a row than the library bears: what had arrived is kept."""
    hub.goes_wrong(f"GET .*{WEIGHTS}", 1, "cut")
    hub.goes_wrong(f"GET .*{WEIGHTS}", 3, (503, {}))
    told = load(patience=60)
    assert told["row"] == "sd15" and waits(told)
    asked = weights_asked(hub)
    assert asked[0] == 0 and len(asked) == 5 and min(asked[1:]) > 0.3 * len(files[WEIGHTS])


def test_a_restart_keeps_what_was_complete(hub, load):
    hub.goes_wrong(f"GET .*{WEIGHTS}", 99, (403, {}))
    assert "403" in load()["reason"]
    before = hub.counts("/resolve/")
    hub.bad = []
    assert load()["row"] == "sd15"
    again = {p.split("/")[-1] for p, n in (hub.counts("/resolve/") - before).items()}
    assert again == {"diffusion_pytorch_model.safetensors", "model.safetensors"}                    # the refused one and those after it


def test_damaged_bytes_are_fetched_again(hub, load, files):
    whole = load()["unet"]
    hub.calm()
    hub.goes_wrong(f"GET .*{WEIGHTS}", 1, "corrupt")
    told = load("second")
    assert told["unet"] == whole and sum(hub.counts(WEIGHTS).values()) == 2


def test_a_hub_that_only_has_damaged_bytes_is_found_out(hub, load):
    hub.goes_wrong(f"GET .*{WEIGHTS}", 9, "corrupt")
    assert "arrives damaged" in load()["reason"] and sum(hub.counts(WEIGHTS).values()) == 2


def test_a_full_disk_is_named(hub, load):
    told = load(disk="2m")
    if "skip" in told: pytest.skip(told["skip"])
    assert "SD_MODEL_ID=tester/small: the disk is full." == told["reason"] and not told["unfinished"]


# what this machine's settings prevent is told with the variable

def test_a_folder_for_downloads_that_cannot_be_written_is_named(hub, load, tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert load("file/hub")["reason"] == f"SD_MODEL_ID={REPO}: downloads are kept in {tmp_path}/file/hub, which cannot be written (not a directory): set HF_HOME to a folder that can."


def test_a_cache_that_cannot_be_written_serves_what_it_has(hub, load):
    warm = load()
    told = load(disk="read-only")
    if "skip" in told: pytest.skip(told["skip"])
    assert told["unet"] == warm["unet"]
    assert "cannot be written (read-only file system): set HF_HOME to a folder that can" in load("other", disk="read-only")["reason"]


@pytest.mark.parametrize("name, value", [("ALL_PROXY", "socks5://127.0.0.1:9"), ("HTTP_PROXY", "socks4://127.0.0.1:9")])
def test_a_socks_proxy_is_named_by_its_variable(hub, load, name, value):
    """The package for it is not installed, or the scheme is one that no package knows."""
    told = load(env={name: value})
    assert f"the proxy in {name} is a SOCKS proxy" in told["reason"] and "socksio" in told["reason"] and told["seconds"] < 20, told


def nobody(argv):
    """`argv` as a user without an entry in passwd, who may read this checkout. None where that cannot be had."""
    as_nobody = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
    for more in ([], ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]):
        try: done = subprocess.run([*as_nobody, *more, "env", sys.executable, "-c", "import aura_engine"], capture_output=True, cwd=ROOT)
        except OSError: return None
        if done.returncode == 0: return [*as_nobody, *more, *argv]


ASCII = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONDONTWRITEBYTECODE": "1"}


def test_a_user_without_name_home_or_letters_is_served(tmp_path):
    """As containers start it: a uid without passwd entry and HOME, in an ASCII locale. Ready, and a picture with its words."""
    argv = nobody(["env", "-u", "HOME", "-u", "USER", "-u", "LOGNAME", "-u", "XDG_CACHE_HOME", sys.executable, "app.py", "--host", "127.0.0.1"])
    if argv is None: pytest.skip("this process may not become another user")
    server = start(argv, tmp_path / "log.txt", **ASCII)
    try:
        server.wait_ready()
        made = server.post("/generate", {"prompt": "a röd fox 狐", "seed": 1, "steps": 1})
        assert made["receipts"][0]["prompt"] == "a röd fox 狐" and server.status("/health") == 200
    finally: server.stop()


def test_a_path_that_the_locale_cannot_spell_is_refused_with_the_variable(tmp_path):
    """It was ready, and then every answer that names the model was a 500."""
    done = subprocess.run([sys.executable, "app.py"], cwd=ROOT, env=clean_env(SD_MODEL_ID="/models/m\u00f6del", **ASCII), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "SD_MODEL_ID: given" in done.stderr and "PYTHONUTF8=1" in done.stderr, done.stderr


def test_a_warm_cache_needs_no_hub(hub, load):
    """With the Hub well, one HEAD tells that nothing is new. With the Hub down in any way, the cache is used as it is."""
    cold = load()
    hub.calm()
    assert load()["unet"] == cold["unet"] and [m for m, p, _ in hub.seen if REPO in p] == ["HEAD"]
    for answer in ((503, {}), (404, {}), (429, {"Retry-After": "60"}), (403, {"X-Error-Code": "GatedRepo"})):
        hub.calm()
        hub.goes_wrong("", 99, answer)
        told = load()
        assert told["unet"] == cold["unet"] and told["seconds"] < 20, told
    hub.repos = {}
    assert load()["unet"] == cold["unet"]


def test_pickles_are_refused_before_they_are_fetched(hub, load):
    hub.repos[REPO] = {n.replace(".safetensors", ".bin"): d for n, d in hub.repos[REPO].items()}
    told = load()
    assert "only pickled weights" in told["reason"] and "refs/pr" in told["reason"] and SD15_ID in told["reason"] and not hub.counts(r"\.bin")
    hub.repos["tester/lora"] = {"pytorch_lora_weights.bin": b"pickle"}
    assert "only pickled weights" in load("two", SD_MODEL_ID="embedded", SD_LCM_LORA_ID="tester/lora")["reason"]
    assert "only safetensors" in load("two", SD_MODEL_ID="embedded", SD_LCM_LORA_ID="tester/lora/pytorch_lora_weights.bin")["reason"] and not hub.counts(r"\.bin")


def test_the_model_named_instead_is_in_the_table(): assert SD15_ID in ROWS["sd15"].ids


def test_a_model_that_its_makers_withdrew_says_so(hub, load):
    told = load(SD_MODEL_ID="stabilityai/stable-diffusion-2-1")
    assert "its makers withdrew it from the Hub" in told["reason"] and "a mirror's id" in told["reason"]


def test_a_repository_that_is_no_model_says_what_to_write(hub, load):
    hub.repos = {"tester/files": {"model.safetensors": b"x"}, "tester/flux": {"model_index.json": json.dumps({"_class_name": "FluxPipeline"}).encode()}}
    assert "owner/name/file.safetensors" in load(SD_MODEL_ID="tester/files")["reason"]
    assert "it is a FluxPipeline" in load(SD_MODEL_ID="tester/flux")["reason"]


@pytest.mark.parametrize("setting", ["SD_LCM_LORA_ID", "SD_VAE_ID"])
def test_another_source_is_named_by_its_own_setting(hub, load, setting):
    assert load(SD_MODEL_ID="embedded", **{setting: "tester/none"})["reason"] == f"{setting}=tester/none: the Hub has no such model, or it is private (then set HF_TOKEN)."


def test_a_server_tells_its_progress_and_stops_at_once(hub, tmp_path):
    """A real process, its download stalled halfway: /health says where, /ready 503, SIGTERM ends it at once."""
    hub.goes_wrong(f"GET .*{WEIGHTS}", 99, "stall")
    env = dict(SD_MODEL_ID=REPO, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE=0, HF_HUB_DISABLE_XET=1, HF_HOME=tmp_path / "hf", HF_HUB_DOWNLOAD_TIMEOUT=60)
    server = start([sys.executable, "app.py", "--host", "127.0.0.1"], tmp_path / "log.txt", **env)
    try:
        end, loading = time.monotonic() + 90, {}
        while time.monotonic() < end and not (loading.get("file") or "").endswith(WEIGHTS):
            time.sleep(0.1)
            if server.status("/health") == 200: loading = httpx.get(server.url + "/health").json()["loading"]
        time.sleep(0.3)
        health = httpx.get(server.url + "/health").json()
        assert health["status"] == "loading" and health["loading"]["stage"] == "fetching" and 0 < health["loading"]["bytesDone"] < health["loading"]["bytesTotal"]
        assert server.status("/ready") == 503 and '"event": "downloading"' in server.log.read_text()
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(10) == 0
    finally: server.stop()


def test_a_mounted_model_is_read_where_it_lies(hub, load, files, tmp_path):
    """AURA_MODELS, as a Space's read-only volume: not one request to the Hub. What is not complete there comes from the Hub, and that is said."""
    for name, data in files.items():
        (tmp_path / "models" / REPO / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "models" / REPO / name).write_bytes(data)
    answer = load(AURA_MODELS=str(tmp_path / "models"))
    assert answer["row"], answer
    assert not hub.seen and not any((tmp_path / "cache").rglob("*.safetensors"))
    (tmp_path / "models" / REPO / WEIGHTS).unlink()
    answer = load(AURA_MODELS=str(tmp_path / "models"))
    assert answer["row"] and hub.seen and any("comes from the Hub" in n for n in answer["notes"])
