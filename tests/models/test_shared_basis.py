"""Shared filter bases: the authors' numbers, the orthogonality loss, folding, and what cannot be built."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import create_model, create_objective, profile
from models.shared_basis import basis, layers
from models.shared_basis.objective import BasisLoss
from reporting import published
from tests.parity import check, fill

FIXTURES = [check.load("shared_basis", name) for name in check.names("shared_basis")]
TRAINED = [fixture for fixture in FIXTURES if "train" in fixture]


def name(fixture):
    ranks = "".join(f"-{fixture['args'][key]}" for key in ("shared_rank", "unique_rank") if key in fixture["args"])
    return f"{fixture['dataset']}-{fixture['model']}{ranks}"


def build(fixture):
    return create_model(fixture["model"], fixture["dataset"], **fixture["args"])


@pytest.mark.parametrize("fixture", FIXTURES, ids=name)
def test_parity_of_keys_counts_and_logits(fixture):
    model = build(fixture)
    shape = fixture["input"]["shape"][1:]
    assert profile.count_params(model) == fixture["params"]
    assert profile.count_macs(model, shape) == fixture["macs"]
    # the published count adds biases and pooling to what we count: less than half a percent
    assert profile.count_ptflops(model, shape) == pytest.approx(fixture["macs_as_published"], rel=5e-3)
    for scale, key, noise in ((1.0, "outputs", "eval"), (0.5, "outputs_half_scale", "eval_half_scale")):
        check.fill_model(model, fixture, scale).eval()
        with torch.no_grad():
            logits = model(check.images(fixture))
        assert check.logits_error(logits, fixture[key]) < check.tolerance(fixture["float32_noise"][noise])


def loss_parts(model, fixture, images, labels):
    """One step's logits, cross entropy, regulariser and total loss through the network's own objective."""
    objective = create_objective(fixture["model"], fixture["dataset"])
    (loss,) = objective(model, images, labels)
    means = objective.means.read()
    return loss, means.get("cross_entropy", means["loss"]), means.get("similarity", 0.0)


@pytest.mark.parametrize("fixture", TRAINED, ids=name)
def test_parity_of_losses_gradients_and_second_step(fixture):
    record, noise = fixture["train"], fixture["train"]["float32_noise"]
    # in float64: the reference's float32 gradients deviate from it less than those of some processors
    model = check.fill_model(build(fixture), fixture).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = len(record["logits"] if "logits" in record else record["outputs"]["logits_l2"])
    images = fill.parity_input((batch, *fixture["input"]["shape"][1:])).double()
    labels = fill.parity_labels(batch, fixture["args"]["num_classes"])
    weight_decay = float(record["after_one_step"]["how"].partition("weight_decay ")[2].partition(")")[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=weight_decay)

    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, expected in record.get("regulariser_grad_l2", {}).items():
        (gradient,) = torch.autograd.grad(
            10 * basis.orthogonality(model.similarity_terms()).sum(), parameters[key], retain_graph=False
        )
        assert gradient.norm().item() == pytest.approx(expected, rel=1e-4), key

    loss, cross_entropy, similarity = loss_parts(model, fixture, images, labels)
    loss.backward()
    assert check.relative(cross_entropy, record["cross_entropy"]) < check.tolerance(noise["cross_entropy"])
    assert similarity == pytest.approx(sum(record["regulariser_terms"]), rel=1e-5)
    assert loss.item() == pytest.approx(record["loss"], rel=1e-5)
    for key, expected in record["grad_l2"].items():
        assert parameters[key].grad.norm().item() == pytest.approx(expected, rel=4 * noise["grad_l2"] + 1e-5), key

    optimizer.step()
    _, cross_entropy, similarity = loss_parts(model, fixture, images, labels)
    after, tolerance = record["after_one_step"], check.tolerance(noise["cross_entropy_after_step"])
    assert check.relative(cross_entropy, after["cross_entropy"]) < tolerance
    assert similarity == pytest.approx(
        sum(after["regulariser_terms"]), rel=max(1e-4, noise["cross_entropy_after_step"])
    )


# What a network is made of


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
    [("ResNet32_SingleShared", "cifar10", basis), ("DenseNet121_SingleShared", "cifar100", layers)],
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


# The orthogonality loss


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


def test_a_negative_lambda_is_refused():
    with pytest.raises(ValueError, match="would reward"):
        create_objective("ResNet32_SingleShared", lambdaR=-1.0)


# Folding


def randomised(name, dataset, **flags):
    """A network in eval mode whose batch norms are no identities."""
    torch.manual_seed(0)
    model = create_model(name, dataset, **flags).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.2)
    return model


@pytest.mark.parametrize(
    ("name", "dataset", "flags"),
    [
        ("ResNet20", "cifar10", {}),
        ("ResNet32_DoubleShared", "cifar10", {"shared_rank": 16}),
        ("ResNet32_SingleShared", "cifar10", {"shared_rank": 8}),
        ("ResNet32_SharedOnly", "cifar10", {}),
        ("ResNet32_NonShared", "cifar10", {"unique_rank": 4}),
        ("ResNet34_SingleShared", "cifar100", {}),
        ("DenseNet121", "cifar100", {}),
        ("DenseNet121_SingleShared", "cifar100", {}),
        ("ResNext50", "cifar100", {}),
        ("ResNext50_SingleShared", "cifar100", {}),
        ("MobileNetV2", "cifar100", {}),
        ("MobileNetV2_SharedDouble", "cifar100", {}),
        ("ResNet50_Shared", "ilsvrc", {}),
        ("MobileNetV2_SharedDouble", "ilsvrc", {"eca": True}),
    ],
)
def test_a_folded_network_gives_the_same_logits_for_no_more_macs(name, dataset, flags):
    model = randomised(name, dataset, **flags)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = model.fold()
    side = 64 if dataset == "ilsvrc" else 32
    with torch.no_grad():
        images = torch.randn(2, 3, side, side)
        assert check.relative(folded(images), model(images)) < 1e-4
    norms = [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) < sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert profile.count_macs(folded, (3, side, side)) <= profile.count_macs(model, (3, side, side))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("shared_rank", "dense"), [(16, True), (8, False)])
def test_a_block_is_folded_dense_only_where_that_costs_less(shared_rank, dense):
    folded = randomised("ResNet56_DoubleShared", "cifar10", shared_rank=shared_rank).fold()
    assert isinstance(folded.layer2[3].maps[0], nn.Conv2d) == dense
    plain = create_model("ResNet56")
    macs = profile.count_macs(folded, (3, 32, 32))
    assert (macs == profile.count_macs(plain, (3, 32, 32))) == dense
    assert macs == (125_485_696 if dense else 83_018_368)
    assert not [key for key in folded.state_dict() if "shared_basis" in key]


@pytest.mark.parametrize("dense_is_faster_at", [(1, 4), (4,), ()])
def test_folding_for_a_device_takes_the_faster_form(dense_is_faster_at, monkeypatch):
    """Factored is a basis only where that is faster at every batch size."""
    timed = []

    def time_calls(call, batch, device, seconds):
        is_dense = isinstance(call.func, nn.Conv2d)
        timed.append((is_dense, *call.args[0].shape))
        return SimpleNamespace(median=1.0 if is_dense == (batch in dense_is_faster_at) else 2.0)

    monkeypatch.setattr(profile, "time_calls", time_calls)
    model = randomised("ResNet32_SingleShared", "cifar10")
    folded = model.fold([torch.randn(batch, 3, 32, 32) for batch in (1, 4)])
    chosen = {isinstance(maps, nn.Conv2d) for block in folded.layer3[1:] for maps in block.maps}
    assert chosen == {bool(dense_is_faster_at)}
    assert len(timed) == len(set(timed)), "equal maps are timed once, however many blocks have them"
    assert {shape[2:] for shape in timed} == {(16, 32, 32), (32, 16, 16), (64, 8, 8)}
    count = 24 if dense_is_faster_at else 0
    assert (
        folded.folded_as == f"{count} of 24 bases as dense convolutions, {24 - count} factored: by time measured here"
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert check.relative(folded(images), model(images)) < 1e-4


# What cannot be built


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


def test_a_file_with_channel_attention_names_the_flag():
    state = create_model("MobileNetV2_SharedDouble", "ilsvrc", eca=True).state_dict()
    with pytest.raises(ValueError, match="--eca"):
        create_model("MobileNetV2_SharedDouble", "ilsvrc").adapt_state_dict(state)


# Tables and recipes


ROWS = published.published_rows("shared-basis")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.dataset}-{row.row}")
def test_a_published_row_is_our_count_or_listed_as_different(row):
    params, _, flops = row.count()
    printed = {"params": (params, row.params), "flops": (flops, row.flops)}
    wrong = [name for name, (count, text) in printed.items() if text and not published.agrees(count, text)]
    assert wrong == row.disagrees.split()
    assert row.note or not wrong
