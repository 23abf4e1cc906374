"""Files of slimmable networks, with other widths or statistics."""

import pytest
import torch

from models import create_model, load_checkpoint
from tests.models.slimmable.networks import batches, tiny


@pytest.mark.parametrize("widths", [(0.9, 0.95, 1.0), (1.0,), (1.0, 0.9)])
def test_a_file_of_another_width_list_loads_without_statistics(widths, tmp_path, capsys):
    source = tiny(width_mult_list=widths).eval()
    state = {f"module.{key}": value for key, value in source.state_dict().items() if "tracked" not in key}
    torch.save({"model": state, "optimizer": {}, "last_epoch": 3}, tmp_path / "checkpoint_3.pt")
    torch.manual_seed(1)
    model = create_model("mutualnet_wrn28_10", "cifar10", depth=10, widen_factor=1).eval()
    load_checkpoint(model, tmp_path / "checkpoint_3.pt")
    said = capsys.readouterr().out
    assert (
        said
        == "the file's batch-norm statistics are of another list of widths and are not used: points get calibrated\n"
    )
    with pytest.raises(ValueError, match=r"w1-r32 is not calibrated"):
        model(torch.zeros(2, 3, 32, 32), "w1-r32")
    for network in (source, model):
        network.prepare([network.at(0.95, 24)], batches())
    images = next(batches(seed=3))[0]
    assert torch.equal(model(images, "w0.95-r24"), source(images, "w0.95-r24"))


def test_a_file_of_another_network_or_widest_width_is_refused(tmp_path, capsys):
    wider = tiny(width_mult_range=(0.9, 1.6), width_mult_list=(0.9, 1.6))
    torch.save({"model": wider.state_dict()}, tmp_path / "wider.pt")
    with pytest.raises(ValueError, match=r"begin with 24 channels instead of 16: .* give the --width_mult_range"):
        load_checkpoint(tiny(), tmp_path / "wider.pt")
    deeper = create_model("mutualnet_wrn28_10", "cifar10", depth=16, widen_factor=1)
    torch.save({"model": deeper.state_dict()}, tmp_path / "deeper.pt")
    with pytest.raises(ValueError, match=r"is not a checkpoint of this mutualnet_wrn28_10: .* unexpected"):
        load_checkpoint(tiny(), tmp_path / "deeper.pt")
    assert capsys.readouterr().out == ""


def test_weights_of_other_names_are_paired_by_position(capsys):
    model = tiny(width_mult_list=(0.9, 1.0))
    foreign = {f"net.{key}": value + 1 for key, value in model.state_dict().items()}
    state = model.adapt_state_dict(foreign)
    assert "are paired with ours by their order" in capsys.readouterr().out
    assert torch.equal(state["fc.bias"], model.fc.bias + 1)


def test_statistics_of_our_own_training_are_kept():
    model = tiny().train()
    model(next(batches())[0], model.full)
    other = tiny().eval()
    other.load_state_dict(other.adapt_state_dict(model.state_dict()))
    images = next(batches(seed=2))[0]
    assert torch.equal(other(images), model.eval()(images))
