# Embedded model, last stage: the decoders alone, on all sizes and on latents that the transformer restores; latents,
# and the models trained on them, stay as they are.
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
restorer = dict(type="STDiT3", from_pretrained="outputs/embedded/stdit3_correct/ema")
text_encoder = dict(type="t5", from_pretrained="opensora/embedded/text_encoder", model_max_length=32)
latent_noise = 0.1
contrast_weighting = 1.75  # the outlines of small and of faint shapes melt first

seed = 7
outputs = "outputs/embedded/vae_decoder"
max_steps = 12_000
lr = 3e-4
