"""The orthogonality loss against the published definition, pair by pair."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import create_model, create_objective
from models.shared_basis import basis
from models.shared_basis.objective import BasisLoss


def slow_similarity(groups):
    """The published definition, pair by pair; a group is its shared filters and the unique ones of each convolution."""
    total = count = 0
    for shared, unique in groups:
        for i, row in enumerate(shared):
            for j, other in enumerate(shared + [filters for conv in unique for filters in conv]):
                total += (float(row @ other) - (i == j)) ** 2
                count += 1
        for conv in unique:
            for i, row in enumerate(conv):
                for j, other in enumerate(conv):
                    total += (float(row @ other) - (i == j)) ** 2
                    count += 1
    return total / count, count


def rows(*convs):
    return [row for conv in convs for row in conv.weight.detach().double().flatten(1)]


@pytest.mark.parametrize("name", ["ResNet32_DoubleShared", "ResNet32_SingleShared"])
def test_similarity_with_unique_filters_equals_the_slow_sum(name):
    model = create_model(name, shared_rank=2, unique_rank=2).double()
    groups = []
    for number, layer in enumerate(model.layers(), start=1):
        bases = [m for key, m in model.named_children() if key.startswith(f"shared_basis_{number}")]
        unique = [rows(conv) for block in layer[1:] for conv in (block.basis_conv1, block.basis_conv2)]
        groups.append((rows(*bases), unique))
    value = basis.orthogonality(model.similarity_terms())
    assert value.tolist() == pytest.approx([slow_similarity(groups)[0]], rel=1e-9)


def test_similarity_counts_as_many_pairs_as_the_published_code():
    (groups,) = create_model("ResNet56_DoubleShared", shared_rank=8, unique_rank=2).similarity_terms()
    assert sum(group.deviations()[1] for group in groups) == 17472


@pytest.mark.parametrize(
    ("name", "dataset", "flags"),
    [
        ("ResNet32_SharedOnly", "cifar10", {"shared_rank": 2}),
        ("ResNet34_SingleShared", "cifar100", {"shared_rank": 2}),
        ("ResNext50_SingleShared", "cifar100", {"shared_rank": 8, "unique_rank": 4}),
        ("ResNet34_DoubleShared", "ilsvrc", {"shared_rank": 1}),
    ],
)
def test_similarity_of_shared_filters_equals_the_slow_sum(name, dataset, flags):
    model = create_model(name, dataset, **flags).double()
    with torch.no_grad():
        for bases in basis.bases_by_group(model):
            for base in bases:
                base.weight.normal_()
    groups = [(rows(*bases), []) for bases in basis.bases_by_group(model)]
    value = basis.orthogonality(model.similarity_terms())
    assert value.tolist() == pytest.approx([slow_similarity(groups)[0]], rel=1e-9)


def test_similarity_of_two_kinds_of_bases_is_two_averages():
    model = create_model("MobileNetV2_SharedDouble", "cifar100").double()
    value = basis.orthogonality(model.similarity_terms())
    for index in (0, 1):
        grams = [(w := bases[index].weight.flatten(1)) @ w.T for bases in basis.bases_by_group(model)]
        deviations = [(gram - torch.eye(len(gram))).square() for gram in grams]
        expected = sum(d.sum() for d in deviations) / sum(d.numel() for d in deviations)
        assert value[index].item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "dataset", "flags", "published"),
    [
        ("ResNet56_DoubleShared", "cifar10", {}, [3.3]),
        ("ResNet32_DoubleShared", "cifar10", {}, [2.0]),
        ("ResNet32_SingleShared", "cifar10", {}, [6.6]),
        ("ResNet32_SingleShared", "cifar10", {"shared_rank": 8}, [19]),
        ("MobileNetV2_Shared", "cifar100", {}, [0.00163]),
        ("MobileNetV2_SharedDouble", "ilsvrc", {}, [0.00163, 0.00409]),
        ("DenseNet121_SingleShared", "cifar100", {}, [0.028]),
        ("ResNet34_SingleShared", "cifar100", {}, [0.0]),
    ],
)
def test_similarity_starts_where_the_published_code_starts(name, dataset, flags, published):
    torch.manual_seed(0)
    value = basis.orthogonality(create_model(name, dataset, **flags).similarity_terms())
    assert value.tolist() == pytest.approx(published, rel=0.1, abs=1e-9)


def test_similarity_is_float32_under_autocast():
    model = create_model("ResNet32_DoubleShared")
    exact = basis.orthogonality(model.similarity_terms())
    with torch.autocast("cpu", torch.bfloat16):
        assert basis.orthogonality(model.similarity_terms()).equal(exact)


def test_loss_is_cross_entropy_plus_lambda_times_similarity():
    torch.manual_seed(0)
    model = create_model("ResNet32_SingleShared", shared_rank=4)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    similarity = basis.orthogonality(model.similarity_terms()).sum()
    objective = BasisLoss(lambdaR=2.5)
    (loss,) = objective(nn.DataParallel(model), images, labels)
    with torch.no_grad():
        cross_entropy = F.cross_entropy(model(images), labels)
    assert loss.item() == pytest.approx((cross_entropy + 2.5 * similarity).item(), rel=1e-5)
    means = objective.means.read()
    assert means["similarity"] == pytest.approx(similarity.item(), rel=1e-5)
    assert {"loss", "cross_entropy", "top1", "top5"} < set(means)


@pytest.mark.parametrize("name", ["ResNet32_SingleShared", "ResNet32_DoubleShared"])
def test_trained_filters_are_as_long_as_weight_decay_allows(name):
    model = create_model(name, pretrained="zoo")
    (groups,) = model.similarity_terms()
    compared = sum(group.deviations()[1] for group in groups)
    predicted = math.sqrt(1 - 0.0005 * compared / (4 * 10))  # weight decay and lambdaR of the recipe
    shortest = min(group.rows().norm(dim=1).min().item() for group in groups)
    assert shortest == pytest.approx(predicted, abs=0.015)


def test_a_negative_lambda_is_refused():
    with pytest.raises(ValueError, match="would reward"):
        create_objective("ResNet32_SingleShared", lambdaR=-1.0)
