"""Images from an .npz file in the layout of MedMNIST: arrays <split>_images, uint8, and <split>_labels.

python -m examples.dataset digits.npz      # writes such a file, of scikit-learn's digits
python train.py --config-dir examples/conf data=npz data.root=digits.npz
"""

import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset


class NpzImages(Dataset[tuple[Image.Image, int]]):
    """One split of the file `root`."""

    def __init__(self, root: str, split: str) -> None:
        with np.load(root) as file:
            self.images = file[f"{split}_images"]
            self.targets = file[f"{split}_labels"].reshape(-1).astype(int)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])


if __name__ == "__main__":
    digits = load_digits()
    images, labels = np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target
    arrays = {"train_images": images[:-360], "train_labels": labels[:-360]}
    np.savez_compressed(sys.argv[1], **arrays, test_images=images[-360:], test_labels=labels[-360:])
