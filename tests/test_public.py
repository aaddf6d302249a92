"""The interface: what `import aura_engine` gives, that it is light, and that tools see it."""
import inspect, json, subprocess, sys
from configparser import ConfigParser

import pytest

import aura_engine as ae
from conftest import ROOT, clean_env

HEAVY = {"torch", "diffusers", "transformers", "fastapi", "starlette", "uvicorn", "pydantic", "httpx", "numpy", "PIL", "ipywidgets"}
AGREED = {"AuraClient", "AsyncAuraClient", "Engine", "load_settings", "Settings", "GenerateRequest", "RefineRequest", "plan",
          "Studio", "EngineStatus", "Compare", "create_server", "AuraError", "__version__"}


def modules_after(code):
    """The top-level packages that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys, json; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_env(PYTHONPATH=ROOT), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_interface_is_what_was_agreed():
    assert set(ae.__all__) == AGREED == {*ae.PUBLIC, "__version__"} and len(ae.__all__) == len(AGREED)
    assert AGREED <= set(dir(ae))
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    assert ae.__version__ == config["DEFAULT"]["version"]


@pytest.mark.parametrize("name", sorted(ae.PUBLIC))
def test_a_public_name_is_documented_where_it_is_defined(name):
    thing = getattr(ae, name)
    assert thing.__module__ == f"aura_engine.{ae.PUBLIC[name]}" and inspect.getdoc(thing)
    assert getattr(ae, name) is thing


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"): print(ae.nothing)
    assert not hasattr(ae, "torch")


def test_importing_it_is_light(): assert not HEAVY & modules_after("import aura_engine as ae; dir(ae); ae.__version__")


def test_a_client_of_an_address_needs_neither_torch_nor_a_web_framework():
    code = "import aura_engine as ae\nwith ae.AuraClient('http://127.0.0.1:9', mode='local') as c: c.health()"
    assert not {"torch", "fastapi", "starlette", "uvicorn", "ipywidgets"} & modules_after(code)


def test_a_picture_without_a_server_imports_no_web_framework():
    code = "import aura_engine as ae\nwith ae.AuraClient('offline') as c:\n    made = c.generate('a red apple', steps=1)\n    assert made.images[0].width > 0 and c.replay(made.receipts[0]).images"
    assert not {"fastapi", "starlette", "uvicorn"} & modules_after(code)


@pytest.mark.parametrize("client", ["AuraClient", "AsyncAuraClient"])
def test_the_methods_teach(client):
    """Tab and help() show parameters, not **options."""
    for method, some in {"generate": {"prompt", "seed", "n", "steps", "lora", "deadline_seconds", "on_event"}, "refine": {"images", "strength", "seed"},
                         "replay": {"receipt", "init"}, "health": set(), "stream": {"ask"}, "collect": {"ask", "on_event"}, "close": set()}.items():
        f = inspect.getattr_static(getattr(ae, client), method)
        assert f.__doc__ and some <= set(inspect.signature(f).parameters), method
        assert inspect.getsource(f)


def test_both_clients_take_the_same():
    for method in ("__init__", "generate", "refine", "replay", "health", "stream", "collect"):
        plain, awaited = (inspect.signature(getattr(c, method)).parameters for c in (ae.AuraClient, ae.AsyncAuraClient))
        assert list(plain) == list(awaited) and [p.default for p in plain.values()] == [p.default for p in awaited.values()], method


def test_types_ship(): assert (ROOT / "aura_engine/py.typed").exists() and "py.typed" in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_a_type_checker_sees_the_interface(tmp_path):
    checker = pytest.importorskip("shutil").which("basedpyright") or pytest.skip("basedpyright is not installed")
    (tmp_path / "use.py").write_text("import aura_engine as ae\nclient = ae.AuraClient()\nreveal_type(client.generate('x').images)\nreveal_type(ae.plan)\n")
    done = subprocess.run([checker, "--pythonpath", sys.executable, str(tmp_path / "use.py")], cwd=ROOT, env=clean_env(PYTHONPATH=ROOT), capture_output=True, text=True, timeout=240)
    assert "list[" in done.stdout and "request: GenerateRequest" in done.stdout, done.stdout[-2000:]
