"""The sample of the matrix that `make test` runs."""

from tests.skipvision.families.matrix import BOTH, COMBINATIONS, FAMILIES, ONLY_EAGER, PRIORITY, cases


def of(turn, *, whole=False, halved=False):
    return {case.values for case in cases(turn, BOTH, FAMILIES, halved=halved) if whole or not case.marks}


def test_every_test_takes_every_family_and_every_family_meets_every_combination():
    turns = [of(turn) for turn in range(4)]
    for sample in turns:
        assert {family for family, _, _ in sample} == set(FAMILIES)
    assert set().union(*turns) == of(0, whole=True)
    assert len(of(0, whole=True)) == 4 * len(FAMILIES) - 2 * len(ONLY_EAGER)


def test_a_halved_test_takes_every_combination_and_the_most_used_families():
    half = of(0, halved=True)
    families = {family for family, _, _ in half}
    assert families >= PRIORITY
    assert abs(len(families - PRIORITY) - len(set(FAMILIES) - PRIORITY) / 2) <= len(COMBINATIONS)
    assert {(attention, dtype) for _, attention, dtype in half} == set(COMBINATIONS)
    assert of(0, whole=True, halved=True) == of(0, whole=True)
