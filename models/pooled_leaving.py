"""Early exits over a stream of batches: images that stay wait until they make up a full batch.

A batch that most images have left keeps the device half idle; a full one costs the least per image. Images are batched
with others of the stream only in eval mode, in which no image affects the result of another.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.layers import select_images

#: share of a full batch with which images go on at once: to wait, their maps would be copied twice
NEARLY_FULL = 7 / 8


@dataclass(frozen=True)
class Stage:
    """What lies between two exits at which images leave.

    Args:
        exits: the exits whose heads are run, from 1; images may leave at the last of them.
        threshold: confidence from which an image leaves.
        cost: multiply-accumulates of an image that leaves.
    """

    exits: tuple[int, ...]
    threshold: float
    cost: int


@dataclass
class Batch:
    """A batch of the stream, and what is known so far about its images."""

    size: int
    left: int = field(init=False)
    logits: list[Tensor | None] = field(init=False)
    macs: list[int] = field(init=False)
    none: Tensor | None = None  # logits of no image, if there is none

    def __post_init__(self):
        self.left, self.logits, self.macs = self.size, [None] * self.size, [0] * self.size

    def result(self) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and multiply-accumulates, int64 (N,), once all images have left."""
        logits = torch.stack(self.logits) if self.none is None else self.none
        return logits, torch.tensor(self.macs, dtype=torch.int64, device=logits.device)


#: an image of the stream: its batch, and its index there
Place = tuple[Batch, int]


class Pool:
    """Images waiting for a stage, at most one less than two full batches; their maps are copied here once.

    Args:
        full: number of images in a full batch.
        walk: one of the passes that arrive here, with `maps`: what it keeps for later exits.
        carry: what the last head handed on.
    """

    def __init__(self, full: int, walk, carry: Tensor | None):
        self.walk, self.places, self.taken = walk, [], 0
        self.rooms = [None if x is None else _room(x, 2 * full - 1) for x in (*walk.maps, carry)]

    def add(self, walk, carry: Tensor | None, rows: Tensor, places: Sequence[Place]) -> None:
        """Add some images of a pass to those waiting."""
        self._close_up()
        start = len(self.places)
        for room, x in zip(self.rooms, (*walk.maps, carry), strict=True):
            if room is not None:
                select_images(x, rows, out=room[start : start + len(places)])
        self.places += places

    def take(self, count: int):
        """Take the images that have waited longest: a pass of them, what its last head handed on, and their places."""
        self._close_up()
        places, self.places, self.taken = self.places[:count], self.places[count:], count
        walk = copy.copy(self.walk)
        *walk.maps, carry = [None if room is None else room[:count] for room in self.rooms]
        return walk, carry, places

    def _close_up(self) -> None:
        """Move the rest to the front, once the images that were taken have gone through their stage."""
        count = len(self.places)
        if self.taken and count:
            for room in self.rooms:
                if room is not None:
                    room[:count] = room[self.taken : self.taken + count]
        self.taken = 0


def _room(x: Tensor, images: int) -> Tensor:
    """Memory for this many images like those of x, in its memory format."""
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((images, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout)


class Line:
    """The stages of a network at one point, with a pool of waiting images before each but the first.

    Args:
        network: a `MultiExit` in eval mode.
        stages: in order; all images leave at the last one.
        confidence: of logits (images, classes).
        full: number of images in a full batch; larger ones may enter.
    """

    def __init__(self, network, stages: Sequence[Stage], confidence: Callable[[Tensor], Tensor], full: int):
        self.network, self.stages, self.confidence, self.full = network, stages, confidence, full
        self.pools: list[Pool | None] = [None] * len(stages)  # pools[k] waits for stage k

    def enter(self, batch: Batch, images: Tensor) -> None:
        """Run images through the first stage, and on through later ones as long as enough of them stay."""
        if not batch.size:
            batch.none = self.network.all_logits(images, [1])[1]
            return
        self._run(0, self.network.start_walk(images), None, [(batch, i) for i in range(batch.size)])

    def finish(self, batch: Batch | None = None) -> None:
        """Run pools that are not full: those that hold images of `batch`, or all of them."""
        for k, pool in enumerate(self.pools):
            if pool is not None and pool.places and (batch is None or any(b is batch for b, _ in pool.places)):
                self._run(k, *pool.take(len(pool.places)))

    def _run(self, k: int, walk, carry: Tensor | None, places: list[Place]) -> None:
        """Run stage k, and then the next one as long as there is a batch for it that is full or nearly so."""
        while True:
            stage = self.stages[k]
            for exit in stage.exits:
                logits, carry = self.network.head(exit, walk.to(exit), carry)
            k += 1
            if k == len(self.stages):
                return _leave(logits, places, stage.cost)
            leaves = (self.confidence(logits) >= stage.threshold).tolist()  # waits for the device
            staying = [i for i, leaving in enumerate(leaves) if not leaving]
            if len(staying) < len(leaves):
                leaving = [i for i, leaving in enumerate(leaves) if leaving]
                _leave(logits[leaving], [places[i] for i in leaving], stage.cost)
            if not staying:
                return None
            places = [places[i] for i in staying]
            rows = torch.tensor(staying, device=logits.device)
            if len(staying) >= NEARLY_FULL * self.full:
                if len(staying) < len(leaves):
                    walk.keep(rows)
                    carry = None if carry is None else select_images(carry, rows)
                continue
            pool = self.pools[k]
            if pool is None:
                pool = self.pools[k] = Pool(self.full, walk, carry)
            pool.add(walk, carry, rows, places)
            if len(pool.places) < self.full:
                return None
            walk, carry, places = pool.take(self.full)


def _leave(logits: Tensor, places: Sequence[Place], cost: int) -> None:
    for row, (batch, i) in zip(logits.unbind(), places, strict=True):
        batch.logits[i], batch.macs[i] = row, cost
        batch.left -= 1


def stream(line: Line, batches: Iterable[Tensor], window: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits and multiply-accumulates of each batch, in the order of the batches.

    Args:
        window: the most images whose results are held back. If a batch would exceed it, the oldest batch is finished
            first, in batches that are not full. One batch is always let in.
    """
    held: deque[Batch] = deque()
    for images in batches:
        while held and sum(batch.size for batch in held) + len(images) > window:
            line.finish(held[0])
            yield held.popleft().result()
        held.append(Batch(len(images)))
        line.enter(held[-1], images)
        while held and not held[0].left:
            yield held.popleft().result()
    line.finish()
    while held:
        yield held.popleft().result()
