"""The Keras backend. Keras runs on one framework per process, so tests/keras_suite runs once under each of three."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "keras_suite"
FRAMEWORKS = ("tensorflow", "jax", "torch")


def start(framework, *arguments):
    """A process in which Keras runs on ``framework``."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
    environment = os.environ | {"KERAS_BACKEND": framework, "JAX_ENABLE_X64": "1"} | quiet
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.fixture(scope="module")
def suites():
    """Starts the suite of a framework, and the others beside it where there is a core for each."""
    running = {}

    def suite(framework):
        for name in FRAMEWORKS if os.cpu_count() > len(FRAMEWORKS) else [framework]:
            if name not in running:
                running[name] = start(name, "-m", "pytest", "-p", "no:cacheprovider", str(SUITE))
        return running[framework]

    yield suite
    for process in running.values():
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_keras_suite(framework, suites):
    """A framework that is missing fails it: a skip would hide it."""
    process = suites(framework)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert " passed" in output


def test_another_framework_is_refused_by_name():
    code = "import fwpkm\nfwpkm.get_backend('keras')"
    process = start("numpy", "-c", code)
    output, _ = process.communicate(timeout=120)
    assert process.returncode
    assert "ImportError: the 'keras' backend runs on Keras with 'tensorflow', 'jax', 'torch'" in output
    assert "Received: keras.backend.backend()='numpy'" in output
