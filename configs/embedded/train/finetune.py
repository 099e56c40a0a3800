# Fine-tuning of the embedded model on videos of your own: --data-path names a table, as `opensora table` makes it.
_base_ = "stdit3.py"

dataset = dict(
    _delete_=True,
    type="VideoTextDataset",
    data_path=None,
    num_frames=17,
    image_size=(64, 64),
    transform_name="resize_crop",
)
model = dict(from_pretrained="embedded:stdit3")
vae = dict(from_pretrained="embedded:vae")
text_encoder = dict(from_pretrained="embedded:text_encoder")
scheduler = dict(cfg_scale=2.5)
# Frames that are given now and then, so that the model can still go on from them.
mask_ratios = {"identity": 0.7, "image_head": 0.2, "image_head_tail": 0.1}

dtype = "fp32"
compile = False
seed = 42
outputs = "outputs/finetune"
batch_size = 8
max_steps = 200
lr = 1e-4
lr_schedule = "constant"
adam_betas = (0.9, 0.999)
warmup_steps = 20
grad_clip = 1.0
ema_decay = 0.98
log_every = 10
ckpt_every = 50
validate_every = 50
sample_every = 100
