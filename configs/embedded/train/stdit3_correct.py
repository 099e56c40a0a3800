# Embedded model: the transformer once more, on noised latents that lean to another color or shape, which it corrects.
_base_ = "stdit3_extend.py"

dataset = dict(
    sizes=[
        (17, 64, 64, 0.30, 4500), (34, 64, 64, 0.12, 1000), (1, 64, 64, 0.05, 3000),
        (17, 48, 80, 0.11, 1200), (34, 48, 80, 0.05, 400), (1, 48, 80, 0.05, 2400),
        (17, 80, 48, 0.11, 1200), (34, 80, 48, 0.05, 400), (1, 80, 48, 0.05, 2400),
    ],
    continued=[(34, 64, 64, 0.08, 700), (34, 48, 80, 0.015, 240), (34, 80, 48, 0.015, 240)],
    seed=7000,
    features="outputs/embedded/features_correct",
)  # fmt: skip
model = dict(from_pretrained="outputs/embedded/stdit3_extend/ema")
mask_ratios = {
    "_delete_": True,
    "identity": 0.50,
    "image_head": 0.13,
    "image_head_tail": 0.06,
    "half_head": 0.24,
    "quarter_head": 0.01,
    "quarter_tail": 0.01,
    "image_tail": 0.03,
    "random": 0.02,
}
input_perturbation = 0.7

seed = 9
outputs = "outputs/embedded/stdit3_correct"
lr = 3.5e-4
max_steps = 13_000
