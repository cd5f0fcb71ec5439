"""Images that the tests share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)


@pytest.fixture
def images() -> Tensor:
    """Twelve float64 images [3, 6, 5], not square, reaching both ends of the box."""
    images = torch.rand(12, 3, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images[0], images[1] = 0, 1
    return images
