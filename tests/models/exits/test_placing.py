"""Where exits can be placed: what each runs, and one sentence for every place that is none."""

import warnings

import pytest
import torch
import torchvision
from torch import nn

from models import create_model, profile
from models.exits import early_exits
from tests.models.exits.networks import SHAPE, Branches, Plain, randomise, small
from utils import UserError


def called_modules(model, point):
    """Names of the layers that run at a point."""
    called, handles = set(), []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm1d)):
            hook = lambda module, inputs, output, name=name: called.add(name)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(torch.randn(2, *SHAPE), point)
    for handle in handles:
        handle.remove()
    return called


def test_exits_stand_behind_any_module_of_a_users_network():
    backbone = randomise(Plain()).eval()
    model = early_exits(backbone, after=["stages.1", "stages.0"], image_shape=SHAPE)
    images = torch.randn(4, *SHAPE)
    assert [point.name for point in model.points] == ["exit1", "exit2", "exit3"]
    with torch.no_grad():
        assert torch.equal(model(images), backbone(images))
        maps = backbone.stages[0](images)
        torch.testing.assert_close(model(images, "exit1"), model.exits["1"].linear(maps.mean(dim=(2, 3))))
        maps = backbone.stages[1](maps)
        torch.testing.assert_close(model(images, "exit2"), model.exits["2"].linear(maps.mean(dim=(2, 3))))


def test_an_exit_may_stand_inside_what_another_one_stands_behind():
    backbone = randomise(Plain()).eval()
    inside = early_exits(backbone, ["stages.1.0", "stages.1"], image_shape=SHAPE)
    images = torch.randn(4, *SHAPE)
    with torch.no_grad():
        maps = backbone.stages[1][0](backbone.stages[0](images))
        torch.testing.assert_close(inside(images, "exit1"), inside.exits["1"].linear(maps.mean(dim=(2, 3))))
        assert torch.equal(inside(images), backbone(images))
    with pytest.raises(UserError, match=r"makes no tensor of its own"):
        early_exits(backbone, ["stages.1.2", "stages.1"], image_shape=SHAPE)


def test_an_exit_runs_what_it_needs_and_nothing_else():
    model = small()
    first = {"backbone.stages.0.0", "exits.1.convs.0", "exits.1.linear"}
    assert called_modules(model, "exit1") == first
    second = {"backbone.stages.0.0", "backbone.stages.1.0", "exits.2.convs.0", "exits.2.linear"}
    assert called_modules(model, "exit2") == second
    assert not any(name.startswith("exits.") for name in called_modules(model, "exit3"))


def test_a_branch_that_an_exit_does_not_need_waits():
    """Whichever branch is written first; but not beyond an operation in place that changes what it reads."""
    both = {"backbone.first.0", "backbone.second.0", "exits.1.linear"}  # the first reads what is then multiplied
    assert called_modules(small(Branches(), ["second"], head_channels=()), "exit1") == both
    model = small(Branches(), ["first"], head_channels=())
    assert called_modules(model, "exit1") == {"backbone.first.0", "exits.1.linear"}
    assert "backbone.side" not in called_modules(model, "exit2"), "nothing reads it"


@pytest.mark.parametrize("after", [["first"], ["second"], ["first", "second"], ["side", "second"]])
def test_branches_parameters_and_constants_give_the_same_logits(after):
    backbone = Branches()
    model = small(backbone, after, head_channels=())
    images = torch.randn(6, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(model(images), backbone(images))
        points = model.prepare([model.point("budget-p20")], [(torch.randn(40, *SHAPE), None)])
        (logits, macs), (wanted, costs) = model.infer(images, points[0]), next(model.sweep(images, points * 2))
    torch.testing.assert_close(logits, wanted)
    assert torch.equal(macs, costs)


def test_functions_that_differ_by_mode_are_traced_in_both():
    model = small(Plain(drop=0.5))
    images = torch.randn(4, *SHAPE)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        assert not torch.equal(model.train()(images)[-1], model(images)[-1])


@pytest.mark.parametrize(
    ("name", "after", "width"),
    [
        ("resnet18", "layer3", 256),
        ("mobilenet_v3_small", "features.8", 48),
        ("shufflenet_v2_x0_5", "stage2", 48),
        ("vit_b_32", "encoder.layers.encoder_layer_3", 768),
    ],
)
def test_exits_stand_in_torchvisions_networks(name, after, width):
    with torch.device("meta"):
        model = early_exits(torchvision.models.get_model(name), after)
    assert model.exits["1"].linear.weight.shape == (1000, width)
    early, full = (profile.count_macs(model, model.image_shape, point) for point in model.points)
    assert early < full


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"no module 'stage.1' .* nearest are stages.1") as error:
        early_exits(Plain(), ["stage.1"], image_shape=SHAPE)
    assert error.value.exit_code == 2
    with pytest.raises(UserError, match=r"no module 'xyz' .* nearest are stages, norm, classifier"):
        early_exits(Plain(), ["xyz"], image_shape=SHAPE)
    for after in ([], ["norm", "norm"]):
        with pytest.raises(UserError, match="different modules, one or more"):
            early_exits(Plain(), after, image_shape=SHAPE)


class Untraceable(Plain):
    """Looks at values inside a stage."""

    def __init__(self):
        super().__init__()
        self.stages[1] = Deciding()


class Deciding(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x):
        x = self.conv(x)
        return x if x.shape[1] == 12 else 2 * x


def test_only_modules_around_an_exit_have_to_be_traceable():
    model = small(Untraceable(), ["stages.0", "stages.1"])
    with torch.no_grad():
        assert model(torch.randn(2, *SHAPE), "exit2").shape == (2, 5)
    with pytest.raises(UserError, match=r"torch.fx cannot trace the forward functions around it .*further outside"):
        early_exits(Untraceable(), ["stages.1.conv"], image_shape=SHAPE)


class Counts(Plain):
    """Counts the images in front and reshapes by that number behind."""

    def forward(self, x):
        number = x.shape[0]
        for stage in self.stages:
            x = stage(x)
        return self.classifier(self.norm(x.mean(dim=(2, 3)).reshape(number, 16)))


def test_a_number_of_images_is_that_of_those_who_stayed():
    model = small(Counts())
    images = torch.randn(8, *SHAPE)
    with torch.no_grad():
        (point,) = model.prepare([model.point("budget-p20")], [(images, None)])
        (logits, macs), (wanted, costs) = model.infer(images, point), next(model.sweep(images, [point, point]))
    assert len(macs.unique()) > 1
    torch.testing.assert_close(logits, wanted)
    assert torch.equal(macs, costs)


class Remembers(Counts):
    """Needs the number of images in front of an exit and behind it."""

    def forward(self, x):
        number = x.shape[0]
        for stage in self.stages:
            x = stage(x.reshape(number, -1, *SHAPE[1:]) if stage is self.stages[0] else x)
        return self.classifier(self.norm(x.mean(dim=(2, 3)).reshape(number, 16)))


class Twice(Plain):
    def forward(self, x):
        return super().forward(x) + super().forward(x)


class Pair(Plain):
    def forward(self, x):
        return super().forward(x), x


class OwnTensor(Plain):
    def forward(self, x):
        return super().forward(x * torch.tensor([2.0]))


@pytest.mark.parametrize(
    ("backbone", "after", "message"),
    [
        (Remembers, "stages.0", "behind stages.0, Remembers goes on with getitem.*one row for each image"),
        (Twice, "stages.0", "stages.0 runs 2 times"),
        (Plain, "stages", "stages runs 0 times"),
        (Pair, "stages.0", "Pair does not return one tensor of logits"),
        (OwnTensor, "stages.0", "register it as a buffer"),
        (Plain, "stages.0.1", "stages.0.1 makes is overwritten in place .* name that one instead"),
    ],
)
def test_places_without_an_exit_are_one_sentence(backbone, after, message):
    with pytest.raises(UserError, match=message) as error:
        early_exits(backbone(), [after], image_shape=SHAPE)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


def test_an_exit_may_not_cost_more_than_the_next():
    with pytest.raises(UserError, match=r"the exit after stages\.0 costs more than the next one"):
        early_exits(Plain(), ["stages.0", "stages.1"], head_channels=(400,), image_shape=SHAPE)


def test_backbones_are_named_or_answered_with_the_nearest():
    with torch.device("meta"):
        assert create_model("exits", backbone="ResNet20", after=("layer1.1",), head_channels=(0,)).num_exits == 2
        # its constructor computes with tensors
        assert create_model("exits", "ilsvrc", backbone="torchvision:regnet_y_400mf", after=("stem",)).num_exits == 2
    for flags, message in (
        ({"backbone": "ResNet3"}, "closest are ResNet32"),
        ({"backbone": "torchvision:resnet3"}, "unknown to torchvision; try resnet34"),
        ({"backbone": "torchvision:squeezenet1_1"}, "--after: name the modules of .* it has features, classifier"),
        ({"head_channels": (-1,)}, "must be above 0"),
    ):
        with torch.device("meta"), pytest.raises(UserError, match=message) as error:
            create_model("exits", **flags)
        assert error.value.exit_code == 2


def test_images_that_the_backbone_cannot_run_on_are_one_sentence():
    with pytest.raises(UserError, match="Plain cannot run on images of 1 x 16 x 16"):
        early_exits(Plain(), ["stages.0"], image_shape=(1, 16, 16))


def test_nothing_of_the_backbone_is_changed_by_exits():
    backbone = randomise(Plain())
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = early_exits(backbone, ["stages.0"], image_shape=SHAPE)
    assert model.training
    assert backbone.training
    assert model.backbone is backbone
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())
