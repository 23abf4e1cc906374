"""Cut a network with exits into stages for other programs: one per exit, each continuing where the last one ended.

The first stage takes images, each later one what the previous stage handed on; all return the logits of their exit and
what the next one needs. A host program runs them in order and stops when it is confident enough, as
`AdaptiveModel.infer` does. The forward pass is traced once and its graph is cut, whatever the layers are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from models.adaptive import AdaptiveModel, Point


class AtPoints(nn.Module):
    """What a network computes at several of its exits in one pass: images (N, 3, H, W) to the logits of each."""

    def __init__(self, network: AdaptiveModel, points: Sequence[Point]):
        super().__init__()
        self.network, self.points = network, tuple(points)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network.logits_at(images, self.points))


class Stage(nn.Module):
    """The part of a network from one exit to the next.

    Args:
        part: the module that computes it.
        point: the point whose logits it returns.
        inputs: example inputs for two images, for tracing.
        outputs: number of tensors it returns.
    """

    def __init__(self, part: fx.GraphModule, point: Point, inputs: Sequence[Tensor], outputs: int):
        super().__init__()
        self.part, self.point = part, point
        self.inputs, self.outputs = tuple(inputs), outputs

    def forward(self, *state: Tensor) -> tuple[Tensor, ...]:
        """Return logits (N, classes), followed by the state that the next stage takes."""
        return self.part(*state)

    @torch.no_grad()
    def macs(self) -> int:
        """Return the multiply-accumulates of one image in this stage alone."""
        with FlopCounterMode(display=False) as counter:
            self(*(value[:1] for value in self.inputs))
        return counter.get_total_flops() // 2


@torch.no_grad()
def cut(network: AdaptiveModel, points: Sequence[Point], shape: Sequence[int]) -> list[Stage]:
    """Cut a network, on the CPU and in eval mode, into stages that stop at `points`.

    Args:
        network: as it is to be written; nothing is merged here.
        points: points from `AdaptiveModel.leaving`, cheapest first.
        shape: (channels, height, width) of an image.
    """
    images = torch.zeros(2, *shape)
    program = torch.export.export(
        AtPoints(network, points), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    whole = program.run_decompositions({}).module()  # without operations that write into their inputs
    (output,) = (node for node in whole.graph.nodes if node.op == "output")
    ends = list(output.args[0])
    stage_of: dict[fx.Node, int] = {}
    for number, end in enumerate(ends):
        _mark(end, number, stage_of)
    stages, inputs, state = [], (images,), [node for node in whole.graph.nodes if node.op == "placeholder"]
    for number, (end, point) in enumerate(zip(ends, points, strict=True)):
        later = [node for node, stage in stage_of.items() if stage > number]
        needed = {source for node in later for source in node.all_input_nodes if stage_of[source] <= number}
        handed_on = [node for node in whole.graph.nodes if node in needed and _is_per_image(node)]
        part = fx.GraphModule(whole, _graph(whole.graph, stage_of, number, state, [end, *handed_on]))
        stages.append(Stage(part, point, inputs, 1 + len(handed_on)))
        _, *inputs = stages[-1](*inputs)
        state = handed_on
    return stages


def _mark(end: fx.Node, number: int, stage_of: dict[fx.Node, int]) -> None:
    """Assign stage `number` to everything that `end` needs and no earlier stage has computed."""
    left = [end]
    while left:
        node = left.pop()
        if node not in stage_of:
            stage_of[node] = number
            left += node.all_input_nodes


def _is_per_image(node: fx.Node) -> bool:
    """Whether a node makes a tensor from images. Weights, and the number of images, are obtained anew in each stage."""
    return node.op != "get_attr" and isinstance(node.meta.get("val"), Tensor)


def _graph(
    whole: fx.Graph, stage_of: dict[fx.Node, int], number: int, state: Sequence[fx.Node], results: Sequence[fx.Node]
) -> fx.Graph:
    """The graph of one stage: from what the previous stage handed on to its logits and what it hands on itself."""
    graph = fx.Graph()
    have = {node: graph.placeholder("images" if number == 0 else f"state{k}") for k, node in enumerate(state, start=1)}
    first = next(iter(have.values()))

    def value(node: fx.Node) -> fx.Node:
        if node not in have:
            if node.target is torch.ops.aten.sym_size.int:  # the number of images, i.e. of rows in any tensor
                have[node] = graph.call_function(node.target, (first, 0))
            else:
                have[node] = graph.node_copy(node, value)
        return have[node]

    for node in whole.nodes:
        if stage_of.get(node) == number and node.op == "call_function":
            value(node)
    # copied, because a result may also be an input, or appear twice
    copied = [graph.call_function(torch.ops.aten.clone.default, (value(node),)) for node in results[1:]]
    graph.output((value(results[0]), *copied))
    return graph
