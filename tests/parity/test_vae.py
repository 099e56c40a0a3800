"""The autoencoders against the recorded ones: temporal, per-frame, pipeline, latent sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from opensora.models.vae.vae import OpenSoraVAE_V1_2, VideoAutoencoderKL, VideoAutoencoderPipeline
from opensora.models.vae.vae_temporal import VAE_Temporal
from tests.parity.cases import Case, discover, part

CASES = discover("vae")
TOLERANCE = dict(rtol=1e-4, atol=2e-5)


class Draws:
    """Stands in for torch.randn: hands out the recorded noise in order, and insists on its shape."""

    def __init__(self, noise: Iterator[torch.Tensor]) -> None:
        self.noise = noise

    def __call__(self, *shape: Any, **_: Any) -> torch.Tensor:
        draw = next(self.noise)
        assert list(draw.shape) == list(shape[0] if len(shape) == 1 else shape)
        return draw


def close(actual: torch.Tensor, expected: torch.Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **(tolerance or TOLERANCE))


def check_temporal(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, tensors = case.facts, case.tensors()
    model = VAE_Temporal(**facts["constructor"]).eval()
    model.load_state_dict(part(tensors, "weights/"), strict=True)
    assert model.time_downsample_factor == facts["time_downsample_factor"]
    for row in facts["cases"]:
        given = part(tensors, row["prefix"])
        assert model.get_latent_size(given["x"].shape[2:]) == row["latent_size"]
        posterior = model.encode(given["x"])
        close(posterior.mean, given["mean"])
        close(posterior.logvar, given["logvar"])
        close(posterior.kl(), given["kl"], rtol=1e-4, atol=1e-3)
        close(model.decode(given["z"], num_frames=row["T"]), given["decoded"])
        close(model.decode(given["mean"], num_frames=row["T"]), given["decoded_mean"])
        monkeypatch.setattr(torch, "randn", Draws(iter([given["sample_noise"]])))
        close(posterior.sample(), given["sample"])
        monkeypatch.undo()


def check_spatial(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, given = case.facts, case.tensors()
    keywords = VideoAutoencoderKL.keywords(facts["autoencoder_config"])
    model = VideoAutoencoderKL(micro_batch_size=facts["micro_batch_size"], **keywords).eval()
    model.load_state_dict(part(given, "weights/"), strict=True)
    for row in facts["latent_size_table"]:
        assert model.get_latent_size(row["input"]) == row["output"]
    x = given["x"]
    mean, logvar = model.moments(x.transpose(1, 2).flatten(0, 1)).chunk(2, dim=1)
    close(mean, given["moment_mean"])
    close(logvar, given["moment_logvar"])
    sizes = [shape[0] for shape in facts["noise_draws"]]
    monkeypatch.setattr(torch, "randn", Draws(iter(given["encode_noise"].split(sizes))))
    close(model.encode(x), given["encoded"])
    close(model.decode(given["z"]), given["decoded"])


def check_pipeline(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, tensors = case.facts, case.tensors()
    normalised = {} if facts["shift"] is None else {"shift": facts["shift"], "scale": facts["scale"]}
    model = VideoAutoencoderPipeline(
        vae_2d=VideoAutoencoderKL.keywords(facts["autoencoder_config"]),
        vae_temporal=facts["temporal_constructor"],
        micro_frame_size=facts["micro_frame_size"],
        micro_batch_size=facts["micro_batch_size"],
        cal_loss=facts["cal_loss"],
        **normalised,
    ).eval()
    model.load_state_dict(part(tensors, "weights/"), strict=True)
    for row in facts["cases"]:
        given = part(tensors, row["prefix"])
        if "latent_size" in row:
            assert model.get_latent_size(given["x"].shape[2:]) == row["latent_size"]
        noise = [given[f"noise{i}"] for i in range(len(row["noise_draws"]))]
        monkeypatch.setattr(torch, "randn", Draws(iter(noise)))
        encoded = model.encode(given["x"])
        monkeypatch.undo()
        decoded = model.decode(given["z"], num_frames=row["T"])
        if facts["cal_loss"]:
            encoded, posterior, x_z = encoded
            decoded, decoded_x_z = decoded
            close(posterior.mean, given["posterior_mean_last"])
            close(x_z, given["x_z"])
            close(decoded_x_z, given["decoded_x_z"])
        close(encoded, given["encoded"])
        close(decoded, given["decoded"])


def check_latent_size(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = case.facts
    with torch.device("meta"):
        pipeline = OpenSoraVAE_V1_2()
    assert pipeline.temporal_vae.time_downsample_factor == facts["time_downsample_factor"]
    for row in facts["rows"]:
        size = row["input"]
        assert pipeline.spatial_vae.get_latent_size(size) == row["spatial"]
        assert pipeline.temporal_vae.get_latent_size(size) == row["temporal"]
        for name in row:
            if chunked := re.fullmatch(r"pipeline_micro(None|[0-9]+)", name):
                pipeline.micro_frame_size = None if chunked[1] == "None" else int(chunked[1])
                assert pipeline.get_latent_size(size) == row[name]
            else:
                assert name in ("input", "spatial", "temporal")


CHECKS = {
    "temporal_vae": check_temporal,
    "spatial_vae": check_spatial,
    "pipeline": check_pipeline,
    "latent_size": check_latent_size,
}


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_case(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    CHECKS[case.facts["kind"]](case, monkeypatch)
