"""What a user finds by completion, and what is said of a name that does not exist."""

import importlib
import rlcompleter

import pytest
from processes import python

import fwpkm
from fwpkm import FwPKMConfig

PUBLIC = (
    *(
        "fwpkm",
        "fwpkm.backends",
        "fwpkm.backends.jax",
        "fwpkm.backends.torch",
        "fwpkm.diagnostics",
        "fwpkm.integrations",
    ),
    *("fwpkm.integrations.equinox", "fwpkm.integrations.nnx", "fwpkm.integrations.transformers", "fwpkm.kernels"),
    "fwpkm.reference",
)


def completed(text):
    """What Python's own prompt offers behind a text."""
    completer = rlcompleter.Completer({"fwpkm": fwpkm})
    return {name.rstrip("()") for i in range(99) if (name := completer.complete(text, i))}


@pytest.mark.parametrize("name", PUBLIC)
def test_completion_shows_public_names_only_and_all_of_them_exist(name):
    module = importlib.import_module(name)
    shown = set(dir(module))
    assert set(module.__all__) <= shown
    assert not {x for x in shown if x.startswith("_")} - {"__version__"}
    assert shown - set(module.__all__) <= {"backends", "integrations"}
    for x in shown - {"keras"}:  # which brings TensorFlow into this process
        owner = getattr(getattr(module, x), "__module__", "fwpkm")
        assert owner.startswith("fwpkm")


def test_layers_and_backends_are_found_from_the_package():
    assert {"fwpkm.FwPKM", "fwpkm.FwPKMConfig"} == completed("fwpkm.Fw")
    assert "fwpkm.backends" in completed("fwpkm.b")
    assert completed("fwpkm._v") == set()
    assert "fwpkm.backends.torch.FwPKM" in completed("fwpkm.backends.torch.F")
    assert {"fwpkm.integrations.nnx", "fwpkm.integrations.equinox"} <= completed("fwpkm.integrations.")


def test_looking_imports_no_framework_and_offers_none_that_is_missing():
    code = """
import sys
sys.modules["jax"] = None
import fwpkm
print(dir(fwpkm), dir(fwpkm.backends), dir(fwpkm.integrations), fwpkm.FwPKM)
print(sorted({"torch", "keras", "flax", "equinox", "transformers"} & sys.modules.keys()))
try:
    fwpkm.backends.jax
except ImportError as error:
    print(error)
"""
    done = python("-c", code)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "'backends'" in lines[0]
    assert "['keras', 'torch']" in lines[0]
    assert lines[1] == "[]"
    assert "fwpkm[jax]" in lines[2]


def test_a_layer_by_the_name_of_its_framework():
    layer = fwpkm.FwPKM("torch", 8, num_subkeys=8)
    assert type(layer) is fwpkm.backends.torch.FwPKM
    assert (layer.hidden_size, layer.config.num_subkeys) == (8, 8)
    assert type(fwpkm.FwPKM("jax", 8)) is fwpkm.backends.jax.FwPKM


@pytest.mark.parametrize("backend", ["numpy", "pytorch", 64, None, ["torch"]])
def test_a_layer_without_a_framework_says_where_layers_are(backend):
    with pytest.raises(ValueError, match=r"one of 'torch', 'jax', 'keras': .* fwpkm\.backends\.torch\.FwPKM\(64\)"):
        fwpkm.FwPKM(backend, 64)


@pytest.mark.parametrize("module", [fwpkm, fwpkm.backends, fwpkm.integrations])
def test_a_name_that_does_not_exist(module):
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'mxnet'"):
        module.mxnet  # noqa: B018
    assert not hasattr(module, "__path_hooks__")


# Arguments


def layer_of(kind, **fields):
    if kind == "config":
        return FwPKMConfig(**fields)
    if kind == "nnx":
        from flax import nnx

        return fwpkm.integrations.nnx.FwPKM(8, **fields, rngs=nnx.Rngs(0))
    if kind == "equinox":
        return fwpkm.integrations.equinox.FwPKM(8, **fields, key=None)
    return fwpkm.FwPKM(kind, 8, **fields)


@pytest.mark.parametrize("kind", ["config", "torch", "jax", "nnx", "equinox"])
@pytest.mark.parametrize(
    ("name", "meant"), [("num_subkey", "num_subkeys"), ("n_heads", "num_heads"), ("chunksize", "chunk_size")]
)
def test_an_unknown_argument_names_the_one_that_was_meant(kind, name, meant):
    with pytest.raises(TypeError, match=rf"takes no argument '{name}'. Did you mean {meant}\?"):
        layer_of(kind, **{name: 4})


@pytest.mark.parametrize("kind", ["config", "torch", "jax", "nnx", "equinox"])
def test_an_argument_like_none_lists_them_all(kind):
    with pytest.raises(TypeError, match=r"takes no argument 'zzz'. It takes key_dim, value_dim, .*memory_scope"):
        layer_of(kind, zzz=4)


def test_a_flag_of_the_layer_is_meant_too():
    with pytest.raises(TypeError, match=r"Did you mean learn_memory\?"):
        layer_of("torch", learned_memory=True)
