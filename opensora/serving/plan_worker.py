"""`python -m opensora.serving.plan_worker`: the planning process. It reads no weights."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from typing import Any

from opensora.datasets.video import count_frames, is_image, read_image, read_span
from opensora.errors import OpenSoraError
from opensora.pipeline.generation import check_requests
from opensora.pipeline.job import Job
from opensora.pipeline.job_spec import JobSpec, Place
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.mask_strategy import ClipConditioning
from opensora.pipeline.plan import Plan, plan_job
from opensora.serving.channel import Message, WorkerChannel
from opensora.serving.models import Models, load_models
from opensora.serving.request import VideoRequest

logger = logging.getLogger("opensora")


class PlanWorker:
    """Answers one question after the other."""

    def __init__(self, models: Models, device: str | None) -> None:
        self.models, self.device = models, device
        self._built: dict[str, LoadedModels] = {}

    def answer(self, question: Message) -> dict[str, Any]:
        """The answer, or {"error": message}."""
        try:
            if "probe" in question:
                return probe(question["probe"], question["max_frames"])
            request = VideoRequest(**(question["plan"] if "plan" in question else question["check"]))
            spec, models = self._spec(request, question["media"])
            job = Job(spec, models)
            if "plan" in question:
                return {"plan": describe(plan_job(models, job))}
            models.locate_without_downloads()
            check_requests(models, job, job.requests, models.build(job.size))
            return {"ok": True}
        except OpenSoraError as error:
            return {"error": str(error), "code": "invalid_request"}
        except Exception as error:
            logger.error("a question failed", exc_info=error)
            return {"error": f"the request cannot be checked ({type(error).__name__})", "code": "invalid_request"}

    def _spec(self, request: VideoRequest, media: dict[str, str]) -> tuple[JobSpec, LoadedModels]:
        base = self.models[request.model]
        if self.device is not None:
            base = dataclasses.replace(base, device=self.device)
        settings = request.settings(base, media.__getitem__)
        if request.model not in self._built:
            self._built[request.model] = LoadedModels(base)
        return JobSpec(settings, places=[Place("video", settings.seed)], to_files=False), self._built[request.model]


def probe(path: str, max_frames: int) -> dict[str, Any]:
    """{"frames": n} of an image (1) or a video. Raises MediaError for one that cannot be read or is too long."""
    if is_image(path):
        read_image(path)
        return {"frames": 1}
    frames = count_frames(path)
    if frames > max_frames:
        return {"error": f"the video has {frames:,} frames; this server takes {max_frames:,}", "code": "too_long"}
    read_span(path, lambda count: [0, count - 1])
    return {"frames": frames}


def describe(plan: Plan) -> dict[str, Any]:
    """What clients see of a plan: sizes, seconds, bytes, and what happens to each latent frame."""
    size = plan.job.size.rounded
    return {
        "object": "video.plan",
        "num_frames": plan.num_frames,
        "height": size.height,
        "width": size.width,
        "fps": plan.job.settings.output_fps,
        "video_seconds": plan.num_frames / plan.job.settings.output_fps,
        "seconds": plan.seconds,
        "memory_bytes": plan.memory,
        "available_bytes": plan.available,
        "fits": plan.fits,
        "memory_plan": plan.memory_plan.name,
        "stages": [
            {"name": stage.name, "seconds": span.least, "most_seconds": span.most, "measured": span.source}
            for stage, span in zip(plan.stages, plan.spans, strict=True)
        ],
        "notes": plan.notes,
        "near_sizes": [f"{width}x{height}" for height, width in plan.near_sizes],
        "near_lengths": plan.near_lengths,
        "timeline": [[_latent_frame(clip, frame) for frame in range(len(clip.edit))] for clip in plan.timelines[0]],
    }


def _latent_frame(clip: ClipConditioning, frame: int) -> dict[str, Any]:
    """What happens to a latent frame: kept, edited or generated, and the number of its reference."""
    edit, source = clip.edit[frame], clip.sources[frame]
    kind = "generated" if source is None or edit >= 1 else "kept" if edit == 0 else "edited"
    return {"kind": kind, "edit": edit, "reference": None if source is None else source[0]}


def main() -> None:
    """The program of the planning process."""
    channel = WorkerChannel()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="planner: %(message)s")
    options = channel.receive()
    worker = PlanWorker(load_models(options["models"]), options["device"])
    os.chdir(options["data"])
    channel.send(type="ready")
    while True:
        channel.send(**worker.answer(channel.receive()))


if __name__ == "__main__":
    main()
