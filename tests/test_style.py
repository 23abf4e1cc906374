"""Rules that the linter does not check: lengths of names and modules, encodings, and that groups of tests are kept."""

import ast
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


def test_texts_are_read_and_written_in_an_encoding_that_is_named():
    """Otherwise it is that of the user's language settings, which may lack the letters in a table or in a name."""
    modules = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    calls = [
        (f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), ast.unparse(node))
        for path in modules
        if TESTS not in path.parents
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    texts = [call for call in calls if re.search(r"^open$|\.(read|write)_text$", call[1])]
    assert len(texts) > 10
    assert [where for where, _, text in texts if not re.search(r"encoding=|'[rwax]?b[+]?'", text)] == []


@pytest.mark.xdist_group("kept")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_groups_of_tests_are_kept_together(request):
    """Some releases of pytest and pytest-xdist ignore groups, and what their tests share is made again and again."""
    assert request.node.nodeid.endswith("@kept")
