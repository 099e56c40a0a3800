"""Training an adapter of the embedded model against full fine-tuning: time of a step and memory of the training state.

python -m benchmarks.lora [--batch 8] [--rank 6] [--repeats 5] [--threads N] [--output results]

Both sides have the same clips, noise and float32 arithmetic, and take turns. Memory is counted: weights, gradients,
Adam's moments, EMA, and what the backward pass keeps of the forward pass.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import common
from opensora.checkpoints import builder
from opensora.models.lora import LoRAConfig, add_adapter
from opensora.models.sizes import size_conditioning
from opensora.schedulers.rf import RFLOW

LATENT, SIZE, TOKENS = (5, 8, 8), (17, 64, 64), 32  # of a clip, which the embedded model was trained on
MODEL = {"type": "STDiT3", "from_pretrained": "embedded:stdit3"}


class Side:
    """Calls take a training step of the embedded model: of all its weights, or of an adapter of this rank."""

    def __init__(self, batch: int, rank: int | None) -> None:
        self.model, _ = builder.load_component(MODEL, "model", torch.device("cpu"), torch.float32)
        self.model.train().requires_grad_(rank is None)
        if rank is not None:
            add_adapter(self.model, "default", LoRAConfig(rank=rank))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.ema = [parameter.detach().clone() for parameter in self.trained]
        self.loss = partial(RFLOW(sample_method="logit-normal").training_loss, self.model, *_clips(batch))
        self.gradients = self.kept = 0

    def __call__(self) -> None:
        frames, height, width = SIZE
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        generator = torch.Generator().manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.loss(height=height, width=width, num_frames=frames, mask=None, generator=generator).mean()
        loss.backward()
        self.gradients = sum(parameter.grad.nbytes for parameter in self.trained if parameter.grad is not None)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.ema, [parameter.detach() for parameter in self.trained], 0.01)
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        self.kept = sum(size for storage, size in kept.items() if storage not in own)

    def memory(self) -> dict[str, int]:
        """Bytes of each part of the training state, after a step."""
        moments = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return {
            "weights": bytes_of(self.model), "gradients": self.gradients, "moments": sum(one.nbytes for one in moments),
            "ema": sum(one.nbytes for one in self.ema), "activations": self.kept,
        }  # fmt: skip


def bytes_of(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _clips(batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents [B, 8, T', H / 8, W / 8] and conditioning, random."""
    generator = torch.Generator().manual_seed(0)
    frames, *size = SIZE
    sizes = size_conditioning("STDiT2", batch, tuple(size), frames, 24)
    x, y = torch.randn(batch, 8, *LATENT, generator=generator), torch.randn(batch, 1, TOKENS, 128, generator=generator)
    return x, {"y": y, **sizes}


def main() -> None:
    given = common.arguments(__doc__, batch=8, rank=6)
    sides = {"full": Side(given.batch, None), "adapter": Side(given.batch, given.rank)}
    times = common.race(sides, given.repeats)
    memory = {name: side.memory() for name, side in sides.items()}
    state = {name: sum(size for part, size in one.items() if part != "activations") for name, one in memory.items()}
    rounds = zip(times["full"]["all_cpu_seconds"], times["adapter"]["all_cpu_seconds"], strict=True)
    report = {"times": times, "memory": memory}
    report["summary"] = {
        "step, adapter of full": sorted(adapter / full for full, adapter in rounds),
        "state, adapter of full": state["adapter"] / state["full"],
        "with activations": sum(memory["adapter"].values()) / sum(memory["full"].values()),
    }
    bars = {part: {name: one[part] / 1e6 for name, one in memory.items()} for part in memory["full"]}
    common.save("lora", report, bars, given.output, "MB")


if __name__ == "__main__":
    main()
