"""The sample of the matrix that `make test` runs."""

from tests.skipvision.families.matrix import BOTH, FAMILIES, ONLY_EAGER, cases


def of(turn, *, whole=False):
    return {case.values for case in cases(turn, BOTH, FAMILIES) if whole or not case.marks}


def test_every_test_takes_every_family_and_every_family_meets_every_combination():
    turns = [of(turn) for turn in range(4)]
    for sample in turns:
        assert {family for family, _, _ in sample} == set(FAMILIES)
    assert set().union(*turns) == of(0, whole=True)
    assert len(of(0, whole=True)) == 4 * len(FAMILIES) - 2 * len(ONLY_EAGER)
