# Autoencoder of the drawn world, stage 3: the decoders alone, on whole frames of all sizes and several chunks.
_base_ = "../vae_2d.py"

dataset = dict(
    type="WorldClips",
    num_frames=None,
    image_size=None,
    sizes=[
        (17, 128, 128, 0.4), (34, 128, 128, 0.1), (1, 128, 128, 0.06),
        (17, 96, 160, 0.15), (34, 96, 160, 0.03), (1, 96, 160, 0.04),
        (17, 160, 96, 0.15), (34, 160, 96, 0.03), (1, 160, 96, 0.04),
    ],
)  # fmt: skip
model = dict(from_pretrained="outputs/world/vae_video/ema")
freeze_encoders = True
contrast_weighting = 1.0  # small shapes, and colors like the background's

num_workers = 16
seed = 23
outputs = "outputs/world/vae_decoder"
batch_size = 8
max_steps = 1000
lr = 5e-4
ema_decay = 0.99
log_every = 50
ckpt_every = 250
