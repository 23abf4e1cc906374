"""Several processes that share a run, forked from the test so that none of them has to import torch."""

import contextlib
import multiprocessing
import os
import pickle
import socket
import traceback

import torch
import torch._dynamo  # as each optimizer does: once, and not in every process

import engine
from engine import processes

# Autograd cannot be forked once it has started threads, which it does if it runs for the first time while a network is
# compiled: here it has run before.
torch.ones((), requires_grad=True).backward()


def run(count, work, *arguments, dying=(), **environment):
    """What `work(*arguments)` returns in each of `count` processes, in the order of their ranks.

    Args:
        dying: ranks that end before they return: their result is None.
        **environment: further variables, as a launcher sets them.
    """
    fork, children = multiprocessing.get_context("fork"), []
    with socket.socket() as listening:  # a port that is free
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    for number in range(count):
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        variables = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
        answer, end = fork.Pipe(duplex=False)
        child = fork.Process(target=_one, args=(variables, end, work, arguments))
        child.start()
        end.close()
        children.append((child, answer))
    results, failures = [], []
    for number, (_, answer) in enumerate(children):
        result, failure = None, None if number in dying else "ended without a word"
        with contextlib.suppress(EOFError):
            result, failure = pickle.loads(answer.recv_bytes())
        results.append(result)
        failures += [f"rank {number}: {failure}"] if failure else []
        if failures:  # the others may wait for it
            [child.terminate() for child, _ in children]
    [child.join() for child, _ in children]
    assert not failures, "\n".join(failures)
    return results


def _one(variables, answer, work, arguments):
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)  # the parent's threads do not exist here
    try:
        engine.start_device()
        message = work(*arguments), None
        processes.leave()
    except BaseException:
        message = None, traceback.format_exc()
    answer.send_bytes(pickle.dumps(message))  # by value: torch would share the memory of tensors
