"""MobileNetV2 as the authors of shared bases wrote it: the baseline of their MobileNets, not torchvision's network."""

from models.registry import register
from models.trunks import CIFAR100_TRAINING, ILSVRC_MOBILENET_TRAINING, MobileNetV2, mobilenetv2_stages


@register("MobileNetV2", ("cifar100",), defaults=CIFAR100_TRAINING)
def mobilenetv2_cifar(num_classes: int) -> MobileNetV2:
    """MobileNetV2 for 32x32 images."""
    return MobileNetV2(True, mobilenetv2_stages(small=True), num_classes)


@register("MobileNetV2", ("ilsvrc",), defaults=ILSVRC_MOBILENET_TRAINING)
def mobilenetv2_ilsvrc(num_classes: int) -> MobileNetV2:
    """MobileNetV2 for 224x224 images, with biases in its first and last convolution."""
    return MobileNetV2(False, mobilenetv2_stages(small=False), num_classes)
