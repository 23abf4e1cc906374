"""ConvNet-AIG (arXiv 1711.11503): each image runs or skips whole residual blocks.

The baseline of DMNN: one path per block, gates that know nothing of each other, no categories (spec, section 8).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from models.dmnn import coarse
from models.dmnn.gates import Decision, favour_open, pooled
from models.dmnn.network import Execution, GatedBlock, GatedResNet
from models.dmnn.objective import ImageNetTargetRates, TargetRates, check_rate
from models.layers import full_precision, projection
from models.registry import register

#: published target rates by block; None stands for the rate of the row
SCHEDULES = {
    "schedule50": (1, 1, 0.8, 1, None, None, None, 1, None, None, None, None, None, 1, 0.7, 1),
    "schedule101": (1,) * 8 + (None,) * 25,
}
GATE_WIDTH = 16


class AIGBlock(GatedBlock):
    """A residual block with a gate: y = relu(shortcut(x) + gate * branch(x)).

    Args:
        sizes: filter sizes of its convolutions; the first 3x3 has the stride.
        widths: their output channels.
        target: of the execution rate; 1 or more means that the block always runs and its gate is not trained.
        released_init: convolutions as the authors' ImageNet script initialises them; else PyTorch's defaults.
    """

    def __init__(self, in_channels: int, sizes, widths, stride: int, target: float, released_init: bool):
        super().__init__(1, always=target >= 1)
        self.num_convs = len(sizes)
        channels = in_channels
        for index, (size, width) in enumerate(zip(sizes, widths, strict=True), start=1):
            here = stride if size == 3 else 1
            stride = 1 if size == 3 else stride
            self.add_module(f"conv{index}", nn.Conv2d(channels, width, size, here, size // 2, bias=False))
            self.add_module(f"bn{index}", nn.BatchNorm2d(width))
            channels = width
        self.shortcut = nn.Identity()
        total_stride = self.conv1.stride[0] * self.conv2.stride[0]
        if total_stride != 1 or in_channels != channels:
            self.shortcut = projection(in_channels, channels, total_stride)
        self.fc1 = nn.Conv2d(in_channels, GATE_WIDTH, 1)
        self.fc1bn = nn.BatchNorm2d(GATE_WIDTH)
        self.fc2 = nn.Conv2d(GATE_WIDTH, 2, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                if released_init:
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                else:
                    layer.reset_parameters()
        favour_open(self.fc2)
        if self.always:
            for layer in (self.fc1, self.fc1bn, self.fc2):
                layer.requires_grad_(False)

    @property
    def norms_of(self):
        return [(f"conv{i}", f"bn{i}") for i in range(1, self.num_convs + 1)] + [("fc1", "fc1bn")]

    def decide(self, x, previous):
        with full_precision(x):
            hidden = F.relu(self.fc1bn(self.fc1(pooled(x)[:, :, None, None])))
            return Decision(self.fc2(hidden).flatten(1)[:, None])

    def path(self, index, x):
        for i in range(1, self.num_convs + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            x = F.relu(x, inplace=True) if i < self.num_convs else x
        return x

    def carry(self, x):
        return self.shortcut(x)

    def layers_of_path(self, index):
        return [getattr(self, f"conv{i}") for i in range(1, self.num_convs + 1)]

    def layers_of_gates(self):
        return [self.fc1, self.fc2]


class AIGResNet(GatedResNet):
    """ConvNet-AIG on a ResNet.

    Args:
        target_rates: of every block, which the objective pulls to.
        gate_layers: what the names of the layers whose learning rate `lrfact` scales have in common.
        *resnet, **gated: as for `GatedResNet`.
    """

    def __init__(self, *resnet, target_rates: tuple[float, ...], gate_layers: str, **gated):
        super().__init__(*resnet, **gated)
        self.target_rates, self.gate_layers = target_rates, gate_layers

    def gate_parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if self.gate_layers in name]

    def adapt_state_dict(self, state):
        """Also take a plain ResNet of torchvision: `downsample` is `shortcut`, `fc` is `linear`, the gates stay new."""
        if not any(".fc2." in key for key in state) and any(".downsample." in key for key in state):
            state = {key.replace("downsample", "shortcut"): value for key, value in state.items()}
            state = {f"linear.{key[3:]}" if key.startswith("fc.") else key: value for key, value in state.items()}
            state |= {key: value for key, value in self.state_dict().items() if ".fc1" in key or ".fc2." in key}
        return state


def parse_rates(text: str, flat: float, num_blocks: int) -> tuple[float, ...]:
    """Target rates of all blocks.

    Args:
        text: "" for `flat` everywhere, the name of a published schedule in which `flat` fills the gaps, or numbers
            separated by commas.

    Raises:
        ValueError: a rate is outside (0, 1], or there are not as many as blocks.
    """
    check_rate("target_rate", flat)
    if text in SCHEDULES:
        rates = tuple(flat if rate is None else float(rate) for rate in SCHEDULES[text])
    elif text:
        try:
            rates = tuple(float(word) for word in text.split(","))
        except ValueError:
            raise ValueError(
                f"target_rates {text!r} must be numbers separated by commas, or one of {', '.join(SCHEDULES)}"
            ) from None
    else:
        rates = (flat,) * num_blocks
    if len(rates) != num_blocks:
        raise ValueError(f"target_rates {text} gives {len(rates)} rates, this network has {num_blocks} blocks")
    for rate in rates:
        check_rate("target_rates", rate)
    return rates


CIFAR_TRAINING = {
    # the authors' loop runs epochs 1 to 349 and lowers the rate before its epochs 150 and 250
    "epochs": 349,
    "lr": 0.1,
    "lr_schedule": "multistep",
    "lr_steps": "149:0.1,249:0.01",
    "batch_size": 256,
    "weight_decay": 5e-4,
    "momentum": 0.9,
    "mean": "0.4914,0.4822,0.4465",
    "std": "0.2023,0.1994,0.2010",
}
ILSVRC_TRAINING = {
    # likewise 1 to 99, and before epochs 30, 60 and 90
    "epochs": 99,
    "lr": 0.1,
    "lr_schedule": "multistep",
    "lr_steps": "29:0.1,59:0.01,89:0.001",
    "batch_size": 256,
    "weight_decay": 1e-4,
    "momentum": 0.9,
}


@register("convnet_aig110", ("cifar10", "cifar100"), TargetRates, CIFAR_TRAINING)
def convnet_aig_cifar(
    num_classes: int,
    target_rate: float = 0.6,
    target_rates: str = "",
    tau: float = 1.0,
    execution: Execution = "real",
    sample_gates: bool = False,
) -> AIGResNet:
    """ResNet-110 for 32x32 images whose 54 blocks run or are skipped, image by image (arXiv 1711.11503).

    Args:
        target_rate: share of the images that should run a block, above 0, at most 1.
        target_rates: the same for every block: numbers separated by commas; 1 runs the block always.
        tau: temperature of the Gumbel gates in training.
        execution: "real" skips closed blocks, "masked" computes all and multiplies by the gates.
        sample_gates: keep the Gumbel noise in evaluation, as the authors did.
    """
    rates = parse_rates(target_rates, target_rate, 54)
    targets, stages, in_channels = iter(rates), [], 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        stages.append([])
        for s in (stride, *[1] * 17):
            stages[-1].append(AIGBlock(in_channels, (3, 3), (width, width), s, next(targets), False))
            in_channels = width
    grouping = coarse.CIFAR100 if num_classes == 100 else None
    gated = dict(grouping=grouping, tau=tau, execution=execution, sampled=sample_gates)
    model = AIGResNet(3, 16, False, stages, "linear", 64, num_classes, target_rates=rates, gate_layers="fc2", **gated)
    model.conv1.reset_parameters()
    return model


@register(
    {"convnet_aig50": {"blocks": (3, 4, 6, 3)}, "convnet_aig101": {"blocks": (3, 4, 23, 3)}},
    ("ilsvrc",),
    ImageNetTargetRates,
    ILSVRC_TRAINING,
)
def convnet_aig_ilsvrc(
    num_classes: int,
    blocks: tuple[int, ...],
    target_rate: float = 0.7,
    target_rates: str = "",
    tau: float = 1.0,
    execution: Execution = "real",
    sample_gates: bool = False,
) -> AIGResNet:
    """ResNet whose blocks run or are skipped, image by image (arXiv 1711.11503).

    Args:
        target_rate: share of the images that should run a block, above 0, at most 1.
        target_rates: the same for every block: schedule50 or schedule101, which the published rows used and in which
            target_rate fills the gaps, or numbers separated by commas; 1 runs the block always.
        tau: temperature of the Gumbel gates in training.
        execution: "real" skips closed blocks, "masked" computes all and multiplies by the gates.
        sample_gates: keep the Gumbel noise in evaluation, as the authors did.
    """
    rates = parse_rates(target_rates, target_rate, sum(blocks))
    targets, stages, in_channels = iter(rates), [], 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        stages.append([])
        for stride in (2 if stage else 1, *[1] * (count - 1)):
            widths = (width, width, 4 * width)
            stages[-1].append(AIGBlock(in_channels, (1, 3, 1), widths, stride, next(targets), True))
            in_channels = 4 * width
    grouping = coarse.ilsvrc() if num_classes == 1000 else None
    gated = dict(grouping=grouping, tau=tau, execution=execution, sampled=sample_gates)
    return AIGResNet(
        7, 64, True, stages, "linear", in_channels, num_classes, target_rates=rates, gate_layers="fc", **gated
    )
