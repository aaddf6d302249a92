"""What a reader meets in the package, in numbers: widths, syntax nodes, definitions a cell, comments, complexity.

`python tools/nb.py figures` prints them; tests/test_house.py holds the package to the bounds below. The numbers serve one
aim: a person reads a cell, understands it, and goes on. `EXCUSED` names the cells where a figure and that aim disagree,
each with its reason; `show` prints them under the table.
"""
import ast, io, re, tokenize
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

MOST_WIDE = 120                 # characters a line, no exception
MOST_NODES = 250                # syntax nodes of an exported cell that defines something; `EXCUSED` names the exceptions
# Of the whole package: figure -> (least, most). The same count of the notebook projects that this one takes as models
# (fastcore, nbdev, fasthtml, claudette, cosette, toolslm, msglm; 1,203 cells) gives 37 to 64 nodes a cell at the median,
# and 2.8 % of their cells have more than 250.
BOUNDS = {
    "width p95": (0, 106),                  # 105 is the aim
    "nodes a line p95": (0, 18),
    "nodes a cell p50": (0, 80),
    "definitions a cell p50": (0, 1),
    "definitions a cell p90": (0, 2),
    "attached methods": (0, 0),
    "tuples of 3+ per 100 lines": (0, 0.3),
    "comprehensions per 100 lines": (0, 9),
    "comments per 100 lines": (4, 10),
    "semicolons per 100 docstrings": (0, 1),
    "functions over 40 lines": (0, 0),
    "complexity D or worse": (0, 0),
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.IfExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Excuse:
    """How many nodes a cell may have, and why one cell reads better than two."""
    nodes: int
    why: str


# All are classes: a class stands in one cell, so that completion, debuggers and `inspect` see every method of it.
EXCUSED: dict[str, Excuse] = {
    "answers.Metrics": Excuse(270, "each metric beside the method that counts it: all that /metrics says in one view"),
    "client.AsyncAuraClient": Excuse(410, "each call is written out with its parameters, so that Tab and `help` teach them"),
    "client.AuraClient": Excuse(390, "the same calls, written out for code that does not await"),
    "engine.Turns": Excuse(290, "one turn of the engine: who is out of time, who goes next, and what happens when that fails"),
    "intake.FairPool": Excuse(330, "who waits, who runs and who had how much change together at each turn"),
    "job_routes.JobStore": Excuse(380, "one set of bounds (jobs, bytes, age) that every method keeps"),
    "queue.Admission": Excuse(290, "a promise from its making to its keeping: check, make, learn"),
    "runner.Runner": Excuse(280, "a picture's begin, step and decode, each with its clock and its curve"),
    "shared_jobs.FarJobs": Excuse(280, "what a foreign job can be asked: read, follow, cancel"),
    "shared_jobs.Writer": Excuse(310, "one transaction: the comments in `write` need the lines around them"),
    "train.Stage": Excuse(290, "one training stage as a loop: its rate, its step, its checkpoint"),
    "widgets.Compare": Excuse(360, "one widget: its parts and what happens when each is touched"),
    "widgets.Conversation": Excuse(330, "one widget: its parts and what happens when each is touched"),
    "widgets.Pane": Excuse(310, "one widget: its parts and what happens when each is touched"),
}


@dataclass
class Cell:
    """One exported cell of a module: the notebook's id and its code."""
    module: str
    id: str
    code: str

    @cached_property
    def tree(self) -> ast.Module: return ast.parse(self.code)

    @cached_property
    def definitions(self) -> list[ast.stmt]:
        return [n for n in self.tree.body if isinstance(n, (*FUNCTIONS, ast.ClassDef))]

    @cached_property
    def nodes_by_line(self) -> dict[int, int]:
        """Line -> syntax nodes that begin on it."""
        out: dict[int, int] = {}
        for n in ast.walk(self.tree):
            if line := getattr(n, "lineno", 0): out[line] = out.get(line, 0) + 1
        return out

    @property
    def nodes(self) -> int: return sum(self.nodes_by_line.values())

    @cached_property
    def tangled(self) -> int:
        """Functions of radon's rank D or worse (cyclomatic complexity above 20)."""
        from radon.complexity import cc_visit_ast
        return sum(b.complexity > 20 for b in cc_visit_ast(self.tree) if not hasattr(b, "methods"))

    @property
    def name(self) -> str:
        """`module.first_definition`, which is how `EXCUSED` and messages name a cell."""
        return f"{self.module}.{getattr(self.definitions[0], 'name', '')}" if self.definitions else f"{self.module}#{self.id}"


@dataclass
class Figures:
    """The raw counts of one module, or of several added up."""
    cells: list[Cell] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        return [ln for c in self.cells for ln in c.code.splitlines() if ln.strip()]

    @property
    def trees(self) -> list[ast.Module]: return [c.tree for c in self.cells]

    def table(self) -> dict[str, float]:
        """Figure -> value, in the order of `BOUNDS` and a few more for people."""
        widths = [len(ln) for ln in self.lines]
        defining = [c for c in self.cells if c.definitions]
        per_100 = 100 / max(len(widths), 1)
        return {
            "lines": len(widths),
            "width p50": percentile(widths, 50),
            "width p95": percentile(widths, 95),
            "width max": max(widths, default=0),
            "nodes a line p95": percentile([n for c in self.cells for n in c.nodes_by_line.values()], 95),
            "nodes a cell p50": percentile([c.nodes for c in defining], 50),
            "nodes a cell max": max((c.nodes for c in defining), default=0),
            "definitions a cell p50": percentile([len(c.definitions) for c in defining], 50),
            "definitions a cell p90": percentile([len(c.definitions) for c in defining], 90),
            "attached methods": sum(map(attached, self.trees)),
            "tuples of 3+ per 100 lines": round(sum(map(wide_tuples, self.trees)) * per_100, 2),
            "comprehensions per 100 lines": round(sum(map(comprehensions, self.trees)) * per_100, 1),
            "comments per 100 lines": round(sum(comments(c.code) for c in self.cells) * per_100, 1),
            "semicolons per 100 docstrings": semicolons(self.trees),
            "functions over 40 lines": sum(map(long_functions, self.trees)),
            "complexity D or worse": sum(c.tangled for c in self.cells),
        }


def percentile(values: list[int], p: int) -> int:
    """The nearest-rank percentile; 0 of nothing."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, len(ranked) * p // 100)] if ranked else 0


def attached(tree: ast.AST) -> int:
    """Statements that hang something onto a class from outside: `Engine.run = …`, `setattr(Engine, …)`."""
    found = 0
    for n in ast.walk(tree):
        if isinstance(n, ast.Assign):
            flat = [e for t in n.targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
            found += any(isinstance(e, ast.Attribute) and is_class_name(e.value) for e in flat)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "setattr":
            found += bool(n.args) and is_class_name(n.args[0])
    return found


def is_class_name(n: ast.expr) -> bool: return isinstance(n, ast.Name) and n.id[:1].isupper() and not n.id.isupper()


def wide_tuples(tree: ast.AST) -> int:
    """Assignments to three or more names at once."""
    targets = [t for n in ast.walk(tree) if isinstance(n, ast.Assign) for t in n.targets]
    return sum(isinstance(t, ast.Tuple) and len(t.elts) > 2 for t in targets)


def comprehensions(tree: ast.AST) -> int: return sum(isinstance(n, COMPREHENSIONS) for n in ast.walk(tree))


def comments(code: str) -> int:
    """Comments, by tokens: a `#` inside a string is none."""
    return sum(t.type == tokenize.COMMENT for t in tokenize.generate_tokens(io.StringIO(code).readline))


def semicolons(trees: list[ast.Module]) -> float:
    """Docstrings with a semicolon outside code, of 100: short sentences need none."""
    documented = (ast.Module, ast.ClassDef, *FUNCTIONS)
    found = [ast.get_docstring(n) for tree in trees for n in ast.walk(tree) if isinstance(n, documented)]
    texts = [re.sub(r"`[^`]*`", "", text) for text in found if text]
    return round(100 * sum(";" in text for text in texts) / max(len(texts), 1), 1)


def long_functions(tree: ast.AST) -> int:
    functions = [n for n in ast.walk(tree) if isinstance(n, FUNCTIONS)]
    return sum((f.end_lineno or 0) - f.lineno >= 40 for f in functions)


def cells_of(module: Path) -> list[Cell]:
    """The exported cells of a generated module, without nbdev's `__all__`."""
    parts = re.split(r"^# %% (.*)$", module.read_text(encoding="utf-8"), flags=re.M)
    heads, bodies = parts[1::2], parts[2::2]
    exported = zip(heads, bodies, strict=True)
    return [Cell(module.stem, head.split("#")[-1].strip(), body.strip()) for head, body in exported if not head.startswith("auto")]


def modules(root: Path, lib: str) -> list[Path]:
    """The modules that notebooks export."""
    return sorted(p for p in (root / lib).glob("*.py") if not p.name.startswith("_"))


def notebook_of(module: Path) -> str:
    """The stem of the notebook that exports a module, from nbdev's header."""
    found = re.search(r"File to edit: .*?([^/]+)\.ipynb", module.read_text(encoding="utf-8"))
    return found[1] if found else ""


def problems(paths: list[Path]) -> list[str]:
    """Where the package is beyond its bounds, in words."""
    out = []
    everything = Figures([c for p in paths for c in cells_of(p)])
    for c in everything.cells:
        for i, line in enumerate(c.code.splitlines(), 1):
            if len(line) > MOST_WIDE: out.append(f"{c.name}, line {i}: {len(line)} characters, allowed {MOST_WIDE}")
        most = EXCUSED[c.name].nodes if c.name in EXCUSED else MOST_NODES
        if c.definitions and c.nodes > most: out.append(f"{c.name}: {c.nodes} syntax nodes in one cell, allowed {most}")
        if attached(c.tree): out.append(f"{c.name}: hangs a method onto a class from outside")
    table = everything.table()
    scope = "the package" if len(paths) > 1 else paths[0].stem
    for name, (least, most) in BOUNDS.items():
        if not least <= table[name] <= most: out.append(f"{scope}: {name} is {table[name]}, allowed {least} to {most}")
    return out


def show(paths: list[Path]) -> str:
    """A table: one row a module, the whole package last."""
    rows = [(p.stem, Figures(cells_of(p)).table()) for p in paths]
    rows.append(("all", Figures([c for p in paths for c in cells_of(p)]).table()))
    names = list(rows[0][1])
    head = "| module | " + " | ".join(names) + " |"
    rule = "| --- " * (len(names) + 1) + "|"
    body = ["| " + " | ".join([stem, *(f"{table[n]:g}" for n in names)]) + " |" for stem, table in rows]
    return "\n".join([head, rule, *body, *excuses(paths)])


def excuses(paths: list[Path]) -> list[str]:
    """The cells beyond `MOST_NODES`, one line each: how many nodes, and why they stay in one cell."""
    large = [c for p in paths for c in cells_of(p) if c.definitions and c.nodes > MOST_NODES]
    why = {name: excuse.why for name, excuse in EXCUSED.items()}
    lines = [f"- {c.name}, {c.nodes}: {why.get(c.name, 'no reason is given')}" for c in large]
    return ["", f"Cells with more than {MOST_NODES} syntax nodes, and why:", *lines] if lines else []
