"""The network of train_char_gpt.py: a small GPT over characters (Radford et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class CausalSelfAttention(nn.Module):
    """Each position looks at itself and at those before it (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, t, width] -> the same."""
        split = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.projection(y.transpose(1, 2).flatten(-2))
        return output


class Block(nn.Module):
    """Attention, then two layers for each position, both around a shortcut and behind a normalization."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[n, t, width] -> the same."""
        x = x + self.attention(self.norm1(x))
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


class CharGPT(nn.Module):
    """Scores for the next character at every position, from the characters up to there.

    Args:
        characters: size of the alphabet.
        context: the most characters it looks at.
        width: of the embedding; a multiple of heads.
        heads: of each attention.
        layers: blocks.
    """

    def __init__(self, characters: int, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.context = context
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, characters, bias=False)
        # Small embeddings, so that the shortcuts do not drown what the blocks add.
        nn.init.normal_(self.characters.weight, std=0.1)
        nn.init.normal_(self.positions.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [n, t] -> scores, fp32 [n, t, characters]; t is at most `context`."""
        x = self.characters(tokens) + self.positions.weight[: tokens.shape[1]]
        scores: Tensor = self.scores(self.norm(self.blocks(x)))
        return scores

    @torch.no_grad()
    def sample(self, tokens: Tensor, length: int, temperature: float, generator: torch.Generator) -> Tensor:
        """`length` characters that follow tokens [t], drawn one by one: int64 [t + length]."""
        for _ in range(length):
            scores = self(tokens[None, -self.context :])[0, -1] / temperature
            drawn = torch.multinomial(scores.softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, drawn])
        return tokens
