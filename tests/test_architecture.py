"""The source has the shape that docs/architecture.md promises.

Imports point downwards, and nothing grows too large. All of it is read from the source.
"""

import ast
import graphlib
import pathlib
import runpy
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lmjax"

# The rooms of lmjax/, from the top of the house to the ground: a room imports only those after it.
# A folder named with its parent (training.optim) is a room; any other folder belongs to its parent.
ROOMS = (
    "cli",               # commands: arguments in, result out
    "benchmarks",        # commands: measurements behind `lmjax bench`
    "scaling",           # commands: sweeps over settings, and comparisons of runs
    "serving",           # commands: the engine behind a server, and the server
    "lm_eval",           # commands: lm-eval's adapter
    "compression",       # wholes: smaller models from a model
    "planning",          # wholes: what a run would take on a TPU
    "lm",                # wholes: a trained model as an object
    "training",          # training: recipe, program, step, state, checkpoints, loop
    "training.optim",    # training: optimizers and their schedules
    "tasks",             # training: examples, heads, losses and metrics of fine-tuning
    "decoding",          # use: text out of a model
    "huggingface",       # use: weights and tokenizers in and out
    "models",            # parts: one file per architecture
    "data.preparation",  # parts: from text to stored tokens
    "data",              # parts: from stored tokens to batches
    "nn",                # blocks: layers, attention, the stack of layers
    "reporting",         # blocks: pages and pictures
    "monitoring",        # records: metrics, goodput, watchdog
    "sharding",          # ground: meshes and rules
    "runtime",           # ground: processes, files, signals, devices, chips
    "config",            # ground: strict configs
    "tree",              # ground: named paths of a tree
    "errors",            # ground: mistakes that a user can mend
)
GROUND = ("sharding", "runtime", "config", "tree", "errors")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# Plain JAX replaces each of these: their rules for state, host time or memory cost others days.
BANNED_NNX = {"jit", "grad", "value_and_grad", "scan", "vmap", "remat", "Optimizer"}
TENSORFLOW = {"tensorflow", "tensorflow_datasets"}

FILES = sorted(PACKAGE.rglob("*.py"))
LAUNCHERS = [file for file in (ROOT / "launch").iterdir()
             if file.suffix == ".py" or b"python3" in file.read_bytes()[:30]]
ALL_FILES = sorted([*FILES, *LAUNCHERS,
                    *(path for folder in ("configs", "docs", "examples", "tests")
                      for path in (ROOT / folder).rglob("*.py"))])


def name_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: pathlib.Path) -> str:
    """lmjax/nn/layers.py -> "lmjax.nn.layers", lmjax/nn/__init__.py -> "lmjax.nn"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that `tree` imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write relative imports as absolute ones"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def room_of(module: str) -> str:
    """lmjax.nn.layers -> "nn", lmjax.training.optim.adam -> "training.optim"."""
    parts = module.split(".")[1:]
    for name in (".".join(parts[:2]), parts[0]):
        if name in ROOMS:
            return name
    raise AssertionError(f"{module}: expected a room of the table ROOMS, got a new one; "
                         "add it there")


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: all but the bodies of functions."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_import(child)


def parsed(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_downwards(path):
    module = module_of(path)
    if module == "lmjax":  # the public face: may name anything, and anyone may read its version
        return
    floor = ROOMS.index(room_of(module))
    for target in imports(parsed(path)):
        if target.startswith("lmjax."):
            assert ROOMS.index(room_of(target)) >= floor, f"imports {target}, from a room above"


def arrows() -> set[tuple[str, str]]:
    """The pairs of rooms of which the first imports the second."""
    pairs = {(room_of(module_of(path)), room_of(target))
             for path in FILES if module_of(path) != "lmjax"
             for target in imports(parsed(path)) if target.startswith("lmjax.")}
    return {(here, there) for here, there in pairs if here != there}


def test_the_architecture_page_counts_rooms_and_arrows():
    page = (ROOT / "docs/architecture.md").read_text()
    text, pairs = page.replace("\n", " "), arrows()
    assert f"{len(ROOMS)} rooms and {len(pairs)} arrows" in text
    ground = sum(there in GROUND for _, there in pairs)
    assert f"{ground} of the arrows lead to the five rooms on the ground" in text
    assert f"{sum(there == 'errors' for _, there in pairs)} of these to `errors.py`" in text
    chain: dict[str, int] = {}  # rooms in the longest chain that begins at each room
    for room in reversed(ROOMS):
        chain[room] = 1 + max((chain[there] for here, there in pairs if here == room), default=0)
    assert f"passes through {max(chain.values())} rooms" in text
    for room in ROOMS:
        assert f"`{room.replace('.', '/')}" in page, f"no row for {room}"


def test_the_drawing_is_what_its_script_draws():
    script = runpy.run_path(str(ROOT / "docs/draw_architecture.py"))
    assert script["OUT"].read_text() == script["draw"](), "run `python docs/draw_architecture.py`"
    drawn = {room.name.replace("/", ".") for _, _, rooms in script["FLOORS"] for room in rooms}
    assert drawn == set(ROOMS)


def test_every_room_of_the_table_is_there_and_no_other():
    assert {room_of(module) for module in MODULES - {"lmjax"}} == set(ROOMS)
    for module in ("lmjax.extra", "lmjax.extra.layers"):
        with pytest.raises(AssertionError, match="expected a room of the table ROOMS"):
            room_of(module)


def test_no_two_modules_import_each_other():
    inner = MODULES - {"lmjax"}
    files = {module_of(path): path for path in FILES}
    graph = {module: set(imports(parsed(files[module]))) & inner - {module} for module in inner}
    graphlib.TopologicalSorter(graph).prepare()  # raises with the cycle


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_tensorflow_feeds_data_only(path):
    tree = parsed(path)
    if any(target.split(".")[0] in TENSORFLOW for target in imports(tree)):
        assert "lmjax/data/" in name_of(path), "TensorFlow feeds data and nothing else"
    for node in at_import(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {target.split(".")[0] for target in imports(node)}
            where = f"line {node.lineno}"
            assert not names & TENSORFLOW, f"{where}: import it in the function that needs it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_plain_jax_runs_the_modules(path):
    for node in ast.walk(parsed(path)):
        if (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                and node.value.id == "nnx"):
            where = f"line {node.lineno}"
            assert node.attr not in BANNED_NNX, f"{where}: use plain JAX, not nnx.{node.attr}"
            if node.attr in ("split", "merge"):
                only = "lmjax/nn/module.py"
                assert name_of(path) == only, f"{where}: only nn/module.py splits and merges"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flax"):
            # Any other way in would go past the checks above.
            only = "from flax import nnx"
            assert ast.unparse(node) == only, f"line {node.lineno}: write `{only}`"


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_nothing_grows_too_large(path):
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    for node in functions(parsed(path)):
        length = node.end_lineno - node.lineno + 1
        assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_public_functions_are_typed(path):
    tree = parsed(path)
    scopes = [tree, *(node for node in tree.body
                      if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))]
    for scope in scopes:
        for node in scope.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if node.name.startswith("_") and node.name not in ("__init__", "__call__"):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
            missing = [a.arg for a in arguments
                       if a.annotation is None and a.arg not in ("self", "cls")]
            where = f"{node.name} (line {node.lineno})"
            assert not missing, f"{where}: no type for {', '.join(missing)}"
            assert node.returns is not None or node.name == "__init__", f"{where}: no return type"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_is_for(path):
    if path.name != "__init__.py":
        assert ast.get_docstring(parsed(path)), "expected a docstring at the top of the file"
