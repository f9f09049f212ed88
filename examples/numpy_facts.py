"""Write a few facts into a memory, read them back, put the half-read sequence away and take it up again.

python examples/numpy_facts.py [--backend numpy]
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

import fwpkm

FACTS = {"Paris": "France", "Lima": "Peru", "Oslo": "Norway", "Quito": "Ecuador", "Hanoi": "Vietnam", "Accra": "Ghana"}


def main() -> None:
    """Print each capital with the country that the memory finds for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="numpy", choices=fwpkm.backend_names())
    be = fwpkm.get_backend(parser.parse_args().backend)
    rng = np.random.default_rng(0)
    capitals, countries = list(FACTS), list(FACTS.values())
    codes = rng.standard_normal((len(countries), 32))
    query = be.asarray(rng.standard_normal((1, len(capitals), 64)), "float32")
    value = be.asarray(codes[None], "float32")

    # lookahead=0 binds each query to the value of its own token; one chunk holds all facts.
    cfg = fwpkm.FwPKMConfig(
        key_dim=64, value_dim=32, num_subkeys=64, chunk_size=len(FACTS), lookahead=0, write_scale="normalized"
    )
    state = be.init_state(cfg, be.init_memory(cfg), batch_size=1)
    _, state, trace = be.apply(cfg, state, query, value)
    print(f"read {len(FACTS)} facts, wrote {int(trace.writes[0])} chunk")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "facts.safetensors")
        fwpkm.save_state(path, state, cfg)
        state = fwpkm.load_state(path, cfg, be)

    found, _, _ = be.apply(cfg, state, query, value, update=False)
    distance = np.linalg.norm(be.to_numpy(found)[0, :, None] - codes, axis=-1)
    for capital, nearest in zip(capitals, distance.argmin(-1)):
        print(f"{capital} -> {countries[nearest]}")
    right = sum(FACTS[c] == countries[i] for c, i in zip(capitals, distance.argmin(-1)))
    print(f"{right} of {len(FACTS)} right")


if __name__ == "__main__":
    main()
