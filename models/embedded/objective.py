"""How networks with embedded networks are trained: two networks per step or one per epoch, with or without a teacher,
fine-tuning what only one network has, and adaptive depth (arXiv 2312.16392)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.adaptive import Objective, Phase, TeacherFile, unwrap
from models.embedded.network import Embedded
from models.shared_basis.basis import BasisBlock, orthogonality
from models.shared_basis.objective import check_lambda

NORM = nn.modules.batchnorm._BatchNorm


def topk_distillation(student: Tensor, teacher: Tensor, temperature: float, top: int) -> Tensor:
    """T^2 KL(teacher || student) at temperature T over the teacher's `top` highest-ranked classes; batch mean.

    Args:
        student, teacher: logits (N, classes); no gradient flows into the teacher's.
        top: number of classes; all of them if there are no more.
    """
    teacher = teacher.detach()
    if top < teacher.shape[1]:
        index = teacher.topk(top, dim=1).indices
        student, teacher = student.gather(1, index), teacher.gather(1, index)
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1), reduction="batchmean"
    )


class EmbeddedLoss(Objective):
    """Train the two networks of a `*_skip` network (Net_RL2_dynamic).

    A pass runs one network on a batch; its loss is cross entropy or, with a teacher,
    alpha * distillation + (1 - alpha) * cross entropy. Joint training sums the gradients of both passes: the low-cost
    network first or, with a teacher, the full one first, as in the authors' scripts; norms that both use see the batch
    twice, in that order.

    Args:
        embed: joint trains both networks in every step; alternate draws one network per epoch, the low-cost one with
            probability 1/3, freezes what only the other has and makes a new optimizer; low_first trains the low-cost
            network alone, then what only the full network has; low and full train that network alone.
        low_epochs: with low_first, epochs of the low-cost network; the remaining ones train the full network.
        finetune: freeze everything except what only the low-cost or only the full network has; give --pretrained too.
            The other network's outputs stay bit-identical.
        teacher: file or published name of a trained network that teaches; with "full", each full pass teaches the
            low-cost pass of the same batch.
        teacher_model: name of the teacher's network, "torchvision:NAME" for one of torchvision's; by default the
            one that its file records, or else the network being trained.
        kd_alpha: weight of distillation.
        kd_alpha_full: the same in full passes, if it differs; 0 trains them by labels alone.
        kd_temp: temperature of distillation.
        kd_topk: number of classes to compare, those that the teacher ranks first; all if there are fewer.
        two_steps: step the optimizer after each of the two passes.
    """

    def __init__(
        self,
        embed: Literal["joint", "alternate", "low_first", "low", "full"] = "joint",
        low_epochs: int = 300,
        finetune: Literal["low", "full"] | None = None,
        teacher: str | None = None,
        teacher_model: str | None = None,
        kd_alpha: float = 0.9,
        kd_alpha_full: float | None = None,
        kd_temp: float = 4.0,
        kd_topk: int = 500,
        two_steps: bool = False,
    ):
        super().__init__()
        if kd_alpha_full is None:
            kd_alpha_full = 0.0 if teacher == "full" else kd_alpha
        for name, value in (("kd_alpha", kd_alpha), ("kd_alpha_full", kd_alpha_full)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} {value} must be between 0 (labels alone) and 1 (teacher alone)")
        if kd_temp <= 0:
            raise ValueError(f"kd_temp {kd_temp} must be a temperature above 0, such as 4")
        if kd_topk < 1:
            raise ValueError(f"kd_topk {kd_topk} leaves no class to compare; use 1 or more")
        if low_epochs < 0:
            raise ValueError(f"low_epochs {low_epochs} must not be negative; use 0 or more")
        if teacher_model and not teacher:
            raise ValueError(f"teacher_model {teacher_model} needs a file; add --teacher=FILE")
        if teacher == "full" and (finetune or embed != "joint"):
            raise ValueError("teacher full needs both networks in a step; use --embed=joint, or give a teacher's file")
        if two_steps and (finetune or embed != "joint"):
            raise ValueError("two_steps needs both networks in a step; use --embed=joint")
        self.embed, self.low_epochs, self.finetune = embed, low_epochs, finetune
        self.keeps_classifier = finetune is not None
        self.full_teaches = teacher == "full"
        if teacher and not self.full_teaches:
            self.teacher_file = TeacherFile(teacher, teacher_model)
        self.alpha = {True: kd_alpha, False: kd_alpha_full}  # by whether the pass is the low-cost network's
        self.temperature, self.topk = kd_temp, kd_topk
        self.step_per_loss = two_steps
        self.passes = self.passes_of(0)

    def passes_of(self, epoch: int) -> tuple[bool, ...]:
        """The passes of a step of this epoch, in order; True is the low-cost network's."""
        if self.finetune:
            return (self.finetune == "low",)
        if self.embed in ("low", "full"):
            return (self.embed == "low",)
        if self.embed == "low_first":
            return (epoch < self.low_epochs,)
        if self.embed == "alternate":
            # a generator of its own with the run's seed: an epoch's draw is the same in all processes and when resumed
            generator = torch.Generator().manual_seed(self.generator.initial_seed())
            for _ in range(epoch + 1):
                draw = torch.randint(3, (), generator=generator)
            return (int(draw) == 0,)
        return (False, True) if self.full_teaches or self.teacher_file else (True, False)

    def begin_epoch(self, model, epoch):
        self.passes = self.passes_of(epoch)
        model.requires_grad_(True)
        fresh = False
        if self.finetune:
            if epoch == 0 and not model.bn1.running_mean.any():  # waits for the device, once per run
                raise ValueError("finetune needs a network that was trained; add --pretrained=FILE")
            train_own_layers_only(model, low=self.finetune == "low")
        elif self.embed == "alternate":
            freeze_other(model, low=self.passes[0])
            fresh = True
        elif self.embed == "low_first":
            if self.passes[0]:
                freeze_other(model, low=True)
            else:
                train_own_layers_only(model, low=False)
            fresh = epoch == self.low_epochs
        return Phase([{"params": [p for p in model.parameters() if p.requires_grad]}], fresh)

    def teach(self, images: Tensor) -> Tensor | None:
        """The external teacher's logits, if there is one."""
        if self.teacher is None:
            return None
        with torch.no_grad():
            return self.teacher(images)

    def regulariser(self, network: Embedded) -> Tensor | float:
        """What is added to the loss of every pass."""
        return 0.0

    def __call__(self, model, images, labels):
        network, target = unwrap(model), self.teach(images)
        for low in self.passes:
            logits = model(images, network.points[0 if low else -1])
            loss = F.cross_entropy(logits, labels)
            values = {f"cross_entropy_{'skip' if low else 'full'}": loss}
            if target is not None and self.alpha[low]:
                loss = (1 - self.alpha[low]) * loss
                loss = loss + self.alpha[low] * topk_distillation(logits, target, self.temperature, self.topk)
            loss = loss + self.regulariser(network)
            if low and len(self.passes) == 2:
                self.means.add(len(labels), **values)
            else:
                self.track(logits, labels, **values)
            if self.full_teaches and not low:
                target = logits.detach()
            yield loss


class SharedEmbeddedLoss(EmbeddedLoss):
    """`EmbeddedLoss` for networks with shared bases, whose orthogonality loss is added in every pass.

    Args:
        lambdaR: weight of the orthogonality loss of the shared bases.
        **embedded: as for `EmbeddedLoss`.
    """

    def __init__(self, lambdaR: float = 10.0, **embedded):
        check_lambda(lambdaR)
        super().__init__(**embedded)
        self.lambdaR = lambdaR

    def regulariser(self, network):
        return self.lambdaR * orthogonality(network.similarity_terms()).sum()


class SubPathLoss(Objective):
    """Adaptive depth: the largest network learns the labels, the smallest learns the largest (arXiv 2312.16392).

        loss 1 = a CE(largest, labels)
        loss 2 = (1 - a) [KD(smallest, largest) + KD of features], without labels

    KD compares the 500 classes that the largest network ranks first. Patterns in between are never trained.

    Args:
        subpath_alpha: weight a of the largest network's cross entropy; distillation of the smallest has weight 1 - a.
        subpath_temp: temperature of distillation.
        fpn: also distil the channels of all stages but the last, averaged over space, for use in a detector.
        norm_weight_decay: weight decay of norms, instead of --weight_decay.
        bias_weight_decay: weight decay of biases, instead of --weight_decay.
    """

    def __init__(
        self,
        subpath_alpha: float = 0.5,
        subpath_temp: float = 1.0,
        fpn: bool = False,
        norm_weight_decay: float = 0.0,
        bias_weight_decay: float = 0.0,
    ):
        super().__init__()
        if not 0 < subpath_alpha < 1:
            raise ValueError(f"subpath_alpha {subpath_alpha} trains one network only; use more than 0 and less than 1")
        if subpath_temp <= 0:
            raise ValueError(f"subpath_temp {subpath_temp} must be a temperature above 0, such as 1")
        self.alpha, self.temperature, self.fpn = subpath_alpha, subpath_temp, fpn
        self.norm_weight_decay, self.bias_weight_decay = norm_weight_decay, bias_weight_decay

    def begin_epoch(self, model, epoch):
        norms = [p for module in model.modules() if isinstance(module, NORM) for p in module.parameters()]
        of_norms = {id(parameter) for parameter in norms}
        rest = [p for p in model.parameters() if id(p) not in of_norms]
        return Phase(
            [
                {"params": [p for p in rest if p.ndim > 1]},
                {"params": norms, "weight_decay": self.norm_weight_decay},
                {"params": [p for p in rest if p.ndim == 1], "weight_decay": self.bias_weight_decay},
            ]
        )

    def regulariser(self, network: Embedded) -> Tensor | float:
        """What is added to the largest network's loss."""
        return 0.0

    def __call__(self, model, images, labels):
        network = unwrap(model)
        smallest, largest = (replace(point, features=self.fpn) for point in (network.points[0], network.points[-1]))
        logits, features = self.split(model(images, largest))
        cross_entropy = F.cross_entropy(logits, labels)
        self.track(logits, labels, cross_entropy=cross_entropy)
        teacher, teacher_features = logits.detach(), [feature.detach() for feature in features]
        loss = self.alpha * cross_entropy + self.regulariser(network)
        del logits, features, cross_entropy  # they hold the first graph, which is no longer needed
        yield loss
        del loss
        logits, features = self.split(model(images, smallest))
        loss = topk_distillation(logits, teacher, self.temperature, 500)
        self.means.add(len(labels), distillation=loss)
        for feature, wanted in zip(features, teacher_features, strict=True):
            loss = loss + topk_distillation(feature, wanted, self.temperature, feature.shape[1])
        yield (1 - self.alpha) * loss

    def split(self, outputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Split outputs into logits and, if requested, the features of each stage but the last."""
        return outputs if self.fpn else (outputs, ())


class SharedSubPathLoss(SubPathLoss):
    """Adaptive depth for networks with shared bases: the orthogonality loss is added to the largest network's loss.

    Args:
        lambdaR: weight of the orthogonality loss of the shared bases.
        **subpath: as for `SubPathLoss`.
    """

    def __init__(self, lambdaR: float = 10.0, **subpath):
        check_lambda(lambdaR)
        super().__init__(**subpath)
        self.lambdaR = lambdaR

    def regulariser(self, network):
        return self.lambdaR * orthogonality(network.similarity_terms()).sum()


def freeze_other(model: Embedded, low: bool) -> None:
    """Freeze what the epoch's network does not use: coefficients (or convolutions) and classifier; norms in eval mode.

    Unique filters of blocks that do not run stay trainable, as the orthogonality loss moves them (Net_RL2_dynamic,
    freeze_highperf_model, freeze_lowperf_model).
    """
    for layer in model.own_layers(not low):
        if isinstance(layer, NORM):
            layer.eval()
        else:
            layer.requires_grad_(False)
    if not low:
        return
    for block in model.skipped_blocks():
        filters = [*block.filters(1), *block.filters(2)] if isinstance(block, BasisBlock) else []
        for layer in block.modules():
            if isinstance(layer, NORM):
                layer.eval()
            elif isinstance(layer, nn.Conv2d) and layer not in filters:
                layer.requires_grad_(False)


def train_own_layers_only(model: Embedded, low: bool) -> None:
    """Freeze everything but the layers that only one network has, so that the other network does not change.

    Norms that are stand-ins, or have stand-ins, take new statistics but keep weight and bias. Shared bases stay frozen:
    the low-cost network uses each of them.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, NORM):
            module.eval()
    for layer in model.own_layers(low):
        if isinstance(layer, NORM):
            layer.train()
        else:
            layer.requires_grad_(True)
    for block in [] if low else model.skipped_blocks():
        block.train()
        block.requires_grad_(True)
    for base in model.shared_bases():
        base.requires_grad_(False)
