# First autoencoder stage: the image part stays frozen and the temporal part learns to return its latents.

# Size
num_frames = 17
image_size = (256, 256)

# Data
dataset = dict(
    type="VideoTextDataset",
    data_path=None,
    num_frames=num_frames,
    frame_interval=1,
    image_size=image_size,
)

# Acceleration
grad_checkpoint = True
num_workers = 16
dtype = "bf16"
plugin = "zero2"

# Model
model = dict(
    type="VideoAutoencoderPipeline",
    freeze_vae_2d=True,
    from_pretrained=None,
    cal_loss=True,
    vae_2d=dict(
        type="VideoAutoencoderKL",
        from_pretrained="PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
        subfolder="vae",
        local_files_only=True,
    ),
    vae_temporal=dict(
        type="VAE_Temporal_SD",
        from_pretrained=None,
    ),
)

# Loss
perceptual_loss_weight = 0.1
kl_loss_weight = 1e-06
mixed_strategy = "mixed_video_image"
mixed_image_ratio = 0.2
use_real_rec_loss = False
use_z_rec_loss = True
use_image_identity_loss = True

# Run
seed = 42
outputs = "outputs/vae_stage1"
wandb = False
epochs = 100
log_every = 1
ckpt_every = 1000
load = None
batch_size = 1
lr = 1e-05
grad_clip = 1.0
