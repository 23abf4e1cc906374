"""Files whose content lies: one sentence, at once, and no memory; and downloads that go wrong."""

import http.server
import io
import pickle
import struct
import threading
import zipfile

import pytest
import torch

from images.shards import shard_sources
from models import Checkpoint, checkpoint_files, create_model, published
from models.recorded import extracted_content
from tests.models.files import content_of_training, saved

RANK = {"shared_rank": 4}


def content(**training):
    return content_of_training(create_model("ResNet20"), **training)


def opened(tmp_path, what):
    return Checkpoint.open(saved(tmp_path, what))


def refused(action, match):
    """The action raises one sentence; one that believed the file would take hours, or all memory."""
    with pytest.raises(ValueError, match=match) as caught:
        action()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("flags", None),
        ("flags", [1]),
        ("flags", {"model": 5}),
        ("flags", {"model": "ResNet20", "dataset": ["cifar10"]}),
        ("flags", {"model": "ResNet32_SingleShared", "dataset": "cifar10", "shared_rank": "many"}),
        ("flags", {"model": "ResNet20", "dataset": "cifar10", "crop": 10**12}),
        ("flags", {"model": "ResNet20", "dataset": "cifar10", "mean": (0.5, "x", 0.5)}),
        ("flags", {"model": "ResNet20", "dataset": "cifar10", "mean": (0.5, 10**400, 0.5)}),
        ("flags", {"model": "ResNet20", "dataset": "cifar10", "lr": [[[0.1] * 10_000] * 10_000] * 10_000}),
        ("classes", [1, 2]),
        ("valid_index", "abc"),
        ("listing", 5),
        ("valid_index", torch.tensor([-1])),
        ("valid_index", torch.zeros(1, dtype=torch.int64).expand(10**12)),
    ],
)
def test_wrong_types_among_what_is_recorded(tmp_path, part, value):
    refused(opened(tmp_path, content(**{part: value})).build, f"not of this project: its training.{part}")


@pytest.mark.parametrize("part", ["epoch", "best", "objective", "scaler", "rng"])
def test_a_run_does_not_resume_from_odd_keys(tmp_path, part):
    refused(lambda: opened(tmp_path, content(**{part: torch.ones(1)})).training, f"training.{part} is not what")


@pytest.mark.parametrize(
    ("part", "value"),
    [("best", {"full": ("a", "b")}), ("best", {"full": (10**400, 1)}), ("epoch", 10**400), ("processes", 0)],
)
def test_a_run_does_not_resume_from_what_are_no_numbers(tmp_path, part, value):
    refused(lambda: opened(tmp_path, content(**{part: value})).training, f"training.{part} is not what")


def test_a_run_does_not_resume_from_tensors_that_lie(tmp_path):
    odd = content(objective={"means": [torch.zeros(1).expand(10**12)]})
    refused(lambda: opened(tmp_path, odd).training, "claims 1e")


def test_prepared_statistics_that_lie_are_not_used(tmp_path):
    model = create_model("mutualnet_wrn28_10", depth=10, widen_factor=1)
    file = opened(tmp_path, content())
    state = {"weights": model.fingerprint(), "statistics": {(1.0, 32): torch.zeros(1).expand(2, 10**10)}}
    torch.save({"images": {}, "state": state}, file.path.with_name("file.pth.prepared"))
    assert file.load_prepared(model, {}) is None


def test_many_references_to_one_list_take_no_time():
    nested = [torch.ones(1)]
    for _ in range(60):
        nested = [nested, nested]
    checkpoint_files.check_tensors(nested, "file")


def test_another_projects_training_key_is_its_own_business(tmp_path):
    checkpoint = opened(tmp_path, {"state_dict": create_model("ResNet20").state_dict(), "training": {"lr": 1}})
    assert (checkpoint.describe(), checkpoint.training) == ({}, {})


@pytest.mark.parametrize("value", [[1], {}, {"model": "ResNet20"}])
def test_a_sub_network_without_its_description(tmp_path, value):
    refused(opened(tmp_path, content() | {"extracted": value}).build, r"extracted\.\w+ is not what")


@pytest.mark.parametrize(("count", "match"), [(10**10, "too few for num_classes 1e"), (10**400, "num_classes is not")])
def test_ten_thousand_million_classes(tmp_path, count, match):
    whole = create_model("ResNet32_ADN")
    lie = extracted_content(whole, "TTT", {})
    lie["extracted"]["num_classes"] = count
    refused(opened(tmp_path, lie).build, match)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("mutualnet_wrn28_10", {"depth": 600_004}),
        ("mutualnet_wrn28_10", {"widen_factor": 100_000}),
        ("mutualnet_wrn28_10", {"width_mult_range": (0.25, 1e9)}),
        ("msdnet", {"nBlocks": 900_000, "stepmode": "lin_grow"}),
        ("ResNet32_SingleShared", {"shared_rank": 10**9}),
        ("ResNet32_SingleShared", {"shared_rank": -3}),
    ],
)
def test_flags_of_a_network_that_is_not_in_the_file(tmp_path, name, flags):
    lie = content(flags={"model": name, "dataset": "cifar10", **flags})
    refused(opened(tmp_path, lie).build, r"file\.pth|--width_mult_range|--nBlocks|shared_rank")


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(1).expand(10**6, 10**6), "claims 1e"),
        (torch.zeros(16, 3, 3, 3).to_sparse(), "sparse"),
        (torch.zeros(16, 3, 3, 3, device="meta"), "no numbers"),
        (torch.zeros(16, 3, 3, 3, dtype=torch.complex64), "of the type complex64"),
        (torch.zeros(16, 3, 3, 3, dtype=torch.uint8).view(torch.bits8), "of the type bits8"),
        (torch.zeros(16, 3, 3, 3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "of the type float4_e2m1fn_x2"),
    ],
)
def test_weights_that_no_layer_can_have(tmp_path, tensor, match):
    state = create_model("ResNet20").state_dict() | {"conv1.weight": tensor}
    refused(lambda: opened(tmp_path, {"net_state_dict": state}).build("ResNet20"), rf"conv1\.weight .*{match}")


@pytest.mark.parametrize("name", ["ResNet20", "ResNet32_SingleShared"])
@pytest.mark.parametrize("key", ["conv1.weight", "bn1.running_var"])
def test_weights_that_are_not_finite_are_said_to_be(tmp_path, name, key):
    state = create_model(name).state_dict()
    state[key][0] = float("nan" if "conv" in key else "inf")
    refused(lambda: opened(tmp_path, state).build(name), rf"not finite numbers, in 1 of \d+ tensors \({key}\)")


@pytest.mark.parametrize(
    ("key", "change", "match"),
    [
        ("bn1.running_var", lambda value: -value, "variances below zero, in 1 of"),
        ("conv1.weight", lambda value: value.to(torch.int8), "whole numbers, as of a quantized network, in 1 of"),
        ("conv1.weight", lambda value: value.double() + 1e300, "not finite numbers, in 1 of"),  # as float32
        ("conv1.weight", lambda value: (value + float("nan")).to(torch.float8_e4m3fn), "not finite numbers, in 1 of"),
    ],
)
def test_numbers_that_a_network_cannot_compute_with(tmp_path, key, change, match):
    state = create_model("ResNet20").state_dict()
    state[key] = change(state[key])
    refused(lambda: opened(tmp_path, state).build("ResNet20"), rf"{match} \d+ tensors \({key}\)")


def test_weights_of_eight_bits_are_read(tmp_path):
    state = create_model("ResNet20").state_dict()
    state["conv1.weight"] = state["conv1.weight"].to(torch.float8_e4m3fn)
    built = opened(tmp_path, state).build("ResNet20").state_dict()
    assert torch.equal(built["conv1.weight"], state["conv1.weight"].float())


@pytest.mark.parametrize(
    "call",
    [
        b"cdatetime\ntimedelta\n\x8a\x09" + bytes(8) + b"\x01\x85R",  # 2**64 days
        b"cdecimal\nDecimal\nX\x03\0\0\0abc\x85R",
        b"c_codecs\nencode\nX\x03\0\0\0abcX\x03\0\0\0abc\x86R",  # in a code that does not exist
    ],
)
def test_plain_data_that_cannot_be_made(tmp_path, call):
    refused(lambda: checkpoint_files.read(pickled(tmp_path, call)), "cannot be read safely")


def pickled(folder, call):
    """A file of today's format that holds what a call in its pickle returns."""
    with zipfile.ZipFile(folder / "file.pth", "w") as archive:
        archive.writestr("file/data.pkl", b"\x80\x02" + call + b".")
        archive.writestr("file/version", b"3\n")
    return folder / "file.pth"


def text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R", "builtin__.bytearray"),  # 2 GB of zeros
        # of 8 bytes, each encoded as two, and these as two each ...
        (
            b"c_codecs\nencode\n" * 34 + text("1234") + text("latin1") + b"\x86R" + (text("HEX") + b"\x86R") * 33,
            "codecs",
        ),
    ],
)
def test_few_bytes_that_would_become_gigabytes(tmp_path, call, name, old):
    path = pickled(tmp_path, call)
    if old:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        blob = path.read_bytes()
        path.write_bytes(blob.replace(pickle.dumps({}, 2), b"\x80\x02" + call + b".", 1))
    refused(lambda: checkpoint_files.read(path), rf"holds more than weights \(pickled code: \w*{name}")


@pytest.mark.parametrize("old", [False, True])
def test_plain_bytes_are_read(tmp_path, old):
    content = {"state_dict": {"w": torch.ones(2)}, "note": b"abc", "packed": "zip"}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=not old)
    assert checkpoint_files.read(tmp_path / "file.pth")["note"] == b"abc"


def test_archives_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "file.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/weights.pt", b"x")
    refused(lambda: checkpoint_files.read(path), r"is a zip archive of 'net/weights\.pt', .* unpack it")
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "file.pth")
    with zipfile.ZipFile(tmp_path / "file.pth") as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in source.infolist():
            archive.writestr(part.filename, source.read(part))
    refused(lambda: checkpoint_files.read(path), "compressed archive")


# Downloads


class Server(http.server.BaseHTTPRequestHandler):
    """Serves the bytes in `files`; `slow` ones in many pieces; `half` ones end too early; `garbled` is no HTTP."""

    files: dict[str, bytes]

    def log_message(self, *args):
        pass

    def do_GET(self):
        blob, start = self.files[self.path], 0
        if self.path == "/garbled":
            self.wfile.write(blob)
            return
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(blob):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(blob) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(blob) - 1}/{len(blob)}")
        self.end_headers()
        self.wfile.write(blob[start : len(blob) // 2] if "half" in self.path else blob[start:])
        self.close_connection = True


@pytest.fixture
def serve(monkeypatch):
    """Starts serving; returns a function from a path and its bytes to a released checkpoint."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Server, "files", {}, raising=False)

    def entry(path, blob, **known):
        Server.files[path] = blob
        url = f"http://127.0.0.1:{server.server_port}{path}"
        return published.PublishedCheckpoint("x", "ResNet20", "cifar10", url, "x.pth", **known)

    yield entry
    server.shutdown()
    server.server_close()


def packed(what):
    memory = io.BytesIO()
    torch.save(what, memory)
    return memory.getvalue()


def only_file(folder):
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("path", ["/page", "/half", "/garbled"])
def test_what_is_no_checkpoint_is_not_kept(tmp_path, serve, path):
    blob = packed({"a": torch.zeros(10**5)}) if path == "/half" else b"<!DOCTYPE html>Quota exceeded\r\n"
    with pytest.raises(ValueError, match=r"could not download x .*save it as"):
        published.fetch(serve(path, blob), tmp_path)
    assert not (tmp_path / "x.pth").exists()


def test_a_download_without_hash_is_kept_if_it_is_one(tmp_path, serve):
    path = published.fetch(serve("/x", packed({"a": torch.ones(3)})), tmp_path)
    assert torch.equal(Checkpoint.open(path).weights["a"], torch.ones(3))
    assert only_file(tmp_path) == ["x.pth"]


def test_an_interrupted_download_goes_on(tmp_path, serve):
    blob = packed({"a": torch.ones(3)})
    (tmp_path / "x.pth.part").write_bytes(blob[:100])
    assert published.fetch(serve("/x", blob), tmp_path).read_bytes() == blob


def test_a_part_that_is_too_long_starts_afresh(tmp_path, serve):
    blob = packed({"a": torch.ones(3)})
    (tmp_path / "x.pth.part").write_bytes(blob + b"more than there is")
    assert published.fetch(serve("/x", blob), tmp_path).read_bytes() == blob


def test_two_downloads_of_a_file_do_not_meet(tmp_path, serve, monkeypatch):
    """The second begins while the first is in the middle; each has a part of its own."""
    blob = packed({"a": torch.ones(3)})
    entry, parts = serve("/x", blob), []
    download = published._download

    def begin_another(entry, part):
        parts.append(part)
        if len(parts) == 1:
            part.write_bytes(b"the first has begun")
            with monkeypatch.context() as patch:
                patch.setattr(published.os, "getpid", lambda: 1)
                assert published.fetch(entry, tmp_path).read_bytes() == blob
            part.unlink()
        download(entry, part)

    monkeypatch.setattr(published, "_download", begin_another)
    assert published.fetch(entry, tmp_path).read_bytes() == blob
    assert len(set(parts)) == 2
    assert only_file(tmp_path) == ["x.pth"]


def test_an_archive_of_one_file_is_unpacked(tmp_path, serve):
    memory, inner = io.BytesIO(), packed({"a": torch.ones(3)})
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../s_net.pt", inner)  # the name in it decides nothing
        archive.writestr("__MACOSX/._s_net.pt", b"x")
    folder = tmp_path / "cache"
    assert published.fetch(serve("/x", memory.getvalue()), folder).read_bytes() == inner
    assert only_file(folder) == ["x.pth"]
    assert only_file(tmp_path) == ["cache"]


def test_a_page_for_browsers_is_named(tmp_path):
    entry = next(entry for entry in published.list_checkpoints() if entry.url.startswith("hand:"))
    with pytest.raises(ValueError, match=r"open https://\S+ in a browser and save it as"):
        published.fetch(entry, tmp_path)


@pytest.mark.parametrize("pattern", ["x-{0..999999999}.tar", "{a,b}" * 40 + ".tar", "{0..9999}{0..9999}.tar"])
def test_brace_patterns_of_very_many_files(pattern):
    refused(lambda: shard_sources(pattern), "names over|needs? the package webdataset")
