"""Every registered network keeps every promise: a new one is found in the registry, and cannot escape."""

import pytest

from tests.models import cases, checks


def pairs(networks, promises, *marks):
    """All checks of a network one after the other in one process, because they share it."""
    return [
        pytest.param(case, check, id=f"{case}-{check.__name__}", marks=[pytest.mark.xdist_group(f"{case}"), *marks])
        for case in networks
        for check in promises
    ]


#: of names that differ in their depth only, the smallest is for quick runs
SMALLEST = [case.entry for case in cases.small_cases()]
SHALLOW = [case for case in cases.every_case() if case.entry in SMALLEST]
DEEP = [case for case in cases.every_case() if case.entry not in SMALLEST]


@pytest.mark.parametrize(
    ("case", "check"), pairs(SHALLOW, checks.ON_META) + pairs(DEEP, checks.ON_META, pytest.mark.exhaustive)
)
def test_a_network_keeps_its_promises(case, check):
    check(case)


#: and of those with one objective
QUICK, FURTHER = cases.quick_and_further(cases.small_cases())


@pytest.mark.parametrize(
    ("case", "check"),
    pairs(QUICK, checks.WITH_VALUES) + pairs(FURTHER, checks.WITH_VALUES, pytest.mark.exhaustive),
)
def test_a_network_computes_what_it_promises(case, check):
    check(case)
