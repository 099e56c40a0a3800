"""Wrong files of the kinds that people pass around: adapters, quantised weights, GGUF, hub folders; and conditions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.wrong_inputs.mutations import as_json, damaged, mutated

SMALL = ["--image-size", "16", "24", "--num-frames", "5", "--steps", "1", "--seed", "1"]
PROMPT = "a red circle moving right on a black background"
PEFT = "lora-peft"
LAYOUTS = ("lora-diffusers", "lora-comfyui", "lora-kohya", PEFT)
CONDITIONS = (
    "aes >= 5 and 2 < flow < 30", "not (height == 144) or text != ''", "path in ('a', 'b')", "fps % 2 == 0",
    "num_frames / 2 > 9",
)  # fmt: skip


def some_bytes(data: st.DataObject, file: Path) -> None:
    file.write_bytes(data.draw(damaged(file.read_bytes()), label=file.name))


def some_header(data: st.DataObject, file: Path) -> None:
    """Mistakes in what the header of a .safetensors file says, or in its bytes."""
    if data.draw(st.booleans(), label="bytes?"):
        return some_bytes(data, file)
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = as_json(data.draw(mutated(json.loads(content[8 : 8 + size])), label="header"))
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def some_values(data: st.DataObject, file: Path) -> None:
    """Mistakes in what a JSON file says."""
    file.write_bytes(as_json(data.draw(mutated(json.loads(file.read_text())), label=file.name)))


def adapter(data: st.DataObject, folder: Path) -> list[str]:
    layout = data.draw(st.sampled_from(LAYOUTS))
    source = folder / (layout if layout == PEFT else f"{layout}.safetensors")
    if layout != PEFT:
        some_header(data, source)
    elif data.draw(st.booleans(), label="config?"):
        some_values(data, source / "adapter_config.json")
    else:
        some_header(data, source / "adapter_model.safetensors")
    if data.draw(st.booleans(), label="use?"):
        return ["generate", PROMPT, "--lora", source.name, "--save-dir", "made", *SMALL]
    return ["convert", source.name, "changed.safetensors", "--to", "lora-kohya", "--config", "embedded"]


def packed_weights(data: st.DataObject, folder: Path) -> list[str]:
    if data.draw(st.booleans(), label="config?"):
        some_values(data, folder / "int8/config.json")
    else:
        some_header(data, folder / "int8/model.safetensors")
    return ["generate", PROMPT, "--text-encoder-path", "int8", "--save-dir", "made", *SMALL]


def gguf_file(data: st.DataObject, folder: Path) -> list[str]:
    some_bytes(data, folder / "t5.gguf")
    if data.draw(st.booleans(), label="inspect?"):
        return ["inspect", "t5.gguf"]
    return ["generate", PROMPT, "--text-encoder-path", "t5.gguf", "--save-dir", "made", *SMALL]


def hub_folder(data: st.DataObject, folder: Path) -> list[str]:
    file = data.draw(st.sampled_from(("model_index.json", "scheduler/scheduler_config.json", "vae/config.json")))
    some_values(data, folder / "hub" / file)
    return ["plan", PROMPT, "--model", "hub", *SMALL]


def condition(data: st.DataObject, folder: Path) -> list[str]:
    text = data.draw(st.sampled_from(CONDITIONS))
    if data.draw(st.booleans(), label="characters?"):
        text = data.draw(damaged(text.encode())).decode(errors="replace").replace("\0", " ")
    else:
        words = text.split()
        places = data.draw(st.lists(st.integers(0, len(words) - 1), max_size=3))
        for place in places:
            words[place] = data.draw(
                st.sampled_from(("(", ")", "**", "__import__", "9" * 400, "x.y", "[0]", "lambda:", "''", "nan"))
            )
        text = " ".join(words)
    return ["data", "edit", "videos.csv", "--where", text, "--output", "kept.csv"]


MAKERS: dict[str, tuple[str, Callable[[st.DataObject, Path], list[str]]]] = {
    "adapter": ("adapters", adapter),
    "packed weights": ("packed", packed_weights),
    "GGUF": ("gguf", gguf_file),
    "hub folder": ("hub", hub_folder),
    "condition on rows": ("tables", condition),
}  # base folder, and what makes a case in a copy of it


def make_bases(root: Path, run: Callable[[list[str], Path], dict[str, Any]]) -> None:
    """Folders with right files of these kinds."""
    from opensora.checkpoints.hub import locate
    from tests.gguf_files import write_t5_gguf
    from tests.lora_files import embedded_lora

    for name in ("adapters", "packed", "gguf", "hub"):
        (root / name).mkdir()
    embedded_lora(root / "adapters" / "lora-diffusers.safetensors")
    commands = [
        (["convert", "lora-diffusers.safetensors", name if name == PEFT else f"{name}.safetensors", "--to", name,
          "--config", "embedded"], root / "adapters")
        for name in LAYOUTS[1:]
    ]  # fmt: skip
    commands.append((["convert", "embedded:text_encoder", "int8", "--to", "int8"], root / "packed"))
    commands.append((["export", "embedded", "hub", "--to", "hub", "--license", "apache-2.0"], root / "hub"))
    for arguments, folder in commands:
        done = run(arguments, folder)
        assert done["status"] == 0, done["told"]
    shutil.rmtree(root / "hub/hub/samples", ignore_errors=True)
    encoder = locate("embedded:text_encoder")
    write_t5_gguf(encoder, root / "gguf/t5.gguf", "Q8_0", json.loads((encoder / "config.json").read_text()))
