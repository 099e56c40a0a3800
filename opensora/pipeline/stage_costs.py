"""The stages of a request, the memory and time that each takes, and the memory plan that fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from opensora.acceleration import quantization
from opensora.acceleration.kernels.winograd import kernel_bytes
from opensora.acceleration.memory_plan import BY_NAME, FAST, PLANS, MemoryPlan, arranged
from opensora.acceleration.model_parts import blocks_of
from opensora.checkpoints.hub import checkpoint_files
from opensora.models.text_encoder.classes import ClassIds
from opensora.models.text_encoder.t5 import T5Encoder
from opensora.models.vae.vae import frames_at_once
from opensora.pipeline.request import Request
from opensora.profiling import cost_model
from opensora.profiling.cost_model import Cost

T5_XXL = {"parameters": 4_762_310_656, "tokens": 300}  # what is assumed of a text encoder that is not here
GENEROUS = 16  # tensors of a network's widest layer that are never held at once


class Stage(NamedTuple):
    """One stage of the work: what of the weights it adds, the bytes it works in, and how long it takes."""

    name: str
    weights: int
    files: int  # bytes of the weight files that stay mapped beside it, or are read for it
    copied: bool  # whether the weights are copies in another format than the files'
    cost: Cost
    seconds: float


class Needs:
    """What a request takes under each memory plan. Its parts need no weights, and are left as they are."""

    def __init__(self, pipeline: Any, parts: Mapping[str, Any], requests: Sequence[Request]) -> None:
        self.pipeline, self.parts, self.requests = pipeline, parts, requests
        self.on_host = cost_model.is_host(pipeline.device)
        self.where = (pipeline.dtype, pipeline.device)
        self.stages = cache(lambda plan: list(self._stages(plan)))

    def choose(self) -> MemoryPlan:
        """The plan that was asked for, else the fastest whose peak fits in what is free, else the last."""
        asked, free = self.pipeline.settings.memory, cost_model.available(self.pipeline.device)
        if asked != "auto":
            return BY_NAME[asked]
        if free is None or self.at_most() < free / 2:
            return FAST
        return next((plan for plan in PLANS if self.peak(plan) <= free), PLANS[-1])

    def peak(self, plan: MemoryPlan) -> int:
        """Bytes at the peak, in addition to what the process has on a host; of the device alone elsewhere."""
        return self.peak_of(self.stages(plan), plan)

    def least(self, plan: MemoryPlan) -> int:
        """Bytes that the weights take by themselves, whatever they make."""
        return self.peak_of([stage._replace(cost=Cost()) for stage in self.stages(plan)], plan)

    def peak_of(self, stages: Sequence[Stage], plan: MemoryPlan) -> int:
        """Bytes that these stages take at their peak."""
        again = len(self.pipeline.portions(self.requests)) > 1  # the text encoder is read beside the others
        if self.on_host:
            return peak_on_host(stages, again)
        text, *others = stages
        held = sum(stage.weights for stage in others)
        if again and not plan.visiting:
            text = text._replace(weights=text.weights + held)
            stages = [text, *others]
        weights = {stage.name: stage.weights if plan.visiting else held for stage in others}
        if plan.visiting:
            weights["decoding"] = weights["encoding"]  # of the same autoencoder
        return max(stage.cost.peak + weights.get(stage.name, text.weights) for stage in stages)

    def at_most(self) -> int:
        """Bytes that the fast plan surely does not exceed, without counting: for requests that are small anyhow."""
        pipeline, vae, model = self.pipeline, self.parts["vae"], self.parts["model"]
        clips = [(pipeline.size.num_frames, *pipeline.made), *self._references()]
        pixels = max(frames * height * width for frames, height, width in clips)
        frames, height, width = vae.get_latent_size(pipeline.size)
        tokens = 2 * frames * (height + 1) * (width + 1)
        work = GENEROUS * 4 * max(pixels * _widest(vae), tokens * _widest(model))
        weights = sum(4 * parameter.numel() for part in (vae, model) for parameter in part.parameters())
        return work + 3 * weights + 2 * self._text()[1].weights

    def _stages(self, plan: MemoryPlan) -> Iterator[Stage]:
        """Text, autoencoder and model, and what they do, in order."""
        pipeline, vae = self.pipeline, self.parts["vae"]
        tokens, text = self._text()
        if plan.visiting and not self.on_host:
            text = text._replace(weights=_by_layers(self.parts["text_encoder"], text.weights))
        yield text
        yield self._stage("encoding", "vae", self._encoding(plan))
        step = self._step(plan, tokens)
        num_clips, steps = sum(map(len, self._timelines())), pipeline.scheduler.num_sampling_steps
        steps = steps or pipeline.scheduler.num_steps
        if pipeline.stop:
            num_clips, steps = len(self.requests), steps * pipeline.stop / pipeline.scheduler.num_steps
        yield self._stage("sampling", "model", step.times(steps * num_clips))
        loops, frames = pipeline.settings.loop, pipeline.size.num_frames
        made = cost_model.decoding(vae, pipeline.size, *self.where, streamed=True).times(num_clips)
        held = self._held(2)  # of a piece that becomes levels
        if self.on_host:  # all levels, joined if there are several clips; the next one goes on from its float frames
            several = loops > 1
            held += self._held(frames) // 4 * (loops + several) + (self._held(frames) if several else 0)
            used = ("decoder", "encoder") if self._encoded() else ("decoder",)
            held += sum(self._kernels(part, plan) for part in used)
        made = made._replace(peak=made.peak + held)
        yield Stage("decoding", 0, 0, False, made, self._seconds(made, "decoding"))

    def _timelines(self) -> list[list[Any]]:
        return [self.pipeline.timelines[request] for request in self.requests]

    def _references(self) -> list[tuple[int, int, int]]:
        """The size of each given image and video, as it is encoded."""
        pipeline = self.pipeline
        counts = (pipeline.count_frames(one.reference_path) for one in self.requests)
        return [(frames, *pipeline.made) for found in counts for frames in found]

    def _encoded(self) -> list[tuple[int, int, int]]:
        """The size of everything that is encoded: what is given, and clips from which the next loop goes on."""
        pipeline = self.pipeline
        clip = (pipeline.size.num_frames, *pipeline.made)
        return self._references() + [clip] * (pipeline.settings.loop - 1) * len(self.requests)

    def _encoding(self, plan: MemoryPlan) -> Cost:
        pipeline, vae, work, sizes = self.pipeline, self.parts["vae"], Cost(), self._encoded()
        at_once = frames_at_once(*pipeline.made) if plan.one_by_one else None
        for one in sorted(set(sizes)):
            work = work.then(cost_model.encoding(vae, one, *self.where, at_once).times(sizes.count(one)))
        longest = max((frames for frames, *_ in sizes), default=0)
        held = self._held(longest if self.on_host or at_once is None else min(longest, at_once))
        if sizes and self.on_host:
            held += self._kernels("encoder", plan)
        return work._replace(peak=work.peak + held)

    def _kernels(self, within: str, plan: MemoryPlan) -> int:
        """Bytes of the kernels that a host makes for a half of the autoencoder, in float32 alone."""
        exact = self.pipeline.dtype == torch.float32
        return kernel_bytes(self.parts["vae"], within, plan.winograd) if exact else 0

    def _step(self, plan: MemoryPlan, tokens: int) -> Cost:
        """One evaluation of the model, with all guidance branches."""
        pipeline, model = self.pipeline, self.parts["model"]
        latent = tuple(self.parts["vae"].get_latent_size(pipeline.size))
        given = any(edit < 1 for clips in self._timelines() for clip in clips for edit in clip.edit)
        branches = pipeline.scheduler.num_branches
        batch = 1 if plan.sequential_cfg else branches
        with arranged(model, plan):
            work = cost_model.step(model, latent, pipeline.conditioning, tokens, *self.where, batch, given)
            return cost_model.count(work, pipeline.device).times(branches / batch)

    def _held(self, frames: int) -> int:
        """Bytes of so many frames in float32."""
        return 12 * frames * self.pipeline.made[0] * self.pipeline.made[1]

    def _seconds(self, cost: Cost, stage: str) -> float:
        return cost_model.seconds(cost, self.pipeline.device, stage, self.pipeline.dtype)

    def _stage(self, name: str, part: str, cost: Cost) -> Stage:
        held = cost_model.weights(self.parts[part], self.pipeline.dtype)
        files, copied = self._files(part, held)
        copied |= part == "vae"  # its kernels are rearranged
        if part == "model" and self.pipeline.settings.linear != "exact":
            held -= quantization.num_values(self.parts[part]) * (self.pipeline.dtype.itemsize - 1)
            copied = True
        return Stage(name, held, files, copied, cost, self._seconds(cost, name))

    def _files(self, part: str, held: int) -> tuple[int, bool]:
        """Bytes of a part's weight files, and whether its weights will be copies of another format."""
        path = self.pipeline.paths.get(part)
        if path is None:
            return held, False
        size = sum(file.stat().st_size for file in checkpoint_files(path))
        return size, size < 0.9 * held or 1.9 * held < size < 2.1 * held

    def _text(self) -> tuple[int, Stage]:
        """The longest text in tokens, and what encoding all of them takes."""
        pipeline, encoder = self.pipeline, self.parts["text_encoder"]
        texts = pipeline.texts_of(self.requests)
        texts += [] if pipeline.negative_text is None else [pipeline.negative_text]
        if isinstance(encoder, ClassIds):
            return 1, Stage("text", 0, 0, False, Cost(), 0.0)
        if encoder is None:
            held, tokens = pipeline.dtype.itemsize * T5_XXL["parameters"], T5_XXL["tokens"]
            cost = Cost(products=2.0 * tokens * T5_XXL["parameters"], moved=held, calls=1000, peak=2**28)
            cost = cost.times(len(texts))
            return tokens, Stage("text", held, held, False, cost, self._seconds(cost, "text"))
        lengths = [count_tokens(encoder, text) for text in texts]
        config = getattr(encoder.model, "config", None) or encoder.model.text_model.config
        parameters = sum(parameter.numel() for parameter in encoder.model.parameters())
        cost = Cost()
        for length in lengths:
            cost = cost.then(cost_model.reading_text(config, parameters, length))
        held = sum(map(_bytes, encoder.model.parameters()))
        files, copied = self._files("text_encoder", held)
        stage = Stage("text", held, files, copied, cost, self._seconds(cost, "text"))
        return max(lengths, default=1), stage


def _widest(model: Any) -> int:
    """Outputs of the widest layer."""
    return max(len(parameter) for parameter in model.parameters() if parameter.ndim > 1)


def _by_layers(encoder: Any, weights: int) -> int:
    """Bytes of a text encoder on its device when one of its layers is there at a time."""
    if encoder is None:  # T5-XXL: a word's vector for each of its words, and the largest of its 24 layers
        return weights // 20
    if isinstance(encoder, ClassIds):
        return weights
    layers = [sum(map(_bytes, layer.parameters())) for layer in blocks_of(encoder.model)]
    return weights - sum(layers) + max(layers, default=0)


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


def count_tokens(encoder: Any, text: str) -> int:
    """How many features a text becomes; no weights are needed. Raises ConfigError for a text that is no class."""
    if isinstance(encoder, T5Encoder):
        found = encoder.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        return min(len(found), encoder.model_max_length)
    if isinstance(encoder, ClassIds):
        encoder.encode([text])
    return 1


def peak_on_host(stages: Sequence[Stage], again: bool = False) -> int:
    """Bytes that the stages add to a process at their peak.

    Weights in the format of their files stay where the files are mapped. Others are copied while the file is mapped
    beside them. What was freed is used again and not given back. `again`: texts are encoded once more at the end.
    """
    text, *others = stages
    heap = highest = 0

    def note(mapped: int, used: int) -> None:
        nonlocal heap, highest
        heap = max(heap, used)
        highest = max(highest, mapped + heap)

    own = text.weights if text.copied else 0
    note(text.files, own)
    note(0 if text.copied else text.files, own + text.cost.peak)
    mapped = own = 0
    for stage in others:
        own += stage.weights if stage.copied else 0
        note(mapped + stage.files, own)
        mapped += 0 if stage.copied else stage.files
    for stage in others:
        note(mapped, own + stage.cost.peak)
    if again:
        note(mapped + text.files, own + (text.weights if text.copied else 0) + text.cost.peak)
    return highest
