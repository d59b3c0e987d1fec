"""HunyuanVideo, and FramePack, whose transformer is the same with an image's embedder beside it."""

from merge.families.dit import dit
from merge.families.sources import COMFY

HUNYUAN_VIDEO = dit(
    "hunyuan-video",
    "HunyuanVideo",
    "hunyuan-video",
    ("hunyuan_video", "framepack"),
    comfy_naming=COMFY,
    widths={"x_embedder.proj": (16, 32, 33)},  # the image-to-video model
    optional=("time_text_embed.guidance_embedder.",),
    hints=("hunyuan_video", "hunyuan-video", "hunyuanvideo", "framepack"),
)
