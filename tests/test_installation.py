"""``fwpkm backends``: what metadata tells at once, and what --check finds by running one call of each part."""

import io
import json
import os
import resource
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
from processes import python

import fwpkm
from fwpkm import cli
from fwpkm.installation import checking, found, listing
from fwpkm.installation.checking import Answer
from fwpkm.installation.found import Status

FRAMEWORKS = ("torch", "jax", "keras", "tensorflow", "triton", "transformers", "matplotlib", "rich", "hypothesis")


@pytest.fixture(autouse=True)
def _forget():
    """What is installed does not change while a process runs, but in these tests it does."""
    yield
    found.version_of.cache_clear()
    found._ranges.cache_clear()


# From metadata


def test_backends_imports_nothing_and_takes_less_than_a_second(tmp_path):
    code = f"""
import sys
from fwpkm.cli import main
main(["backends"])
main(["backends", "--json"])
print([name for name in {FRAMEWORKS} if name in sys.modules], file=sys.stderr)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python("-W", "error", "-c", code, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr == "[]\n"
    # Of the processor: tests share theirs with others.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_every_part_is_listed_with_its_versions(capsys):
    assert cli.main(["backends"]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    named = {line.split()[0]: line for line in printed.splitlines() if line and line[0].islower()}
    others = ["triton", "jax-triton", "nnx", "equinox", "transformers", "demo", "conform"]
    assert list(named)[1:] == [*fwpkm.backend_names(), *others]
    assert named["fwpkm"].startswith(f"fwpkm {fwpkm.__version__}, Python {sys.version.split()[0]} on ")
    for line, package in (("torch", "torch"), ("jax", "jax"), ("demo", "rich"), ("triton", "triton")):
        assert f"{package} {metadata.version(package)}" in named[line]
    assert "tensorflow 2." in named["keras"] or "KERAS_BACKEND" in named["keras"]  # installed as tensorflow-cpu
    assert "--check" in printed.splitlines()[-1]


def test_backend_status_is_that_of_the_backends():
    status = {status.name: status for status in fwpkm.backend_status()}
    assert tuple(status) == fwpkm.backend_names()
    assert status["numpy"] == Status("numpy", {"numpy": metadata.version("numpy")}, "", "")


def test_hidden_framework_is_listed_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["backends"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["torch"] == "torch         torch not installed: pip install 'fwpkm[torch]'"
    assert "torch not installed: pip install 'fwpkm[conform]'" in lines["conform"]
    assert "not installed" not in lines["numpy"]


def test_a_folder_of_a_frameworks_name_is_none(tmp_path, monkeypatch):
    (tmp_path / "nosuchframework").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert found.version_of("nosuchframework") == ""
    (tmp_path / "nosuchframework" / "__init__.py").write_text("raise AssertionError('imported')")
    found.version_of.cache_clear()
    assert found.version_of("nosuchframework") == found.UNKNOWN


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.7.1+cpu", ">=2.8,<3"), ("3.0.0", ">=2.8,<3"), ("2.8.0", ""), ("2.8", ""), ("2.10.0.dev1", "")],
)
def test_versions_out_of_range_are_told(version, expected, monkeypatch):
    wanted = ["numpy>=1.26", 'torch>=2.8,<3; extra == "torch"', 'fwpkm[torch]; extra == "all"']
    monkeypatch.setattr(found.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(found, "version_of", lambda name: version if name == "torch" else "9.9")
    found._ranges.cache_clear()
    reason = next(status.reason for status in found.backend_status() if status.name == "torch")
    assert bool(reason) == bool(expected)
    if expected:
        assert expected in reason
        assert f"torch {version}, needed is" in reason
        assert "pip install 'fwpkm[torch]'" in reason


# Keras's framework


@pytest.mark.parametrize(
    ("variable", "content", "expected"),
    [
        ("jax", '{"backend": "torch"}', ("jax", "KERAS_BACKEND")),
        ("", '{"backend": "torch"}', ("torch", "keras.json")),
        (None, '{"floatx": "float32"}', ("tensorflow", "default")),
        (None, "{", ("tensorflow", "default")),
        (None, "[]", ("tensorflow", "default")),
        (None, None, ("tensorflow", "default")),
    ],
)
def test_keras_framework_is_what_keras_would_take(variable, content, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    if variable is not None:
        monkeypatch.setenv("KERAS_BACKEND", variable)
    if content is not None:
        (tmp_path / "keras.json").write_text(content)
    name, source = found.keras_framework()
    assert name == expected[0]
    assert expected[1] in source


@pytest.mark.parametrize(
    ("framework", "expected"),
    [
        ("openvino", "KERAS_BACKEND names 'openvino'; this layer serves tensorflow, jax, torch"),
        ("jax", "jax, which KERAS_BACKEND names, is not installed: pip install 'fwpkm[jax]', or set KERAS_BACKEND"),
        ("tensorflow", ""),
    ],
)
def test_keras_without_its_framework_says_what_to_do(framework, expected, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", framework)
    monkeypatch.setattr(found, "version_of", lambda name: "" if name == "jax" else "9.9")
    status = next(status for status in found.backend_status() if status.name == "keras")
    assert status.reason.startswith(expected)
    assert bool(status.reason) == bool(expected)
    if not expected:
        assert status.packages["tensorflow"] == "9.9"
        assert status.note == "on tensorflow, which KERAS_BACKEND names"


# --check


def stand_in(tmp_path, monkeypatch, source: str) -> None:
    """A package named jax that comes before the real one."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))))


def test_one_call_of_numpy_and_torch_is_right(capfd):
    for name in ("numpy", "torch"):
        answer = checking.check(name)
        assert answer.error == ""
        assert answer.device.startswith(("cpu", "cuda"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise ImportError('libcuda.so: cannot open\\nshared object')", "libcuda.so: cannot open shared object"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "its process ended by SIGSEGV"),
        ("import os, sys\nprint('out of luck', file=sys.stderr, flush=True)\nos._exit(3)", "status 3: out of luck"),
        ("import time\ntime.sleep(60)", "no answer in 2 s"),
    ],
)
def test_a_broken_framework_is_one_line(source, expected, tmp_path, monkeypatch, capfd):
    stand_in(tmp_path, monkeypatch, f"print('noise')\nimport sys\nprint('more', file=sys.stderr)\n{source}")
    answer = checking.check("jax", patience=2 if "sleep" in source else checking.PATIENCE)
    assert expected in answer.error
    assert "\n" not in answer.error
    assert "noise" not in answer.error
    assert answer.device == ""
    assert capfd.readouterr() == ("", "")


def test_wrong_numbers_are_an_error():
    right = fwpkm.reference

    def off(*arguments):
        output, state, trace = right.apply(*arguments)
        return output * 1.001, state, trace

    assert checking._backend("numpy", right) == "cpu"
    with pytest.raises(ArithmeticError, match=r"outputs of numpy are 1\.0e-03 off"):
        checking._backend("numpy", SimpleNamespace(**vars(right) | {"apply": off}))


def test_each_line_is_printed_when_its_part_has_answered(monkeypatch, capsys):
    asked, raw = [], io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8"))

    def check(name):
        printed = raw.getvalue().decode()  # what has left the process's buffers
        assert not asked or asked[-1] in printed
        asked.append(name)
        return Answer("", "it broke", 1.0) if name == "torch" else Answer("cpu", "", 1.0)

    monkeypatch.setattr(listing, "check", check)
    monkeypatch.setattr(listing, "other_status", lambda: (Status("demo", {}, "rich not installed: pip", ""),))
    assert cli.main(["backends", "--check"]) == 1
    assert [name for name in asked if name != "keras"] == ["numpy", "torch", "jax"]  # what is missing is not tried
    assert raw.getvalue().decode().splitlines()[-1] == "demo          rich not installed: pip"
    monkeypatch.undo()
    monkeypatch.setattr(listing, "check", lambda name: Answer("cpu", "", 1.25))
    assert cli.main(["backends", "--check"]) == 0
    assert f"torch         ok on cpu (1.2 s; torch {metadata.version('torch')})" in capsys.readouterr().out


def test_backends_as_json(monkeypatch, capsys):
    monkeypatch.setattr(listing, "check", lambda name: Answer("", "it broke", 1.0))
    assert cli.main(["backends", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert cli.main(["backends", "--json", "--check"]) == 1
    checked = json.loads(capsys.readouterr().out)
    assert list(plain) == ["fwpkm", "python", "platform", "backends", "others"]
    assert [entry["name"] for entry in plain["backends"]] == list(fwpkm.backend_names())
    for entry in plain["backends"] + plain["others"]:
        assert list(entry) == ["name", "packages", "reason", "note", "check"]
        assert entry["check"] is None
    assert checked["backends"][0]["check"] == {"ok": False, "device": "", "error": "it broke", "seconds": 1.0}
