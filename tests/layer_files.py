"""A layer and a state to put into files, and what files hold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from fwpkm import FwPKMConfig, Memory, State, reference

CFG = FwPKMConfig(key_dim=4, value_dim=3, num_heads=2, num_subkeys=3, top_k=2, chunk_size=4, lookahead=1)

Tensors = dict[str, np.ndarray]
Metadata = dict[str, str]


class FakeLayer:
    """A layer written to fwpkm.files.Layer that keeps its arrays in a dict and counts its imports."""

    def __init__(self, seed: int = 0, *, hidden_size: int = 5, config: FwPKMConfig = CFG, dtype: str = "float32"):
        draw = np.random.default_rng(seed).standard_normal
        self.config, self.hidden_size, self.imports = config, hidden_size, 0
        self.tensors = {name: draw(shape).astype(dtype) for name, shape in self.tensor_shapes().items()}

    def spec(self) -> dict[str, Any]:
        config = json.loads(self.config.to_json())
        return {"hidden_size": self.hidden_size, "gated": True, "value_norm": "zscore", "config": config}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "query_proj.weight": (8, self.hidden_size),
            "query_proj.bias": (8,),
            "memory.keys": (2, 2, 3, 2),
            "memory.values": (9, 3),
        }

    def table_dtype(self) -> str:
        return "float64"

    def export_tensors(self, variables: Tensors | None = None) -> Tensors:
        return self.tensors if variables is None else variables

    def import_tensors(self, tensors: Tensors) -> None:
        self.imports += 1
        self.tensors = tensors


def same_bits(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


def arrays(state: State, be: Any = reference) -> Tensors:
    fields = {name.removeprefix("memory."): array for name, array in state.arrays().items()}
    return {name: np.asarray(be.to_numpy(array)) for name, array in fields.items()}


def half_read_state(be: Any = reference, cfg: FwPKMConfig = CFG, tokens: int = 7, dtype: str = "float32") -> State:
    """Two rows that have read some tokens, the third of them masked in the first row."""
    memory = Memory(*(be.asarray(be.to_numpy(x), dtype) for x in be.init_memory(cfg, 1, seed=3)))
    draw = np.random.default_rng(4).standard_normal
    query = be.asarray(draw((2, tokens, cfg.num_heads * cfg.key_dim)), dtype)
    value = be.asarray(draw((2, tokens, cfg.value_dim)), dtype)
    mask = np.ones((2, tokens), bool)
    mask[0, 2:3] = False
    return be.apply(cfg, be.init_state(cfg, memory, 2), query, value, mask=be.asarray(mask, "bool"))[1]


def contents(path: Path) -> tuple[Tensors, Metadata]:
    with safetensors.safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
