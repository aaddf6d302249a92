"""Every notebook runs from top to bottom: in nbdev's own runner always, in a real Jupyter kernel with the slow tests."""
import json, os, subprocess, sys

import pytest

import nb
from conftest import ROOT, clean_env

NOTEBOOKS = nb.notebooks()
LIMIT = 600  # seconds a notebook
FLAGS = set(nb.settings()["tst_flags"].split())
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])

RUN = """
import sys
from pathlib import Path
from nbdev.test import test_nb
root, path, *flags = sys.argv[1:]
passed, seconds = test_nb(Path(path), skip_flags=flags, basepath=root)
sys.exit(not passed)
"""


@each_notebook
def test_notebook(path):
    """In a process of its own: a notebook that hangs is ended, and none sees what another one changed."""
    argv = [sys.executable, "-c", RUN, str(ROOT), str(path), *FLAGS]
    try: done = subprocess.run(argv, cwd=ROOT, env=clean_env(), capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired: failed = f"{path.name} was still running after {LIMIT} s"
    else: failed = done.stderr if done.returncode else ""
    if failed: pytest.fail(failed[-6000:], pytrace=False)


@pytest.mark.slow
@each_notebook
def test_notebook_in_a_kernel(path, monkeypatch):
    """What a reader does with "Run all cells": widgets, event loop and displays are the kernel's, not the test runner's."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for name in set(os.environ) - set(clean_env()): monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["cells"] = [c for c in raw["cells"] if nb.runs(c, FLAGS)]
    client = nbclient.NotebookClient(nbformat.reads(json.dumps(raw), as_version=4), timeout=LIMIT, kernel_name="python3",
                                     resources={"metadata": {"path": str(path.parent)}})
    try: client.execute()
    except nbclient.exceptions.CellExecutionError as e: pytest.fail(f"{path.name}: {str(e)[-6000:]}", pytrace=False)
