# Embedded model, stage 2: the temporal part of its autoencoder, on the frozen per-frame latents of rendered clips.
# Colors get latent channels of their own, and noise on the latents keeps apart what the transformer must tell apart.
_base_ = "vae_2d.py"

dataset = dict(
    num_frames=None,
    image_size=None,
    sizes=[(17, 64, 64, 0.66, 6000), (17, 48, 80, 0.17, 2000), (17, 80, 48, 0.17, 2000)],
)
model = dict(freeze_vae_2d=True, from_pretrained="outputs/embedded/vae_2d/ema")
mixed_strategy = "mixed_video_image"
mixed_image_ratio = 0.12
use_z_rec_loss = True
use_real_rec_loss = True
latent_noise = 0.3
mean_color_loss_weight = 0.3
latent_statistics_loss_weight = 0.05

seed = 2
outputs = "outputs/embedded/vae_temporal"
batch_size = 16
max_steps = 3500
lr = 1.5e-3
