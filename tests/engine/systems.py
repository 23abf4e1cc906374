"""A small network of every system and its objective."""

from models import create_model, create_objective
from models.dmnn.objective import PathLoss
from models.dmnn.resnet import multi_path_resnet as dmnn
from models.embedded.builders import adaptive_depth_cifar
from models.embedded.objective import SubPathLoss
from models.shared_basis.builders import double_shared
from models.shared_basis.objective import BasisLoss

WRN = {"depth": 10, "widen_factor": 1, "resolution_list": (32, 24)}
MSDNET = {"nBlocks": 2, "base": 1, "step": 1, "stepmode": "even", "nChannels": 8}


SYSTEMS = {
    "shared-basis": lambda: (double_shared(10, blocks=2, shared_rank=4), BasisLoss()),
    "embedded": lambda: (adaptive_depth_cifar(10, blocks=2), SubPathLoss()),
    "msdnet": lambda: (create_model("msdnet_ge", **MSDNET), create_objective("msdnet_ge")),
    "slimmable": lambda: (create_model("mutualnet_wrn28_10", **WRN), create_objective("mutualnet_wrn28_10")),
    "dmnn": lambda: (dmnn(10, (1, 1), 2, True, False, small=True, grouping=None), PathLoss()),
}
