"""Every registered network keeps every promise: a new one is found in the registry, and cannot escape."""

import pytest

from tests.models import cases, checks


def pairs(networks, promises):
    """All checks of a network one after the other in one process, because they share it."""
    return [
        pytest.param(case, check, id=f"{case}-{check.__name__}", marks=pytest.mark.xdist_group(f"{case}"))
        for case in networks
        for check in promises
    ]


@pytest.mark.parametrize(("case", "check"), pairs(cases.every_case(), checks.ON_META))
def test_a_network_keeps_its_promises(case, check):
    check(case)


@pytest.mark.parametrize(("case", "check"), pairs(cases.small_cases(), checks.WITH_VALUES))
def test_a_network_computes_what_it_promises(case, check):
    check(case)
