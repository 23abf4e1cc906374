"""Which of two ways to make the same step is the faster: both are tried on the first steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from utils import say

Way = Callable[[Tensor, Tensor], Tensor]
#: steps of a way before it is timed, in which it is compiled and recorded, and steps over which it is timed
UNTIMED, TIMED = 10, 30
#: seconds of training that must be left for the second way to be tried, which takes a minute or more to compile
WORTH_TRYING = 300.0
#: share of the first way's time that the second must save
WORTH_CHANGING = 0.03


class FasterStep:
    """Makes each step in one of two ways, and after a trial of both always in the faster one.

    Steps of a trial are steps of the run as any other, so none is lost but the time to compile.

    Args:
        ways: by their names in what is printed; the second takes long to begin with.
        steps: that the run has left.
        settled: called with the name of the way that is kept.
        clock: in seconds; it waits for the device, see `engine.fast.clock_of`.
        agree: makes a time that each process has measured the same in all of them.
    """

    def __init__(
        self,
        ways: dict[str, Way],
        steps: int,
        settled: Callable[[str], None],
        clock: Callable[[], float],
        agree: Callable[[float], float] = lambda seconds: seconds,
    ):
        self.names, self.ways = list(ways), list(ways.values())
        self.left, self.settled, self.clock, self.agree = steps, settled, clock, agree
        self.current, self.seconds = 0, []
        self.taken = 0  # steps of the current way that count towards its trial
        self.kept: int | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        result = self.ways[self.current](images, labels)
        if self.kept is None:
            self._time()
        return result

    def restart(self) -> None:
        """Begin the present timing again: something else than steps has taken time since the last one."""
        if self.kept is None and self.taken >= UNTIMED:
            self.taken, self.since = UNTIMED, self.clock()

    def _time(self) -> None:
        self.taken += 1
        self.left -= 1
        if self.taken == UNTIMED:
            self.since = self.clock()
        elif self.taken == UNTIMED + TIMED:
            self.seconds.append(self.agree((self.clock() - self.since) / TIMED))
            kept = choose(self.seconds, self.left)
            if kept is None:
                self.current, self.taken = 1, 0
                say(f"trying steps that are {self.names[1]}, which takes a minute or more to begin with")
            else:
                self._keep(kept)

    def _keep(self, kept: int) -> None:
        self.current = self.kept = kept
        times = ", ".join(f"{1e3 * s:.3g} ms {name}" for s, name in zip(self.seconds, self.names, strict=False))
        say(f"a step takes {times}: from here on {self.names[kept]}")
        self.ways = [way if index == kept else None for index, way in enumerate(self.ways)]  # frees what it recorded
        self.settled(self.names[kept])


def choose(seconds: Sequence[float], steps: int) -> int | None:
    """The index of the way to keep, or None to try the second one.

    Args:
        seconds: of a step in each way that has been timed.
        steps: that are left.
    """
    if len(seconds) == 1:
        return None if steps * seconds[0] > WORTH_TRYING else 0
    first, second = seconds
    return int(second < (1 - WORTH_CHANGING) * first)
