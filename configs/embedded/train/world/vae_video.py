# Autoencoder of the drawn world, stage 2: both parts together, on windows of clips.
_base_ = "../vae_2d.py"

dataset = dict(type="WorldClips", num_frames=17, image_size=(128, 128), crop=(64, 64))
model = dict(from_pretrained="outputs/world/vae_frames/ema")
use_real_rec_loss = True
mixed_strategy = "mixed_video_image"
mixed_image_ratio = 0.05

seed = 22
outputs = "outputs/world/vae_video"
batch_size = 4
max_steps = 2500
lr = 7e-4
ema_decay = 0.995
ckpt_every = 50
