"""The stages of a request, the memory and time that each takes, and the memory plan that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

from opensora.acceleration import quantization
from opensora.acceleration.device import is_cpu
from opensora.acceleration.memory_plan import BY_NAME, PLANS, MemoryPlan
from opensora.acceleration.model_parts import blocks_of
from opensora.checkpoints.hub import checkpoint_files
from opensora.checkpoints.read import is_packed
from opensora.models.text_encoder.classes import ClassIds
from opensora.models.vae.vae import frames_at_once
from opensora.pipeline.job import Job
from opensora.pipeline.loaded_models import Components, LoadedModels
from opensora.pipeline.mask_strategy import ClipConditioning
from opensora.pipeline.request import Request
from opensora.pipeline.text_encoding import Texts, count_tokens
from opensora.profiling import memory_meter, speed_history
from opensora.profiling.cost_model import CostModel, text_cost, weight_bytes
from opensora.profiling.operation_counter import Cost, num_bytes

# Parameters, tokens that are read, tokens of features: assumed for a text encoder whose files are not on this machine.
ASSUMED = {"t5": (4_762_310_656, 300, 300), "clip": (63_165_952, 77, 1), "classes": (0, 1, 1)}
SAFETY_FACTOR = 16  # more tensors of a network's widest layer than it ever holds at once


class Stage(NamedTuple):
    """One stage of a request: the weights that it loads, and its cost."""

    name: str
    weights: int
    files: int  # bytes of the weight files that it maps or reads
    copied: bool  # whether the weights are copies in another format than the files'
    cost: Cost


class ResourceEstimate:
    """The memory and cost of a job under each memory plan. The models need no weights and are left as they are.

    again: whether the text encoder is loaded a second time, beside the other models
    costs: counts the work, by default in the dtype and on the device of the models
    """

    def __init__(
        self, models: LoadedModels, components: Components, job: Job, requests: Sequence[Request], again: bool,
        costs: CostModel | None = None,
    ) -> None:  # fmt: skip
        self.models, self.components, self.job, self.requests, self.again = models, components, job, requests, again
        self.costs = costs or CostModel(models.dtype, models.device)
        self.dtype, self.on_host = self.costs.dtype, is_cpu(self.costs.device)
        self.latent_size = tuple(components.vae.get_latent_size(job.size))
        self.stages = cache(lambda plan: list(self._stages(plan)))

    def choose(self, loaded: int = 0, plans: Sequence[MemoryPlan] = PLANS) -> MemoryPlan:
        """The memory plan of the settings; for "auto" the fastest of `plans` that fits into free memory, or the last.

        `loaded` is the memory in bytes that the models occupy already.
        """
        name, free = self.models.settings.memory, memory_meter.available_memory(self.models.device)
        if name != "auto":
            return BY_NAME[name]
        if free is None:
            return plans[0]
        free += loaded
        if self.upper_bound() < free / 2:
            return plans[0]
        return next((plan for plan in plans if self.peak(plan) <= free), plans[-1])

    def peak(self, plan: MemoryPlan) -> int:
        """Peak memory in bytes: on a CPU what the process needs in addition, else that of the device."""
        return self._peak_of(self.stages(plan), plan)

    def fits(self, plan: MemoryPlan, loaded: int = 0) -> bool:
        """Whether a plan fits into free memory; True if that is unknown."""
        free = memory_meter.available_memory(self.models.device)
        return free is None or self.upper_bound() < (free + loaded) / 2 or self.peak(plan) <= free + loaded

    def least(self, plan: MemoryPlan) -> int:
        """Bytes of the weights alone."""
        return self._peak_of([stage._replace(cost=Cost()) for stage in self.stages(plan)], plan)

    def weights(self) -> int:
        """Bytes of the weights of autoencoder and diffusion model."""
        parts = (self.components.vae, self.components.model)
        return sum(weight_bytes(part, self.dtype) for part in parts)

    def _peak_of(self, stages: Sequence[Stage], plan: MemoryPlan) -> int:
        if self.on_host:
            return peak_on_host(stages, self.again)
        text, *others = stages
        held = sum(stage.weights for stage in others)
        if self.again and not plan.offload:
            text = text._replace(weights=text.weights + held)
            stages = [text, *others]
        weights = {stage.name: stage.weights if plan.offload else held for stage in others}
        if plan.offload:
            weights["decoding"] = weights["encoding"]  # of the same autoencoder
        return max(stage.cost.peak + weights.get(stage.name, text.weights) for stage in stages)

    def upper_bound(self) -> int:
        """A quick upper bound in bytes for the fast plan: small requests need no exact count."""
        vae, model, job = self.components.vae, self.components.model, self.job
        clips = [(job.size.num_frames, *job.frame_size), *self._references()]
        pixels = max(frames * height * width for frames, height, width in clips)
        frames, height, width = self.latent_size
        tokens = 2 * job.batch_size * frames * (height + 1) * (width + 1)
        work = SAFETY_FACTOR * 4 * max(pixels * _widest(vae), tokens * _widest(model))
        weights = sum(4 * parameter.numel() for part in (vae, model) for parameter in part.parameters())
        return work + 3 * weights + 2 * self._text()[1].weights

    def _stages(self, plan: MemoryPlan) -> Iterator[Stage]:
        """Text, autoencoder and model, in order."""
        job = self.job
        tokens, text = self._text()
        if plan.offload and not self.on_host:
            text = text._replace(weights=_by_layers(self.components.text_encoder, text.weights))
        yield text
        yield self._stage("encoding", "vae", self._encoding(plan))
        step = self._step(plan, tokens)
        num_clips, steps = sum(map(len, self.timelines)), job.scheduler.num_sampling_steps
        steps = steps or job.scheduler.num_steps
        if job.stop:
            num_clips, steps = len(self.requests), steps * job.stop / job.scheduler.num_steps
        yield self._stage("sampling", "model", step.times(steps * num_clips))
        yield Stage("decoding", 0, 0, False, self._decoding.times(num_clips))

    @cached_property
    def _decoding(self) -> Cost:
        """Decoding one clip, under any plan."""
        cost = self.costs.decoding(self.components.vae, self.job.size, streamed=True)
        return cost._replace(peak=cost.peak + self._frames_held())

    def _frames_held(self) -> int:
        """Bytes of decoded frames beside the work of the decoder."""
        loops, frames = self.job.settings.loop, self.job.size.num_frames
        held = self._float_frames(2)  # of a piece that becomes uint8
        if self.on_host:  # all uint8 frames, joined if there are several clips, and the float frames of the last one
            several = loops > 1
            held += self._float_frames(frames) // 4 * (loops + several) * self.job.batch_size
            held += self._float_frames(frames) if several else 0
        return held

    @property
    def timelines(self) -> list[list[ClipConditioning]]:
        """The conditioning of each clip of each request."""
        return [self.job.timelines[request] for request in self.requests]

    def _references(self) -> list[tuple[int, int, int]]:
        """The size of each reference image and video, as it is encoded."""
        counts = (self.job.references.counts(one.reference_path) for one in self.requests)
        return [(frames, *self.job.frame_size) for found in counts for frames in found]

    def _encoded(self) -> list[tuple[int, int, int]]:
        """The size of everything that is encoded: references, and clips from which the next loop continues."""
        clip = (self.job.size.num_frames, *self.job.frame_size)
        return self._references() + [clip] * (self.job.settings.loop - 1) * len(self.requests)

    def _encoding(self, plan: MemoryPlan) -> Cost:
        vae, work, sizes = self.components.vae, Cost(), self._encoded()
        at_once = frames_at_once(*self.job.frame_size) if plan.single_frames else None
        for one in sorted(set(sizes)):
            work = work.then(self.costs.encoding(vae, one, at_once).times(sizes.count(one)))
        longest = max((frames for frames, *_ in sizes), default=0)
        held = self._float_frames(longest if self.on_host or at_once is None else min(longest, at_once))
        return work._replace(peak=work.peak + held)

    def _step(self, plan: MemoryPlan, tokens: int) -> Cost:
        """One evaluation of the model with all guidance branches, for one sample."""
        model, job = self.components.model, self.job
        given = any(edit < 1 for clips in self.timelines for clip in clips for edit in clip.edit)
        rows = job.batch_size * (1 if plan.sequential_cfg else job.scheduler.num_branches)
        step = self.costs.step(model, self.latent_size, job.conditioning, tokens, rows, given, plan)
        return step.times(job.scheduler.num_branches / rows)

    def _float_frames(self, frames: int) -> int:
        """Bytes of so many frames in float32."""
        return 12 * frames * self.job.frame_size[0] * self.job.frame_size[1]

    def _stage(self, name: str, part: str, cost: Cost) -> Stage:
        module = getattr(self.components, part)
        plain = weight_bytes(module, self.dtype)
        held, files, copied = self._weights(part, plain)
        if part == "model" and self.models.settings.linear != "exact":
            held = plain - quantization.num_quantized(module) * (self.dtype.itemsize - 1)
            copied = True
        return Stage(name, held, files, copied, cost)

    def _weights(self, part: str, held: int) -> tuple[int, int, bool]:
        """Bytes that a part's weights take and of its files, and whether the weights will be copies in another format.

        `held` is what unpacked weights take; packed ones stay as they are in the file.
        """
        path = self.models.paths.get(part)
        if path is None:
            return held, held, False
        size = sum(file.stat().st_size for file in checkpoint_files(path))
        if is_packed(path):
            return min(held, size), size, False
        return held, size, size < 0.9 * held or 1.9 * held < size < 2.1 * held

    def _text(self) -> tuple[int, Stage]:
        """The longest text in tokens, and the stage that encodes all of them."""
        job, encoder, dtype = self.job, self.components.text_encoder, self.dtype
        texts = job.texts_of(self.requests)
        texts += [] if job.negative_text is None else [job.negative_text]
        if isinstance(encoder, ClassIds):
            return 1, Stage("text", 0, 0, False, Cost())
        if encoder is None:
            parameters, read, tokens = ASSUMED[job.settings.section("text_encoder")["type"]]
            held = dtype.itemsize * parameters
            cost = Cost(products=2.0 * read * parameters, moved=held, calls=1000, peak=2**28)
            return tokens, Stage("text", held, held, False, cost.times(len(texts)))
        lengths = [count_tokens(encoder, text) for text in texts]
        config = getattr(encoder.model, "config", None) or encoder.model.text_model.config
        parameters = sum(parameter.numel() for parameter in encoder.model.parameters())
        cost = Cost()
        for length in lengths:
            cost = cost.then(text_cost(config, parameters, length))
        held, files, copied = self._weights("text_encoder", sum(map(num_bytes, encoder.model.parameters())))
        stage = Stage("text", held, files, copied, cost)
        return max(lengths, default=1), stage


def record_speed(models: LoadedModels, job: Job, texts: Texts, clips: int) -> None:
    """Records the speed of this device for later estimates, after a complete run that was long enough to measure."""
    complete = not job.stop and not job.drafts and job.cache.is_exact and models.layout.world_size == 1
    if not complete or models.settings.compile or max(job.seconds.values()) < speed_history.MIN_SECONDS:
        return
    latent, counted = tuple(models.vae.get_latent_size(job.size)), CostModel(models.dtype, models.device)
    tokens = max(text.shape[2] if text.ndim == 4 else 1 for text in texts.values())
    steps, rows = job.scheduler.num_sampling_steps or job.scheduler.num_steps, job.batch_size
    batch = job.scheduler.num_branches * rows
    step = counted.step(models.model, latent, job.conditioning, tokens, batch)
    costs = {
        "sampling": step.times(steps / rows),
        "decoding": counted.decoding(models.vae, job.size),
    }
    for stage, cost in costs.items():
        speed_history.remember(models.device, stage, cost.times(clips), job.seconds[stage], models.dtype)


def _widest(model: Any) -> int:
    """Outputs of the widest layer."""
    return max(len(parameter) for parameter in model.parameters() if parameter.ndim > 1)


def _by_layers(encoder: Any, weights: int) -> int:
    """Bytes of a text encoder that is loaded layer by layer."""
    if encoder is None:  # T5-XXL: a word's vector for each of its words, and the largest of its 24 layers
        return weights // 20
    if isinstance(encoder, ClassIds):
        return weights
    layers = [sum(map(num_bytes, layer.parameters())) for layer in blocks_of(encoder.model)]
    return weights - sum(layers) + max(layers, default=0)


def peak_on_host(stages: Sequence[Stage], again: bool = False) -> int:
    """Bytes that the stages add to a process at their peak.

    Weights in the format of their files stay memory-mapped; others are copied while the file is mapped. Large buffers
    are returned when they are freed. `again`: texts are encoded once more at the end.
    """
    text, *others = stages
    own = text.weights if text.copied else 0
    encoding = own + (0 if text.copied else text.files) + text.cost.peak
    peaks = [text.files + own, encoding]
    held = 0
    for stage in others:
        peaks.append(held + stage.files + (stage.weights if stage.copied else 0))
        held += stage.weights if stage.copied else stage.files
    peaks += [held + stage.cost.peak for stage in others]
    if again:
        peaks.append(held + max(text.files + own, encoding))
    return max(peaks)
