"""How the sources are built: every equation one name, states and tokens taken apart by name (CONTRIBUTING.md)."""

import ast
import re
from collections.abc import Iterator

import pytest
from sources import sources

EQUATIONS = {
    "§2": ("sub_scores", "top_k", "select_slots", "read"),
    "§3": ("pairs", "memorization_loss", "sub_key_probabilities", "mean_probabilities", "addressing_loss"),
    "§4": ("write_scale", "value_gradient", "key_gradient", "step"),
    "§5": ("windows",),
    "§7": ("rms_norm", "zscore", "mix"),
}
"""The names by section of the specification; one equation has one name in every backend."""
MEMORY = [name for section in ("§2", "§3", "§4", "§5") for name in EQUATIONS[section]]
FILES = ("ops.py", "addressing.py", "values.py", "windows.py", "layer.py", "tokens.py")


def names_of(tree: ast.Module) -> set[str]:
    """What a module defines or imports at its top, methods of its classes among it."""
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            found |= {method.name for method in ast.iter_child_nodes(node) if isinstance(method, ast.FunctionDef)}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def names_in(package: str, *files: str) -> set[str]:
    return set().union(
        *(names_of(source.tree) for source in sources(package) if not files or source.path.name in files)
    )


def test_the_table_has_every_equation_of_the_reference() -> None:
    """So that a new one is looked for in the backends too; the rest of the file helps the equations."""
    found = {
        name for source in sources("fwpkm") if source.path.name == "equations.py" for name in names_of(source.tree)
    }
    functions = {name for name in found if name.islower() and not name.startswith("_")}
    helpers = {"softmax", "ahead", "score_gradient", "np", "learning_rates", "dealing"}
    assert functions - helpers == set(MEMORY) - {"windows"}


@pytest.mark.parametrize("name", MEMORY)
def test_the_reference_has_each_equation_under_its_name(name: str) -> None:
    assert name in names_in("fwpkm", "equations.py", "reference.py")


@pytest.mark.parametrize("name", [*MEMORY, *EQUATIONS["§7"]])
@pytest.mark.parametrize("backend", ["torch", "jax", "keras"])
def test_a_backend_has_each_equation_under_its_name(backend: str, name: str) -> None:
    assert name in names_in(f"fwpkm.backends.{backend}")


@pytest.mark.parametrize("backend", ["torch", "jax", "keras"])
def test_backends_have_the_same_files(backend: str) -> None:
    assert set(FILES) <= {source.path.name for source in sources(f"fwpkm.backends.{backend}")}


def listed_by_kernels() -> dict[str, tuple[str, ...]]:
    """``EQUATIONS`` of each file of kernels."""
    found = {}
    for source in sources("fwpkm.kernels"):
        for node in source.tree.body:
            if isinstance(node, ast.Assign) and [getattr(t, "id", None) for t in node.targets] == ["EQUATIONS"]:
                found[source.where] = ast.literal_eval(node.value)
    return found


def test_kernels_list_the_equations_that_they_compute() -> None:
    listed = {name for names in listed_by_kernels().values() for name in names}
    assert listed <= set(MEMORY)
    assert set(MEMORY) - listed <= {"windows"}  # which runtime/windows.py has


def kernels_in(tree: ast.Module) -> set[str]:
    """Functions that Triton compiles and launches: by convention their names end in _kernel."""
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")}


def test_every_file_with_kernels_lists_its_equations() -> None:
    holding = {source.where for source in sources("fwpkm.kernels") if kernels_in(source.tree)}
    assert holding
    assert holding <= listed_by_kernels().keys()


# By name, never by position

BY_NAME = ("State", "Tokens", "Trace", "Lookup", "Losses")
CALLED = re.compile(r"(^|_)(state|tokens|pending|trace|saved_tensors|residuals)$")


def variables(tree: ast.AST) -> set[str]:
    """Parameters and variables that are annotated as one of the containers."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            name, annotation = node.arg, node.annotation
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, annotation = node.target.id, node.annotation
        else:
            continue
        if ast.unparse(annotation).strip("'\"") in BY_NAME:
            found.add(name)
    return found


def is_position(index: ast.expr) -> bool:
    """Whether an index in brackets is a slice or a number; several axes, or a name, are none."""
    if isinstance(index, ast.UnaryOp):
        index = index.operand
    return isinstance(index, ast.Slice) or (isinstance(index, ast.Constant) and isinstance(index.value, int))


def taken_by_position(tree: ast.AST) -> Iterator[ast.Subscript]:
    """``state[1:5]``, ``tokens[0]``, ``State._fields[1:]``."""
    annotated = variables(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Subscript) or not is_position(node.slice):
            continue
        owner = node.value
        name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
        is_fields = name == "_fields" and isinstance(owner, ast.Attribute) and ast.unparse(owner.value) in BY_NAME
        if name in annotated or CALLED.search(name) or is_fields:
            yield node


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("def f(s: State): return s[1:5]", 1),
        ("a, b = tokens[:2]", 1),
        ("last = ctx.saved_tensors[3:]", 1),
        ("names = State._fields[1:4]", 1),
        ("gate = state.pending[2]", 1),
        ("position = state[-1]", 1),
        ("part = trace[name]", 0),
        ("row = pending.query[:, 2]", 0),
        ("shape = tokens.query.shape[0]", 0),
        ("def f(tokens: Tokens): return tokens.slice(1, 2)", 0),
    ],
)
def test_the_search_finds_what_is_taken_by_position(line: str, count: int) -> None:
    assert len(list(taken_by_position(ast.parse(line)))) == count


def test_states_and_tokens_are_taken_apart_by_name() -> None:
    found = [
        f"{source.where}:{node.lineno} {ast.unparse(node)}"
        for source in sources()
        for node in taken_by_position(source.tree)
    ]
    assert found == []
