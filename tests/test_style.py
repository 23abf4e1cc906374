"""Rules that the linter does not check: the length of test names and of modules, and that groups of tests are kept."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
#: the collection's own folders: a virtual environment or data beside them is not checked
ROOMS = ("benchmarks", "engine", "images", "models", "reporting", "tests", "tools")


def test_no_test_name_is_longer_than_60_characters():
    texts = [path.read_text() for path in TESTS.rglob("*.py")]
    names = [name for text in texts for name in re.findall(r"def (test_\w+)", text)]
    assert names
    assert [name for name in names if len(name) > 60] == []


def test_no_module_is_longer_than_400_lines():
    modules = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in modules}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@pytest.mark.xdist_group("kept")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_groups_of_tests_are_kept_together(request):
    """Some releases of pytest and pytest-xdist ignore groups, and what their tests share is made again and again."""
    assert request.node.nodeid.endswith("@kept")
