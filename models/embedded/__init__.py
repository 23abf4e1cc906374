"""Several networks of different cost in one set of weights, chosen by an argument of `forward`.

There are two kinds: `*_skip` (Net_RL2_dynamic, 2020) holds a full and a low-cost network; `*_ADN` (Adaptive Depth
Networks with Skippable Sub-Paths, arXiv 2312.16392) holds one for every pattern of skipped stages. Those with shared
filter bases extend `models.shared_basis`.
"""

from models.embedded import builders, published

__all__ = ["builders", "published"]
