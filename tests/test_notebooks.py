"""Every notebook runs from top to bottom in a Jupyter kernel of its own."""
import json, os

import nbclient, nbformat, pytest

import nb
from conftest import ROOT, clean_env

NOTEBOOKS = nb.notebooks()
LIMIT = 600  # seconds a notebook
FLAGS = set(nb.settings()["tst_flags"].split())
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])


@each_notebook
def test_notebook(path, monkeypatch):
    """What a reader does with "Run all cells": widgets, event loop and displays are the kernel's, not the test runner's."""
    for name in set(os.environ) - set(clean_env()): monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["cells"] = [c for c in raw["cells"] if nb.runs(c, FLAGS)]
    client = nbclient.NotebookClient(nbformat.reads(json.dumps(raw), as_version=4), timeout=LIMIT, kernel_name="python3",
                                     resources={"metadata": {"path": str(path.parent)}})
    try: client.execute()
    except nbclient.exceptions.CellExecutionError as e: pytest.fail(f"{path.name}: {str(e)[-6000:]}", pytrace=False)
