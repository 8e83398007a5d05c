"""Per-family changes to the shrunken configuration: sizes that depend on each other, ids without a default."""

from __future__ import annotations

from typing import Any

from families.sizes import AUDIO, CODES, FIRST_CODE, IMAGE, LINE_END, PAD, PATCH, PATCHES, SIDE, VIDEO

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {**_ROPE, "mrope_section": [2, 3, 3]}
_TEXT_MROPE = {"text_config": {"rope_parameters": _MROPE}}
_GLM = {"text_config": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}}}
_MIXED = {"text_config": {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}}
_OMNI = {"vision_start_token_id": 110, **_TEXT_MROPE}
_PIXTRAL = {"vision_config": {"head_dim": 16}}
_GEMMA3 = {"mm_tokens_per_image": 4}
_POOLED = {"vision_config": {"pooling_kernel_size": 2, "position_embedding_size": 8}}
_TILES = {"image_grid_pinpoints": [[SIDE, SIDE]], "image_seq_length": PATCHES}
_MINICPM = {**_MIXED, "image_token_id": IMAGE, "video_token_id": VIDEO, "insert_layer_id": 0, "image_size": SIDE}
_QFORMER = {"num_query_tokens": 4, "qformer_config": {"cross_attention_frequency": 1}}
_VOCABULARY = {"image_token_id": IMAGE}
_OCR_TOWER = {
    "sam_config": {
        "output_channels": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48, "image_size": 64,
        "downsample_channels": [16, 32],
    },
}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {PATCHES: 4}},
    "blip-2": {"image_token_index": IMAGE, **_QFORMER},
    "chameleon": {
        **_VOCABULARY,
        "vocabulary_map": {"<image>": IMAGE, **{f"IMGIMG{'ABCDEFGH'[i]}Z": FIRST_CODE + i for i in range(CODES)}},
        "vq_config": {
            "resolution": SIDE, "base_channels": 32, "num_embeddings": CODES, "embed_dim": 8, "attn_resolutions": [],
            "channel_multiplier": [1, 1],
        },
    },
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _MROPE, "sliding_attention": _MROPE}}},
    "cosmos3_edge": {"text_config": {"head_dim": 16}, "vision_config": {"num_patches": PATCHES}},
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse", "sparse"], "n_routed_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
        "vision_config": _OCR_TOWER,
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": {"image_size": 4 * SIDE}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "dots3_note": {
        "text_config": {"layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"]},
        "audio_config": {"adapter_input_size": 32, "adapter_output_size": 32},
        "vision_config": {"mlp_layer_types": ["dense"] * 3, "adapter_in_dim": 32, "adapter_out_dim": 32},
    },
    "emu3": {
        **_VOCABULARY,
        "vocabulary_map": {
            "<image>": IMAGE, "<|extra_200|>": LINE_END,
            **{f"<|visual token {i:06}|>": FIRST_CODE + i for i in range(CODES)},
        },
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": CODES},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "head_dim": 16, "rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]},
            "moe_intermediate_size": [16, 16], "moe_k": 2,
        }
    },
    "gemma3": _GEMMA3,
    "gemma3n": {
        "text_config": {
            "num_hidden_layers": 4, "intermediate_size": [48] * 4, "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0] * 4,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        }
    },
    "gemma4": _POOLED,
    "gemma4_unified": {"vision_config": {"pooling_kernel_size": 2, "model_patch_size": 2 * PATCH}},
    "glm46v": _GLM,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm5_next": {
        "text_config": {
            "qk_rope_head_dim": 0, "indexer_types": ["full"] * 3,
            "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
        }
    },
    "glm_ocr": _GLM,
    "glmga": _GLM,
    "granite4_vision": {
        **_TILES,
        "downsample_rate": "2/4", "deepstack_layer_map": [[1, 0], [2, 1]], "spatial_target_layers": [0, 1],
        "vision_config": {"hidden_size": 64},
        "qformer_config": {"intermediate_size": 48},
    },
    "hunyuan_vl": {"text_config": {"head_dim": 16, "rope_parameters": {**_MROPE, "mrope_section": [2, 2, 2, 2]}}},
    "inkling_mm_model": {"vision_config": {"n_layers": 4}},
    "instructblip": {"image_token_index": IMAGE, **_QFORMER},
    "instructblipvideo": {"video_token_index": VIDEO, **_QFORMER},
    "kimi_k25": {
        "text_config": {"head_dim": 8, "qk_head_dim": 16},
        "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4}, "projection_hidden_size": 32,
    },
    "kosmos-2": {"latent_query_num": 4},
    "kosmos-2.5": {"latent_query_num": 4},
    "lighton_ocr": _PIXTRAL,
    "llama4": {
        "vision_config": {
            "intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32,
        }
    },
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "minicpm_ocr": _MINICPM,
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "mistral3": _PIXTRAL,
    "mistral4": {"head_dim": 16, "qk_head_dim": 16},
    "mistral_large4": {"text_config": {"kv_source_layers": [0, 1, 2]}, **_PIXTRAL},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [2, 1]}, "text_config": {"rope_scaling_layers": [0, 1, 2]},
        "image_patch_id": IMAGE, "vision_config": {"image_size": [SIDE, SIDE], "num_position_embeddings": PATCHES},
    },
    "muse_glimmer": {"out_hidden_size": 128, "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4}},
    "muse_spark": {
        "out_hidden_size": 128,
        "audio_config": {"patch_sizes": [16, 6, 5], "hidden_sizes": [32, 32, 32], "depths": [1, 1, 1]},
        "text_config": {"layer_rope_theta": [10000.0, 0, 10000.0]},
    },
    "nemotron_h_omni": {
        "image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": AUDIO, "vision_hidden_size": 32,
    },
    "paddleocr_vl": {"text_config": {"rope_parameters": _MROPE, "head_dim": 16}},
    "phi4_multimodal": {
        "vision_config": {"crop_size": SIDE},
        "audio_config": {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32},
        "rope_parameters": _ROPE,
    },
    "qwen2_5_omni_thinker": _OMNI,
    "qwen2_5_vl": _TEXT_MROPE,
    "qwen2_vl": _TEXT_MROPE,
    "qwen3_5": _MIXED,
    "qwen3_5_moe": _MIXED,
    "qwen3_omni_moe_thinker": _OMNI,
    "qwen4_exp": {
        "text_config": {
            "head_dim": 16,
            "hc_lowrank": 8, "hc_count": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
            "indexer_budget": 64, "indexer_compress_ratio": 4, "pad_token_id": PAD,
            "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
            "rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
        }
    },
    "shieldgemma2": _GEMMA3,
    "step3p7": {
        "text_config": {
            "sliding_window": 8, "layer_types": ["full_attention"] * 3, "mlp_layer_types": ["dense"] * 3,
        }
    },
    "unlimited_ocr": {"vision_config": _OCR_TOWER},
    "vipllava": {"vision_feature_layers": [-2, -1]},
}  # fmt: skip

# Parts missing from a default configuration, with the classes of their configurations.
PARTS = {
    "gemma4": {"vision_config": "Gemma4VisionConfig"},
    "gemma4_unified": {"vision_config": "Gemma4UnifiedVisionConfig"},
}
