"""Client by operation: programs that people have, in the versions below, installed in throwaway environments and asked to draw.

Versions are pinned: a client that changes its ways is a matter for the day on which its number is raised here.
"""
import json, os, shutil, subprocess, sys

import pytest

from conftest import ROOT

pytestmark = pytest.mark.slow
HERE = ROOT / "tests/clients"
PYTHON = ("webuiapi==0.9.17", "litellm==1.110.2", "langchain-community==0.4.2", "openai==3.57.0", "openapi-python-client==0.29.1")
NODE = ("openai@6.49.0", "@huggingface/inference@4.13.30", "ai@6.0.326", "@ai-sdk/openai@3.0.141", "@langchain/openai@1.5.8", "@langchain/core@1.4.0",
        "openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "eventsource@4.1.1", "typescript@5.9.3")


def run(*argv, cwd=None, **env):
    """The last line that a program prints; what it said when it failed."""
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=400, env={**os.environ, **env})
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout.strip().rpartition("\n")[2]


def test_python_clients(server, tmp_path):
    uv = shutil.which("uv") or shutil.which("uv", path=os.path.dirname(sys.executable))
    if not uv: pytest.skip("uv is not installed")
    run(uv, "venv", "-q", "--python", sys.executable, tmp_path / "env")
    python = tmp_path / "env/bin/python"
    run(uv, "pip", "install", "-q", "--python", python, *PYTHON)
    run(python.with_name("openapi-python-client"), "generate", "--path", ROOT / "openapi.json", "--output-path", tmp_path / "generated", "--meta", "none",
        PATH=f"{python.parent}:{os.environ['PATH']}")
    said = json.loads(run(python, HERE / "speak.py", server.url, tmp_path, PYTHONPATH="", LITELLM_LOCAL_MODEL_COST_MAP="True"))
    print(json.dumps(said, indent=1))
    assert said.pop("versions")["litellm"] == "1.110.2"
    assert said == {
        "webuiapi txt2img": [[96, 64], [96, 64]], "webuiapi info": [3, 4], "webuiapi img2img": [96, 64], "webuiapi mask": [96, 64],
        "webuiapi png-info": "a fox", "webuiapi models": ["embedded"], "webuiapi samplers": ["LCM"], "webuiapi options": "embedded",
        "webuiapi interrupt": {}, "webuiapi progress": 0.0, "litellm image_generation": True, "LangChain DallEAPIWrapper": True,
        "generated Python client": [True, 128, 1, "a fox"]}


def test_node_clients(server, tmp_path):
    if not shutil.which("npm"): pytest.skip("npm is not installed")
    (tmp_path / "package.json").write_text('{"type": "module", "private": true}')
    run("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline", *NODE, cwd=tmp_path)
    bin = tmp_path / "node_modules/.bin"
    run(bin / "openapi-typescript", ROOT / "openapi.json", "-o", tmp_path / "api.d.ts")
    shutil.copy(HERE / "speak.mts", tmp_path)
    run(bin / "tsc", "--module", "nodenext", "--target", "es2022", "--strict", "--skipLibCheck", "speak.mts", cwd=tmp_path)
    said = json.loads(run("node", "speak.mjs", server.url, cwd=tmp_path))
    print(json.dumps(said, indent=1))
    assert said == {
        "OpenAI generate": "image/png", "OpenAI edit": True, "OpenAI stream": ["image_generation.partial_image", "image_generation.completed"],
        "OpenAI errors": [400, "n"], "Hugging Face textToImage": "image/png", "Hugging Face imageToImage": "image/png",
        "AI SDK generateImage": "image/png", "LangChain DallEAPIWrapper": True, "generated TypeScript client": [True, False, 1, "a fox"],
        "EventSource": ["queued", "image", "done"]}
