"""``fwpkm conform``: any backend judged by the reference, on the cases that the tests draw (SPEC.md §6).

Needs the extra ``fwpkm[conform]``; nothing else in the package imports these modules before the command runs.
"""

import importlib


def require_extra() -> None:
    """Raise ImportError, naming the extra, unless what draws, derives and prints can be imported."""
    for package in ("hypothesis", "rich", "torch"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"conform needs {package}, which could not be imported ({error}). "
                f"Install it with: pip install 'fwpkm[conform]'",
                name=error.name,
            ) from error
