"""Makes ``examples`` importable without the root on the path, where ``kernels`` would shadow another package."""

import importlib.machinery
import importlib.util
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]

if "examples" not in sys.modules:
    _spec = importlib.machinery.ModuleSpec("examples", None, is_package=True)
    _spec.submodule_search_locations = [str(ROOT / "examples")]
    sys.modules["examples"] = importlib.util.module_from_spec(_spec)
