"""A second stage holds out what the first one held out, whatever its own seed and flags."""

import pytest
import torch

import dataloader
import train_cifar10
from engine import cli, run_images
from models import Checkpoint, create_model
from utils import UserError

NETWORK = ["--dataset=digits", "--nBlocks=3", "--base=1", "--stepmode=even", "--nChannels=8"]
BUILD = dict(nBlocks=3, base=1, stepmode="even", nChannels=8)


@pytest.fixture
def stage1(tmp_path):
    """A file of stage 1 that held 100 images out, and their positions."""
    data = dataloader.cifar("digits", None, 64, "cpu", valid=100, seed=3)
    training = {
        "flags": {"model": "msdnet_ge", "dataset": "digits", "valid": 100, "seed": 3},
        "valid_index": data.valid_index,
    }
    weights = create_model("msdnet_ge", "digits", **BUILD).state_dict()
    torch.save({"net_state_dict": weights, "training": training}, tmp_path / "stage1.pth")
    return str(tmp_path / "stage1.pth"), data.valid_index


def parse(file, *flags):
    return cli.parse(train_cifar10.SCRIPT, ["--model=IMTA_MSDNet", f"--pretrained={file}", *NETWORK, *flags])


@pytest.mark.parametrize("flags", [["--seed=4"], ["--valid=100"], ["--valid=100", "--seed=4"], ["--subset=200"]])
def test_stage_2_holds_out_what_stage_1_held_out(stage1, flags):
    file, held = stage1
    data = train_cifar10.load_data(parse(file, *flags), torch.device("cpu"))
    assert torch.equal(data.valid_index, held)
    assert not set(data.train.index.tolist()) & set(held.tolist())


def test_another_number_of_held_out_images_is_refused(stage1):
    with pytest.raises(UserError, match="leave --valid out") as error:
        run_images.held_out(parse(stage1[0], "--valid=50"))
    assert error.value.exit_code == 2


def test_files_without_held_out_images_leave_it_to_the_command(tmp_path):
    torch.save(create_model("msdnet_ge", "digits", **BUILD).state_dict(), tmp_path / "bare.pth")
    assert run_images.held_out(parse(tmp_path / "bare.pth", "--valid=50")) == 50
    assert run_images.held_out(cli.parse(train_cifar10.SCRIPT, ["--valid=50"])) == 50


def test_an_evaluation_of_another_data_set_holds_nothing_out(stage1):
    file, held = Checkpoint.open(stage1[0]), stage1[1]
    assert torch.equal(run_images.held_out_before(file, "digits"), held)
    assert run_images.held_out_before(file, "cifar10") == 0


def test_positions_of_another_data_set_mean_nothing(stage1):
    args = parse(stage1[0], "--valid=50")
    args.dataset = "cifar10"
    assert run_images.held_out(args) == 50
