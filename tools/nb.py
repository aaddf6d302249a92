"""The editing loop of this project: notebooks as text, outputs as evidence, README.md from index.ipynb.

nbdev has no command that adds a cell, fills outputs without widget state or writes README without Quarto; this file does.
`pull` and `push` turn notebooks into plain text (build/nbs/NAME.py) and back, so that a one-line edit is a one-line diff.
The rules that `check` holds the project to are in tests/test_house.py.
"""
import argparse, configparser, hashlib, json, os, re, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
PERCENT = {"extension": ".py", "format_name": "percent", "notebook_metadata_filter": "-all", "cell_metadata_filter": "-all",
           "comment_magics": False}
WIDGET = "application/vnd.jupyter.widget-view+json"
WARNING = re.compile(r"^.*Warning: .*\n?(?:[ \t].*\n?)?", re.M)
PROGRESS = re.compile(r"^.*\d%\|.*(?:\n|$)", re.M)


def settings(root=ROOT):
    """settings.ini as a plain section: nbdev's own reader is cached by folder and cannot look into a temporary copy."""
    cfg = configparser.ConfigParser()
    cfg.read(root / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


def requirements_text(root=ROOT):
    """requirements.txt as it must be (nbdev_requirements leaves a blank first line when values span lines)."""
    return "\n".join(settings(root)["requirements"].split()) + "\n"


def notebooks(names=(), root=ROOT, folder="nbs", ext=".ipynb"):
    """The files meant by `names` ('02_models', '02' or any path to it), all of them when there are none."""
    files = sorted(p for p in (root / folder).glob("*" + ext) if p.name[0] not in "._")
    keys = [Path(n).name.split(".")[0] for n in names]
    chosen = [p for p in files if not keys or any(k == p.stem or k == p.stem.split("_")[0] for k in keys)]
    if missing := [k for k in keys if not any(k in (p.stem, p.stem.split("_")[0]) for p in chosen)]:
        sys.exit(f"no {folder}/{missing[0]}*{ext}; there is: {', '.join(p.stem for p in files) or 'nothing'}")
    return chosen


def text_of(value):
    return value if isinstance(value, str) else "".join(value)


def directives(cell):
    """{'export': '', 'eval': 'false', …} from the leading `#|` lines of a code cell."""
    lines = [ln for ln in text_of(cell["source"]).splitlines() if ln.strip()]
    head = [ln for i, ln in enumerate(lines) if all(x.startswith("#|") for x in lines[: i + 1])]
    return {m[1]: m[2].strip() for ln in head if (m := re.match(r"#\|\s*([\w-]+):?(.*)", ln))} if cell["cell_type"] == "code" else {}


def runs(cell, skip_flags):
    """Is this a cell that an unattended run executes?"""
    flags = directives(cell)
    wanted = cell["cell_type"] == "code" and flags.get("eval") != "false" and not skip_flags & set(flags)
    return wanted and "nbdev_export(" not in text_of(cell["source"])


# ── the form on disk ──────────────────────────────────────────────────────────────────────────────────────────

def canonical(nb, name):
    """`nb` as it lies in git: sorted keys, lists of lines, stable ids, no execution counts, no widget state."""
    from nbdev.clean import clean_nb
    seen, cells = set(), []
    for c in nb["cells"]:
        src, kind = text_of(c["source"]).strip("\n"), c["cell_type"]
        cid, n = c.get("id", ""), 0
        while not re.fullmatch("[0-9a-f]{8}", cid) or cid in seen:
            cid, n = hashlib.sha256(f"{name}\0{kind}\0{src}\0{n}".encode()).hexdigest()[:8], n + 1
        seen.add(cid)
        cell = dict(cell_type=kind, id=cid, metadata={}, source=src.splitlines(keepends=True))
        if kind == "code":
            cell |= dict(execution_count=None, outputs=[o for o in map(clean_output, c.get("outputs", [])) if o])
        cells.append(cell)
    out = dict(cells=cells, metadata=dict(kernelspec=KERNEL), nbformat=4, nbformat_minor=5)
    clean_nb(out)
    return out


def clean_output(out):
    """`out` without what no reader needs: widget handles, progress bars, library warnings; None when nothing is left."""
    if WIDGET in out.get("data", {}): return None
    if out.get("name") == "stderr" and not PROGRESS.sub("", WARNING.sub("", text_of(out["text"]).replace("\r", "\n"))).strip(): return None
    out = dict(out)
    if "text" in out: out["text"] = text_of(out["text"]).splitlines(keepends=True)
    if "data" in out:
        out["data"] = {k: text_of(v).splitlines(keepends=True) if k.startswith("text/") else v for k, v in out["data"].items()}
    return out


def dumps(nb):
    return json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def load(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def save(path, nb):
    """Write `nb` canonically; an unchanged notebook keeps its time stamp, so an open JupyterLab does not complain."""
    new = dumps(canonical(nb, path.stem))
    if not path.exists() or path.read_text(encoding="utf-8") != new: path.write_text(new, encoding="utf-8")


def as_text(path):
    """A notebook file as jupytext py:percent."""
    import jupytext
    return jupytext.writes(jupytext.read(path), fmt=PERCENT)


# ── commands ──────────────────────────────────────────────────────────────────────────────────────────────────

def pull(names, root=ROOT):
    """Notebooks to build/nbs/NAME.py; what was pulled is remembered so that `push` sees edits made in JupyterLab."""
    (root / "build/nbs").mkdir(parents=True, exist_ok=True)
    for p in notebooks(names, root):
        for ext in (".py", ".pulled"): (root / "build/nbs" / (p.stem + ext)).write_text(as_text(p), encoding="utf-8")


def push(names, root=ROOT, force=False):
    """build/nbs/NAME.py to notebooks (ids and outputs kept), then one export. Never overwrites an edit it has not seen."""
    import jupytext
    from jupytext.combine import combine_inputs_with_outputs
    for p in notebooks(names, root, "build/nbs", ".py"):
        text, nb_path, base = p.read_text(encoding="utf-8"), root / "nbs" / (p.stem + ".ipynb"), p.with_suffix(".pulled")
        nb = jupytext.reads(text, fmt=PERCENT)
        for c in nb.cells: c.pop("id", None)
        if nb_path.exists():
            if not force and base.exists() and as_text(nb_path) not in (base.read_text(encoding="utf-8"), text):
                sys.exit(f"{nb_path.name} was edited since the last pull: pull it again, or push --force to lose that edit")
            nb = combine_inputs_with_outputs(nb, jupytext.read(nb_path), PERCENT)
        nb_path.parent.mkdir(exist_ok=True)
        save(nb_path, nb)
        base.write_text(as_text(nb_path), encoding="utf-8")
    export(root)


def export(root=ROOT):
    """nbdev_export in a process of its own: nbdev remembers the first project it saw, and IN_TEST would silence it."""
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    code = "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"
    subprocess.run([sys.executable, "-c", code], cwd=root, env=env, check=True)


def run(names, root=ROOT, timeout=None):
    """Execute notebooks and keep their outputs, each in a fresh process; a notebook whose cell fails stays as it was."""
    path, *more = notebooks(names, root)
    if more:
        each = [sys.executable, __file__, "run", *(["--timeout", str(timeout)] if timeout else [])]
        bad = [p.stem for p in (path, *more) if subprocess.run([*each, p.stem]).returncode]
        sys.exit(f"failed: {' '.join(bad)}" if bad else 0)
    skip_flags = set(settings(root)["tst_flags"].split())
    from execnb.shell import CaptureShell, format_exc
    os.chdir(path.parent)
    sys.path[:] = [str(root)] + [d for d in sys.path if d != str(ROOT / "tools")]
    nb, shell = load(path), CaptureShell(path, mpl_format="png", timeout=timeout)
    for i, cell in enumerate(nb["cells"]):
        src = text_of(cell["source"])
        if not runs(cell, skip_flags): continue
        cell["outputs"] = list(shell.run(src))
        if shell.exc:
            sys.exit(f"{path.name}, cell {i} ({cell.get('id')}):\n\n{src}\n\n{''.join(format_exc(shell.exc))}")
    save(path, json.loads(json.dumps(nb)))
    print(f"ran {path.name}", file=sys.stderr)


def readme_text(root=ROOT):
    """README.md from nbs/index.ipynb: prose as it is, code fenced, text results under it, links made relative to the top."""
    from nbdev.process import NBProcessor
    parts = []
    for c in NBProcessor(root / "nbs/index.ipynb", rm_directives=False, process=True).nb.cells:
        if c.cell_type == "markdown":
            local = re.sub(r"""(\]\(|src=["'])(?!\w+:|[#/.])""", r"\1nbs/", c.source)
            parts.append(re.sub(r"""(\]\(|src=["'])\.\./""", r"\1", local))
        if c.cell_type == "code" and not {"hide", "default_exp"} & set(directives(c)):
            parts.append("```python\n" + "\n".join(ln for ln in c.source.splitlines() if not ln.startswith("#|")) + "\n```")
            for o in c.get("outputs", []):
                data = o.get("data", {"text/plain": o.get("text", "")})
                if "text/markdown" in data: parts.append(text_of(data["text/markdown"]).strip())
                elif text_of(data.get("text/plain", "")).strip() and not any(k.startswith("image/") for k in data):
                    parts.append("```\n" + text_of(data["text/plain"]).rstrip() + "\n```")
    return "\n\n".join(parts) + "\n"


def check(names):
    """The house rules on everything, or on the named notebooks only."""
    only = ["-k", " or ".join(p.stem for p in notebooks(names))] if names else []
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_house.py", *only], cwd=ROOT).returncode


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(dest="cmd", required=True)
    for name, why in dict(pull="notebooks to build/nbs/NAME.py", push="build/nbs/NAME.py to notebooks, then export",
                          run="execute notebooks, keep their outputs", check="the rules the tests hold this project to",
                          readme="nbs/index.ipynb to README.md", requirements="settings.ini to requirements.txt").items():
        p = sub.add_parser(name, help=why)
        if name in ("pull", "push", "run", "check"): p.add_argument("names", nargs="*", help="e.g. 02_models; none means all")
        if name == "push": p.add_argument("--force", action="store_true", help="overwrite what was edited since the pull")
        if name == "run": p.add_argument("--timeout", type=int, help="seconds a cell")
    a = ap.parse_args()
    if a.cmd == "pull": pull(a.names)
    if a.cmd == "push": push(a.names, force=a.force)
    if a.cmd == "run": run(a.names, timeout=a.timeout)
    if a.cmd == "check": sys.exit(check(a.names))
    if a.cmd == "readme": (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")
    if a.cmd == "requirements": (ROOT / "requirements.txt").write_text(requirements_text(), encoding="utf-8")


if __name__ == "__main__": main()
