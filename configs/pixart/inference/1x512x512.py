_base_ = "../../_base_/inference_t5.py"

num_frames = 1
fps = 1
image_size = (512, 512)
model = dict(
    type="PixArt-XL/2",
    space_scale=1.0,
    time_scale=1.0,
    no_temporal_pos_emb=True,
    from_pretrained="PixArt-XL-2-512x512.pth",
)
prompt = [
    "Pirate ship trapped in a cosmic maelstrom nebula.",
    "A small cactus with a happy face in the Sahara desert.",
    "A small cactus with a sad face in the Sahara desert.",
]
