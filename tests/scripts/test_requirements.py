"""requirements.lock pins what requirements.txt asks for."""

import re

from tests.scripts.commands import ROOT


def test_the_lock_pins_every_requirement_with_hashes():
    lock = (ROOT / "requirements.lock").read_text()
    pinned = dict(re.findall(r"^([a-z0-9_.-]+)==(\S+) \\$", lock, re.MULTILINE))
    wanted = re.findall(r"^([\w.-]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert set(wanted) <= set(pinned), "run the command in CONTRIBUTING.md"
    for block in re.split(r"\n(?=[a-z])", lock.partition("\n#")[2].partition("\n")[2]):
        assert "--hash=sha256:" in block, block
    assert "://" not in lock, "no index and no link"
