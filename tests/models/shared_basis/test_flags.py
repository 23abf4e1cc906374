"""Ranks and files that make no network."""

import pytest

from models import create_model
from models.meta import on_meta


@pytest.mark.parametrize(
    ("name", "dataset", "flags", "words"),
    [
        ("ResNet32_DoubleShared", "cifar10", {"shared_rank": 0}, "shared_rank 0 .*_NonShared"),
        ("ResNet32_SingleShared", "cifar10", {"unique_rank": 0}, "unique_rank 0 .*_SharedOnly"),
        ("ResNet32_SingleShared", "cifar10", {"unique_rank": -1}, "unique_rank -1"),
        ("ResNet32_DoubleShared", "cifar10", {"shared_rank": 73}, "shared_rank 73 .* use 72 or less"),
        ("ResNet32_SingleShared", "cifar10", {"shared_rank": 145}, "shared_rank 145 .* use 144 or less"),
        ("ResNet32_NonShared", "cifar10", {"unique_rank": 145}, "unique_rank 145 .* use 144 or less"),
        ("ResNext50_SingleShared", "cifar100", {"unique_rank": 1}, "unique_rank 1 .* use 4, 8, 16"),
        ("ResNext50_SingleShared", "cifar100", {"shared_rank": 12}, "shared_rank 12 .* use 4, 8, 16"),
        ("DenseNet121_SingleShared", "cifar100", {"shared_rank": 1153}, "use 1152 or less"),
    ],
)
def test_an_impossible_rank_is_one_sentence(name, dataset, flags, words):
    with pytest.raises(ValueError, match=words) as error:
        create_model(name, dataset, **flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("eca", "advice"), [(True, "with channel attention; add --eca"), (False, "leave --eca out")])
def test_a_file_with_or_without_attention_says_so(eca, advice):
    with on_meta():
        file, model = (create_model("MobileNetV2_SharedDouble", "ilsvrc", eca=flag) for flag in (eca, not eca))
    with pytest.raises(ValueError, match=advice):
        model.adapt_state_dict(file.state_dict())
    assert file.adapt_state_dict(file.state_dict()).keys() == file.state_dict().keys()
