"""Checkpoints that the authors released.

The six for CIFAR-10 are also in the public history of their repository, at a fixed commit, with known hashes. The
others are on Google Drive; their hashes are not known.
"""

from models.published import publish

HISTORY = "https://raw.githubusercontent.com/ssregibility/Net_RL2/f044af38186dd6aceb4906d510d6342b6771b90c/pretrained/"
# name, form of the network, shared rank, file, bytes, sha256, top-1 error
# fmt: off
CIFAR10 = (
    ("ResNet32-S8U1", "SingleShared", 8, "CIFAR10_ResNet32_S8U1_8.08err.pth", 1304202,
     "185a6171e02568d493efcff7b3b66e1c373a16272ac5ec06eb2eced6e5fc94e1", 8.08),
    ("ResNet32-S16U1", "SingleShared", 16, "CIFAR10_ResNet32_S16U1_7.43err.pth", 1680358,
     "b2655776ab427765ef6751c7ad455cf607ef59b0c6a307ecede2fea8e7f66df1", 7.43),
    ("ResNet32-S16U1*", "DoubleShared", 16, "CIFAR10_ResNet32_Double_S16U1_6.93err.pth", 2070667,
     "2b31e2705d2589103740def51f4692aa9cd92545c15cd8d51b3e0ed09695dbee", 6.93),
    ("ResNet56-S8U1", "SingleShared", 8, "CIFAR10_ResNet56_S8U1_7.52err.pth.pth", 1799211,
     "ef056837ba6e6f7009eb254d32f29afd88dd0b83ec427f99513a4cf511c09d8f", 7.52),
    ("ResNet56-S16U1", "SingleShared", 16, "CIFAR10_ResNet56_S16U1_7.46err.pth.pth", 2358073,
     "0b42e649f1a52de78e04f20eea89f6faa55affcd3686d79399c349265d894f1e", 7.46),
    ("ResNet56-S16U1*", "DoubleShared", 16, "CIFAR10_ResNet56_Double_S16U1_6.30err.pth", 2751687,
     "889c13b2fad03351233c11b77dc417cf2ccd6d3533ffc1eb25202b27e6f7c38d", 6.30),
)
SWAPPED = "the authors' table prints the ranks of another row; these are the network's"
OLDER = "link of a README of 2020"
# dataset, name, model, ranks, id of the file, top-1 error, note
DRIVE = (
    ("cifar100", "ResNet34-S8U1", "ResNet34_SingleShared", (8, 1), "1x98ur2Z6HHAaUWKeYPlqrN1VFbySXKqd", 23.11, ""),
    ("cifar100", "ResNet34-S16U1", "ResNet34_SingleShared", (16, 1), "18ROzpBVNoIcmqMrwOQ8C9-32XuKghaFD", 22.64, ""),
    ("cifar100", "ResNet34-S32U1", "ResNet34_SingleShared", (32, 1), "1DsYNhRBeqAkDGRZGa7oRXHjC0NU9M_f_", 21.79, ""),
    ("cifar100", "DenseNet121-S16U1", "DenseNet121_SingleShared", (16, 1), "1FeLPbEAkkrT2bZTvnCrNOU3dkJxrp3-D", 22.15,
     SWAPPED),
    ("cifar100", "ResNeXt50-S64U4", "ResNext50_SingleShared", (64, 4), "1e7UlAOFqN0sMwA4jy6tvAzZsvKYpXA6e", 20.09,
     SWAPPED),
    ("cifar100", "MobileNetV2-Shared", "MobileNetV2_Shared", (), "1JjPHAYbEvIjg869ZysPeGI2IAwOoTe58", 27.70, ""),
    ("cifar100", "MobileNetV2-SharedDouble", "MobileNetV2_SharedDouble", (), "1V1cPxGyCGO0Fx-W2r9Wpfy81ByKypFuI", 27.54,
     "the authors' newest README gives this link for the ILSVRC network"),
    ("ilsvrc", "ResNet34-S32U1", "ResNet34_SingleShared", (32, 1), "1mGZ5-m4x69MjEC-ldraoOBPHtp-TPVRX", 27.83, OLDER),
    ("ilsvrc", "ResNet34-S48U1", "ResNet34_SingleShared", (48, 1), "1NHBvlYrTJzuJuKJjIdtlt5krDiXkue2r", 27.88, OLDER),
    ("ilsvrc", "ResNet34-S32U1*", "ResNet34_DoubleShared", (32, 1), "1LG-dSNjg_VrfimhoDyICU5OGir0tYdyz", 27.20, OLDER),
    ("ilsvrc", "ResNet34-S48U1*", "ResNet34_DoubleShared", (48, 1), "12pN0JobnfgKKFX0MFNmFJ22BHTojpwIM", 26.67, ""),
    ("ilsvrc", "ResNet50-Shared", "ResNet50_SharedSingle", (), "1Eg84Kp6A3jMeCZKOhAFhODa70tYmL-Ym", 23.64, ""),
    ("ilsvrc", "ResNet50-Shared++", "ResNet50_Shared", (), "16XIdAqjqkePCw-Ppf3z2yPUbKNFhXbGl", 23.95,
     "an older README gave this link for ResNet50-Shared"),
    ("ilsvrc", "ResNet101-Shared", "ResNet101_SharedSingle", (), "1iqLO06CwUQtuyJJ3wTumlZ5v7aTZrssQ", 22.31, ""),
    ("ilsvrc", "MobileNetV2-Shared", "MobileNetV2_Shared", (), "1EWYOVj0URjc7j93ciYaRONorlPU2v4DX", 27.61, ""),
    ("ilsvrc", "MobileNetV2-Shared++", "MobileNetV2_SharedDouble", (), "15AF7I8RGRuTHAzZuKpo7cakIpaOU49cw", 28.21,
     "the authors' newest README gives another link, which in 2020 was the CIFAR-100 file; add --eca if told to"),
)
# fmt: on

for name, form, rank, file, size, sha256, error in CIFAR10:
    publish(
        name=name,
        model=f"{name.partition('-')[0]}_{form}",
        dataset="cifar10",
        flags={"shared_rank": rank, "unique_rank": 1},
        url=HISTORY + file,
        file=file,
        size=size,
        sha256=sha256,
        top1_error=error,
        note="best epoch on the test set; images normalised with ImageNet's mean and standard deviation",
    )
for dataset, name, model, ranks, drive_id, error, note in DRIVE:
    publish(
        name=name,
        model=model,
        dataset=dataset,
        flags=dict(zip(("shared_rank", "unique_rank"), ranks, strict=False)),
        url=f"drive:{drive_id}",
        file=f"{dataset}-{name.replace('*', '-Double')}.pth",
        top1_error=error,
        note=note,
    )
