"""What torch's own tools (pruning, averaged weights, hooks, half precision) do to a network reaches all it computes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, update_bn

from models import create_model

SMALL = {
    "ResNet32_DoubleShared": {"shared_rank": 4, "unique_rank": 1},
    "msdnet": {"nBlocks": 2, "base": 2, "step": 2, "stepmode": "even", "nChannels": 16},
    "dmnn50": {"num_paths": 2},
    "convnet_aig32": {},
    "mutualnet_wrn28_10": {"depth": 10, "widen_factor": 1},
    "exits_resnet32": {},
}


def small(name):
    torch.manual_seed(0)
    return create_model(name, "cifar10", **SMALL[name])


def images(count=4):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def in_training(model, batch):
    torch.manual_seed(2)  # of the gates' noise
    out = model(batch)
    return out if isinstance(out, torch.Tensor) else torch.cat([part.flatten() for part in out if part is not None])


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_training_sees_pruned_weights_as_they_change(name):
    model = small(name)
    convs = [module for module in model.modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 4]
    for conv in convs:
        prune.l1_unstructured(conv, "weight", 0.5)
        conv.weight_orig.add_(0.1 * torch.randn(conv.weight_orig.shape))  # as an optimizer does
    pruned = in_training(model, images())
    for conv in convs:
        prune.remove(conv, "weight")
    torch.testing.assert_close(pruned, in_training(model, images()), rtol=1e-3, atol=1e-4)


class Adapted(nn.Conv2d):
    """Like a convolution with LoRA or fake quantization: does more than convolve with its weights."""

    def forward(self, x):
        return super().forward(x).sin()


@pytest.mark.parametrize("name", [name for name in SMALL if "mutualnet" not in name])
@torch.no_grad()
def test_training_calls_convolutions_of_other_classes(name):
    model = small(name)
    convs = [module for module in model.modules() if type(module) is nn.Conv2d]
    hooks = [conv.register_forward_hook(lambda conv, inputs, output: output.sin()) for conv in convs]
    expected = in_training(model, images())
    for conv, hook in zip(convs, hooks, strict=True):
        hook.remove()
        conv.__class__ = Adapted
    torch.testing.assert_close(in_training(model, images()), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_frozen_batch_norms_keep_their_statistics(name):
    model = small(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = {key: value.clone() for key, value in model.named_buffers()}
    first = in_training(model, images())
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())
    if name != "convnet_aig32":  # whose gates decide in training with noise drawn for the whole batch
        torch.testing.assert_close(first, in_training(model, images()))


@pytest.mark.parametrize("name", [name for name in SMALL if "mutualnet" not in name])
@torch.no_grad()
def test_replaced_layers_are_counted_anew(name):
    model = small(name).eval()
    _, before = model.infer(images())
    convs = [name for name, module in model.named_modules() if getattr(module, "kernel_size", 1) == (3, 3)]
    conv = model.get_submodule(name := convs[len(convs) // 2])
    model.set_submodule(name, nn.Sequential(conv, nn.Conv2d(conv.out_channels, conv.out_channels, 3, padding=1)))
    _, macs = model.infer(images())
    assert torch.equal(macs, copy.deepcopy(model).infer(images())[1])
    assert not torch.equal(macs, before)


def test_slimmable_networks_are_not_evaluated_while_pruned():
    model = small("mutualnet_wrn28_10").eval()
    conv = next(module for module in model.modules() if hasattr(module, "weight"))
    prune.l1_unstructured(conv, "weight", 0.5)
    with pytest.raises(ValueError, match="make the change permanent"):
        model(images())
    prune.remove(conv, "weight")
    model.prepare([model.main_point], [(images(), None)])
    assert model(images()).isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_update_bn_averages_over_all_batches(name):
    batches, means = [images(), 2 * images(8) + 1], []
    for batch in batches:
        once = small(name)
        for module in once.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        in_training(once, batch)
        means.append(once.state_dict())
    average = AveragedModel(small(name))
    average.module.register_forward_pre_hook(lambda *_: torch.manual_seed(2) and None)
    update_bn(batches, average)
    found, moved = average.module.state_dict(), 0
    for key in found:
        if key.endswith("running_mean") and found[key.replace("running_mean", "num_batches_tracked")]:
            torch.testing.assert_close(found[key], sum(each[key] for each in means) / 2, rtol=1e-3, atol=1e-4)
            moved += 1
    assert moved > 2


@pytest.mark.parametrize("name", ["dmnn50", "convnet_aig32"])
@torch.no_grad()
def test_hooks_on_blocks_keep_what_the_block_returned(name):
    model, kept = small(name).eval(), []

    def keep(block, inputs, output):
        kept.append((output, output.clone()))

    for block in model.gated_blocks():
        layer = block.fc2 if hasattr(block, "fc2") else block.controller.gate
        nn.init.normal_(layer.weight, std=10.0)
        nn.init.zeros_(layer.bias)
        block.register_forward_hook(keep)
    model(images(8) * torch.linspace(0.2, 4, 8)[:, None, None, None])
    assert all(torch.equal(one, other) for one, other in kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_slimmable_networks_are_prepared_in_other_types(dtype):
    model, batch = small("mutualnet_wrn28_10").eval(), images(16)
    model.prepare([model.point("w0.93-r24")], [(batch, None)])
    logits, other = model(batch, "w0.93-r24"), copy.deepcopy(model).to(dtype)
    other.prepare([other.point("w0.93-r24")], [(batch.to(dtype), None)])
    assert (other(batch.to(dtype), "w0.93-r24") - logits).abs().max() < 0.05 * logits.abs().max()


@torch.no_grad()
def test_images_that_are_not_square_are_resized_both_ways():
    model, wide = small("mutualnet_wrn28_10").eval(), torch.randn(1, 3, 32, 48)
    model.prepare([model.main_point], [(images(), None)])
    assert [model.infer(batch)[1].item() for batch in (wide, wide.mT)] == [model.infer(images(1))[1].item()] * 2


@pytest.mark.parametrize("name", ["mutualnet_wrn28_10", "exits_resnet32"])
def test_gradients_follow_inference_mode(name):
    with torch.inference_mode():
        made = small(name).eval()
        made.prepare(made.points, [(images(), None)])
        made(images())
    model = small(name).eval()
    model.load_state_dict(made.state_dict())
    with torch.inference_mode():
        model.load_prepared_state(made.prepared_state())
    saliency = images().requires_grad_()
    model(saliency).sum().backward()
    assert saliency.grad.abs().sum() > 0


@torch.no_grad()
def test_slimmable_networks_follow_replaced_layers():
    model, grey = small("mutualnet_wrn28_10").eval(), images()[:, :1]
    model.prepare([model.main_point], [(images(), None)])
    model(images())
    model.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
    with pytest.raises(ValueError, match="not calibrated"):
        model(grey, "w0.93-r24")
    model.prepare([model.main_point], [(grey, None)])
    first, with_gradients = model(grey), torch.enable_grad()(model)(grey)
    torch.testing.assert_close(first, with_gradients)
    model.conv1.weight.mul_(-1)
    model.prepare([model.main_point], [(grey, None)])
    assert (model(grey) - first).abs().max() > 0.1 * first.abs().max()


def test_slimmable_networks_refuse_synchronised_norms():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small("mutualnet_wrn28_10"))
    with pytest.raises(ValueError, match="--sync_bn"):
        model(images())
