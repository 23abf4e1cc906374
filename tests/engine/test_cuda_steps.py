"""Steps on a real GPU: what they wait for, and several replicas. `recipes/on_gpu.sh` runs these first."""

import pytest
import torch
from torch.nn.parallel import DataParallel

import dataloader
import engine
from tests.engine.systems import SYSTEMS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def batches(count, device, dtype=torch.float32):
    """Noise, and labels of four classes."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.randn(8, 3, 32, 32, generator=generator, dtype=dtype).to(memory_format=torch.channels_last)
        yield images.to(device), torch.randint(4, (8,), generator=generator).to(device)


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_no_step_waits_for_the_device(system, amp, capture):
    device = torch.device("cuda")
    torch.manual_seed(0)
    model, objective = SYSTEMS[system]()
    recipe = engine.Recipe(1, 0.02, amp=amp, cuda_graph=capture)
    data = dataloader.cifar("digits", None, 8, torch.device("cpu"))  # only its length is used
    trainer = engine.Trainer(model, objective, data, None, recipe, device)
    trainer.begin_epoch()
    for images, labels in batches(4, device):
        trainer.train_step(images, labels)
    twenty = list(batches(20, device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels in twenty:
            trainer.train_step(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("system", ["shared-basis", "embedded", "slimmable"])
def test_two_replicas_give_the_mean_of_two_halves(system):
    """Both on one GPU. These losses are means over images and terms of weights, so halves have half the weight."""
    device = torch.device("cuda", 0)
    gradients = []
    for replicas in (True, False):
        torch.manual_seed(0)
        model, objective = SYSTEMS[system]()
        model.double().to(device, memory_format=torch.channels_last).train()
        objective.begin_epoch(model, 0)
        (images, labels), *_ = batches(1, device, torch.float64)
        wrapped = DataParallel(model, device_ids=[0, 0]) if replicas else model
        for part in [slice(0, 8)] if replicas else [slice(0, 4), slice(4, 8)]:
            torch.manual_seed(2)  # the same sub-networks
            for loss in objective(wrapped, images[part], labels[part]):
                (loss * len(labels[part]) / 8).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
