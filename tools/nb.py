"""The editing loop of this project: notebooks as text, outputs as evidence, README.md from index.ipynb.

nbdev has no command that adds a cell, fills outputs without widget state or writes README without Quarto; this file does.
`pull` and `push` turn notebooks into plain text (build/nbs/NAME.py) and back, so that a one-line edit is a one-line diff.
The rules that `check` holds the project to are in tests/test_house.py.
"""
import argparse, configparser, hashlib, json, os, re, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
PERCENT = {"extension": ".py", "format_name": "percent", "notebook_metadata_filter": "-all",
           "cell_metadata_filter": "-all", "comment_magics": False}
NOISE = re.compile(r"^.*Warning: .*\n?(?:[ \t].*\n?)?|^.*\d%\|.*\n?", re.M)  # library warnings and progress bars


def settings(root=ROOT):
    """settings.ini as plain text values: nbdev's own reader is cached and cannot look into a temporary copy."""
    cfg = configparser.ConfigParser()
    cfg.read(root / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


def requirements_text(root=ROOT):
    """requirements.txt as it must be (nbdev_requirements leaves a blank first line when a value spans lines)."""
    return "\n".join(settings(root)["requirements"].split()) + "\n"


def notebooks(names=(), root=ROOT, folder="nbs", ext=".ipynb"):
    """The files meant by `names` ('02_models', '02' or a path to one), all of them when there are none."""
    files = {p.stem: p for p in sorted((root / folder).glob("*" + ext)) if p.name[0] not in "._"}
    found = {n: [s for s in files if Path(n).name.split(".")[0] in (s, s.split("_")[0])] for n in names}
    if bad := [n for n in found if not found[n]]:
        sys.exit(f"no {', '.join(bad)} in {folder}/; there is {', '.join(files) or 'nothing'}")
    return [files[s] for s in files if not names or any(s in stems for stems in found.values())]


def room(stem):
    """Where a notebook stands on the ladder: '03d_planning' -> (3, 'b'), above '03a_images' and below '04_loader'."""
    number, letter = re.findall(r"^(\d+)([a-z]?)", stem)[0]
    return int(number), letter


def text_of(value):
    return value if isinstance(value, str) else "".join(value)


def directives(cell):
    """{'export': '', 'eval': 'false'} and the like, from the leading `#|` lines of a code cell."""
    source = text_of(cell["source"]) if cell["cell_type"] == "code" else ""
    head = "".join(re.findall(r"\A(?:\s*#\|.*\n?)*", source)[:1])
    return {m[1]: m[2].strip() for m in re.finditer(r"#\|\s*([\w-]+):?(.*)", head)}


def runs(cell, skip_flags):
    """Is this a cell that an unattended run executes?"""
    flags = directives(cell)
    wanted = cell["cell_type"] == "code" and flags.get("eval") != "false" and not skip_flags & set(flags)
    return wanted and "nbdev_export(" not in text_of(cell["source"])


def clean_output(out):
    """`out` in list-of-lines form; None for what no reader needs: a widget without a still, stderr that is only noise."""
    out, data = dict(out), dict(out.get("data", {}))
    if data.pop("application/vnd.jupyter.widget-view+json", None) and set(data) <= {"text/plain"}: return None
    if out.get("name") == "stderr" and not NOISE.sub("", text_of(out["text"]).replace("\r", "\n")).strip(): return None
    if "text" in out: out["text"] = text_of(out["text"]).splitlines(keepends=True)
    for k in data:
        if k.startswith("text/"): data[k] = text_of(data[k]).splitlines(keepends=True)
    return out | {"data": data} if data else out


def canonical(nb, name):
    """`nb` as it lies in git: sorted keys, lists of lines, no counts, no widget state, ids that never change once given."""
    from nbdev.clean import clean_nb
    cells = {}
    for c in nb["cells"]:
        src, kind, cid, n = text_of(c["source"]).strip("\n"), c["cell_type"], c.get("id", ""), 0
        while not re.fullmatch("[0-9a-f]{8}", cid) or cid in cells:
            cid, n = hashlib.sha256(f"{name}\0{kind}\0{src}\0{n}".encode()).hexdigest()[:8], n + 1
        cells[cid] = dict(cell_type=kind, id=cid, metadata={}, source=src.splitlines(keepends=True))
        if kind == "code":
            cells[cid] |= dict(execution_count=None, outputs=[o for o in map(clean_output, c.get("outputs", [])) if o])
    out = dict(cells=list(cells.values()), metadata=dict(kernelspec=KERNEL), nbformat=4, nbformat_minor=5)
    clean_nb(out)
    return json.dumps(out, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def save(path, nb):
    """Write `nb` canonically; an unchanged notebook keeps its time stamp, so an open JupyterLab does not complain."""
    new = canonical(nb, path.stem)
    if not path.exists() or path.read_text(encoding="utf-8") != new: path.write_text(new, encoding="utf-8")


def as_text(path):
    """A notebook file as jupytext py:percent."""
    import jupytext
    return jupytext.writes(jupytext.read(path), fmt=PERCENT)


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
        path, pulled, text = root / "nbs" / (p.stem + ".ipynb"), p.with_suffix(".pulled"), p.read_text(encoding="utf-8")
        nb = jupytext.reads(text, fmt=PERCENT)
        for c in nb.cells: c.pop("id", None)
        if path.exists():
            seen = not pulled.exists() or as_text(path) in (pulled.read_text(encoding="utf-8"), text)
            if not (force or seen): sys.exit(f"{path.name} was edited since the last pull: pull it, or push --force to lose that")
            nb = combine_inputs_with_outputs(nb, jupytext.read(path), PERCENT)
        path.parent.mkdir(exist_ok=True)
        save(path, nb)
        pulled.write_text(as_text(path), encoding="utf-8")
    export(root)


def export(root=ROOT):
    """nbdev_export in a process of its own: nbdev remembers the first project it saw, and IN_TEST would silence it."""
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    code = "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"
    subprocess.run([sys.executable, "-c", code], cwd=root, env=env, check=True)


def run(names, root=ROOT, timeout=None, flags=""):
    """Execute notebooks and keep their outputs, each in a fresh process; one whose cell fails stays as it was."""
    path, *more = notebooks(names, root)
    if more:
        each = [sys.executable, __file__, "run", *(["--timeout", str(timeout)] if timeout else []), *(["--flags", flags] if flags else [])]
        bad = [p.stem for p in (path, *more) if subprocess.run([*each, p.stem]).returncode]
        sys.exit(f"failed: {' '.join(bad)}" if bad else 0)
    from execnb.shell import CaptureShell, format_exc
    os.chdir(path.parent)
    sys.path[0] = str(root)  # python put tools/ there; a notebook must find the package
    nb, shell = json.loads(path.read_text(encoding="utf-8")), CaptureShell(path, mpl_format="png", timeout=timeout)
    for i, cell in enumerate(nb["cells"]):
        if not runs(cell, set(settings(root)["tst_flags"].split()) - set(flags.split())): continue
        cell["outputs"] = list(shell.run(text_of(cell["source"])))      # pyright: ignore[reportAttributeAccessIssue]  execnb adds it
        if shell.exc: sys.exit(f"{path.name}, cell {i}:\n\n{text_of(cell['source'])}\n\n{''.join(format_exc(shell.exc))}")
    save(path, nb)
    print(f"ran {path.name}", file=sys.stderr)


def from_the_top(text):
    """Links of a notebook in nbs/ as they must be in a file at the top."""
    text = re.sub(r"""(\]\(|src=["'])(?!\w+:|[#/.])""", r"\1nbs/", text)
    return re.sub(r"""(\]\(|src=["'])\.\./""", r"\1", text)


def readme_text(root=ROOT):
    """README.md from nbs/index.ipynb: prose as it is, code fenced, text results under it, links made relative to the top."""
    parts = []
    for c in json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]:
        src = text_of(c["source"])
        if c["cell_type"] == "markdown": parts.append(from_the_top(src))
        if c["cell_type"] == "code" and not {"hide", "default_exp"} & set(directives(c)):
            # A cell whose point is its result (a table of ours) shows only that, as Quarto's `echo: false` would.
            if directives(c).get("echo") != "false":
                parts.append("```python\n" + re.sub(r"^#\|.*\n", "", src, flags=re.M) + "\n```")
            for o in c["outputs"]:
                data = {k: text_of(v).rstrip() for k, v in o.get("data", {"text/plain": o.get("text", "")}).items()}
                if "text/markdown" in data: parts.append(from_the_top(data["text/markdown"]))
                elif data.get("text/plain") and not any(k.startswith("image/") for k in data):
                    parts.append(f"```\n{data['text/plain']}\n```")
    return "\n\n".join(parts) + "\n"


def figures(names, check=False):
    """What a reader meets, in numbers, by module; `check` lists what is beyond its bounds and fails on it."""
    import figures as f
    rooms = {p.stem for p in notebooks(names)} if names else None
    paths = f.modules(ROOT, settings()["lib_path"])
    if rooms: paths = [p for p in paths if f.notebook_of(p) in rooms]
    print(f.show(paths))
    wrong = f.problems(paths)
    print("\n".join(wrong), file=sys.stderr)
    if check and wrong: sys.exit(1)


def check(names):
    """The house rules on everything, or on the named notebooks only; the exit status is pytest's."""
    only = ["-k", " or ".join(p.stem for p in notebooks(names))] if names else []
    sys.exit(subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_house.py", *only], cwd=ROOT).returncode)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(dest="cmd", required=True)
    for f in (pull, push, run, figures, check):
        p = sub.add_parser(f.__name__, help=f.__doc__)
        p.add_argument("names", nargs="*", help="e.g. 02_models; none means all")
        if f is push: p.add_argument("--force", action="store_true", help="overwrite what was edited since the pull")
        if f is figures: p.add_argument("--check", action="store_true", help="fail when something is beyond its bounds")
        if f is run: p.add_argument("--timeout", type=int, help="seconds a cell"), p.add_argument("--flags", default="", help="run cells of these flags too, e.g. slow")
        p.set_defaults(go=lambda a, f=f: f(**{k: v for k, v in vars(a).items() if k not in ("cmd", "go")}))
    for cmd, name, text in (("readme", "README.md", readme_text), ("requirements", "requirements.txt", requirements_text)):
        p = sub.add_parser(cmd, help=text.__doc__)
        p.set_defaults(go=lambda a, n=name, t=text: (ROOT / n).write_text(t(), encoding="utf-8"))
    a = ap.parse_args()
    a.go(a)


if __name__ == "__main__": main()
