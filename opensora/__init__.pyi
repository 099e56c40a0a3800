from opensora.pipeline.pipeline import Preview as Preview
from opensora.pipeline.pipeline import VideoPipeline as VideoPipeline
from opensora.pipeline.video import Video as Video
from opensora.training import train as train

__version__: str
load = VideoPipeline.from_pretrained
