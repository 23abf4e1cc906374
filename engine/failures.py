"""Advice on errors that torch and Python raise."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from utils import printable

#: parts of the messages of torch and the system when memory cannot be allocated
MEMORY_IS_FULL = ("can't allocate memory", "cannot allocate memory", "not enough memory", "std::bad_alloc")


def explain(error: BaseException) -> str | None:
    """Explain an error in one sentence; None for an error that must be the program's own mistake."""
    text = str(error).strip()
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full: lower --batch_size, or add --accumulate"
    full = any(part in text.lower() for part in MEMORY_IS_FULL)
    if isinstance(error, MemoryError) or (full and isinstance(error, (RuntimeError, OSError))):
        return "this machine's memory is full: lower --batch_size (or --workers), or end other programs"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = text.partition("\n")[0]
        return f"the network could not be compiled ({reason}); leave --compile and --fast out"
    if dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in text):
        return "another process of this run has ended, and says why; continue the run with --resume=auto"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"cannot use {error.filename}: {error.strerror}; check that place, or name another"
    if isinstance(error, (ValueError, OSError)):
        return text
    return None


#: the most characters of a message; those in the middle are left out
LONGEST = 2_000


def complain(sentence: str) -> None:
    """Print an error, which may quote anything from a file: without control characters, and not endlessly."""
    text = printable(sentence)
    half = LONGEST // 2
    print(f"error: {text if len(text) <= LONGEST else f'{text[:half]} ... {text[-half:]}'}", file=sys.stderr)
