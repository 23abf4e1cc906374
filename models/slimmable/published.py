"""Weights released by the authors of slimmable networks, US-Net (github.com/JiahuiYu/slimmable_networks) and MutualNet
(github.com/taoyang1122/MutualNet), as listed in their READMEs.

Their sha256 are not known. The files of the first two are zip archives of one .pt.
"""

from models.published import publish

LICENSE = "CC BY-NC 4.0"
GITHUB = "https://github.com/JiahuiYu/slimmable_networks/files/"
MUTUALNET = "its batch-norm statistics are of one point only: points get calibrated"
# name, model, flags, address, top-1 error of the widest network, note
# fmt: off
RELEASED = (
    ("S-MobileNetV1", "s_mobilenet_v1", {}, f"{GITHUB}2709079/s_mobilenet_v1_0.25_0.5_0.75_1.0.pt.zip", 28.5, LICENSE),
    ("S-MobileNetV2", "s_mobilenet_v2", {}, f"{GITHUB}2709080/s_mobilenet_v2_0.35_0.5_0.75_1.0.pt.zip", 29.5, LICENSE),
    ("S-ShuffleNet", "s_shufflenet", {}, f"{GITHUB}2709082/s_shufflenet_0.5_1.0_2.0.pt.zip", 28.6, LICENSE),
    ("S-ResNet50", "s_resnet50", {}, "drive:1f6q37OkZaz_0GoOAwllHlXNWuKwor2fC", 24.0, LICENSE),
    ("US-MobileNetV1", "us_mobilenet_v1", {}, f"{GITHUB}2979952/us_mobilenet_v1_calibrated.pt.zip", 28.2, LICENSE),
    ("US-MobileNetV2", "us_mobilenet_v2", {}, f"{GITHUB}2979953/us_mobilenet_v2_calibrated.pt.zip", 28.5, LICENSE),
    ("MutualNet-MobileNetV1", "mutualnet_mobilenet_v1", {}, "drive:1A36ZJCrkKXQX8T0vZR9kRN5P1fjIDMu2", 27.6, MUTUALNET),
    ("MutualNet-MobileNetV2", "mutualnet_mobilenet_v2", {}, "drive:1GIe5Mpbkc2CptvPbqcEgJtPSoP2WYkNm", 27.1, MUTUALNET),
    ("MutualNet-MobileNetV1-w1.6", "mutualnet_mobilenet_v1",
     {"width_mult_range": (0.25, 1.6), "width_mult_list": (0.25, 1.6), "resolution_list": (288,), "crop": 288,
      "resize": 329},
     "drive:1NdygihO3AxEp7f9XyhofoYz_64ki_Sma", 22.9,
     f"for width 1.6 at 1.3 times the resolution; the range of its training is not known; {MUTUALNET}"),
    ("MutualNet-ResNet50", "mutualnet_resnet50", {}, "drive:1Br3o58lZqyGzZaqZpqhAfUJhMawFS_Pc", 21.4, MUTUALNET),
)
# fmt: on

for name, model, flags, url, error, note in RELEASED:
    publish(
        name=name,
        model=model,
        dataset="ilsvrc",
        flags=flags,
        url=url,
        file=f"{name}.pt",
        top1_error=error,
        note=note,
    )
