"""The governor, with a simulated worker and clock: deadlines, bursts, constant loads, changing machines, mistakes."""

import itertools
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from models import create_model, governor
from models.governor import Cost, Governor, candidates
from models.multi_exit import BudgetPoint
from models.profile import Latency
from models.query_table import Measured, QueryTable

FULL = 0.010
#: shares of the full network's time, and accuracies
SHARES = {"a": 0.12, "b": 0.25, "c": 0.45, "d": 0.7, "e": 1.0}
TOP1 = {"a": 90.0, "b": 94.0, "c": 96.0, "d": 97.2, "e": 98.0}
DEADLINE = 3 * FULL


def costs(spread=0.0):
    return [Cost(name, TOP1[name], {1: share * FULL}, spread) for name, share in SHARES.items()]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def serve(arrivals, policy, seconds, clock, batch=1):
    """A simulated worker: (arrival, latency, point) of each image.

    Args:
        seconds: of a batch, given its point, its images and the present moment.
    """
    answers = []
    while (first := len(answers)) < len(arrivals):
        clock.now = max(clock.now, arrivals[first])
        waiting = sum(1 for _ in itertools.takewhile(lambda came: came <= clock.now, arrivals[first:]))
        point = policy.choose(waiting, clock.now - arrivals[first])
        count = min(waiting, batch)
        taken = seconds(point, count, clock.now)
        clock.now += taken
        policy.observe(point, taken, count)
        answers += [(came, clock.now - came, point) for came in arrivals[first : first + count]]
    return answers


def exact(point, count, now):
    return SHARES[point] * FULL * count


def even(*phases):
    """Arrivals at equal distances: of each phase the seconds, and the share of what the full network can serve."""
    start, moments = 0.0, []
    for seconds, share in phases:
        moments += [start + (i + 0.5) * FULL / share for i in range(int(seconds * share / FULL))]
        start += seconds
    return moments


def started(**options):
    clock = Clock()
    return Governor(costs(), DEADLINE, clock=clock, **options), clock


def changes(answers, since=0.0):
    points = [point for came, _, point in answers if came >= since]
    return sum(a != b for a, b in itertools.pairwise(points))


def test_beaten_points_are_never_chosen():
    beaten = [Cost("slow", 93.0, {1: 0.3 * FULL}), Cost("bad", 90.0, {1: 0.2 * FULL}), Cost("same", 98.0, {1: FULL})]
    clock = Clock()
    ruler = Governor([*beaten[:2], *costs(), beaten[2]], DEADLINE, clock=clock)
    assert ruler.points == tuple(SHARES)
    ruler.observe("slow", 1.0)  # reported all the same, and of no effect
    random.seed(0)
    seen = set()
    for _ in range(300):
        clock.now += random.expovariate(1 / FULL)
        seen.add(ruler.choose(random.choice((0, 1, 2, 5, 20)), random.random() * DEADLINE))
    assert {"a", "b", "c"} <= seen <= set(SHARES)


def brute_force(ranked, batch, waits, deadline):
    """The most accurate point at which each image is done in time, with the queue served batch by batch; or the first.

    Args:
        ranked: costs, cheapest first.
        waits: what each image has waited, the oldest first.
    """
    best = ranked[0].point
    for cost in ranked:
        now, late = 0.0, False
        for first in range(0, len(waits), batch):
            served = waits[first : first + batch]
            now += cost.of_batch(len(served))
            late = late or any(now + waited > deadline for waited in served)
        best = best if late else cost.point
    return best


def test_the_choice_is_that_of_a_simulated_queue():
    random.seed(1)
    chosen = []
    for _ in range(400):
        times = sorted(random.uniform(0.05, 1) for _ in range(random.randint(1, 6)))
        batch = random.choice((1, 1, 3, 8))
        ranked = [Cost(f"p{i}", 50.0 + i, {1: time, 8: 4 * time}) for i, time in enumerate(times)]
        deadline, last = random.uniform(1, 6), random.uniform(0, 0.6)
        ruler = Governor(ranked, deadline, batch=batch, clock=Clock())
        ruler._last = last  # as after a batch that took as long as expected
        queue, waited = random.randint(1, 12), random.uniform(0, 1.5)
        waits = [waited, *[min(waited, last)] * (queue - 1)]  # the others came during the last batch
        waits[1:batch] = [waited] * len(waits[1:batch])  # or with the oldest
        chosen.append(ruler.choose(queue, waited))
        assert chosen[-1] == brute_force(ranked, batch, waits, deadline)
    assert len(set(chosen)) == 6


@pytest.mark.parametrize("seed", range(6))
def test_deadlines_are_met_where_the_cheapest_has_slack(seed):
    """With exact times: an image that the cheapest point answers this much earlier is in time with the governor."""
    random.seed(seed)
    slack = max(share * FULL + DEADLINE * SHARES["a"] / share for share in list(SHARES.values())[1:])
    slack += SHARES["a"] * FULL
    moments = []
    for _ in range(12):  # any loads up to what the cheapest can serve, and volleys
        start, share = (moments or [0.0])[-1], 0.95 / SHARES["a"] * random.random() ** 2
        moments += [start + came for came in even((0.4, share))] + [start + 0.4] * random.randint(0, 8)
    ruler, clock = started()
    ours = serve(moments, ruler, exact, clock)
    cheapest = SimpleNamespace(choose=lambda *_: "a", observe=lambda *_: None)
    able = [latency <= DEADLINE - slack for _, latency, _ in serve(moments, cheapest, exact, Clock())]
    assert sum(able) > len(moments) / 2
    assert all(latency <= DEADLINE + 1e-9 for (_, latency, _), can in zip(ours, able, strict=True) if can)
    assert len({point for *_, point in ours}) >= 3, "and not by staying at the cheapest"


def test_a_random_burst_is_answered_in_time_and_full_returns():
    random.seed(0)
    phases = ((1.0, 0.4), (1.0, 2.0), (1.0, 0.4), (1.0, 4.0), (2.0, 0.4))
    start, moments = 0.0, []
    for seconds, share in phases:
        came = start
        while (came := came + random.expovariate(share / FULL)) < start + seconds:
            moments.append(came)
        start += seconds
    ruler, clock = started()
    answers = serve(moments, ruler, lambda *given: exact(*given) * math.exp(random.gauss(0, 0.05)), clock)
    assert sum(latency <= DEADLINE for _, latency, _ in answers) >= 0.99 * len(answers)
    for burst_ends in (2.0, 4.0):
        assert next(came for came, _, point in answers if came >= burst_ends and point == "e") < burst_ends + 1
    mean = sum(TOP1[point] for *_, point in answers) / len(answers)
    assert mean > TOP1["a"] + 2, "the only fixed point that is in time"


@pytest.mark.parametrize("burst", [1.2, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("calm", [0.1, 0.4, 0.7])
def test_full_returns_within_the_documented_time(burst, calm):
    ruler, clock = started()
    answers = serve(even((1.0, burst), (3.0, calm)), ruler, exact, clock)
    room = governor.HEADROOM
    documented = ruler.patience * (1 + math.log(max((burst - calm) / (room - calm), 1))) + DEADLINE + FULL / calm
    back = next(came for came, _, point in answers if came >= 1.0 and point == "e") - 1.0
    assert back <= documented
    assert changes(answers, 1.0 + documented) == 0
    assert burst < 2 or back >= ruler.patience, "a more accurate point is not taken at once"


@pytest.mark.parametrize("load", [0.05 * 1.25**i for i in range(23)])
def test_a_constant_load_settles_at_one_point(load):
    random.seed(2)
    ruler, clock = started()
    times = lambda *given: exact(*given) * random.uniform(0.97, 1.03)  # noqa: E731
    answers = serve(even((4.0, load)), ruler, times, clock)
    assert changes(answers, 2.0) == 0
    if load <= 0.8:
        assert {point for *_, point in answers} == {"e"}


def test_a_machine_of_half_the_speed_is_noticed():
    ruler, clock = started()
    answers = serve(even((6.0, 0.7)), ruler, lambda *given: exact(*given) * (1 if given[2] < 2 else 2), clock)
    before, after = ([a for a in answers if (a[0] < 2) is early] for early in (True, False))
    assert {point for *_, point in before} == {"e"}
    assert after[-1][2] == "d", "the most accurate one that keeps up at twice the time"
    assert sum(latency > DEADLINE for _, latency, _ in after) <= 2
    for point, share in SHARES.items():  # those that did not run, too
        assert ruler.expected(point) == pytest.approx(2 * share * FULL, rel=0.2)
    clock.now += 1.0
    later = serve([clock.now + came for came in even((3.0, 0.7))], ruler, exact, clock)
    assert later[-1][2] == "e", "and that it is quick again"


def test_times_that_vary_by_image_say_little_of_the_machine():
    random.seed(3)
    clock = Clock()
    varied = Cost("varied", 99.0, {1: FULL}, spread=1.0)
    ruler = Governor([*costs(), varied], 10 * FULL, clock=clock)
    shares = {"varied": [0.3, 0.3, 0.4, 3.0]}  # three images of four leave early
    times = lambda point, count, now: FULL * random.choice(shares.get(point, [SHARES.get(point)]))  # noqa: E731
    answers = serve(even((5.0, 0.3)), ruler, times, clock)
    assert [point for *_, point in answers].count("varied") > 0.95 * len(answers)
    for point in "abcd":
        assert ruler.expected(point) == pytest.approx(SHARES[point] * FULL, rel=0.25)


def test_one_long_pause_of_the_machine_is_forgotten():
    ruler, clock = started()
    pause = {100}
    counter = itertools.count()
    times = lambda *given: exact(*given) + (0.5 if next(counter) in pause else 0)  # noqa: E731
    answers = serve(even((8.0, 0.4)), ruler, times, clock)
    late = [came for came, latency, _ in answers if latency > DEADLINE]
    assert max(late) - min(late) < 0.6, "the queue of the pause is served at the cheapest"
    assert {point for came, _, point in answers if came > 5.0} == {"e"}


def test_a_point_that_is_slower_than_its_table_is_rarely_tried():
    clock = Clock()
    ruler = Governor(costs(), 1.2 * FULL, clock=clock)
    times = lambda point, count, now: exact(point, count, now) * (1.5 if point == "e" else 1)  # noqa: E731
    answers = serve(even((10.0, 0.4)), ruler, times, clock)
    tried = sum(point == "e" for *_, point in answers)
    assert 1 <= tried < 0.05 * len(answers)
    assert answers[-1][2] in "de"


def test_a_queue_without_a_deadline_is_kept_short():
    clock, longest = Clock(), []
    ruler = Governor(costs(), queue=3, clock=clock)
    moments = even((1.0, 0.5), (1.0, 4.0), (2.0, 0.5))

    def times(point, count, now):
        longest.append(sum(came <= now for came in moments) - len(longest) - 1)
        return exact(point, count, now)

    answers = serve(moments, ruler, times, clock)
    assert max(longest) <= 4
    assert {answers[10][2], answers[-1][2]} == {"e"}
    assert {point for came, _, point in answers if 1.2 < came < 2} <= {"a", "b"}


def test_a_cautious_quantile_leaves_more_time():
    chosen = [
        Governor(costs(spread=0.3), 1.3 * FULL, quantile=quantile, clock=Clock()).choose(1, 0.0)
        for quantile in (0.5, 0.9, 0.99)
    ]
    assert chosen == ["e", "d", "d"]
    assert Governor(costs(spread=0.5), 1.3 * FULL, clock=Clock()).choose(1, 0.0) == "c"


def test_images_have_waited_the_last_batch_unless_told():
    ruler, _ = started()
    assert ruler.choose(2) == "e"
    ruler.observe("e", 1.001 * FULL)
    assert ruler.choose(2) == "d"


def test_counts_may_be_whole_numbers_of_numpy():
    ruler, _ = started(batch=np.int64(2))
    assert ruler.choose(np.int64(1), 0.0) == "e"
    ruler.observe("e", FULL, np.int32(1))


def test_choosing_runs_no_operation_of_torch():
    class Forbidden(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            raise AssertionError(func)

    ruler, clock = started(batch=4)
    with Forbidden():
        serve(even((0.2, 3.0)), ruler, exact, clock, batch=4)
        with pytest.raises(AssertionError):
            torch.ones(1)


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (("e", math.nan), "seconds has to be a positive number, not nan"),
        (("e", -1.0), "seconds has to be a positive number, not -1.0"),
        (("e", 0.0), "seconds has to be a positive number, not 0.0"),
        (("e", math.inf), "seconds has to be a positive number, not inf"),
        (("x", 1.0), "this governor has no point 'x'; it has a, b, c, d, e"),
        (("e", 1.0, 0), "images has to be a whole number of at least 1, not 0"),
        (("e", 1.0, 1.5), "images has to be a whole number of at least 1, not 1.5"),
    ],
)
def test_a_wrong_report_is_one_sentence_and_changes_nothing(report, message):
    ruler, _ = started()
    ruler.choose(1, 0.0)
    before = {key: list(value) if isinstance(value, list) else value for key, value in vars(ruler).items()}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ruler.observe(*report)
    assert vars(ruler) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: started()[0].choose(-1), "queue_length .* not -1"),
        (lambda: started()[0].choose(math.nan), "queue_length .* not nan"),
        (lambda: started()[0].choose(1, math.nan), "waited .* not nan"),
        (lambda: started()[0].choose(1, -0.1), "waited .* not -0.1"),
        (lambda: Governor([], 1.0), "one point at least"),
        (lambda: Governor(costs()), "a deadline in seconds, or the longest queue"),
        (lambda: Governor(costs(), math.nan), "deadline .* not nan"),
        (lambda: Governor(costs(), 1.0, -1), "queue .* not -1"),
        (lambda: Governor(costs(), 1.0, batch=0), "batch .* not 0"),
        (lambda: Governor(costs(), 1.0, quantile=1.0), "quantile .* not 1.0"),
        (lambda: Governor(costs() + costs()[:1], 1.0), "some point has several"),
        (lambda: Cost("x", 1.0, {}), "the cost of x .* not 1.0, {} and 0.0"),
        (lambda: Cost("x", math.nan, {1: 1.0}), "the cost of x"),
        (lambda: Cost("x", 1.0, {1: -1.0}), "the cost of x"),
        (lambda: Cost.of(SimpleNamespace(point="x", latency=(), top1=1.0)), "latency of x was not measured"),
    ],
)
def test_wrong_arguments_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_costs_of_an_evaluation_and_of_a_query_table():
    times = [Latency(0.010, 0.009, 0.012, 1, "chip", 1, 9), Latency(0.040, 0.040, 0.040, 8, "chip", 1, 9)]
    cost = Cost.of(SimpleNamespace(point="x", top1=70.0, latency=times))
    mean = 0.031 / 3
    assert (cost.point, cost.top1, cost.spread) == ("x", 70.0, pytest.approx(0.003 / 1.35 / mean))
    halfway = mean + (0.040 - mean) * 3 / 7
    assert [cost.of_batch(n) for n in (1, 4, 8, 16)] == pytest.approx([mean, halfway, 0.040, 0.080])
    assert Cost("x", 70.0, {4: 1.0}).of_batch(2) == 1.0, "a smaller batch takes no less, as far as is known"
    rows = [Measured(f"p{i}", 1e6 * i, 60.0 + i, i, 0.9 * i, 1.1 * i) for i in (1, 2, 3)]
    table = QueryTable(("net", "cifar10", {}), [*rows, Measured("worse", 9e6, 50.0, 2.5, 2.4, 2.6)], {"batch": 2})
    read = Cost.in_table(table)
    assert {each.point: each.of_batch(2) for each in read} == pytest.approx({"p1": 0.001, "p2": 0.002, "p3": 0.003})
    assert read[0].spread == pytest.approx(0.2 / 1.35)
    with pytest.raises(ValueError, match="no latency was measured"):
        Cost.in_table(QueryTable(("net", "cifar10", {}), [Measured("p", 1e6, 60.0)]))


def test_early_exits_are_governed_by_thresholds():
    small = {"nChannels": 4, "growthRate": 2, "grFactor": (1, 1, 1), "bnFactor": (1, 1, 1)}
    model = create_model("msdnet", "cifar10", nBlocks=2, base=1, step=2, stepmode="even", **small).eval()
    torch.manual_seed(0)
    images = torch.randn(16, 3, 32, 32)
    points = model.prepare(candidates(model, (3, 32, 32), budgets=2), [(images, None)])
    made = [point for point in points if isinstance(point, BudgetPoint)]
    assert [point.name for point in points[:2]] == ["exit1", "exit2"]
    assert len(made) == 2
    ruler = Governor([Cost(point, 60.0 + i, {1: 1.0 + i}) for i, point in enumerate(points)], 3.5, clock=Clock())
    chosen = ruler.choose(1, 0.0)
    assert (chosen, len(chosen.thresholds)) == (made[0], 2)
    assert model(images[:1], chosen).shape == (1, 10)
    ruler.observe(chosen, 3.0)


def test_mutualnet_is_governed_by_width_and_resolution():
    model = create_model("mutualnet_wrn28_10", "cifar10", depth=10, widen_factor=1).eval()
    points = candidates(model, (3, 32, 32))
    assert points == tuple(model.default_points)
    ruler = Governor([Cost(point, 60.0 + i, {1: 1.0 + i}) for i, point in enumerate(points)], 3.5, clock=Clock())
    assert (ruler.choose(1, 0.0), ruler.choose(3, 0.0)) == (points[2], points[0])
    assert (points[2].width, points[2].resolution) != (points[0].width, points[0].resolution)
