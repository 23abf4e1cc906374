"""Weights that the authors of MSDNet released (github.com/kalviny/MSDNet-PyTorch, README).

They are in a Dropbox folder that only a browser can open, and their sha256 are not known. Put the folder's `index.pth`
beside them: it says which training images were held out, and budgets need those.
"""

from models.published import publish

FOLDER = "hand:https://www.dropbox.com/sh/7p758wfcq4wm6lf/AACU4hFtV1_4UQavexrsSs1Ba"
NOTE = "50,000 training images were held out; for budgets put the folder's index.pth beside it"

for step, error in ((4, None), (6, None), (7, 25.408)):
    publish(
        name=f"MSDNet-step{step}",
        model="msdnet",
        dataset="ilsvrc",
        flags={
            "nBlocks": 5,
            "base": step,
            "step": step,
            "stepmode": "even",
            "growthRate": 16,
            "grFactor": (1, 2, 4, 4),
            "bnFactor": (1, 2, 4, 4),
        },
        url=FOLDER,
        file=f"msdnet/msdnet-step={step}-block=5.pth.tar",
        top1_error=error,
        note=NOTE,
    )
