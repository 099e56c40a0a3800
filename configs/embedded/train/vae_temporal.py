# Embedded model, stage 2: the temporal part of its autoencoder, on the frozen per-frame latents of rendered clips.
_base_ = "vae_2d.py"

dataset = dict(num_frames=17, num_clips=3200)
model = dict(freeze_vae_2d=True, from_pretrained="outputs/embedded/vae_2d/ema")
mixed_strategy = "mixed_video_image"
mixed_image_ratio = 0.1
use_z_rec_loss = True

seed = 2
outputs = "outputs/embedded/vae_temporal"
batch_size = 16
max_steps = 2500
