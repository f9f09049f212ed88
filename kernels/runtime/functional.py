"""A kernel as a function of arrays: which of its tensors it writes, and itself with outputs behind its inputs.

For frameworks that pass no tensor twice and take none that is overwritten unasked.
"""

import ast
import functools
import inspect
import textwrap
import types
from typing import Any

from triton.runtime import JITFunction


@functools.cache
def written(kernel: Any) -> frozenset[str]:
    """The parameters into which a kernel, or a function that it calls, may store.

    An address is a parameter plus numbers, or what a function makes of its first argument, so the leftmost name of the
    expression tells whose it is.
    """
    function = _definition(inspect.getsource(kernel.fn)).body[0]
    nodes: list[Any] = [node for node in ast.walk(function) if hasattr(node, "lineno")]
    origins = {argument.arg: argument.arg for argument in function.args.args}  # type: ignore[attr-defined]

    def origin(node: ast.AST) -> str:
        while isinstance(node, (ast.BinOp, ast.Call)):
            node = node.left if isinstance(node, ast.BinOp) else (node.args or [node.func])[0]
        return origins.get(node.id, "") if isinstance(node, ast.Name) else ""

    found = set()
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            origins[node.targets[0].id] = origin(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr.startswith(("store", "atomic_")):
                found.add(origin(node.args[0]))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            callee = kernel.fn.__globals__.get(node.func.id)
            if hasattr(callee, "fn"):
                passed = dict(zip(inspect.signature(callee.fn).parameters, node.args))
                found |= {origin(passed[name]) for name in written(callee) if name in passed}
    return frozenset(found - {""})


def _definition(source: str) -> ast.Module:
    return ast.parse(textwrap.dedent(source))


class Reordered(JITFunction):
    """A kernel whose parameters stand in another order, and others among them that it does not use."""

    def __init__(self, kernel: Any, parameters: tuple[str, ...], wide: tuple[str, ...] = ()) -> None:
        """``parameters``: all of the kernel's, and others; addresses of 64-bit integers are ``wide`` in any case."""
        own, self.wide = inspect.signature(kernel.fn).parameters, wide
        twin = types.FunctionType(kernel.fn.__code__, kernel.fn.__globals__, kernel.fn.__name__)
        twin.__qualname__, more = f"{kernel.fn.__qualname__}_of_arrays", inspect.Parameter.POSITIONAL_OR_KEYWORD
        twin.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [own[name] if name in own else inspect.Parameter(name, more) for name in parameters]
        )
        super().__init__(twin, do_not_specialize=getattr(kernel, "do_not_specialize", None))
        # Of the same source, but another function; the order is not in the source.
        self.hash = f"{kernel.cache_key} {' '.join(parameters)} {' '.join(wide)}"

    def parse(self) -> ast.Module:
        """The kernel's own body behind these parameters."""
        tree = super().parse()
        function = tree.body[0]
        given = {argument.arg: argument for argument in function.args.args}
        function.args.args = [ast.copy_location(given.get(name, ast.arg(name)), function) for name in self.arg_names]
        for name in self.wide:
            cast = _definition(f"{name} = {name}.to(tl.pointer_type(tl.int64), bitcast=True)").body[0]
            function.body.insert(1, ast.fix_missing_locations(ast.copy_location(cast, function)))
        return tree
