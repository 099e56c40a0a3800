_base_ = "1x2048MS.py"

model = dict(type="PixArt-1B/2", from_pretrained="PixArt-1B-2.pth")
