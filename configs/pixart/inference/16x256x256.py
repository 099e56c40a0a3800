_base_ = "../../_base_/inference_t5.py"

model = dict(
    type="PixArt-XL/2",
    space_scale=0.5,
    time_scale=1.0,
    from_pretrained="outputs/098-F16S3-PixArt-XL-2/epoch7-global_step30000/model_ckpt.pt",
)
prompt_path = "./assets/texts/t2v_samples.txt"
