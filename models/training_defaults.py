"""Training flags that several families register as the defaults of their networks.

The first are from the scripts of the authors of shared filter bases (arXiv 2006.05066), who also used them for plain
baselines and, later, for embedded networks; the last are those of DMNN and its baselines (arXiv 1902.10949). `mean` and
`std` normalise the images.
"""

CIFAR_TRAINING = {
    "epochs": 300,
    "lr": 0.1,
    "lr_schedule": "multistep",
    "lr_steps": "150:0.1,225:0.01",
    "batch_size": 256,
    "weight_decay": 5e-4,
    "momentum": 0.9,
}
CIFAR10_TRAINING = {**CIFAR_TRAINING, "mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225"}
CIFAR100_TRAINING = {**CIFAR_TRAINING, "mean": "0.507,0.487,0.441", "std": "0.267,0.256,0.276"}
ILSVRC_TRAINING = {
    "epochs": 150,
    "lr": 0.1,
    "lr_schedule": "multistep",
    "lr_steps": "60:0.1,100:0.01,140:0.001",
    "batch_size": 256,
    "weight_decay": 1e-4,
    "momentum": 0.9,
}
ILSVRC_MOBILENET_TRAINING = {
    **ILSVRC_TRAINING,
    "epochs": 300,
    "lr_steps": "150:0.1,225:0.01,285:0.005",
    "weight_decay": 1e-5,
}
DMNN_CIFAR_TRAINING = {
    "epochs": 200,
    "lr": 0.1,
    "lr_schedule": "multistep",
    "lr_steps": "100:0.1,150:0.01",
    "batch_size": 256,
    "weight_decay": 1e-4,
    "momentum": 0.9,
}
DMNN_ILSVRC_TRAINING = {
    "epochs": 120,
    "lr": 0.1,
    "lr_schedule": "cosine",
    "batch_size": 256,
    "weight_decay": 1e-4,
    "momentum": 0.9,
    "nesterov": True,
}
