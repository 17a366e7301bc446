"""Transformer decoder of Mask2Former (CVPR 2022): queries that attend only where their own mask is.

Layer i reads level i mod 3 (strides 32, 16, 8). Before each layer the queries predict their masks; cross-attention is
confined to the predicted foreground, and to everything where that is empty. Each of the N + 1 predictions is trained.

A mask is ⟨embedding of the query, mask features of the pixel⟩. Resizing is linear, so attention masks at a level's size
come from mask features that were resized once, not from resized masks; masks at full size are left to the caller.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.models.layers import layer_dtype
from common.models.mask2former.pixel_decoder import PixelFeatures, sine_position
from common.ops.resize import resize


class Attention(nn.Module):
    """Multi-head attention with packed projections, named as in torch's own."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """query (B, Q, d), key and value (B, N, d); mask (B, 1, Q, N) is true where a query may look → (B, Q, d)."""
        dtype = layer_dtype(self.in_proj_weight)
        weights = self.in_proj_weight.to(dtype).chunk(3)
        biases = self.in_proj_bias.to(dtype).chunk(3)

        projected = [
            rearrange(F.linear(x, weight, bias), "b n (h d) -> b h n d", h=self.heads)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]
        attended = F.scaled_dot_product_attention(*projected, attn_mask=mask)
        return self.out_proj(rearrange(attended, "b h n d -> b n (h d)"))


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention and a two-layer perceptron, each added and then normalised."""

    def __init__(self, dim: int, hidden: int, heads: int):
        super().__init__()
        self.cross_attn = Attention(dim, heads)
        self.cross_norm = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, heads)
        self.self_norm = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self, x: Tensor, position: Tensor, tokens: Tensor, token_position: Tensor, mask: Tensor
    ) -> Tensor:
        """Queries x (B, Q, d) with `position` (Q, d) read tokens (B, N, d) with `token_position` (N, d)."""
        x = self.cross_norm(
            x + self.cross_attn(x + position, tokens + token_position, tokens, mask)
        )
        placed = x + position
        x = self.self_norm(x + self.self_attn(placed, placed, x))
        return self.ffn_norm(x + self.linear2(F.relu(self.linear1(x))))


class MLP(nn.Module):
    """Linear layers with ReLU between them, all of one width."""

    def __init__(self, dim: int, layers: int = 3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Predictions(NamedTuple):
    """Of the initial queries and after every layer, first to last; in evaluation the last alone."""

    logits: list[Tensor]  # (B, Q, outputs)
    embeddings: list[Tensor]  # (B, Q, d); mask = embedding · mask features


class MaskedDecoder(nn.Module):
    """PixelFeatures → Predictions.

    Args:
        outputs: class logits per query.
        queries: number Q of queries.
        dim: width d; layers, hidden, heads: of the transformer.
        levels: number of feature levels.
    """

    def __init__(
        self, outputs: int, queries=100, dim=256, *, layers=9, hidden=2048, heads=8, levels=3
    ):
        super().__init__()
        self.query_feat = nn.Embedding(queries, dim)
        self.query_embed = nn.Embedding(queries, dim)  # the queries' positions
        self.level_embed = nn.Embedding(levels, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.class_embed = nn.Linear(dim, outputs)
        self.mask_embed = MLP(dim)

    def forward(self, pixels: PixelFeatures) -> Predictions:
        tokens = [
            level + embed
            for level, embed in zip(pixels.levels, self.level_embed.weight, strict=True)
        ]
        dim = tokens[0].shape[2]
        device = tokens[0].device
        positions = [sine_position(*shape, dim, device) for shape in pixels.shapes]
        resized = self._resized(pixels)
        x = self.query_feat.weight.expand(len(tokens[0]), -1, -1)
        normed = [self.norm(x)]
        embeddings = [self.mask_embed(normed[-1])]

        for i, layer in enumerate(self.layers):
            level = i % len(tokens)
            mask = attention_mask(embeddings[-1], resized[level])
            x = layer(x, self.query_embed.weight, tokens[level], positions[level], mask)
            normed.append(self.norm(x))
            embeddings.append(self.mask_embed(normed[-1]))

        if not self.training:
            normed = normed[-1:]
            embeddings = embeddings[-1:]

        return Predictions([self.class_embed(y) for y in normed], embeddings)

    @staticmethod
    @torch.no_grad()
    def _resized(pixels: PixelFeatures) -> list[Tensor]:
        return [resize(pixels.mask_features, shape).flatten(2) for shape in pixels.shapes]


@torch.no_grad()
def attention_mask(embedding: Tensor, features: Tensor) -> Tensor:
    """(B, 1, Q, N), true where a query may look: its mask's foreground (logit ≥ 0), or everywhere if that is empty.

    embedding (B, Q, d), features (B, d, N): mask features at the size of the level that is read.
    """
    foreground = embedding @ features >= 0
    return (foreground | ~foreground.any(2, keepdim=True)).unsqueeze(1)


def masks(embedding: Tensor, mask_features: Tensor) -> Tensor:
    """Mask logits (B, Q, h, w) of embeddings (B, Q, d) on mask features (B, d, h, w)."""
    logits = embedding.to(mask_features.dtype) @ mask_features.flatten(2)
    return logits.unflatten(2, mask_features.shape[-2:])
