"""A file of weights that scripts read."""

import pytest
import torch

from models import create_model


@pytest.fixture
def checkpoint(tmp_path):
    """An untrained ResNet20 in a file."""
    torch.save(create_model("ResNet20").state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"
