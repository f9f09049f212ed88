"""The numbers of a fresh memory, drawn once by NumPy so that every backend starts from the same ones (SPEC.md §7)."""

import numpy as np

from fwpkm.config import FwPKMConfig
from fwpkm.validation import check_config, check_count


def initial_arrays(cfg: FwPKMConfig, memories: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys ``[M, H, 2, S, Dk/2]`` uniform in ±1/√Dk and values ``[M, N, Dv]`` normal with std 1/√Dv, float32.

    Raises:
        ValueError: ``memories`` is not an integer of at least 1, or ``seed`` none of at least 0.
    """
    check_config(cfg)
    check_count("memories", memories)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0. Received: seed={seed!r}")
    rng = np.random.default_rng(seed)
    keys = rng.random((memories, cfg.num_heads, 2, cfg.num_subkeys, cfg.key_dim // 2), np.float32)
    keys = (2 * keys - 1) * np.float32(cfg.key_dim**-0.5)
    values = rng.standard_normal((memories, cfg.num_slots, cfg.value_dim), np.float32)
    values *= np.float32(cfg.value_dim**-0.5)
    return keys, values
