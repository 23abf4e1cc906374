"""One worker that serves a stream: what it tells the policy, in which order it answers, and how idle time passes."""

import time

import pytest
import torch

from engine.serving import Clock, Fixed, serve
from models.adaptive import FULL, AdaptiveModel, Point

SLOW = Point("slow")
#: seconds of a batch
TAKES = {FULL: 1.0, SLOW: 3.0}


class Simulated(Clock):
    def start(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def wait_until(self, moment):
        self.now = max(self.now, moment)


class Labels(AdaptiveModel):
    """Returns each image's first pixel as its class, and lets a clock run."""

    points = (FULL, SLOW)

    def __init__(self, clock):
        super().__init__()
        self.clock, self.batches = clock, []

    def compute(self, images, point):
        assert not self.training
        self.clock.now += TAKES[point]
        self.batches.append(len(images))
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 10).float()


class Recording:
    """Runs the second batch at another point, and keeps what it is told."""

    def __init__(self):
        self.asked, self.reports = [], []

    def choose(self, queue_length, waited):
        self.asked.append((queue_length, waited))
        return SLOW if len(self.asked) == 2 else FULL

    def observe(self, point, seconds, images):
        self.reports.append((point.name, seconds, images))


def test_a_worker_serves_in_order_and_tells_the_policy():
    clock, policy = Simulated(), Recording()
    images = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
    model = Labels(clock).train()
    answers = serve(model, images, [1.0, 1.5, 1.75, 1.8, 9.0, 9.5], policy, clock, batch=2)
    assert policy.asked == [(1, 0.0), (3, 0.5), (1, 5.0 - 1.8), (1, 0.0), (1, 0.5)]
    assert policy.reports == [("full", 1.0, 1), ("slow", 3.0, 2), *[("full", 1.0, 1)] * 3]
    assert [answer.done for answer in answers] == [2.0, 5.0, 5.0, 6.0, 10.0, 11.0]
    assert [answer.latency for answer in answers] == pytest.approx([1.0, 3.5, 3.25, 4.2, 1.0, 1.5])
    assert [answer.label for answer in answers] == [0, 1, 2, 0, 1, 2], "images in turn"
    assert [answer.point for answer in answers][:4] == [FULL, SLOW, SLOW, FULL]
    assert model.training, "as it was before"


def test_idle_time_passes_in_real_time_or_at_once():
    images = torch.zeros(1, 3, 2, 2)
    for idle, second in ((True, 0.2), (False, 600.0)):
        clock, began = Clock(idle=idle), time.perf_counter()
        model = Labels(Simulated())
        model.clock.start()
        answers = serve(model, images, [0.0, second], Fixed(FULL), clock)
        assert answers[1].done >= second
        assert (time.perf_counter() - began >= second) is idle
        assert answers[1].latency >= 0
