"""Files of our own know what they hold; those from elsewhere are recognised, or refused in one sentence."""

import pickle
import zipfile

import pytest
import torch
from PIL import Image

import eval_cifar10
import eval_ilsvrc
import hubconf
from models import Checkpoint, create_model, list_checkpoints, load_checkpoint, published
from models.meta import on_meta
from models.recorded import extracted_content
from models.state_dicts import load_state
from tests.models.files import content_of_training, saved
from tests.scripts.commands import call


@pytest.fixture
def model():
    torch.manual_seed(1)
    return create_model("ResNet32_DoubleShared", shared_rank=8)


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("key", ["net_state_dict", "state_dict", "model", None])
def test_every_common_format_loads(tmp_path, model, key, prefix):
    state = {prefix + name: value for name, value in model.state_dict().items()}
    path = saved(tmp_path, state if key is None else {key: state, "epoch": 3})
    other = create_model("ResNet32_DoubleShared", shared_rank=8)
    loaded = load_checkpoint(other, path)
    assert same(model, other)
    assert (key or "bare") in loaded.format


def test_one_name_of_a_shared_tensor_is_enough(tmp_path, model):
    state = {key: value for key, value in model.state_dict().items() if "layer" not in key or "shared" not in key}
    assert len(state) < len(model.state_dict())
    other = create_model("ResNet32_DoubleShared", shared_rank=8)
    load_checkpoint(other, saved(tmp_path, state))
    assert same(model, other)


def test_names_of_a_shared_tensor_must_agree(tmp_path, model):
    state = model.state_dict()
    state["layer1.2.shared_basis_1.weight"] = state["layer1.2.shared_basis_1.weight"] + 1
    with pytest.raises(ValueError, match="two values to one shared tensor"):
        load_checkpoint(model, saved(tmp_path, state))


def test_a_classifier_called_linear_is_recognised(tmp_path):
    plain, other = create_model("ResNet20"), create_model("ResNet20")
    state = {f"module.{key.replace('fc.', 'linear.')}": value for key, value in plain.state_dict().items()}
    load_checkpoint(other, saved(tmp_path, {"state_dict": state}))
    assert same(plain, other)


def test_missing_unexpected_and_misshapen_keys_come_together(tmp_path, model):
    state = model.state_dict()
    state["surprise"] = state.pop("bn1.weight")
    state["fc.weight"] = torch.zeros(100, 64)
    with pytest.raises(
        ValueError, match=r"1 missing \(bn1.weight\); 1 unexpected \(surprise\); 1 misshapen \(fc.weight"
    ):
        load_checkpoint(model, saved(tmp_path, state))


@pytest.mark.parametrize("name", ["MobileNetV2_SharedDouble", "ResNet18"])  # other keys, and only other shapes
def test_a_file_for_another_data_set_is_called_that(name):
    with on_meta():
        state, model = create_model(name, "cifar100").state_dict(), create_model(name, "ilsvrc")
    with pytest.raises(ValueError, match=f"file.pth is not a checkpoint of this {name}: .*; it is one of {name} for c"):
        load_state(model, state, "file.pth")


def test_batch_counters_may_be_missing(tmp_path, model):
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    load_checkpoint(model, saved(tmp_path, state))


class Code:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 but then nothing", "truncated"),
        (b"plain text", "not a checkpoint"),
        (pickle.dumps(Code(), 2), "pickled code"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_sentence(tmp_path, model, content, sentence, capsys):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_checkpoint(model, path)
    assert "\n" not in str(caught.value)
    assert "this must never run" not in capsys.readouterr().out


def test_a_checkpoint_with_code_is_not_run(tmp_path, model, capsys):
    with pytest.raises(ValueError, match="pickled code"):
        load_checkpoint(model, saved(tmp_path, {"state_dict": model.state_dict(), "extra": Code()}))
    assert "this must never run" not in capsys.readouterr().out


def test_a_truncated_file_is_refused(tmp_path, model):
    path = saved(tmp_path, model.state_dict())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="truncated"):
        load_checkpoint(model, path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_byte_damaged_anywhere_changes_no_weight_unnoticed(tmp_path):
    weights = {"weight": torch.arange(24.0).view(4, 6), "bias": torch.ones(4)}
    path = saved(tmp_path, {"net_state_dict": weights})
    whole = path.read_bytes()
    messages = []
    for position in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            found = Checkpoint.open(path).weights
        except ValueError as error:
            messages.append(str(error))
        else:
            assert found.keys() == weights.keys()
            assert all(torch.equal(found[key], weights[key]) for key in weights)
    assert len(messages) > len(whole) / 25
    assert all(message.startswith(f"{path} ") and "\n" not in message for message in messages)


def test_damaged_weights_are_refused_and_the_rest_is_readable(tmp_path, model):
    path = saved(tmp_path, {"net_state_dict": model.state_dict(), "training": {"flags": {"model": "a name"}}})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged .*: copy or download it again"):
        load_checkpoint(model, path)
    assert Checkpoint.open(path).describe() == {"model": "a name"}


# What a file knows


def trained(tmp_path, model, **replaced):
    """A file such as a training run writes."""
    return saved(tmp_path, content_of_training(model, **replaced))


def test_a_trained_file_records_its_network_classes_and_images(tmp_path):
    model = create_model("ResNet32_DoubleShared", "cifar10", 3, shared_rank=8)
    checkpoint = Checkpoint.open(trained(tmp_path, model))
    described = {"model": "ResNet32_DoubleShared", "dataset": "cifar10", "lr": 0.1, "shared_rank": 8}
    assert checkpoint.describe() == described
    assert checkpoint.classes == ["class 0", "class 1", "class 2"]
    assert checkpoint.held_out.tolist() == [4, 2]
    assert checkpoint.format == "this project (net_state_dict)"
    assert checkpoint.training["best"] == {"full": (50.0, 2)}
    assert checkpoint.optimizer["param_groups"][0]["momentum"] == 0.9
    built = checkpoint.build()
    assert same(built, model)
    assert built.built_as == model.built_as


def test_a_bare_file_needs_the_name_of_its_network(tmp_path, model):
    checkpoint = Checkpoint.open(saved(tmp_path, model.state_dict()))
    assert (checkpoint.describe(), checkpoint.classes, checkpoint.held_out) == ({}, None, 0)
    assert (checkpoint.training, checkpoint.optimizer) == ({}, None)
    with pytest.raises(ValueError, match="does not record which network it is of: give the name of its model"):
        checkpoint.build()
    assert same(checkpoint.build("ResNet32_DoubleShared", shared_rank=8), model)


def test_what_is_asked_for_goes_before_what_the_file_says(tmp_path, model):
    checkpoint = Checkpoint.open(trained(tmp_path, model))
    with pytest.raises(ValueError, match="is not a checkpoint of this ResNet32_DoubleShared"):
        checkpoint.build(shared_rank=16)
    with pytest.raises(ValueError, match="is not a checkpoint of this ResNet56_DoubleShared"):
        checkpoint.build("ResNet56_DoubleShared")
    with pytest.raises(ValueError, match=r"fc.weight \[10, 64\] instead of \[5, 64\]"):
        checkpoint.build(num_classes=5)


@pytest.mark.parametrize(
    ("name", "flags", "point"),
    [
        ("ResNet32_ADN", {}, "TFT"),
        ("mutualnet_wrn28_10", {"depth": 10, "widen_factor": 1}, "w0.9-r20"),
    ],
)
def test_a_file_of_a_sub_network_builds_it_again(tmp_path, name, flags, point):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    whole = create_model(name, "cifar10", 7, **flags).eval()
    whole.prepare([whole.point(point)], [(images, None)])
    about = {"dataset": "digits", "mean": (0.0, 0.0, 0.0), "classes": list("abcdefg")}
    checkpoint = Checkpoint.open(saved(tmp_path, extracted_content(whole, point, about)))
    assert checkpoint.describe() == {"model": name, "dataset": "digits", "mean": (0.0, 0.0, 0.0), **flags}
    assert checkpoint.classes == list("abcdefg")
    for network in (checkpoint.build(), getattr(hubconf, name)(pretrained=checkpoint.path)):
        assert [each.name for each in network.points] == [point]
        with torch.no_grad():
            torch.testing.assert_close(network.eval()(images), whole(images, point))


def test_only_create_model_networks_can_be_saved_as_sub_networks():
    whole = create_model("ResNet32_ADN")
    whole.built_as = None
    with pytest.raises(ValueError, match="only sub-networks of a network built by create_model"):
        extracted_content(whole, "TTT", {})


# How often, and when, it is read


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that torch.load read, and of those whose checksums were verified."""
    loaded, verified = [], []
    load, test = torch.load, zipfile.ZipFile.testzip
    monkeypatch.setattr(torch, "load", lambda file, **options: (loaded.append(file.name), load(file, **options))[1])
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda file: (verified.append(file.filename), test(file))[1])
    return loaded, verified


@pytest.mark.parametrize("extracted", [False, True])
def test_one_evaluation_reads_the_file_once(tmp_path, monkeypatch, capsys, reads, extracted):
    """One torch.load of the weights' file, and one pass over its checksums, from the command line to the last print."""
    model = create_model("ResNet32_ADN")
    path = trained(tmp_path, model)
    if extracted:
        path = saved(tmp_path, extracted_content(model, "TTT", {"dataset": "digits"}))
    flags = ["--dataset=digits", "--point=TTT", "--latency_batch=0", f"--report={tmp_path}/report"]
    code, out, err = call(monkeypatch, capsys, eval_cifar10, f"--pretrained={path}", *flags)
    assert (code, err) == (0, "")
    assert "this project (net_state_dict)" in out
    assert reads == (["file.pth"], [str(path)])


def test_naming_an_image_reads_the_file_once(tmp_path, monkeypatch, capsys, reads):
    path = trained(tmp_path, create_model("MobileNetV2", "ilsvrc", 3))
    Image.new("RGB", (80, 60)).save(tmp_path / "image.png")
    flags = [f"--pretrained={path}", "--resize=40", "--crop=32", f"--image={tmp_path}/image.png"]
    code, out, err = call(monkeypatch, capsys, eval_ilsvrc, *flags)
    assert (code, err) == (0, "")
    assert "%  class 2" in out
    assert reads == (["file.pth"], [str(path)])


def test_opening_reads_nothing_and_describing_reads_no_weights(tmp_path, model, reads):
    checkpoint = Checkpoint.open(trained(tmp_path, model))
    assert reads == ([], [])
    assert checkpoint.describe()["shared_rank"] == 8
    assert checkpoint.classes
    assert reads == (["file.pth"], [])


def test_a_released_checkpoint_is_described_without_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "_download", None)
    checkpoint = Checkpoint.open("ResNet56-S16U1-Double", cache=tmp_path)
    described = {"model": "ResNet56_DoubleShared", "dataset": "cifar10", "shared_rank": 16, "unique_rank": 1}
    assert checkpoint.describe() == described
    assert (checkpoint.classes, checkpoint.held_out) == (None, 0)


def test_a_name_shared_by_two_data_sets_follows_the_request():
    for dataset in ("cifar100", "ilsvrc"):
        assert Checkpoint.open("MobileNetV2-Shared", dataset).describe()["dataset"] == dataset
    assert Checkpoint.open("ResNet50-Shared", "cifar10").describe()["dataset"] == "ilsvrc"


def test_resume_state_survives_overwriting_the_file(tmp_path, model):
    checkpoint = Checkpoint.open(trained(tmp_path, model, raw_weights=model.state_dict()))
    training = checkpoint.training
    with open(checkpoint.path, "r+b") as file:
        file.write(bytes(checkpoint.path.stat().st_size))
    for key, value in model.state_dict().items():
        assert torch.equal(training["raw_weights"][key], value), key


# Released files


def test_a_name_that_is_none_answers_with_the_closest(model):
    with pytest.raises(ValueError, match="ResNet56-S16U1-Double"):
        load_checkpoint(model, "ResNet56-S16U1-Doble")


def test_published_files_are_found_under_both_spellings():
    assert published.find("ResNet56-S16U1*", "cifar10") is published.find("resnet56-s16u1-double", "cifar10")
    assert {entry.top1_error for entry in list_checkpoints(dataset="cifar10") if entry.sha256} >= {
        8.08,
        7.43,
        6.93,
        7.52,
        7.46,
        6.30,
    }


def test_without_network_access_the_message_says_url_and_path(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(published.urllib.request, "urlopen", refuse)
    entry = published.find("ResNet56-S16U1*", "cifar10")
    with pytest.raises(ValueError, match="no network") as caught:
        published.fetch(entry, tmp_path)
    assert entry.link in str(caught.value)
    assert str(tmp_path / entry.file) in str(caught.value)


def test_a_cached_file_that_is_not_the_released_one_is_removed(tmp_path):
    entry = published.find("ResNet56-S16U1*", "cifar10")
    (tmp_path / entry.file).write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"instead of {entry.size}"):
        published.fetch(entry, tmp_path)
    assert not (tmp_path / entry.file).exists()


def test_a_download_is_verified_and_kept(tmp_path):
    source = tmp_path / "source.pth"
    source.write_bytes(b"weights")
    entry = published.PublishedCheckpoint(
        name="x",
        model="ResNet20",
        dataset="cifar10",
        url=source.as_uri(),
        file="kept.pth",
        size=7,
        sha256="9e7b8cd6ae5de7bb3ab58ab4cd9e2ea69f8ac2ba8e5e41eb0af2a8ce9b3ee8e1",
    )
    with pytest.raises(ValueError, match="sha256"):
        published.fetch(entry, tmp_path / "cache")
    assert not (tmp_path / "cache" / "kept.pth").exists()
