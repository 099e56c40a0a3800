# Embedded model: the transformer again, on nine sizes of clips and images and with given frames.
_base_ = "stdit3.py"

dataset = dict(
    num_frames=None,
    image_size=None,
    sizes=[
        (17, 64, 64, 0.18), (34, 64, 64, 0.08), (1, 64, 64, 0.05),
        (17, 48, 80, 0.12), (34, 48, 80, 0.05), (1, 48, 80, 0.05),
        (17, 80, 48, 0.12), (34, 80, 48, 0.05), (1, 80, 48, 0.05),
    ],
    continued=[(34, 64, 64, 0.14), (34, 48, 80, 0.05), (34, 80, 48, 0.05)],
    num_clips=1500,
    features="outputs/embedded/features_masks",
)  # fmt: skip
model = dict(from_pretrained="outputs/embedded/stdit3/ema")
mask_ratios = {
    "identity": 0.45,
    "image_head": 0.22,
    "image_head_tail": 0.12,
    "half_head": 0.09,
    "quarter_head": 0.02,
    "quarter_tail": 0.02,
    "image_tail": 0.03,
    "random": 0.05,
}

seed = 6
outputs = "outputs/embedded/stdit3_masks"
lr = 7e-4
warmup_steps = 100
max_steps = 9000
ckpt_every = 150
