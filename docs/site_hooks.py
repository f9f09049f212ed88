"""What mkdocs.yml calls while it builds the site: the pages of docs/ read the same on a code host and on the site.

A link of a page may lead out of docs/, to a script, a folder or CONTRIBUTING.md. On a code host it does; the site gets
a page for what such a link names, below source/.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
LEAD = re.compile(r"^(?![-|#>\s]|\d+\. |<)(.+)\n(?=(?:- |\| |\d+\. ))", re.MULTILINE)
"""A line of a paragraph right above a list or a table, which Markdown on the site wants apart."""
MARKED = re.compile(r"(?<=[\u0300-\u036f])_")
"""An underscore behind a letter with a mark, as in p̄_i, which the site would take for emphasis."""
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".md": "markdown", ".yml": "yaml"}


def prose(text: str, change: Callable[[str], str]) -> str:
    """The text, changed outside of its fenced blocks of code."""
    return "".join(part if i % 2 else change(part) for i, part in enumerate(FENCE.split(text)))


def links(text: str) -> Iterator[str]:
    """Where the links of a page lead, without what is on the page itself or in the net."""
    for part in FENCE.split(text)[::2]:
        yield from LINK.findall(part)


def address(path: str) -> str:
    """Where the site has a path of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/") and not (ROOT / path).is_dir():
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def origin(uri: str) -> str:
    """The path of the repository that a page of the site shows."""
    if not uri.startswith("source/"):
        return f"docs/{uri}"
    path = uri.removeprefix("source/").removesuffix("/index.md")
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def contents(path: str) -> str:
    """The Markdown of the page of a file or folder outside docs/."""
    there = ROOT / path
    hidden = "---\nsearch:\n  exclude: true\n---\n\n"
    if there.is_dir():
        names = sorted(f"{x.name}/" if x.is_dir() else x.name for x in there.iterdir() if not x.name.startswith("_"))
        return f"{hidden}# {path}\n\n" + "\n".join(f"- `{name}`" for name in names) + "\n"
    text = there.read_text(encoding="utf-8")
    if there.suffix == ".md":
        return text
    return f"{hidden}# {path}\n\n````{LANGUAGES.get(there.suffix, 'text')}\n{text}````\n"


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every path outside docs/ that pages link to, and for what those pages link to."""
    todo = ["CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(todo)
    while todo:
        path = todo.pop()
        if not (ROOT / path).exists():
            continue  # mkdocs says so where the link stands
        inside = path.startswith("docs/") and not (ROOT / path).is_dir()
        if not inside and path != "README.md":
            files.append(File.generated(config, address(path), content=contents(path)))
        if path.endswith(".md") and path != "README.md":
            text = (ROOT / path).read_text(encoding="utf-8")
            found = {normpath(f"{Path(path).parent.as_posix()}/{link}") for link in links(text)}
            todo += sorted(found - seen)
            seen |= found
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead each link to where the site has what it names, and set lists and tables apart from what introduces them."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        path = normpath(f"{Path(origin(here)).parent.as_posix()}/{match[0]}")
        return relpath(address(path), Path(here).parent.as_posix()) if (ROOT / path).exists() else match[0]

    return prose(markdown, lambda text: MARKED.sub(r"\\_", LEAD.sub(r"\1\n\n", LINK.sub(moved, text))))
