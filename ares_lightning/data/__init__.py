"""Images and labels: real data sets as uint8 batches whose sample ids never change."""

from ares_lightning.data.datasets import ImageError, ImageSet, ImageSets, load_image_sets
from ares_lightning.data.loading import Batch, ShardedSampler, collate, select_subset
from ares_lightning.data.module import RobustDataModule

__all__ = [
    "Batch",
    "ImageError",
    "ImageSet",
    "ImageSets",
    "RobustDataModule",
    "ShardedSampler",
    "collate",
    "load_image_sets",
    "select_subset",
]
