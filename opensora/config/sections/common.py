"""What the sections of a configuration have in common: kinds of values, keys without arguments, the base class."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from opensora.config.schema import FilePath, Int, Name, Number, Positive, Schema

# Bounds that no real model, sampler or clip exceeds.
MAX_PARAMETERS = 10**13
MAX_SIDE = 8192  # pixels
MAX_FRAMES = 100_000
MAX_STEPS = 10_000

Width = Annotated[Positive, Field(le=65_536)]  # channels
Depth = Annotated[Positive, Field(le=256)]  # layers
Tokens = Annotated[Positive, Field(le=65_536)]
Frames = Annotated[Positive, Field(le=MAX_FRAMES)]
Side = Annotated[Positive, Field(le=MAX_SIDE)]
Steps = Annotated[Positive, Field(le=MAX_STEPS)]
Scale = Annotated[Number, Field(gt=0, le=1e6)]
Guidance = Annotated[Number, Field(ge=0, le=1e6)]
Real = Int | Number


def arg(default: Any, meaning: str, example: Any = None) -> Any:
    """A field of a section: its default, what it means, and a value for the document (the default where None)."""
    return Field(default, description=meaning, examples=[default if example is None else example])


class Section(Schema):
    """A section: `dict(type=..., keyword=...)`. Keywords in `no_arguments` are not given to what `type` names."""

    no_arguments: ClassVar[frozenset[str]] = frozenset({"type"})

    type: Name = Field(description="what to build", examples=["rflow"])

    @classmethod
    def arguments(cls) -> set[str]:
        """The keywords that the builder takes."""
        return set(cls.model_fields) - cls.no_arguments

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The builder's own values of its keywords."""
        return {name: cls.model_fields[name].default for name in cls.arguments()}

    def together(self, *names: str) -> bool:
        """Whether the section gives all of these: what it leaves out, a checkpoint may say, until it is built."""
        return self.model_fields_set.issuperset(names)


class Loaded(Section):
    """A section of something that has weights."""

    no_arguments: ClassVar[frozenset[str]] = frozenset({
        "type", "from_pretrained", "subfolder", "strict", "local_files_only", "cache_dir", "force_huggingface",
        "enable_flash_attn", "enable_layernorm_kernel", "enable_sequence_parallelism", "shardformer",
    })  # fmt: skip

    from_pretrained: FilePath | None = arg(
        None, "its weights: a file, a folder or a hub id", "hpcai-tech/OpenSora-STDiT-v3"
    )
    subfolder: FilePath | None = arg(None, "folder of the hub repository that holds the weights", "vae")
    strict: bool = arg(True, "the weights must hold every tensor; without it, missing ones have initial values")
    local_files_only: bool = arg(False, "use what was downloaded before and never ask the hub")
    cache_dir: FilePath | None = arg(None, "folder of the hub's downloads in place of the usual one", "~/hub")
    force_huggingface: bool = arg(False, "accepted from older files; has no effect")
    enable_flash_attn: bool = arg(False, "accepted from older files; has no effect, the fastest attention is taken")
    enable_layernorm_kernel: bool = arg(False, "accepted from older files; has no effect")
    enable_sequence_parallelism: bool = arg(False, "accepted from older files; sp_size divides sequences")
    shardformer: bool = arg(False, "of t5 and clip: shard the weights over the ranks")
