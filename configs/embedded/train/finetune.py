# Fine-tuning of the embedded model on videos of your own: --data-path names a table, as `opensora table` makes it.
dataset = dict(
    type="VideoTextDataset",
    data_path=None,
    num_frames=17,
    image_size=(64, 64),
    transform_name="resize_crop",
)

model = dict(
    type="STDiT3",
    from_pretrained="embedded:stdit3",
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
vae = dict(type="VideoAutoencoderPipeline", from_pretrained="embedded:vae")
text_encoder = dict(type="t5", from_pretrained="embedded:text_encoder", model_max_length=32)
scheduler = dict(type="rflow", sample_method="logit-normal", loc=0.3, scale=1.2, cfg_scale=2.5)
# Frames that are given now and then, so that the model can still go on from them.
mask_ratios = {"identity": 0.7, "image_head": 0.2, "image_head_tail": 0.1}

dtype = "fp32"
seed = 42
outputs = "outputs/finetune"
batch_size = 8
max_steps = 200
lr = 1e-4
warmup_steps = 20
grad_clip = 1.0
ema_decay = 0.98
log_every = 10
ckpt_every = 50
validate_every = 50
sample_every = 100
