"""Files for tests of what reads them."""

import torch

from models.recorded import training_content


def saved(folder, content):
    """A file that holds `content`."""
    torch.save(content, folder / "file.pth")
    return folder / "file.pth"


def content_of_training(model, **replaced):
    """What a training run of this project writes, with some of what it keeps under `training` replaced."""
    built = model.built_as
    training = {
        "epoch": 3,
        "step": 0,
        "best": {"full": (50.0, 2)},
        "objective": {},
        "scaler": {},
        "rng": {"cpu": torch.get_rng_state()},
        "flags": {"model": built.model, "dataset": built.dataset, "lr": 0.1, **built.flags},
        "valid_index": torch.tensor([4, 2]),
        "classes": [f"class {number}" for number in range(built.num_classes)],
    } | replaced
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return training_content(model.state_dict(), optimizer.state_dict(), 50.0, training)
