_base_ = "1x256x256.py"

image_size = (1920, 512)
multi_resolution = "PixArtMS"
model = dict(type="PixArtMS-XL/2", space_scale=2.0, from_pretrained="PixArt-XL-2-1024-MS.pth")
