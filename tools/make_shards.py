"""Write a folder of images as tar shards, with smaller images that are faster to decode.

    python3 tools/make_shards.py /data/ILSVRC2012 /data/shards --side=400
    python3 train_ilsvrc.py --dataset_path="/data/shards/{train-{0000..0256},val-{0000..0009}}.tar" ...

`train/` and `val/` are read as by `--dataset_path` (docs/images.md). The shorter side of an image becomes `--side`
pixels, resized as in an evaluation, and the image is encoded as JPEG of `--quality`; a JPEG whose shorter side is no
longer than that is kept byte for byte. Training images are shuffled once, so that each shard is a fair sample. The list
of a shard's images, `SHARD.index`, is written beside it.

Every shard is read back, and every image in it decoded, before it gets its name. Repeating a command that was stopped
continues where it was; repeating a finished one changes nothing. The last line is the pattern to train on.

Effect on accuracy: an evaluation with `--resize` of the same side sees images that were encoded once more, and nothing
else changes; with a larger `--resize` it sees enlarged images. Training takes random crops of as little as 8 % of an
image's area, which then have fewer original pixels: the smaller the side, the more crops are enlarged. None of this has
been measured here. State side and quality with any result trained or evaluated on such shards.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import os
import shlex
import signal
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import startup

with startup.importing(__name__):
    import numpy as np
    import torch
    from PIL import Image
    from tqdm.auto import tqdm

    from engine import cli, flags
    from images import shards
    from images.data import Source
    from images.decoding import Resize, decode, jpeg_frame
    from images.folders import folder_sources
    from images.processors import default_workers
    from images.shard_files import ENDING, Index, Place, write_index
    from images.shards import SETTINGS
    from utils import UserError, make_folder, read_file, read_json, replacing, show_progress, write_json

START = "spawn"  # method for worker processes: threads of this one, such as torch's, cannot be forked
DIGITS = 4  # in a shard's number


@dataclass(frozen=True)
class Making:
    """How shards are made.

    Args:
        side: shorter side of an image in pixels.
        quality: JPEG quality, from 1 to 100.
        images: number of images in a shard.
        seed: seed of the order of the training images.
    """

    side: int
    quality: int
    images: int
    seed: int


def smaller(blob: bytes, making: Making) -> bytes:
    """Return an image as it will be stored. Raises ValueError if it cannot be decoded."""
    pixels = decode(blob)
    if min(pixels.shape[-2:]) > making.side:
        pixels = Resize(making.side, antialias=True)(pixels)
    elif jpeg_frame(blob) is not None:
        return blob
    file = io.BytesIO()
    # no subsampling, so that colour is not blurred a second time
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=making.quality, subsampling=0)
    return file.getvalue()


@dataclass(frozen=True)
class Part:
    """The images of a shard.

    Args:
        files: paths of the images.
        labels, keys: int64; keys name the images in the shard.
    """

    files: list[str]
    labels: np.ndarray
    keys: np.ndarray


def write_shard(path: Path, part: Part, making: Making) -> int:
    """Write a shard and its list, and read it back. Returns the number of images. An existing shard is left unchanged.

    Raises:
        UserError: an image cannot be read, the disk is full, or what is read back is not what was written.
    """
    if path.exists() and Path(f"{path}{ENDING}").exists():
        return len(part.files)
    digests = []
    with replacing(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for file, label, key in zip(part.files, part.labels, part.keys, strict=True):
                try:
                    blob = smaller(read_file(file), making)
                except (OSError, ValueError) as error:
                    reason = getattr(error, "strerror", None) or error
                    raise UserError(f"cannot read {file}: {reason}; repair or remove it") from error
                digests.append(hashlib.sha256(blob).digest())
                for ending, content in (("jpg", blob), ("cls", b"%d" % label)):
                    member = tarfile.TarInfo(f"{key:08d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        images = _read_back(temporary, path, part.labels, digests)
        size, digest = temporary.stat().st_size, hashlib.sha256()
        with open(temporary, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    # after the shard, because its list must not be older
    write_index(f"{path}{ENDING}", Index(images, size, 0, digest.hexdigest()))
    return len(part.files)


def _read_back(written: Path, path: Path, labels: np.ndarray, digests: list[bytes]) -> list[Place]:
    """Read the images of a shard. Raises UserError unless they are those that were written and can be decoded."""
    images = shards.list_images(str(written), shards.MOST_CLASSES)
    if [label for _, _, label in images] != labels.tolist():
        raise UserError(f"{path} does not hold the labels that were written to it: is the disk in order?")
    with open(written, "rb") as file:
        for (offset, size, _), digest in zip(images, digests, strict=True):
            file.seek(offset)
            blob = file.read(size)
            if hashlib.sha256(blob).digest() != digest:
                raise UserError(f"{path} does not hold the images that were written to it: is the disk in order?")
            decode(blob)
    return images


def parts(source: Source, making: Making, shuffle: bool) -> list[Part]:
    """Divide the images into shards."""
    count = len(source.labels)
    order = np.random.default_rng(making.seed).permutation(count) if shuffle else np.arange(count)
    pieces = np.array_split(order, max(1, round(count / making.images)))
    return [Part([source.name(index) for index in piece], source.labels[piece], piece) for piece in pieces]


def make(path: str, target: Path, making: Making, workers: int) -> dict[str, int]:
    """Write all shards; a single worker is this process. Returns the number of shards of each set.

    Raises:
        UserError: the folder holds other shards, or one cannot be written; finished ones stay.
    """
    sources = folder_sources(path)
    train = sources.train(None, False)
    val = sources.test(train.classes, False)
    found = {"train": parts(train, making, shuffle=True), "val": parts(val, making, shuffle=False)}
    _check_folder(make_folder(target, "the second argument"), found, making, train.classes)
    for left in target.glob(".*.tmp"):
        left.unlink(missing_ok=True)  # left by a command that was killed
    jobs = [
        (target / f"{name}-{number:0{DIGITS}d}.tar", part, making)
        for name, parts_of_one in found.items()
        for number, part in enumerate(parts_of_one)
    ]
    with tqdm(total=len(train.labels) + len(val.labels), unit=" images", disable=not show_progress()) as bar:
        for count in _written(jobs, workers):
            bar.update(count)
    return {name: len(parts_of_one) for name, parts_of_one in found.items()}


def _written(jobs: list[tuple[Path, Part, Making]], workers: int) -> Iterator[int]:
    """Write shards, in several processes if there are several workers. Yields the number of images in each."""
    if workers == 1:
        yield from itertools.starmap(write_shard, jobs)
        return
    pool = ProcessPoolExecutor(workers, get_context(START), _prepare)
    try:
        for done in as_completed([pool.submit(write_shard, *job) for job in jobs]):
            yield done.result()
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed: use fewer --workers") from error
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:  # after an error or Ctrl-C; what they are writing has no name yet
            process.terminate()


def _check_folder(target: Path, found: dict[str, list[Part]], making: Making, classes: list[str]) -> None:
    """Record what the folder holds. Raises UserError if it holds shards of other images or settings."""
    digest = hashlib.sha256()
    for part in (part for parts_of_one in found.values() for part in parts_of_one):
        digest.update(part.labels.tobytes())
        digest.update(b"\n".join(os.fsencode(os.path.basename(file)) for file in part.files))
    own = {**asdict(making), "listed": digest.hexdigest(), "classes": classes}
    file = target / SETTINGS
    with contextlib.suppress(OSError, ValueError):
        if read_json(file) == own:
            return
    if file.exists() or any(target.glob("*.tar")):
        raise UserError(f"{target} holds shards of other images or settings: name another folder", exit_code=2)
    write_json(file, own)


def _prepare() -> None:
    """Prepare a worker: the main process handles Ctrl-C, and the other workers have their own processors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder with train/ and val/")
    add("target", metavar="TARGET", type=Path, help="folder for the shards")
    add("--side", type=flags.positive, default=400, metavar="PIXELS", help="shorter side (default: %(default)s)")
    add("--quality", type=int, choices=range(1, 101), default=95, metavar="1-100", help="JPEG quality (%(default)s)")
    add("--images", type=flags.positive, default=5000, metavar="N", help="images in a shard, about (%(default)s)")
    add("--seed", type=flags.natural, default=0, help="seed of the order of the training images (default: 0)")
    add("--workers", type=flags.positive, default=default_workers(), metavar="N", help="processes (%(default)s)")
    args = parser.parse_args(argv)
    if not all(Path(args.source, name).is_dir() for name in ("train", "val")):
        parser.error(
            f"{args.source} does not hold train/ and val/ with one folder of images per class; name one that does"
        )
    making = Making(args.side, args.quality, args.images, args.seed)
    counts = make(args.source, args.target, making, args.workers)
    ranges = ",".join(f"{name}-{{{0:0{DIGITS}d}..{count - 1:0{DIGITS}d}}}" for name, count in counts.items())
    print(f"--dataset_path={shlex.quote(f'{args.target.resolve()}/{{{ranges}}}.tar')}")


if __name__ == "__main__":
    cli.run(main)
