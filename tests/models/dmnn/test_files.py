"""Files of DMNN and ConvNet-AIG."""

import pytest
import torch
import torchvision

from models import create_model, load_checkpoint
from tests.parity import check


def test_category_heads_may_be_missing_on_either_side(tmp_path):
    with_heads, without = (create_model("dmnn50", "cifar100", category=category) for category in (True, False))
    torch.save(with_heads.state_dict(), tmp_path / "with.pth")
    load_checkpoint(without, tmp_path / "with.pth")
    assert check.holds(with_heads, without.state_dict())
    torch.save(without.state_dict(), tmp_path / "without.pth")
    load_checkpoint(create_model("dmnn50", "cifar100"), tmp_path / "without.pth")
    torch.save({k: v for k, v in with_heads.state_dict().items() if ".gate.bias" not in k}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="16 missing"):
        load_checkpoint(without, tmp_path / "bad.pth")


def test_a_checkpoint_of_another_number_of_paths_is_refused(tmp_path):
    torch.save(create_model("dmnn50", "cifar100", num_paths=4).state_dict(), tmp_path / "four.pth")
    with pytest.raises(ValueError, match="4 paths in a block, this network 2; use num_paths 4"):
        load_checkpoint(create_model("dmnn50", "cifar100"), tmp_path / "four.pth")


def test_convnet_aig_starts_from_a_plain_resnet(tmp_path):
    plain = torchvision.models.resnet50()
    torch.save(plain.state_dict(), tmp_path / "resnet50.pth")
    model = create_model("convnet_aig50", "ilsvrc")
    gate = model.layer2[1].fc2.weight.clone()
    with pytest.warns(UserWarning, match="the gates start untrained"):
        load_checkpoint(model, tmp_path / "resnet50.pth")
    assert torch.equal(model.layer2[1].fc2.weight, gate)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert check.relative(model.eval()(images, "all"), plain.eval()(images)) < 1e-5


def test_convnet_aig_reads_files_of_old_pytorch(tmp_path):
    model = create_model("convnet_aig110", "cifar10")
    state = {f"module.{k}": v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({"epoch": 3, "state_dict": state, "best_prec1": 90.0}, tmp_path / "aig.pth.tar")
    other = create_model("convnet_aig110", "cifar10")
    load_checkpoint(other, tmp_path / "aig.pth.tar")
    assert torch.equal(other.layer3[17].fc1bn.weight, model.layer3[17].fc1bn.weight)
    assert torch.equal(other.conv1.weight, model.conv1.weight)
