"""Who imports whom: no framework unless asked for, and every missing one explained (each claim in a fresh process)."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import python
from sources import SRC, Source, core, sources

import fwpkm

FRAMEWORKS = {"torch", "jax", "jaxlib", "flax", "equinox", "tensorflow", "keras", "transformers", "triton"}
SHOW = {"matplotlib", "rich"}
DRAW = {"hypothesis"}
JOINED = {
    "transformers/": {"torch", "transformers"}, "nnx.py": {"flax", "jax"}, "equinox.py": {"equinox", "jax"},
    "distributed.py": {"torch"},
}  # fmt: skip
"""What each of the integrations may import."""

# Refuses, and remembers, every attempt to import what must not be imported, installed or not.
FORBID = f"""
import sys
class Forbid:
    tried = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FRAMEWORKS | SHOW | DRAW}:
            self.tried.append(name)
forbid = Forbid()
sys.meta_path.insert(0, forbid)
"""


def run(code: str, tmp_path: Path) -> str:
    """The output of a fresh process, outside the source tree, in which a warning is an error."""
    done = python("-W", "error", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Importing


@pytest.mark.parametrize("module", ["fwpkm", "fwpkm.reference", "fwpkm.cli", "fwpkm.demo.command"])
def test_importing_the_core_tries_no_framework(tmp_path: Path, module: str) -> None:
    """The command line and the demo's entry too: what draws and prints is imported when it runs."""
    code = f"{FORBID}\nimport {module}\nprint(forbid.tried)"
    assert run(code, tmp_path) == "[]\n"


def test_the_numpy_backend_needs_no_framework(tmp_path: Path) -> None:
    code = f"""{FORBID}
import fwpkm
be = fwpkm.get_backend("numpy")
assert be is fwpkm.reference
cfg = fwpkm.FwPKMConfig(key_dim=4, value_dim=3, num_subkeys=3, top_k=2, chunk_size=4)
state = be.init_state(cfg, be.init_memory(cfg), batch_size=2)
query, value = be.asarray([[[1, 2, 3, 4]] * 5] * 2, "float32"), be.asarray([[[1, 2, 3]] * 5] * 2, "float32")
out, state, trace = be.apply(cfg, state, query, value)
print(out.shape, int(trace.writes[0]), forbid.tried)
"""
    assert run(code, tmp_path) == "(2, 5, 3) 1 []\n"


def test_the_forbidding_finder_sees_imports(tmp_path: Path) -> None:
    code = f"{FORBID}\ntry:\n    import jax.numpy\nexcept ImportError:\n    pass\nprint(forbid.tried[0])"
    assert run(code, tmp_path) == "jax\n"


# get_backend


@pytest.mark.parametrize("name", ["", "pytorch", "Torch", "fwpkm", "torch.nn"])
def test_unknown_backend(name: str) -> None:
    with pytest.raises(ValueError, match=r"'numpy', 'torch', 'jax', 'keras'\. Received: " + repr(name)):
        fwpkm.get_backend(name)


def test_backend_names() -> None:
    assert fwpkm.backend_names() == ("numpy", "torch", "jax", "keras")


def test_a_hidden_framework_names_its_extra_and_spares_the_rest(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None
import fwpkm
try:
    fwpkm.get_backend("torch")
except ImportError as error:
    assert error.name == "torch"
    print(error)
fwpkm.get_backend("numpy").init_memory(fwpkm.FwPKMConfig(num_subkeys=8, top_k=2))
status = {s.name: s for s in fwpkm.backend_status()}
assert status["numpy"].packages and not status["numpy"].reason
assert not status["torch"].packages and "fwpkm[torch]" in status["torch"].reason
"""
    text = run(code, tmp_path)
    assert "the 'torch' backend needs torch" in text
    assert "fwpkm[torch]" in text


# A folder with a stand-in for backends/torch goes before the real one on the package's path.
STAND_IN = """
import fwpkm.backends
fwpkm.backends.__path__.insert(0, "standin")
try:
    fwpkm.get_backend("torch")
except BaseException as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import einops_is_missing", "ModuleNotFoundError No module named 'einops_is_missing'"),
        ("from fwpkm.config import missing", "ImportError cannot import name 'missing' from 'fwpkm.config'"),
        ("import torchvision_is_missing", "ModuleNotFoundError No module named 'torchvision_is_missing'"),
        ("from . import missing", "ImportError cannot import name 'missing' from partially initialized module 'fwpkm."),
        ("raise OSError('libtorch.so: cannot open')", "OSError libtorch.so: cannot open"),
        ("raise ImportError('no name')", "ImportError no name"),
        ("1 / 0", "ZeroDivisionError division by zero"),
        (
            "import sys, types\nsys.modules['torch'] = types.ModuleType('torch')\nfrom torch import missing",
            "ImportError cannot import name 'missing' from 'torch'",
        ),
    ],
)
def test_a_broken_backend_is_not_taken_for_a_missing_framework(tmp_path: Path, source: str, expected: str) -> None:
    package = tmp_path / "standin" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source)
    output = run(STAND_IN, tmp_path)
    assert output.startswith(expected)
    assert "fwpkm[torch]" not in output


# What the sources say


class Import(NamedTuple):
    """One name that a file imports."""

    module: str
    lazy: bool
    """Inside a function."""
    where: str


def imports(source: Source) -> Iterator[Import]:
    """Every import that a file can run, relative ones resolved; ``from a import b`` counts as a.b."""
    functions = [node for node in ast.walk(source.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for_types = [
        node for node in ast.walk(source.tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    never = {id(inner) for node in for_types for inner in ast.walk(node)}
    for node in ast.walk(source.tree):
        if id(node) in never:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = source.package.split(".")
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(name, id(node) in inside, f"{source.where}:{node.lineno}")


def imports_of(package: str) -> list[Import]:
    """The imports of a package's files; of the core without the packages that other folders hold."""
    return [found for source in (core() if package == "fwpkm" else sources(package)) for found in imports(source)]


def is_of(name: str, *packages: str) -> bool:
    return any((name + ".").startswith(package + ".") for package in packages)


def test_core_imports_only_the_standard_library_numpy_and_safetensors() -> None:
    allowed = sys.stdlib_module_names | {"numpy", "safetensors", "fwpkm"}
    found = imports_of("fwpkm")
    assert len(found) > 20
    for name, _, where in found:
        extra = SHOW if where.startswith(("fwpkm/demo/", "fwpkm/cli.py:")) else set()
        extra = DRAW | {"rich"} if where.startswith("fwpkm/conformance/") else extra
        extra = next((JOINED[part] for part in JOINED if where.startswith(f"fwpkm/integrations/{part}")), extra)
        assert name.partition(".")[0] in allowed | extra, (where, name)


def test_core_imports_neither_backends_nor_kernels() -> None:
    """What joins other libraries stands on a backend, and nothing in the core imports it."""
    for name, _, where in imports_of("fwpkm"):
        joins = where.startswith("fwpkm/integrations/")
        assert joins or not is_of(name, "fwpkm.backends", "fwpkm.integrations"), where
        assert not is_of(name, "fwpkm.kernels"), where


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_backend_imports_its_framework_and_no_other_backend(framework: str) -> None:
    package = f"fwpkm.backends.{framework}"
    allowed = sys.stdlib_module_names | {"numpy", "fwpkm", framework}
    found = imports_of(package)
    assert found, f"no sources of {package}"
    for name, _, where in found:
        assert name.partition(".")[0] in allowed, (where, name)
        assert not is_of(name, "fwpkm.backends") or is_of(name, package), (where, name)


def test_the_keras_backend_imports_keras_and_tensorflow_only_lazily() -> None:
    """Native backends are imported by name, for the framework that Keras runs on."""
    package = "fwpkm.backends.keras"
    found = imports_of(package)
    assert found
    for name, lazy, where in found:
        assert name.partition(".")[0] in sys.stdlib_module_names | {"numpy", "fwpkm", "keras", "tensorflow"}, where
        assert lazy or not is_of(name, "tensorflow"), where
        assert not is_of(name, "fwpkm.backends") or is_of(name, package), (where, name)


def test_only_torch_and_jax_import_kernels_and_only_when_they_run_them() -> None:
    for name, lazy, where in imports_of("fwpkm.backends"):
        if is_of(name, "fwpkm.kernels"):
            assert lazy, where
            assert where.startswith(("fwpkm/backends/torch/", "fwpkm/backends/jax/")), where


def test_listing_launches_needs_no_torch(tmp_path: Path) -> None:
    """Nor does saying what the kernels serve: JAX runs the same lists, where nobody may have torch."""
    code = """
import sys
sys.modules["torch"] = None
import fwpkm
from fwpkm.kernels import left_align, served
from fwpkm.kernels.runtime import call, decoding, windows
cfg = fwpkm.FwPKMConfig(num_subkeys=8, top_k=2, chunk_size=4)
one = windows.Call(cfg, windows.plan(cfg, 0, 9, 1, True), "float32", 1, True)
step = decoding.decode_call(cfg, 1, 1)
lists = *call.forward_launches(one, None)[2:], decoding.decode_launches(step), left_align.left_over_launches(cfg, 1, 9)
print(served.why_unsupported_config(cfg), all(part.launches for part in lists))
"""
    assert run(code, tmp_path) == "None True\n"


def test_kernels_import_core_torch_and_triton() -> None:
    allowed = sys.stdlib_module_names | {"fwpkm", "torch", "triton"}
    for name, _, where in imports_of("fwpkm.kernels"):
        assert name.partition(".")[0] in allowed, (where, name)
        assert not is_of(name, "fwpkm.backends", "fwpkm.reference", "fwpkm.equations"), (where, name)


def test_the_reference_shares_no_code_with_a_backend() -> None:
    """Agreement between them proves something only then. What both may use is arithmetic-free."""
    for name, _, where in imports_of("fwpkm.backends"):
        assert not is_of(name, "fwpkm.reference", "fwpkm.equations"), (where, name)


def test_every_package_folder_is_shipped() -> None:
    """Links make one package of three folders; setuptools finds the packages that have an ``__init__.py``."""
    links = {SRC / "fwpkm": "../fwpkm_core"}
    links |= {SRC / "fwpkm" / name: f"../{name}" for name in ("backends", "kernels")}
    for link, target in links.items():
        if link.is_symlink():  # an sdist holds the folders themselves
            assert str(link.readlink()) == target
    folders = {source.path.parent for source in sources()}
    assert {SRC / "fwpkm", SRC / "fwpkm/backends/torch", SRC / "fwpkm/kernels"} <= folders
    assert {folder for folder in folders if not (folder / "__init__.py").is_file()} == set()


def test_no_folder_of_a_clone_hides_the_package(tmp_path: Path) -> None:
    """A folder named fwpkm in the current folder, as a clone's parent has, is no package."""
    (tmp_path / "fwpkm").mkdir()
    assert Path(run("import fwpkm; print(fwpkm.__file__)", tmp_path).strip()).is_file()
