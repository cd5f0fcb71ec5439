"""Tokens-to-token ViT: overlapping patches of patches, each mixed by attention, in place of one hard split."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
"""Size, stride and padding of the three soft splits."""
TOKEN_DIM = 64


class T2TViT(nn.Module):
    """T2T-ViT with transformer layers in the token module (T2T-ViT_t), [N, C, H, W] to logits [N, num_classes].

    embed_dim, depth, num_heads: of the backbone; T2T-ViT_t-14, -19 and -24 have 384/14/6, 448/19/7 and 512/24/8.
    Position embeddings are sinusoids and fixed. Names of parameters follow the published files.

    Raises ValueError where `img_size` is no multiple of 16.

    Yuan et al. 2021, arXiv 2101.11986, section 3.1, figures 2 and 3, table 1.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int = 224,
    ) -> None:
        super().__init__()
        if img_size % 16:
            raise ValueError(f"img_size={img_size}: a T2T-ViT takes multiples of 16")
        self.num_features, self.num_classes = embed_dim, num_classes
        self.tokens_to_token = _TokensToToken(in_chans, embed_dim)
        num_tokens = (img_size // 16) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sinusoids(num_tokens, embed_dim)[None], requires_grad=False)
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, mlp_ratio=3.0, norm_layer=nn.LayerNorm) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to logits."""
        tokens = self.tokens_to_token(images)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


class _TokensToToken(nn.Module):
    """Three soft splits with a layer of attention between two of them, and a projection."""

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        first, second, third = (size**2 for size, _, _ in SPLITS)
        self.attention1 = _TokenTransformer(in_chans * first)
        self.attention2 = _TokenTransformer(TOKEN_DIM * second)
        self.project = nn.Linear(TOKEN_DIM * third, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        for split, layer in zip(SPLITS, (self.attention1, self.attention2, self.project), strict=True):
            size, stride, padding = split
            height, width = ((side + 2 * padding - size) // stride + 1 for side in images.shape[2:])
            tokens: Tensor = layer(F.unfold(images, size, stride=stride, padding=padding).transpose(1, 2))
            images = tokens.transpose(1, 2).reshape(len(images), -1, height, width)
        return tokens


class _TokenTransformer(nn.Module):
    """A transformer layer of one head that narrows tokens to 64 values; the values take the place of the skip."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _TokenAttention(dim)
        self.norm2 = nn.LayerNorm(TOKEN_DIM)
        self.mlp = Mlp(TOKEN_DIM, TOKEN_DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.attn(self.norm1(tokens))
        mixed: Tensor = tokens + self.mlp(self.norm2(tokens))
        return mixed


class _TokenAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.qkv = nn.Linear(dim, 3 * TOKEN_DIM, bias=False)
        self.proj = nn.Linear(TOKEN_DIM, TOKEN_DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).chunk(3, dim=2)
        mixed: Tensor = value + self.proj(F.scaled_dot_product_attention(query, key, value, scale=self.scale))
        return mixed


def sinusoids(num_positions: int, dim: int) -> Tensor:
    """Return sines and cosines of positions, in turn along the channels, [num_positions, dim].

    Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """
    channel = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
