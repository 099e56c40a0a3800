"""The building blocks of the transformers against the recorded ones."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from opensora.models.layers.attention import (
    CrossAttention,
    RMSNorm,
    SelfAttention,
    rotate,
    rotation_table,
    unpack_text,
)
from opensora.models.layers.embeddings import (
    CaptionEmbedder,
    PatchEmbed3D,
    SizeEmbedder,
    TimestepEmbedder,
    position_embedding_2d,
    sincos_1d,
    sincos_2d,
    sinusoid,
)
from tests.parity.cases import Case, discover, part

Tensors = dict[str, Tensor]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def check_attention(facts: dict, tensors: Tensors) -> None:
    for row in facts["cases"]:
        module = SelfAttention(row["dim"], row["num_heads"], row["qk_norm"], row["qk_norm_legacy"])
        weights = part(tensors, row["weights_prefix"])
        freqs = next((weights.pop(name) for name in list(weights) if name.endswith("freqs")), None)
        module.load_state_dict(weights)
        x = tensors[row["x"]]
        if row["rope"] and freqs is None:
            head = row["dim"] // row["num_heads"]
            freqs = 10000.0 ** -(torch.arange(0, head, 2) / head)
        close(module(x, rotation_table(freqs, x.shape[1]) if row["rope"] else None), tensors[row["out"]])


def check_cross_attention(facts: dict, tensors: Tensors) -> None:
    for row in facts["cases"]:
        module = CrossAttention(row["dim"], row["num_heads"])
        module.load_state_dict(part(tensors, row["weights_prefix"]))
        y, keep = unpack_text(tensors[row["cond"]], row["lengths"])
        close(module(tensors[row["x"]], y, keep), tensors[row["out"]])


def check_caption_embedder(facts: dict, tensors: Tensors) -> None:
    module = CaptionEmbedder(facts["in_channels"], facts["hidden_size"], facts["token_num"]).eval()
    module.load_state_dict(part(tensors, "weights/"))
    y = tensors["y"]
    close(module(y), tensors["out"])
    close(module(y, drop=tensors["force_drop_ids"] == 1), tensors["out_forced_drop"])
    null = module.null_like(y).expand_as(y)
    close(null, tensors["null_y"])
    close(module(null), tensors["null_out"])


def check_patch_embed(facts: dict, tensors: Tensors) -> None:
    for row in facts["cases"]:
        module = PatchEmbed3D(tuple(row["patch_size"]), row["in_channels"], row["embed_dim"])
        module.load_state_dict(part(tensors, row["weights_prefix"]))
        close(module(tensors[row["x"]]).flatten(1, 2), tensors[row["out"]])


def check_position_embedding_2d(facts: dict, tensors: Tensors) -> None:
    for row in facts["cases"]:
        found = position_embedding_2d(facts["dim"], row["h"], row["w"], row["scale"], row["base_size"])
        close(found, tensors[row["out"]])


def check_rms_norm(facts: dict, tensors: Tensors) -> None:
    for row in facts["cases"]:
        module = RMSNorm(len(tensors[row["weight"]]), facts["eps"])
        module.load_state_dict({"weight": tensors[row["weight"]]})
        close(module(tensors[row["x"]]), tensors[row["out"]])
        close(module.bfloat16()(tensors[row["x_bf16"]]), tensors[row["out_bf16"]])


def check_rotary(facts: dict, tensors: Tensors) -> None:
    for row in facts["cases"]:
        x = tensors[row["x"]]  # [batch, heads, sequence, head_dim]
        table = rotation_table(tensors[row["freqs"]], x.shape[2])
        close(rotate(x.transpose(1, 2), table).transpose(1, 2), tensors[row["out"]])


def check_sincos(facts: dict, tensors: Tensors) -> None:
    for row in facts["cases"]:
        if row["kind"] == "1d":
            found = sincos_1d(facts["dim_1d"], torch.arange(row["length"], dtype=torch.float64) / row["scale"])
        elif row["kind"] == "2d":
            size = row["grid_size"]
            height, width = (size, size) if isinstance(size, int) else size
            found = sincos_2d(facts["dim_2d"], height, width, row["scale"], row["base_size"])
        else:
            raise NotImplementedError(row["kind"])
        close(found, tensors[row["out"]])


def check_size_embedder(facts: dict, tensors: Tensors) -> None:
    module = SizeEmbedder(facts["hidden_size"])
    module.load_state_dict(part(tensors, "weights/"))
    for call in facts["calls"]:
        close(module(tensors[call["s"]], call["batch_size"]), tensors[call["out"]])


def check_timestep_embedder(facts: dict, tensors: Tensors) -> None:
    module = TimestepEmbedder(facts["hidden_size"], facts["frequency_embedding_size"])
    module.load_state_dict(part(tensors, "weights/"))
    t = tensors["t"]
    close(module(t), tensors["out"])
    found, small = sinusoid(t, facts["frequency_embedding_size"]), t <= 10
    close(found[small], tensors["freq"][small])
    close(found, tensors["freq"], 2.0**-14)  # one unit in the last place of the largest angle: exp rounds by processor
    for name in tensors:
        if other := re.fullmatch(r"freq_(?:odd_)?dim([0-9]+)(?:_max_period([0-9]+))?", name):
            period = {"max_period": int(other[2])} if other[2] else {}
            close(sinusoid(t, int(other[1]), **period), tensors[name])
        else:
            assert name in ("t", "out", "freq") or name.startswith("weights/"), name


CHECKS = {
    "self-attention": check_attention,
    "cross-attention": check_cross_attention,
    "CaptionEmbedder": check_caption_embedder,
    "3-D patch": check_patch_embed,
    "PositionEmbedding2D": check_position_embedding_2d,
    "RMS norm": check_rms_norm,
    "rotary": check_rotary,
    "numpy sin-cos": check_sincos,
    "SizeEmbedder": check_size_embedder,
    "TimestepEmbedder": check_timestep_embedder,
}


@pytest.mark.parametrize("case", discover("embeddings"), ids=str)
@torch.no_grad()
def test_component(case: Case) -> None:
    component = case.facts["component"]
    check = next(check for start, check in CHECKS.items() if component.startswith(start))
    check(case.facts, case.tensors())
