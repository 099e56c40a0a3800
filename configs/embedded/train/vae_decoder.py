# Embedded model, stage 2b: the decoders alone, on all sizes; latents, and the models trained on them, stay as they are.
_base_ = "vae_2d.py"

dataset = dict(
    num_frames=None,
    image_size=None,
    sizes=[
        (17, 64, 64, 0.16), (34, 64, 64, 0.16), (1, 64, 64, 0.02),
        (17, 48, 80, 0.18), (34, 48, 80, 0.12), (1, 48, 80, 0.03),
        (17, 80, 48, 0.18), (34, 80, 48, 0.12), (1, 80, 48, 0.03),
    ],
)  # fmt: skip
model = dict(from_pretrained="outputs/embedded/vae_temporal/ema")
freeze_encoders = True
latent_noise = 0.3  # the transformer's latents are off by about 0.1

seed = 7
outputs = "outputs/embedded/vae_decoder"
batch_size = 8
max_steps = 1600
lr = 5e-4
