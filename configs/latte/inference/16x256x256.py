_base_ = "../../dit/inference/16x256x256.py"

model = dict(type="Latte-XL/2")
