# The drawn world: the transformer again, on images and clips of all sizes, and with given frames.
_base_ = "stdit3.py"

dataset = dict(
    num_frames=None,
    image_size=None,
    sizes=[
        (17, 128, 128, 0.2), (34, 128, 128, 0.08), (51, 128, 128, 0.04), (1, 128, 128, 0.06, 9000),
        (17, 96, 160, 0.1), (34, 96, 160, 0.05), (1, 96, 160, 0.04, 9000),
        (17, 160, 96, 0.1), (34, 160, 96, 0.05), (1, 160, 96, 0.04, 9000),
    ],
    continued=[(34, 128, 128, 0.14), (34, 96, 160, 0.05), (34, 160, 96, 0.05)],
    num_clips=3000,
    features="outputs/world/features_masks",
)  # fmt: skip
model = dict(from_pretrained="outputs/world/stdit3/ema")
mask_ratios = {
    "identity": 0.42,
    "image_head": 0.2,
    "image_head_tail": 0.1,
    "half_head": 0.18,
    "quarter_head": 0.02,
    "quarter_tail": 0.02,
    "image_tail": 0.02,
    "random": 0.04,
}

seed = 25
outputs = "outputs/world/stdit3_masks"
max_steps = 8000
lr = 7e-4
