"""Tiny random-weight models of every architecture the attention replacement was surveyed on.

`ARCHITECTURES` has 83 entries. 67 of them route their attention through transformers'
`AttentionInterface`, 16 compute it in their own code. All are built from configurations, so
nothing is downloaded, and nothing is built before `Architecture.build` is called.

Text is a batch of three sequences of 72 tokens with 72, 50 and 37 real ones: padded on the right
for encoders, on the left for decoders. Encoder-decoder models decode 40 tokens, so that
cross-attention has a key length different from its query length. Sliding windows and chunks are
16 tokens long, which leaves most of the context outside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

Inputs = dict[str, Any]  # keyword arguments of `model.forward`; all tensors but `use_cache`

LENGTHS = (72, 50, 37)  # real tokens of each row of a batch
LENGTH = max(LENGTHS)
DECODER_LENGTH = 40
WINDOW = 16
IMAGE_SIZE, PATCH_SIZE = 36, 4  # 81 patches
FIRST_TOKEN, LAST_TOKEN, IMAGE_TOKEN = 10, 89, 95  # ordinary ids, and the image placeholder
NUM_IMAGE_TOKENS = 16
NUM_MEL_BINS, NUM_SPECTRA = 32, 144


@dataclass(frozen=True)
class Architecture:
    """One tiny model and one batch for it; see `comparable` for what to do with the output."""

    name: str
    build: Callable[[], PreTrainedModel]  # fp32, eval mode, default attention, always equal weights
    inputs: Callable[[], Inputs]  # always the same batch
    interface: bool  # its attention modules call transformers' `AttentionInterface`
    valid: Callable[[Inputs], Tensor | None]  # real rows `[batch, length]` of a per-token output


def comparable(architecture: Architecture, output: ModelOutput, inputs: Inputs) -> list[Tensor]:
    """The floating-point tensors of `output`, in order, without the rows that are padding.

    Nested outputs (the towers of CLIP) are included; the loss, and everything that is a tuple or
    a cache rather than a tensor (attentions, hidden states, past keys), is not.
    """
    valid = architecture.valid(inputs)
    tensors: list[Tensor] = []
    for name, value in output.items():
        if isinstance(value, ModelOutput):
            tensors += comparable(architecture, value, inputs)
        elif isinstance(value, Tensor) and value.is_floating_point() and name != "loss":
            per_token = valid is not None and value.shape[:2] == valid.shape
            tensors.append(value[valid] if per_token else value)
    return tensors


# --- models ----------------------------------------------------------------------------------

# The sizes of every configuration; each one takes those that it has a field for.
SIZES: dict[str, Any] = {
    name: size
    for size, names in (
        (0, "bos_token_id"),
        (1, "pad_token_id n_group topk_group first_k_dense_replace attn_layer_offset"),
        (2, "eos_token_id num_hidden_layers encoder_layers decoder_layers num_key_value_heads"),
        (2, "no_rope_layer_interval interleave_moe_layer_step"),
        (2, "num_experts_per_tok linear_num_key_heads attn_layer_period num_kv_shared_layers"),
        (3, "mask_token_id"),
        (4, "num_attention_heads encoder_attention_heads decoder_attention_heads"),
        (4, "num_experts num_local_experts n_routed_experts linear_num_value_heads"),
        (4, "block_size window_size num_conv_pos_embedding_groups"),
        (7, "conv_depthwise_kernel_size"),
        (8, "qk_nope_head_dim qk_rope_head_dim v_head_dim rotary_dim mamba_d_state laurel_rank"),
        (8, "linear_key_head_dim linear_value_head_dim frequency_stride time_stride"),
        (16, "head_dim query_pre_attn_scalar q_lora_rank kv_lora_rank hidden_size_per_layer_input"),
        (16, "num_conv_pos_embeddings output_channels num_pos_feats"),
        (32, "embedding_size"),
        (64, "hidden_size embed_dim intermediate_size intermediate_size_mlp hidden_dim d_ff"),
        (64, "ffn_dim encoder_ffn_dim decoder_ffn_dim moe_intermediate_size projection_dim"),
        (64, "shared_expert_intermediate_size max_2d_position_embeddings max_target_positions"),
        (100, "vocab_size vocab_size_per_layer_input max_source_positions"),
        (128, "max_position_embeddings max_encoder_position_embeddings max_seq_len"),
        (128, "max_decoder_position_embeddings"),
        (WINDOW, "sliding_window local_attention attention_chunk_size attention_window"),
        (NUM_MEL_BINS, "num_mel_bins"),
        (IMAGE_SIZE, "image_size"),
        (PATCH_SIZE, "patch_size"),
        (IMAGE_TOKEN, "image_token_index image_token_id"),
        (NUM_IMAGE_TOKENS, "image_seq_length mm_tokens_per_image"),
        ((2, 2), "depths"),
        ((16, 16), "conv_dim"),
        ((5, 3), "conv_kernel"),  # with the strides: 8 * frames + 5 samples
        ((4, 2), "conv_stride"),
    )
    for name in names.split()
}
# Standard deviation of every matrix. It takes attention far from uniform: the logits deviate by
# about 2.5, or 1 where queries and keys are normalised. The second one does the same in models
# that do not scale their logits by head_dim ** -0.5.
WEIGHT_STD, UNSCALED_WEIGHT_STD = 0.2, 0.1


def _config(class_name: str, overrides: dict[str, Any]) -> PreTrainedConfig:
    """`SIZES` and then `overrides`, in which a callable value builds a configuration in turn."""
    config_class = getattr(transformers, class_name)
    fields = {field.name for field in dataclasses.fields(config_class)}
    aliased = {config_class.attribute_map.get(key, key): size for key, size in SIZES.items()}
    values = {key: size for key, size in (aliased | SIZES).items() if key in fields}
    if unknown := overrides.keys() - fields:
        raise TypeError(f"{class_name} has no field {', '.join(sorted(unknown))}")
    values |= {key: value() if callable(value) else value for key, value in overrides.items()}
    return config_class(**values)


def _sub(class_name: str, **overrides: Any) -> Callable[[], PreTrainedConfig]:
    return partial(_config, class_name, overrides)


def _build(class_name: str, weight_std: float, overrides: dict[str, Any]) -> PreTrainedModel:
    transformers.logging.set_verbosity_error()  # remarks on tiny configurations and slow paths
    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(_config(model_class.config_class.__name__, overrides)).eval()
    generator = _generator()
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if parameter.ndim >= 2:
                parameter.normal_(0.0, weight_std, generator=generator)
    return model


# --- batches ---------------------------------------------------------------------------------


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _token_ids(length: int, seed: int = 0) -> Tensor:
    shape = (len(LENGTHS), length)
    return torch.randint(FIRST_TOKEN, LAST_TOKEN + 1, shape, generator=_generator(seed))


def _ragged_mask(left: bool = False) -> Tensor:
    mask = (torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]).long()
    return mask.flip(1) if left else mask


def _text(left: bool = False) -> Inputs:
    mask = _ragged_mask(left)
    input_ids = _token_ids(LENGTH).where(mask.bool(), SIZES["pad_token_id"])
    return {"input_ids": input_ids, "attention_mask": mask}


def _causal_text() -> Inputs:
    return _text(left=True) | {"use_cache": False}


def _decoder_text() -> Inputs:
    return {"decoder_input_ids": _token_ids(DECODER_LENGTH, seed=1), "use_cache": False}


def _seq2seq_text() -> Inputs:
    return _text() | _decoder_text()


def _text_with_encoder_states() -> Inputs:
    shape = (len(LENGTHS), LENGTH, SIZES["hidden_size"])
    return {
        "input_ids": _token_ids(DECODER_LENGTH, seed=1),
        "encoder_hidden_states": torch.randn(shape, generator=_generator(2)),
        "encoder_attention_mask": _ragged_mask(),
        "use_cache": False,
    }


def _text_with_boxes() -> Inputs:
    shape = (len(LENGTHS), LENGTH, 2)
    corner = torch.randint(0, 32, shape, generator=_generator(3))
    size = torch.randint(0, 32, shape, generator=_generator(4))
    return _text() | {"bbox": torch.cat([corner, corner + size], dim=-1)}


def _text_with_global_token() -> Inputs:
    global_attention = torch.zeros_like(_ragged_mask())
    global_attention[:, 0] = 1
    return _text() | {"global_attention_mask": global_attention}


def _seq2seq_text_with_global_token() -> Inputs:
    return _text_with_global_token() | _decoder_text()


def _image(size: int = IMAGE_SIZE, batch: int = 2) -> Inputs:
    return {"pixel_values": torch.randn((batch, 3, size, size), generator=_generator(5))}


def _text_and_image(left: bool = False) -> Inputs:
    return _text(left) | _image()


def _spectrogram() -> Inputs:
    return {"input_values": torch.randn((2, NUM_SPECTRA, NUM_MEL_BINS), generator=_generator(6))}


def _speech() -> Inputs:
    features = torch.randn((len(LENGTHS), NUM_MEL_BINS, 200), generator=_generator(6))
    return {"input_features": features} | _decoder_text()


def _waveform() -> Inputs:
    """Samples that the feature extractors turn into 72, 50 and 37 frames."""
    samples = [8 * frames + 5 for frames in LENGTHS]
    values = torch.randn((len(samples), max(samples)), generator=_generator(7))
    mask = torch.arange(max(samples)) < torch.tensor(samples)[:, None]
    return {"input_values": values * mask, "attention_mask": mask.long()}


def _image_in_text(image_size: int) -> Inputs:
    """Left-padded text that starts with the placeholders of one image."""
    inputs = _causal_text() | _image(image_size, batch=len(LENGTHS))
    placeholders = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        start = LENGTH - length + 1
        placeholders[row, start : start + NUM_IMAGE_TOKENS] = True
    inputs["input_ids"] = inputs["input_ids"].masked_fill(placeholders, IMAGE_TOKEN)
    return inputs


def _image_in_text_typed(image_size: int) -> Inputs:
    inputs = _image_in_text(image_size)
    return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long()}


def _image_in_prefix(image_size: int) -> Inputs:
    """As PaliGemma's processor types it: 0 for the bidirectional prefix, 1 for the suffix."""
    suffix = (torch.arange(LENGTH) >= LENGTH - 12).long().expand(len(LENGTHS), -1)
    return _image_in_text(image_size) | {"token_type_ids": suffix}


def _patches_in_text() -> Inputs:
    """As Qwen2-VL's processor gives it: flattened patches, two frames deep, and a grid."""
    inputs = _image_in_text(IMAGE_SIZE)
    side = 8
    shape = (len(LENGTHS) * side * side, 3 * 2 * PATCH_SIZE * PATCH_SIZE)
    return inputs | {
        "pixel_values": torch.randn(shape, generator=_generator(8)),
        "image_grid_thw": torch.tensor([[1, side, side]] * len(LENGTHS)),
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).int(),
    }


# --- the catalogue ---------------------------------------------------------------------------


def _token_rows(inputs: Inputs) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return None if mask is None else mask.bool()


def _frame_rows(inputs: Inputs) -> Tensor | None:
    return _ragged_mask().bool()  # the attention mask counts samples


def _entry(
    name: str,
    class_name: str,
    inputs: Callable[[], Inputs],
    *,
    valid: Callable[[Inputs], Tensor | None] = _token_rows,
    weight_std: float = WEIGHT_STD,
    **overrides: Any,
) -> Architecture:
    build = partial(_build, class_name, weight_std, overrides)
    return Architecture(name, build, inputs, interface=True, valid=valid)


_encoder = partial(_entry, inputs=_text)
_decoder = partial(_entry, inputs=_causal_text)
_seq2seq = partial(_entry, inputs=_seq2seq_text)
_vision = partial(_entry, inputs=_image)
_audio = partial(_entry, inputs=_waveform, valid=_frame_rows, feat_extract_norm="layer")

FULL, SLIDING = "full_attention", "sliding_attention"
SCALED_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale_all_dim": 1.0}
SECTIONED_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
SHIFTED_WINDOWS: dict[str, Any] = {"image_size": 32, "embed_dim": 32, "num_heads": (2, 4)}

_THROUGH_INTERFACE = (
    # Encoders.
    _encoder("bert", "BertModel"),
    _encoder("roberta", "RobertaModel"),
    _encoder("xlm-roberta", "XLMRobertaModel"),
    _encoder("camembert", "CamembertModel"),
    _encoder("electra", "ElectraModel"),
    _encoder("albert", "AlbertModel"),
    _encoder("distilbert", "DistilBertModel"),
    _encoder("gte", "GteModel"),
    _encoder("nomic-bert", "NomicBertModel"),
    _encoder("jina-v3", "JinaEmbeddingsV3Model"),
    _encoder("modernbert", "ModernBertModel", layer_types=[FULL, SLIDING]),
    _encoder("eurobert", "EuroBertModel"),
    _encoder("esm", "EsmModel", position_embedding_type="rotary"),
    _encoder("layoutlm", "LayoutLMModel", inputs=_text_with_boxes),
    # Decoders.
    _decoder(
        "bert-decoder",
        "BertLMHeadModel",
        inputs=_text_with_encoder_states,
        is_decoder=True,
        add_cross_attention=True,
    ),
    _decoder("gpt2", "GPT2LMHeadModel"),
    _decoder("gpt2-layer-scale", "GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True),
    _decoder("gpt-neox", "GPTNeoXForCausalLM"),
    _decoder("opt", "OPTForCausalLM"),
    _decoder("phi", "PhiForCausalLM", num_key_value_heads=4),
    _decoder("stablelm", "StableLmForCausalLM", num_key_value_heads=4),
    _decoder("llama-gqa", "LlamaForCausalLM"),
    _decoder("qwen2", "Qwen2ForCausalLM"),
    _decoder("qwen3", "Qwen3ForCausalLM"),
    _decoder("qwen3-moe", "Qwen3MoeForCausalLM"),
    _decoder("cohere", "CohereForCausalLM"),
    _decoder("olmo2", "Olmo2ForCausalLM", num_key_value_heads=4),
    _decoder("smollm3", "SmolLM3ForCausalLM"),
    _decoder("granite", "GraniteForCausalLM", attention_multiplier=0.3),
    _decoder("gemma", "GemmaForCausalLM", num_key_value_heads=1),
    _decoder("mistral", "MistralForCausalLM"),
    _decoder("mixtral", "MixtralForCausalLM"),
    _decoder("phi3", "Phi3ForCausalLM"),
    _decoder("starcoder2", "Starcoder2ForCausalLM"),
    _decoder("qwen2-window", "Qwen2ForCausalLM", use_sliding_window=True, max_window_layers=1),
    _decoder("cohere2", "Cohere2ForCausalLM", layer_types=[SLIDING, FULL]),
    _decoder("gemma2", "Gemma2ForCausalLM", layer_types=[SLIDING, FULL]),
    _decoder("gemma3-text", "Gemma3ForCausalLM", layer_types=[SLIDING, FULL]),
    _decoder(
        "gemma3n-text",
        "Gemma3nForCausalLM",
        num_hidden_layers=4,  # the last two take the keys and values of the first two
        layer_types=[SLIDING, FULL, SLIDING, FULL],
        activation_sparsity_pattern=[0.0] * 4,
    ),
    _decoder("gpt-oss", "GptOssForCausalLM", layer_types=[SLIDING, FULL]),
    _decoder(
        "deepseek-v3", "DeepseekV3ForCausalLM", num_key_value_heads=4, rope_parameters=SCALED_ROPE
    ),
    _decoder("llama4-text", "Llama4ForCausalLM"),  # chunks with rope, then neither
    _decoder("qwen3-next", "Qwen3NextForCausalLM", layer_types=["linear_attention", FULL]),
    _decoder("jamba", "JambaForCausalLM", use_mamba_kernels=False),  # Mamba, then attention
    # Encoder-decoders.
    _seq2seq("t5", "T5ForConditionalGeneration", weight_std=UNSCALED_WEIGHT_STD),
    _seq2seq("mt5", "MT5ForConditionalGeneration", weight_std=UNSCALED_WEIGHT_STD),
    _seq2seq("bart", "BartForConditionalGeneration"),
    _seq2seq("mbart", "MBartForConditionalGeneration"),
    _seq2seq("marian", "MarianMTModel", scale_embedding=True, weight_std=0.15),
    _seq2seq("pegasus", "PegasusForConditionalGeneration"),
    _seq2seq("m2m-100", "M2M100ForConditionalGeneration"),
    _seq2seq("whisper", "WhisperForConditionalGeneration", inputs=_speech),
    # Images.
    _vision("vit", "ViTModel"),
    _vision("deit", "DeiTModel"),
    _vision("dinov2", "Dinov2Model"),
    _vision("beit", "BeitModel", use_relative_position_bias=True, layer_scale_init_value=1.0),
    _vision("swin", "SwinModel", inputs=partial(_image, 32), **SHIFTED_WINDOWS),
    # Sound.
    _entry("ast", "ASTModel", _spectrogram, max_length=NUM_SPECTRA),
    _audio("wav2vec2", "Wav2Vec2Model"),
    _audio("hubert", "HubertModel"),
    _audio("wav2vec2-conformer", "Wav2Vec2ConformerModel"),
    # Images and text.
    _entry(
        "clip",
        "CLIPModel",
        _text_and_image,
        text_config=_sub("CLIPTextConfig"),
        vision_config=_sub("CLIPVisionConfig"),
    ),
    _entry(
        "siglip",
        "SiglipModel",
        partial(_text_and_image, left=True),  # the last token is the summary of the text
        text_config=_sub("SiglipTextConfig"),
        vision_config=_sub("SiglipVisionConfig"),
    ),
    _entry(
        "llava",
        "LlavaForConditionalGeneration",
        partial(_image_in_text, 16),
        text_config=_sub("LlamaConfig"),
        vision_config=_sub("CLIPVisionConfig", image_size=16),
        vision_feature_layer=-1,
    ),
    _entry(
        "gemma3-vlm",
        "Gemma3ForConditionalGeneration",
        partial(_image_in_text_typed, 32),
        text_config=_sub("Gemma3TextConfig", layer_types=[SLIDING, FULL]),
        vision_config=_sub("SiglipVisionConfig", image_size=32, vision_use_head=False),
    ),
    _entry(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        partial(_image_in_prefix, 16),
        text_config=_sub("GemmaConfig"),
        vision_config=_sub("SiglipVisionConfig", image_size=16, vision_use_head=False),
    ),
    _entry(
        "qwen2-vl",
        "Qwen2VLForConditionalGeneration",
        _patches_in_text,
        text_config=_sub("Qwen2VLTextConfig", rope_parameters=SECTIONED_ROPE),
        vision_config=_sub("Qwen2VLVisionConfig"),
    ),
)

_OWN_ATTENTION = (
    _encoder("mpnet", "MPNetModel"),
    _encoder("roformer", "RoFormerModel"),
    _encoder("megatron-bert", "MegatronBertModel"),
    _encoder("bigbird", "BigBirdModel", num_random_blocks=1),
    _encoder("longformer", "LongformerModel", inputs=_text_with_global_token),
    _seq2seq("led", "LEDForConditionalGeneration", inputs=_seq2seq_text_with_global_token),
    _decoder("bloom", "BloomForCausalLM"),
    _decoder("mpt", "MptForCausalLM"),
    _encoder("deberta-v2", "DebertaV2Model", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _vision("swinv2", "Swinv2Model", inputs=partial(_image, 32), **SHIFTED_WINDOWS),
    _audio("wavlm", "WavLMModel"),
    _decoder("falcon-rope", "FalconForCausalLM"),
    _decoder("falcon-alibi", "FalconForCausalLM", alibi=True),
    _decoder("gptj", "GPTJForCausalLM"),
    _decoder(
        "gpt-neo",
        "GPTNeoForCausalLM",
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        weight_std=UNSCALED_WEIGHT_STD,
    ),
    _vision("sam-vision", "SamVisionModel", global_attn_indexes=[1]),
)

ARCHITECTURES: tuple[Architecture, ...] = (
    *_THROUGH_INTERFACE,
    *(dataclasses.replace(architecture, interface=False) for architecture in _OWN_ATTENTION),
)
