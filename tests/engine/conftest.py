import pytest

from engine import cuda_graph
from tests.engine.tapes import Tape


@pytest.fixture
def tape(monkeypatch):
    """Recording on the CPU; gives the recorders that were made."""
    tapes = []

    def make(*options):
        tapes.append(Tape(*options))
        return tapes[-1]

    monkeypatch.setattr(cuda_graph, "CudaRecorder", make)
    monkeypatch.setattr(cuda_graph, "obstacle", lambda *_: None)
    return tapes
