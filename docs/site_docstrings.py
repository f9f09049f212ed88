"""What mkdocs.yml has docstrings pass through: names become links, and functions get what their Protocol says.

The functions of the backends are documented once, on ``fwpkm.protocol``; a backend's own docstring has a line, and what
only it does. The reference shows both.
"""

import re
from pathlib import Path
from typing import Any

from griffe import Docstring, Extension, Function, Kind, Object, Parameter, Parameters

ROLE = re.compile(r":\w+:`~?(fwpkm\.)?([\w.]+)`")
SECTION = re.compile(r"SPEC\.md (§(\d+))")
HEADINGS = re.findall(
    r"^## (\d+)\. (.+)$", Path(__file__).with_name("SPEC.md").read_text(encoding="utf-8"), re.MULTILINE
)


def anchor(number: str) -> str:
    """The anchor of a section of SPEC.md."""
    title = dict(HEADINGS)[number]
    return "-".join(re.sub(r"[^\w\s-]", "", f"{number} {title}".lower()).split())


def linked(text: str) -> str:
    """Names of the package and sections of the specification as links of the site."""

    def role(match: re.Match[str]) -> str:
        prefix, name = match.groups()
        return f"[`{name}`][fwpkm.{name}]" if prefix else f"`{name}`"

    return SECTION.sub(lambda match: f"[SPEC.md {match[1]}][{anchor(match[2])}]", ROLE.sub(role, text))


class Docstrings(Extension):
    """The extension that mkdocs.yml names."""

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        """Complete the functions of every backend, then link all docstrings."""
        contract: dict[str, Function] = {}
        for name in ("Backend", "DifferentiableBackend"):
            contract |= pkg["protocol"][name].functions
        for name in ("torch", "jax", "keras"):
            backend = pkg["backends"][name]
            for function in contract.keys() & set(backend.exports):
                complete(backend, function, contract[function])
        for name in contract.keys() & pkg["reference"].functions.keys():
            complete(pkg["reference"], name, contract[name])
        link(pkg, set())


def parts(text: str) -> dict[str, str]:
    """A docstring by section; what stands before the first is ""."""
    intro, *rest = re.split(r"^(Args|Returns|Raises):\n", text, flags=re.MULTILINE)
    return {"": intro.strip(), **dict(zip(rest[::2], (body.rstrip() for body in rest[1::2])))}


def merged(own: str, stated: str) -> str:
    """What a backend's function says, then what holds everywhere, section by section."""
    ours, theirs = parts(own), parts(stated)
    intro = [ours[""], theirs[""]] if ours[""].rstrip(".") not in theirs[""] else [theirs[""]]
    text = "\n\n".join(filter(None, intro))
    for section in ("Args", "Returns", "Raises"):
        bodies = [theirs.get(section), ours.get(section) if section == "Raises" or section not in theirs else None]
        if any(bodies):
            text += f"\n\n{section}:\n" + "\n".join(filter(None, bodies))
    return text


def complete(backend: Any, name: str, stated: Function) -> None:
    """Give a backend's function what the Protocol states; where it has none of its own, a copy of that."""
    own = backend[name]
    own = own.final_target if own.is_alias else own
    if own.kind is not Kind.FUNCTION:  # Keras takes the functions of the framework that it runs on
        parameters = [p for p in stated.parameters if p.name != "self"]
        own = Function(name, parameters=Parameters(*map(copied, parameters)), returns=stated.returns, parent=backend)
        backend.set_member(name, own)
    said = own.docstring.value if own.docstring else ""
    if "Args:" not in said:
        text, like = merged(said, stated.docstring.value), stated.docstring
        own.docstring = Docstring(text, parent=own, parser=like.parser, parser_options=like.parser_options)


def copied(parameter: Parameter) -> Parameter:
    """A parameter that another function may own."""
    return Parameter(parameter.name, annotation=parameter.annotation, kind=parameter.kind, default=parameter.default)


def link(parent: Object, seen: set[int]) -> None:
    """Link the docstrings of an object and of all in it, once."""
    if id(parent) in seen:
        return
    seen.add(id(parent))
    if parent.docstring:
        parent.docstring.value = linked(parent.docstring.value)
    for member in parent.members.values():
        if not member.is_alias:
            link(member, seen)
