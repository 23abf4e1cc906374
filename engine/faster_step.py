"""Find the faster of two ways to make the same step by trying both in the first steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from utils import say

Way = Callable[[Tensor, Tensor], Tensor]
#: number of steps before a way is timed, in which it is compiled and recorded; steps that are timed together; and how
#: often each way is timed
UNTIMED, TIMED, ROUNDS = 10, 10, 3
#: seconds of training that must be left to try the second way, which takes a minute or more to compile
WORTH_TRYING = 300.0
#: share of the first way's time that the second must save
WORTH_CHANGING = 0.03


class FasterStep:
    """Make each step in one of two ways and, after a trial of both, always in the faster one.

    The first way is timed, then the second one is started, and from then on they are timed in turns. The quickest time
    of each counts, because whatever else runs on the machine can only make steps longer. Steps of a trial are ordinary
    steps of the run, so only the time to compile is lost.

    Args:
        ways: the two ways, by their printed names; the second takes long to start.
        steps: steps that the run has left.
        settled: called with the name of the way that is kept.
        clock: returns seconds after waiting for the device, see `engine.fast.clock_of`.
        agree: turns the times that the processes have measured into one that is the same in all of them.
        untimed, timed, rounds: number of steps before a way is timed; that are timed together; and how often.
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
        rounds: int = ROUNDS,
        worth_trying: float = WORTH_TRYING,
    ):
        self.names, self.ways = list(ways), list(ways.values())
        self.left, self.settled, self.clock, self.agree = steps, settled, clock, agree
        self.timed, self.worth_trying = timed, worth_trying
        #: what comes next in the trial: a way, and the number of its steps that are not timed before those that are
        self.plan = [(0, untimed), (1, untimed), *[(0, 0), (1, 0)] * (rounds - 1)]
        self.seconds: list[list[float]] = [[], []]  # per step, of each way
        self.taken = 0  # steps of the current part of the plan
        self.since = 0.0
        self.kept: int | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.kept is not None:
            return self.ways[self.kept](images, labels)
        way, untimed = self.plan[0]
        if self.taken == untimed:
            self.since = self.clock()
        result = self.ways[way](images, labels)
        self.taken += 1
        self.left -= 1
        if self.taken == untimed + self.timed:
            self.seconds[way].append((self.clock() - self.since) / self.timed)
            self.taken = 0
            self._continue()
        return result

    def restart(self) -> None:
        """Restart the current timing, because something other than steps has taken time since the last one."""
        if self.kept is None:
            self.taken = min(self.taken, self.plan[0][1])

    def _continue(self) -> None:
        """Go on with the next part of the plan, or end the trial."""
        del self.plan[0]
        if self.plan and self.seconds[1]:
            return
        seconds = [self.agree(min(each)) for each in self.seconds if each]
        kept = choose(seconds, self.left, self.worth_trying)
        if kept is None:
            say(f"trying steps that are {self.names[1]}, which takes a minute or more to begin with")
        else:
            self._keep(kept, seconds)

    def _keep(self, kept: int, seconds: Sequence[float]) -> None:
        self.kept = kept
        times = ", ".join(f"{1e3 * s:.3g} ms {name}" for s, name in zip(seconds, self.names, strict=False))
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
