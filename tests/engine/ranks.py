"""Several processes that share a run, forked from the test so that none of them has to import torch."""

import multiprocessing
import os
import pickle
import socket
import traceback

import torch
import torch.distributed as dist

import engine
from engine import processes


def run(count, work, *arguments):
    """What `work(*arguments)` returns in each of `count` processes, in the order of their ranks.

    A process that does not return counts as None, with the traceback in the error that is raised.
    """
    fork, port = multiprocessing.get_context("fork"), free_port()
    answers = fork.SimpleQueue()
    children = [fork.Process(target=_one, args=(n, count, port, answers, work, arguments)) for n in range(count)]
    for child in children:
        child.start()
    results, failures = [None] * count, []
    for _ in children:
        number, result, failure = pickle.loads(answers.get())
        results[number] = result
        failures += [f"rank {number}: {failure}"] if failure else []
        if failure:  # the others may wait for it
            [other.terminate() for other in children]
            break
    for child in children:
        child.join()
    assert not failures, failures[0]
    return results


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def environment(number, count, port):
    """What torchrun sets."""
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return {name: str(value) for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}


def _one(number, count, port, answers, work, arguments):
    os.environ.update(environment(number, count, port))
    torch.set_num_threads(1)  # the parent's threads do not exist here
    try:
        engine.start_device()
        result = work(*arguments)
        processes.leave()
        assert not dist.is_initialized()
        answers.put(pickle.dumps((number, result, None)))  # by value: torch would share the memory of tensors
    except BaseException:
        answers.put(pickle.dumps((number, None, traceback.format_exc())))
