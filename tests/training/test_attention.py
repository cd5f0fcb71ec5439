"""Attention taken apart: the same gradient, where it is the faster form to train."""

from __future__ import annotations

import pytest
import torch
from trainings import fit

from ares_lightning.models import make_classifier
from ares_lightning.training.attention import split_attention


def test_attention_taken_apart_has_the_same_gradient():
    facts = {"in_chans": 3, "num_classes": 10, "img_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    net = make_classifier("vit_tiny_patch16_224", **facts, depth=2, embed_dim=32, num_heads=2).double()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    (fused,) = torch.autograd.grad(net(images).square().sum(), images)
    split_attention(net)
    assert not any(block.attn.fused_attn for block in net.backbone.blocks)
    (split,) = torch.autograd.grad(net(images).square().sum(), images)
    torch.testing.assert_close(split, fused)


@pytest.mark.parametrize(("precision", "is_fused"), [("bf16-mixed", False), ("32-true", True)])
def test_attention_is_taken_apart_for_bf16_on_the_cpu_alone(precision, is_fused, tmp_path):
    settings = ["model=vit_ti", "adv=fgsm", f"trainer.precision={precision}", "trainer.limit_train_batches=1"]
    net = fit(tmp_path, *settings).module.net
    assert all(block.attn.fused_attn is is_fused for block in net.backbone.blocks)
