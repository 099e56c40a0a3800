_base_ = "../../_base_/train_t5.py"

dataset = dict(image_size=(512, 512))
model = dict(
    type="STDiT-XL/2",
    space_scale=1.0,
    time_scale=2 / 3,
    from_pretrained=None,
    enable_sequence_parallelism=True,
)
sp_size = 2
batch_size = 1
