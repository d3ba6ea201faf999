"""The Hugging Face architectures that plans are held to: class, sizes and batch of each, as data.

Each model is its class's default configuration with small sizes: two layers, narrow, a short
vocabulary, random weights. Only what draws random numbers is switched off, because eager mode draws
others: dropout, layer drop and masking of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Batch = dict[str, Any]
Section = dict[str, "Architecture"]
VOCABULARY, WIDTH, LENGTH, ROWS = 128, 64, 16, 4


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model class of transformers, the sizes it is built with, and a batch for it.

    `sizes` are arguments of its configuration class; a mapping among them is the configuration
    of a part. `without` says, for a column of the table that means nothing here, why. `tolerance`
    is relative to the largest entry of a tensor: norms, rotary embeddings and losses compute in
    float32 whatever the model's type.
    """

    model: str
    sizes: Mapping[str, Any]
    batch: Callable[[], Batch]
    without: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-6

    def build(self) -> nn.Module:
        """The model with weights drawn after `torch.manual_seed(0)`, in float64, no weight zero."""
        torch.manual_seed(0)
        kind = getattr(transformers, self.model)
        model: nn.Module = kind(quiet(kind.config_class(**self.sizes))).to(self.dtype)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.05 * torch.randn_like(weight)
        return model


def quiet(config: Any) -> Any:
    """The configuration with every probability of dropping or masking something at zero."""
    for name, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            quiet(value)
        elif isinstance(value, float) and ("drop" in name or name.startswith("mask_")):
            setattr(config, name, 0.0)
    if hasattr(config, "apply_spec_augment"):
        config.apply_spec_augment = False
    return config


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, LENGTH))


def text() -> Batch:
    """Tokens and labels of which some are ignored."""
    labels = tokens()
    labels[1, :9] = -100
    return {"input_ids": tokens(), "labels": labels}


def images() -> Batch:
    """Images of 16 x 16 and a class for each."""
    return {"pixel_values": pixels(16), "labels": torch.randint(0, 8, (ROWS,))}


def pixels(size: int) -> Tensor:
    return torch.randn(ROWS, 3, size, size, dtype=torch.float64)


def large_images() -> Batch:
    """Images of 64 x 64 and a class for each."""
    return {"pixel_values": pixels(64), "labels": torch.randint(0, 8, (ROWS,))}


def segmented_images() -> Batch:
    """Images of 64 x 64 and a class for each pixel."""
    return {"pixel_values": pixels(64), "labels": torch.randint(0, 8, (ROWS, 64, 64))}


def pairs() -> Batch:
    """Texts and images that belong together."""
    return {"input_ids": tokens(), "pixel_values": pixels(16), "return_loss": True}


def spectra() -> Batch:
    """Log-mel spectra of 32 frames and their transcripts."""
    return {
        "input_features": torch.randn(ROWS, 16, 32, dtype=torch.float64),
        "labels": tokens(),
    }


def waves() -> Batch:
    """Sound of 400 samples and transcripts of five letters."""
    return {
        "input_values": torch.randn(ROWS, 400, dtype=torch.float64),
        "labels": torch.randint(1, 32, (ROWS, 5)),
    }


def spoken_classes() -> Batch:
    """Sound of 400 samples and a class for each."""
    return waves() | {"labels": torch.randint(0, 2, (ROWS,))}


DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = DECODER | {"num_key_value_heads": 2}
HEADED = GROUPED | {"head_dim": 16}
N_EMBD = {
    "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = DECODER | {"num_labels": 8}
SEQ2SEQ = TOKENS | {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH, "max_position_embeddings": 64, "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": 2 * WIDTH, "num_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
PIXELS = {
    "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 16, "patch_size": 4, "num_labels": 8,
}  # fmt: skip
PAIR = {
    "text_config": GROUPED | TOKENS,
    "vision_config": {k: v for k, v in PIXELS.items() if k != "num_labels"},
}
EXPERTS = HEADED | {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": WIDTH,
}  # fmt: skip
WAVES = DECODER | TOKENS | {
    "vocab_size": 32, "conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 32,
}  # fmt: skip
NO_VOCABULARY = {"vocab": "no vocabulary"}


DECODERS: Section = {
    "llama": Architecture("LlamaForCausalLM", GROUPED, text),
    "mistral": Architecture("MistralForCausalLM", GROUPED, text),
    "ministral": Architecture("MinistralForCausalLM", HEADED, text),
    "qwen2": Architecture("Qwen2ForCausalLM", GROUPED, text),
    "qwen3": Architecture("Qwen3ForCausalLM", HEADED, text),
    "gemma": Architecture("GemmaForCausalLM", HEADED, text),
    "gemma2": Architecture("Gemma2ForCausalLM", HEADED, text),
    "gemma3": Architecture("Gemma3ForCausalLM", HEADED, text),
    "vaultgemma": Architecture("VaultGemmaForCausalLM", HEADED, text),
    "phi": Architecture("PhiForCausalLM", GROUPED, text),
    "phi3": Architecture("Phi3ForCausalLM", GROUPED | TOKENS, text),
    "stablelm": Architecture("StableLmForCausalLM", GROUPED, text),
    "olmo": Architecture("OlmoForCausalLM", GROUPED | TOKENS, text),
    "olmo2": Architecture("Olmo2ForCausalLM", GROUPED | TOKENS, text),
    "olmo3": Architecture("Olmo3ForCausalLM", GROUPED | TOKENS, text),
    "cohere": Architecture("CohereForCausalLM", GROUPED | TOKENS, text),
    "cohere2": Architecture("Cohere2ForCausalLM", HEADED | TOKENS, text),
    "granite": Architecture("GraniteForCausalLM", GROUPED, text),
    "starcoder2": Architecture("Starcoder2ForCausalLM", GROUPED | TOKENS, text),
    "nemotron": Architecture("NemotronForCausalLM", HEADED, text),
    "glm": Architecture("GlmForCausalLM", HEADED | TOKENS, text),
    "glm4": Architecture("Glm4ForCausalLM", HEADED | TOKENS, text),
    "smollm3": Architecture("SmolLM3ForCausalLM", GROUPED | TOKENS, text),
    "exaone4": Architecture("Exaone4ForCausalLM", GROUPED | TOKENS, text),
    "ernie4_5": Architecture("Ernie4_5ForCausalLM", HEADED, text),
    "seed_oss": Architecture("SeedOssForCausalLM", HEADED | TOKENS, text),
    "arcee": Architecture("ArceeForCausalLM", GROUPED | TOKENS, text),
    "apertus": Architecture("ApertusForCausalLM", GROUPED | TOKENS, text),
    "helium": Architecture("HeliumForCausalLM", HEADED | TOKENS, text),
    "hunyuan": Architecture("HunYuanDenseV1ForCausalLM", HEADED | TOKENS, text),
    "lfm2": Architecture("Lfm2ForCausalLM", GROUPED | TOKENS, text),
    "modernbert_decoder": Architecture("ModernBertDecoderForCausalLM", DECODER | TOKENS, text),
    "gpt2": Architecture("GPT2LMHeadModel", N_EMBD, text),
    "gpt_bigcode": Architecture("GPTBigCodeForCausalLM", N_EMBD, text),
    "gptj": Architecture("GPTJForCausalLM", N_EMBD | {"rotary_dim": 8}, text),
    "codegen": Architecture("CodeGenForCausalLM", N_EMBD | {"rotary_dim": 8}, text),
    "gpt_neo": Architecture(
        "GPTNeoForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": 2, "num_heads": 4,
         "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
         "bos_token_id": 1, "eos_token_id": 2}, text,
    ),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", DECODER, text),
    "persimmon": Architecture("PersimmonForCausalLM", DECODER, text),
    "opt": Architecture(
        "OPTForCausalLM",
        {k: v for k, v in DECODER.items() if k != "intermediate_size"} | TOKENS
        | {"ffn_dim": 2 * WIDTH, "word_embed_proj_dim": WIDTH}, text,
    ),
    "xglm": Architecture(
        "XGLMForCausalLM",
        TOKENS | {"vocab_size": VOCABULARY, "d_model": WIDTH, "ffn_dim": 2 * WIDTH,
         "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64}, text,
        dtype=torch.float32,  # its mask is the least float64, in a tensor of float32
        tolerance=1e-5,
    ),
    "bloom": Architecture(
        "BloomForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4}, text,
    ),
    "falcon": Architecture(
        "FalconForCausalLM",
        {k: v for k, v in DECODER.items() if k != "intermediate_size"} | TOKENS
        | {"ffn_hidden_size": 2 * WIDTH}, text,
    ),
    "falcon_new": Architecture(
        "FalconForCausalLM",
        {k: v for k, v in DECODER.items() if k != "intermediate_size"} | TOKENS
        | {"ffn_hidden_size": 2 * WIDTH, "new_decoder_architecture": True, "num_kv_heads": 2},
        text,
    ),
    "mpt": Architecture(
        "MptForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": 2, "n_heads": 4,
         "max_seq_len": 64}, text,
    ),
}  # fmt: skip
MIXTURES: Section = {
    "mixtral": Architecture("MixtralForCausalLM", EXPERTS, text),
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM", EXPERTS | {"shared_expert_intermediate_size": WIDTH}, text
    ),
    "qwen3_moe": Architecture("Qwen3MoeForCausalLM", EXPERTS, text),
    "olmoe": Architecture("OlmoeForCausalLM", EXPERTS | TOKENS, text),
    "gpt_oss": Architecture("GptOssForCausalLM", EXPERTS | TOKENS, text),
    "granite_moe": Architecture("GraniteMoeForCausalLM", EXPERTS, text),
    "llama4": Architecture(
        "Llama4ForCausalLM", EXPERTS | TOKENS | {"intermediate_size_mlp": 2 * WIDTH}, text
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3ForCausalLM",
        DECODER | {"num_key_value_heads": 4, "moe_intermediate_size": WIDTH,
         "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
         "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
         "v_head_dim": 16, "first_k_dense_replace": 1}, text,
    ),
    "qwen3_next": Architecture(
        "Qwen3NextForCausalLM",
        EXPERTS | {"shared_expert_intermediate_size": WIDTH, "linear_key_head_dim": 16,
         "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
         "layer_types": ["linear_attention", "full_attention"]}, text,
        tolerance=1e-5,  # its linear attention computes in float32
    ),
}  # fmt: skip
RECURRENT: Section = {
    "mamba": Architecture(
        "MambaForCausalLM",
        TOKENS | {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "state_size": 8,
         "num_hidden_layers": 2, "time_step_rank": 8}, text,
    ),
    "mamba2": Architecture(
        "Mamba2ForCausalLM",
        TOKENS | {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "state_size": 8, "num_heads": 8,
         "head_dim": 16, "n_groups": 2, "num_hidden_layers": 2, "chunk_size": 8,
         "time_step_rank": 8}, text,
    ),
    "rwkv": Architecture(
        "RwkvForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "attention_hidden_size": WIDTH,
         "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "context_length": 64}, text,
    ),
}  # fmt: skip
ENCODERS: Section = {
    "bert": Architecture("BertForMaskedLM", ENCODER, text),
    "roberta": Architecture("RobertaForMaskedLM", ENCODER, text),
    "camembert": Architecture("CamembertForMaskedLM", ENCODER, text),
    "xlm_roberta": Architecture("XLMRobertaForMaskedLM", ENCODER, text),
    "distilbert": Architecture(
        "DistilBertForMaskedLM",
        {"vocab_size": VOCABULARY, "dim": WIDTH, "hidden_dim": 2 * WIDTH, "n_layers": 2,
         "n_heads": 4, "max_position_embeddings": 64}, text,
    ),
    "albert": Architecture("AlbertForMaskedLM", ENCODER | {"embedding_size": 32}, text),
    "electra": Architecture("ElectraForMaskedLM", ENCODER | {"embedding_size": 32}, text),
    "deberta": Architecture("DebertaForMaskedLM", ENCODER, text),
    "deberta_v2": Architecture("DebertaV2ForMaskedLM", ENCODER, text),
    "mpnet": Architecture("MPNetForMaskedLM", ENCODER, text),
    "megatron_bert": Architecture("MegatronBertForMaskedLM", ENCODER, text),
    "modernbert": Architecture("ModernBertForMaskedLM", ENCODER | TOKENS, text),
}  # fmt: skip
SEQUENCES: Section = {
    "t5": Architecture("T5ForConditionalGeneration", T5, text),
    "mt5": Architecture("MT5ForConditionalGeneration", T5, text),
    "bart": Architecture("BartForConditionalGeneration", SEQ2SEQ, text),
    "mbart": Architecture("MBartForConditionalGeneration", SEQ2SEQ, text),
    "pegasus": Architecture("PegasusForConditionalGeneration", SEQ2SEQ, text),
    "m2m_100": Architecture("M2M100ForConditionalGeneration", SEQ2SEQ, text),
    "marian": Architecture("MarianMTModel", SEQ2SEQ, text),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        SEQ2SEQ | {"num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32},
        spectra,
    ),
}  # fmt: skip
SENSES: Section = {
    "vit": Architecture("ViTForImageClassification", PIXELS, images, NO_VOCABULARY),
    "deit": Architecture("DeiTForImageClassification", PIXELS, images, NO_VOCABULARY),
    "dinov2": Architecture("Dinov2ForImageClassification", PIXELS, images, NO_VOCABULARY),
    "beit": Architecture("BeitForImageClassification", PIXELS, images, NO_VOCABULARY),
    "swin": Architecture(
        "SwinForImageClassification",
        {"image_size": 64, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4),
         "window_size": 4, "num_labels": 8}, large_images,
        NO_VOCABULARY | {"sequence": "windows shift along the sequence"},
    ),
    "convnext": Architecture(
        "ConvNextForImageClassification",
        {"hidden_sizes": (16, 32), "depths": (1, 1), "num_stages": 2, "image_size": 64,
         "num_labels": 8}, large_images, NO_VOCABULARY | {"sequence": "no sequence"},
    ),
    "segformer": Architecture(
        "SegformerForSemanticSegmentation",
        {"num_encoder_blocks": 2, "depths": (1, 1), "sr_ratios": (2, 1), "hidden_sizes": (16, 32),
         "patch_sizes": (7, 3), "strides": (4, 2), "num_attention_heads": (2, 4),
         "mlp_ratios": (2, 2), "decoder_hidden_size": 32, "num_labels": 8},
        segmented_images, NO_VOCABULARY,
    ),
    "clip": Architecture("CLIPModel", PAIR | {"projection_dim": 32}, pairs),
    "siglip": Architecture("SiglipModel", PAIR, pairs),
    "wav2vec2": Architecture("Wav2Vec2ForCTC", WAVES, waves),
    "hubert": Architecture("HubertForSequenceClassification", WAVES, spoken_classes, NO_VOCABULARY),
}  # fmt: skip

SECTIONS: dict[str, Section] = {
    "Decoders": DECODERS,
    "Mixtures of experts": MIXTURES,
    "Recurrent models": RECURRENT,
    "Encoders": ENCODERS,
    "Encoders with a decoder": SEQUENCES,
    "Images, sound, and pairs of both": SENSES,
}
ARCHITECTURES: Section = {n: each for section in SECTIONS.values() for n, each in section.items()}
