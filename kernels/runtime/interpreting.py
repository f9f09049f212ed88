"""Triton's interpreter, for computers without a GPU: what its versions do otherwise than its compiler."""

from typing import Any

from triton.runtime import interpreter


def keep_truths() -> None:
    """Let a comparison of two numbers stay a truth value where the interpreter makes a block of it.

    It gives the result the type of what was compared, and since Triton 3.9 refuses the integers that come of it as a
    mask: "mask has unsupported dtype". Its compiler makes an i1 of it, in every version.
    """
    builder: Any = interpreter.InterpreterBuilder
    splat = builder.create_splat

    def create_splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        block = splat(self, ret_ty, arg)
        is_truth = arg.data.dtype.kind == "b"
        return interpreter.TensorHandle(block.data.astype(bool), interpreter.tl.int1) if is_truth else block

    builder.create_splat = create_splat
