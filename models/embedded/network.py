"""Several networks in one: which blocks each of them runs, and what training, folding and loading need."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from models import profile
from models.adaptive import AdaptiveModel
from models.deploy import folding
from models.embedded.layers import TwoVersions, keep_one_version
from models.embedded.paths import SkipPoint, SubPath
from models.shared_basis.basis import bases_by_group
from utils import UserError


class Embedded(AdaptiveModel):
    """A network whose stages can leave blocks out: several networks that share most of their weights.

    A point says for each stage whether it is skipped. A skipped stage runs only some of its blocks, some of them with
    stand-ins for a few of their layers; nothing else is executed. Subclasses implement `stages`, `enter` and `leave`.
    """

    #: what each stage runs when it is skipped
    paths: tuple[SubPath, ...] = ()
    #: the classifier whose stand-in the network with all stages skipped uses, if there is one
    own_classifier: str | None = None
    #: whether files of a network without sub-paths may be loaded
    from_plain = False

    @property
    def watched(self):
        return tuple(dict.fromkeys((self.points[0], self.points[-1])))

    @property
    def default_points(self):
        """The patterns that skip stages from the first on: TTT, TTF, TFF, FFF."""
        return tuple(point for point in self.points if list(point.skip) == sorted(point.skip, reverse=True))

    def stages(self) -> list[Sequence[nn.Module]]:
        """The blocks of every stage that can be skipped, in order."""
        raise TypeError(f"{type(self).__name__} does not implement stages")

    def enter(self, images: Tensor, skip: bool) -> Tensor:
        """Run what comes before the stages; `skip` is that of the first stage."""
        raise TypeError(f"{type(self).__name__} does not implement enter")

    def leave(self, x: Tensor, skip: bool) -> Tensor:
        """Turn the stages' output into logits; `skip` is that of the last stage."""
        raise TypeError(f"{type(self).__name__} does not implement leave")

    def compute(self, images, point):
        x, means = self.enter(images, point.skip[0]), []
        for blocks, path, skip in zip(self.stages(), self.paths, point.skip, strict=True):
            x = run_stage(blocks, path, x, skip)
            if point.features and len(means) + 1 < len(self.paths):
                means.append(x.mean(dim=(2, 3)))
        logits = self.leave(x, point.skip[-1])
        return (logits, tuple(means)) if point.features else logits

    def sweep(self, images, points):
        """Points with the same first stages share their computation, so all 16 patterns cost less than 16 passes."""
        logits, inputs, before = {}, [], ()  # inputs[i]: what stage i reads at the current point
        stages = self.stages()
        for point in sorted(points, key=lambda point: point.skip):
            shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(point.skip, before)))
            del inputs[shared + 1 if shared else 0 :]
            if not inputs:
                inputs.append(self.enter(images, point.skip[0]))
            for index in range(len(inputs) - 1, len(stages)):
                inputs.append(run_stage(stages[index], self.paths[index], inputs[index], point.skip[index]))
            logits[point] = self.leave(inputs[-1], point.skip[-1])
            before = point.skip
        for point in points:
            macs = profile.count_macs(self, images.shape[1:], point)
            yield logits[point], images.new_full((len(images),), macs, dtype=torch.int64)

    def find_point(self, name):
        """Find the point called `name`; patterns may also be typed like the authors', `True True False False`."""
        words = name.replace(",", " ").split()
        if words and set(words) <= {"True", "False"}:
            name = "".join(word[0] for word in words)
        last = self.points[-1].name
        if set(last) != {"F"} or name in [point.name for point in self.points]:
            return super().find_point(name)
        example = "T" * (len(last) // 2) + "F" * (len(last) - len(last) // 2)
        if set(name) <= {"T", "F"}:
            problem = f"the pattern {name} has {len(name)} letters for {len(last)} stages"
        else:
            problem = f"{name!r} is not a pattern"
        raise UserError(
            f"{problem}; write T (skip) or F for each of the {len(last)} stages, such as {example}", exit_code=2
        )

    # Which parts belong to one network alone

    def own_layers(self, low: bool) -> list[nn.Module]:
        """Convolutions, norms and classifier of which each network has its own: the low-cost or the full one's."""
        owners = [blocks[i] for blocks, path in zip(self.stages(), self.paths, strict=True) for i in path.switched]
        layers = []
        for owner in owners:
            for name, module in owner.named_modules():
                if name.endswith("_skip"):
                    layers.append(module if low else owner.get_submodule(name.removesuffix("_skip")))
        if self.own_classifier:
            layers.append(getattr(self, f"{self.own_classifier}_skip" if low else self.own_classifier))
        return layers

    def skipped_blocks(self) -> list[nn.Module]:
        """The blocks that a skipped stage leaves out."""
        return [
            block
            for blocks, path in zip(self.stages(), self.paths, strict=True)
            for index, block in enumerate(blocks)
            if index not in path.kept
        ]

    def shared_bases(self) -> list[nn.Module]:
        """Filter bases that all blocks of a group use."""
        return list(itertools.chain(*bases_by_group(self)))

    # Copies

    def followers(self) -> list[list[nn.Module]]:
        """For each stage, the modules that are switched with it."""
        return [list(blocks) for blocks in self.stages()]

    def extract(self, point=None, empty=False):
        """Return a copy that holds only the layers of one point."""
        point = self.point(point)
        skip = point.skip
        model = copy.deepcopy(self)
        left_out = {
            block: nn.Identity()
            for blocks, path, skipped in zip(model.stages(), model.paths, skip, strict=True)
            for index, block in enumerate(blocks)
            if skipped and index not in path.kept
        }
        for modules, skipped in zip(model.followers(), skip, strict=True):
            for module in modules:
                keep_one_version(module, skipped)
        _replace(model, left_out)
        keep_one_version(model, skip[-1] and model.own_classifier is not None)
        model.own_classifier = None
        model.points = (SkipPoint(point.name, skip=(False,) * len(skip)),)
        return model

    def fold(self, batches=()):
        model = copy.deepcopy(self)
        pairs = {}
        for modules in model.followers():
            for module in modules:
                if any(name.endswith("_skip") for name, _ in module.named_modules()):
                    pairs[module] = TwoVersions(
                        keep_one_version(copy.deepcopy(module), False), keep_one_version(copy.deepcopy(module), True)
                    )
        _replace(model, pairs)
        return folding.folded_copy(model)

    # Files of other networks

    def adapt_state_dict(self, state):
        state = super().adapt_state_dict(state)
        own = self.state_dict()
        missing = [key for key in own if "_skip" in key and key not in state]
        needed = [key for key in missing if not key.endswith("num_batches_tracked")]
        if not needed:
            return state
        if any("_skip" in key for key in state):
            return state  # another embedded network: the loader lists missing and unexpected keys
        if not self.from_plain:
            name = self.built_as.model if self.built_as else type(self).__name__
            raise ValueError(
                f"the file holds a network without sub-paths: {len(needed)} keys of {name} are missing "
                f"({', '.join(needed[:3])}, ...); add --from_plain to start them as copies of the layers that they "
                f"stand in for, or give a file of {name}"
            )
        print(f"a plain network's file: {len(needed)} *_skip tensors start as copies of what they stand in for")
        sources = {key: key.replace("_skip", "") for key in missing}
        return state | {key: state[source] for key, source in sources.items() if source in state}


def run_stage(blocks: Iterable[nn.Module], path: SubPath, x: Tensor, skip: bool) -> Tensor:
    """Run one stage: all blocks, or those of the sub-path."""
    if not skip:
        for block in blocks:
            x = block(x)
        return x
    blocks = list(blocks)
    for index in path.kept:
        x = blocks[index](x, True) if index in path.switched else blocks[index](x)
    return x


def _replace(model: nn.Module, by: Mapping[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in by:
                setattr(parent, name, by[child])
