"""Per-frame autoencoders, and the video autoencoder of Open-Sora 1.2: per frame, then causally in time."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora.errors import ConfigError
from opensora.models.layers.arguments import arguments_of
from opensora.models.layers.pieces import concatenated, one_by_one
from opensora.models.vae.autoencoder_kl import AutoencoderKL
from opensora.models.vae.posterior import DiagonalGaussian
from opensora.models.vae.vae_temporal import VAE_Temporal, VAE_Temporal_SD

SPATIAL_FACTOR = 8
MOST_PIXELS = 2**16  # of a batch of frames to decode: many small ones, a single large one
ENCODED_PIXELS = 2**18  # of a batch of frames to encode, which takes less memory
SPATIAL_SCALE = 0.18215  # applied whatever the autoencoder's own scaling factor, as the published weights expect
# Patterns of names in published files, old attention layers included, and what takes their place when loading.
FRAMES_RENAMED = (
    *((f"*.attentions.*.{old}.*", f"*.attentions.*.{new}.*") for old, new in (
        ("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"),
    )),
    *((f"{part}.*", f"module.{part}.*") for part in ("encoder", "decoder", "quant_conv", "post_quant_conv")),
)  # fmt: skip


def frames_at_once(height: int, width: int) -> int:
    """The batch size for frames of this size."""
    return max(1, MOST_PIXELS // (height * width))


class FrameAutoencoder(nn.Module):
    """Applies an image autoencoder, `module` of class `network`, to the frames of a video one by one.

    `config` holds the subclass's arguments: those of `network`, and micro_batch_size, the frames in a batch
    (None: all).
    """

    network: type[Any]
    group = (1, 1)  # frames that become latent frames together, independent of all others

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.micro_batch_size: int | None = config.pop("micro_batch_size")
        self.config = config
        self.module = self.network(**config)
        self.out_channels: int = config["latent_channels"]

    @classmethod
    def keywords(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor's keywords among the entries of a published config.json, which describes more than that.

        Raises ConfigError when it is the config.json of another class.
        """
        kind = cls.network.__name__
        if config.get("_class_name", kind) != kind:
            raise ConfigError(f"{cls.__name__} takes weights of {kind}, these are of {config['_class_name']}")
        known = inspect.signature(cls).parameters
        return {key: value for key, value in config.items() if key in known}

    def get_latent_size(self, input_size: Sequence[int | None]) -> list[int | None]:
        """(T, H, W) of the latent of a video (T, H, W); None stays None."""
        frames, *sides = input_size
        return [frames, *(None if side is None else side // SPATIAL_FACTOR for side in sides)]

    def get_pixel_frames(self, latent_frames: int) -> int:
        """Frames that so many latent frames stand for."""
        return latent_frames

    def encode(self, x: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents [B, C, T, H / 8, W / 8] of x [B, 3, T, H, W] in [-1, 1]; `sample` False takes the mean."""

        def encode_frames(frames: Tensor) -> Tensor:
            posterior = DiagonalGaussian(self.moments(frames))
            return (posterior.sample(generator) if sample else posterior.mean) * SPATIAL_SCALE

        return self._by_frames(encode_frames, x)

    def moments(self, frames: Tensor) -> Tensor:
        """Mean and log variance [N, 2 C, H / 8, W / 8] of frames [N, 3, H, W], computed ENCODED_PIXELS at a time."""
        at_once = max(1, ENCODED_PIXELS // (frames.shape[2] * frames.shape[3]))
        return concatenated(self.module.encode, frames.split(at_once))

    def encoded(self, pieces: Iterable[Tensor]) -> Tensor:
        """`encode` with sample=False of a video that comes in pieces [B, 3, n, H, W], one in memory at a time."""
        return concatenated(partial(self.encode, sample=False), pieces, dim=2)

    def decoded(self, z: Tensor, **_: Any) -> Iterator[Tensor]:
        """`decode` in pieces [B, 3, n, H * 8, W * 8], one in memory at a time."""
        yield self.decode(z)

    def decode_frames(self, z: Tensor) -> Tensor:
        """Frames [N, 3, H * 8, W * 8] of scaled latents [N, C, H, W]."""
        return self.module.decode(z / SPATIAL_SCALE)

    def _by_frames(self, function: Any, x: Tensor, at_once: int | None = None) -> Tensor:
        """`function` over the frames of x [B, C, T, H, W] (all of sample 0 first), `at_once` in a batch."""
        batch = x.shape[0]
        frames = x.transpose(1, 2).flatten(0, 1)  # [B * T, C, H, W]
        parts = frames.split(at_once or self.micro_batch_size or len(frames))
        return concatenated(function, parts).unflatten(0, (batch, -1)).transpose(1, 2)


class VideoAutoencoderKL(FrameAutoencoder):
    """AutoencoderKL frame by frame; by default in the layout of Stable Diffusion (Rombach et al. 2022) and SDXL."""

    network = AutoencoderKL

    def __init__(
        self, micro_batch_size: int | None = None, in_channels: int = 3, out_channels: int = 3,
        latent_channels: int = 4, layers_per_block: int = 2,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",) * 4,
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",) * 4,
        act_fn: str = "silu", norm_num_groups: int = 32, mid_block_add_attention: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(arguments_of(locals()))

    def decode(self, z: Tensor, **_: Any) -> Tensor:
        """Video [B, 3, T, H * 8, W * 8], about in [-1, 1], of scaled latents z [B, C, T, H, W]."""
        return self._by_frames(self.decode_frames, z, self._at_once(z))

    def decoded(self, z: Tensor, **_: Any) -> Iterator[Tensor]:
        return one_by_one(self.decode, z.split(self._at_once(z), dim=2))

    def _at_once(self, z: Tensor) -> int:
        most = frames_at_once(*(SPATIAL_FACTOR * side for side in z.shape[3:]))
        return min(self.micro_batch_size or most, most)


class VideoAutoencoderPipeline(nn.Module):
    """Spatial then temporal autoencoder; the temporal one sees independent chunks of `micro_frame_size` frames.

    Args: vae_2d, vae_temporal: constructor keywords (a `type` entry and loading keys are ignored) or built modules;
    micro_frame_size: frames of a chunk (17 become 5 latent frames; None: the whole video at once); micro_batch_size:
    frames the per-frame autoencoder takes at once; shift, scale: per-channel normalisation of the latent;
    freeze_vae_2d: do not train the per-frame autoencoder; cal_loss: return what the losses need, not normalised.
    """

    def __init__(
        self, vae_2d: dict[str, Any] | nn.Module | None = None, vae_temporal: dict[str, Any] | nn.Module | None = None,
        freeze_vae_2d: bool = False, cal_loss: bool = False, micro_frame_size: int | None = None,
        micro_batch_size: int | None = None,
        shift: float | Sequence[float] = 0.0, scale: float | Sequence[float] = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.spatial_vae = _spatial(vae_2d)
        self.temporal_vae = _temporal(vae_temporal)
        if micro_batch_size is not None:
            self.spatial_vae.micro_batch_size = micro_batch_size
        self.cal_loss = cal_loss
        self.micro_frame_size = micro_frame_size
        self.out_channels = self.temporal_vae.out_channels
        self.config: dict[str, Any] = dict(
            vae_2d=dict(type="VideoAutoencoderKL", **self.spatial_vae.config),
            vae_temporal=dict(type="VAE_Temporal", **self.temporal_vae.config),
            micro_frame_size=micro_frame_size, micro_batch_size=micro_batch_size,
        )  # fmt: skip
        self.set_normalization(shift, scale)
        if freeze_vae_2d:
            self.spatial_vae.requires_grad_(False)

    def set_normalization(self, shift: float | Sequence[float], scale: float | Sequence[float]) -> None:
        """Sets the shift and scale of the latents, one number or one per channel."""
        self.config |= {"shift": shift, "scale": scale}
        for name, value in (("scale", scale), ("shift", shift)):
            tensor = torch.as_tensor(value, dtype=torch.float32)
            self.register_buffer(name, tensor.view(1, -1, 1, 1, 1) if tensor.ndim else tensor)

    @property
    def group(self) -> tuple[int, int]:
        """Frames of a chunk and what they become; without chunks, what one latent frame stands for."""
        return self.micro_frame_size or self.temporal_vae.time_downsample_factor, self.micro_latent_frames or 1

    @property
    def micro_latent_frames(self) -> int | None:
        """Latent frames of one chunk."""
        return self.micro_frame_size and self.temporal_vae.get_latent_size([self.micro_frame_size, None, None])[0]

    def get_latent_size(self, input_size: Sequence[int | None]) -> list[int | None]:
        """(T, H, W) of the latent of a video (T, H, W), chunk by chunk; None stays None."""
        frames, height, width = self.spatial_vae.get_latent_size(input_size)
        if frames is None or self.micro_frame_size is None:
            return self.temporal_vae.get_latent_size([frames, height, width])
        chunks, rest = divmod(frames, self.micro_frame_size)
        latent = chunks * self.micro_latent_frames + self.temporal_vae.get_latent_size([rest, None, None])[0]
        return [latent, height, width]

    def get_pixel_frames(self, latent_frames: int) -> int:
        """Frames that so many latent frames stand for; ValueError unless they are whole chunks."""
        if self.micro_frame_size is None or latent_frames % self.micro_latent_frames:
            raise ValueError(f"{latent_frames} latent frames are not a multiple of {self.micro_latent_frames}")
        return latent_frames // self.micro_latent_frames * self.micro_frame_size

    def encode(self, x: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> Any:
        """Normalised latent [B, C, T', H / 8, W / 8] of x [B, 3, T, H, W] in [-1, 1].

        `sample` False takes the mean of both posteriors. With cal_loss: (z, last chunk's posterior, spatial latent).
        """
        x_z = self.spatial_vae.encode(x, sample, generator)
        z, posterior = self.encode_time(x_z, sample, generator)
        return (z, posterior, x_z) if self.cal_loss else z

    def encoded(self, pieces: Iterable[Tensor]) -> Tensor:
        """`encode` with sample=False of a video that comes in pieces [B, 3, n, H, W], one in memory at a time."""
        return self.encode_time(self.spatial_vae.encoded(pieces), sample=False)[0]

    def encode_time(self, x_z: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> Any:
        """The latent of a spatial latent, normalised unless cal_loss, and the posterior of its last chunk."""
        posterior, parts = None, []
        for chunk in x_z.split(self.micro_frame_size or x_z.shape[2], dim=2):
            posterior = self.temporal_vae.encode(chunk)
            parts.append(posterior.sample(generator) if sample else posterior.mean)
        z = torch.cat(parts, dim=2)
        return z if self.cal_loss else (z - self.shift.to(z.dtype)) / self.scale.to(z.dtype), posterior

    def decode(self, z: Tensor, num_frames: int) -> Any:
        """Video [B, 3, num_frames, H * 8, W * 8] of a normalised latent z; with cal_loss: (video, spatial latent)."""
        x_z = self.decode_time(z, num_frames)
        video = self.spatial_vae.decode(x_z)
        return (video, x_z) if self.cal_loss else video

    def decoded(self, z: Tensor, num_frames: int) -> Iterator[Tensor]:
        """The video of a normalised latent in pieces [B, 3, n, H * 8, W * 8], one in memory at a time."""
        yield from self.spatial_vae.decoded(self.decode_time(z, num_frames))

    def decode_time(self, z: Tensor, num_frames: int) -> Tensor:
        """The spatial latent [B, C, num_frames, H, W] of a latent, which is normalised unless cal_loss."""
        if not self.cal_loss:
            z = z * self.scale.to(z.dtype) + self.shift.to(z.dtype)
        size = self.micro_frame_size or num_frames
        parts = [
            self.temporal_vae.decode(chunk, num_frames=min(size, num_frames - i * size))
            for i, chunk in enumerate(z.split(self.micro_latent_frames or z.shape[2], dim=2))
        ]
        return torch.cat(parts, dim=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, DiagonalGaussian, Tensor, Tensor]:
        """(video, decoded spatial latent, posterior, latent, spatial latent) of x: what the losses compare."""
        if not self.cal_loss:
            raise ValueError("forward computes the training losses' inputs; build the model with cal_loss=True")
        z, posterior, x_z = self.encode(x)
        video, decoded_x_z = self.decode(z, num_frames=x.shape[2])
        return video, decoded_x_z, posterior, z, x_z


_LOADING_KEYS = ("type", "from_pretrained", "subfolder", "local_files_only", "force_huggingface", "cache_dir")


def _options(part: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (part or {}).items() if key not in _LOADING_KEYS}


def _spatial(part: dict[str, Any] | nn.Module | None) -> Any:
    return part if isinstance(part, nn.Module) else VideoAutoencoderKL(**_options(part))


def _temporal(part: dict[str, Any] | nn.Module | None) -> Any:
    if isinstance(part, nn.Module):
        return part
    published = part is None or part.get("type") == "VAE_Temporal_SD"
    return (VAE_Temporal_SD if published else VAE_Temporal)(**_options(part))


def OpenSoraVAE_V1_2(**kwargs: Any) -> VideoAutoencoderPipeline:
    """The published 1.2 autoencoder: SD's per-frame layout, 17-frame chunks, its latent statistics."""
    return VideoAutoencoderPipeline(
        **{
            "micro_frame_size": 17, "micro_batch_size": 4,
            "shift": (-0.10, 0.34, 0.27, 0.98), "scale": (3.85, 2.32, 2.33, 3.06), **kwargs,
        }
    )  # fmt: skip
