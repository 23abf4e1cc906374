"""Weights that the authors of adaptive depth networks released (github.com/wchkang/depth, README).

They are on Google Drive; their checksums are not known. No trained `*_skip` network was released.
"""

from models.published import publish

NOTE = "bare state dict by the authors' code; never opened here"

for name, model, drive_id, error, flags in (
    ("ResNet50-ADN", "ResNet50_ADN", "1thbJDkDYhhM7ZI3LY8d9dZ4TWSbYMT0b", 22.4, {}),
    ("ResNet50-ADN-v2", "ResNet50_ADN", "15g7GNB9VkTARW-yqyiHOyglfeOaGf15p", 19.5, {"resize": 232}),
    ("MobileNetV2-ADN", "MobileNetV2_ADN", "1bft5SECYXOFjEhPSkAp2Z9d1U-7w2Mnz", 27.5, {}),
):
    publish(
        name=name,
        model=model,
        dataset="ilsvrc",
        url=f"drive:{drive_id}",
        flags=flags,
        file=f"{name}.pth",
        top1_error=error,
        note=NOTE,
    )
