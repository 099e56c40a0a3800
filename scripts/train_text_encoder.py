"""Train the embedded model's text encoder: a small T5 and its tokenizer, from the captions of the rendered clips.

From the features of every token alone, linear heads must tell each attribute of the caption (thing, colour, motion,
...), so that whatever token a video model looks at carries the meaning of the sentence. Takes minutes on a CPU.
"""

from __future__ import annotations

import io
import json
import math
import string
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from opensora.acceleration.device import HOST
from opensora.checkpoints import builder
from opensora.checkpoints.tokenizer import load_t5_tokenizer
from opensora.cli.parser import Parser
from opensora.cli.program import run_program
from opensora.datasets.synthetic import labelled_captions as shapes
from opensora.datasets.synthetic.labelled_captions import PLAIN_WORDS
from opensora.datasets.synthetic.world import labelled_captions as world
from opensora.models.text_encoder.t5 import T5Encoder

VOCAB_SIZE, BATCH_SIZE = 512, 128
CAPTIONS: dict[str, ModuleType] = {"shapes": shapes, "world": world}  # each with ATTRIBUTES and draw_caption
STEPS = {"shapes": 1000, "world": 4000}


def train_tokenizer(captions: ModuleType, folder: Path, seed: int) -> None:
    """Write spiece.model (unigram, T5's special ids) and tokenizer_config.json."""
    import sentencepiece

    rng = np.random.default_rng((seed, 0))
    lines = [captions.draw_caption(rng)[0] for _ in range(8000)]
    # The trainer proposes only pieces that it meets in two different words, so each word comes with a comma as well.
    words = sorted({word.strip(",.") for line in lines for word in line.split()} | set(PLAIN_WORDS.split()))
    lines += [" ".join(words), ", ".join(words)] * 40
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="unigram",
        vocab_size=VOCAB_SIZE, hard_vocab_limit=False, character_coverage=1.0,
        required_chars=string.ascii_lowercase + string.digits + string.punctuation,
        normalization_rule_name="nmt_nfkc_cf", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    described = {"extra_ids": 0, "tokenizer_class": "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")


def train_encoder(captions: ModuleType, folder: Path, steps: int, seed: int) -> None:
    """Train the T5 encoder on the folder's tokenizer; write config.json and model.safetensors; print accuracies."""
    from safetensors.torch import save
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer = load_t5_tokenizer(folder)
    # With dropout, telling a blue square from a dark blue background takes far longer to learn.
    config = T5Config(
        vocab_size=tokenizer.vocab_size, d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", architectures=["T5EncoderModel"],
    )  # fmt: skip
    model = T5EncoderModel(config).train()
    # Fixed at one, the last norm gives features with an RMS of one per token, whatever the training does.
    model.encoder.final_layer_norm.weight.requires_grad_(False)
    heads = Heads(config.d_model, captions.ATTRIBUTES)
    parameters = [p for p in (*model.parameters(), *heads.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    rng = np.random.default_rng((seed, 1))
    progress = tqdm(range(steps), desc="text encoder", mininterval=1.0)
    for step in progress:
        texts, labels = zip(*(captions.draw_caption(rng) for _ in range(BATCH_SIZE)), strict=True)
        rows = [torch.tensor(tokenizer.encode(text)) for text in texts]
        ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        features = model(ids, attention_mask=mask).last_hidden_state  # [B, L, C]
        loss = attribute_loss(heads, features, mask, torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    (folder / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    config.to_json_file(folder / "config.json")
    section = {"type": "t5", "from_pretrained": str(folder)}
    encoder, _ = builder.load_component(section, "text_encoder", HOST, torch.float32)
    report("as in the clips", captions, encoder, heads, seed, plain=True)
    report("held-out combinations", captions, encoder, heads, seed, plain=True, held_out=True)
    report("roughened", captions, encoder, heads, seed)


class Heads(nn.Linear):
    """Logits of each attribute's values, in a tuple, from features [..., C]."""

    def __init__(self, width: int, attributes: dict[str, tuple[str, ...]]) -> None:
        self.sizes = [len(values) for values in attributes.values()]
        super().__init__(width, sum(self.sizes))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return super().forward(features).split(self.sizes, dim=-1)


def attribute_loss(heads: Heads, features: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the attributes [B, N] told by each real token of `features` [B, L, C], plus by their mean."""
    weight = mask / mask.sum(1, keepdim=True)  # [B, L], every caption weighs the same
    per_token = heads(features)
    pooled = heads((features * weight[..., None]).sum(1))
    loss = features.new_zeros(())
    for i, (token_logits, mean_logits) in enumerate(zip(per_token, pooled, strict=True)):
        target = labels[:, i, None].expand_as(mask)
        token_loss = F.cross_entropy(token_logits.transpose(1, 2), target, reduction="none", label_smoothing=0.05)
        loss = loss + (token_loss * weight).sum(1).mean() + F.cross_entropy(mean_logits, labels[:, i])
    return loss


@torch.no_grad()
def report(title: str, captions: ModuleType, encoder: T5Encoder, heads: Heads, seed: int, **drawing: bool) -> None:
    """Print how often the tokens of 1,000 fresh captions tell each attribute, and the size of the features."""
    rng = np.random.default_rng((seed, 2))
    texts, labels = zip(*(captions.draw_caption(rng, **drawing) for _ in range(1000)), strict=True)
    features, mask = encoder.encode(list(texts))
    real, lengths = features[:, 0][mask.bool()], mask.sum(1)
    target = torch.tensor(labels).repeat_interleave(lengths, dim=0)  # [tokens, N]
    hits = [(part.argmax(-1) == target[:, i]).float().mean().item() for i, part in enumerate(heads(real))]
    words = ", ".join(f"{name} {hit:.4f}" for name, hit in zip(captions.ATTRIBUTES, hits, strict=True))
    rms, mean = real.square().mean().sqrt(), lengths.float().mean()
    print(f"{title}: {words}; RMS {rms:.3f}; {lengths.min()} to {lengths.max()} tokens, mean {mean:.1f}")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(shapes.__file__).parents[2] / "embedded" / "text_encoder")
    parser.add_argument("--captions", choices=tuple(CAPTIONS), default="shapes", help="which clips they belong to")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS['shapes']} (shapes) or {STEPS['world']} (world)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    captions = CAPTIONS[args.captions]
    train_tokenizer(captions, args.output, args.seed)
    train_encoder(captions, args.output, args.steps or STEPS[args.captions], args.seed)


if __name__ == "__main__":
    sys.exit(run_program(main))
