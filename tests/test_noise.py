from __future__ import annotations

import torch

from opensora.pipeline.noise import initial_noise, noise_generator

SHAPE = (4, 5, 6, 7)


def test_same_request_same_bits_whatever_was_drawn_before():
    alone = initial_noise(42, 3, 1, SHAPE)
    torch.manual_seed(0)
    torch.randn(11)
    others = [initial_noise(42, sample, 1, SHAPE) for sample in (5, 3, 0)]
    assert torch.equal(alone, others[1])
    assert alone.shape == SHAPE and alone.dtype == torch.float32 and alone.device.type == "cpu"


def test_neighbouring_keys_have_nothing_in_common():
    keys = [(seed, sample, loop) for seed in range(6) for sample in range(6) for loop in range(6)]
    firsts = {initial_noise(*key, (16,))[0].item() for key in keys}
    assert len(firsts) == len(keys)


def test_streams_are_independent_of_each_other():
    drawn = torch.randn(16, generator=noise_generator(1, 2, 3))
    assert torch.equal(drawn, torch.randn(16, generator=noise_generator(1, 2, 3, stream="edit")))
    assert not torch.equal(drawn, torch.randn(16, generator=noise_generator(1, 2, 3, stream="other")))
    assert not torch.equal(drawn, initial_noise(1, 2, 3, (16,)))


def test_global_generator_is_left_alone():
    state = torch.get_rng_state()
    initial_noise(0, 0, 0, SHAPE)
    assert torch.equal(state, torch.get_rng_state())


def test_looks_standard_normal():
    noise = initial_noise(7, 0, 0, (4, 16, 32, 32))
    assert abs(noise.mean().item()) < 0.02 and abs(noise.std().item() - 1) < 0.02
