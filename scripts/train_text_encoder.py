"""Train the embedded model's text encoder: a small T5 and its tokenizer, from the captions of the rendered clips.

From the features of every token alone, linear heads must tell the caption's shape, colour, motion and background, so
that whatever token a video model looks at carries the meaning of the sentence. Takes about three minutes on a CPU.
"""

from __future__ import annotations

import io
import json
import math
import string
import sys
from pathlib import Path

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
from opensora.datasets.synthetic import render
from opensora.models.text_encoder.t5 import T5Encoder

VOCAB_SIZE, BATCH_SIZE = 512, 128
ATTRIBUTES = {
    "shape": render.SHAPES, "colour": tuple(render.COLOURS), "motion": tuple(render.MOTIONS),
    "background": tuple(render.BACKGROUNDS),
}  # fmt: skip
SIZES = tuple(map(len, ATTRIBUTES.values()))
# A prompt that leaves something out means this.
DEFAULTS = {"colour": "white", "motion": "standing still", "background": "black"}
SHORT_PHRASINGS = (
    "a {colour} {shape} {motion}",
    "the {shape} is {motion} and it is {colour}",
    "a {colour} {shape} on a {background} background",
    "{colour} {shape}, {background} background",
    "a {shape} {motion} on a {background} background",
    "a {colour} {shape}",
    "{shape} {motion}",
)
SYNONYMS = {"circle": ("ball", "disc"), "square": ("box", "block"), "gray": ("grey",), "purple": ("violet",)}
FILLERS = {"a", "an", "the", "one", "of", "on", "in", "is", "and", "it", "video", "against", "front", "to"}
PLAIN_WORDS = """
about after again air all along animal another any are around as at away back bad be beautiful because before behind
best better between big bird boat body book both boy bright but by camera can car cat change child cinematic city clear
close cloud cold come could day deep detail different do dog door down each earth end even every eye face far fast few
field film fire first fish flower fly food for forest from full game girl give go good great ground group hand happy
has have he head her high hill his home horse hot house how into just kind lake land large last leaf left life light
like line little live long look made make man many me moon more morning most mountain move much music near new next
night no now ocean off old only or other our out over own paper park people person photo picture place plant play
point quiet rain really right river road rock room round run sand sea see shadow she shot side simple sky sleep slow
slowly small smooth snow so soft some song sound space star still stone storm street style summer sun sunset sweet
table tall than that their them then there they thing this time tiny top town toy train travel tree turn two under up
very view walk wall warm was water wave way we wide wild wind window winter with wood word world year you young
"""
# Words inserted as noise must not tell of an attribute themselves.
NOISE_WORDS = sorted(set(PLAIN_WORDS.split()) - {"up", "down", "left", "right", "still", "round", "no"})


def draw_caption(rng: np.random.Generator, held_out: bool = False, plain: bool = False) -> tuple[str, tuple[int, ...]]:
    """A caption and the index of each of its attributes; `plain` gives it just as the clips have it."""
    scene = render.draw_scene(rng, 64, 64, held_out)
    values = {name: getattr(scene, name) for name in ATTRIBUTES}
    phrasing = render.PHRASINGS[rng.integers(len(render.PHRASINGS))]
    if not plain and rng.random() < 0.15:
        phrasing = SHORT_PHRASINGS[rng.integers(len(SHORT_PHRASINGS))]
        values |= {name: value for name, value in DEFAULTS.items() if f"{{{name}}}" not in phrasing}
    motions = render.MOTIONS[scene.motion][0]
    text = render.caption(scene, phrasing, motions[rng.integers(len(motions))]).lower()
    text = text if plain else roughen(text, rng)
    return text, tuple(ATTRIBUTES[name].index(value) for name, value in values.items())


def roughen(text: str, rng: np.random.Generator) -> str:
    """The caption with some filler words dropped or replaced, words added, and synonyms: the meaning stays."""
    words = []
    for word in text.split():
        bare = word.rstrip(",")
        if bare in SYNONYMS and rng.random() < 0.15:
            word = word.replace(bare, SYNONYMS[bare][rng.integers(len(SYNONYMS[bare]))])
        if word not in FILLERS or rng.random() > 0.1:
            words.append(word)
        if word in FILLERS and rng.random() < 0.05:
            words.append(NOISE_WORDS[rng.integers(len(NOISE_WORDS))])
    return " ".join(words) + ("." if rng.random() < 0.1 else "")


def train_tokenizer(folder: Path, seed: int) -> None:
    """Write spiece.model (unigram, T5's special ids) and tokenizer_config.json."""
    import sentencepiece

    rng = np.random.default_rng((seed, 0))
    lines = [draw_caption(rng)[0] for _ in range(8000)]
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


def train_encoder(folder: Path, steps: int, seed: int) -> None:
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
    heads = nn.Linear(config.d_model, sum(SIZES))
    parameters = [p for p in (*model.parameters(), *heads.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    rng = np.random.default_rng((seed, 1))
    progress = tqdm(range(steps), desc="text encoder", mininterval=1.0)
    for step in progress:
        texts, labels = zip(*(draw_caption(rng) for _ in range(BATCH_SIZE)), strict=True)
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
    report("as in the clips", encoder, heads, seed, plain=True)
    report("held-out combinations", encoder, heads, seed, plain=True, held_out=True)
    report("roughened", encoder, heads, seed)


def attribute_loss(heads: nn.Linear, features: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the attributes [B, 4] told by each real token of `features` [B, L, C], plus by their mean."""
    weight = mask / mask.sum(1, keepdim=True)  # [B, L], every caption weighs the same
    per_token = heads(features).split(SIZES, dim=-1)
    pooled = heads((features * weight[..., None]).sum(1)).split(SIZES, dim=-1)
    loss = features.new_zeros(())
    for i, (token_logits, mean_logits) in enumerate(zip(per_token, pooled, strict=True)):
        target = labels[:, i, None].expand_as(mask)
        token_loss = F.cross_entropy(token_logits.transpose(1, 2), target, reduction="none", label_smoothing=0.05)
        loss = loss + (token_loss * weight).sum(1).mean() + F.cross_entropy(mean_logits, labels[:, i])
    return loss


@torch.no_grad()
def report(title: str, encoder: T5Encoder, heads: nn.Linear, seed: int, **drawing: bool) -> None:
    """Print how often the tokens of 1,000 fresh captions tell each attribute, and the size of the features."""
    rng = np.random.default_rng((seed, 2))
    texts, labels = zip(*(draw_caption(rng, **drawing) for _ in range(1000)), strict=True)
    features, mask = encoder.encode(list(texts))
    real, lengths = features[:, 0][mask.bool()], mask.sum(1)
    target = torch.tensor(labels).repeat_interleave(lengths, dim=0)  # [tokens, 4]
    logits = heads(real).split(SIZES, dim=-1)
    hits = [(part.argmax(-1) == target[:, i]).float().mean().item() for i, part in enumerate(logits)]
    words = ", ".join(f"{name} {hit:.4f}" for name, hit in zip(ATTRIBUTES, hits, strict=True))
    rms, mean = real.square().mean().sqrt(), lengths.float().mean()
    print(f"{title}: {words}; RMS {rms:.3f}; {lengths.min()} to {lengths.max()} tokens, mean {mean:.1f}")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(render.__file__).parents[2] / "embedded" / "text_encoder")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    train_tokenizer(args.output, args.seed)
    train_encoder(args.output, args.steps, args.seed)


if __name__ == "__main__":
    sys.exit(run_program(main))
