"""An imitation of CUDA graphs on a CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Recording(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: the same operations on the same tensors again, and no Python between them."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::lift_fresh", "aten::_local_scalar_dense"):
            raise RuntimeError(f"{func.name()} moves numbers between host and device")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, *tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, out))))
        return out

    def replay(self):
        self.replays += 1
        if self.replays == 1:
            return  # a CUDA graph runs nothing while it is recorded; here that was the first replay
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tape:
    """A recorder that makes these recordings, and keeps them."""

    def __init__(self, warm_up_steps=3):
        self.warm_up_steps, self.recordings = warm_up_steps, []

    def warm_up(self, part):
        return part()

    def record(self, part):
        recording = Recording()
        self.recordings.append(recording)
        with recording:
            result = part()
        return recording.replay, result
