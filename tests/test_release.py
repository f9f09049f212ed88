"""What a release holds together: version, changelog, the versions that it is tested with, and how it is published."""

import re
import tomllib

import pytest
from sources import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lowest() -> dict[str, str]:
    """What pyproject.toml takes at least, by package."""
    requirements = [
        *PROJECT["dependencies"],
        *(r for extra in PROJECT["optional-dependencies"].values() for r in extra),
    ]
    return {found[1]: found[2] for found in map(re.compile(r"([\w-]+)>=([\d.]+)").match, requirements) if found}


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def numbers(version: str) -> list[int]:
    found = [int(part) for part in version.split(".")]
    return found + [0] * (4 - len(found))


def test_changelog_and_citation_have_the_version():
    version = PROJECT["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[([^]]+)\]", changelog, re.MULTILINE)
    assert version == next(section for section in sections if section != "Unreleased")
    assert re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_oldest_versions_are_the_lowest_that_are_taken():
    bounds, oldest = lowest(), pins("constraints-oldest.txt")
    # They check or build, whatever their version.
    tools = {"build", "mypy", "ruff", "twine", "tensorflow", "mkdocs-material", "mkdocstrings-python"}
    # It asks for a newer safetensors; make test-oldest installs it later, without what its tests take besides. These
    # three ask for a newer JAX; two of them it installs last.
    apart = {"transformers", "accelerate", "peft", "cloudpickle", "flax", "equinox", "jax-triton"}
    assert oldest.keys() - {"jaxlib"} == bounds.keys() - tools - apart
    for name, version in oldest.items():
        assert numbers(version) == numbers(bounds.get(name, bounds["jax"])), name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"transformers=={bounds['transformers']}.0 " in makefile.replace("\n", " ")
    assert f"flax=={bounds['flax']} equinox=={bounds['equinox']}.0 " in makefile


def test_tested_versions_are_taken():
    bounds, tested = lowest(), pins("constraints.txt")
    for name, version in tested.items():
        assert numbers(version) >= numbers(bounds.get(name, "0")), name


def test_publishing_needs_no_token():
    workflow = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    build, publish = workflow.split("\n  publish:\n")
    assert "id-token: write" in publish
    assert "id-token" not in build
    assert "environment: pypi" in publish
    assert "twine check --strict" in build
    assert not re.search(r"secrets\.|password|api-token", workflow)


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"].keys() - {"test", "docs"}))
def test_every_extra_is_installed_by_itself(extra):
    (line,) = re.findall(r"set -- (none .*)$", (ROOT / ".ci/installs").read_text(encoding="utf-8"), re.MULTILINE)
    assert extra in line.split()
