# Embedded model: the transformer again, on nine sizes of clips and images and with given frames.
_base_ = "stdit3.py"

dataset = dict(
    num_frames=None,
    image_size=None,
    sizes=[
        (17, 64, 64, 0.22), (34, 64, 64, 0.18), (1, 64, 64, 0.06),
        (17, 48, 80, 0.12), (34, 48, 80, 0.11), (1, 48, 80, 0.04),
        (17, 80, 48, 0.12), (34, 80, 48, 0.11), (1, 80, 48, 0.04),
    ],
    num_clips=1500,
    features="outputs/embedded/features_sizes",
)  # fmt: skip
model = dict(from_pretrained="outputs/embedded/stdit3/ema")
mask_ratios = {
    "identity": 0.5,
    "image_head": 0.2,
    "image_head_tail": 0.08,
    "half_head": 0.12,
    "quarter_head": 0.02,
    "quarter_tail": 0.02,
    "image_tail": 0.02,
    "random": 0.04,
}

seed = 6
outputs = "outputs/embedded/stdit3_masks"
lr = 5e-4
warmup_steps = 100
max_steps = 2400
ckpt_every = 150
