"""What a network with shared filter bases is made of: counts, keys, blocks and what they compute."""

import copy
import functools

import pytest
import torch
from torch import nn

from models import create_model, profile
from models.shared_basis import basis, layers
from tests.parity import check
from tests.selection import exhaustive

FORMS = {  # bases of a group, unique filters
    "DoubleShared": (2, True),
    "SingleShared": (1, True),
    "SharedOnly": (2, False),
    "NonShared": (0, True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "blocks"), [("ResNet32", 5), ("ResNet56", 9)])
@pytest.mark.parametrize(("shared_rank", "unique_rank"), [(8, 2), (16, 1), (32, 1)])
def test_counts_equal_closed_forms(form, name, blocks, shared_rank, unique_rank):
    num_bases, unique = FORMS[form]
    flags = {"shared_rank": shared_rank} if num_bases else {}
    flags |= {"unique_rank": unique_rank} if unique else {}
    params, macs = 432 + 32 + 64 * 10 + 10, 32 * 32 * 432 + 640
    in_channels, side = 16, 32
    for scale in (1, 2, 4):
        c, side = 16 * scale, 32 // scale
        s = shared_rank * scale if num_bases else 0
        u = unique_rank * scale if unique else 0
        params += 9 * in_channels * c + 9 * c * c + 4 * c + num_bases * 9 * c * s
        params += 2 * (blocks - 1) * (9 * c * u + 2 * (u + s) + (u + s) * c + 2 * c)
        macs += side**2 * (9 * in_channels * c + 9 * c * c + 2 * (blocks - 1) * (u + s) * (9 * c + c))
        in_channels = c
    model = create_model(f"{name}_{form}", **flags)
    assert profile.count_params(model) == params
    assert profile.count_macs(model, (3, 32, 32)) == macs


@pytest.mark.parametrize(
    ("name", "dataset", "keys", "params"),
    [
        ("ResNet32_DoubleShared", "cifar10", 362, 173),
        ("ResNet56_DoubleShared", "cifar10", 674, 317),
        ("ResNet32_SingleShared", "cifar10", None, 170),
        ("ResNet56_SingleShared", "cifar10", None, 314),
        ("ResNet34_DoubleShared", "ilsvrc", 394, 190),
    ],
)
def test_a_shared_basis_is_one_parameter_under_several_keys(name, dataset, keys, params):
    model = create_model(name, dataset)
    assert len(list(model.parameters())) == params
    assert keys in (None, len(model.state_dict()))
    assert model.layer1[1].filters(1)[-1].weight is model.layer1[2].filters(1)[-1].weight
    with torch.no_grad():
        next(module for key, module in model.named_children() if key.startswith("shared_basis")).weight.zero_()
    assert not model.layer1[2].filters(1)[-1].weight.any()


def test_dense_nets_fourth_basis_is_never_used_but_regularised():
    model = create_model("DenseNet121_SingleShared", "cifar100")
    blocks = model.features
    assert blocks.dense_block_layer_3.bottle_neck_layer_0.shared_basis is model.shared_basis_3
    (groups,) = model.similarity_terms()
    assert [group.shared[0] for group in groups][3] is model.shared_basis_4


def test_joint_convolution_equals_two_concatenated_ones():
    torch.manual_seed(0)
    convs = [nn.Conv2d(16, 3, 3, padding=1, bias=False), nn.Conv2d(16, 20, 3, padding=1, bias=False)]
    x = torch.randn(4, 16, 9, 9)
    apart = torch.cat([conv(x) for conv in convs], dim=1)
    assert torch.allclose(basis.joint_conv(x, convs), apart, rtol=1e-5, atol=1e-6)
    basis.joint_conv(x, convs).square().sum().backward()
    joint = [conv.weight.grad.clone() for conv in convs]
    for conv in convs:
        conv.weight.grad = None
    apart.square().sum().backward()
    assert all(torch.allclose(a, conv.weight.grad, rtol=1e-4, atol=1e-4) for a, conv in zip(joint, convs, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "dataset", "module"),
    [("ResNet32_SingleShared", "cifar10", basis), exhaustive(("DenseNet121_SingleShared", "cifar100", layers))],
)
def test_zero_filters_change_no_output_gradient_or_statistic(name, dataset, module, training, monkeypatch):
    torch.manual_seed(0)
    model = create_model(name, dataset).double().train(training)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    runs = []
    for zeros in (0, 7):
        monkeypatch.setattr(module, "combine_filters", functools.partial(basis.combine_filters, zeros=zeros))
        network = copy.deepcopy(model)
        logits = network(images)
        logits.square().mean().backward()
        runs.append((logits, dict(network.named_parameters()), network.state_dict()))
        monkeypatch.undo()
    (plain, weights, state), (filled, filled_weights, filled_state) = runs
    assert check.relative(filled, plain.detach()) < 1e-12
    for key, weight in weights.items():
        if weight.grad is not None:
            assert torch.allclose(filled_weights[key].grad, weight.grad, rtol=1e-8, atol=1e-12), key
    assert all(torch.allclose(filled_state[key], value, rtol=1e-10) for key, value in state.items())
    assert list(filled_state) == list(state)


@pytest.mark.parametrize(("wide", "zeros"), [(True, [7, 15, 14, 0]), (False, [7, 7, 6, 0])])
def test_ranks_are_filled_up_only_where_that_saves_time(wide, zeros, monkeypatch):
    monkeypatch.setattr(basis, "WIDE_VECTORS", wide)
    images = torch.randn(2, 16, 8, 8)
    assert [basis.zero_filters(images, rank) for rank in (9, 17, 34, 48)] == zeros
    assert basis.zero_filters(images.to("meta"), 17) == 0
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert basis.zero_filters(images, 9) == (7 if wide else 0)


def test_training_alone_fills_ranks_up(monkeypatch):
    monkeypatch.setattr(basis, "WIDE_VECTORS", False)
    images = torch.randn(2, 16, 8, 8)
    block = create_model("ResNet32_DoubleShared", unique_rank=2).layer1[1]
    with torch.profiler.profile(record_shapes=True) as trace:
        block.train()(images)
        block.eval()(images)
    ranks = {event.input_shapes[1][0] for event in trace.events() if event.name == "aten::convolution"}
    assert ranks == {16, 18, 24}  # coefficients, evaluation, training


def test_hooked_and_unusual_layers_run_as_they_are():
    block = create_model("ResNet32_DoubleShared").layer1[1].train()
    seen = []
    block.basis_bn1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    block.basis_bn2.momentum = None  # a cumulative average
    block(torch.randn(2, 16, 8, 8))
    block(torch.randn(2, 16, 8, 8))
    assert seen == [17, 17]
    assert block.basis_bn2.num_batches_tracked == 2


def test_a_double_block_runs_four_convolutions_not_six():
    model = create_model("ResNet32_DoubleShared").eval()
    with torch.profiler.profile() as trace, torch.no_grad():
        model.layer1[1](torch.randn(1, 16, 8, 8))
    assert sum(event.count for event in trace.key_averages() if event.key == "aten::convolution") == 4


@pytest.mark.parametrize("name", ["ResNet32_DoubleShared", "ResNet32_SharedOnly"])
def test_the_two_bases_of_a_group_start_mutually_orthogonal(name):
    model = create_model(name)
    for bases in basis.bases_by_group(model):
        rows = torch.cat([basis.weight for basis in bases]).flatten(1)
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)


def test_bottleneck_bases_start_with_orthonormal_rows_or_columns():
    model = create_model("ResNet50_Shared", "ilsvrc")
    rows = model.shared_basis_2_1.weight.flatten(1)
    columns = model.shared_basis_2_2.weight.flatten(1).T
    for matrix in (rows, columns):
        assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5)
