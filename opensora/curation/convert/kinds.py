"""The kinds of data sets that `opensora data convert` reads. This module imports nothing heavy."""

from __future__ import annotations

KINDS = {
    "video": "videos below a folder",
    "image": "images below a folder",
    "imagenet": "images in a folder per class (ImageNet); captions are the names of the classes",
    "ucf101": "videos in a folder per class (UCF101); captions are the names of the classes",
    "vidprom": "videos named MODEL-UUID.mp4 (VidProM), with the prompts of the table --info",
    "jsonl": "a table with other names of columns, such as video_path and caption",
    "hf": "a folder with metadata.csv, .jsonl or .parquet and its column file_name (Hugging Face)",
    "webdataset": "a .tar file, or a folder of them (WebDataset); the media are extracted",
}
