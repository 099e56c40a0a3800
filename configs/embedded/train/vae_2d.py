# Embedded model, stage 1: the per-frame part of its autoencoder, on frames of rendered clips.
dataset = dict(type="ShapeClips", num_frames=2, image_size=(64, 64))

model = dict(
    type="VideoAutoencoderPipeline",
    micro_frame_size=17,
    vae_2d=dict(
        type="VideoAutoencoderKL",
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
    ),
    vae_temporal=dict(
        type="VAE_Temporal",
        in_out_channels=8,
        latent_embed_dim=8,
        embed_dim=8,
        filters=32,
        num_res_blocks=1,
        decoder_num_res_blocks=3,
        channel_multipliers=(1, 2, 2),
        temporal_downsample=(True, True),
        num_groups=8,
    ),
)
perceptual_loss_weight = 0.0
kl_loss_weight = 1e-6

dtype = "bf16"
seed = 1
outputs = "outputs/embedded/vae_2d"
batch_size = 16
max_steps = 8000
lr = 2e-3
lr_schedule = "cosine"
warmup_steps = 50
grad_clip = 1.0
adam_betas = (0.9, 0.99)
ema_decay = 0.99
log_every = 20
ckpt_every = 200
