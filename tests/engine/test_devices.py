"""Which devices a process uses, how it finds the others, and replicas on several GPUs."""

import os
import signal
import sys
import threading

import pytest
import torch
from torch import nn

import engine
import utils
from engine import devices, processes, replicas

LAUNCHER = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", *processes.PLACES)


@pytest.fixture
def environment(monkeypatch):
    """A function that makes the environment that of a machine; it is restored afterwards."""

    def of(**variables):
        for name in (*LAUNCHER, "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
            monkeypatch.setenv(name, "")  # so that it is restored, whatever the code under test does
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return of


@pytest.mark.parametrize(
    ("visible", "allowed", "one", "chosen"),
    [
        (None, None, True, "0"),
        (None, None, False, None),  # of several processes each sees all
        (None, "4,5", True, "4,5"),
        ("0,2", None, True, "0,2"),
        ("1", "4,5", True, "5"),  # a place among those that are allowed
        ("1,0", "GPU-aa,GPU-bb", True, "GPU-bb,GPU-aa"),
        ("2", "4,5", True, ""),
    ],
)
def test_visible_devices_are_chosen_among_the_allowed(environment, visible, allowed, one, chosen):
    environment(**({} if allowed is None else {"CUDA_VISIBLE_DEVICES": allowed}))
    devices.choose_devices(visible, one)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == chosen


@pytest.mark.parametrize("visible", ["abc", "0,,1", "-1", "0,0", "1.5", ""])
def test_what_is_no_list_of_gpus_is_refused(environment, visible):
    environment()
    with pytest.raises(utils.UserError, match="not a list of different GPU numbers") as refused:
        engine.start_device(visible)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(("visible", "how"), [("7", "thread"), ("0", "thread"), (None, "process")])
def test_a_gpu_that_does_not_exist_is_an_error(environment, monkeypatch, visible, how):
    environment()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(utils.UserError, match=r"cannot be used|there is none") as refused:
        engine.start_device(visible, how)
    assert refused.value.exit_code == 2
    environment()
    assert engine.start_device().type == "cpu"
    assert engine.devices_in_words().startswith("no GPU, so on the CPU")


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "RANK": "7"}, 3),  # torchrun
        ({"SLURM_LOCALID": "2", "RANK": "6"}, 2),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1", "RANK": "5"}, 1),
        ({"RANK": "6"}, 2),  # machines of four GPUs, one after the other
    ],
)
def test_launchers_tell_which_gpu(environment, variables, place):
    environment(WORLD_SIZE="8", **variables)
    assert processes.place(4) == place
    assert processes.place(1) == 0 if "LOCAL_WORLD_SIZE" not in variables else True  # its own GPU is all it sees


def test_more_processes_than_gpus_are_refused(environment):
    environment(WORLD_SIZE="4", LOCAL_WORLD_SIZE="4", LOCAL_RANK="0")
    with pytest.raises(utils.UserError, match="4 processes on this machine but only 2"):
        processes.place(2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x"),
        ({"WORLD_SIZE": "two", "RANK": "-1"}, "RANK=-1 and WORLD_SIZE=two"),
        ({"RANK": "5"}, "RANK=5 with WORLD_SIZE=2"),  # would wait for ever for those before it
    ],
)
def test_what_no_launcher_sets_is_said(environment, given, said):
    good = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    environment(**good | given)
    with pytest.raises(utils.UserError, match=f"{said} in the environment is not what a launcher sets"):
        processes.join(torch.device("cpu"))


def test_a_launcher_that_says_too_little_is_named(environment):
    environment(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1")
    with pytest.raises(utils.UserError, match="MASTER_PORT is not") as refused:
        processes.join(torch.device("cpu"))
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("images", "most", "used"), [(8, 4, 4), (5, 4, 2), (3, 4, 1), (7, 4, 2), (2, 4, 1), (1, 4, 1), (9, 8, 4)]
)
def test_no_replica_trains_on_one_image(images, most, used):
    assert replicas.replicas_for(images, most) == used
    sizes = [len(part) for part in torch.empty(images).chunk(used)]
    assert min(sizes) > 1 or images == 1


def test_replicas_compute_in_the_precision_of_the_caller():
    """A thread takes over nothing of autocast, as those of DataParallel take over that it is on, but not its type."""
    layer, images, found = nn.Linear(2, 2), torch.ones(1, 2), {}

    def compute(name, network):
        found[name] = network(images).dtype

    with torch.autocast("cpu", torch.bfloat16):
        own = replicas.in_precision(layer, "cpu", torch.get_autocast_dtype("cpu"))
        threads = [threading.Thread(target=compute, args=pair) for pair in (("bare", layer), ("ours", own))]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    compute("off", replicas.in_precision(layer, "cpu", None))
    assert found == {"bare": torch.float32, "ours": torch.bfloat16, "off": torch.float32}


#: a process that `processes.start` starts, without torch
CHILD = "import os, signal, sys, time; number = os.environ['RANK']; "


@pytest.mark.parametrize(
    ("child", "code"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(7 if number == '1' else 0)", 7),
        ("sys.exit(2) if number == '0' else time.sleep(60)", 2),  # the other one is ended
        ("os.kill(os.getpid(), signal.SIGKILL) if number == '0' else sys.exit(0)", 128 + signal.SIGKILL),
    ],
)
def test_one_command_starts_a_process_for_each_gpu(environment, monkeypatch, child, code):
    environment()
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-S", "-c", CHILD + child])
    assert processes.start(2, os.environ) == code


def test_signals_are_passed_on_once_to_each_process(environment, monkeypatch, tmp_path):
    environment()
    child = (
        "files = [f'{sys.argv[1]}/{number}{end}' for end in ('', '.ready')]; "
        "signal.signal(signal.SIGTERM, lambda *_: (open(files[0], 'a').write('x'), sys.exit(143))); "
        "open(files[1], 'w').close(); time.sleep(60)"
    )
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-S", "-c", CHILD + child, str(tmp_path)])

    def ask():
        while len(list(tmp_path.glob("*.ready"))) < 2:
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    assert processes.start(2, os.environ) == 143
    assert [(tmp_path / number).read_text() for number in "01"] == ["x", "x"]


def test_a_signal_reaches_processes_that_start_after_it(environment, monkeypatch):
    class Child:
        started, returncode = 0, None

        def __init__(self, command, **options):
            Child.started += 1
            if Child.started == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def send_signal(self, number):
            self.returncode = 128 + number

        def poll(self):
            assert self.returncode is not None
            return self.returncode

    environment()
    monkeypatch.setattr(processes.subprocess, "Popen", Child)
    assert processes.start(3, os.environ) == 143
