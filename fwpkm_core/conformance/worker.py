"""The process that runs one backend: ``python -m fwpkm.conformance.worker NAME FOLDER``.

Reads FOLDER/passages.json and writes FOLDER/NUMBER.npz for each. Says what it did on standard output, one JSON object a
line: {"ready": true} or {"cannot_run": reason}, then for each passage its number and the error it raised, or null.
Whatever the backend prints goes to standard error. ``python -m`` puts the current folder on the path, so that a module
that lies there can be judged.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from fwpkm.conformance import exchange, results
from fwpkm.conformance.contestants import CannotRunError, load


def main(name: str, folder: Path) -> int:
    """Run every passage; returns 0, also where some of them raised."""
    report = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    passages = exchange.load_passages(folder / "passages.json")
    try:
        be = load(name, passages[0].case.dtype)
    except CannotRunError as error:
        print(json.dumps({"cannot_run": str(error)}), file=report)
        return 0
    print(json.dumps({"ready": True}), file=report)
    for passage in passages:
        complaint = None
        try:
            exchange.save_result(folder / f"{passage.number}.npz", results.run(be, passage))
        except Exception as raised:
            complaint = "".join(traceback.format_exception_only(raised)).strip()
            traceback.print_exc()
        print(json.dumps({"number": passage.number, "error": complaint}), file=report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
