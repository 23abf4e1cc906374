"""Find the faster of two ways to make the same step by trying both in the first steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from utils import say

Way = Callable[[Tensor, Tensor], Tensor]
#: number of steps before a way is timed, in which it is compiled and recorded, and over which it is timed
UNTIMED, TIMED = 10, 30
#: seconds of training that must be left to try the second way, which takes a minute or more to compile
WORTH_TRYING = 300.0
#: share of the first way's time that the second must save
WORTH_CHANGING = 0.03


class FasterStep:
    """Make each step in one of two ways and, after a trial of both, always in the faster one.

    Steps of a trial are ordinary steps of the run, so only the time to compile is lost.

    Args:
        ways: the two ways, by their printed names; the second takes long to start.
        steps: steps that the run has left.
        settled: called with the name of the way that is kept.
        clock: returns seconds after waiting for the device, see `engine.fast.clock_of`.
        agree: turns the times that the processes have measured into one that is the same in all of them.
        untimed, timed: number of steps before a way is timed, and over which it is timed.
        worth_trying: seconds of training that must be left to try the second way.
    """

    def __init__(
        self,
        ways: dict[str, Way],
        steps: int,
        settled: Callable[[str], None],
        clock: Callable[[], float],
        agree: Callable[[float], float] = lambda seconds: seconds,
        *,
        untimed: int = UNTIMED,
        timed: int = TIMED,
        worth_trying: float = WORTH_TRYING,
    ):
        self.names, self.ways = list(ways), list(ways.values())
        self.left, self.settled, self.clock, self.agree = steps, settled, clock, agree
        self.untimed, self.timed, self.worth_trying = untimed, timed, worth_trying
        self.current, self.seconds = 0, []
        self.taken = 0  # steps of the current way that count towards its trial
        self.kept: int | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        result = self.ways[self.current](images, labels)
        if self.kept is None:
            self._time()
        return result

    def restart(self) -> None:
        """Restart the current timing, because something other than steps has taken time since the last one."""
        if self.kept is None and self.taken >= self.untimed:
            self.taken, self.since = self.untimed, self.clock()

    def _time(self) -> None:
        self.taken += 1
        self.left -= 1
        if self.taken == self.untimed:
            self.since = self.clock()
        elif self.taken == self.untimed + self.timed:
            self.seconds.append(self.agree((self.clock() - self.since) / self.timed))
            kept = choose(self.seconds, self.left, self.worth_trying)
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


def choose(seconds: Sequence[float], steps: int, worth_trying: float = WORTH_TRYING) -> int | None:
    """Return the index of the way to keep, or None to try the second one.

    Args:
        seconds: seconds per step of each way that has been timed.
        steps: steps that are left.
        worth_trying: seconds of training that must be left to try the second way.
    """
    if len(seconds) == 1:
        return None if steps * seconds[0] > worth_trying else 0
    first, second = seconds
    return int(second < (1 - WORTH_CHANGING) * first)
