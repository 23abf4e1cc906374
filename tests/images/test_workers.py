"""Worker processes that read images."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
from torchvision.transforms import v2

import dataloader
import images.workers
from tests.images.folders import equal, load

ROOT = Path(dataloader.__file__).parent


def test_a_killed_worker_is_reported(folder):
    data = load(folder, batch_size=2, workers=1)

    class Killer(v2.Transform):
        def forward(self, image):
            os.kill(os.getpid(), 9)

    data.train.dataset.train = Killer()
    with pytest.raises(ValueError, match=r"a worker process was killed, .*--workers"):
        list(data.train.epoch(0))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Python chooses")
def test_workers_are_forked_whatever_python_chooses(folder, monkeypatch):
    """Python 3.14 starts them from a server on Linux: later, and as processes whose death nobody here notices."""
    context = multiprocessing.context
    monkeypatch.setattr(context, "_default_context", context.DefaultContext(multiprocessing.get_context("forkserver")))
    data = load(folder, batch_size=2, workers=1)

    class HereOnly(v2.Transform):  # of no module, so it cannot be pickled
        def forward(self, image):
            return image

    data.train.dataset.train = v2.Compose([data.train.dataset.train, HereOnly()])
    assert len(list(data.train.epoch(0))) == len(data.train)


def test_workers_leave_signals_to_the_main_process(folder):
    data = load(folder, batch_size=2, workers=2)
    others = set(multiprocessing.active_children())
    epoch = data.train.epoch(0)
    next(epoch)
    for worker in set(multiprocessing.active_children()) - others:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert equal(epoch, load(folder, batch_size=2).train.epoch(0, start=1))


def run_code(code, folder):
    """Run `code` in a fresh process; what it returned, and its output."""
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_process_that_exits_mid_epoch_ends_at_once(folder):
    """Its workers are killed (signal 9) and not waited for until their alarm ends them (signal 14)."""
    code = """
        import atexit, sys
        atexit.register(lambda: print(*(child.exitcode for child in children)))  # the first handler runs last
        import multiprocessing, dataloader
        data = dataloader.imagefolder(sys.argv[1], 2, "cpu", workers=2, resize=40, crop=32)
        epochs = data.train.epoch(0), data.train.epoch(1)  # the second one has workers of its own
        for epoch in epochs:
            next(epoch)
        children = multiprocessing.active_children()
        sys.exit(7)
    """
    assert run_code(code, folder) == (7, "-9 -9 -9 -9\n")


@pytest.mark.exhaustive
@pytest.mark.parametrize("workers", [0, 2])
def test_other_child_processes_are_not_killed_at_exit(folder, workers):
    code = f"""
        import multiprocessing, signal, sys, time, dataloader
        data = dataloader.imagefolder(sys.argv[1], 2, "cpu", workers={workers}, resize=40, crop=32)
        epoch = data.train.epoch(0)
        next(epoch)

        def sleep(started):
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("ended properly", flush=True)))
            started.set()
            time.sleep(60)

        context = multiprocessing.get_context("fork")
        started = context.Event()
        context.Process(target=sleep, args=[started], daemon=True).start()
        started.wait()
    """
    assert run_code(code, folder) == (0, "ended properly\n")


def test_workers_of_a_loader_that_is_collected_end_at_once(folder):
    data = load(folder, workers=2)
    batches = iter(data.test)
    next(batches)
    cycle = [data, batches]
    cycle.append(cycle)
    del data, batches, cycle
    before = time.monotonic()
    gc.collect()  # finds queues and their users together, and closes queues first
    assert time.monotonic() - before < 4
    assert not multiprocessing.active_children()


@pytest.mark.exhaustive
def test_more_workers_than_processors_are_noted_once(folder, capsys, monkeypatch):
    monkeypatch.setattr(images.workers, "usable_processors", lambda: 1)
    images.workers._check_number.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="This DataLoader will create")  # torch's own
        data = load(folder, batch_size=2, workers=2, valid=2)
        next(iter(data.valid))
        load(folder, batch_size=2, workers=0)
    assert capsys.readouterr().out.count("--workers=2 is more than the 1 processor that") == 1


def test_importing_the_loader_registers_no_exit_handler(folder):
    code = """
        import atexit, torch.utils.data, torchvision.datasets, torchvision.io, torchvision.models, utils
        before = atexit._ncallbacks()
        import dataloader
        print(atexit._ncallbacks() - before)
    """
    assert run_code(code, folder) == (0, "0\n")
