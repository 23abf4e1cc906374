"""Formulas of shapes give what torch gives, and spare the import of its compiler."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune

from models import AdaptiveModel, create_model, profile
from models.counting import CallCounter, formula

ROOT = Path(__file__).parents[2]
CALLS = [
    (F.linear, (2, 5, 8), (3, 8), {}),
    (torch.conv2d, (2, 6, 9, 7), (4, 3, 3, 2), {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "groups": 2}),
    (F.max_pool2d, (2, 3, 9, 7), {"kernel_size": 3, "stride": 2, "padding": 1}),
    (F.max_pool2d, (2, 3, 9, 7), {"kernel_size": (2, 3)}),
    (F.avg_pool2d, (2, 3, 9, 7), {"kernel_size": 3, "padding": 1}),
    (F.adaptive_avg_pool2d, (2, 3, 9, 7), {"output_size": 1}),
    (F.adaptive_avg_pool2d, (2, 3, 9, 7), {"output_size": (None, 4)}),
    (F.interpolate, (2, 3, 9, 7), {"size": (5, 4), "mode": "bilinear", "align_corners": False}),
    (F.interpolate, (2, 3, 9, 7), {"size": 6}),
    (F.pad, (2, 3, 9, 7), {"pad": (1, -2, 0, 3)}),
    (F.pad, (2, 3, 9, 7), {"pad": (0, 0, 0, 0, 2, 1), "value": 1.0}),
    (torch.Tensor.new_full, (2, 3), {"size": (4, 1), "fill_value": 2.0}),
    (torch.Tensor.gt, (2, 3), {"other": 0}),
    (torch.Tensor.to, (2, 3), {"dtype": torch.float64}),
    (torch.Tensor.add, (2, 3), (2, 3), {"alpha": 2}),
]


MORE = [
    lambda x: torch.cat((x, x[:, :2]), 1),
    lambda x: torch.cat([x, x]),
    lambda x: torch.cat((x, x), dim=-1),
    lambda x: torch.stack((x, x), dim=-1),
    lambda x: torch.stack([x, x]),
    lambda x: x + x,
    lambda x: (x + 1).to(torch.int64) + x,  # of two types
    lambda x: x.to(x),
    lambda x: x.to(torch.bfloat16),
    lambda x: (x > 0).to(dtype=torch.float64),
    lambda x: F.relu(x, inplace=True).sigmoid(),
    lambda x: F.max_pool2d(x, 3, ceil_mode=True, padding=1),
    lambda x: F.interpolate(x, scale_factor=2),
    lambda x: F.pad(x, (1, 1, 1, 1), "reflect"),
    lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
]


def alike(found, wanted):
    return (found.shape, found.dtype) == (wanted.shape, wanted.dtype)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0].__name__)
def test_a_formula_gives_what_torch_gives(call):
    function, *shapes, options = call
    meta = tuple(torch.empty(shape, device="meta") for shape in shapes)
    found = formula(function, meta, options)
    assert found.is_meta
    assert alike(found, function(*map(torch.randn, shapes), **options))


@pytest.mark.parametrize("call", MORE)
def test_what_a_counter_passes_has_the_shapes_of_torch(call):
    images = torch.randn(2, 4, 7, 6)
    with CallCounter():
        found = call(images.to("meta"))
    assert alike(found, call(images))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.conv2d(x, torch.empty(3, 5, 1, 1, device="meta")),
        lambda x: F.conv2d(x, torch.empty(3, 4, 9, 9, device="meta")),
        lambda x: F.linear(x, torch.empty(3, 7, device="meta")),
        lambda x: F.max_pool2d(x, 9),
        lambda x: F.pad(x, (-9, 0)),
        lambda x: torch.cat((x, x[:1, :2]), 1),
        lambda x: torch.stack((x, x[:1])),
    ],
)
def test_what_does_not_fit_is_an_error_of_torch(call):
    with CallCounter(), pytest.raises(RuntimeError):
        call(torch.empty(2, 4, 7, 6, device="meta"))


def test_arguments_with_names_are_counted_as_well():
    images, filters, matrix = (torch.empty(shape, device="meta") for shape in ((2, 4, 7, 6), (3, 4, 3, 3), (5, 6)))
    with CallCounter((F.relu,)) as calls:
        F.conv2d(images, weight=filters)
        F.conv2d(input=images, weight=filters)
        F.linear(F.relu(input=images), weight=matrix)
    assert calls.macs == 2 * (2 * 3 * 5 * 4) * (4 * 3 * 3) + (2 * 4 * 7) * 5 * 6
    assert calls.elements == images.numel()


@pytest.mark.exhaustive
def test_counting_does_not_import_the_compiler():
    code = """
import sys
from models import create_model, profile
for name in ("ResNet20", "ResNet32_DoubleShared", "ResNet32_ADN", "IMTA_MSDNet", "mutualnet_wrn28_10", "dmnn32"):
    model = create_model(name)
    model.for_images((3, 32, 32))
    for point in model.default_points:
        if not point.per_image:
            profile.count_macs(model, (3, 32, 32), point)
    print(name, "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("False") == 6, done.stdout + done.stderr


class Watched(AdaptiveModel):
    """A linear layer that notes, while it is counted, whether the original still has its weights."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 4)

    def compute(self, images, point):
        if images.is_meta:
            intact.append(not watched.layer.weight.is_meta and watched.training)
        return self.layer(images.mean(dim=(2, 3)))


watched, intact = Watched(), []


def test_counting_is_not_seen_by_other_threads_and_hooks():
    seen, weight = [], watched.layer.weight
    watched.layer.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    assert profile.count_macs(watched, (3, 8, 8)) == 12
    assert intact == [True]
    assert seen == []
    assert watched.layer.weight is weight


def test_a_copy_is_counted_anew():
    small = Watched()
    assert profile.count_macs(small, (3, 8, 8)) == 12
    for large in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        large.layer = torch.nn.Linear(3, 8)
        assert profile.count_macs(large, (3, 8, 8)) == 24


def test_weights_that_a_hook_computes_are_counted():
    pruned = Watched()
    torch.nn.utils.prune.l1_unstructured(pruned.layer, "weight", amount=0.5)
    pruned(torch.randn(2, 3, 8, 8))  # the pruned weight is the result of an operation, and no parameter
    assert profile.count_macs(pruned, (3, 8, 8)) == 12


def test_what_cannot_be_counted_is_a_sentence():
    quantized = Watched()
    quantized.layer.forward = no_kernel
    with pytest.raises(ValueError, match=r"cannot be counted \(quantized::linear_dynamic: .*\): call the network"):
        quantized.infer(torch.randn(2, 3, 8, 8))


class QuantizedLinear(torch.nn.Module):
    """As `quantize_dynamic` makes it: its weight is a method, and it does not run on the meta device."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def weight(self):
        return self.layer.weight

    def forward(self, x):
        return self.layer(no_kernel(x))


@torch.no_grad()
def test_gated_networks_with_quantized_layers_run():
    torch.manual_seed(0)
    model, images = create_model("dmnn32", "cifar10").eval(), torch.randn(2, 3, 32, 32)
    expected = model(images)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.set_submodule(name, QuantizedLinear(module))
    torch.testing.assert_close(model(images), expected)
    with pytest.raises(ValueError, match="cannot be counted"):
        model.infer(images)


def no_kernel(x):
    """What torch raises for an operation of int8 on the meta device."""
    if x.is_meta:
        raise NotImplementedError("quantized::linear_dynamic: We could not find the fake impl for this operator.")
    return x
