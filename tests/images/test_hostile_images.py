"""Images as they come from cameras, microscopes, other programs and attackers."""

import io
import os
import struct
import sys
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import dataloader
import engine
from images import decoding
from images.decoding import decode, jpeg_frame
from images.reading import image_paths
from models.dmnn import coarse
from models.query_table import QueryTable
from utils import read_file

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(size=(40, 30), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


# Values


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_to_8_bits(kind):
    grey = np.arange(0, 65536, 27, dtype=np.uint16)[:2400].reshape(40, 60)
    got = decode(encoded(Image.fromarray(grey), kind))
    assert got.shape == (3, 40, 60)
    assert np.array_equal(got[1].numpy(), np.round(grey / 257))


def test_12_bits_and_white_as_zero_of_tiff_are_understood():
    grey = np.arange(0, 4096, 4, dtype=np.uint16).reshape(32, 32)
    left, right = grey[:, 0::2], grey[:, 1::2]
    packed = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], -1).astype(np.uint8)
    got = decode(tiff(packed.tobytes(), 32, bits=12, zero_is=1))[0].numpy()
    assert abs(got - grey * (255 / 4095)).max() <= 0.5
    got = decode(tiff((grey * 16).astype("<u2").tobytes(), 32, bits=16, zero_is=0))[2].numpy()
    assert abs(255.0 - got - grey * (16 / 257)).max() <= 0.5


def tiff(data, side, bits, zero_is):
    """An uncompressed grey TIFF file; `zero_is` white (0) or black (1)."""
    tags = [(256, side), (257, side), (258, bits), (259, 1), (262, zero_is), (273, 8), (277, 1), (278, side)]
    tags += [(279, len(data)), (339, 1)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_without_a_scale_are_refused(dtype):
    blob = encoded(Image.fromarray(np.linspace(0, 1, 900).reshape(30, 30).astype(dtype)), "TIFF")
    with pytest.raises(ValueError, match="whose black and white are not known; save it with 8 or 16 bits"):
        decode(blob)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (20, 10), (grey, grey, grey)) for grey in (40, 120, 200)]
    options = {"lossless": True} if kind == "WEBP" else {}
    got = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert got.shape == (3, 10, 20)
    assert (got == 40).all()


def test_the_orientation_of_a_camera_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode(encoded(noise(), "JPEG", exif=exif)).shape == (3, 40, 30)


# Damage and attacks


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG"])
def test_a_flipped_bit_is_decoded_or_refused(kind):
    blob, reasons = encoded(noise(), kind), []
    for bit in np.random.default_rng(0).integers(0, 8 * len(blob), 60):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << (bit % 8)
        try:
            assert decode(bytes(damaged)).dtype == torch.uint8
        except ValueError as error:
            reasons.append(str(error))
    assert all(reasons)
    assert len(reasons) > 50 or kind != "PNG"  # PNG alone has checksums


def gif(side):
    """A GIF file of 35 bytes, which declares a large screen and draws one pixel of it."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frame + b"\x3b"


def png_head(width, height):
    """A PNG file of nothing but its size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\0IDAT"


def jpeg(width, height):
    """A small JPEG file that declares another size."""
    blob = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    struct.pack_into(">HH", blob, blob.index(b"\xff\xc0") + 5, height, width)
    return bytes(blob)


@pytest.mark.parametrize("blob", [gif(30000), png_head(20000, 20000), jpeg(65000, 65000)], ids=["gif", "png", "jpeg"])
@pytest.mark.parametrize("pillow_only", [False, True])
def test_an_image_bomb_is_refused_before_decoding(blob, pillow_only, monkeypatch):
    if pillow_only:
        monkeypatch.setattr(decoding, "decode_jpeg", None)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("was decoded"))
    with pytest.raises(ValueError, match="pixels"):
        decode(blob)


def test_a_small_tiff_of_a_huge_tile_is_refused_before_decoding(monkeypatch):
    """An image of 16 x 16 pixels in a tile of 30,000 x 30,000, which the decoder unpacks as a whole."""
    tags = [
        (256, 16),
        (257, 16),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, 30000),
        (323, 30000),
        (324, 8),
        (325, 0),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("was decoded"))
    with pytest.raises(ValueError, match="its tiles have 30,000 x 30,000 pixels"):
        decode(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4))


@pytest.mark.parametrize("pillow_only", [False, True])
def test_a_jpeg_of_very_many_scans_is_refused(pillow_only, monkeypatch):
    """Each scan of 10 bytes takes the time of a whole image of 13,000 x 13,000 pixels."""
    blob = bytearray(encoded(Image.new("L", (64, 64)), "JPEG", progressive=True))
    last = bytes(blob[blob.rindex(b"\xff\xda") : -2])
    assert decode(bytes(blob[:-2]) + 300 * last + b"\xff\xd9").shape == (3, 64, 64)  # of a small one it takes no time
    struct.pack_into(">HH", blob, blob.index(b"\xff\xc2") + 5, 13000, 13000)
    if pillow_only:
        monkeypatch.setattr(decoding, "decode_jpeg", None)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("was decoded"))
    with pytest.raises(ValueError, match="it has 306 scans of 13,000 x 13,000 pixels; up to 200 can be read"):
        decode(bytes(blob[:-2]) + 300 * last + b"\xff\xd9")


def test_the_size_of_a_jpeg_is_found_in_its_header():
    for options in ({}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(5000)}, {"quality": 30}):
        assert jpeg_frame(encoded(noise(), "JPEG", **options)) == (30, 40, 3)
    whole = encoded(noise(), "JPEG")
    assert jpeg_frame(b"\xff\xd8" + b"\xff" * 9 + whole[3:]) == (30, 40, 3)  # filled up before a marker
    # a marker without a length, after which the segments would be counted wrongly: left to Pillow
    assert jpeg_frame(b"\xff\xd8\xff\xd0" + whole[2:]) is None
    assert [jpeg_frame(whole[:count]) for count in (0, 2, 3, 20)] == [None] * 4


def test_an_image_too_narrow_to_be_resized_is_refused(tmp_path):
    Image.new("RGB", (1, 60000)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match=r"line.png: it has 1 x 60,000 pixels, too narrow to be resized to 256"):
        dataloader.image_files([tmp_path / "line.png"], "ilsvrc", "cpu", 256, 224)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for Ghostscript")
def test_no_image_starts_another_program(tmp_path, monkeypatch):
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho started >> {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="not an image of a known format"):
        decode(encoded(noise(), "EPS"))
    assert not (tmp_path / "started").exists()


# Files that are none


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    return tmp_path / "pipe.jpg"


def test_a_pipe_a_device_and_a_huge_file_are_not_read(pipe):
    (pipe.parent / "zero.jpg").symlink_to("/dev/zero")
    with open(pipe.parent / "sparse.jpg", "wb") as file:
        file.truncate(1 << 40)
    for name, words in (("pipe", "not a regular"), ("zero", "not a regular"), ("sparse", "1,099,511,627,776 bytes")):
        refused = []
        path = pipe.parent / f"{name}.jpg"
        thread = threading.Thread(target=lambda path=path, into=refused: into.append(refusal(path)), daemon=True)
        thread.start()
        thread.join(10)
        assert refused, f"{path} is being waited for"
        assert words in refused[0]


def refusal(path):
    try:
        read_file(path)
    except OSError as error:
        return str(error)
    return "none"


def test_no_text_is_read_from_a_pipe_or_a_device(pipe):
    """A table, a grouping of classes, and the log of a run, any of which could be waited for, or fill the memory."""
    for path in (pipe, "/dev/zero"):
        with pytest.raises(ValueError, match=f"cannot read the query table {path}: it is not a regular file"):
            QueryTable.load(path)
        with pytest.raises(ValueError, match=f"cannot read --coarse_file {path}: it is not a regular file"):
            coarse.read(path, 10)
    pipe.rename(pipe.with_name("log.jsonl"))
    with pytest.raises(OSError, match="it is not a regular file"):
        engine.Run(pipe.parent, {}).begin()


def test_only_files_with_images_are_listed(pipe):
    root = pipe.parent
    (root / "sub").mkdir()
    (root / "sub" / "back").symlink_to(root)
    (root / "@eaDir").mkdir()
    for name in ("b.JPG", "a.png", "sub/c.jpg", "._b.jpg", "notes.txt", "@eaDir/d.jpg", "sub/.hidden.jpg"):
        (root / name).write_bytes(b"x")
    (root / "link.jpg").symlink_to(root / "a.png")
    (root / "broken.jpg").symlink_to(root / "nowhere")
    (root / "itself.jpg").symlink_to(root / "itself.jpg")
    assert [os.path.relpath(path, root) for path in image_paths(root)] == ["a.png", "b.JPG", "link.jpg", "sub/c.jpg"]
