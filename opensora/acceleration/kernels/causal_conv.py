"""Causal 3-D convolutions as sums of 2-D convolutions, one for each frame of the kernel, for a CPU.

PyTorch's 3-D convolutions are slow there. In half precision the sum would be rounded frame by frame.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from opensora.acceleration.replace_modules import recast
from opensora.models.vae.vae_temporal import CausalConv3d, TimeUpsample


class FoldedTime(CausalConv3d):
    """x [B, C, T, H, W] -> [B, O, T', H, W] without padding frames; autograd works as usual."""

    def convolve(self, x: Tensor) -> Tensor:
        side, past, taps = self.kernel // 2, self.past, self.conv.weight.unbind(2)
        frames, count = x.transpose(1, 2).contiguous(), (x.shape[2] + past - self.kernel) // self.time_stride + 1
        out: Tensor | None = None
        for tap in reversed(range(self.kernel)):  # the newest frame first: it is never padding
            skipped = max(0, -(-(past - tap) // self.time_stride))  # outputs for which this tap sees padding
            seen = frames[:, skipped * self.time_stride + tap - past :: self.time_stride][:, : count - skipped]
            if seen.shape[1]:
                bias = self.conv.bias if out is None else None
                part = F.conv2d(seen.flatten(0, 1), taps[tap], bias, padding=side).unflatten(0, seen.shape[:2])
                if out is None:
                    out = part
                else:
                    out[:, skipped:] += part
        assert out is not None, "a clip has at least one frame"
        return out.transpose(1, 2)


class FoldedCausalConv3d(FoldedTime):
    """A causal convolution, computed frame by frame of its kernel."""


class FoldedTimeUpsample(FoldedTime, TimeUpsample):
    """The convolution that doubles the frames, computed frame by frame of its kernel."""


FOLDED_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    CausalConv3d: FoldedCausalConv3d,
    TimeUpsample: FoldedTimeUpsample,
}


def folded_causal_conv(module: nn.Module) -> nn.Module:
    """The folded version of a causal convolution; other modules are returned."""
    kind = FOLDED_MODULES.get(type(module))
    return module if kind is None else recast(module, kind)
