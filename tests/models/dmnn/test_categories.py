"""Coarse categories of DMNN: how classes are grouped."""

import pytest
import torch

from models import create_model, create_objective
from tools.coarse_categories import ROOT, Hierarchy, main


def test_groups_follow_the_largest_branch():
    """root -> a (a1, a2, a3), b (b1, b2), c; a3 lies under b as well, but a is larger."""
    names = dict(root=ROOT, a="n1", b="n2", a1="n3", a2="n4", a3="n5", b1="n6", b2="n7", c="n8")
    edges = ["root a", "root b", "root c", "a a1", "a a2", "a a3", "b a3", "b b1", "b b2"]
    is_a = [tuple(names[word] for word in edge.split()) for edge in edges]
    hierarchy = Hierarchy(is_a, [names[word] for word in ("a1", "a2", "a3", "b1", "b2", "c")])
    assert hierarchy.path("n5") == [ROOT, "n1", "n5"]
    assert hierarchy.split(1) == [(ROOT, {"n3", "n4", "n5", "n6", "n7", "n8"})]
    assert hierarchy.split(2) == [("n1", {"n3", "n4", "n5"}), (ROOT, {"n6", "n7", "n8"})]
    assert hierarchy.split(4) == [
        ("n3", {"n3"}),
        ("n1", {"n4", "n5"}),
        ("n2", {"n6", "n7"}),
        (ROOT, {"n8"}),
    ]
    with pytest.raises(ValueError, match="6 classes cannot make 7 groups"):
        hierarchy.split(7)


@pytest.mark.parametrize(
    ("relation", "sentence"),
    [
        (None, "No such file"),
        ("n1 n2 n3", "each line should be 'parent child'"),
        (f"{ROOT} n1", "class n2 does not lie under"),
        (f"{ROOT} n2", "1 classes cannot make 58 groups"),
    ],
)
def test_a_relation_that_cannot_be_used_is_one_sentence(tmp_path, relation, sentence):
    if relation:
        (tmp_path / "is_a.txt").write_text(relation)
    (tmp_path / "classes.txt").write_text("n2")
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
        main([f"{tmp_path}/is_a.txt", f"{tmp_path}/classes.txt"])


def test_a_hierarchy_that_goes_in_circles_is_refused():
    with pytest.raises(ValueError, match="lies below itself"):
        Hierarchy([("a", "b"), ("b", "a"), ("a", "x")], ["x"]).path("x")


def test_a_coarse_file_replaces_the_grouping(tmp_path):
    file = tmp_path / "groups.txt"
    file.write_text("0 1 1 0 2, 2 1 0 0 1")
    model = create_model("dmnn50", "cifar10", category=True, coarse_file=str(file))
    assert model.group_of_class.tolist() == [0, 1, 1, 0, 2, 2, 1, 0, 0, 1]
    assert model.layer1[0].controller.category.out_features == 3
    (loss,) = create_objective("dmnn50", "cifar10")(model.train(), torch.randn(2, 3, 32, 32), torch.tensor([3, 4]))
    loss.backward()
    assert model.layer4[2].controller.category.weight.grad.abs().sum() > 0


def test_switches_of_the_ablation_remove_what_they_name():
    model = create_model("dmnn50", "cifar100", prev_state=False, category=False)
    assert not [key for key in model.state_dict() if ".state." in key or ".category." in key]
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    loss_of = create_objective("dmnn50", "cifar100")
    (loss,) = loss_of(model.train(), images, labels)
    loss.backward()
    assert "category" not in loss_of.means.read()
