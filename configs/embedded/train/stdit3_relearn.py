# Embedded model: the transformer learns the latents of another autoencoder, on all sizes and with given frames at once.
_base_ = "stdit3_masks.py"

dataset = dict(
    sizes=[
        (17, 64, 64, 0.26, 4500), (34, 64, 64, 0.12, 1500), (1, 64, 64, 0.05, 5000),
        (17, 48, 80, 0.11, 1300), (34, 48, 80, 0.06, 800), (1, 48, 80, 0.05, 5000),
        (17, 80, 48, 0.11, 1300), (34, 80, 48, 0.06, 800), (1, 80, 48, 0.05, 5000),
    ],
    continued=[(34, 64, 64, 0.09, 1200), (34, 48, 80, 0.02, 400), (34, 80, 48, 0.02, 400)],
    features="outputs/embedded/features_relearn",
)  # fmt: skip
model = dict(from_pretrained="assets/embedded/stdit3/model.gguf")
vae = dict(from_pretrained="assets/embedded/vae")
mask_ratios = {
    "_delete_": True,
    "identity": 0.50,
    "image_head": 0.16,
    "image_head_tail": 0.07,
    "half_head": 0.20,
    "quarter_head": 0.01,
    "quarter_tail": 0.01,
    "image_tail": 0.03,
    "random": 0.02,
}

seed = 8
outputs = "outputs/embedded/stdit3_relearn"
lr = 7e-4
max_steps = 12_000
ckpt_every = 250
