"""``fwpkm inspect``: one self-contained HTML page of a recording; its template is page.html."""

import html
import importlib.resources
import json
import math
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from fwpkm.diagnostics.history import History, Norms, Slots, Tokens, read_history
from fwpkm.diagnostics.record import Recording, open_recording

NAME = "memory.html"


def write_page(recording: str | os.PathLike[str], folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the page of a recording into a folder, which is made where it is missing.

    Returns:
        the path of the page, ``folder``/memory.html.

    Raises:
        FileExistsError: the page is there already, and ``overwrite`` is False.
        OSError: the recording cannot be read, or the folder not be written.
        ValueError: no recording, a damaged one, or one that holds no call.
    """
    target = Path(folder) / NAME
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target}: exists already; it may be replaced with overwrite=True")
    page = render(open_recording(recording))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".fwpkm-{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return target


def render(recording: Recording) -> str:
    """The page.

    Raises:
        ValueError: the recording is damaged, or holds no call.
    """
    history = read_history(recording.config, recording.entries())
    if not history.calls:
        raise ValueError(f"{recording.path}: a recording that holds no call: nothing was read while it was written")
    name = os.path.basename(recording.path)
    # As ASCII, and without "<", no text of a token can end the element that holds it.
    data = json.dumps(_data(name, recording, history), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = importlib.resources.files("fwpkm.diagnostics").joinpath("page.html").read_text(encoding="utf-8")
    before, after = template.split("{{data}}")
    title = html.escape(name.encode("utf-8", "replace").decode())
    return before.replace("{{title}}", title) + data + after


def _data(name: str, recording: Recording, history: History) -> dict[str, Any]:
    """What the page's script reads."""
    cfg = recording.config
    return {
        "name": name,
        "config": json.loads(cfg.to_json()),
        "calls": history.calls,
        "chunks": history.chunks,
        "cut": recording.cut,
        "rows": [_row(tokens) for tokens in history.rows],
        "memories": [_memory(slots, norms) for slots, norms in zip(history.memories, history.norms)],
    }


def _row(tokens: Tokens) -> dict[str, Any]:
    gate = None if tokens.gate is None else [_number(g, 3) for g in tokens.gate]
    return {
        "count": len(tokens.live),
        "text": tokens.text,
        "gate": gate,
        "dead": np.flatnonzero(~tokens.live).tolist(),
    }


def _memory(slots: Slots, norms: Norms | None) -> dict[str, Any]:
    return {
        "slots": slots.slot.tolist(),
        "writers": slots.writers.tolist(),
        "chunks": slots.chunks.tolist(),
        "recent": [[(row, number, _number(weight, 3)) for row, number, weight in found] for found in slots.recent],
        "norm": None if norms is None else [_number(x, 4) for x in norms.last[slots.slot]],
        "norms": None
        if norms is None
        else {"tokens": norms.tokens, "quantiles": [[_number(x, 4) for x in row] for row in norms.quantiles]},
    }


def _number(x: float, digits: int) -> float | None:
    """A number with so many digits, or None where it is not finite, which JSON lacks."""
    return float(f"{x:.{digits}g}") if math.isfinite(x) else None
