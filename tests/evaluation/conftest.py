"""A network that the tests of evaluation share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shared_run import make_data, make_net
from torch import nn
from torch.nn.functional import cross_entropy


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A network that has seen the digits for a moment, so that some are right and some break."""
    torch.manual_seed(0)
    net, data = make_net(), make_data()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(6):
        for images, labels, _ids in data.train_dataloader():
            optimizer.zero_grad()
            pixels = images / 255
            cross_entropy(net(pixels + 0.1 * torch.randn_like(pixels).sign()), labels).backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("net") / "weights.pt"
    torch.save(net.eval().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def trained_net(weights) -> nn.Module:
    """That network."""
    net = make_net()
    net.load_state_dict(torch.load(weights))
    return net.eval()
