"""STDiT3, the diffusion transformer of Open-Sora 1.2: spatial and temporal blocks in turn (Zheng et al. 2024)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora.models.layers.attention import rotation_table, unpack_text
from opensora.models.layers.blocks import FinalLayer, Frames, SpaceTimeBlock
from opensora.models.layers.embeddings import (
    CaptionEmbedder,
    PatchEmbed3D,
    Size3,
    SizeEmbedder,
    TimestepEmbedder,
    position_embedding_2d,
    tile,
)


class RotaryFrequencies(nn.Module):
    """The frozen parameter `rope.freqs` [head_dim / 2]; kept in float32 whatever the model's dtype."""

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.freqs = nn.Parameter(theta**-exponents, requires_grad=False)


class Modulation(NamedTuple):
    """What the timestep does to the tokens, in the blocks and at the end."""

    blocks: Tensor  # [B, T or 1, 6, C]
    final: Tensor  # [B, C]
    frames: Frames | None  # which frames are given, if any are


class STDiT3(nn.Module):
    """Predicts the rectified-flow velocity (and a variance, when pred_sigma) of a latent video.

    Args (keywords as in the published config.json; unknown ones of that file are accepted through `from_config`):
        hidden_size, depth, num_heads, mlp_ratio: `depth` spatial and `depth` temporal blocks.
        in_channels, patch_size: latent channels and (t, h, w) patch.
        caption_channels, model_max_length: width and largest length of the text features.
        input_sq_size: side in pixels of the square at which the position scale is 1.
        pred_sigma: return 2 x in_channels channels.  qk_norm: RMS norm on queries and keys.
        skip_y_embedder: the text arrives projected and packed.  freeze_y_embedder: do not train its projection.
        only_train_temporal: train the temporal blocks alone.
        class_dropout_prob, drop_path: kept for training programs; they do not change the forward pass.
    """

    def __init__(
        self,
        input_size: tuple[int | None, int | None, int | None] = (None, None, None),
        input_sq_size: int = 512,
        in_channels: int = 4,
        patch_size: Size3 = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        pred_sigma: bool = True,
        drop_path: float = 0.0,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        qk_norm: bool = True,
        only_train_temporal: bool = False,
        freeze_y_embedder: bool = False,
        skip_y_embedder: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads or (hidden_size // num_heads) % 2:
            raise ValueError(f"hidden_size {hidden_size} must give an even head size for {num_heads} heads")
        self.config: dict[str, Any] = dict(
            input_size=tuple(input_size), input_sq_size=input_sq_size, in_channels=in_channels,
            patch_size=tuple(patch_size), hidden_size=hidden_size, depth=depth, num_heads=num_heads,
            mlp_ratio=mlp_ratio, class_dropout_prob=class_dropout_prob, pred_sigma=pred_sigma,
            caption_channels=caption_channels, model_max_length=model_max_length, qk_norm=qk_norm,
            skip_y_embedder=skip_y_embedder,
        )  # fmt: skip
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if pred_sigma else in_channels
        self.patch_size: Size3 = tuple(patch_size)
        self.hidden_size = hidden_size
        self.input_sq_size = input_sq_size
        self.class_dropout_prob = class_dropout_prob
        self.skip_y_embedder = skip_y_embedder

        self.rope = RotaryFrequencies(hidden_size // num_heads)
        self.x_embedder = PatchEmbed3D(self.patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.fps_embedder = SizeEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)

        def blocks(temporal: bool) -> nn.ModuleList:
            return nn.ModuleList(
                SpaceTimeBlock(hidden_size, num_heads, mlp_ratio, qk_norm, temporal) for _ in range(depth)
            )

        self.spatial_blocks = blocks(temporal=False)
        self.temporal_blocks = blocks(temporal=True)
        patch_volume = self.patch_size[0] * self.patch_size[1] * self.patch_size[2]
        self.final_layer = FinalLayer(hidden_size, patch_volume * self.out_channels)
        self.initialize()
        if only_train_temporal:
            self.requires_grad_(False)
            self.temporal_blocks.requires_grad_(True)
        if freeze_y_embedder:
            self.y_embedder.requires_grad_(False)

    def initialize(self) -> None:
        """Xavier weights; new temporal blocks, all text and the output start at zero effect (PixArt-alpha, DiT)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.hidden_size, -1))
        for embedder in (self.t_embedder, self.fps_embedder):
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        nn.init.normal_(self.t_block[1].weight, std=0.02)
        nn.init.normal_(self.y_embedder.y_proj.fc1.weight, std=0.02)
        nn.init.normal_(self.y_embedder.y_proj.fc2.weight, std=0.02)
        for block in self.temporal_blocks:
            for layer in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Velocity (and variance) of x: [B, C_out, T, H, W] float32.

        x [B, C, T, H, W] latents; timestep [B] in 0..1000; y [B, 1, L, C_text] text features (packed [1, sum, C] with
        skip_y_embedder); mask [b, L], 1 for real text tokens (or the lengths [b]); x_mask [B, T'] bool, False frames
        are given and modulated at timestep 0; fps, height, width [b] in frames per second and pixels. Rows b < B are
        tiled. Other size arguments of the family (num_frames, ar) are accepted and have no effect.
        """
        tokens, modulation, grid = self.embed(x, timestep, x_mask, fps, height, width)
        return self.unembed(self.transform(tokens, modulation, *self.caption(y, mask, len(x))), modulation, grid)

    def embed(
        self,
        x: Tensor,
        timestep: Tensor,
        x_mask: Tensor | None,
        fps: Tensor | None,
        height: Tensor | None,
        width: Tensor | None,
    ) -> tuple[Tensor, Modulation, torch.Size]:
        """Tokens [B, T', S, C], what the timestep does to them, and the size (T, H, W) to come back to."""
        if fps is None or height is None or width is None:
            raise ValueError("STDiT3 needs fps, height and width (one value a sample)")
        grid = x.shape[2:]
        dtype = self.x_embedder.proj.weight.dtype
        tokens = self.x_embedder(x.to(dtype))
        rows, columns = (-(-grid[axis] // self.patch_size[axis]) for axis in (1, 2))
        scale = (height[0].float() * width[0].float()).sqrt() / self.input_sq_size
        base_size = round((rows * columns) ** 0.5)
        positions = position_embedding_2d(self.hidden_size, rows, columns, scale, base_size, x.device)
        return tokens + positions.to(dtype), self.modulation(timestep, fps, x_mask), grid

    def modulation(self, timestep: Tensor, fps: Tensor, x_mask: Tensor | None) -> Modulation:
        """The modulation of every frame, chosen here once: given frames (x_mask False) are at timestep 0."""
        rate = self.fps_embedder(fps, len(timestep))  # [B, C]
        t = self.t_embedder(timestep) + rate
        blocks = self.t_block(t).unflatten(-1, (6, -1))[:, None]
        if x_mask is None:
            return Modulation(blocks, t, None)
        t0 = self.t_embedder(torch.zeros_like(timestep)) + rate
        given_blocks = self.t_block(t0).unflatten(-1, (6, -1))[:, None]
        return Modulation(torch.where(x_mask[..., None, None], blocks, given_blocks), t, Frames(t0, x_mask))

    def caption(self, y: Tensor, mask: Tensor | None, batch_size: int) -> tuple[Tensor, Tensor | None]:
        """Projected text [B, L, C] and which of its tokens are real [B, L] (None: all)."""
        if self.skip_y_embedder:
            if mask is None:
                raise ValueError("packed text needs its lengths in mask")
            lengths = mask if mask.ndim == 1 else mask.sum(dim=1)
            return unpack_text(y.to(self.x_embedder.proj.weight.dtype), lengths.tolist())
        y = self.y_embedder(y.to(self.y_embedder.y_proj.fc1.weight.dtype)).squeeze(1)
        return y, None if mask is None else tile(mask, batch_size).bool()

    def transform(self, tokens: Tensor, modulation: Modulation, y: Tensor, keep: Tensor | None) -> Tensor:
        """The tokens [B, T', S, C] after all blocks, spatial before temporal."""
        rotation = rotation_table(self.rope.freqs, tokens.shape[1])
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            tokens = spatial(tokens, modulation.blocks, y, keep)
            tokens = temporal(tokens, modulation.blocks, y, keep, rotation)
        return tokens

    def unembed(self, tokens: Tensor, modulation: Modulation, grid: torch.Size) -> Tensor:
        """Tokens back to [B, C_out, T, H, W] float32, the padding cut off."""
        x = self.final_layer(tokens, modulation.final, modulation.frames)  # [B, T', S, pt * ph * pw * C_out]
        rows = -(-grid[1] // self.patch_size[1])
        x = x.unflatten(2, (rows, -1)).unflatten(4, (*self.patch_size, -1))  # [B, T', H', W', pt, ph, pw, C_out]
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)
        return x[:, :, : grid[0], : grid[1], : grid[2]].float()

    def null_caption(self, length: int) -> Tensor:
        """The unconditional text [1, 1, length, C_text] of classifier-free guidance."""
        return self.y_embedder.null(length)


def STDiT3_XL_2(**kwargs: Any) -> STDiT3:
    """The published size: hidden 1152, 16 heads, 28 + 28 blocks."""
    return STDiT3(**{"depth": 28, "hidden_size": 1152, "patch_size": (1, 2, 2), "num_heads": 16, **kwargs})


def STDiT3_3B_2(**kwargs: Any) -> STDiT3:
    """The larger registered size: hidden 1872, 26 heads, 28 + 28 blocks."""
    return STDiT3(**{"depth": 28, "hidden_size": 1872, "patch_size": (1, 2, 2), "num_heads": 26, **kwargs})
