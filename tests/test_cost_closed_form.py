"""The closed-form model against published counts, and against the mistakes that are often copied."""

import dataclasses

import pytest

from jaxcost.cost import closed_form, hardware
from jaxcost.models.config import HeadConfig, ModelConfig

LLAMA_2_7B = ModelConfig(
    vocab_size=32000,
    width=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    mlp_width=11008,
    max_length=4096,
)
LLAMA_3_1_8B = dataclasses.replace(LLAMA_2_7B, vocab_size=128256, num_kv_heads=8, mlp_width=14336, max_length=8192)
GPT_2 = ModelConfig(
    vocab_size=50257,
    width=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    mlp_width=3072,
    gated=False,
    activation="gelu",
    norm="layer",
    position="learned",
    max_length=1024,
    tie_embeddings=True,
)
V5E = hardware.resolve(hardware.HardwareConfig(chip="v5e", num_chips=16, watts_per_chip=200))


def test_published_parameter_counts():
    assert closed_form.parameter_counts(LLAMA_2_7B).total == 6_738_415_616
    assert closed_form.parameter_counts(LLAMA_3_1_8B).total == 8_030_261_248
    # GPT-2 small has 124 439 808 parameters, of which 82 944 are biases of linear layers, which ours have not.
    assert closed_form.parameter_counts(GPT_2).total == 124_439_808 - 82_944


def test_matmul_parameters_count_the_unembedding_and_not_the_embedding():
    counts = closed_form.parameter_counts(LLAMA_2_7B)
    assert counts.matmul == counts.total - counts.by_part["embedding"] - counts.by_part["norms"]
    tied = closed_form.parameter_counts(dataclasses.replace(LLAMA_2_7B, tie_embeddings=True))
    assert tied.matmul == counts.matmul
    assert tied.total == counts.total - 32000 * 4096


def test_training_flops_in_both_conventions():
    matmul = closed_form.parameter_counts(LLAMA_2_7B).matmul
    attention = 32 * 4096 * 32 * 128
    assert closed_form.training_flops_per_token(LLAMA_2_7B, 4096) == 6 * matmul + 6 * attention
    assert closed_form.training_flops_per_token(LLAMA_2_7B, 4096, "full") == 6 * matmul + 12 * attention
    assert closed_form.forward_flops_per_token(LLAMA_2_7B, 4096) * 3 == 6 * matmul + 6 * attention


def test_grouped_queries_shrink_the_cache_and_not_the_scores():
    grouped = dataclasses.replace(LLAMA_2_7B, num_kv_heads=8)
    assert closed_form.attention_flops_per_token(grouped, 4096, "full") == closed_form.attention_flops_per_token(
        LLAMA_2_7B, 4096, "full"
    )
    assert closed_form.kv_cache_bytes(LLAMA_2_7B, 1, 4096) == 2 * 2**30
    assert closed_form.kv_cache_bytes(grouped, 1, 4096) == 2**29


def test_work_does_not_carry_the_width_twice_nor_grow_with_the_chips():
    """An article that is often copied says C = B·D·N for a batch, gets 12.288e9 for 16·768·1e8, and C·K·P on K·P chips.

    The product is 1.2288e12; the width is in N already; and the sequence and the factor 6 are missing.
    """
    batch, width, parameters = 16, 768, 1e8
    article = 12.288e9
    assert batch * width * parameters == 1.2288e12 == 100 * article
    sequence = 1024
    ours = batch * sequence * closed_form.training_flops_per_token(GPT_2, sequence)
    counted = closed_form.parameter_counts(GPT_2).matmul
    assert ours == 6 * counted * batch * sequence + 6 * 12 * sequence * 12 * 64 * batch * sequence

    one = closed_form.cost_of_flops(ours, dataclasses.replace(V5E, num_chips=1))
    many = closed_form.cost_of_flops(ours, V5E)
    assert many.seconds == pytest.approx(one.seconds / 16)
    assert (many.chip_hours, many.usd, many.kwh) == pytest.approx((one.chip_hours, one.usd, one.kwh))


def test_rematerialisation_bound_is_at_most_eight_sixths():
    model = closed_form.training_flops_per_token(LLAMA_2_7B, 4096)
    bound = closed_form.hardware_training_flops_per_token_bound(LLAMA_2_7B, 4096, "full")
    assert 1.3 < bound / model < 8 / 6
    assert closed_form.hardware_training_flops_per_token_bound(LLAMA_2_7B, 4096, "none") == model


def test_frozen_base_costs_four_instead_of_six():
    adapters = 2 * 32 * 2 * 16 * 4096
    full = closed_form.training_flops_per_token(LLAMA_2_7B, 1)
    frozen = closed_form.adapter_training_flops_per_token(LLAMA_2_7B, 1, adapters)
    assert frozen / full == pytest.approx(4 / 6, rel=0.01)
    matmul = closed_form.parameter_counts(LLAMA_2_7B).matmul
    attention = closed_form.attention_flops_per_token(LLAMA_2_7B, 4096, "causal")
    frozen = closed_form.adapter_training_flops_per_token(LLAMA_2_7B, 4096, adapters)
    assert frozen == 4 * matmul + 3 * attention + 6 * adapters


def test_backward_pass_stops_at_the_lowest_adapter():
    costs = [closed_form.adapter_training_flops_per_token(LLAMA_2_7B, 128, 0, layers) for layers in range(33)]
    assert costs[0] == closed_form.forward_flops_per_token(LLAMA_2_7B, 128)
    assert costs == sorted(costs)
    with pytest.raises(ValueError, match="the model has 32 layers"):
        closed_form.adapter_training_flops_per_token(LLAMA_2_7B, 128, 0, 33)


def test_memory_of_full_and_adapter_training():
    full = closed_form.training_memory(LLAMA_2_7B, batch=1, sequence_tokens=128)
    assert full.weights_bytes == full.gradients_bytes == 4 * 6_738_415_616
    assert full.optimizer_bytes == 8 * 6_738_415_616
    adapter = closed_form.training_memory(
        LLAMA_2_7B, batch=1, sequence_tokens=128, trainable_parameters=1000, bytes_per_weight=2
    )
    assert (adapter.weights_bytes, adapter.gradients_bytes, adapter.optimizer_bytes) == (13_476_831_232, 4000, 8000)
    assert adapter.total_bytes == adapter.weights_bytes + 12000 + adapter.activations_bytes


def test_a_head_that_answers_once_keeps_logits_of_that_answer_alone():
    def activations(**head):
        model = dataclasses.replace(LLAMA_2_7B, tie_embeddings=False, head=HeadConfig(**head))
        return closed_form.training_memory(model, 2, 128).activations_bytes

    logits, float32_and_gradient = 2 * 128 * LLAMA_2_7B.vocab_size, 8
    once = activations(outputs=3, pooling="last")
    assert activations() - once == float32_and_gradient * (logits - 2 * 3)
    assert activations(outputs=3) - once == float32_and_gradient * 2 * 127 * 3


def test_remat_and_fused_attention_keep_less():
    def activations(**options):
        return closed_form.training_memory(LLAMA_2_7B, 1, 4096, **options).activations_bytes

    assert activations(remat="full") < activations(stored_attention_matrix=False) < activations()


def test_storage_of_quantized_weights_holds_their_scales():
    assert closed_form.storage_bytes(1000, 16) == 2000
    assert closed_form.storage_bytes(1000, 4) == 500
    assert closed_form.storage_bytes(1024, 4, block=128) == 512 + 8 * 4


def test_decode_step_is_bound_by_memory_until_the_batch_is_large():
    chip = hardware.load_chip("v5e")
    small = closed_form.decode_step_bound(LLAMA_2_7B, chip, batch=1, cached_tokens=1024)
    read = 2 * closed_form.parameter_counts(LLAMA_2_7B).matmul + closed_form.kv_cache_bytes(LLAMA_2_7B, 1, 1024)
    assert (small.limit, small.seconds) == ("memory", pytest.approx(read / 819e9))
    large = closed_form.decode_step_bound(LLAMA_2_7B, chip, batch=4096, cached_tokens=1)
    assert large.limit == "compute"


def test_chain_from_flops_to_carbon():
    cost = closed_form.cost_of_flops(197e12 * 16 * 3600, V5E, utilization=0.5)
    assert cost.seconds == pytest.approx(7200)
    assert cost.chip_hours == pytest.approx(32)
    assert cost.usd == pytest.approx(32 * 1.2)
    assert cost.kwh == pytest.approx(32 * 0.2 * V5E.pue.value)
    assert cost.kg_co2 == pytest.approx(cost.kwh * V5E.grid_kg_co2_per_kwh.value)


def test_unknown_peak_and_wrong_utilization():
    assert closed_form.cost_of_flops(1e12, V5E, operand_type="fp8") is None
    with pytest.raises(ValueError, match="utilization is 1.5"):
        closed_form.cost_of_flops(1e12, V5E, utilization=1.5)


def test_vocabulary_must_be_known():
    with pytest.raises(ValueError, match="vocab_size is 0"):
        closed_form.parameter_counts(ModelConfig(vocab_size=0))


def test_published_parameter_counts_of_experts_biases_and_norms():
    mixtral = dataclasses.replace(LLAMA_2_7B, num_kv_heads=8, mlp_width=14336, experts=8, experts_per_token=2)
    counts = closed_form.parameter_counts(mixtral)
    assert counts.total == 46_702_792_704
    assert counts.matmul == pytest.approx(12.75e9, rel=0.01)
    with_biases = dataclasses.replace(GPT_2, qkv_bias=True, output_bias=True, mlp_bias=True)
    assert closed_form.parameter_counts(with_biases).total == 124_439_808
    gemma_3_12b = dataclasses.replace(
        LLAMA_2_7B, vocab_size=262208, width=3840, num_layers=48, num_heads=16, num_kv_heads=8, head_dim=256,
        mlp_width=15360, tie_embeddings=True, norm_placement="both", query_key_norm="head",
    )  # fmt: skip
    assert closed_form.parameter_counts(gemma_3_12b).total == pytest.approx(11_766_034_176, rel=1e-3)


def test_local_layers_score_their_window():
    local = dataclasses.replace(LLAMA_2_7B, pattern=("local",), window=1024)
    mixed = dataclasses.replace(local, pattern=("local",) * 3 + ("global",))
    flops = lambda model, convention: closed_form.attention_flops_per_token(model, 8192, convention)  # noqa: E731
    a_score = 4 * 32 * 32 * 128
    assert flops(local, "full") == a_score * 2048
    assert flops(local, "causal") == a_score * (1024 - 1024**2 / (2 * 8192))
    assert flops(mixed, "causal") == (3 * flops(local, "causal") + flops(LLAMA_2_7B, "causal")) / 4
    assert closed_form.attention_flops_per_token(local, 1000, "full") == a_score * 1000


def test_decoding_reads_windows_and_the_experts_that_a_batch_meets():
    chip = hardware.load_chip("v5e")
    local = dataclasses.replace(LLAMA_2_7B, pattern=("local",), window=1024)
    seconds = lambda model, batch, cached: closed_form.decode_step_bound(model, chip, batch, cached).seconds  # noqa: E731
    assert seconds(local, 8, 32768) == seconds(LLAMA_2_7B, 8, 1024)
    mixtral = dataclasses.replace(LLAMA_2_7B, experts=8, experts_per_token=2)
    one = seconds(mixtral, 1, 1)
    assert one == pytest.approx(2 * closed_form.parameter_counts(mixtral).matmul / 819e9, rel=1e-3)
    counts = closed_form.parameter_counts(mixtral)
    everything = 2 * (counts.total - counts.by_part["embedding"] - counts.by_part["norms"]) / 819e9
    assert one < seconds(mixtral, 4, 1) < seconds(mixtral, 64, 1) == pytest.approx(everything, rel=1e-3)


def test_memory_of_experts_and_windows():
    elements = closed_form.activation_elements_per_token
    local = dataclasses.replace(LLAMA_2_7B, pattern=("local",), window=512)
    assert elements(local, 4096) - elements(local, 4096, False) == 2 * 32 * 1024
    mixtral = dataclasses.replace(LLAMA_2_7B, experts=8, experts_per_token=2)
    assert elements(mixtral, 1) - elements(LLAMA_2_7B, 1) == 4 * 11008 + 2 * 2 * 4096
    assert closed_form.training_memory(mixtral, 1, 128).weights_bytes == 4 * closed_form.parameter_counts(mixtral).total
