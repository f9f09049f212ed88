"""A text that everybody has who can run this: what Python's ``help()`` says, topic by topic."""

import json
from pathlib import Path
from pydoc_data import topics

HELD_OUT = ("debugger", "formatstrings", "string-methods")
"""Long ones, of which no other topic repeats a part, as some do."""
FILES = {False: "topics.jsonl", True: "topics-heldout.jsonl"}


def write(folder: Path) -> Path:
    """Write the topics of this Python's version for ``prepare``: a document each, two files of JSON lines in a folder.

    Args:
        folder: made if it does not exist; other files in it stay.

    Returns:
        ``folder``.

    Raises:
        FileExistsError: it is a file.
        ValueError: this Python lacks a topic that is held out.
    """
    found: dict[str, str] = topics.topics
    if missing := [name for name in HELD_OUT if name not in found]:
        raise ValueError(f"Python's help must have the topics {', '.join(HELD_OUT)}. Missing: {', '.join(missing)}")
    folder.mkdir(parents=True, exist_ok=True)
    for heldout, file in FILES.items():
        names = sorted(name for name in found if (name in HELD_OUT) == heldout)
        lines = [json.dumps({"id": name, "text": found[name]}) + "\n" for name in names]
        (folder / file).write_text("".join(lines), encoding="utf-8")
    return folder
