"""What a checkpoint may hold beside weights: plain data, and objects of classes that are not installed here.

torch's safe reader makes objects only of the classes and functions that it is given. None of those here runs code from
the file.
"""

from __future__ import annotations

import _compat_pickle
import argparse
import collections
import contextlib
import datetime
import decimal
import importlib
import pathlib
import sys
import types
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

#: how many classes get a stand-in
MOST_CLASSES = 100
#: how many modules and tensors a pickled network may have, and how many characters their names: in a hostile file a
#: module may be part of itself
MOST_PARTS, LONGEST_NAME = 100_000, 1000


def allowed(names: Iterable[str]) -> list:
    """What torch's safe reader may use for a pickle that names these classes and functions, each as "module name".

    That is what plain data needs, and stand-ins for all others except those of Python itself, which are refused.
    """
    words = {name.rpartition(" ")[2].replace("xrange", "range") for name in names}
    plain = [item for item in _plain_data() if _name(item) in words]  # torch looks through them for every object
    return plain + _unknown_classes(names) + (_numpy_data() if any(name.startswith("numpy") for name in names) else [])


def _name(item: object) -> str:
    return (item[1] if isinstance(item, tuple) else item.__name__).rpartition(".")[2]


# Plain data


def _plain_data() -> list:
    """Classes and functions for plain data, some under the names that files have for them."""
    data = [argparse.Namespace, types.SimpleNamespace, torch.torch_version.TorchVersion]
    # a defaultdict names a type; it is never called
    data += [(_empty_dict, "collections.defaultdict"), (_empty_list, "collections.deque"), decimal.Decimal]
    data += [frozenset, range, slice]
    data += [(_empty_dict, f"builtins.{kind}") for kind in ("bool", "dict", "float", "int", "list", "str", "tuple")]
    data += [datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone]
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"):
        kind = getattr(pathlib, name)
        # unpickling a path of another operating system fails, and such a path is of no use here
        made = kind if name in ("PurePosixPath", "PureWindowsPath") else _path
        data += [(made, f"{module}.{name}") for module in ("pathlib", "pathlib._local")]
    return data


def _path(*parts: str) -> pathlib.PurePath:
    """Stand-in for path classes that exist on one operating system only."""
    return pathlib.PurePosixPath(*parts)


def _empty_dict(*_: object) -> dict:
    return {}


def _empty_list(*_: object) -> list:
    return []


def _numpy_data() -> list:
    """What numpy's scalars and arrays are pickled as, under the module names of numpy 1 and 2."""
    try:
        import numpy as np
    except ImportError:  # files with such data are then refused
        return []
    kinds = [np.dtype(code) for code in np.typecodes["All"] if code != "O"]
    data = [np.ndarray, np.dtype, *{type(kind) for kind in kinds}, *{kind.type for kind in kinds if kind != "V"}]
    for module in ("numpy._core", "numpy.core"):
        with contextlib.suppress(ImportError, AttributeError):
            inner = importlib.import_module(f"{'numpy._core' if hasattr(np, '_core') else 'numpy.core'}.multiarray")
            data += [(getattr(inner, name), f"{module}.multiarray.{name}") for name in ("scalar", "_reconstruct")]
    return data


# Objects of other classes


class Unknown:
    """Stands for any class that is not used here: settings, meters, a whole network.

    What the file says of such an object becomes the items and attributes of an OrderedDict, the one type for which
    torch's safe reader allows both.
    """

    def __new__(cls, *_: object) -> collections.OrderedDict:
        return collections.OrderedDict()


def _unknown_classes(names: Iterable[str]) -> list:
    """Stand-ins for the classes of other projects, and for the modules and optimizers of torch; none for very many."""
    found = [(Unknown, name.replace(" ", ".", 1)) for name in names if _is_foreign(name.partition(" ")[0])]
    return found if len(found) <= MOST_CLASSES else []


def _is_foreign(module: str) -> bool:
    if module.startswith("torch."):
        return module.startswith(("torch.nn.modules.", "torch.nn.parallel.", "torch.optim."))
    package = _compat_pickle.IMPORT_MAPPING.get(module, module).partition(".")[0]  # Python 2 had other names
    return package not in sys.stdlib_module_names and package not in ("torch", "numpy")


def usable(content: object) -> object:
    """Return what a file holds with state dicts in place of networks: of the content, or of values in it."""
    for part in parts_of(content):
        if isinstance(part, collections.OrderedDict):
            for name in vars(part).keys() & dir(collections.OrderedDict):
                del vars(part)[name]  # it would hide a method, as the `values` of a meter would
    if _is_module(content):
        return dict(_tensors_of(content))
    if isinstance(content, dict):
        for key, value in content.items():
            if _is_module(value):
                content[key] = dict(_tensors_of(value))
    return content


def parts_of(content: object) -> Iterator[object]:
    """Every value in nested containers, attributes of dictionaries included, and the content itself."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:  # a small file can refer to one container in a great many places
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, dict):
            waiting += [*dict.values(value), *getattr(value, "__dict__", {}).values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value


def _is_module(value: object) -> bool:
    """Whether this stands for a torch.nn.Module."""
    return isinstance(value, collections.OrderedDict) and all(
        isinstance(vars(value).get(part), Mapping) for part in ("_parameters", "_buffers", "_modules")
    )


def _tensors_of(module: collections.OrderedDict) -> Iterator[tuple[str, Tensor]]:
    """What the module's state dict would hold. Raises ValueError if that is more than any network has."""
    waiting, count = [("", module)], 0
    while waiting:
        prefix, part = waiting.pop()
        own = vars(part)
        tensors, parts = {**own["_parameters"], **own["_buffers"]}, own["_modules"]
        count += len(tensors) + len(parts)
        if count > MOST_PARTS or any(len(prefix) + len(name) > LONGEST_NAME for name in (*tensors, *parts)):
            raise ValueError("a network of too many parts, or too long names")
        passing = own.get("_non_persistent_buffers_set", ())
        for name, value in tensors.items():
            if isinstance(value, Tensor) and name not in passing:
                yield prefix + name, value.detach()
        waiting += reversed([(f"{prefix}{name}.", inner) for name, inner in parts.items() if _is_module(inner)])
