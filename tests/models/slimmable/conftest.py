"""A calibrated network."""

import pytest
import torch

from tests.models.slimmable.networks import batches, tiny


@pytest.fixture
def calibrated():
    """A network that is calibrated at a width that its state dict does not list, and what it gives there."""
    model = tiny().eval()
    model.prepare([model.at(0.93, 32)], batches())
    with torch.no_grad():
        return model, model(next(batches())[0], "w0.93-r32")
