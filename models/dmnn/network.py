"""Networks whose blocks run only the paths that their gates open, image by image.

What DMNN (arXiv 1902.10949) and ConvNet-AIG (arXiv 1711.11503) have in common: the walk through the blocks, masked and
real execution, and the count of what each image costs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import folding
from models.adaptive import AdaptiveModel, Point
from models.dmnn import report
from models.dmnn.coarse import Grouping
from models.dmnn.gates import Decision, open_gates
from models.layers import constant, conv

Execution = Literal["real", "masked"]


@dataclass(frozen=True)
class GatedPoint(Point):
    """A way to run a gated network.

    Args:
        every_path: run all paths of all blocks and ask no gate.
        execution: "real" computes what is open; "masked" computes every path and multiplies by the gates, which saves
            nothing: the MACs that it reports are those of a real execution.
        sampled: gates with Gumbel noise outside of training too, as the authors of ConvNet-AIG evaluated.
    """

    every_path: bool = False
    execution: Execution = "real"
    sampled: bool = False

    @property
    def per_image(self) -> bool:
        return not self.every_path


ALL_PATHS = GatedPoint("all", every_path=True)


class Routed(NamedTuple):
    """What a gated network returns in train mode; losses are formed on the whole batch, gathered from all devices.

    Args:
        logits: (images, classes).
        gates: (images, blocks, paths), 0 or 1 with the gradient of the soft gates.
        soft: (images, blocks, paths), probabilities of being open.
        categories: logits (images, blocks, groups); None without category heads.
    """

    logits: Tensor
    gates: Tensor
    soft: Tensor
    categories: Tensor | None


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of one image, convolutions and linear layers.

    Args:
        static: stem, projections, head: what every image costs at least.
        controllers: what deciding costs.
        paths: one row for each block, one number for each path.
    """

    static: int
    controllers: int
    paths: tuple[tuple[int, ...], ...]

    @property
    def all_paths(self) -> int:
        return sum(map(sum, self.paths))


def gather(x: Tensor, which: Tensor) -> Tensor:
    """The images `which` of x, in x's memory layout.

    Indexing the memory in its own order is ten times faster on a CPU than indexing a channels-last tensor.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, which).permute(0, 3, 1, 2)
    return x.index_select(0, which)


def add_to(out: Tensor, which: Tensor, y: Tensor) -> None:
    """Add y to the images `which` of out, in place; in memory order for the same reason."""
    if out.is_contiguous(memory_format=torch.channels_last):
        out, y = out.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)
    out.index_add_(0, which, y)


class GatedBlock(nn.Module):
    """A block of gated paths around a shortcut: y = finish(shortcut(x) + sum over open paths of path(x)).

    Subclasses implement `decide`, `path` and, where it is not the identity, `carry`.

    Args:
        num_paths: how many paths it has.
        always: whether all paths always run; nothing is decided then.
    """

    def __init__(self, num_paths: int, always: bool = False):
        super().__init__()
        self.num_paths, self.always = num_paths, always

    def decide(self, x: Tensor, previous: Tensor | None) -> Decision:
        """Ask the gates; `previous` is the hidden state of the block before."""
        raise TypeError(f"{type(self).__name__} does not implement decide")

    def path(self, index: int, x: Tensor) -> Tensor:
        """The output of one path, a new tensor."""
        raise TypeError(f"{type(self).__name__} does not implement path")

    def carry(self, x: Tensor) -> Tensor:
        """The shortcut; x itself where it is the identity."""
        return x

    def finish(self, x: Tensor) -> Tensor:
        """What follows the sum; overwrites x. An input of the block passes unchanged."""
        return F.relu(x, inplace=True)

    def layers_of_path(self, index: int) -> Iterable[nn.Module]:
        """The layers whose cost is that of one path."""
        raise TypeError(f"{type(self).__name__} does not implement layers_of_path")

    def layers_of_gates(self) -> Iterable[nn.Module]:
        """The layers that decide; each sees one vector of an image, so that it costs as many MACs as it has weights."""
        raise TypeError(f"{type(self).__name__} does not implement layers_of_gates")

    def forward(self, x: Tensor, gates: Tensor, execution: Execution, sure: bool = False) -> Tensor:
        """Run on x (images, channels, height, width).

        Args:
            gates: (images, paths).
            sure: whether it is known beforehand that all are open.
        """
        if self.training or execution == "masked":
            return self.finish(self.add_paths(x, gates))
        # the block's one wait for the device
        counts = [x.shape[0]] * self.num_paths if sure else gates.sum(dim=0).int().tolist()
        return self.add_open_paths(x, gates, counts)

    def add_paths(self, x: Tensor, gates: Tensor) -> Tensor:
        """The shortcut plus gate times path over all paths, each computed for all images."""
        out = self.carry(x)
        for j in range(self.num_paths):
            out = torch.addcmul(out, self.path(j, x), gates[:, j, None, None, None].to(x.dtype))
        return out

    def add_open_paths(self, x: Tensor, gates: Tensor, counts: Sequence[int]) -> Tensor:
        """The block's output, computing each path only for the images, `counts` of them, that opened it."""
        out = self.carry(x)
        if out is x and not any(counts):
            return x
        # full batches first: they need no gathering, and give the sum a tensor of its own
        for j in sorted(range(self.num_paths), key=lambda j: -counts[j]):
            if counts[j] == x.shape[0]:
                out = self.path(j, x).add_(out)
            elif counts[j]:
                which = gates[:, j].nonzero_static(size=counts[j]).flatten()
                out = out.clone() if out is x else out
                add_to(out, which, self.path(j, gather(x, which)))
        return self.finish(out)


class GatedNetwork(AdaptiveModel):
    """Stem, gated blocks, head.

    Subclasses implement `stem`, `head` and `gated_blocks`; `stage_of_block` says where the resolution changes.

    Args:
        grouping: coarse categories of the classes, if there are any.
        tau: temperature of the gates in training.
        execution, sampled: how the point `gated` runs, see `GatedPoint`.
    """

    stage_of_block: Sequence[int]

    def __init__(
        self,
        grouping: Grouping | None = None,
        tau: float = 1.0,
        execution: Execution = "real",
        sampled: bool = False,
    ):
        super().__init__()
        if tau <= 0:
            raise ValueError(f"tau {tau} is no temperature; use a number above 0")
        self.grouping, self.tau = grouping, tau
        self.points = (GatedPoint("gated", execution=execution, sampled=sampled), ALL_PATHS)
        groups = torch.tensor(grouping.group_of_class) if grouping else None
        self._costs: dict[tuple[int, ...], Costs] = {}
        self.register_buffer("group_of_class", groups, persistent=False)

    @property
    def main(self):
        """`gated`: what the network was trained for."""
        return self.points[0]

    def stem(self, images: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not implement stem")

    def head(self, x: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not implement head")

    def gated_blocks(self) -> Iterable[GatedBlock]:
        raise TypeError(f"{type(self).__name__} does not implement gated_blocks")

    def compute(self, images, point):
        """Logits in eval mode, `Routed` in train mode."""
        routed = self.run(images, point)
        return routed if self.training else routed.logits

    def compute_counted(self, images, point):
        """Logits, and the MACs of static parts, controllers and open paths."""
        routed = self.run(images, point)
        return routed.logits, self.count(routed.gates, images.shape[1:], point)

    def count(self, gates: Tensor, shape: Sequence[int], point: Point) -> Tensor:
        """MACs of images of `shape` that took the routes `gates` (images, blocks, paths), int64 (images,)."""
        costs = self.costs(shape)
        base = costs.static + (0 if point.every_path else costs.controllers)
        paths = constant(costs.paths, gates.device, torch.int64)
        return base + (gates.long() * paths).sum(dim=(1, 2))

    def run(self, images: Tensor, point: GatedPoint) -> Routed:
        """Walk through the blocks; each one's gates are decided when its input is known."""
        x = self.stem(images)
        hidden, gates, soft, categories = None, [], [], []
        for block in self.gated_blocks():
            sure = point.every_path or block.always
            if sure:
                # not len(x): it would fix the batch size of an exported network
                opened = probability = x.new_ones(x.shape[0], block.num_paths)
            else:
                decision = block.decide(x, hidden)
                hidden = decision.hidden
                opened, probability = open_gates(decision.logits, self.training or point.sampled, self.tau)
                if decision.category is not None:
                    categories.append(decision.category)
                if x.is_meta and not self.training and point.execution == "real":
                    raise ValueError(f"what the point {point} costs depends on the image; model.infer counts it")
            x = block(x, opened, point.execution, sure)
            gates.append(opened)
            soft.append(probability)
        stacked = [torch.stack(values, dim=1) for values in (gates, soft)]
        return Routed(self.head(x), *stacked, torch.stack(categories, dim=1) if categories else None)

    def costs(self, shape: Sequence[int]) -> Costs:
        """What each part costs for one image of `shape` (channels, height, width); remembered.

        Counted layer by layer in one pass on the meta device, where nothing is computed.
        """
        shape = tuple(shape)
        if shape not in self._costs:
            self._costs[shape] = self._measure(shape)
        return self._costs[shape]

    def _measure(self, shape: tuple[int, ...]) -> Costs:
        clone = copy.deepcopy(self).to("meta").eval()
        macs: dict[nn.Module, int] = {}

        def note(layer, inputs, output):
            macs[layer] = output[0].numel() * layer.weight[0].numel()

        for layer in clone.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(note)
        with torch.no_grad():
            clone(torch.empty(1, *shape, device="meta"), ALL_PATHS)

        def total(layers: Iterable[nn.Module]) -> int:
            return sum(macs.get(layer, 0) for layer in layers)

        blocks = list(clone.gated_blocks())
        paths = tuple(tuple(total(block.layers_of_path(j)) for j in range(block.num_paths)) for block in blocks)
        deciding = [layer for block in blocks if not block.always for layer in block.layers_of_gates()]
        controllers = sum(layer.weight.numel() for layer in deciding)
        return Costs(sum(macs.values()) - sum(map(sum, paths)), controllers, paths)

    def report(self, data):
        """Costs of images, rates of paths, easy and hard images; see `models.dmnn.report`."""
        return report.report(self, data)

    def fold(self, batches=()):
        """A copy for inference: batch norms inside the convolutions, no category heads."""
        model = folding.folded_copy(self)
        model._costs = {}
        for module in model.modules():
            if isinstance(getattr(module, "category", None), nn.Module):
                module.category = None
        return model


class GatedResNet(GatedNetwork):
    """First convolution, four or three stages `layer1`.. of gated blocks, and a linear classifier.

    Args:
        stem_size: side of the first convolution's filters: 7 (stride 2) or 3 (stride 1).
        pool: whether a 3x3 max-pool of stride 2 follows it.
        stages: the blocks.
        classifier: name of the last layer.
        features: output channels of the last stage.
        **gated: as for `GatedNetwork`.
    """

    norms_of = (("conv1", "bn1"),)

    def __init__(
        self,
        stem_size: Literal[3, 7],
        stem_channels: int,
        pool: bool,
        stages: Sequence[Sequence[GatedBlock]],
        classifier: str,
        features: int,
        num_classes: int,
        **gated,
    ):
        super().__init__(**gated)
        self.conv1 = conv(3, stem_channels, stem_size, stride=2 if stem_size == 7 else 1)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self.pool, self.num_stages, self.classifier = pool, len(stages), classifier
        for number, blocks in enumerate(stages, start=1):
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.add_module(classifier, nn.Linear(features, num_classes))
        self.stage_of_block = [stage for stage, blocks in enumerate(stages) for _ in blocks]

    def stem(self, images):
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        return F.max_pool2d(x, 3, stride=2, padding=1) if self.pool else x

    def gated_blocks(self):
        for number in range(1, self.num_stages + 1):
            yield from getattr(self, f"layer{number}")

    def head(self, x):
        return getattr(self, self.classifier)(F.adaptive_avg_pool2d(x, 1).flatten(1))
