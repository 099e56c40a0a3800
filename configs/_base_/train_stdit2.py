_base_ = "train_t5.py"

dataset = dict(
    type="VariableVideoTextDataset",
    num_frames=None,
    image_size=(None, None),
    transform_name="resize_crop",
)
model = dict(type="STDiT2-XL/2", from_pretrained=None, input_sq_size=512, qk_norm=True, qk_norm_legacy=True)
vae = dict(micro_batch_size=4, local_files_only=True)
text_encoder = dict(model_max_length=200, local_files_only=True)

num_bucket_build_workers = 16
ckpt_every = 500
