"""The images and videos of every family: the input form that its model expects, and the number of tokens of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from families.sizes import FIRST_WORD, IMAGE, PATCH, PATCHES, ROWS, SIDE, VIDEO

SIDE_PATCHES = SIDE // PATCH
Form = Callable[[torch.Generator], dict[str, Tensor]]


def _pixels(name: str, *shape: int, **others: Tensor) -> Form:
    return lambda generator: {name: torch.randn(*shape, generator=generator), **others}


def _both(first: Form, second: Form) -> Form:
    return lambda generator: {**first(generator), **second(generator)}


def _every(value: list[int]) -> Tensor:
    return torch.tensor([value] * ROWS)


# The input forms of an image: plain pixels, patches with a grid or with positions, tiles, ...
_GRID = _every([1, SIDE_PATCHES, SIDE_PATCHES])
_FLAT = 3 * PATCH**2
_HALF = SIDE_PATCHES // 2
_BLOCKS = torch.arange(ROWS * PATCHES).view(ROWS, _HALF, 2, _HALF, 2).transpose(2, 3).reshape(-1, 4)
_PLACES = torch.cartesian_prod(torch.arange(SIDE_PATCHES), torch.arange(SIDE_PATCHES)).flip(-1).repeat(ROWS, 1, 1)
_SINGLE_FRAMES = {"num_frames_per_video": torch.ones(ROWS).long()}
_SIZED = {"image_sizes": _every([SIDE, SIDE])}
FORMS: dict[str, Form] = {
    "plain": _pixels("pixel_values", ROWS, 3, SIDE, SIDE),
    "large": _pixels("pixel_values", ROWS, 3, 2 * SIDE, 2 * SIDE),
    "page": _pixels("pixel_values", ROWS, 3, 4 * SIDE, 4 * SIDE),
    "two sizes": _both(
        _pixels("pixel_values", ROWS, 3, SIDE, SIDE), _pixels("high_res_pixel_values", ROWS, 3, 4 * SIDE, 4 * SIDE)
    ),
    "sized": _pixels("pixel_values", ROWS, 3, SIDE, SIDE, **_SIZED),
    # A Q-Former also reads the question.
    "asked": _pixels("pixel_values", ROWS, 3, SIDE, SIDE, qformer_input_ids=torch.full((ROWS, 3), FIRST_WORD)),
    "frames": _pixels("pixel_values", ROWS, 2, 3, SIDE, SIDE, qformer_input_ids=torch.full((ROWS, 3), FIRST_WORD)),
    "slots": _pixels("pixel_values", ROWS, 1, 3, SIDE, SIDE),
    "masked slots": _pixels("pixel_values", ROWS, 1, 3, SIDE, SIDE, pixel_attention_mask=torch.ones(ROWS, 1).bool()),
    "tiles": _pixels("pixel_values", ROWS, 2, 3, SIDE, SIDE, batch_num_images=torch.ones(ROWS).long(), **_SIZED),
    "crops": _pixels(
        "image_pixel_values", ROWS, 2, 3, SIDE, SIDE, **_SIZED,
        image_attention_mask=torch.ones(ROWS, 2, SIDE_PATCHES, SIDE_PATCHES).long(),
    ),
    "images": _pixels("pixel_values_images", ROWS, 3, SIDE, SIDE),
    "grid": _pixels("pixel_values", ROWS * PATCHES, 2 * _FLAT, image_grid_thw=_GRID),
    "still grid": _pixels(
        "pixel_values", ROWS * PATCHES, _FLAT, image_grid_thw=_GRID, image_grid_hw=_GRID[:, 1:],
        image_merge_sizes=torch.full((ROWS,), 2),
    ),
    "patches": _both(  # the second is the name in older versions of transformers
        _pixels("pixel_values", ROWS * PATCHES, _FLAT), _pixels("image_patches", ROWS, PATCHES, _FLAT)
    ),
    "two steps": _pixels("pixel_values", ROWS * 2 * PATCHES, _FLAT, image_grid_thw=_GRID * torch.tensor([2, 1, 1])),
    "patch grid": _pixels("pixel_values", ROWS * PATCHES, 3, PATCH, PATCH, image_grid_thw=_GRID),
    "token grid": _pixels("pixel_values", ROWS * 4, 2 * PATCH, 2 * PATCH, 3, image_grid_thw=_every([1, 2, 2])),
    "cubes": _pixels("pixel_values", ROWS * 4, 2, PATCH, PATCH, 3),
    "strip": _pixels(
        "pixel_values", 1, 3, PATCH, ROWS * PATCHES * PATCH, target_sizes=_every([SIDE_PATCHES] * 2).int()
    ),
    "shapes": _pixels(
        "pixel_values", ROWS, PATCHES, _FLAT, spatial_shapes=_every([SIDE_PATCHES] * 2),
        pixel_attention_mask=torch.ones(ROWS, PATCHES).long(),
    ),
    "places": _pixels("pixel_values", ROWS, PATCHES, _FLAT, image_position_ids=_PLACES, **_SINGLE_FRAMES),
    "merged places": _pixels(
        "pixel_values", ROWS, 4, 4 * _FLAT, image_position_ids=_PLACES[:, [0, 1, 4, 5]], **_SINGLE_FRAMES
    ),
    "pooled": _pixels(
        "pixel_values", ROWS, PATCHES, _FLAT, image_token_pooling=_BLOCKS, image_grids=_every([_HALF, _HALF, 0, 0]),
        image_num_crops=torch.ones(ROWS).long(), video_grids=_every([1, _HALF, _HALF]),
    ),
    "flattened": lambda generator: {
        "flattened_patches": torch.cat([_PLACES, torch.randn(ROWS, PATCHES, 3 * 16**2, generator=generator)], -1)
    },
}  # fmt: skip


class Image(NamedTuple):
    """The input form of a family's images or videos, and the number of tokens of each in the tiny model.

    others: how many other images the first is compared with; more than one if features are codebook entries, because
    two images share some of them.
    """

    form: str
    tokens: int
    placeholder: int = IMAGE
    others: int = 1
    video: bool = False


IMAGES: dict[str, Image] = {
    "aria": Image("plain", 4),
    "aya_vision": Image("plain", 4),
    "blip-2": Image("plain", 4),
    "chameleon": Image("plain", 64, others=20),
    "cohere2_vision": Image("plain", 4),
    "cohere_compass": Image("grid", 4),
    "cosmos3_edge": Image("still grid", 4),
    "cosmos3_omni": Image("grid", 4),
    "deepseek_ocr2": Image("page", 145),
    "deepseek_vl": Image("plain", 16),
    "deepseek_vl_hybrid": Image("two sizes", 16),
    "dots3_note": Image("still grid", 4),
    "emu3": Image("sized", 72, others=80),
    "ernie4_5_vl_moe": Image("still grid", 4),
    "exaone4_5": Image("grid", 4),
    "fast_vlm": Image("plain", 16),
    "fuyu": Image("patches", 16),
    "gemma3": Image("plain", 4),
    "gemma4": Image("places", 4),
    "gemma4_unified": Image("merged places", 4),
    "glm46v": Image("grid", 4),
    "glm4v": Image("grid", 4),
    "glm4v_moe": Image("grid", 4),
    "glm_ocr": Image("grid", 4),
    "glmga": Image("grid", 4),
    "got_ocr2": Image("plain", 1),
    "granite4_vision": Image("tiles", 10),
    "granite_docling": Image("masked slots", 1),
    "hunyuan_vl": Image("still grid", 8),
    "hyperclovax_vision_v2": Image("grid", 4),
    "idefics2": Image("slots", 64),
    "idefics3": Image("slots", 4),
    "inkling2": Image("token grid", 4),
    "inkling_mm_model": Image("cubes", 4),
    "instructblip": Image("asked", 4),
    "instructblipvideo": Image("frames", 8, VIDEO),
    "internvl": Image("large", 1),
    "janus": Image("plain", 16),
    "kimi_k25": Image("patch grid", 4),
    "kosmos-2": Image("plain", 4),
    "kosmos-2.5": Image("flattened", 4),
    "lfm2_vl": Image("shapes", 4),
    "lfm3_vl": Image("grid", 4),
    "lighton_ocr": Image("sized", 4),
    "llama4": Image("plain", 4),
    "llava": Image("plain", 16),
    "llava_next": Image("tiles", 36),
    "llava_next_video": Image("tiles", 36),
    "llava_onevision": Image("tiles", 36),
    "minicpm_ocr": Image("strip", 4),
    "minicpmv4_6": Image("strip", 1),
    "minicpmv4_7": Image("strip", 1),
    "minimax_m3_vl": Image("grid", 4),
    "mistral3": Image("sized", 4),
    "mistral_large4": Image("sized", 4),
    "molmo2": Image("pooled", 4),
    "muse_glimmer": Image("grid", 4),
    "muse_spark": Image("grid", 4),
    "nemotron_h_omni": Image("still grid", 4),
    "ovis2": Image("plain", 16),
    "paddleocr_vl": Image("patch grid", 4),
    "paligemma": Image("plain", 16),
    "perception_lm": Image("slots", 15),
    "phi4_multimodal": Image("crops", 13),
    "pp_chart2table": Image("plain", 1),
    "qianfan_ocr": Image("large", 1),
    "qwen2_5_omni_thinker": Image("grid", 4),
    "qwen2_5_vl": Image("grid", 4),
    "qwen2_vl": Image("grid", 4),
    "qwen3_5": Image("grid", 4),
    "qwen3_5_moe": Image("grid", 4),
    "qwen3_omni_moe_thinker": Image("grid", 4),
    "qwen3_vl": Image("grid", 4),
    "qwen3_vl_moe": Image("grid", 4),
    "shieldgemma2": Image("plain", 4),
    "smolvlm": Image("slots", 4),
    "step3p7": Image("plain", 1),
    "unlimited_ocr": Image("page", 21),
    "video_llama_3": Image("still grid", 4),
    "video_llava": Image("images", 16),
    "vipllava": Image("plain", 16),
}


def _clip(form: str, tokens: int, placeholder: int = VIDEO) -> Image:
    return Image(form, tokens, placeholder, video=True)


# The same for videos, for families that accept them. Some mark them with the image placeholder.
CLIPS: dict[str, Image] = {
    "cohere_compass": _clip("grid", 4),
    "cosmos3_edge": _clip("still grid", 4),
    "cosmos3_omni": _clip("grid", 4),
    "dots3_note": _clip("still grid", 4),
    "ernie4_5_vl_moe": _clip("two steps", 4),
    "exaone4_5": _clip("grid", 4),
    "gemma4": _clip("places", 4),
    "gemma4_unified": _clip("merged places", 4),
    "glm46v": _clip("grid", 4, IMAGE),
    "glm4v": _clip("grid", 4, IMAGE),
    "glm4v_moe": _clip("grid", 4, IMAGE),
    "glm_ocr": _clip("grid", 4, IMAGE),
    "glmga": _clip("grid", 4, IMAGE),
    "hyperclovax_vision_v2": _clip("grid", 4),
    "kimi_k25": _clip("patch grid", 4),
    "lfm3_vl": _clip("grid", 4),
    "llava_next_video": _clip("frames", 8),
    "llava_onevision": _clip("frames", 9),
    "minicpm_ocr": _clip("strip", 4),
    "minicpmv4_6": _clip("strip", 1),
    "minicpmv4_7": _clip("strip", 1),
    "minimax_m3_vl": _clip("grid", 4),
    "molmo2": _clip("pooled", 4, IMAGE),
    "muse_glimmer": _clip("grid", 4),
    "muse_spark": _clip("grid", 4),
    "perception_lm": _clip("slots", 15),
    "qwen2_5_omni_thinker": _clip("grid", 4),
    "qwen2_5_vl": _clip("grid", 4),
    "qwen2_vl": _clip("grid", 4),
    "qwen3_5": _clip("grid", 4),
    "qwen3_5_moe": _clip("grid", 4),
    "qwen3_omni_moe_thinker": _clip("grid", 4),
    "qwen3_vl": _clip("grid", 4),
    "qwen3_vl_moe": _clip("grid", 4),
    "video_llama_3": _clip("still grid", 4),
    "video_llava": _clip("frames", 34),
}
# In earlier versions of transformers, the family's own forward fails on every video.
CLIPS_SINCE = {"gemma4": "5.23", "gemma4_unified": "5.23"}
# Names of the image arguments for videos.
VIDEO_NAMES = {
    "pixel_values": "pixel_values_videos",
    "image_grid_thw": "video_grid_thw",
    "image_merge_sizes": "video_merge_sizes",
    "image_position_ids": "video_position_ids",
    "image_token_pooling": "video_token_pooling",
    "target_sizes": "target_sizes_videos",
}


def images_of(family: str) -> Iterator[Image]:
    """The family's images, and its videos if the installed transformers supports them."""
    yield IMAGES[family]
    if family in CLIPS and Version(transformers.__version__) >= Version(CLIPS_SINCE.get(family, "5.0")):
        yield CLIPS[family]
