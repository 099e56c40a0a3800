"""The layers of docs/structure.md, held over the syntax tree of every module, so that nothing has to be imported."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# Imports point down: a package imports itself and what has a smaller number, nothing else.
LAYERS = {
    "scripts": 10,
    "tools": 10,
    "opensora.__main__": 10,
    "opensora.utils": 10,
    "opensora.cli": 9,
    "opensora.training": 8,
    "opensora.serving": 8,
    "opensora.pipeline": 7,
    "opensora.curation": 7,
    "opensora.checkpoints": 6,
    "opensora.profiling": 5,
    "opensora.distributed": 5,
    "opensora.acceleration": 4,
    "opensora.models": 3,
    "opensora.schedulers": 3,
    "opensora.datasets": 3,
    "opensora.registry": 3,
    "opensora.config": 2,
    "opensora.remote": 2,
    "opensora.files": 1,
    "opensora.errors": 0,
    "opensora.signals": 0,
    "opensora": 0,
}
PURE = ("opensora.models", "opensora.schedulers")  # arithmetic: tensors in, tensors out

FILES = {"glob", "io", "json", "os", "pathlib", "pickle", "shutil", "tempfile", "urllib.request", "zipfile"}
FILE_CALLS = {"open", "read_bytes", "read_text", "write_bytes", "write_text", "from_pretrained", "save_pretrained"}
CHECKPOINTS = {"safetensors", "torch.load", "torch.save", "huggingface_hub"}
MEDIA = {"av", "PIL"}
DEVICES = {"cpu", "cuda", "gcu", "mps", "npu", "xpu"}
COMMAND_LINE = {"argparse", "sys.argv", "click", "typer"}
SLOW = {
    "PIL", "av", "bs4", "ftfy", "huggingface_hub", "mmengine", "tokenizers", "transformers",
    "tensorboard", "torch.utils.tensorboard", "wandb",
}  # fmt: skip
NEVER = {"apex", "colossalai", "cv2", "decord", "diffusers", "flash_attn", "torchvision", "xformers"}

# (what it uses, where) -> why it may
EXCEPTIONS = {
    ("from_pretrained()", "opensora.models.text_encoder.t5"): "an embedding of given rows; no file is read",
    ("'cpu'", "opensora.checkpoints.fit"): "a checkpoint is read into host memory, whatever the model runs on",
    ("'cpu'", "opensora.checkpoints.save"): "the same, for what is written",
    ("'cuda'", "opensora.config.settings.common"): "an example in the document of settings; nothing runs on it",
    ("get_device_module()", "opensora.profiling.memory_meter"): "the accounts of a device, whatever its name",
    ("torch.accelerator", "opensora.profiling.memory_meter"): "how much memory is free, whatever the device's name",
    ("torch.accelerator", "opensora.acceleration.cuda_graphs"): "graphs of any device",
    ("torch.save", "opensora.training.checkpoint.write"): "the same, written, and ema.pt as the documents name it",
    ("PIL", "opensora.datasets.transforms"): "images are scaled by Pillow's own filter; no file is opened",
    ("safetensors", "opensora.datasets.feature_files"): "reads single samples out of features, which are no checkpoint",
    ("safetensors", "scripts.train_text_encoder"): "writes the encoder it trained",
    ("PIL", "scripts.misc.draw_assets"): "draws pictures; no file is opened",
    ("PIL", "opensora.pipeline.in_memory_media"): "images of callers are converted; no file is opened",
    ("PIL", "opensora.pipeline.output_files"): "writes GIFs",
    ("PIL", "opensora.pipeline.video"): "frames become images for callers; no file is written",
    ("torch.accelerator", "opensora.cli.environment"): "lists devices; nothing runs on them",
    ("get_device_module()", "opensora.cli.environment"): "names and free memory of devices, whatever their kind",
    ("huggingface_hub", "opensora.cli.environment"): "where its cache is",
    ("av", "opensora.cli.environment"): "lists codecs; no file is opened",
    ("PIL", "opensora.pipeline.watermark"): "writes a text into frames; no file is opened",
    ("PIL", "scripts.misc.eval_embedded"): "writes captions into a picture",
    ("PIL", "scripts.misc.eval_world"): "writes captions into a picture",
    ("cv2", "opensora.curation.stages.camera"): "a robust fit; OpenCV comes with the extra data",
    ("cv2", "opensora.curation.stages.optical_flow"): "dense optical flow; OpenCV comes with the extra data",
    ("PIL", "opensora.curation.footage.pictures"): "scales noise; no file is opened",
    ("PIL", "opensora.curation.footage.shots"): "moves and writes on pictures; no file is opened",
    ("PIL", "opensora.curation.footage.faults"): "scales frames; no file is opened",
    ("PIL", "opensora.curation.analysis.pictures"): "draws bars; no file is opened",
    ("PIL", "opensora.training.preview.sheet"): "draws a sheet of frames; no file is opened",
    ("PIL", "opensora.training.tracking"): "tensorboard plays GIFs only; they are made in memory",
}


class Module(NamedTuple):
    """What the syntax tree of a module holds."""

    imports: set[str]  # modules and names, dotted, wherever in the file the import stands
    at_the_top: set[str]  # those of them that are imported with the module
    reached: set[str]  # imports and dotted names
    functions: set[str]  # dotted names of what is called; "" where it has none
    called: set[str]  # the last part of these names
    texts: set[str]


@cache
def modules() -> dict[str, Module]:
    files = [file for folder in ("opensora", "scripts", "tools") for file in (ROOT / folder).rglob("*.py")]
    return {_name(file): _walk(ast.parse(file.read_text(encoding="utf-8"))) for file in sorted(files)}


def _name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _walk(tree: ast.Module) -> Module:
    found = Module(
        set(), {name for statement in tree.body for name in _imported(statement)}, *(set() for _ in range(4))
    )
    for node in ast.walk(tree):
        found.imports.update(_imported(node))
        found.reached.add(dotted(node))
        if isinstance(node, ast.Call):
            found.functions.add(dotted(node.func))
            found.called.add(getattr(node.func, "attr", getattr(node.func, "id", "")))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.texts.add(node.value)
    found.reached.update(found.imports)
    return found


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def own_imports(module: Module) -> set[str]:
    """The modules of this repository that a module imports."""
    own = {name for name in module.imports if name.split(".")[0] in ("opensora", "scripts", "tools")}
    return {name if name in modules() else name.rpartition(".")[0] for name in own}


def place(module: str) -> str:
    """The row of LAYERS that a module belongs to: its own, or that of a package around it other than `opensora`."""
    parts = module.split(".")
    rows = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next(row for row in rows if row in LAYERS and (row != "opensora" or module == "opensora"))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute access, or an empty text."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (below := dotted(node.value)):
        return f"{below}.{node.attr}"
    return ""


def among(found: set[str], names: set[str]) -> set[str]:
    """Those of `names` (packages or dotted names) that are found, or something in them."""
    return {name for name in names for one in found if f"{one}.".startswith(f"{name}.")}


def uses(module: Module, names: set[str]) -> set[str]:
    """Those of `names` that a module imports or reaches through an import."""
    return among(module.reached, names)


def calls(module: Module, names: set[str]) -> set[str]:
    """`name()` for those of `names` that a module calls, as functions or methods."""
    return {f"{name}()" for name in module.called & names}


def devices(module: Module) -> set[str]:
    """Device names among the text literals, and uses of torch.cuda and its like, also without their names."""
    literals = {repr(text) for text in module.texts if text.split(":")[0] in DEVICES}
    there = uses(module, {f"torch.{name}" for name in (*DEVICES, "accelerator")})
    return literals | calls(module, {"cuda", "get_device_module"}) | there


def breaches(found: dict[str, set[str]], allowed: tuple[str, ...] = ()) -> list[str]:
    """`module: what` for everything found outside the allowed modules and the exceptions."""
    return [
        f"{module}: {what}"
        for module, whats in found.items()
        for what in sorted(whats)
        if module not in allowed and (what, module) not in EXCEPTIONS
    ]


def test_every_module_has_a_layer():
    lost = []
    for module in modules():
        try:
            place(module)
        except StopIteration:
            lost.append(module)
    assert not lost, f"add {lost} to LAYERS"
    gone = [row for row in LAYERS if not any(f"{module}.".startswith(f"{row}.") for module in modules())]
    assert not gone, f"remove {gone} from LAYERS"


def test_imports_point_down():
    wrong = []
    for name, module in modules().items():
        row = place(name)
        for other in sorted(own_imports(module)):
            assert other in modules(), f"{name} imports {other}, which does not exist"
            inside = place(other) == row or row == "scripts"
            if not inside and LAYERS[place(other)] >= LAYERS[row]:
                wrong.append(f"{name} imports {other}, which does not lie below it")
    assert not wrong, wrong


def test_imports_have_no_cycle():
    graph = {name: own_imports(module) - {name} for name, module in modules().items()}
    assert list(TopologicalSorter(graph).static_order())


def test_models_and_schedulers_touch_no_file():
    pure = {module: tree for module, tree in modules().items() if module.startswith(PURE)}
    assert pure
    found = {m: uses(t, FILES | CHECKPOINTS | MEDIA) | calls(t, FILE_CALLS) for m, t in pure.items()}
    assert not breaches(found)


def test_only_one_module_names_devices():
    allowed = ("opensora.acceleration.device", "opensora.acceleration.device_names")
    assert not breaches({m: devices(t) for m, t in modules().items()}, allowed)


def test_only_distributed_speaks_to_other_ranks():
    allowed = tuple(module for module in modules() if place(module) == "opensora.distributed")
    assert not breaches({m: uses(t, {"torch.distributed"}) for m, t in modules().items()}, allowed)


def test_only_checkpoints_open_checkpoints():
    found = {m: uses(t, CHECKPOINTS) for m, t in modules().items()}
    allowed = tuple(module for module in modules() if place(module) == "opensora.checkpoints")
    assert not breaches(found, allowed)


def test_only_video_opens_media():
    allowed = tuple(module for module in modules() if module.startswith("opensora.datasets.video."))
    assert not breaches({m: uses(t, MEDIA) for m, t in modules().items()}, allowed)


def test_only_the_top_layer_reads_the_command_line():
    top = tuple(module for module in modules() if LAYERS[place(module)] >= 9)
    assert not breaches({m: uses(t, COMMAND_LINE) for m, t in modules().items()}, top)


def test_nothing_has_to_be_compiled():
    assert not breaches({m: uses(t, NEVER) for m, t in modules().items()})


def test_slow_packages_are_imported_where_they_are_used():
    """A light command such as `opensora --help` must not pay for them; imports for type checkers are free."""
    assert not breaches({m: among(module.at_the_top, SLOW) for m, module in modules().items()})


def test_nothing_runs_text_as_code():
    names = {"eval", "exec", "os.system"}  # nn.Module.eval has an object before its dot
    assert not breaches({m: module.functions & names for m, module in modules().items()})


def test_every_exception_is_needed():
    looked_for = FILES | CHECKPOINTS | MEDIA | COMMAND_LINE | NEVER | {"torch.distributed"}
    found = {m: uses(t, looked_for) | calls(t, FILE_CALLS) | devices(t) for m, t in modules().items()}
    needless = [(what, module) for what, module in EXCEPTIONS if what not in found.get(module, ())]
    assert not needless, f"remove {needless} from EXCEPTIONS"
