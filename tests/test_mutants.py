"""The judge is judged: conform catches every wrong backend of tests/mutants; `-s` prints what gave each away."""

import pytest
from mutants import build, graphs, table, wrappers

from fwpkm.conformance import judging, results
from fwpkm.conformance.drawing import drawer

SEEDS = (0, 1, 2)
CASES = 30
MUTANTS = [*table.LINES, *graphs.GRADIENTS, *wrappers.FUNCTIONS]


@pytest.fixture(scope="module", params=SEEDS)
def passages(request):
    """What a short run of ``fwpkm conform`` tries; gradients come in its first and third ten."""
    expected = [
        (passage, judging.expect_unmoved(passage)) for passage in map(drawer(request.param, "float32"), range(CASES))
    ]
    kept = {passage.number: (passage, right) for passage, right in expected if right is not None}
    assert len(kept) >= CASES - 1, "one in fifty may be set aside"
    return kept


def broken(be, passage, expected):
    """The quantities of one passage that break their bounds."""
    found = judging.errors(passage.case.cfg, results.run(be, passage), expected)
    return {quantity for quantity, error in found if not error <= judging.bound(quantity, "float32")}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The module of a mutant, made once."""
    folder, modules = tmp_path_factory.mktemp("mutants"), {}

    def get(mutant):
        if mutant.name not in modules:
            modules[mutant.name] = mutant.load(folder)
        return modules[mutant.name]

    return get


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught(mutant, loaded, passages):
    be, found = loaded(mutant), {}
    for number, (passage, expected) in passages.items():
        for quantity in broken(be, passage, expected):
            found.setdefault(quantity, number)
        if mutant.caught_by in found:
            break
    print(f"\n{mutant.name}: " + (", ".join(f"{name} (case {at})" for name, at in found.items()) or "nothing"), end="")
    assert mutant.caught_by in found


RIGHT = [
    build.Mutant("right copy", "reference.py", "return np.asarray(x)", "return np.asarray(x)", ""),
    build.Wrapper("right wrapper", graphs.backend, "", graphs.by_window(graphs.right)),
]


@pytest.mark.parametrize("right", RIGHT, ids=lambda right: right.name)
def test_right_copies_pass(right, loaded, passages):
    """So what gives a mutant away is its line, not the copying."""
    for passage, expected in passages.values():
        assert not broken(loaded(right), passage, expected)


def test_there_are_twelve_and_each_is_another():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 12
