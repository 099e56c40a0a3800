_base_ = "../../_base_/inference_t5.py"

num_frames = 1
fps = 1
model = dict(
    type="PixArt-XL/2",
    space_scale=1.0,
    time_scale=1.0,
    no_temporal_pos_emb=True,
    from_pretrained="PixArt-XL-2-256x256.pth",
)
prompt_path = "./assets/texts/t2i_samples.txt"
