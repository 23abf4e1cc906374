"""Published rows of networks with shared filter bases."""

import pytest

from reporting import published

ROWS = published.published_rows("shared-basis")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.dataset}-{row.row}")
def test_a_published_row_is_our_count_or_listed_as_different(row):
    params, _, flops = row.count()
    printed = {"params": (params, row.params), "flops": (flops, row.flops)}
    wrong = [name for name, (count, text) in printed.items() if text and not published.agrees(count, text)]
    assert wrong == row.disagrees.split()
    assert row.note or not wrong
