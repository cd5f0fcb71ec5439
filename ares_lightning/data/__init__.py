"""Images and labels: real data sets as uint8 batches whose sample ids never change."""

from ares_lightning.data.corruptions import Corruption, corrupt
from ares_lightning.data.datasets import ImageSet, ImageSets
from ares_lightning.data.images import ImageError, Preprocessing, ares_preprocessing
from ares_lightning.data.loading import Batch, ImageLoader, ShardedSampler, collate
from ares_lightning.data.mixing import BatchAugmentation
from ares_lightning.data.module import RobustDataModule
from ares_lightning.data.own import DatasetSource, OwnSets
from ares_lightning.data.published import Wishes, load_image_sets, load_variant
from ares_lightning.data.subsets import asks_for_more, select_subset, subset_hash
from ares_lightning.data.variants import VARIANTS

__all__ = [
    "VARIANTS",
    "Batch",
    "BatchAugmentation",
    "Corruption",
    "DatasetSource",
    "ImageError",
    "ImageLoader",
    "ImageSet",
    "ImageSets",
    "OwnSets",
    "Preprocessing",
    "RobustDataModule",
    "ShardedSampler",
    "Wishes",
    "ares_preprocessing",
    "asks_for_more",
    "collate",
    "corrupt",
    "load_image_sets",
    "load_variant",
    "select_subset",
    "subset_hash",
]
