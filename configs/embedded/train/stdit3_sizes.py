# The embedded model's transformer on three resolutions of three shapes, as images and clips, on any number of ranks.
_base_ = "stdit3_masks.py"

dataset = dict(
    sizes=[
        (17, 64, 64, 1), (34, 64, 64, 1), (1, 64, 64, 1),
        (17, 48, 80, 1), (34, 48, 80, 1), (1, 48, 80, 1),
        (17, 80, 48, 1), (34, 80, 48, 1), (1, 80, 48, 1),
        (17, 48, 48, 1), (34, 48, 48, 1), (1, 48, 48, 1),
        (17, 32, 64, 1), (34, 32, 64, 1), (1, 32, 64, 1),
        (17, 64, 32, 1), (34, 64, 32, 1), (1, 64, 32, 1),
        (17, 80, 80, 1), (34, 80, 80, 1), (1, 80, 80, 1),
        (17, 64, 96, 1), (34, 64, 96, 1), (1, 64, 96, 1),
        (17, 96, 64, 1), (34, 96, 64, 1), (1, 96, 64, 1),
    ],
    continued=None,
    num_clips=160,
    features="outputs/embedded/features_sizes",
)  # fmt: skip

seed = 8
outputs = "outputs/embedded/stdit3_sizes"
batch_size = 8
max_steps = 700
ema_decay = 0.98
warmup_steps = 20
validate_every = 100
validation_samples = 8
sample_every = 350
sample_prompts = ["a red circle moving right on a black background", "a blue square growing on a gray background"]
