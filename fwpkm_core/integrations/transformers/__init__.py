"""Memory in causal language models of Hugging Face transformers (5.17 to 5.24): training, saving, ``generate``.

Import it before a model with memory is loaded: without it transformers reports the memories' weights as unexpected and
loads the bare model.
"""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "fwpkm.integrations.transformers needs transformers. Install it with: pip install 'fwpkm[transformers]'",
        name="transformers",
    ) from error

from fwpkm.integrations.transformers import loading
from fwpkm.integrations.transformers.cache import MemoryCache
from fwpkm.integrations.transformers.model import MemoryLayer, insert_memory

__all__ = ["MemoryCache", "MemoryLayer", "insert_memory"]

loading.install()
