"""Gated networks: DMNN (arXiv 1902.10949), whose blocks have several paths, and ConvNet-AIG (arXiv 1711.11503).

Small gates look at the input of each block and decide for each image which parts of the block run. The networks can run
as the gates decide (the point `gated`) or with everything open (`all`).
"""

from models.dmnn import builders

__all__ = ["builders"]
