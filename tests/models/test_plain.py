"""Plain networks: their counts in closed form, their initialisation, and what CIFAR and ImageNet forms differ in."""

import pytest
import torch
from torch import nn

from models import create_model, profile, registry
from models.meta import on_meta
from tests.parity import check

CIFAR = {"ResNet20": 3, "ResNet32": 5, "ResNet44": 7, "ResNet56": 9, "ResNet110": 18, "ResNet1202": 200}


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_counts_of_cifar_resnets_equal_closed_forms(name, dataset):
    blocks, classes = CIFAR[name], registry.NUM_CLASSES[dataset]
    with on_meta():
        model = create_model(name, dataset)
    params, macs = 432 + 32 + 64 * classes + classes, 32 * 32 * 432 + 64 * classes
    before = 16
    for channels, side in ((16, 32), (32, 16), (64, 8)):
        weights = 9 * before * channels + (2 * blocks - 1) * 9 * channels**2
        params += weights + 2 * blocks * 2 * channels
        macs += side**2 * weights
        before = channels
    assert profile.count_params(model) == params
    assert profile.count_macs(model, (3, 32, 32)) == macs


@pytest.mark.parametrize(
    ("name", "dataset", "params", "giga_macs"),
    [
        ("ResNet18", "cifar100", 11_220_132, 0.5555),
        ("ResNet34", "cifar100", 21_328_292, 1.1594),
        ("DenseNet121", "cifar100", 7_048_548, 0.8884),
        ("ResNext50", "cifar100", 23_177_124, 1.3442),
        ("MobileNetV2", "cifar100", 2_428_004, 0.0674),
        ("ResNet18", "ilsvrc", 11_689_512, 1.814),
        ("ResNet34", "ilsvrc", 21_797_672, 3.664),
        ("ResNet50", "ilsvrc", 25_557_032, 4.089),
        ("ResNet101", "ilsvrc", 44_549_160, 7.801),
        ("MobileNetV2", "ilsvrc", 3_507_272, 0.3136),
    ],
)
def test_counts_of_larger_networks_equal_the_published_code(name, dataset, params, giga_macs):
    with on_meta():
        model = create_model(name, dataset)
    assert profile.count_params(model) == params
    side = 224 if dataset == "ilsvrc" else 32
    assert profile.count_macs(model, (3, side, side)) / 1e9 == pytest.approx(giga_macs, rel=1e-3)


def test_option_a_shortcut_subsamples_and_pads_both_sides():
    shortcut = create_model("ResNet20").layer2[0].shortcut
    x = torch.randn(2, 16, 8, 8)
    out = shortcut(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_resnets_start_kaiming_normal_with_fan_out():
    torch.manual_seed(0)
    model = create_model("ResNet18", "cifar100")
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 30_000):
        expected = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.03)


def test_mobilenet_pads_small_images_and_keeps_resolution():
    model = create_model("MobileNetV2", "cifar100")
    assert model.pre(torch.zeros(1, 3, 32, 32)).shape == (1, 32, 34, 34)
    assert model.stage6[0].conv2.stride == (1, 1)
    assert create_model("MobileNetV2", "ilsvrc").stage6[0].conv2.stride == (2, 2)


@pytest.mark.parametrize("name", ["ResNet20", "DenseNet121", "ResNext50", "MobileNetV2"])
def test_channels_last_images_give_the_same_logits(name):
    dataset = "cifar10" if name == "ResNet20" else "cifar100"
    model = create_model(name, dataset).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        model = model.to(memory_format=torch.channels_last)
        assert check.relative(model(images.contiguous(memory_format=torch.channels_last)), expected) < 1e-5
