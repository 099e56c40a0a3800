# The drawn world: the diffusion transformer on 17 frames, from latents and text that are encoded once.
# Sizes are for a GPU with 16 processor cores that render; those for a CPU are in cpu/.
dataset = dict(
    type="WorldClips",
    num_frames=17,
    image_size=(128, 128),
    fps=24,
    num_clips=40_000,
    features="outputs/world/features",
)

model = dict(
    type="STDiT3",
    in_channels=8,
    patch_size=(1, 4, 4),
    hidden_size=288,
    depth=6,
    num_heads=6,
    caption_channels=128,
    model_max_length=64,
    input_sq_size=128,
    qk_norm=True,
    pred_sigma=False,
    class_dropout_prob=0.1,
)
vae = dict(type="VideoAutoencoderPipeline", from_pretrained="outputs/world/vae_video/ema")
text_encoder = dict(type="t5", from_pretrained="outputs/world/text_encoder/ema", model_max_length=64)
scheduler = dict(type="rflow", sample_method="logit-normal", loc=0.3, scale=1.2)

dtype = "bf16"
compile = True
num_workers = 16
seed = 24
outputs = "outputs/world/stdit3"
batch_size = 256
max_steps = 8000
lr = 1e-3
lr_schedule = "cosine"
warmup_steps = 300
grad_clip = 1.0
adam_betas = (0.9, 0.98)
ema_decay = 0.999
log_every = 50
ckpt_every = 500
