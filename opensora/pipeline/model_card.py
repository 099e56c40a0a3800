"""The model card of a hub folder: README.md with the hub's front matter."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opensora.checkpoints.summary import Summary
from opensora.config.hub_folder import FOLDERS
from opensora.errors import ConfigError
from opensora.pipeline.recipe import read_recipe

SAMPLES = "samples"  # folder of the samples
FLAGS = ("seed", "num_frames", "image_size", "resolution", "aspect_ratio", "fps")  # of a sample's command
SAMPLER_FLAGS = ("num_sampling_steps", "cfg_scale")


class CardFacts(NamedTuple):
    """What a card says beside the models: license and base as hub ids, the training configuration, samples to show."""

    license: str = "other"
    base_model: str | None = None
    training: Path | None = None
    samples: Sequence[Path] = ()


def model_card(
    name: str, config: Mapping[str, Any], summaries: Mapping[str, Summary], facts: CardFacts, folder: Path
) -> str:
    """The text of the card; copies the samples into `folder`.

    Raises ConfigError, and MediaError for samples without a recipe.
    """
    for what, value in {"license": facts.license, "base model": facts.base_model or "a"}.items():
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
            raise ConfigError(f"the {what} is {value[:80]!r}; give its id on the hub, such as apache-2.0 or org/name")
    rows = [
        f"| `{FOLDERS[part]}/` | {config[part]['type']} | {one.parameters:,} | {'/'.join(one.dtypes)} | {one.sha256} |"
        for part, one in summaries.items()
    ]
    return "\n".join([
        *_front_matter(facts), "", f"# {_plain(name)}", "",
        f"Makes videos from text with [opensora](https://pypi.org/project/opensora/): model {config['model']['type']}, "
        f"sampler {config['scheduler']['type']}.", "",
        "## Use", "", "```bash", f"hf download ORG/{_plain(name)} --local-dir {_plain(name)}",
        f'opensora generate "a prompt" --model {_plain(name)} --output video.mp4', "```", "",
        "```python", "import opensora", "", f'pipe = opensora.load("{_plain(name)}")',
        'pipe("a prompt").save("video.mp4")', "```", "",
        "## Models", "", "| folder | type | parameters | numbers | SHA-256 of the weights |", "|---|---|---|---|---|",
        *rows, "",
        "## Training", "", *_training(facts.training), "",
        *_samples(name, facts.samples, folder),
        "## Upload", "", "```bash", f"hf upload ORG/{_plain(name)} {_plain(name)}", "```", "",
    ])  # fmt: skip


def _front_matter(facts: CardFacts) -> list[str]:
    stated = {"library_name": "opensora", "pipeline_tag": "text-to-video", "license": facts.license}
    stated |= {"base_model": facts.base_model} if facts.base_model else {}
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in stated.items()), "---"]


def _training(file: Path | None) -> list[str]:
    if file is None:
        return ["Not stated."]
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as a configuration ({type(error).__name__}); give a file") from error
    return ["The configuration that `opensora train` ran:", "", "````python", text.rstrip().replace("````", ""), "````"]


def _samples(name: str, files: Sequence[Path], folder: Path) -> list[str]:
    """Each sample with the command that makes it."""
    lines = ["## Samples", ""] if files else []
    for file in files:
        settings = read_recipe(file)["settings"]
        (folder / SAMPLES).mkdir(exist_ok=True)
        if (folder / SAMPLES / file.name).exists():
            raise ConfigError(f"{file}: another sample has this name; rename one")
        shutil.copyfile(file, folder / SAMPLES / file.name)
        lines += [f"[{_plain(file.name)}]({SAMPLES}/{_plain(file.name)}):", "", "```bash"]
        lines += [_command(settings, name), "```", ""]
    return lines


def _command(settings: Mapping[str, Any], name: str) -> str:
    """The command of a recipe, on one line."""
    prompts = settings.get("prompt") or [""]
    words = ["opensora", "generate", " ".join(str(prompts[0]).split()), "--model", _plain(name)]
    stated = {flag: settings.get(flag) for flag in FLAGS}
    stated |= {flag: (settings.get("scheduler") or {}).get(flag) for flag in SAMPLER_FLAGS}
    for flag, value in stated.items():
        if value is not None:
            words += [f"--{flag.replace('_', '-')}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return " ".join(map(shlex.quote, words))


def _plain(name: str) -> str:
    """A file name without characters that mean something in Markdown or a shell."""
    return re.sub(r"[^\w.-]", "_", name)
