"""Base classes and value types of the sections."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from opensora.config.schema import FilePath, Int, Name, Number, Positive, Schema

# Upper bounds beyond any real model, sampler or clip.
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


def arg(default: Any, doc: str, example: Any = None) -> Any:
    """A field of a section: default, documentation, and an example (None: the default)."""
    return Field(default, description=doc, examples=[default if example is None else example])


class Section(Schema):
    """A section: `dict(type=..., keyword=...)`. The component is built without the keywords in `not_passed`."""

    not_passed: ClassVar[frozenset[str]] = frozenset({"type"})

    type: Name = Field(description="component to build", examples=["rflow"])

    @classmethod
    def arguments(cls) -> set[str]:
        """The keyword arguments of the component."""
        return set(cls.model_fields) - cls.not_passed

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The default keyword arguments of the component."""
        return {name: cls.model_fields[name].default for name in cls.arguments()}

    def gives(self, *names: str) -> bool:
        """Whether the section gives all these keywords; omitted ones may still come from a checkpoint."""
        return self.model_fields_set.issuperset(names)


class Loaded(Section):
    """A section of a component with weights."""

    not_passed: ClassVar[frozenset[str]] = frozenset({
        "type", "from_pretrained", "subfolder", "strict", "local_files_only", "cache_dir", "force_huggingface",
        "enable_flash_attn", "enable_layernorm_kernel", "enable_sequence_parallelism", "shardformer",
    })  # fmt: skip

    from_pretrained: FilePath | None = arg(None, "weights: file, folder or hub id", "hpcai-tech/OpenSora-STDiT-v3")
    subfolder: FilePath | None = arg(None, "subfolder of the hub repository", "vae")
    strict: bool = arg(True, "require every tensor; False: missing ones keep their initial values")
    local_files_only: bool = arg(False, "use the hub cache only")
    cache_dir: FilePath | None = arg(None, "hub cache folder", "~/hub")
    force_huggingface: bool = arg(False, "accepted without effect")
    enable_flash_attn: bool = arg(False, "accepted without effect; the fastest attention is always used")
    enable_layernorm_kernel: bool = arg(False, "accepted without effect")
    enable_sequence_parallelism: bool = arg(False, "accepted without effect; sp_size enables sequence parallelism")
    shardformer: bool = arg(False, "t5 and clip: shard the weights over the ranks")
