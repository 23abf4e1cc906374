"""Gradients of several processes: averaged once per optimizer step, while its last backward pass is still running.

A step may have several backward passes, each of which adds to the gradients; they are complete only after the last one.
Which pass is the last is known only when it is over, so the previous step serves as a prediction: in the pass of the
same number, a bucket of parameters is sent as soon as all the gradients it waits for have been written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.stopping import Agreement
from utils import world_size


class Bucket:
    """Parameters whose gradients are sent as one message."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)
        self.missing: set[nn.Parameter] = set()  # those that the current pass has yet to write
        self.message: Tensor | None = None
        self.work: dist.Work | None = None
        self.outdated = False  # whether a gradient was written after it was sent


class Gradients:
    """The mean over all processes of each gradient that an optimizer step uses.

    Every process must have gradients of the same parameters: the passes of a step must not depend on its images.

    Args:
        parameters: the trained parameters, in the order of the network.
        agreement: the agreement on stopping, which is sent with the last message.
        bucket_bytes: approximate size of a message; the last layers send theirs while the first are still computed.
        overlap: whether messages may be sent during a backward pass, which is impossible if passes are recorded and
            replayed.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        agreement: Agreement,
        bucket_bytes: int = 25 << 20,
        overlap: bool = True,
    ):
        self.agreement = agreement
        self.buckets = _filled(parameters, bucket_bytes) if dist.is_initialized() else []
        self.passes, self.usual = 0, 0  # backward passes so far in this step, and in the previous one
        self.written: set[nn.Parameter] = set()  # by the current pass
        self.awaited: frozenset[nn.Parameter] = frozenset()  # what the last pass of the last step wrote
        self.sent, self.overlaps, self.may_overlap = 0, False, overlap
        self._bucket_of = {parameter: bucket for bucket in self.buckets for parameter in bucket.parameters}
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._on_written) for parameter in self._bucket_of]

    def remove(self) -> None:
        """Detach from the parameters, which will be trained in another way."""
        for hook in self._hooks:
            hook.remove()

    def backward(self, loss: Tensor) -> None:
        """Call `loss.backward()`, sending complete gradients if this is probably the step's last pass."""
        self.passes += 1
        self.overlaps = self.may_overlap and self.passes == self.usual
        self.written.clear()
        for bucket in self.buckets if self.overlaps else ():
            bucket.missing = set(self.awaited.intersection(bucket.parameters))
        loss.backward()
        self.overlaps = False

    def _on_written(self, parameter: nn.Parameter) -> None:
        self.written.add(parameter)
        bucket = self._bucket_of[parameter]
        bucket.missing.discard(parameter)
        bucket.outdated |= bucket.work is not None
        # in order, so that the messages of all processes match
        while self.overlaps and self.sent < len(self.buckets) and not self.buckets[self.sent].missing:
            self._send(self.buckets[self.sent])
            self.sent += 1

    def _send(self, bucket: Bucket) -> None:
        parts = [parameter.grad.flatten() for parameter in bucket.parameters if parameter.grad is not None]
        if bucket is self.buckets[-1]:
            parts.append(self.agreement.request)
        bucket.outdated = False
        if parts:
            bucket.message = torch.cat(parts)
            bucket.work = dist.all_reduce(bucket.message, async_op=True)

    def average(self) -> None:
        """Replace every gradient by its mean over the processes. Call it before each optimizer step."""
        for bucket in self.buckets[self.sent :]:
            self._send(bucket)
        for bucket in self.buckets:
            self._receive(bucket)
        self.usual, self.awaited = self.passes, frozenset(self.written)
        self.passes = self.sent = 0

    def _receive(self, bucket: Bucket) -> None:
        if bucket.work is not None:
            bucket.work.wait()
        if bucket.outdated:
            self._send(bucket)
            bucket.work.wait()
        if bucket.work is None:
            return
        gradients = [parameter.grad for parameter in bucket.parameters if parameter.grad is not None]
        sizes = [gradient.numel() for gradient in gradients]
        parts = bucket.message.split([*sizes, len(bucket.message) - sum(sizes)])
        if gradients:
            means = [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=False)]
            torch._foreach_copy_(gradients, torch._foreach_div(means, float(world_size())))
        if bucket is self.buckets[-1]:
            self.agreement.agreed.copy_(parts[-1])
        bucket.message = bucket.work = None


def _filled(parameters: Sequence[nn.Parameter], most: int) -> list[Bucket]:
    """The parameters in buckets, last ones first, as backward passes write these first."""
    groups: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in reversed(parameters):
        if groups[-1] and size + parameter.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += parameter.nbytes
    return [Bucket(group) for group in groups]
