# Embedded model: the transformer once more, mostly on clips whose first half is given, so that they go on smoothly,
# and on more images, of which the stage before has few.
_base_ = "stdit3_masks.py"

dataset = dict(
    sizes=[
        (17, 64, 64, 0.16), (34, 64, 64, 0.18), (1, 64, 64, 0.06, 6000),
        (17, 48, 80, 0.09), (34, 48, 80, 0.09), (1, 48, 80, 0.06, 6000),
        (17, 80, 48, 0.09), (34, 80, 48, 0.09), (1, 80, 48, 0.06, 6000),
    ],
    continued=[(34, 64, 64, 0.08), (34, 48, 80, 0.02), (34, 80, 48, 0.02)],
)  # fmt: skip
model = dict(from_pretrained="outputs/embedded/stdit3_masks/ema")
mask_ratios = {
    "_delete_": True,
    "identity": 0.27,
    "image_head": 0.14,
    "image_head_tail": 0.06,
    "half_head": 0.49,
    "image_tail": 0.02,
    "random": 0.02,
}

seed = 7
outputs = "outputs/embedded/stdit3_extend"
lr = 4e-4
max_steps = 6400
