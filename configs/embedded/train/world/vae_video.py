# Autoencoder of the drawn world, stage 2: both parts together; latents and pixels are those of whole clips.
_base_ = "../vae_2d.py"

dataset = dict(type="WorldClips", num_frames=17, image_size=(128, 128))
model = dict(from_pretrained="outputs/world/vae_frames/ema")
use_real_rec_loss = True
latent_noise = 0.3
mean_color_loss_weight = 0.3
latent_statistics_loss_weight = 0.05
mixed_strategy = "mixed_video_image"
mixed_image_ratio = 0.05
contrast_weighting = 1.0  # small shapes, and colors like the background's

num_workers = 16
seed = 22
outputs = "outputs/world/vae_video"
batch_size = 16
max_steps = 4000
lr = 1e-3
ema_decay = 0.995
log_every = 50
ckpt_every = 500
