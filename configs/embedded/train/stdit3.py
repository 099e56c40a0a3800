# Embedded model, stage 3: the diffusion transformer, on latents and text that are encoded once.
dataset = dict(
    type="ShapeClips",
    num_frames=17,
    image_size=(64, 64),
    fps=24,
    num_clips=9000,
    features="outputs/embedded/features",
)

model = dict(
    type="STDiT3",
    in_channels=8,
    hidden_size=256,
    depth=6,
    num_heads=4,
    caption_channels=128,
    model_max_length=32,
    input_sq_size=64,
    qk_norm=True,
    pred_sigma=False,
    class_dropout_prob=0.1,
)
vae = dict(type="VideoAutoencoderPipeline", from_pretrained="outputs/embedded/vae_temporal/ema")
text_encoder = dict(type="t5", from_pretrained="opensora/embedded/text_encoder", model_max_length=32)
scheduler = dict(type="rflow", sample_method="logit-normal", loc=0.3, scale=1.2)

dtype = "bf16"
compile = True
seed = 4
outputs = "outputs/embedded/stdit3"
batch_size = 32
max_steps = 5500
lr = 1e-3
lr_schedule = "cosine"
warmup_steps = 200
grad_clip = 1.0
adam_betas = (0.9, 0.98)
ema_decay = 0.999
log_every = 50
ckpt_every = 500
