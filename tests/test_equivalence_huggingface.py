"""Unmodified Hugging Face models train under plans as they do on one device.

Their norms, rotary embeddings and losses compute in float32 whatever the model's type: that sets
the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import meshwright
from meshwright.compiler.layout.factors import dim_axes
from meshwright.compiler.public import Program
from meshwright.dsl.statements import Experts
from tests.equivalence import check_equal, implicit_gathers, without_grouped
from tests.models import real

TOLERANCE = 5e-5
SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 128, "max_position_embeddings": 64}
GROUPED = SIZES | {"num_key_value_heads": 2}
UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    yield
    transformers.logging.set_verbosity(level)


def llama(kv: int = 2) -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=kv)
    return transformers.LlamaForCausalLM(config)


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=16))


def phi3() -> nn.Module:
    config = transformers.Phi3Config(**GROUPED, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return transformers.Phi3ForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert(kind: Any = transformers.BertForMaskedLM) -> nn.Module:
    return kind(transformers.BertConfig(**SIZES, **UNDROPPED, num_labels=4))


IMAGE = {"image_size": 16, "patch_size": 4, "num_labels": 8}


def image_sizes(*without: str) -> dict[str, Any]:
    left_out = {"vocab_size", "max_position_embeddings", *without}
    return {k: v for k, v in SIZES.items() if k not in left_out} | UNDROPPED | IMAGE


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**image_sizes()))


def deit() -> nn.Module:
    return transformers.DeiTForImageClassification(transformers.DeiTConfig(**image_sizes()))


def dinov2() -> nn.Module:
    config = transformers.Dinov2Config(**image_sizes("intermediate_size"), mlp_ratio=2)
    return transformers.Dinov2ForImageClassification(config)


def mamba() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=128, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4,
        use_cache=False,
    )  # fmt: skip
    return transformers.MambaForCausalLM(config)


def mamba2() -> nn.Module:
    config = transformers.Mamba2Config(
        vocab_size=128, hidden_size=32, state_size=8, num_hidden_layers=2, num_heads=8, head_dim=8,
        n_groups=4, chunk_size=4, use_cache=False,
    )  # fmt: skip
    return transformers.Mamba2ForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def clip() -> nn.Module:
    sizes = SIZES | {"max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    pixels = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = transformers.CLIPConfig(
        text_config=sizes | {"pad_token_id": 0},
        vision_config=pixels | {"image_size": 16, "patch_size": 4},
        projection_dim=16,
    )
    return transformers.CLIPModel(config)


def captions() -> dict[str, Any]:
    tokens = torch.randint(3, 128, (4, 8))
    tokens[:, -1] = 2
    return {"input_ids": tokens, "pixel_values": real(4, 3, 16, 16), "return_loss": True}


def text(*, masked: bool = False) -> dict[str, torch.Tensor]:
    """Tokens and labels, some of them ignored; some of the tokens padding if `masked`."""
    labels = torch.randint(0, 128, (4, 16))
    labels[1, :9] = -100
    batch = {"input_ids": torch.randint(0, 128, (4, 16)), "labels": labels}
    if masked:
        batch["attention_mask"] = (torch.arange(16) < torch.tensor([16, 9, 12, 3])[:, None]).long()
    return batch


def masked_text() -> dict[str, torch.Tensor]:
    return text(masked=True)


def labelled_text() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 128, (4, 16)), "labels": torch.randint(0, 4, (4,))}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": real(4, 3, 16, 16), "labels": torch.randint(0, 8, (4,))}


DATA = "data input_ids, labels over dp\n"
MASKED = "data input_ids, labels, attention_mask over dp\n"
PIXELS = "data pixel_values, labels over dp\n"
LLAMA = """
columns model.layers.*.self_attn.{q,k,v}_proj over tp
rows model.layers.*.self_attn.o_proj over tp
columns model.layers.*.mlp.{gate,up}_proj over tp
rows model.layers.*.mlp.down_proj over tp
"""
LLAMA_ONE_HEAD = LLAMA.replace("{q,k,v}_proj", "q_proj")
LLAMA_VOCAB = "vocab model.embed_tokens, lm_head over tp\n"
LLAMA_SEQUENCE = "sequence model.layers.* over tp\n"
GPT2 = """
columns transformer.h.*.attn.c_attn over tp as (3 heads hd)
rows transformer.h.*.attn.c_proj over tp
columns transformer.h.*.mlp.c_fc over tp
rows transformer.h.*.mlp.c_proj over tp
"""
GPT2_ALL = GPT2 + "vocab transformer.wte, lm_head over tp\nsequence transformer.h.* over tp\n"
BERT = """
columns bert.encoder.layer.*.attention.self.{query,key,value} over tp
rows bert.encoder.layer.*.attention.output.dense over tp
columns bert.encoder.layer.*.intermediate.dense over tp
rows bert.encoder.layer.*.output.dense over tp
"""
BERT_VOCAB = "vocab bert.embeddings.word_embeddings, cls.predictions.decoder over tp\n"
BERT_SEQUENCE = "sequence bert.encoder.layer.* over tp\n"
VIT = """
columns vit.layers.*.attention.{q,k,v}_proj over tp
rows vit.layers.*.attention.o_proj over tp
columns vit.layers.*.mlp.fc1 over tp
rows vit.layers.*.mlp.fc2 over tp
"""
MIXER = "backbone.layers.*.mixer"
MAMBA = f"""
columns {MIXER}.in_proj over tp as (f | f)
shard {MIXER}.conv1d.weight [f@tp, i, k]
shard {MIXER}.{{conv1d,dt_proj}}.bias [f@tp]
shard {MIXER}.dt_proj.weight [f@tp, r]
shard {MIXER}.A_log [f@tp, n]
shard {MIXER}.D [f@tp]
rows {MIXER}.{{x_proj,out_proj}} over tp
"""
# Gate, values, B and C of four groups, and one step size a head.
MAMBA2 = f"""
let z = 64, g = 32, heads = 8
columns {MIXER}.in_proj over tp as (z | z | g | g | heads)
shard {MIXER}.conv1d.weight [(z@tp | g@tp | g@tp), i, k]
shard {MIXER}.conv1d.bias [(z@tp | g@tp | g@tp)]
shard {MIXER}.{{A_log,D,dt_bias}} [h@tp]
shard {MIXER}.norm.weight [f@tp]
rows {MIXER}.out_proj over tp
"""
# One class token, or two, beside 16 patches.
VIT_SEQUENCE = "sequence vit.layers.* over tp\n"
DEIT = VIT.replace("vit.", "deit.") + VIT_SEQUENCE.replace("vit.", "deit.")
DINOV2 = (VIT + VIT_SEQUENCE).replace("vit.layers", "dinov2.encoder.layer")
T5 = """
columns {encoder,decoder}.block.*.layer.*.*Attention.{q,k,v} over tp
rows {encoder,decoder}.block.*.layer.*.*Attention.o over tp
columns {encoder,decoder}.block.*.layer.*.DenseReluDense.wi over tp
rows {encoder,decoder}.block.*.layer.*.DenseReluDense.wo over tp
"""
T5_BIAS = "shard {encoder,decoder}.block.*.layer.*.*.relative_attention_bias.weight [n, h@tp]\n"
T5_VOCAB = "vocab {encoder,decoder}.embed_tokens, lm_head over tp\n"
T5_SEQUENCE = "sequence {encoder,decoder}.block.* over tp\n"
PHI3 = """
let heads = 4, kv = 2
columns model.layers.*.self_attn.qkv_proj over tp as (heads hd | kv hd | kv hd)
rows model.layers.*.self_attn.o_proj over tp
columns model.layers.*.mlp.gate_up_proj over tp as (f | f)
rows model.layers.*.mlp.down_proj over tp
"""

GRID, LINE = "mesh dp=2, tp=2\n", "mesh dp=4\n"
Case = tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]], str]

CASES: dict[str, Case] = {
    "llama": (llama, text, GRID + DATA + LLAMA),
    "llama with padding": (llama, masked_text, GRID + MASKED + LLAMA),
    "llama sequence": (llama, text, GRID + DATA + LLAMA + LLAMA_SEQUENCE),
    "llama vocab sequence": (llama, text, GRID + DATA + LLAMA + LLAMA_VOCAB + LLAMA_SEQUENCE),
    "llama of one key head": (lambda: llama(1), text, GRID + DATA + LLAMA_ONE_HEAD),
    "qwen3 vocab sequence": (qwen3, text, GRID + DATA + LLAMA + LLAMA_VOCAB + LLAMA_SEQUENCE),
    "gpt2 vocab sequence": (gpt2, text, GRID + DATA + GPT2_ALL),
    "bert with padding": (bert, masked_text, GRID + MASKED + BERT),
    "bert vocab": (bert, text, GRID + DATA + BERT + BERT_VOCAB),
    "bert sequence": (bert, text, GRID + DATA + BERT + BERT_SEQUENCE),
    "bert classifier": (
        lambda: bert(transformers.BertForSequenceClassification), labelled_text, GRID + DATA + BERT
    ),
    "vit": (vit, images, GRID + PIXELS + VIT),
    "vit sequence": (vit, images, GRID + PIXELS + VIT + VIT_SEQUENCE),
    "t5": (t5, text, GRID + DATA + T5),
    "t5 vocab sequence": (t5, text, GRID + DATA + T5 + T5_VOCAB + T5_SEQUENCE),
    "phi3": (phi3, text, GRID + DATA + PHI3),
    "phi3 sequence": (phi3, text, GRID + DATA + PHI3 + LLAMA_SEQUENCE),
}  # fmt: skip

MORE_CASES: dict[str, Case] = {
    "llama data": (llama, text, LINE + DATA),
    "llama tensor": (llama, text, "mesh tp=2\n" + LLAMA),
    "llama vocab": (llama, text, GRID + DATA + LLAMA + LLAMA_VOCAB),
    "llama padded vocabulary": (llama, text, "mesh tp=3\n" + LLAMA_VOCAB),
    "llama on 16 ranks": (
        lambda: llama(4),
        text,
        "mesh dp=4, tp=4\n" + DATA + LLAMA + LLAMA_VOCAB + LLAMA_SEQUENCE,
    ),
    "llama of one key head on 8 ranks": (
        lambda: llama(1),
        text,
        "mesh dp=2, tp=4\n" + DATA + LLAMA_ONE_HEAD + LLAMA_VOCAB,
    ),
    "llama of one key head sequence": (
        lambda: llama(1),
        text,
        GRID + DATA + LLAMA_ONE_HEAD + LLAMA_SEQUENCE,
    ),
    "qwen3": (qwen3, masked_text, GRID + MASKED + LLAMA),
    "gpt2 data": (gpt2, text, LINE + DATA),
    "gpt2": (gpt2, masked_text, GRID + MASKED + GPT2),
    "bert data": (bert, masked_text, LINE + MASKED),
    "bert sequence vocab": (bert, masked_text, GRID + MASKED + BERT + BERT_VOCAB + BERT_SEQUENCE),
    "vit data": (vit, images, LINE + PIXELS),
    "mamba": (mamba, text, GRID + DATA + MAMBA),
    "mamba2": (mamba2, text, GRID + DATA + MAMBA2),
    "deit sequence": (deit, images, "mesh dp=2, tp=4\n" + PIXELS + DEIT),
    "dinov2 sequence": (dinov2, images, "mesh dp=2, tp=4\n" + PIXELS + DINOV2),
    "t5 data": (t5, text, LINE + DATA),
    "t5 bias split": (t5, text, GRID + DATA + T5 + T5_BIAS),
    "t5 vocab": (t5, masked_text, GRID + MASKED + T5 + T5_VOCAB),
    "phi3 data": (phi3, text, LINE + DATA),
}


def check(case: Case) -> None:
    make, batch, plan = case
    program = check_equal(make(), batch, plan, tolerance=TOLERANCE)
    assert implicit_gathers(program) == []


@pytest.mark.parametrize("name", CASES)
def test_a_hugging_face_model_trains_as_on_one_device(name: str) -> None:
    check(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_CASES)
def test_a_hugging_face_model_trains_under_other_plans_too(name: str) -> None:
    check(MORE_CASES[name])


def test_a_contrastive_loss_compares_every_row_with_every_other() -> None:
    plan = LINE + "data input_ids, pixel_values over dp\n"
    check_equal(clip(), captions, plan, tolerance=TOLERANCE)


ATTENTION = "".join(LLAMA.splitlines(keepends=True)[:3])
EXPERTS = """
shard model.layers.*.*.experts.gate_up_proj [e, (f@tp | f@tp), d]
shard model.layers.*.*.experts.down_proj [e, d, f@tp]
"""
SHARED_EXPERTS = """
columns model.layers.*.mlp.shared_expert*.{gate,up}_proj over tp
rows model.layers.*.mlp.shared_expert*.down_proj over tp
"""
GPT_OSS = """
shard model.layers.*.self_attn.sinks [h@tp]
shard model.layers.*.mlp.experts.gate_up_proj [e, d, (f@tp 2)]
shard model.layers.*.mlp.experts.gate_up_proj_bias [e, (f@tp 2)]
shard model.layers.*.mlp.experts.down_proj [e, f@tp, d]
"""
DEEPSEEK = (
    EXPERTS
    + SHARED_EXPERTS
    + """
columns model.layers.0.mlp.{gate,up}_proj over tp
rows model.layers.0.mlp.down_proj over tp
"""
)
TOP_TWO = {"num_experts_per_tok": 2, "output_router_logits": True}
SMALL = {"num_experts": 4, "moe_intermediate_size": 32} | TOP_TWO


def routed(kind: str, **options: Any) -> Callable[[], nn.Module]:
    """A mixture of experts, with its load-balancing loss where it has one."""
    sizes = GROUPED | {"intermediate_size": 64} | options
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return lambda: getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)


def deepseek() -> nn.Module:
    model = routed(
        "DeepseekV3", num_key_value_heads=4, n_routed_experts=8, n_group=2, topk_group=1,
        first_k_dense_replace=1, moe_intermediate_size=32, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, num_experts_per_tok=2,
    )()  # fmt: skip
    bias = model.get_submodule("model.layers.1.mlp.gate").e_score_correction_bias
    torch.nn.init.normal_(bias, std=0.01)  # type: ignore[arg-type]
    return model


MIXTRAL = routed("Mixtral", num_local_experts=4, output_router_logits=True)
GPT_OSS_MODEL = routed("GptOss", num_local_experts=4, head_dim=16, sliding_window=8, **TOP_TWO)

ROUTED: dict[str, Case] = {
    "mixtral": (MIXTRAL, masked_text, GRID + MASKED + ATTENTION + EXPERTS),
    "gpt-oss data": (GPT_OSS_MODEL, text, "mesh dp=2\n" + DATA),
}  # fmt: skip

MORE_ROUTED: dict[str, Case] = {
    "mixtral data": (MIXTRAL, text, LINE + DATA),
    "mixtral sequence": (
        MIXTRAL, text, GRID + DATA + ATTENTION + EXPERTS + LLAMA_VOCAB + LLAMA_SEQUENCE
    ),
    "gpt-oss": (GPT_OSS_MODEL, text, GRID + DATA + ATTENTION + GPT_OSS),
    "gpt-oss tensor": (GPT_OSS_MODEL, text, "mesh tp=2\n" + ATTENTION + GPT_OSS),
    "deepseek-v3": (deepseek, text, GRID + DATA + DEEPSEEK),
    "deepseek-v3 data": (deepseek, text, LINE + DATA),
    "qwen2-moe": (
        routed("Qwen2Moe", shared_expert_intermediate_size=64, **SMALL),
        text,
        GRID + DATA + ATTENTION + EXPERTS + SHARED_EXPERTS,
    ),
    "qwen3-moe": (
        routed("Qwen3Moe", head_dim=16, **SMALL), text, GRID + DATA + ATTENTION + EXPERTS
    ),
    "olmoe": (routed("Olmoe", **SMALL), text, GRID + DATA + ATTENTION + EXPERTS),
    "granite-moe": (
        routed("GraniteMoe", num_local_experts=4, **TOP_TWO),
        text,
        GRID + DATA + ATTENTION + EXPERTS,
    ),
}  # fmt: skip

QWEN3_MOE = routed("Qwen3Moe", head_dim=16, **SMALL)
PLACED = "experts model.layers.*.mlp.experts over ep\n"
BY_EP = "data input_ids, labels over ep\n" + PLACED
BY_BOTH = "data input_ids, labels over (dp, ep)\n" + PLACED

PLACED_CASES: dict[str, Case] = {
    "mixtral over 2": (MIXTRAL, text, "mesh ep=2\n" + BY_EP),
    "mixtral over 4": (
        MIXTRAL, masked_text, "mesh ep=4\ndata input_ids, labels, attention_mask over ep\n" + PLACED
    ),
    "mixtral with data": (MIXTRAL, text, "mesh dp=2, ep=2\n" + BY_BOTH),
    "mixtral with data and tensor": (
        MIXTRAL, text, "mesh dp=2, ep=2, tp=2\n" + BY_BOTH + ATTENTION + EXPERTS
    ),
    "mixtral beside data": (MIXTRAL, text, "mesh dp=2, ep=2\n" + DATA + PLACED),
    "mixtral over tensor": (
        MIXTRAL, text, GRID + DATA + ATTENTION + PLACED.replace("over ep", "over tp")
    ),
    "mixtral sequence": (
        MIXTRAL, text,
        "mesh ep=2, tp=2\n" + BY_EP + ATTENTION + EXPERTS + LLAMA_VOCAB + LLAMA_SEQUENCE,
    ),
    "mixtral sequence over tensor": (
        MIXTRAL, text,
        GRID + DATA + ATTENTION + LLAMA_VOCAB + LLAMA_SEQUENCE
        + PLACED.replace("over ep", "over tp"),
    ),
    "mixtral sequence over all": (
        MIXTRAL, text,
        GRID + DATA + ATTENTION + LLAMA_VOCAB + LLAMA_SEQUENCE
        + PLACED.replace("over ep", "over (dp, tp)"),
    ),
    "mixtral context": (
        MIXTRAL, text,
        "mesh ep=2, cp=2\ncontext model.layers.* over cp\n" + BY_EP,
    ),
    "mixtral over context": (
        MIXTRAL, text, "mesh ep=2\ncontext model.layers.* over ep\n" + PLACED
    ),
    "qwen3-moe over 2": (QWEN3_MOE, text, "mesh ep=2\n" + BY_EP),
    "qwen3-moe over 4": (QWEN3_MOE, text, "mesh ep=4\n" + BY_EP),
    "qwen3-moe with data and tensor": (
        QWEN3_MOE, text, "mesh dp=2, ep=2, tp=2\n" + BY_BOTH + ATTENTION + EXPERTS
    ),
    "qwen3-moe beside tensor": (
        QWEN3_MOE, text, "mesh ep=2, tp=2\n" + BY_EP + ATTENTION + EXPERTS
    ),
    "olmoe": (routed("Olmoe", **SMALL), text, "mesh ep=2, tp=2\n" + BY_EP + ATTENTION + EXPERTS),
    "gpt-oss": (GPT_OSS_MODEL, text, "mesh ep=2, tp=2\n" + BY_EP + ATTENTION + GPT_OSS),
    "deepseek-v3": (
        deepseek, text,
        "mesh ep=2, tp=2\n" + BY_EP + DEEPSEEK,
    ),
}  # fmt: skip


def check_routed(case: Case) -> Program:
    """Trains as on one device, and no token leaves its shard of the batch."""
    make, batch, plan = case
    program = check_equal(make(), batch, plan, tolerance=TOLERANCE, copied=without_grouped)
    assert implicit_gathers(program) == []
    assert not any("gather" in kind and "dp" in kind for kind in program.comm().counts())
    return program


@pytest.mark.parametrize("name", ROUTED)
def test_a_mixture_of_experts_trains_as_on_one_device(name: str) -> None:
    check_routed(ROUTED[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_ROUTED)
def test_a_mixture_of_experts_trains_under_other_plans_too(name: str) -> None:
    check_routed(MORE_ROUTED[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACED_CASES)
def test_the_experts_of_a_mixture_train_on_ranks_of_their_own(name: str) -> None:
    program = check_routed(PLACED_CASES[name])
    layouts = [p.layout for n, p in program.parameters.items() if ".experts." in n]
    (statement,) = program.plan.of(Experts)
    assert layouts
    assert all(dim_axes(layout.dims[0]) == statement.over for layout in layouts)


def test_experts_split_over_their_features_reduce_as_a_dense_layer_does() -> None:
    plan = "mesh tp=2\n" + EXPERTS
    model, batch = MIXTRAL().double(), text()
    program = meshwright.compile(model, meshwright.Plan.parse(plan), example=batch)
    # In each of two layers: the sum of the experts, the gradient of what they are given, and that
    # of the shares that weigh them.
    assert program.comm().counts() == {"all_reduce[tp]": 2 * 3}


@pytest.mark.parametrize("ranks", [2, 4])
def test_one_key_head_serves_the_query_heads_of_every_rank(ranks: int) -> None:
    program = check_equal(
        llama(1), text, f"mesh tp={ranks}\n" + LLAMA_ONE_HEAD, tolerance=TOLERANCE
    )
    assert implicit_gathers(program) == []
    assert "4@tp, 16, 16" in str(program.graph("stage0.forward"))


def test_one_key_head_takes_what_is_gathered_for_the_queries_of_a_sequence() -> None:
    make, batch, plan = MORE_CASES["llama of one key head sequence"]
    program = meshwright.compile(make().double(), meshwright.Plan.parse(plan), example=batch())
    # As where heads of keys are split too: two gathers in each layer, and as many adjoints of the
    # scatters; the gathers of the queries' and the gates' inputs again in the backward.
    assert program.comm().counts()["all_gather[tp]"] == 12


def test_fewer_key_heads_than_ranks_may_stay_whole() -> None:
    program = check_equal(llama(2), text, "mesh tp=4\n" + LLAMA_ONE_HEAD, tolerance=TOLERANCE)
    assert implicit_gathers(program) == []
    # Two forward and two backward in each of two layers, and the bucket of whole weights.
    assert program.comm().counts() == {"all_reduce[tp]": 9}
