# Autoencoder of the drawn world, stage 1: its per-frame part, from the autoencoder of the moving shapes.
# Sizes are for a GPU with 16 processor cores that render; those for a CPU are in cpu/.
_base_ = "../vae_2d.py"

dataset = dict(type="WorldClips", num_frames=2, image_size=(128, 128))
model = dict(from_pretrained="opensora/embedded/vae", shift=0.0, scale=1.0)  # latents change: measured anew later
contrast_weighting = 1.0  # small shapes, and colors like the background's

num_workers = 16
seed = 21
outputs = "outputs/world/vae_frames"
batch_size = 48
max_steps = 6000
lr = 1.5e-3
ema_decay = 0.995
log_every = 50
ckpt_every = 500
