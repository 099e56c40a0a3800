"""What the diffusion transformers share: patches in and out, captions, modulation, positions and initial weights.

Axes: latents x [B, C, T, H, W]; tokens [B, T', S, C] are patches, S of them in each of T' frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora.models.layers.blocks import FinalLayer, Frames, Modulation, TextBlock
from opensora.models.layers.embeddings import (
    CaptionEmbedder,
    PatchEmbed3D,
    Size3,
    TimestepEmbedder,
    position_embedding_2d,
    sincos_1d,
    sincos_2d,
    tile,
)


class PatchTransformer(nn.Module):
    """Latents to tokens and back. `config` holds the constructor's arguments, with at least the keys read here."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.hidden_size: int = config["hidden_size"]
        self.in_channels: int = config["in_channels"]
        self.out_channels = 2 * self.in_channels if config["pred_sigma"] else self.in_channels
        self.patch_size: Size3 = tuple(config["patch_size"])
        self.class_dropout_prob: float = config["class_dropout_prob"]
        if self.hidden_size % config["num_heads"]:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {config['num_heads']}")
        self.x_embedder = PatchEmbed3D(self.patch_size, self.in_channels, self.hidden_size)
        self.t_embedder = TimestepEmbedder(self.hidden_size)

    @property
    def patch_features(self) -> int:
        """Output features of one token."""
        return math.prod(self.patch_size) * self.out_channels

    @property
    def dtype(self) -> torch.dtype:
        """The type that tokens are computed in."""
        return self.x_embedder.proj.weight.dtype

    def token_grid(self, size: Size3) -> Size3:
        """(T', rows, columns) of the tokens of a latent of this size, padded up to whole patches."""
        return tuple(-(-side // patch) for side, patch in zip(size, self.patch_size, strict=True))

    def unpatch(self, patches: Tensor, size: Size3) -> Tensor:
        """Patches [B, T', S, pt * ph * pw * C_out] as [B, C_out, T, H, W] float32, the padding cut off."""
        x = patches.unflatten(2, self.token_grid(size)[1:]).unflatten(4, (*self.patch_size, -1))
        x = (
            x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)
        )  # from [B, T', H', W', pt, ph, pw, C]
        return x[:, :, : size[0], : size[1], : size[2]].float()

    def initialize(self) -> None:
        """Xavier weights, small ones in the embedders, and a final layer that starts at zero (DiT, PixArt-alpha)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.hidden_size, -1))
        for module in self.modules():
            if isinstance(module, TimestepEmbedder | CaptionEmbedder):
                for layer in (part for part in module.modules() if isinstance(part, nn.Linear)):
                    nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)

    def prepare(self, **conditioning: Any) -> dict[str, Any]:
        """Arguments of `forward` with the same result, precomputed where they do not change from step to step."""
        return conditioning

    def null_caption(self, y: Tensor) -> Tensor:
        """The unconditional counterpart of the text features or classes `y`, for classifier-free guidance."""
        return self.y_embedder.null_like(y)


class Text(NamedTuple):
    """A text that has been read, which takes the place of its features in a forward pass."""

    prepared: tuple[Any, ...]  # for the attention of each block: its keys and values, or what serves in their place
    keep: Tensor | None  # [B, L] bool, real tokens (None: all)
    made: dict[Any, Tensor] | None = None  # of the sizes that came with the text, by the first pass


def made_once(y: Tensor | Text | None, what: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives, which is called for the first pass of a text that has been read, or for every pass."""
    if not isinstance(y, Text) or y.made is None:
        return make()
    if what not in y.made:
        y.made[what] = make()
    return y.made[what]


class TextTransformer(PatchTransformer):
    """The PixArt-alpha line: text by cross-attention, one modulation for all blocks (adaLN-single)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(self.hidden_size, 6 * self.hidden_size))
        self.y_embedder = CaptionEmbedder(config["caption_channels"], self.hidden_size, config["model_max_length"])
        self.final_layer = FinalLayer(self.hidden_size, self.patch_features)

    def modulation(self, timestep: Tensor, condition: Tensor | float, x_mask: Tensor | None) -> Modulation:
        """The modulation of every frame, chosen here once: given frames (x_mask False) are at timestep 0.

        timestep [B]; `condition` [B, C] (or 0) is added to its embedding; x_mask [B, T'] bool, or None for no given.
        """
        t = self.t_embedder(timestep) + condition
        generated = self.rows(self.t_block, t)
        if x_mask is None:
            return Modulation(generated, t, None, generated)
        t0 = self.t_embedder(torch.zeros_like(timestep)) + condition
        blocks = torch.where(x_mask[..., None, None], generated, self.rows(self.t_block, t0))
        return Modulation(blocks, t, Frames(t0, x_mask), generated)

    def rows(self, block: nn.Module, t: Tensor) -> Tensor:
        """The rows [B, 1, n, C] that `block` makes of the time embedding t [B, C]."""
        return block(t).unflatten(-1, (-1, self.hidden_size))[:, None]

    def prepare(self, *, y: Tensor, mask: Tensor | None = None, **others: Any) -> dict[str, Any]:
        """Arguments of `forward` that mean the same, the text read once for all steps, by each block.

        So is what the sizes among them give.
        """
        y, keep = self.caption(y, mask, len(y) if mask is None else max(len(y), len(mask)))  # one y may serve many rows
        prepared = tuple(block.cross_attn.prepare(y, keep) for block in self.text_blocks())
        return {"y": Text(prepared, keep, {}), **others}

    def text_blocks(self) -> list[TextBlock]:
        """All blocks, in the order in which tokens pass through them."""
        return list(self.blocks)

    def texts(self, y: Tensor | Text, mask: Tensor | None, batch_size: int) -> tuple[Sequence[Any], Tensor | None]:
        """What each block is told of the text, and which of its tokens are real [B, L] (None: all)."""
        if isinstance(y, Text):
            return y.prepared, y.keep
        y, keep = self.caption(y, mask, batch_size)
        return [y] * len(self.text_blocks()), keep

    def caption(self, y: Tensor, mask: Tensor | None, batch_size: int) -> tuple[Tensor, Tensor | None]:
        """Projected text [B, L, C] of y [B, 1, L, C_text], and which of its tokens are real [B, L] (None: all)."""
        y = self.y_embedder(y.to(self.y_embedder.y_proj.fc1.weight.dtype)).squeeze(1)
        return y, None if mask is None else tile(mask, batch_size).bool()

    def unembed(self, tokens: Tensor, modulation: Modulation, size: Size3) -> Tensor:
        """Tokens back to [B, C_out, T, H, W] float32."""
        return self.unpatch(self.final_layer(tokens, modulation.final, modulation.frames), size)

    def initialize(self) -> None:
        """New blocks start without text (PixArt-alpha)."""
        super().initialize()
        nn.init.normal_(self.t_block[1].weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("cross_attn.proj.weight"):
                nn.init.zeros_(parameter)

    def freeze(self, what: str | None, temporal: Sequence[str] = ()) -> None:
        """Trains all parameters but the text's ("text"), or none but those named like `temporal` ("not_temporal")."""
        if what not in (None, "text", *(["not_temporal"] if temporal else [])):
            raise ValueError(f"freeze '{what}' is not known; it is 'text' or, in video models, 'not_temporal'")
        for name, parameter in self.named_parameters():
            if (what == "text" and "y_embedder" in name) or (
                what == "not_temporal" and not any(t in name for t in temporal)
            ):
                parameter.requires_grad_(False)


class SizedTransformer(TextTransformer):
    """Models of any size: positions are made for the tokens at hand, scaled by the size in pixels."""

    def tokens(self, x: Tensor, height: Tensor, width: Tensor, y: Tensor | Text | None) -> Tensor:
        """Tokens [B, T', S, C] of x [B, C, T, H, W] with their positions; the first sample's height and width count."""
        _, rows, columns = self.token_grid(x.shape[2:])

        def positions() -> Tensor:
            scale = (height[0].float() * width[0].float()).sqrt() / self.config["input_sq_size"]
            base_size = round((rows * columns) ** 0.5)
            return position_embedding_2d(self.hidden_size, rows, columns, scale, base_size, x.device).to(self.dtype)

        return self.x_embedder(x.to(self.dtype)) + made_once(y, (rows, columns), positions)

    def check_given(self, **sizes: Tensor | None) -> None:
        """Raises ValueError when one of the size arguments is absent."""
        if any(value is None for value in sizes.values()):
            raise ValueError(f"{type(self).__name__} needs {', '.join(sizes)} (one value a sample)")


class FixedPositions(PatchTransformer):
    """Models built for one latent size, `input_size` (T, H, W): their sine-cosine positions are buffers.

    The buffers are computed from the configuration; `positions` gives them again where a checkpoint holds those of
    another size, or none.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        size = self.input_size = tuple(config["input_size"])
        if None in size or any(side % patch for side, patch in zip(size, self.patch_size, strict=True)):
            raise ValueError(f"input_size {size} must be (frames, height, width), multiples of {self.patch_size}")

    def positions(self) -> dict[str, Tensor]:
        """The position buffers by name: [1, S, C] of a frame's patches and [1, T', C] of the frames."""
        raise NotImplementedError

    def grid_positions(self, scale: float = 1.0, base_size: int | None = None) -> Tensor:
        """[1, S, C] of the patches of a frame; see `sincos_2d`."""
        return sincos_2d(self.hidden_size, *self.token_grid(self.input_size)[1:], scale, base_size)[None]

    def frame_positions(self, scale: float = 1.0) -> Tensor:
        """[1, T', C] of the frames, divided by `scale`."""
        frames = torch.arange(self.token_grid(self.input_size)[0], dtype=torch.float64)
        return sincos_1d(self.hidden_size, frames / scale)[None]

    def register_positions(self) -> None:
        """Makes the positions buffers of the model."""
        for name, value in self.positions().items():
            self.register_buffer(name, value)

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens [B, T', S, C] of x [B, C, T, H, W], without positions."""
        if tuple(x.shape[2:]) != self.input_size:
            raise ValueError(f"{type(self).__name__} was built for latents {self.input_size}, not {tuple(x.shape[2:])}")
        return self.x_embedder(x.to(self.dtype))
