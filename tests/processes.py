"""Python in a process of its own."""

import os
import subprocess
import sys
from subprocess import CompletedProcess
from typing import Any


def python(*arguments: Any, cwd: Any = None, timeout: float = 300, **variables: str) -> CompletedProcess[str]:
    """What a process with these arguments, and these variables of the environment too, printed and ended with."""
    line = [sys.executable, *map(str, arguments)]
    environment = os.environ | variables
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=environment)
