"""Files from elsewhere: every format is recognised, and what is no checkpoint is refused in one sentence."""

import pickle

import pytest
import torch

from models import checkpoints, create_model, list_checkpoints, load_checkpoint


@pytest.fixture
def model():
    torch.manual_seed(1)
    return create_model("ResNet32_DoubleShared", shared_rank=8)


def saved(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    return tmp_path / "file.pth"


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
        (b"plain text", "no checkpoint"),
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


def test_damaged_weights_are_refused_and_what_is_beside_them_is_read_without_them(tmp_path, model):
    path = saved(tmp_path, {"net_state_dict": model.state_dict(), "training": {"flags": {"model": "a name"}}})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged .*: copy or download it again"):
        load_checkpoint(model, path)
    assert checkpoints.describe(path) == {"model": "a name"}


def test_a_name_that_is_none_answers_with_the_closest(model):
    with pytest.raises(ValueError, match="ResNet56-S16U1-Double"):
        load_checkpoint(model, "ResNet56-S16U1-Doble")


def test_published_files_are_found_under_both_spellings():
    assert checkpoints.find("ResNet56-S16U1*", "cifar10") is checkpoints.find("resnet56-s16u1-double", "cifar10")
    assert {entry.top1_error for entry in list_checkpoints(dataset="cifar10") if entry.sha256} >= {
        8.08,
        7.43,
        6.93,
        7.52,
        7.46,
        6.30,
    }


def test_without_a_network_the_message_says_what_to_open_and_where_to_put_it(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(checkpoints.urllib.request, "urlopen", refuse)
    entry = checkpoints.find("ResNet56-S16U1*", "cifar10")
    with pytest.raises(ValueError, match="no network") as caught:
        checkpoints.fetch(entry, tmp_path)
    assert entry.link in str(caught.value)
    assert str(tmp_path / entry.file) in str(caught.value)


def test_a_cached_file_that_is_not_the_released_one_is_removed(tmp_path):
    entry = checkpoints.find("ResNet56-S16U1*", "cifar10")
    (tmp_path / entry.file).write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"instead of {entry.size}"):
        checkpoints.fetch(entry, tmp_path)
    assert not (tmp_path / entry.file).exists()


def test_a_download_is_verified_and_kept(tmp_path):
    source = tmp_path / "source.pth"
    source.write_bytes(b"weights")
    entry = checkpoints.Published(
        name="x",
        model="ResNet20",
        dataset="cifar10",
        url=source.as_uri(),
        file="kept.pth",
        size=7,
        sha256="9e7b8cd6ae5de7bb3ab58ab4cd9e2ea69f8ac2ba8e5e41eb0af2a8ce9b3ee8e1",
    )
    with pytest.raises(ValueError, match="sha256"):
        checkpoints.fetch(entry, tmp_path / "cache")
    assert not (tmp_path / "cache" / "kept.pth").exists()
