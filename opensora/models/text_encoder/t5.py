"""T5's encoder (Raffel et al. 2020, arXiv:1910.10683): prompts in, one feature per token out.

Of version 1.0 (ReLU) and 1.1 (gated GELU, Shazeer 2020, arXiv:2002.05202). Parameters have the names of the published
checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from opensora.models.layers.attention import RMSNorm
from opensora.models.text_encoder.tokens import Tokenizer

# What a full T5 checkpoint holds beside the encoder: patterns of names to leave out when loading.
T5_DROPPED = ("decoder.*", "lm_head.weight", "dec.*", "output.weight")
# Names in llama.cpp's GGUF files, and ours.
T5_RENAMED = (
    ("token_embd.weight", "shared.weight"),
    ("enc.output_norm.weight", "encoder.final_layer_norm.weight"),
    ("enc.blk.*.attn_rel_b.weight", "encoder.block.*.layer.0.SelfAttention.relative_attention_bias.weight"),
    ("enc.blk.*.attn_norm.weight", "encoder.block.*.layer.0.layer_norm.weight"),
    *((f"enc.blk.*.attn_{name}.weight", f"encoder.block.*.layer.0.SelfAttention.{name}.weight") for name in "qkvo"),
    ("enc.blk.*.ffn_norm.weight", "encoder.block.*.layer.1.layer_norm.weight"),
    ("enc.blk.*.ffn_gate.weight", "encoder.block.*.layer.1.DenseReluDense.wi_0.weight"),
    ("enc.blk.*.ffn_up.weight", "encoder.block.*.layer.1.DenseReluDense.wi_1.weight"),
    ("enc.blk.*.ffn_up.weight", "encoder.block.*.layer.1.DenseReluDense.wi.weight"),
    ("enc.blk.*.ffn_down.weight", "encoder.block.*.layer.1.DenseReluDense.wo.weight"),
)
TOGETHER = 16  # prompts in one pass: XXL's attention bias takes up to 12 MB for each


class T5Config(NamedTuple):
    """The keys of a T5 config.json that describe the encoder."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float
    feed_forward_proj: str


class T5EncoderModel(nn.Module):
    """T5's encoder: batches of token ids [B, L] and masks [B, L] (0 padding) -> features [B, L, d_model] of each.

    Every block computes all batches before the next block starts, so that weights that are not on the device, or are
    sharded, are fetched once.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = _embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config, self.shared)

    def forward(self, batches: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        return self.encoder(batches)


class T5Stack(nn.Module):
    """Blocks between the embedding of the tokens and a last norm."""

    def __init__(self, config: T5Config, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.block = nn.ModuleList(T5Block(config, first=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, batches: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        states = [State(self.embed_tokens(ids), mask) for ids, mask in batches]
        for block in self.block:
            states = block(states)
        return [self.final_layer_norm(state.x) for state in states]


class State(NamedTuple):
    """A batch between two blocks: x [B, L, C], mask [B, L], bias of attention [B or 1, heads, L, L]."""

    x: Tensor
    mask: Tensor | None
    bias: Tensor | None = None


class T5Block(nn.Module):
    """Self-attention and a feed-forward layer. The first block makes the attention bias that all of them use."""

    def __init__(self, config: T5Config, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList((SelfAttentionLayer(config, first), FeedForwardLayer(config)))

    def forward(self, states: list[State]) -> list[State]:
        attention, feed_forward = self.layer
        attended = [attention(state) for state in states]
        return [state._replace(x=feed_forward(state.x)) for state in attended]


class SelfAttentionLayer(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, config: T5Config, first: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(config, has_bias=first)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, state: State) -> State:
        x, mask, bias = state
        bias = self.SelfAttention.bias(x.shape[1], mask) if bias is None else bias
        return State(x + self.SelfAttention(self.layer_norm(x), bias), mask, bias)


class FeedForwardLayer(nn.Module):
    """x + feed_forward(norm(x))."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = FEED_FORWARD[config.feed_forward_proj](config)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5LayerNorm(RMSNorm):
    """An RMS norm whose result has the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).to(self.weight.dtype) * self.weight


class T5Attention(nn.Module):
    """Self-attention without scaling; positions enter as a learned bias for each head and distance."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.num_heads, inner = config.num_heads, config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        if has_bias:
            self.relative_attention_bias = _embedding(self.num_buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2))

    def bias(self, length: int, mask: Tensor | None) -> Tensor:
        """The bias [B or 1, heads, L, L] of every query and key; padded keys get -inf."""
        positions = torch.arange(length, device=self.relative_attention_bias.weight.device)
        buckets = self.buckets(positions - positions[:, None])
        bias = self.relative_attention_bias(buckets).movedim(-1, 0)[None]
        return bias if mask is None else bias.masked_fill(mask[:, None, None] == 0, -math.inf)

    def buckets(self, distance: Tensor) -> Tensor:
        """The bucket of each distance from a query to a key.

        Half of the buckets are for keys after the query. In either half the first half holds one distance each, the
        others grow in proportion to the distance, and the last one holds everything from `max_distance` on.
        """
        side = self.num_buckets // 2
        exact, far = side // 2, distance.abs()
        growth = torch.log(far.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        wide = (exact + (growth * (side - exact)).long()).clamp(max=side - 1)
        return torch.where(far < exact, far, wide) + side * (distance > 0)


def _embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding without initial values: on the meta device `normal_` would import `torch._dynamo`, for seconds."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class OutputLinear(nn.Linear):
    """A linear layer whose input is cast to the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class ReluFeedForward(nn.Module):
    """The feed-forward layer of T5 1.0."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = OutputLinear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.relu(self.wi(x)))


class GatedGeluFeedForward(nn.Module):
    """The feed-forward layer of T5 1.1."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.wo = OutputLinear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


FEED_FORWARD: dict[str, Callable[[T5Config], nn.Module]] = {  # by a config.json's `feed_forward_proj`
    "relu": ReluFeedForward,
    "gated-gelu": GatedGeluFeedForward,
}


class T5Encoder:
    """A T5 encoder and its tokenizer; `output_dim` is the size of a token's feature."""

    def __init__(self, model: T5EncoderModel, tokenizer: Tokenizer, model_max_length: int = 300) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.model_max_length = model_max_length
        self.output_dim = model.config.d_model

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Features [B, 1, L, C] float32 and mask [B, L] int64 (1 a real token, 0 padding) of B cleaned prompts.

        L is the length of the longest prompt in the list: padding takes part in nothing, so a prompt's features do
        not depend on its neighbours. Features of padding are zero. A prompt of more than `model_max_length` tokens is
        cut there, with a warning.
        """
        rows, device = self._rows(texts), next(self.model.parameters()).device
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_id).to(device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        features = self.model([(ids, mask)])[0].float()  # [B, L, C]
        return (features * mask[..., None])[:, None], mask

    @torch.no_grad()
    def encode_each(self, texts: list[str]) -> list[Tensor]:
        """Features [1, 1, L, C] float32 of each prompt at its own length: to the bit those of `encode([prompt])`.

        The weights travel once for `TOGETHER` prompts where they are offloaded or sharded.
        """
        device = next(self.model.parameters()).device
        batches = [(row[None].to(device), torch.ones_like(row)[None].to(device)) for row in self._rows(texts)]
        found = []
        for start in range(0, len(batches), TOGETHER):
            found += [x.float()[:, None] for x in self.model(batches[start : start + TOGETHER])]
        return found

    def _rows(self, texts: list[str]) -> list[Tensor]:
        return [torch.tensor(self.tokenizer.ids(text, self.model_max_length)) for text in texts]


def make_t5(
    config: T5Config, tokenizer: Tokenizer, model_max_length: int = 300, dtype: torch.dtype = torch.float32
) -> T5Encoder:
    """A T5Encoder whose `model` lies on the meta device: no memory is taken until weights are loaded.

    `shared.weight` and `encoder.embed_tokens.weight` are one tensor; a checkpoint may hold either or both.
    """
    with torch.device("meta"):
        model = T5EncoderModel(config).to(dtype)
    if dtype == torch.float16:
        for module in model.modules():
            if isinstance(module, OutputLinear):  # overflows in float16
                module.float()
    return T5Encoder(model, tokenizer, model_max_length)
