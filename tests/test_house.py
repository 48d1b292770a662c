"""The house: which file may import which, that there is no circle, and what importing the model does not load."""
import ast
import subprocess
import sys

import pytest

from conftest import ROOT

COMMANDS = ("train", "eval", "predict", "report", "app", "bench")
WINGS = ("paper", "benches", "tests")
# what a file may import of ours, of that which stands beside or above it nothing; a folder stands for its files
MAY = {
    "common": (),
    "ops": ("ops",),
    "texts": ("common",),
    "metrics": ("common",),
    "plots": ("common",),
    "encoders": ("common",),
    "readers": ("common", "readers"),
    "readers.check": ("common", "readers", "metrics", "plots"),
    "data": ("common", "readers", "texts"),
    "beyond": (),
    "medsegr": ("common", "ops", "encoders", "beyond"),
    "losses": ("common", "data"),
    "inference": ("common", "readers", "texts", "data", "encoders", "medsegr"),
    "runs": ("common", "medsegr", "encoders", "plots"),
    "export": ("common", "data", "texts", "ops", "medsegr", "inference", "runs"),  # a command, and what runs its files
}
BY_A_FLAG = {("eval", "paper"), ("bench", "benches")}  # a command's own flag imports a wing, within a function


def module_of(path):
    """readers/demo.py -> readers.demo, readers/__init__.py -> readers."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted([*ROOT.glob("*.py"), *(
    path for room in ("ops", "readers", *WINGS) for path in ROOT.glob(f"{room}/*.py"))])}


def imports_of(module, path):
    """{(module of ours, does it stand inside of a function)} of a file, also from below `if` and `try`."""
    found = set()

    def visit(node, inside):
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:  # from . import x
                room = module if path.name == "__init__.py" else module.rpartition(".")[0]
                start = ".".join(filter(None, [room, start]))
            names = [f"{start}.{alias.name}" if f"{start}.{alias.name}" in FILES else start for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and getattr(node.func, "id", "") in ("import_module", "__import__"):
            name = node.args[0]  # a constant, or f"benches.{...}", whose room counts
            name = name.values[0] if isinstance(name, ast.JoinedStr) else name
            names = [name.value.rstrip(".")] if isinstance(name, ast.Constant) else []
        found.update((name, inside) for name in names if name in FILES or name in WINGS)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text()), False)
    return found


IMPORTS = {module: imports_of(module, path) for module, path in FILES.items()}


def room(module):
    return module.partition(".")[0]


def circle(imports):
    """A circle of modules that import each other, [a, b, ..., a]; [] if there is none."""
    done = set()

    def walk(module, way):
        if module in way:
            return way[way.index(module):] + [module]
        if module not in done:
            for other in sorted(imports.get(module, ())):
                if found := walk(other, [*way, module]):
                    return found
            done.add(module)
        return []

    return next(filter(None, (walk(module, []) for module in sorted(imports))), [])


def test_imports_are_seen(tmp_path):
    """Of this test: what hides in functions, branches and names that are put together is found."""
    hidden = tmp_path / "x.py"
    hidden.write_text("import json, data\nif data:\n    from readers import demo, RawSample\n"
                      "def f():\n    try:\n        import plots as p\n    finally:\n        import_module(f'benches.{p}')\n"
                      "class A:\n    def g(self):\n        from ops.build import load\n")
    assert imports_of("x", hidden) == {("data", False), ("readers.demo", False), ("readers", False), ("plots", True),
                                       ("benches", True), ("ops.build", True)}
    assert circle(dict(a={"b", "c"}, b={"c"}, c={"d"}, d={"b"})) == ["b", "c", "d", "b"]
    assert circle(dict(a={"b", "c"}, b={"c"}, c=set())) == []
    assert {"medsegr", "train", "readers.demo", "paper.tables", "ops"} <= FILES.keys()


def test_no_circle_not_even_inside_of_functions():
    assert not circle({module: {name for name, _ in found} for module, found in IMPORTS.items()})


@pytest.mark.parametrize("module", [m for m in FILES if room(m) not in WINGS])
def test_imports_run_one_way(module):
    may = MAY.get(module, MAY.get(room(module)))
    for name, inside in IMPORTS[module]:
        assert room(name) not in WINGS or inside and (module, room(name)) in BY_A_FLAG, \
            f"{module} imports {name}: only a command's own flag may import {room(name)}/"
        assert name not in COMMANDS, f"{module} imports the command {name}; what both need has a room of its own"
        if may is not None and room(name) not in WINGS:
            assert room(name) in may, f"{module} imports {name}, but stands on {', '.join(may) or 'nothing of ours'} alone"
    assert may is not None or module in COMMANDS, f"{module}: a new file; say in MAY what it stands on"


def loaded_by(module):
    """The packages that are loaded by `import module`, as Python itself reports them."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-X", "importtime", "-c", f"import {module}"], cwd=ROOT,
                         text=True, capture_output=True, check=True)
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines() if "|" in line}


@pytest.mark.parametrize("module, without", [
    ("medsegr", ("matplotlib", "nibabel", "h5py", "gradio", "pydicom", "ijson", "pandas")),
    ("train", ("matplotlib", "nibabel", "gradio", "pydicom", "pandas")),  # what every rank of a training loads
    ("predict", ("matplotlib", "open_clip", "segment_anything", "torchvision", "gradio")),  # to refuse an input
])
def test_importing_loads_nothing_that_it_does_not_need(module, without):
    loaded = loaded_by(module)
    assert {module, "torch"} <= loaded
    assert not loaded & set(without)
