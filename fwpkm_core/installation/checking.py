"""``fwpkm backends --check``: import each part in a process of its own and let it compute one call.

``python -m fwpkm.installation.checking NAME`` is that process. It writes one JSON object to standard output; what
frameworks print goes to standard error, of which the command shows the last line where a process gave no answer.
"""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from typing import Any, NamedTuple

import numpy as np

from fwpkm import reference
from fwpkm.agreement import BOUNDS, relative_error
from fwpkm.config import FwPKMConfig
from fwpkm.registry import get_backend

PATIENCE = 300
"""Seconds that a framework may take to import, compile and answer."""
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "NONE", "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
_CONFIG = FwPKMConfig(key_dim=16, value_dim=16, num_subkeys=4, top_k=2, chunk_size=4)


class Answer(NamedTuple):
    """What became of one call."""

    device: str
    """Where it ran, or "" where it did not."""
    error: str
    """Why there is no right answer, in one line, or ""."""
    seconds: float
    """Of the whole process, its imports and compilations included."""


def check(name: str, patience: float = PATIENCE) -> Answer:
    """Let the part of this name compute one call in a process of its own, and hold what it gives to the reference.

    Args:
        name: a backend's name, "triton", "jax-triton", "nnx", "equinox", "transformers", "demo" or "conform".
        patience: seconds after which a process that says nothing is ended.
    """
    begin = time.perf_counter()
    # With -P no file in the user's current folder is taken for a framework.
    line = [sys.executable, "-P", "-m", "fwpkm.installation.checking", name]
    try:
        done = subprocess.run(
            line, capture_output=True, stdin=subprocess.DEVNULL, timeout=patience, env=os.environ | _QUIET
        )
    except subprocess.TimeoutExpired:
        return Answer("", f"no answer in {patience:g} s", patience)
    seconds = time.perf_counter() - begin
    try:
        found = json.loads(done.stdout)
        return Answer(found["device"], found["error"], seconds)
    except ValueError:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it printed nothing"]
        return Answer("", f"its process ended by {_ending(done.returncode)}: {said[-1]}", seconds)


def _ending(status: int) -> str:
    try:
        return signal.Signals(-status).name if status < 0 else f"status {status}"
    except ValueError:
        return f"signal {-status}"


# --- In the process ---


def main(name: str) -> int:
    """Compute one call and print what came of it; returns 0, also where it failed."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a framework prints is no answer
    device = error = ""
    try:
        device = _others()[name]() if name in _others() else _backend(name, get_backend(name))
    except Exception as raised:
        error = " ".join("".join(traceback.format_exception_only(raised)).split())
    answers.write(json.dumps({"device": device, "error": error}))
    answers.close()
    return 0


def _others() -> dict[str, Any]:
    jax_modules = {name: functools.partial(_jax_module, name) for name in ("nnx", "equinox")}
    kernels = {"triton": _triton, "jax-triton": _jax_triton}
    return {**kernels, **jax_modules, "transformers": _transformers, "demo": _demo, "conform": _conform}


def _backend(name: str, be: Any, **options: Any) -> str:
    """Where a backend ran two chunks.

    Raises:
        ArithmeticError: its outputs are not those of the reference.
    """
    rng = np.random.default_rng(0)
    query, value = (rng.standard_normal((2, 9, 16)).astype(np.float32) for _ in range(2))
    memory = reference.init_memory(_CONFIG, memories=1, seed=0)
    wide = [array.astype(np.float64) for array in memory]
    state = reference.init_state(_CONFIG, type(memory)(*wide), batch_size=2)
    expected, _, _ = reference.apply(_CONFIG, state, query.astype(np.float64), value.astype(np.float64))
    here = type(memory)(*(be.asarray(array, "float32") for array in memory))
    state = be.init_state(_CONFIG, here, batch_size=2)
    output, _, _ = be.apply(_CONFIG, state, be.asarray(query, "float32"), be.asarray(value, "float32"), **options)
    error = relative_error(be.to_numpy(output), expected)
    if not error <= BOUNDS["float32"].forward:
        raise ArithmeticError(f"the outputs of {name} are {error:.1e} off the reference's, in relative error")
    return be.device_name()


def _jax_module(name: str) -> str:
    """Let a module of Flax NNX or Equinox read a few tokens; raises ArithmeticError unless what it gives is finite."""
    jax = importlib.import_module("jax")
    layer = importlib.import_module(f"fwpkm.integrations.{name}").FwPKM
    key = jax.random.key(0)
    drawn = {"rngs": importlib.import_module("flax.nnx").Rngs(key)} if name == "nnx" else {"key": key}
    y, _ = layer(8, _CONFIG, **drawn)(np.random.default_rng(0).standard_normal((2, 9, 8)).astype(np.float32))
    if not np.isfinite(np.asarray(y)).all():
        raise ArithmeticError(f"the outputs of {name} are not finite")
    return get_backend("jax").device_name()


def _triton() -> str:
    from fwpkm.conformance.contestants import load

    torch = importlib.import_module("torch")
    if torch.version.hip:
        raise RuntimeError("the kernels serve NVIDIA GPUs; on AMD ones the torch backend computes without them")
    if torch.cuda.is_available():
        return _backend("triton", load("triton", "float32"))
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    return f"{_backend('triton', load('triton', 'float32'))}, in Triton's interpreter"


def _jax_triton() -> str:
    from fwpkm.conformance.contestants import load

    kernels = load("jax-triton", "float32")
    where = _backend("jax-triton", kernels)
    return f"{where}, in Triton's interpreter" if "TRITON_INTERPRET" in os.environ else where


def _transformers() -> str:
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    joined = importlib.import_module("fwpkm.integrations.transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, **sizes)).eval()
    tokens = torch.arange(9)[None]
    before = model(tokens).logits
    joined.insert_memory(model, layers=(0,), config=_CONFIG)
    after = model(tokens).logits
    if not torch.equal(before, after):
        raise ArithmeticError("a model with an untrained memory does not give what it gave without")
    return str(after.device)


def _demo() -> str:
    import tempfile
    from pathlib import Path

    from fwpkm.demo import command

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text("it was the best of times, it was the worst of times", encoding="utf-8")
        command.run([str(path)], "numpy", passes=2, num_subkeys=16, chunk_size=4, out=folder)
    return "cpu"


def _conform() -> str:
    from fwpkm.conformance import require_extra

    require_extra()
    from fwpkm.conformance.command import run

    if run(["numpy"], cases=1):
        raise ArithmeticError("one drawn case breaks a bound")
    return "cpu"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
