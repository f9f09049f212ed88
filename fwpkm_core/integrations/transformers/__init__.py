"""Memory in causal language models of Hugging Face transformers (5.17 to 5.24): training, saving, ``generate``.

Import it before a model with memory is loaded: without it transformers reports the memories' weights as unexpected and
loads the bare model.
"""

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "fwpkm.integrations.transformers needs transformers. Install it with: pip install 'fwpkm[transformers]'",
        name="transformers",
    ) from error

try:
    from fwpkm.integrations.transformers import loading
    from fwpkm.integrations.transformers.cache import MemoryCache
    from fwpkm.integrations.transformers.model import MemoryLayer, insert_memory
    from fwpkm.integrations.transformers.starting import cache_from_states
except ImportError as error:
    if not (error.name or "").startswith("transformers."):
        raise
    raise ImportError(
        f"fwpkm.integrations.transformers needs transformers 5.17 to 5.24. Here is {transformers.__version__}: {error}",
        name=error.name,
    ) from error

__all__ = ["MemoryCache", "MemoryLayer", "cache_from_states", "insert_memory"]


def __dir__() -> list[str]:
    return __all__


loading.install()
