"""What a slimmable network keeps for its points beside its state dict, and the weights to which it belongs."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import debug_unwrap

from models.layers import Layers
from models.slimmable.layers import Cut, SlimLayer, Statistics
from utils import UserError

#: bytes that the plans of all points may hold in dense copies of weights; the plan in use always stays
COPIES = 256 << 20


class Prepared:
    """Batch-norm statistics and plans of points, all made from the same weights.

    The storage and the version counter of each parameter show whether the network still has these weights. Checking
    them takes microseconds and never waits for the device, so it is done before every forward pass. Fused optimizers do
    not count their writes, so a pass in train mode records that it ran (`trained`); the writes of replayed CUDA graphs
    are counted by the engine after each epoch. Only writes through a parameter's `.data` go unnoticed until `prepare`
    is called.

    If something may have changed, the weights' fingerprint decides, because weights that were moved to another device
    or copied with the network are still the same.

    Args:
        network: fully built; its parameters may be replaced later, but where its `layers` are, the network makes a
            new object of this class.
    """

    def __init__(self, network: nn.Module):
        #: statistics by width and resolution, then by device, in the order of the network's calibrated batch norms
        self.statistics: dict[tuple[float, int], dict[torch.device, tuple[Statistics, ...]]] = {}
        #: fingerprint of the weights with which the statistics were measured
        self.fingerprint = ""
        #: the kind of the layers' own running statistics: initial ones; moving averages of training; calibrated by the
        #: authors of a released file, at the largest resolution; or unknown, because those of a file were unusable
        self.running_statistics: Literal["initial", "moving", "calibrated", "unknown"] = "initial"
        self.warned = False
        self.plans: dict[object, Plan] = {}
        #: whether a pass in train mode has run since `renew`
        self.trained = False
        # the modules' dictionaries, through which a replica of DataParallel sees the original's weights
        self._parameters = [
            (module._parameters, name)
            for module in network.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._seen: list[tuple] = []
        self.layers = Layers(network)

    def __getstate__(self) -> dict:
        """For copies and pickles: plans are made anew, and the copied weights are compared by fingerprint."""
        return self.__dict__ | {"plans": {}, "_seen": []}

    def unchanged(self) -> bool:
        """Whether the weights are certainly still those that `renew` saw."""
        if self.trained or not self._seen:
            return False
        return all(
            [
                owner.get(name) is tensor
                and tensor.data_ptr() == address
                and (version is None or tensor._version == version)
                for owner, name, tensor, address, version, _ in self._seen
            ]
        )

    def fingerprint_of(self, kind: str) -> str:
        """Identify the current weights and the kind of statistics measured with them. Waits for the device."""
        digest = hashlib.sha1(kind.encode())
        for owner, name in self._parameters:
            digest.update(_parameter(owner, name).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def renew(self, fingerprint: str) -> None:
        """Drop what does not belong to the current weights, which have this fingerprint."""
        if fingerprint != self.fingerprint:
            self.statistics, self.fingerprint = {}, fingerprint
        self.plans.clear()
        self.trained, self._seen = False, []
        for owner, name in self._parameters:
            tensor = _parameter(owner, name)
            if tensor is not owner[name]:  # of a transform, which ends before the next look
                self._seen = []
                break
            version = None if tensor.is_inference() else tensor._version
            # the detached tensor keeps the storage alive, so that no other gets its address
            self._seen.append((owner, name, tensor, tensor.data_ptr(), version, tensor.detach()))

    def note_training(self) -> None:
        """Forget plans, which hold copies of the weights; from now on the layers' averages are those of training."""
        self.plans.clear()
        if self.running_statistics == "initial":
            self.running_statistics = "moving"

    def warn_of_moving_averages(self, point: object) -> None:
        """Say, once, that a point without statistics of its own runs with averages of passes at any resolution."""
        if self.running_statistics == "moving" and not self.warned:
            self.warned = True
            warnings.warn(
                f"{point} is not calibrated for the present weights and runs with the moving averages of its training: "
                "`model.prepare([point], batches of training images)` measures its own statistics",
                stacklevel=2,
            )

    def statistics_of(self, width: float, resolution: int, device: torch.device) -> tuple[Statistics, ...] | None:
        """Return the measured statistics on a device; None if there are none."""
        copies = self.statistics.get((width, resolution))
        if copies is None:
            return None
        if device not in copies:  # DataParallel calls this on each of its devices
            first = next(iter(copies.values()))
            with torch.inference_mode(False):  # as in `load`
                copies[device] = tuple((mean.to(device), var.to(device)) for mean, var in first)
        return copies[device]

    @torch.inference_mode(False)  # passes with gradients may follow
    def load(self, width: float, resolution: int, table: Tensor, sizes: list[int], device: torch.device) -> None:
        """Keep the statistics of a table (2, channels), in which each batch norm has as many channels as in `sizes`."""
        means, variances = (row.split(sizes) for row in table.to(device, copy=True))
        self.statistics[width, resolution] = {device: tuple(zip(means, variances))}

    def planned(self, point: object, cut: Cut, layers: Callable[[], Iterable[SlimLayer]]) -> Cut:
        """Return the cut with all its parts taken beforehand, unless a transform gives the weights."""
        if not self._seen:
            return cut
        plan = self.plans.get(point)
        if plan is None or not plan.serves(cut):
            self.plans.pop(point, None)
            plan = Plan(layers(), cut)
            for oldest in list(self.plans):  # lists, because other threads may add and drop plans
                if plan.copied + sum(other.copied for other in list(self.plans.values())) <= COPIES:
                    break
                self.plans.pop(oldest, None)
            self.plans[point] = plan
        return plan.cut


def _parameter(owner: dict[str, Tensor | None], name: str) -> Tensor:
    """The parameter of this name of a module, outside any transform. Raises UserError if something else computes it."""
    tensor = owner.get(name)
    if tensor is None:
        raise UserError(
            f"a {name} of this network is pruned or parametrized, so batch-norm statistics cannot be kept for it: "
            "make the change permanent (torch.nn.utils.prune.remove, parametrize.remove_parametrizations)"
        )
    return debug_unwrap(tensor)  # transforms of torch.func give wrapped ones, which have no storage


class Plan:
    """A cut whose parts are taken once and used as long as the weights stay the same.

    Kernels need dense weights and would copy a view with gaps in every pass; here it is copied once. Parts without gaps
    are views, so running statistics follow what is written to them.
    """

    def __init__(self, layers: Iterable[SlimLayer], cut: Cut):
        self._buffers = []  # and the dictionaries in which their modules keep them
        parts, self.copied = [], 0  # bytes
        for layer in layers:
            taken = layer.part(cut)
            parts.append(tuple(map(dense, taken)))
            self.copied += sum(new.nbytes for new, old in zip(parts[-1], taken, strict=True) if new is not old)
            for owner in layer.owners(cut):
                self._buffers += [(owner._buffers, *item) for item in owner._buffers.items()]
        self.cut = replace(cut, parts=tuple(parts))

    def serves(self, cut: Cut) -> bool:
        """Whether its parts are still those of the layers for `cut`: the same width and unchanged weights."""
        return self.cut.statistics is cut.statistics and all(
            [buffers.get(name) is tensor for buffers, name, tensor in self._buffers]
        )


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it has gaps."""
    whole = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor if whole else tensor.clone()
