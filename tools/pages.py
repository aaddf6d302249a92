"""The site: notebooks with their outputs, the public interface from its docstrings, search, dark mode; no request leaves it.

`make site` runs this file, which lays the sources of the pages into build/pages, and then mkdocs, which writes site/.
"""
import json, re, shutil
from pathlib import Path

import nb

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build/pages"
DIRECTIVE = re.compile(r"^\s*#\|.*\n?", re.M)
NOTEBOOK_LINK = re.compile(r"(\]\((?!\w+:)[^)\s]+)\.ipynb\b")        # a link to a notebook becomes one to its page
UPWARD_LINK = re.compile(r"\]\(\.\./([A-Z]+)\.md\)")                 # from nbs/ to CHANGELOG.md and its like


def to_pages(text: str) -> str:
    """Links between notebooks, and to the documents above them, as links between pages."""
    text = UPWARD_LINK.sub(lambda m: f"]({m[1].lower()}.html)", NOTEBOOK_LINK.sub(r"\1.html", text))
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", text)          # other files of the repository have no page


def page_of(path: Path) -> dict:
    """A notebook as a reader of the site meets it: no hidden cells, no `#|` directives, links to pages."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    shown = []
    for cell in notebook["cells"]:
        if {"hide", "default_exp"} & set(nb.directives(cell)): continue
        text = nb.text_of(cell["source"])
        if cell["cell_type"] == "markdown":
            text = to_pages(text)
        else:
            text = DIRECTIVE.sub("", text).strip("\n")
            for data in (o["data"] for o in cell["outputs"] if "text/markdown" in o.get("data", {})):
                data["text/markdown"] = to_pages(nb.text_of(data["text/markdown"]))
            if nb.directives(cell).get("echo") == "false": cell["metadata"] = {"tags": ["hide-input"]}
        shown.append({**cell, "source": text.splitlines(keepends=True)})
    return {**notebook, "cells": shown}


def interface_page() -> str:
    """One section for each public name: its signature and docstring, read from the source without importing it."""
    from aura_engine import PUBLIC
    head = ["# The interface", "",
            "`import aura_engine as ae` gives the names on this page. The changelog speaks of these only.",
            "Everything else may change between two versions.", ""]
    for name, module in PUBLIC.items():
        head += [f"::: aura_engine.{module}.{name}", ""]
    return "\n".join(head)


def lay_out() -> None:
    """Write build/pages afresh."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "nbs/images", PAGES / "images")
    for path in nb.notebooks():
        (PAGES / path.name).write_text(json.dumps(page_of(path), ensure_ascii=False), encoding="utf-8")
    for name in ("CHANGELOG", "CONTRIBUTING"):
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
        text = re.sub(r"\]\(nbs/([^)]+\.ipynb)\)", r"](\1)", text)
        (PAGES / f"{name.lower()}.md").write_text(text, encoding="utf-8")
    (PAGES / "interface.md").write_text(interface_page(), encoding="utf-8")


# The parts of the site's menu: a title, and how the names of their notebooks begin.
PARTS = {
    "Words and settings": ("00_config", "01", "02b", "02c"), "Models": ("02_", "04"), "Planning and pictures": ("03",),
    "Networks and speed": ("05",), "The engine": ("06", "07", "08"), "The server": ("09", "10", "11", "19"),
    "Clients, Studio, command": ("12", "13", "17"), "Measured": ("14", "16", "18"), "On a Space": ("15",),
    "The embedded model": ("9",)}


def menu(names: list[str]) -> list:
    """The pages in the order in which a reader wants them. A notebook of no part stands at the end of the first list."""
    parts: dict[str, list[str]] = {title: [] for title in PARTS}
    alone = ["index.ipynb", "00_start.ipynb"]
    for name in names:
        part = next((title for title, begins in PARTS.items() if name.startswith(begins)), None)
        if name not in alone: (parts[part] if part else alone).append(name)
    reference = {"Reference": ["interface.md", "changelog.md", "contributing.md"]}
    return [*alone, *({title: pages} for title, pages in parts.items()), reference]


def on_config(config):
    """mkdocs calls this: see `hooks` in mkdocs.yml."""
    config.nav = menu(sorted(p.name for p in nb.notebooks()))
    return config


if __name__ == "__main__": lay_out()
