"""The rules of the house: every derived file equals its source, rooms import only downward, notebooks read well.

Each rule is a function that returns what is wrong, in words. `python tools/nb.py check` runs this file.
"""
import ast, filecmp, json, re, shutil, subprocess, sys, tempfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

import figures
import nb
from conftest import ROOT, repo_files

NOTEBOOKS = nb.notebooks()
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
EXPORTS = {"export", "exports", "exporti"}
MACHINE_PATH = re.compile(r"(?<![\w.$~}/-])/(?:(?:root|Users|work|tmp|var/folders)/\w|home/(?!user\b)\w)")


def holds(problems):
    if problems: pytest.fail("\n".join(problems), pytrace=False)


def code_of(cell): return [ln for ln in nb.text_of(cell["source"]).splitlines() if ln.strip() and not ln.startswith("#|")]


def cells_of(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


# derived files

def export_problems(root):
    """A module left behind by a renamed `default_exp` differs too: it has no notebook."""
    out = []
    with tempfile.TemporaryDirectory() as tmp:
        fresh, lib = Path(tmp), nb.settings(root)["lib_path"]
        shutil.copy(root / "settings.ini", fresh)
        shutil.copytree(root / "nbs", fresh / "nbs", ignore=shutil.ignore_patterns(".*"))
        # written by hand but for its version line, which the export brings up to date
        (fresh / lib).mkdir()
        shutil.copy(root / lib / "__init__.py", fresh / lib)
        nb.export(fresh)
        for name in sorted({p.relative_to(d / lib).as_posix() for d in (root, fresh) for p in (d / lib).rglob("*.py")}):
            a, b = root / lib / name, fresh / lib / name
            if not b.exists(): out.append(f"{lib}/{name}: no notebook exports it")
            elif not a.exists() or not filecmp.cmp(a, b, shallow=False):
                out.append(f"{lib}/{name}: differs from a fresh export (python tools/nb.py push, or nbdev_export)")
    return out


def test_package_is_a_fresh_export(): holds(export_problems(ROOT))


@pytest.mark.parametrize("name, want", [("README.md", nb.readme_text), ("requirements.txt", nb.requirements_text)])
def test_derived_file(name, want):
    command = name.split(".")[0].lower()
    assert (ROOT / name).read_text(encoding="utf-8") == want(), f"stale: run `python tools/nb.py {command}`"


# notebooks

def notebook_problems(path):
    """Form on disk, size, and outputs that would embarrass: machine paths, warnings, tracebacks."""
    text, out = path.read_text(encoding="utf-8"), []
    cap = (250 if path.stem == "91_gallery" else 200) * 1024
    if (size := len(text.encode())) > cap: out.append(f"{size // 1024} KiB, allowed {cap // 1024}")
    if text != nb.canonical({"cells": cells_of(path)}, path.stem): out.append("not canonical: `python tools/nb.py pull` and `push` it")
    for c in cells_of(path):
        for o in c.get("outputs", []):
            data = [v for k, v in o.get("data", {}).items() if k.startswith("text/")]
            shown = "\n".join(map(nb.text_of, [o.get("text", ""), *data]))
            for what, pattern in (("a path of this machine", MACHINE_PATH), ("a warning", re.compile(r"\b[A-Z]\w*Warning\b")),
                                  ("a traceback", re.compile(r"Traceback \(most recent"))):
                if m := pattern.search(shown): out.append(f"cell {c['id']} shows {what}: {shown[m.start():][:60]!r}")
            if o["output_type"] == "error": out.append(f"cell {c['id']} ended in an error")
    return [f"{path.name}: {p}" for p in out]


@each_notebook
def test_notebook_on_disk(path): holds(notebook_problems(path))


def one_class(cell):
    """Whether a cell is a single class, which stays whole."""
    return [type(n) for n in ast.parse("\n".join(code_of(cell))).body] == [ast.ClassDef]


def most_lines(cell, exported):
    """Lines that a cell may have. What an exported one may hold is counted in syntax nodes by tools/figures.py."""
    if not exported: return 14
    return 100 if one_class(cell) else 60


def style_problems(path):
    """Small cells, and prose between them. Hidden cells are not read, so not judged."""
    cells = [c for c in cells_of(path) if c["cell_type"] != "raw" and not {"hide", "default_exp"} & set(nb.directives(c))]
    out, exports, examples = [], 0, 0
    for c in cells:
        if c["cell_type"] == "markdown":
            exports, examples = 0, 0
            continue
        exported, lines = bool(EXPORTS & set(nb.directives(c))), len(code_of(c))
        exports, examples = exports + exported, examples + (not exported)
        most = most_lines(c, exported)
        if lines > most: out.append(f"cell {c['id']} has {lines} lines, allowed {most}")
        if exported and exports == 4: out.append(f"cell {c['id']} is the fourth export without prose between")
        if not exported and examples == 4: out.append(f"cell {c['id']} is the fourth example without prose between")
    return [f"{path.name}: {p}" for p in out]


@each_notebook
def test_notebook_style(path): holds(style_problems(path))


def link_problems(file, text, root=ROOT):
    """Links to files that are not there."""
    links = re.findall(r"""(?:\]\(|src=["'])([^)"'\s]+)""", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S))
    local = [ln.split("#")[0] for ln in links if not re.match(r"\w+:|#", ln)]
    return [f"{file.relative_to(root)}: no such file: {ln}" for ln in local if not (file.parent / ln).exists()]


@each_notebook
def test_notebook_links(path):
    holds(link_problems(path, "\n".join(nb.text_of(c["source"]) for c in cells_of(path) if c["cell_type"] == "markdown")))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_document_links(name): holds(link_problems(ROOT / name, (ROOT / name).read_text(encoding="utf-8")))


# how the code reads

def test_figures():
    """Width, syntax nodes, definitions, attached methods, comments, complexity: the bounds are in tools/figures.py."""
    holds(figures.problems(figures.modules(ROOT, nb.settings()["lib_path"])))


def public_names(module):
    """Functions and classes that a module defines for others."""
    body = ast.parse(module.read_text(encoding="utf-8")).body
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n.name for n in body if isinstance(n, kinds) and not n.name.startswith("_")]


# A command's entry point is called the same everywhere.
SHARED_NAMES = {"main"}


def test_names_are_unique():
    """One name means one thing in the whole package."""
    homes = {}
    for module in figures.modules(ROOT, nb.settings()["lib_path"]):
        for name in public_names(module): homes.setdefault(name, []).append(module.stem)
    holds([f"{name}: defined in {', '.join(where)}" for name, where in homes.items()
           if len(where) > 1 and name not in SHARED_NAMES])


# From a plan to a picture: state has a type there.
REQUEST_PATH = ["trajectory", "batching", "jobs", "queue", "runner", "engine", "answers"]


def string_keys(tree):
    """Lines on which something is looked up by a literal text key, as a dict that travels would be."""
    return [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Subscript)
            and isinstance(n.slice, ast.Constant) and isinstance(n.slice.value, str)]


@pytest.mark.parametrize("name", REQUEST_PATH)
def test_no_dict_state_on_the_request_path(name):
    tree = ast.parse((ROOT / "aura_engine" / f"{name}.py").read_text(encoding="utf-8"))
    holds([f"{name}.py:{line}: state in a dict" for line in string_keys(tree)])


# layers

def room_problems(root=ROOT):
    """Imports in exported cells that point up, sideways, or at nothing, wherever in the cell they stand."""
    rooms, lib, out = {}, nb.settings(root)["lib_name"], []
    for p in nb.notebooks(root=root):
        for c in cells_of(p):
            if name := nb.directives(c).get("default_exp"): rooms[name] = p
    numbers = {name: nb.room(p.stem) for name, p in rooms.items()}
    for name, p in rooms.items():
        source = "\n".join("\n".join(code_of(c)) for c in cells_of(p) if EXPORTS & set(nb.directives(c)))
        for target in imported_rooms(ast.parse(source), lib):
            if target not in numbers: out.append(f"{p.name} imports {lib}.{target}, which no notebook exports")
            elif numbers[target] >= numbers[name]: out.append(f"{p.name} imports {lib}.{target}, which is not below it")
    return out


def imported_rooms(tree, lib):
    """Modules of `lib` that `tree` imports, in any spelling."""
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = ".".join(filter(None, [lib if n.level else "", n.module or ""]))
            names = [f"{base}.{a.name}" for a in n.names] if base == lib else [base]
        else: continue
        yield from (x.split(".")[1] for x in names if x.startswith(lib + ".") and not x.split(".")[1].startswith("_"))


def test_rooms_import_downward(): holds(room_problems())


NO_TORCH = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "diffusers", "transformers", "peft", "accelerate"}: raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
__import__(sys.argv[1])
"""
LIGHT = [m for m in "config types models images planning prompt_weights client widgets bundle hub deploy_plan proof deploy".split() if (ROOT / f"aura_engine/{m}.py").exists()]


@pytest.mark.parametrize("module", LIGHT)
def test_imports_without_torch(module):
    done = subprocess.run([sys.executable, "-c", NO_TORCH, f"aura_engine.{module}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# every file

HOSTS = "|".join(["py" + r"pi\.org", "python" + r"hosted\.org", "deb" + r"ian\.org", "npm" + r"js\.(?:org|com)"])
FORBIDDEN = {"a path of this machine": MACHINE_PATH, "a package registry's host": re.compile(HOSTS),
             "an unfinished note": re.compile(r"\b(?:TO" + "DO|FIX" + r"ME|XX" + r"X)\b")}


def text_problems(root=ROOT):
    out = []
    for f in repo_files(root):
        if "assets" in f.parts or b"\0" in (raw := f.read_bytes()): continue
        text = re.sub(r"[A-Za-z0-9+/]{60,}", "", raw.decode("utf-8", "replace"))     # base64 of pictures spells anything in time
        for what, pattern in FORBIDDEN.items():
            if m := pattern.search(text):
                out.append(f"{f.relative_to(root)}:{text[:m.start()].count(chr(10)) + 1}: {what}: {text[m.start():][:50].splitlines()[0]!r}")
    return out


def test_every_text_file(): holds(text_problems())


def tool(name):
    """A command of this environment. The tests skip, with the reason, where it has none."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return path or pytest.skip(f"{name} is not installed")


def test_ruff():
    """Code and notebooks, by ruff.toml."""
    done = subprocess.run([tool("ruff"), "check", "--no-cache", "--output-format=concise"], cwd=ROOT, capture_output=True, text=True)
    holds((done.stdout + done.stderr).splitlines() if done.returncode else [])


# the image

def docker_problems(root=ROOT):
    text, out = (root / "Dockerfile").read_text(encoding="utf-8"), []
    allowed = [ln[1:] for ln in (root / ".dockerignore").read_text(encoding="utf-8").split() if ln.startswith("!")]
    for args in re.findall(r"^COPY\s+(.*)$", text, re.M):
        *sources, _ = [a for a in args.split() if not a.startswith("--")]
        out += [f"COPY {s}: not in the repository" for s in sources if not (root / s).exists()]
        out += [f"COPY {s}: .dockerignore keeps it out" for s in sources if not any(fnmatch(s, a) for a in allowed)]
    pin = re.search(r"torch==[\d.]+", (root / "Makefile").read_text(encoding="utf-8"))[0]
    for want in ("EXPOSE 7860", "USER 1000", 'CMD ["python", "app.py"]', f"--no-cache-dir {pin};", "ARG TORCH_INDEX_URL="):
        if want not in text: out.append(f"Dockerfile lacks {want!r}")
    return out


def test_dockerfile(): holds(docker_problems())


def test_hadolint():
    done = subprocess.run([tool("hadolint"), "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    holds((done.stdout + done.stderr).splitlines() if done.returncode else [])
