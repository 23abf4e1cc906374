"""Export a network at one of its points to a file for other programs: torch.export's format (pt2), or ONNX.

This works for every family: the sub-network is cut out if the network can do that, folded if it can be, and stripped of
every weight that the point never reads, such as those of later exits, skipped blocks and closed gates. What remains is
a fixed graph from images to logits. A point at which each image decides what runs is not a fixed graph and is refused.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.adaptive import AdaptiveModel, Point
from utils import UserError

FORMATS = ("onnx", "pt2")
#: largest difference allowed in the logits of a written file, relative to the network's largest logit: float32 sums in
#: another order mostly differ by less than 1e-6, in an untrained network by up to 3e-4
TOLERANCE = 1e-3


def fixed_point(model: AdaptiveModel, name: str | None = None) -> Point:
    """Return the point to write: the one called `name`, or the main one if it is fixed, or else the largest fixed one.

    Raises:
        UserError: at the point called `name` each image decides what runs.
    """
    point = model.point(name)
    if not point.per_image:
        return point
    fixed = [other for other in model.points if not other.per_image]
    if name is not None:
        raise no_graph(point, fixed)
    return fixed[-1]


def no_graph(point: Point, others: Sequence[Point]) -> UserError:
    """Return the error to raise for a point that cannot be written; it names others that can."""
    return UserError(
        f"at the point {point} each image decides what runs, which a fixed graph cannot express; "
        f"--export writes the fixed points: {', '.join(other.name for other in others)}",
        exit_code=2,
    )


class AtPoint(nn.Module):
    """Only what a network computes at one fixed point: images (N, 3, H, W) to logits (N, classes).

    It is a copy on the CPU, in eval mode, without gradients. It resizes the images if the point does.

    Args:
        shape: (channels, height, width) of an image.
    """

    def __init__(self, model: AdaptiveModel, point: Point, shape: Sequence[int]):
        super().__init__()
        model = copy.deepcopy(model).cpu().eval()
        with contextlib.suppress(UserError):  # most networks have no sub-networks
            model = model.extract(point)
            point = model.main_point
        self.network, self.point = merged(model), point
        self._drop_unread(torch.zeros(1, *shape))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images, self.point)

    def _drop_unread(self, images: Tensor) -> None:
        with _Reads() as reads, torch.no_grad():
            self(images)
        for module in self.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: None for name, tensor in tensors.items() if id(tensor) not in reads.seen})


def merged(model: AdaptiveModel) -> AdaptiveModel:
    """Return a copy to write: on the CPU, in eval mode, without gradients, and folded if there is anything to merge."""
    model = copy.deepcopy(model).cpu().eval()
    with contextlib.suppress(ValueError):  # some networks have nothing to merge
        model = model.fold()
    # torch.export warns when it saves weights in other layouts
    return model.requires_grad_(False).eval().to(memory_format=torch.contiguous_format)


class _Reads(TorchDispatchMode):
    """Record which tensors are read by operations in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, operation: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        self.seen.update(id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
        return operation(*args, **kwargs)


def check_packages(form: str) -> None:
    """Raise ValueError if a format needs packages that are not installed."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if form == "onnx" and missing:
        raise ValueError(f"writing ONNX needs {' and '.join(missing)}: python3 -m pip install onnx onnxscript")


def write(network: AtPoint, shape: Sequence[int], form: str, path: str | Path) -> None:
    """Write a file that takes `images` (any number, *shape), float32, and returns `logits`."""
    write_graph(network, [torch.zeros(2, *shape)], ["images"], ["logits"], form, path)


def write_graph(
    module: nn.Module,
    inputs: Sequence[Tensor],
    input_names: Sequence[str],
    output_names: Sequence[str],
    form: str,
    path: str | Path,
) -> None:
    """Write a module as a graph for any number of images, which are the rows of every input and output.

    Args:
        inputs: example inputs, for two images.
        input_names, output_names: names in the ONNX file.
    """
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=tuple({0: batch} for _ in inputs))
    if form == "pt2":
        memory = io.BytesIO()  # torch insists on a suffix if it is given a path
        torch.export.save(program, memory)
        Path(path).write_bytes(memory.getbuffer())
    else:
        axes = tuple({0: "batch"} for _ in inputs)
        names: dict[str, Any] = dict(input_names=input_names, output_names=output_names, dynamic_shapes=axes)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*The axis name")  # because several inputs share one
            written = torch.onnx.export(program, dynamo=True, verbose=False, **names)
        assert written is not None
        written.save(path, external_data=False)


def load(form: str, path: str | Path) -> Callable[[Tensor], Tensor] | None:
    """Return a function that runs a written file on CPU tensors; None for ONNX if onnxruntime is not installed."""
    run = load_graph(form, path)
    return None if run is None else lambda images: run(images)[0]


def load_graph(form: str, path: str | Path) -> Callable[..., Sequence[Tensor]] | None:
    """Like `load`, for a graph with any number of inputs and outputs."""
    content = Path(path).read_bytes()
    if form == "pt2":
        module = torch.export.load(io.BytesIO(content)).module()
        return lambda *inputs: tree_leaves(module(*inputs))
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feeds)]

    return run


def add_metadata(path: str | Path, values: Mapping[str, object]) -> None:
    """Store values as JSON in the metadata_props of an ONNX file."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in values.items()})
    onnx.save(model, path)


@torch.no_grad()
def difference(run: Callable[[Tensor], Tensor], model: AdaptiveModel, point: Point, shape: Sequence[int]) -> float:
    """Return the largest difference in logits between a loaded file and the network, relative to its largest logit.

    Args:
        model: the whole network, before anything was cut or merged, on the CPU and in eval mode.

    Raises:
        ValueError: the difference is above `TOLERANCE`.
    """
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    wanted = model(images, point)
    found = ((run(images) - wanted).abs().max() / wanted.abs().max()).item()
    if not found <= TOLERANCE:
        raise ValueError(
            f"logits of the file differ from the network's by {found:.1e} of the largest, more than {TOLERANCE:g}; "
            "it was not kept"
        )
    return found
