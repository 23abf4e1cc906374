"""Read checkpoint files of any origin, without running anything in them and without trusting what they claim.

`read` returns what the file holds; `find_weights` finds the state dict in it.
"""

from __future__ import annotations

import contextlib
import encodings
import encodings.aliases
import errno
import os
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from models.foreign_objects import allowed, parts_of, usable

#: what torch and zipfile raise for a file they cannot read, depending on where it is damaged
DAMAGE = (
    *(ValueError, RuntimeError, EOFError, LookupError, AttributeError, AssertionError, TypeError, ArithmeticError),
    *(MemoryError, RecursionError, struct.error, zipfile.BadZipFile, zlib.error),
)
#: types that the numbers of a layer can be loaded from: no complex ones, no packed bits
NUMBERS = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
#: where a file may keep its weights, and what such files are called in messages
FORMATS = {
    "net_state_dict": "Net_RL2",
    "state_dict": "ImageNet example",
    "model_state_dict": "PyTorch tutorial",
    "model": "torchvision reference",
    "net": "pytorch-cifar",
}
#: what wrappers put before all names (DataParallel, Lightning) or into them (torch.compile, FSDP, checkpointing)
PREFIXES = ("module.", "model.")
INFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
#: how many prefixes are stripped from a name; in a hostile file there may be any number
DEEPEST = 8


def read(path: Path, mapped: bool = False) -> dict:
    """Read a checkpoint. Raises ValueError if the file is not one; arguments as for `read_any`."""
    content = read_any(path, mapped)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def read_any(path: Path, mapped: bool = False) -> object:
    """Read a file onto the CPU without running anything in it. Raises ValueError if it cannot be read.

    Besides weights it may hold plain data (numpy scalars and arrays, paths, dates, `argparse.Namespace`) and objects of
    other projects' classes, of which nothing is used but the weights of networks that were saved whole.

    Args:
        mapped: leave the tensors in the file until they are used.
    """
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty: the program that wrote it was interrupted; use another copy")
    if _is_safetensors(path, size):
        return _read_safetensors(path)
    with _explaining_damage(path):
        _check_start(path)
        is_zip = zipfile.is_zipfile(path)
        classes = _check_zip(path, size) if is_zip else _check_old_format(path)
        with torch.serialization.safe_globals(allowed(classes)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            # files of old PyTorch versions are not zip archives and cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
        return usable(content)


def verify_checksums(path: Path) -> None:
    """Raise ValueError if a part of the file is damaged; torch.load does not check this."""
    part = None
    with _explaining_damage(path):
        if zipfile.is_zipfile(path):  # other files have no checksums
            with zipfile.ZipFile(path) as file:
                part = file.testzip()
    if part is not None:
        raise ValueError(f"{path} is damaged (the checksum of {part} is wrong): copy or download it again")


UNREADABLE = (
    "is damaged, or holds something beside the weights that cannot be read safely: "
    "save model.state_dict() alone where the file comes from"
)


class _Refused(Exception):
    """Carries a sentence through `_explaining_damage`."""


@contextlib.contextmanager
def _explaining_damage(path: Path) -> Iterator[None]:
    """Turn whatever readers raise for a file into a one-sentence ValueError."""
    try:
        yield
    except _Refused as error:
        raise ValueError(f"{path} {error}") from None
    except pickle.UnpicklingError as error:
        code = re.search(r"unsupported (?:global|class)\W+(?:GLOBAL )?([\w.]*)", str(error), re.IGNORECASE)
        if code:
            raise ValueError(
                f"{path} holds more than weights (pickled code: {code[1]}), which is never loaded: "
                "save model.state_dict() alone where the file comes from"
            ) from error
        if "pickle protocol" in str(error) and not _foreign_pickle(path):
            raise ValueError(
                f"{path} was written with another pickle protocol than torch.save's own, which cannot be read safely: "
                "leave pickle_protocol out where the file comes from"
            ) from error
        if "Only persistent_load of storage" in str(error):
            raise ValueError(
                f"{path} holds a network saved whole by an old PyTorch version, with its source code: "
                "save model.state_dict() alone where the file comes from"
            ) from error
        if _is_whole_zip(path):
            raise ValueError(f"{path} {UNREADABLE}") from error
        raise ValueError(f"{path} {_foreign_pickle(path) or 'is not a checkpoint, or is damaged'}") from error
    except (*DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # to seek a place that no file has
            raise
        other = UNREADABLE if _is_whole_zip(path) else _foreign_pickle(path)
        raise ValueError(f"{path} {other or 'is truncated or not a checkpoint: copy or download it again'}") from error


def _is_whole_zip(path: Path) -> bool:
    """Whether this is a zip archive with its directory, which is at its end: it is not truncated."""
    with contextlib.suppress(*DAMAGE):
        return zipfile.is_zipfile(path)
    return False


def _foreign_pickle(path: Path) -> str:
    """What a pickle is that torch.save did not write; "" for other files."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start.startswith(b"\x80") or OLD_MAGIC in start:
        return ""
    return f"is a pickle that torch.save did not write, not a checkpoint: {CONVERT}"


CONVERT = "save its weights in PyTorch, with torch.save"
#: files that users mistake for checkpoints: their first bytes, what they are, and what to do
OTHERS = (
    (
        b"version https://git-lfs",
        "is a pointer of Git LFS, not the file that it stands for: fetch that with git lfs pull",
    ),
    (b"<", "is a web page, not the file that its address stands for: download that"),
    (b"\x08", "is not a checkpoint but perhaps an ONNX file: name the file that it was exported from"),
    (b"\x1f\x8b", "is a file packed by gzip, not a checkpoint: unpack it"),
    (b"BZh", "is a file packed by bzip2, not a checkpoint: unpack it"),
    (b"\xfd7zXZ", "is a file packed by xz, not a checkpoint: unpack it"),
    (b"\x28\xb5\x2f\xfd", "is a file packed by Zstandard, not a checkpoint: unpack it"),
    (b"Rar!", "is an archive packed by RAR, not a checkpoint: unpack it and name the file in it"),
    (b"7z\xbc\xaf", "is an archive packed by 7-Zip, not a checkpoint: unpack it and name the file in it"),
    (b"{", "is JSON text, not a checkpoint: name the file of weights that it describes"),
    (b"\x89HDF", f"is an HDF5 file, as Keras writes them, not a checkpoint: {CONVERT}"),
    (b"\x93NUMPY", f"is a NumPy array, not a checkpoint: {CONVERT}"),
)
#: the number with which files of old PyTorch versions begin, in their pickle
OLD_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


def _check_start(path: Path) -> None:
    """Refuse a file whose first bytes show that it is something else."""
    with open(path, "rb") as file:
        start = file.read(512)
    if start[257:262] == b"ustar":
        raise _Refused("is a tar archive, not a checkpoint: unpack it and name the file in it")
    if start[4:8] == b"TFL3":
        raise _Refused(f"is a TensorFlow Lite model, not a checkpoint: {CONVERT}")
    for beginning, what in OTHERS:
        if start.lstrip().startswith(beginning):
            raise _Refused(what)


def _check_zip(path: Path, size: int) -> set[str]:
    """Refuse archives that torch.save did not write, before anything in them is unpacked. Returns the classes in it."""
    with zipfile.ZipFile(path) as file:
        parts = file.infolist()
    for folder, program in (("code/", "a TorchScript"), ("models/", "an exported (.pt2)")):
        if any(part.filename.partition("/")[2].startswith(folder) for part in parts):
            raise _Refused(f"is {program} program, not a checkpoint: save model.state_dict() where it comes from")
    if not any(part.filename.endswith("data.pkl") for part in parts):
        names = [part.filename for part in parts if not part.is_dir()]
        inside = f" of {', '.join(map(ascii, names[:3]))}{', ...' if len(names) > 3 else ''}" if names else ""
        if names and all(name.endswith(".npy") for name in names):
            raise _Refused(f"is a NumPy archive{inside}, not a checkpoint: {CONVERT}")
        raise _Refused(f"is a zip archive{inside}, not a checkpoint: unpack it and name the file in it")
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(p.file_size for p in parts) > size:
        raise _Refused("is a compressed archive, which PyTorch does not write: pack it again with zip -0")
    with zipfile.ZipFile(path) as file:
        pickles = [file.open(part) for part in parts if part.filename.endswith("data.pkl")]
        return set().union(*map(_check_calls, pickles))


#: how many pickles there are at the beginning of such a file: a number, a version, a description, and the content
OLD_PICKLES = 4


def _check_old_format(path: Path) -> set[str]:
    """Check the pickles with which files of old PyTorch versions begin. Damage is left to torch to find.

    Returns the classes in them.
    """
    classes: set[str] = set()
    with open(path, "rb") as file, contextlib.suppress(ValueError):
        for _ in range(OLD_PICKLES):
            classes |= _check_calls(file)
    return classes


#: names of codecs that make more bytes of bytes
GROWING = {
    name
    for names in encodings.aliases.aliases.items()
    if names[1] in ("base64_codec", "hex_codec", "quopri_codec", "uu_codec")
    for name in names
}


#: the newest pickle protocol that PyTorch's safe reader knows; torch.save writes 2 unless another is asked for
NEWEST_PROTOCOL = 3


def _check_calls(file: IO[bytes]) -> set[str]:
    """Refuse a pickle that can turn a few bytes into gigabytes, by calls that PyTorch's safe reader allows.

    Returns the names of the classes and functions in it, each as "module name".
    """
    texts, classes = set(), set()
    for operation, value, _ in pickletools.genops(file):
        if operation.name == "PROTO" and value > NEWEST_PROTOCOL:
            raise pickle.UnpicklingError(f"pickle protocol {value}")
        if isinstance(value, str):
            (classes if operation.name == "GLOBAL" else texts).add(value)
    texts |= classes
    calls = {"builtins bytearray", "__builtin__ bytearray"} & texts
    if "_codecs encode" in texts and GROWING & {encodings.normalize_encoding(text).lower() for text in texts}:
        calls.add("_codecs encode")
    if calls:
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {calls.pop().replace(' ', '.')}")
    return classes


# Weights


def find_weights(content: Mapping, path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Find the state dict in what a file holds; return it, without wrappers' prefixes, and its key.

    Raises:
        ValueError: there is none, there are several, or it holds a tensor that no layer could have.
    """
    state, key = _located(content, path)
    state = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"{path} holds no weights: no {', '.join(FORMATS)} or tensors of its own")
    for name, tensor in state.items():
        if fault := fault_of(tensor):
            raise ValueError(f"{path} holds no usable weights: {ascii(name)[1:-1]} {fault}")
    return _unwrapped(state, "pytorch-lightning_version" in content, path), key


def _located(content: Mapping, path: Path) -> tuple[Mapping, str | None]:
    """Find the state dict and its key: the whole content, one of its values, or a value inside one of these."""
    key = next((key for key in FORMATS if _is_state_dict(content.get(key))), None)
    if key is None:
        named = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Mapping)}
        # tensors beside a state dict, such as losses, are fewer than those in it
        least = 1 + sum(isinstance(value, Tensor) for value in content.values())
        found = [name for name, value in named.items() if _is_state_dict(value, least)]
        deeper = [name for name, value in named.items() if any(_is_state_dict(part, least) for part in value.values())]
        if len(found or deeper) > 1:
            raise ValueError(several_networks(path, found or deeper))
        if deeper and not found:
            state, key = _located(named[deeper[0]], path)
            return state, f"{deeper[0]}.{key}" if key else deeper[0]
        key = found[0] if found else None
    return (content if key is None else content[key]), key


def several_networks(path: str | os.PathLike, names: list[str]) -> str:
    """What to say of a file in which networks are stored under several names."""
    return f"{path} holds several networks ({_listed(names)}): save one of them under state_dict"


def _is_state_dict(value: object, least: int = 1) -> bool:
    """Whether this is a dictionary with as many named tensors, or more."""
    return isinstance(value, Mapping) and least <= sum(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _unwrapped(state: dict[str, Tensor], lightning: bool, path: Path) -> dict[str, Tensor]:
    """Strip the prefixes of wrappers, of any kind, number and order, from a state dict."""
    if lightning and any(name.startswith("model.") for name in state):  # losses and metrics have tensors too
        state = {name: value for name, value in state.items() if name.startswith("model.")}
    if any(name.startswith("module.") for name in state):  # the counter of torch.optim.swa_utils.AveragedModel
        state.pop("n_averaged", None)
    bare = {_without(name): value for name, value in state.items()}
    for _ in range(DEEPEST):
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in bare)), "")
        bare = {name.removeprefix(prefix): value for name, value in bare.items()}
    if len(bare) < len(state):
        raise ValueError(f"{path} holds weights twice, with and without {' or '.join(INFIXES)} in their names")
    return bare


def _without(name: str) -> str:
    for infix in INFIXES:
        name = name.replace(infix, "")
    return name


def fault_of(tensor: Tensor) -> str:
    """Say why a tensor from a file cannot be used; "" if it can. Reads none of its numbers."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return "is a sparse or quantized tensor"
    if tensor.device.type != "cpu":
        return f"has no numbers (it was on the device {tensor.device.type!r})"
    if tensor.dtype not in NUMBERS:
        return f"is of the type {str(tensor.dtype).removeprefix('torch.')}, in which no layer here has numbers"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims {tensor.numel():.3g} numbers and holds fewer"
    return ""


def check_tensors(content: object, path: Path) -> None:
    """Raise ValueError if any tensor in nested containers cannot be used."""
    for value in parts_of(content):
        if isinstance(value, Tensor) and (fault := fault_of(value)):
            raise ValueError(f"{path} is damaged or not of this project: a tensor in it {fault}")


def _listed(names: list[str]) -> str:
    return ", ".join(ascii(name)[1:-1] for name in names[:4]) + (", ..." if len(names) > 4 else "")


# safetensors


def _is_safetensors(path: Path, size: int) -> bool:
    """Whether a file begins like a safetensors file: the length of a JSON header (8 bytes), then the header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= size - 8


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(
            f"{path} is a safetensors file, which needs its package: python3 -m pip install safetensors"
        ) from None
    try:
        return load_file(path)
    except (SafetensorError, *DAMAGE) as error:
        raise ValueError(f"{path} is a safetensors file that is damaged: copy or download it again") from error
