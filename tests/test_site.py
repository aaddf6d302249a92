"""`make site`, offline: every notebook has a page, links lead somewhere, and no page loads anything from outside."""
import re, shutil, subprocess, sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

import nb
from conftest import ROOT

pytest.importorskip("mkdocs_jupyter", reason="the site's tools are not installed (make site installs them)")
LOADS = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href")}


class Page(HTMLParser):
    """Collects what a page loads and where it links to."""
    def __init__(self, text):
        super().__init__()
        self.loads, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if not value: continue
            if (tag, name) in LOADS and dict(attrs).get("rel") != "canonical": self.loads.append(value)
            if (tag, name) == ("a", "href"): self.links.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "tools/pages.py"], cwd=ROOT, check=True, timeout=120)
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(out)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    yield out
    shutil.rmtree(out)


@pytest.mark.slow
def test_every_notebook_has_a_page(site):
    missing = [p.stem for p in nb.notebooks() if not (site / f"{p.stem}.html").exists()]
    assert not missing


@pytest.mark.slow
def test_no_page_loads_from_outside(site):
    loads = {f"{p.name}: {v}" for p in site.glob("*.html") for v in Page(p.read_text("utf-8")).loads}
    assert not [v for v in loads if re.search(r": (https?:)?//", v)]


@pytest.mark.slow
def test_links_inside_lead_somewhere(site):
    dead = []
    for page in site.glob("*.html"):
        if page.name == "404.html": continue                # its links start at the site's own root
        for link in Page(page.read_text("utf-8")).links:
            path = unquote(link.split("#")[0])
            if path and not re.match(r"\w+:", path) and not (page.parent / path).exists(): dead.append(f"{page.name} -> {link}")
    assert not dead


@pytest.mark.slow
def test_directives_and_hidden_cells_are_not_shown(site):
    for page in site.glob("[0-9]*.html"): assert not re.search(r"#\|\s*(export|hide|default_exp)", re.sub("<[^>]+>", "", page.read_text("utf-8")))
