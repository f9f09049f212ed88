"""Weights and states as files (SPEC.md §8): NumPy arrays under canonical names, the same for all backends.

What a file is stands in tensor_files.py. Its ``config`` is a layer's ``spec()``, the config of a state, or those of
several states by their names. Reading checks everything before anything is filled: a bad file changes nothing.

A layer takes part by having the methods of :class:`Layer`.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from fwpkm import registry, validation
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory, State, state_specs
from fwpkm.tensor_files import DAMAGED, FLOATS, Form, Forms, PathLike, Tensors, bad, check_forms, forms_of, read, write
from fwpkm.tokens import Tokens


class Layer(Protocol):
    """What :func:`save` and :func:`load` ask of a layer, whatever its framework."""

    @property
    def config(self) -> FwPKMConfig:
        """The configuration of the layer's memory."""

    def spec(self) -> dict[str, Any]:
        """What a file must agree with, JSON-able: "hidden_size", "gated", "value_norm" and "config", a dict."""

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The canonical names and shapes that the layer exports and expects."""

    def table_dtype(self) -> str:
        """ "float32" or "float64": the widest dtype that the layer's tables can hold."""

    def export_tensors(self, variables: Any = None) -> dict[str, np.ndarray]:
        """Canonical names to float32 or float64 arrays; ``variables`` holds them where the layer itself does not."""

    def import_tensors(self, tensors: dict[str, np.ndarray]) -> Any:
        """Fill the layer and return None, or return new variables (JAX). Names, shapes and dtypes are checked."""


def layer_spec(hidden_size: int, gated: bool, value_norm: str | None, config: FwPKMConfig) -> dict[str, Any]:
    """What :meth:`Layer.spec` returns."""
    fields = dataclasses.asdict(config)
    return {"hidden_size": hidden_size, "gated": gated, "value_norm": value_norm, "config": fields}


def save(path: PathLike, layer: Layer, variables: Any = None) -> None:
    """Write a layer's weights, initial memory included, to ``path`` (SPEC.md §8).

    Args:
        path: the file; one that exists is replaced in one step, or stays as it is when anything fails.
        layer: a layer of any backend (:class:`Layer`).
        variables: the arrays of a layer that does not hold its own (JAX).

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        ValueError: the layer exports other names, shapes or dtypes than it declares.
    """
    check_layer(layer)
    tensors = layer.export_tensors(variables)
    check_forms(path, forms_of(tensors), _layer_forms(layer), "The layer's export_tensors and tensor_shapes disagree.")
    write(path, "layer", layer.spec(), tensors)


def load(path: PathLike, layer: Layer) -> Any:
    """Fill ``layer`` from a file of :func:`save`, once every check has passed (SPEC.md §8).

    Returns:
        None for a layer that holds its weights (torch, Keras), the variables for one that does not (JAX).

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: ``path`` is a folder.
        ValueError: the file is damaged or of another format or kind, or was saved from a layer with another
            ``spec()``; or it holds float64, and the layer's tables are float32.
    """
    check_layer(layer)
    _, tensors = read(path, "layer", lambda _: layer.spec(), lambda *_: _layer_forms(layer))
    check_width(path, layer, tensors)
    return layer.import_tensors(tensors)


def save_state(path: PathLike, state: State, cfg: FwPKMConfig) -> None:
    """Write a state of any backend to ``path``; its dtypes are kept (SPEC.md §5 and §8).

    Args:
        path: the file; one that exists is replaced in one step, or stays as it is when anything fails.
        state: a state for B rows with P = C + L - 1 pending tokens.
        cfg: the config that the state was made with.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        ValueError: the state does not fit ``cfg``.
    """
    write(path, "state", _fields(cfg), _tensors(path, "the state", state, cfg))


def save_states(path: PathLike, states: Mapping[str, State], cfgs: FwPKMConfig | Mapping[str, FwPKMConfig]) -> None:
    """Write the states of a whole model to one file, which holds all of them or none.

    Args:
        path: the file; one that exists is replaced in one step, or stays as it is when anything fails.
        states: at least one state of any backend by a name of the caller's, such as that of its layer.
        cfgs: the config that all were made with, or each one's by the same names.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        ValueError: no state, a state that does not fit its config, or names without a config or without a state.
    """
    check_names("states", states)
    configs = _configs(cfgs, states, "states")
    tensors = [named(name, _tensors(path, f"states[{name!r}]", x, configs[name])) for name, x in states.items()]
    merged = {name: tensor for part in tensors for name, tensor in part.items()}
    write(path, "set of states", {name: _fields(configs[name]) for name in states}, merged)


def load_state(path: PathLike, cfg: FwPKMConfig, backend: Any, device: Any = None) -> State:
    """Read a state of :func:`save_state`, written by any backend (SPEC.md §5 and §8).

    Args:
        path: the file.
        cfg: must equal the config that the state was saved with.
        backend: the backend to build arrays for: a name that :func:`fwpkm.get_backend` knows, or such a module.
        device: where the arrays shall lie: a device of torch, where the position stays on the CPU, or a device or
            sharding of JAX; None leaves them where ``backend.asarray`` makes them.

    The file does not know the weights and the initial memory that the state was written with: beside others it is read
    without a word, so keep them with it.

    Returns:
        The state: the saved bits, in the saved dtypes, as the arrays that ``backend.asarray`` makes.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the backend's framework is not installed.
        IsADirectoryError: ``path`` is a folder.
        ValueError: the file is damaged or of another format or kind, or was saved with another config; or a device that
            the backend does not know.
    """
    validation.check_config(cfg)
    module = _backend(backend, device)
    _, tensors = read(path, "state", lambda _: _fields(cfg), lambda _, forms: state_forms(cfg, forms))
    check_counts(path, "", cfg, tensors, DAMAGED)
    return _native(module, cfg, tensors, device)


def load_states(
    path: PathLike, cfgs: FwPKMConfig | Mapping[str, FwPKMConfig], backend: Any, device: Any = None
) -> dict[str, State]:
    """Read the states of :func:`save_states`, written by any backend, in their order.

    Args:
        path: the file.
        cfgs: the config that all were saved with, or each one's by name: then of all names in the file, and no others.
        backend: the backend to build arrays for: a name that :func:`fwpkm.get_backend` knows, or such a module.
        device: as of :func:`load_state`.

    Returns:
        The states by name: the saved bits, in the saved dtypes.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the backend's framework is not installed.
        IsADirectoryError: ``path`` is a folder.
        ValueError: the file is damaged, of another format or kind, or has other names or configs; or a device that the
            backend does not know.
    """
    module = _backend(backend, device)

    def wanted(saved: dict[str, Any]) -> dict[str, Any]:
        check_saved_names(path, saved)
        return {name: _fields(cfg) for name, cfg in _configs(cfgs, saved, f"{path}: the file's states").items()}

    def expected(saved: dict[str, Any], forms: Forms) -> Forms:
        configs = _configs(cfgs, saved, "")
        return {
            key: form
            for name in saved
            for key, form in named(name, state_forms(configs[name], part_of(forms, name))).items()
        }

    saved, tensors = read(path, "set of states", wanted, expected)
    configs, parts = _configs(cfgs, saved, ""), {name: part_of(tensors, name) for name in saved}
    for name, part in parts.items():
        check_counts(path, f"{name}.", configs[name], part, DAMAGED)
    return {name: _native(module, configs[name], part, device) for name, part in parts.items()}


# --- Several in one file: tensors are named "NAME.FIELD"; fields have other last parts, so no two names meet ---


def check_names(argument: str, by_name: Any) -> None:
    """Raise unless the argument is a dict of at least one thing by texts."""
    if not isinstance(by_name, Mapping) or not by_name:
        received = type(by_name).__name__ if not isinstance(by_name, Mapping) else "none"
        raise ValueError(f"{argument} must be a dict of at least one, by name. Received: {received}")
    for name in by_name:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{argument} must have texts for names, none empty. Received: {name!r}")


def check_saved_names(path: PathLike, saved: dict[str, Any]) -> None:
    """Raise unless what a file says of its states is a config for each name."""
    if not saved or not all(isinstance(fields, dict) for fields in saved.values()):
        raise bad(path, "unreadable metadata 'config'", "a config for each name", repr(saved), DAMAGED)


def named(name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to one name under the keys of a file."""
    return {f"{name}.{part}": x for part, x in parts.items()}


def part_of(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The inverse of :func:`named`; of a name that begins another one, with more than its own."""
    return {key.removeprefix(f"{name}."): x for key, x in found.items() if key.startswith(f"{name}.")}


def _configs(cfgs: Any, names: Mapping[str, Any], of: str) -> dict[str, FwPKMConfig]:
    """A config for each name."""
    if not isinstance(cfgs, Mapping):
        validation.check_config(cfgs)
        return dict.fromkeys(names, cfgs)
    missing, extra = sorted(names.keys() - cfgs.keys()), sorted(cfgs.keys() - names.keys(), key=str)
    if missing or extra:
        raise ValueError(
            f"cfgs must have a config for each of {of}, and no other. Expected: {list(names)}. "
            f"Received: {list(cfgs)}, which lack {missing} and have {extra} beside"
        )
    for cfg in cfgs.values():
        validation.check_config(cfg)
    return {name: cfgs[name] for name in names}


# --- States as tensors ---


def _fields(cfg: FwPKMConfig) -> dict[str, Any]:
    validation.check_config(cfg)
    fields: dict[str, Any] = json.loads(cfg.to_json())
    return fields


def _tensors(path: PathLike, argument: str, state: Any, cfg: FwPKMConfig) -> Tensors:
    """The arrays of a state, once they fit its config."""
    validation.check_is_state(state, argument)
    to_numpy = registry.backend_of(state.memory.values).to_numpy
    tensors = {name: np.asarray(to_numpy(array)) for name, array in state.arrays().items()}
    forms, advice = forms_of(tensors), f"Pass {argument} as apply or flush returned it"
    check_forms(path, forms, state_forms(cfg, forms), f"{advice}, and the config that it was made with.")
    check_counts(path, "", cfg, tensors, f"{advice}.")
    return tensors


def _native(module: Any, cfg: FwPKMConfig, tensors: Tensors, device: Any) -> State:
    names = state_specs(cfg, None).arrays()
    arrays = {name: module.asarray(tensors[name], tensors[name].dtype.name) for name in names}
    memory = Memory(arrays.pop("memory.keys"), arrays.pop("memory.values"))
    state = State(memory, **arrays)
    return state if device is None else module.to_device(state, device)


def _backend(backend: Any, device: Any) -> Any:
    module = registry.get_backend(backend) if isinstance(backend, str) else backend
    if not hasattr(module, "asarray"):
        raise ValueError(f"backend must be the name of one, or such a module. Received: {type(module).__name__}")
    if device is not None and not hasattr(module, "to_device"):
        raise ValueError(
            f"device must be None: {getattr(module, '__name__', module)} does not place states. Received: {device!r}"
        )
    return module


def _layer_forms(layer: Layer) -> Forms:
    return {name: Form(tuple(shape), FLOATS) for name, shape in layer.tensor_shapes().items()}


def state_forms(cfg: FwPKMConfig, found: Forms) -> Forms:
    """What a state must hold; only B and the dtype of all that is floating are taken from what was found."""
    rows = found["position"].shape if "position" in found else ()
    batch = rows[0] if rows and rows[0] else 1
    dtypes = {"float": floats_beside(found, "memory.keys"), "bool": ("bool",), "int32": ("int32",)}
    specs = state_specs(cfg, batch).arrays()
    return {name: Form(spec.shape, dtypes[spec.kind]) for name, spec in specs.items()}


def floats_beside(found: Forms, keys: str) -> tuple[str, ...]:
    """What dtypes the floating arrays beside the keys of this name may have: theirs, where they may have it."""
    dtypes = found[keys].dtypes if keys in found else FLOATS
    return dtypes if set(dtypes) <= set(FLOATS) else FLOATS


_METHODS = ("spec", "tensor_shapes", "table_dtype", "export_tensors", "import_tensors")


def check_width(path: PathLike, layer: Layer, tensors: Tensors) -> None:
    """Raise where the layer would round what the file holds."""
    wide = [name for name, tensor in tensors.items() if tensor.dtype == np.float64]
    if wide and layer.table_dtype() != "float64":
        raise bad(
            path,
            f"{', '.join(wide)} would lose digits",
            "float32, as the layer holds",
            "float64",
            "Make the layer in float64 (torch, Keras, Equinox: dtype; Flax: param_dtype; JAX: jax_enable_x64), or save "
            "it from one in float32.",
        )


def check_layer(layer: Any) -> None:
    """Raise unless a layer's weights say what it computes."""
    if isinstance(layer, type) or not all(hasattr(layer, name) for name in _METHODS):
        raise ValueError(f"layer must be an FwPKM layer of one of the backends. Received: {type(layer).__name__}")
    layer = getattr(layer, "_orig_mod", layer)  # of a layer that torch.compile has wrapped
    replaced = [name for name in ("forward", "call", "apply") if not _is_own(layer, name)]
    if replaced:
        raise ValueError(
            f"layer must compute by its own {replaced[0]}, as a file holds the weights alone: del layer.{replaced[0]} "
            f"brings it back. Received: a {type(layer).__name__} whose {replaced[0]} was replaced"
        )


def _is_own(layer: Any, name: str) -> bool:
    """Whether a method is that of the class, compiled perhaps."""
    method = getattr(layer, "__dict__", {}).get(name)
    method = getattr(method, "_torchdynamo_orig_callable", method)
    own = getattr(type(layer), name, None)
    return method is None or (getattr(method, "__self__", None) is layer and method.__func__ is own)


def check_counts(path: PathLike, prefix: str, cfg: FwPKMConfig, tensors: Tensors, advice: str) -> None:
    """Raise unless rows can stand at the positions that a file holds, with such tokens pending and such uses."""
    position, shared = tensors["position"], cfg.memory_scope != "sequence"  # one clock
    if position.min() < 0 or (shared and position.min() != position.max()):
        expected = "numbers of at least 0" + ", equal in all rows" * shared
        raise bad(path, f"bad {prefix}position", expected, position.tolist(), advice)
    pending = Tokens(*(tensors[f"pending_{name}"] for name in Tokens._fields))
    if problem := validation.wrong_pending(pending):
        field, received = problem
        raise bad(path, f"bad {prefix}{field}", validation.RIGHT_PENDING, received, advice)
    if wrong := validation.wrong_uses(tensors.get("uses")):
        raise bad(path, f"bad {prefix}uses", validation.RIGHT_USES, wrong, advice)
