"""Networks whose blocks run only the paths that their gates open, image by image.

What DMNN (arXiv 1902.10949) and ConvNet-AIG (arXiv 1711.11503) have in common: the walk through the blocks, masked and
real execution, and counting what each image costs.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import profile
from models.adaptive import AdaptiveModel, Point
from models.counting import Cache, CallCounter
from models.deploy import folding
from models.dmnn import report
from models.dmnn.coarse import Grouping
from models.dmnn.gates import MergedGates, open_gates, open_images
from models.dmnn.layers import Execution, GatedBlock
from models.layers import constant
from models.meta import without_values
from models.products import is_hooked


@dataclass(frozen=True)
class GatedPoint(Point):
    """A way to run a gated network.

    Args:
        every_path: run all paths of all blocks without evaluating any gate.
        execution: "real" computes only what is open; "masked" computes every path and multiplies by the gates, which
            saves nothing: the MACs it reports are those of real execution.
        sampled: add Gumbel noise to the gates outside training too, as ConvNet-AIG's authors did in evaluations.
    """

    every_path: bool = False
    execution: Execution = "real"
    sampled: bool = False

    @property
    def per_image(self) -> bool:
        return not self.every_path


ALL_PATHS = GatedPoint("all", every_path=True)
#: for one image, maximum number of blocks whose gates are decided at once
AHEAD = 4


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
        static: stem, projections, head: the least that an image costs.
        controllers: the cost of deciding.
        paths: a row for each block, with a number for each path.
    """

    static: int
    controllers: int
    paths: tuple[tuple[int, ...], ...]

    @property
    def all_paths(self) -> int:
        """The cost of all paths of all blocks."""
        return sum(map(sum, self.paths))


class GatedNetwork(AdaptiveModel):
    """Stem, gated blocks, classifier.

    Subclasses implement `stem(images)`, `classify(x)` (from the last block's output to logits) and `gated_blocks`;
    `stage_of_block` says where the resolution changes.

    Args:
        grouping: coarse categories of the classes, if there are any.
        tau: temperature of the gates in training.
        execution, sampled: how the point `gated` runs, see `GatedPoint`.
        *trunk: arguments of the network around the blocks, if a subclass uses one of `models.trunks`.
    """

    stage_of_block: Sequence[int]
    #: whether the gates of several blocks of a folded network can be decided at once
    looks_ahead = False

    def __init__(
        self,
        *trunk,
        grouping: Grouping | None = None,
        tau: float = 1.0,
        execution: Execution = "real",
        sampled: bool = False,
    ):
        super().__init__(*trunk)
        if tau <= 0:
            raise ValueError(f"tau {tau} must be above 0")
        self.grouping, self.tau = grouping, tau
        self.points = (GatedPoint("gated", execution=execution, sampled=sampled), ALL_PATHS)
        groups = torch.tensor(grouping.group_of_class) if grouping else None
        self._costs = Cache()
        self.register_buffer("group_of_class", groups, persistent=False)

    @property
    def main_point(self):
        """`gated`: what the network is trained for."""
        return self.points[0]

    def gated_blocks(self) -> Iterable[GatedBlock]:
        """The blocks, in the order in which they run."""
        raise TypeError(f"{type(self).__name__} does not implement gated_blocks")

    def compute(self, images, point):
        """Return logits in eval mode, `Routed` in train mode."""
        routed = self.run(images, point)
        return routed if self.training else routed.logits

    def compute_counted(self, images, point):
        """Return logits, and the MACs of static parts, controllers and open paths."""
        routed = self.run(images, point)
        return routed.logits, self.count(routed.gates, images.shape[1:], point)

    def count(self, gates: Tensor, shape: Sequence[int], point: Point) -> Tensor:
        """MACs of images of `shape` that took the routes `gates` (images, blocks, paths), int64 (images,)."""
        costs = self.costs(shape)
        base = costs.static + (0 if point.every_path else costs.controllers)
        paths = constant(costs.paths, gates.device, torch.int64)
        return base + (gates.long() * paths).sum(dim=(1, 2))

    def run(self, images: Tensor, point: GatedPoint) -> Routed:
        """Walk through the blocks; the gates of each are decided when its input is known."""
        x = self.stem(images)
        if self.training or (not point.every_path and (point.sampled or point.execution == "masked")):
            return self._run_gates(x, point)
        if x.is_meta and not point.every_path:
            raise ValueError(f"what the point {point} costs depends on the image; model.infer counts it")
        if self.looks_ahead and not point.every_path and len(x) == 1:
            return self._run_one_image(x)
        return self._run_open_paths(x, point)

    def _run_gates(self, x: Tensor, point: GatedPoint) -> Routed:
        """For training, masked execution and sampled gates: hard and soft gates are tensors."""
        hidden, gates, soft, categories = None, [], [], []
        for block in self.gated_blocks():
            if point.every_path or block.always:
                opened = probability = x.new_ones(x.shape[0], block.num_paths)
            else:
                decision = block.decide(x, hidden)
                hidden = decision.hidden
                opened, probability = open_gates(decision.logits, self.training or point.sampled, self.tau)
                if decision.category is not None:
                    categories.append(decision.category)
            masked = self.training or point.execution == "masked"
            x = run_block(block, x, opened) if masked else run_block(block, x, None, open_images(opened))
            gates.append(opened)
            soft.append(probability)
        stacked = [torch.stack(values, dim=1) for values in (gates, soft)]
        return Routed(self.classify(x), *stacked, torch.stack(categories, dim=1) if categories else None)

    def _run_open_paths(self, x: Tensor, point: GatedPoint) -> Routed:
        """For inference: the gates of a block are read back once, and a closed path costs nothing beyond that."""
        hidden, leads = None, []
        for block in self.gated_blocks():
            if point.every_path or block.always:
                # not len(x): it would fix the batch size of an exported network
                lead, images = x.new_full((x.shape[0], block.num_paths), math.inf), None
            else:
                lead, hidden = block.leads(x, hidden)
                images = open_images(lead)
            x = run_block(block, x, None, images)
            leads.append(lead)
        lead = torch.stack(leads, dim=1)
        return Routed(self.classify(x), (lead > 0).to(lead.dtype), lead.sigmoid(), None)

    def _run_one_image(self, x: Tensor) -> Routed:
        """Like `_run_open_paths`, for one image and a folded network whose gates have no hidden state.

        A block whose paths are all closed passes its input on, so the gates of the next ones are known already.
        """
        leads: list[list[float]] = []
        known: list[list[float]] = []  # of the next blocks, the nearest last
        dtype = x.dtype
        for block in self.gated_blocks():
            if block.always:
                lead, images = [math.inf] * block.num_paths, None
            else:
                if not known:
                    ahead, _ = block.ahead.leads(x, None)
                    known, dtype = ahead.view(-1, block.num_paths).tolist()[::-1], ahead.dtype
                lead = known.pop()
                images = [[0] if path > 0 else [] for path in lead]
            leads.append(lead)
            if not block.passes(images):
                x, known = run_block(block, x, None, images), []
        lead = torch.tensor([leads], dtype=dtype, device=x.device)
        return Routed(self.classify(x), (lead > 0).to(lead.dtype), lead.sigmoid(), None)

    def costs(self, shape: Sequence[int]) -> Costs:
        """Return what each part costs for one image of `shape` (channels, height, width); cached.

        The layers are counted in one pass on the meta device, where nothing is computed.
        """
        shape = tuple(shape)
        known = self._costs.of(self)
        costs = known.get(shape)  # another thread may empty it
        if costs is None:
            costs = known[shape] = self._measure(shape)
        return costs

    def _measure(self, shape: tuple[int, ...]) -> Costs:
        clone = without_values(self).eval()
        macs: dict[nn.Module, int] = {}

        def note(layer, inputs, output):
            macs[layer] = output[0].numel() * layer.weight[0].numel()

        for layer in clone.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(note)
        with profile.countable(self), torch.no_grad(), CallCounter():
            clone(torch.empty(1, *shape, device="meta"), ALL_PATHS)

        def leaves(layers: Iterable[nn.Module]) -> set[nn.Module]:  # of layers that were replaced by several too
            parts = {part for layer in layers for part in layer.modules()}
            return {part for part in parts if isinstance(part, (nn.Conv2d, nn.Linear))}

        def total(layers: Iterable[nn.Module]) -> int:
            return sum(macs.get(layer, 0) for layer in leaves(layers))

        blocks = list(clone.gated_blocks())
        paths = tuple(tuple(total(block.layers_of_path(j)) for j in range(block.num_paths)) for block in blocks)
        deciding = [layer for block in blocks if not block.always for layer in block.layers_of_gates()]
        controllers = sum(layer.weight.numel() for layer in leaves(deciding))
        return Costs(sum(macs.values()) - sum(map(sum, paths)), controllers, paths)

    def routes(self, images, point, macs):
        """The gates of each image: for each block, a digit per path, which is 1 if the path was computed."""
        gates = self.run(images, point).gates > 0.5
        return ["-".join("".join(str(int(path)) for path in block) for block in image) for image in gates.tolist()]

    def report(self, data):
        """Costs of images, rates of paths, easy and hard images; see `models.dmnn.report`."""
        return report.report(self, data)

    def fold(self, batches=()):
        """A copy for inference: batch norms folded into the layers before them, gates merged, no category heads."""
        model = folding.folded_copy(self)
        for module in model.modules():
            if isinstance(getattr(module, "category", None), nn.Module):
                module.category = None
        model.looks_ahead = _merge_gates(list(model.gated_blocks()))
        return model


def run_block(block: GatedBlock, x: Tensor, gates: Tensor | None, images: list[list[int]] | None = None) -> Tensor:
    """Run a block; the next one may overwrite what this returns, and not what hooks have kept."""
    x = block(x, gates, images)
    return x.clone() if is_hooked(block) else x


def _merge_gates(blocks: Sequence[GatedBlock]) -> bool:
    """Merge the gates of folded blocks; returns whether they have no hidden state, so that each may look ahead."""
    deciding = [block for block in blocks if not block.always]
    for block in deciding:
        block.merged = MergedGates(block.layers_of_gates())
    if any(block.merged.has_state for block in deciding):
        return False
    for i, block in enumerate(blocks):
        if not block.always:
            block.ahead = MergedGates(*(each.layers_of_gates() for each in _same_input(blocks[i : i + AHEAD])))
    return True


def _same_input(blocks: Sequence[GatedBlock]) -> Iterable[GatedBlock]:
    """The first of these blocks, whose gates may read the same input: it passes them if no path before is open."""
    channels = blocks[0].merged.embed.shape[0]
    return itertools.takewhile(lambda block: not block.always and block.merged.embed.shape[0] == channels, blocks)


class MultiPath:
    """What both DMNN networks share: loading of checkpoints, and which parameters are those of gates."""

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters that decide: those of the controllers, category heads included."""
        return [parameter for block in self.gated_blocks() for parameter in block.controller.parameters()]

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop category heads that this network lacks; keep its own if the file has none. Evaluation needs none.

        Raises:
            ValueError: the file has another number of paths.
        """
        own = self.state_dict()
        found = len({match[1] for match in (re.search(r"\.paths\.(\d+)\.", key) for key in state) if match})
        paths = max(block.num_paths for block in self.gated_blocks())
        if found and found != paths:
            raise ValueError(
                f"the checkpoint has {found} paths in a block, this network {paths}; use num_paths {found}"
            )
        heads = {key: value for key, value in own.items() if ".controller.category." in key}
        if not heads:
            return {key: value for key, value in state.items() if ".controller.category." not in key}
        return state if any(key in state for key in heads) else state | heads


def check_paths(num_paths: int) -> None:
    """Raise ValueError unless there is a path."""
    if num_paths < 1:
        raise ValueError(f"num_paths {num_paths} leaves nothing to run; use 1 or more")


def category_groups(category: bool, grouping: Grouping | None, num_classes: int) -> int:
    """Number of coarse categories to predict; 0 without category loss. Raises ValueError if it lacks a grouping."""
    if not category:
        return 0
    if grouping is None:
        raise ValueError("the category loss needs a grouping of these classes; give --coarse_file, or no --category")
    if len(grouping.group_of_class) != num_classes:
        raise ValueError(
            f"the grouping is of {len(grouping.group_of_class)} classes, this network has {num_classes}; "
            f"use --no_category, or --coarse_file with one group number per class"
        )
    return len(grouping.names)
