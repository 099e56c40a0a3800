# Embedded model, stage 3: the decoders of its autoencoder, on pixels; its latents stay what they are.
_base_ = "vae_temporal.py"

dataset = dict(num_clips=1600)
model = dict(freeze_vae_2d=False, from_pretrained="outputs/embedded/vae_temporal/ema")
freeze = (
    "spatial_vae.module.encoder",
    "spatial_vae.module.quant_conv",
    "temporal_vae.encoder",
    "temporal_vae.quant_conv",
)
use_z_rec_loss = False
use_real_rec_loss = True

seed = 3
outputs = "outputs/embedded/vae_decoder"
max_steps = 600
lr = 1.5e-4
ckpt_every = 100
