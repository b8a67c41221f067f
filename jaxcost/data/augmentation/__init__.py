"""Changed copies of what is learned from: each a Grain transform with a strength, drawn from a key of its own."""

from jaxcost.data.augmentation.config import DIRECTIONS, HEDGES, NEGATIONS, AugmentConfig, AugmentImagesConfig

__all__ = ["DIRECTIONS", "HEDGES", "NEGATIONS", "AugmentConfig", "AugmentImagesConfig"]
