"""DiT (Peebles & Xie 2022, arXiv:2212.09748) over images and short videos, conditioned on a class or a pooled text."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from opensora.models.layers.arguments import arguments_of
from opensora.models.layers.attention import SelfAttention
from opensora.models.layers.blocks import Axis, Block, modulated, rows_of
from opensora.models.layers.embeddings import CaptionEmbedder, LabelEmbedder, Size3
from opensora.models.layers.fixed_positions import FixedPositions
from opensora.models.layers.linear import Linear


class Adaptive(nn.Sequential):
    """SiLU and a linear layer from the condition c [B, C] to n modulation rows [B, 1, 1, C], which start at zero."""

    def __init__(self, dim: int, num_rows: int) -> None:
        super().__init__(nn.SiLU(), Linear(dim, num_rows * dim))
        self.num_rows = num_rows

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return rows_of(super().forward(c).unflatten(-1, (self.num_rows, -1))[:, None])


class DiTBlock(Block):
    """A block with its own modulation (adaLN-Zero)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, axis: Axis) -> None:
        super().__init__(dim, SelfAttention(dim, num_heads), mlp_ratio, axis)
        self.adaLN_modulation = Adaptive(dim, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        rows = self.adaLN_modulation(c)
        return self.feed_forward(self.self_attend(x, rows), rows)


class DiTFinalLayer(nn.Module):
    """Norm, modulation by the condition c [B, C], and the projection to patches."""

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.linear = Linear(dim, out_features)
        self.adaLN_modulation = Adaptive(dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulated(x, *self.adaLN_modulation(c)))


class DiT(FixedPositions):
    """Predicts noise and variance of an image or video of the latent size it was built for; attends to all patches.

    Args: input_size: latent (T, H, W); condition: "text" (a pooled feature) or "label_N" (one of N classes);
    class_dropout_prob: above 0, the label table has a row for the unconditional class; no_temporal_pos_emb: leave out
    the positions of frames; learn_sigma: return 2 x in_channels channels; the rest as for STDiT3.
    """

    def __init__(
        self, input_size: Size3 = (16, 32, 32), in_channels: int = 4, patch_size: Size3 = (1, 2, 2),
        hidden_size: int = 1152, depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1, learn_sigma: bool = True, condition: str = "text",
        no_temporal_pos_emb: bool = False, caption_channels: int = 512, model_max_length: int = 77,
    ) -> None:  # fmt: skip
        super().__init__({"pred_sigma": learn_sigma, **arguments_of(locals())})
        del self.config["pred_sigma"]
        self.y_embedder = self._condition(condition)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, self.axis(index)) for index in range(depth)
        )
        self.final_layer = DiTFinalLayer(hidden_size, self.patch_features)
        self.register_positions()
        self.initialize()

    def _condition(self, condition: str) -> nn.Module:
        kind, _, number = condition.partition("_")
        if kind == "label" and number.isdecimal():
            return LabelEmbedder(int(number), self.hidden_size, self.class_dropout_prob > 0)
        if condition != "text":
            raise ValueError(f"condition '{condition}' is not known; it is 'text' or 'label_' with a number of classes")
        return CaptionEmbedder(self.config["caption_channels"], self.hidden_size, 1)

    def axis(self, index: int) -> Axis:
        """The axis along which block number `index` attends."""
        return "both"

    def _initialize(self) -> None:
        """Blocks start at zero effect (adaLN-Zero)."""
        super()._initialize()
        for module in self.modules():
            if isinstance(module, Adaptive):
                nn.init.zeros_(module.get_parameter("1.weight"))
            elif isinstance(module, LabelEmbedder):
                nn.init.normal_(module.embedding_table.weight, std=0.02)

    def positions(self) -> dict[str, Tensor]:
        return {"pos_embed_spatial": self.grid_positions(), "pos_embed_temporal": self.frame_positions()}

    def forward(self, x: Tensor, t: Tensor, y: Tensor, **_: Any) -> Tensor:
        """Noise and variance of x [B, C, T, H, W]: [B, C_out, T, H, W] float32.

        t [B] in 0..1000; y: pooled text features [B, 1, 1, C_text], or classes [B] int64.
        """
        y = self.y_embedder(y.to(self.dtype) if y.is_floating_point() else y).flatten(1)
        c = self.t_embedder(t) + y
        tokens = self.tokens(x) + self.pos_embed_spatial.to(self.dtype)[:, None]
        for index, block in enumerate(self.blocks):
            if self.adds_frame_positions(index):
                tokens = tokens + self.pos_embed_temporal.to(self.dtype)[:, :, None]
            tokens = block(tokens, c)
        return self.unpatch(self.final_layer(tokens, c), x.shape[2:])

    def adds_frame_positions(self, index: int) -> bool:
        """Whether the positions of frames are added before block number `index`."""
        return index == 0 and not self.config["no_temporal_pos_emb"]
