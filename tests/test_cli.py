"""The command line: help, the list of backends, and one clear line for every mistake."""

import subprocess
import sys

import pytest
from processes import python

import fwpkm
from fwpkm import cli
from fwpkm.demo import command, recall


def fail(capsys, *arguments: str) -> str:
    """The one line that a failing command prints."""
    assert cli.main(arguments) == 2
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert errors.startswith("fwpkm: error: ")
    assert errors.count("\n") == 1
    return errors


@pytest.fixture
def novel(tmp_path) -> str:
    path = tmp_path / "novel.txt"
    path.write_text("it was the best of times, it was the worst of times")
    return str(path)


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["backends", "--help"], ["--version"]])
def test_help_goes_to_standard_output(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert "fwpkm" in printed
    for option in ("--backend", "--passes", "--num-subkeys", "--chunk-size", "--out"):
        assert (option in printed) == (arguments[0] == "demo")


@pytest.mark.parametrize("name", ["demo", "doctor", "inspect", "conform", "vectors", "backends"])
def test_help_names_no_page_that_a_wheel_lacks(name, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    assert "docs/" not in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version_is_that_of_the_package(option, capsys):
    with pytest.raises(SystemExit):
        cli.main([option])
    assert capsys.readouterr().out == f"fwpkm {fwpkm.__version__}\n"


def test_python_m_is_the_command(tmp_path):
    done = python("-m", "fwpkm", "demo", "--speed", "9", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fwpkm: error: unrecognized arguments: --speed (see fwpkm --help)\n"


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "COMMAND"),
        (["dream"], "unknown command 'dream': did you mean demo?"),
        (["backend", "--json"], "unknown command 'backend': did you mean backends?"),
        (["xyz"], "unknown command 'xyz': expected one of demo, doctor, inspect, conform, vectors, backends"),
        (["doctor", "no/such"], "fwpkm: error: no/such: no such file\n"),
        (["inspect", "no/such"], "fwpkm: error: no/such: no such file\n"),
        (
            ["doctor", "/dev/null"],
            "fwpkm: error: /dev/null: is a device, pipe or socket. Expected a file of fwpkm.save",
        ),
        (["demo", "--speed", "9"], "--speed"),
        (["demo", "--pass", "9"], "--pass"),
        (["demo", "--passes", "0"], "--passes: must be an integer of at least 1. Received: '0'"),
        (["demo", "--passes", "many"], "--passes: must be an integer of at least 1. Received: 'many'"),
        (["demo", "--passes", "1.5"], "--passes"),
        (["demo", "--num-subkeys", "15"], "--num-subkeys: must be an integer of at least 16 and at most 2048"),
        (["demo", "--num-subkeys", "4096"], "--num-subkeys: must be an integer of at least 16 and at most 2048"),
        (["demo", "--chunk-size", "1"], "--chunk-size: must be an integer of at least 2. Received: '1'"),
        (["demo", "--backend", "tinygrad"], "--backend: must be one of numpy, torch, jax, keras. Received: 'tinygrad'"),
        (["demo", "--backend", ""], "--backend: must be one of"),
        (["backends", "torch"], "unrecognized arguments: torch"),
        (["conform", "--json", "--markdown"], "--markdown and --json exclude each other"),
    ],
)
def test_wrong_arguments_are_named(arguments, expected, capsys):
    assert expected in fail(capsys, *arguments)


def test_limits_of_the_options_are_those_of_the_memory():
    assert recall.config(recall.TOP_K, 2).top_k == recall.TOP_K
    with pytest.raises(ValueError, match="top_k"):
        recall.config(recall.TOP_K - 1, 2)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "no such file"), (b"", "is empty"), (b"\0", "binary"), (b"\xff", "UTF-8"), (b"one", "2 different tokens")],
)
def test_unreadable_files_are_named(content, expected, tmp_path, capsys):
    path = tmp_path / "file.txt"
    if content is not None:
        path.write_bytes(content)
    errors = fail(capsys, "demo", str(path), "--out", str(tmp_path / "out"))
    assert str(path) in errors
    assert expected in errors
    assert not (tmp_path / "out").exists()


def test_second_file_is_checked_too(novel, tmp_path, capsys):
    assert "is a directory" in fail(capsys, "demo", novel, str(tmp_path))


def test_a_line_break_in_a_name_stays_one_line(capsys):
    fail(capsys, "demo", "no\nsuch\nfile")


def test_folder_that_cannot_be_written_is_named(novel, capsys):
    for out in (novel, f"{novel}/deeper", "/dev/null/out", "a\0b"):
        assert f"--out {out}: is not a folder" in fail(capsys, "demo", novel, "--backend", "numpy", "--out", out)


@pytest.mark.parametrize("package", ["matplotlib", "rich"])
def test_missing_extra_is_named_before_the_work(package, novel, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(command, "Trial", None)
    errors = fail(capsys, "demo", novel, "--backend", "numpy", "--out", str(tmp_path / "out"))
    assert package in errors
    assert "pip install 'fwpkm[demo]'" in errors
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_one_line(novel, tmp_path, capsys, monkeypatch):
    def allocate(*arguments):
        raise MemoryError

    monkeypatch.setattr(command, "Trial", allocate)
    assert "--num-subkeys" in fail(capsys, "demo", novel, "--backend", "numpy", "--out", str(tmp_path))


def test_interruption_is_one_line(novel, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "Trial", interrupt)
    assert cli.main(["demo", novel, "--backend", "numpy", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "fwpkm: error: interrupted\n"


# Where a framework is missing, or a terminal poor


def without_torch(tmp_path, *arguments: str):
    code = f"import sys; sys.modules['torch'] = None; from fwpkm.cli import main; sys.exit(main({arguments}))"
    return python("-c", code, cwd=tmp_path)


def test_hidden_framework_is_one_line_in_the_demo(novel, tmp_path):
    done = without_torch(tmp_path, "demo", novel, "--backend", "torch")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install 'fwpkm[torch]'" in done.stderr
    assert not (tmp_path / "fwpkm-demo").exists()


def test_default_backend_is_numpy_where_torch_is_missing(novel, tmp_path):
    done = without_torch(tmp_path, "demo", novel, "--num-subkeys", "16", "--passes", "1")
    assert done.returncode == 0, done.stderr
    assert "numpy on cpu" in done.stdout
    assert (tmp_path / "fwpkm-demo" / "recall.png").exists()


def test_a_reader_that_leaves_the_pipe_is_no_error(tmp_path):
    line = f"{sys.executable} -u -m fwpkm backends | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.stderr == ""


def test_letters_that_the_terminal_lacks_are_escaped(tmp_path):
    (tmp_path / "文.txt").write_text("one two one two")
    line = [sys.executable, "-m", "fwpkm", "demo", "文.txt", "--backend", "numpy", "--num-subkeys", "16"]
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "HOME": str(tmp_path), "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run(line, capture_output=True, timeout=120, cwd=tmp_path, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert rb"\u6587.txt" in done.stdout
