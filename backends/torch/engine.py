"""What runs a call: plain PyTorch, the Triton kernels, or the kernels as an operator that torch.compile keeps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from fwpkm.backends.torch.column_parallel import is_sharded
from fwpkm.backends.torch.context import check_transforms
from fwpkm.config import FwPKMConfig
from fwpkm.containers import Memory

_P = ParamSpec("_P")
_R = TypeVar("_R")
Engine = Literal["eager", "triton", "compiled"]


def choose_engine(
    implementation: str | None, cfg: FwPKMConfig, memory: Memory, query: Tensor, cu_seqlens: Tensor | None = None
) -> Engine:
    """The engine of a call with these tables and queries; "compiled" only while torch.compile traces it.

    What is traced is taken to lie on a device that the kernels know. A graph holds no packed call of many sequences:
    their lengths are not known, and each would be padded to all tokens; and none with a table in columns, about which
    ranks tell each other what the host must know.

    Raises:
        ValueError: ``implementation`` is unknown, or "triton" and the kernels cannot serve the call.
    """
    if implementation not in (None, "triton", "eager"):
        raise ValueError(f'implementation must be None, "triton" or "eager". Received: {implementation!r}')
    if implementation == "eager" or (implementation is None and query.device.type != "cuda"):
        return "eager"
    if is_sharded(memory.values):  # the kernels see the columns of one rank
        cfg = dataclasses.replace(cfg, value_dim=memory.values.to_local().shape[-1])
    engine: Engine
    if torch.compiler.is_compiling():
        from fwpkm.kernels import served, support

        reason = served.why_unsupported_config(cfg) or support.why_unsupported_tensors(memory, query)
        held = cu_seqlens is None or cu_seqlens.shape[0] - 1 <= served.MOST_PADDING
        engine = "compiled" if query.shape[1] and held and not is_sharded(memory.values) else "eager"
    else:
        from fwpkm import kernels

        reason, engine = kernels.why_unsupported(cfg, memory, query, cu_seqlens), "triton"
    if implementation == "triton" and reason is not None:
        raise ValueError(f'implementation="triton" cannot serve this call: {reason}')
    return engine if reason is None else "eager"


def outside_graphs(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let torch.compile run ``fn`` as it is, between its graphs.

    The schedule decides in Python how many chunks a call writes, so tracing would compile anew for every position.
    The check comes first because merely naming ``disable`` imports the compiler, which takes seconds.
    """
    untraced: dict[str, Callable[_P, _R]] = {}  # made once: a new object each time would compile anew each time

    @functools.wraps(fn)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.compiler.is_compiling():
            check_transforms()
            return fn(*args, **kwargs)
        if "fn" not in untraced:
            untraced["fn"] = torch.compiler.disable(fn)
        return untraced["fn"](*args, **kwargs)

    return call
