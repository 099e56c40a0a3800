"""Schemas of a checkpoint's config.json. Unknown keys are ignored; sizes are bounded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from opensora.config.schema import Count, Number, Positive, Schema, Triple, as_tuple
from opensora.config.sections.common import MAX_PARAMETERS, Depth, Width
from opensora.config.sections.models import Heads

VocabSize = Annotated[Positive, Field(le=10_000_000)]
Span = Annotated[Positive, Field(le=1_000_000)]
TrainedSizes = Annotated[list[Triple[Annotated[Positive, Field(le=100_000)]]], Field(max_length=10_000)]


class ModelMetadata(Schema):
    """Keys of a model's config.json beside its keyword arguments."""

    model_config = ConfigDict(extra="ignore")

    trained_sizes: TrainedSizes = Field([])


class _TextModel(Schema):
    model_config = ConfigDict(extra="ignore")

    def parameters(self) -> int:
        raise NotImplementedError

    @model_validator(mode="after")
    def _fit(self) -> Any:
        if self.parameters() > MAX_PARAMETERS:
            raise ValueError(f"it describes {self.parameters():.0e} parameters; at most {MAX_PARAMETERS:.0e} are built")
        return self


class T5Config(_TextModel):
    """config.json of T5, with transformers' defaults."""

    vocab_size: VocabSize = 32_128
    d_model: Width = 512
    d_kv: Width = 64
    d_ff: Annotated[Positive, Field(le=1_000_000)] = 2_048
    num_layers: Depth = 6
    num_heads: Heads = 8
    relative_attention_num_buckets: Annotated[Span, Field(ge=4)] = 32
    relative_attention_max_distance: Span = 128
    layer_norm_epsilon: Annotated[Number, Field(gt=0)] = 1e-6
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"

    @model_validator(mode="after")
    def _distances_grow(self) -> Any:
        if 4 * self.relative_attention_max_distance <= self.relative_attention_num_buckets:
            raise ValueError("relative_attention_max_distance must be more than relative_attention_num_buckets / 4")
        return self

    def parameters(self) -> int:
        layers = 4 * self.d_model * self.d_kv * self.num_heads + 3 * self.d_model * self.d_ff
        return self.vocab_size * self.d_model + self.num_layers * layers


class CLIPTextConfig(_TextModel):
    """config.json of CLIP's text encoder."""

    vocab_size: VocabSize = 49_408
    hidden_size: Width = 512
    intermediate_size: Annotated[Positive, Field(le=1_000_000)] = 2_048
    num_hidden_layers: Depth = 12
    num_attention_heads: Heads = 8
    max_position_embeddings: Span = 77

    def parameters(self) -> int:
        layers = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        return (self.vocab_size + self.max_position_embeddings) * self.hidden_size + self.num_hidden_layers * layers


class CLIPConfig(Schema):
    """config.json of CLIP; `text_config` holds that of the text encoder."""

    model_config = ConfigDict(extra="ignore")

    text_config: CLIPTextConfig | None = None


class CLIPVisionConfig(_TextModel):
    """config.json of CLIP's image encoder."""

    hidden_size: Width = 768
    intermediate_size: Annotated[Positive, Field(le=1_000_000)] = 3_072
    num_hidden_layers: Depth = 12
    num_attention_heads: Heads = 12
    image_size: Annotated[Positive, Field(le=1_024)] = 224
    patch_size: Annotated[Positive, Field(le=1_024)] = 32

    def parameters(self) -> int:
        layers = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        positions = (self.image_size // self.patch_size) ** 2
        return (positions + 3 * self.patch_size**2) * self.hidden_size + self.num_hidden_layers * layers


class CLIPImageTextConfig(Schema):
    """config.json of CLIP with both of its encoders."""

    model_config = ConfigDict(extra="ignore")

    text_config: CLIPTextConfig
    vision_config: CLIPVisionConfig
    projection_dim: Width = 512


class TokenizerConfig(Schema):
    """tokenizer_config.json of T5 or CLIP."""

    model_config = ConfigDict(extra="ignore")

    extra_ids: Annotated[Count, Field(le=1_000)] = 100


class _Unigram(Schema):
    model_config = ConfigDict(extra="ignore")

    type: Literal["Unigram"]
    vocab: list[Annotated[tuple[str, float], as_tuple]]  # pieces and their scores


class _AddedToken(Schema):
    model_config = ConfigDict(extra="ignore")

    content: str


class UnigramTokenizer(Schema):
    """tokenizer.json of T5; a normalizer may hold a compiled character map."""

    model_config = ConfigDict(extra="ignore")

    model: _Unigram
    normalizer: dict[str, Any] | None = None
    added_tokens: list[_AddedToken] = Field([])
