# Autoencoder of the drawn world, stage 1: its per-frame part, from the autoencoder of the moving shapes.
_base_ = "../vae_2d.py"

dataset = dict(type="WorldClips", image_size=(128, 128), crop=(64, 64))
model = dict(from_pretrained="opensora/embedded/vae", shift=0.0, scale=1.0)  # latents change: measured anew later

seed = 21
outputs = "outputs/world/vae_frames"
batch_size = 16
max_steps = 2500
lr = 1e-3
ema_decay = 0.995
ckpt_every = 100
