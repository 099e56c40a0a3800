"""What the diffusion transformers share: patches in and out, captions, modulation, positions and initial weights.

Axes: latents x [B, C, T, H, W]; tokens [B, T', S, C] are patches, S of them in each of T' frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from opensora.models.layers.attention import Pair
from opensora.models.layers.blocks import FinalLayer, Frames, Modulation, TextBlock
from opensora.models.layers.embeddings import (
    CaptionEmbedder,
    PatchEmbed3D,
    Size3,
    TimestepEmbedder,
    position_embedding_2d,
    tile,
)
from opensora.models.layers.linear import Linear


class PatchTransformer(nn.Module):
    """Latents to tokens and back. `config` holds the constructor's arguments, with at least the keys read here."""

    size_arguments: ClassVar[tuple[str, ...]] = ()  # size conditioning that `forward` needs

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

    def token_grid(self, size: Sequence[int]) -> Size3:
        """(T', rows, columns) of the tokens of a latent of this size, padded up to whole patches."""
        frames, rows, columns = (-(-side // patch) for side, patch in zip(size, self.patch_size, strict=True))
        return frames, rows, columns

    def unpatch(self, patches: Tensor, size: Sequence[int]) -> Tensor:
        """Patches [B, T', S, pt * ph * pw * C_out] as [B, C_out, T, H, W] float32, the padding cut off."""
        x = patches.unflatten(2, self.token_grid(size)[1:]).unflatten(4, (*self.patch_size, -1))
        x = (
            x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)
        )  # from [B, T', H', W', pt, ph, pw, C]
        return x[:, :, : size[0], : size[1], : size[2]].float()

    def initialize(self) -> None:
        """Sets the initial weights; not on the meta device, where that would import torch._dynamo, for seconds."""
        if not self.x_embedder.proj.weight.is_meta:
            self._initialize()

    def _initialize(self) -> None:
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

    def prepare(self, shape: Sequence[int], **conditioning: Any) -> dict[str, Any]:
        """Arguments that replace `conditioning` in `forward` on latents of this shape, computed once for all steps."""
        return conditioning

    def null_caption(self, y: Tensor) -> Tensor:
        """The unconditional counterpart of the text features or classes `y`, for classifier-free guidance."""
        return self.y_embedder.null_like(y)


class StaticInputs(NamedTuple):
    """What the conditioning contributes to every step on latents of one shape."""

    shape: tuple[int, ...]  # of the latents, [B, C, T, H, W]
    text: tuple[Tensor | Pair, ...]  # for each block the text [B, L, C], or its keys and values
    text_mask: Tensor | None  # [B, L] bool, True for real tokens; None: all are real
    size: Tensor | float = 0.0  # [B or 1, C], added to the time embedding
    length: Tensor | float = 0.0  # [B or 1, C], the same for temporal blocks with a modulation of their own
    positions: Tensor | float = 0.0  # [S, C], added to the tokens of every frame


class TextTransformer(PatchTransformer):
    """Models of the PixArt-alpha family: text by cross-attention, one modulation for all blocks (adaLN-single)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.t_block = nn.Sequential(nn.SiLU(), Linear(self.hidden_size, 6 * self.hidden_size))
        self.y_embedder = CaptionEmbedder(config["caption_channels"], self.hidden_size, config["model_max_length"])
        self.final_layer = FinalLayer(self.hidden_size, self.patch_features)

    def static_inputs(self, shape: Sequence[int], *, y: Tensor, mask: Tensor | None = None, **_: Any) -> StaticInputs:
        """The static inputs of conditioning as `forward` takes it. Models with size conditioning add to them."""
        y, text_mask = self.embed_text(y, mask, shape[0])
        return StaticInputs(tuple(shape), (y,) * len(self.blocks_in_order()), text_mask)

    def prepare(self, shape: Sequence[int], **conditioning: Any) -> dict[str, Any]:
        static = self.static_inputs(shape, **conditioning)
        text = zip(self.blocks_in_order(), static.text, strict=True)
        return {"static": static._replace(text=tuple(b.cross_attn.read(y) for b, y in text))}

    def static_or_prepared(
        self, shape: Sequence[int], static: StaticInputs | None, **conditioning: Any
    ) -> StaticInputs:
        """The static inputs of the conditioning, or those that `prepare` has made.

        Raises ValueError if both are given, or if the prepared ones are for latents of another shape.
        """
        if static is None:
            self.check_given(y=conditioning["y"])
            return self.static_inputs(shape, **conditioning)
        if given := [name for name, value in conditioning.items() if value is not None]:
            raise ValueError(f"{', '.join(given)}: the conditioning is prepared already; prepare it again to change it")
        if static.shape != tuple(shape):
            was, now = list(static.shape), list(shape)
            raise ValueError(f"the conditioning is prepared for latents {was}, not {now}; prepare it again")
        return static

    def embed_text(self, y: Tensor, mask: Tensor | None, batch_size: int) -> tuple[Tensor, Tensor | None]:
        """Text features y [B, 1, L, C_text] as tokens [B, L, C], and their mask [batch_size, L] bool or None."""
        y = self.y_embedder(y.to(self.y_embedder.y_proj.fc1.weight.dtype)).squeeze(1)
        return y, None if mask is None else tile(mask, batch_size).bool()

    def blocks_in_order(self) -> list[TextBlock]:
        """All blocks, in the order in which tokens pass through them."""
        return list(self.blocks)

    def token_mask(self, x_mask: Tensor | None, num_frames: int) -> Tensor | None:
        """The mask [B, T'] of frames of tokens, of a mask of these or of `num_frames` latent frames.

        Tokens of several latent frames are given (False) if all of these are.
        """
        patch = self.patch_size[0]
        if x_mask is None or patch == 1 or x_mask.shape[1] != num_frames:
            return x_mask
        return nn.functional.pad(x_mask, (0, -num_frames % patch)).unflatten(1, (-1, patch)).any(dim=2)

    def modulation(self, timestep: Tensor, size: Tensor | float, x_mask: Tensor | None) -> Modulation:
        """The modulation of every frame, chosen here once: given frames (x_mask False) are at timestep 0.

        timestep [B or 1]; `size` [B or 1, C] (or 0) is added to its embedding; x_mask [B, T'] bool, or None if no frame
        is given.
        """
        t = self.t_embedder(timestep) + size
        generated = self.rows(self.t_block, t)
        if x_mask is None:
            return Modulation(generated, t, None, generated)
        t0 = self.t_embedder(torch.zeros_like(timestep)) + size
        blocks = torch.where(x_mask[..., None, None], generated, self.rows(self.t_block, t0))
        return Modulation(blocks, t, Frames(t0, x_mask), generated)

    def rows(self, block: nn.Module, t: Tensor) -> Tensor:
        """The rows [B, 1, n, C] that `block` makes of the time embedding t [B, C]."""
        return block(t).unflatten(-1, (-1, self.hidden_size))[:, None]

    def _initialize(self) -> None:
        """New blocks start without text (PixArt-alpha)."""
        super()._initialize()
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

    def scaled_positions(self, shape: Sequence[int], height: Tensor, width: Tensor) -> Tensor:
        """Positions [S, C] of the tokens of a frame of any size; those of the first sample's height and width."""
        _, rows, columns = self.token_grid(shape[2:])
        scale = (height[0].float() * width[0].float()).sqrt() / self.config["input_sq_size"]
        base_size = round((rows * columns) ** 0.5)
        return position_embedding_2d(self.hidden_size, rows, columns, scale, base_size, height.device).to(self.dtype)

    def check_given(self, **arguments: Tensor | None) -> None:
        """Raises ValueError if an argument is absent."""
        if any(value is None for value in arguments.values()):
            raise ValueError(f"{type(self).__name__} needs {', '.join(arguments)} (one value a sample)")
