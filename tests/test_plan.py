"""Counts and costs against the published numbers and against counts made by hand."""

import subprocess
import sys

import pytest

from leanseek.config import ModelConfig, read_recipe
from leanseek.plan.count import (
    H800_FLOPS_PER_SECOND,
    cache_bytes_per_token,
    flops_per_token,
    forward_flops_per_token,
    h800_cost,
    parameters,
    training_bytes,
)

# D 8, 2 layers (one dense), 2 heads of 4 + 2 and 6, latents 5 and 3, 4 experts of 7 of which 2 are visited, 1 shared.
TINY = ModelConfig(
    vocab_size=50,
    hidden_size=8,
    intermediate_size=11,
    moe_intermediate_size=7,
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
    num_attention_heads=2,
    q_lora_rank=5,
    kv_lora_rank=3,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=6,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    max_position_embeddings=32,
)
TINY_ATTENTION = 8 * 5 + 5 * 12 + 8 * 5 + 3 * 20 + 12 * 8  # q_a, q_b, kv_a, kv_b, o
TINY_EXPERT = 3 * 8 * 7


def test_v3_has_its_published_parameters() -> None:
    v3 = parameters(read_recipe("v3").model)
    assert v3.total == 671_026_419_200
    assert v3.router == 58 * (256 * 7168 + 256)
    assert f"{v3.activated / 1e9:.2f}" == "37.55"
    assert f"{v3.activated_without_embedding / 1e9:.2f}" == "36.63"
    assert f"{v3.mtp / 1e9:.2f}" == "11.61"
    assert f"{(v3.mtp + v3.embedding + v3.head) / 1e9:.2f}" == "13.46"  # the hub's file with its copies of both
    assert f"{(v3.mtp - v3.mtp_idle_experts + v3.embedding + v3.head) / 1e9:.2f}" == "2.54"


def test_v2_and_v2_lite_have_their_published_parameters() -> None:
    v2, lite = parameters(read_recipe("v2").model), parameters(read_recipe("v2-lite").model)
    assert f"{v2.total / 1e9:.1f}" == "235.7"
    assert f"{v2.activated_without_embedding / 1e9:.1f} {v2.activated / 1e9:.1f}" == "20.9 21.4"
    assert f"{lite.total / 1e9:.2f}" == "15.71"
    assert f"{lite.activated_without_embedding / 1e9:.2f}" == "2.45"
    assert (v2.mtp, lite.mtp) == (0, 0)
    assert lite.router == 26 * 64 * 2048  # no bias


def test_parameters_of_a_tiny_model_by_hand() -> None:
    count = parameters(TINY)
    assert (count.embedding, count.head) == (400, 400)
    assert count.attention == 2 * TINY_ATTENTION == 2 * 296
    assert count.dense_ffn == 3 * 8 * 11
    assert (count.routed_experts, count.shared_experts) == (4 * 168, 168)
    assert count.router == 4 * 8 + 4
    assert count.norms == 2 * (8 + 8 + 5 + 3) + 8
    assert count.mtp == (8 + 8 + 8 * 16) + (296 + 24 + 5 * 168 + 36) + 8
    assert count.total == 400 + 400 + 592 + 264 + 672 + 168 + 36 + 56
    assert count.total_with_mtp == count.total + 1348
    assert count.activated == count.total - 2 * 168
    assert training_bytes(TINY) == 16 * count.total_with_mtp


def test_null_q_lora_and_v2_gates_change_what_they_should() -> None:
    plain = parameters(TINY.model_copy(update={"q_lora_rank": None, "topk_method": "greedy"}))
    ours = parameters(TINY)
    assert plain.attention - ours.attention == 2 * (8 * 12 - 8 * 5 - 5 * 12)
    assert ours.norms - plain.norms == 2 * 5
    assert ours.router - plain.router == 4


def test_flops_of_a_tiny_model_by_hand() -> None:
    # one causal window of 3 tokens: 1 + 2 + 3 keys; a key costs 6 multiplications to score and 6 to weigh, in 2 heads
    mixing = 2 * 2 * (6 + 6) * (1 + 2 + 3)
    dense = 2 * 3 * (TINY_ATTENTION + 3 * 8 * 11)
    moe = 2 * 3 * (TINY_ATTENTION + 4 * 8 + (2 + 1) * TINY_EXPERT)
    head = 2 * 3 * 50 * 8
    main = dense + moe + head + 2 * mixing
    with_mtp = main + moe + head + mixing + 2 * 3 * 8 * 16
    assert 3 * forward_flops_per_token(TINY, 3, mtp=False) == main
    assert 3 * forward_flops_per_token(TINY, 3) == with_mtp
    assert 3 * flops_per_token(TINY, 3) == 3 * with_mtp
    assert 3 * flops_per_token(TINY, 3, training=False) == main


def test_v3_flops_are_the_six_n_rule_plus_attention() -> None:
    v3 = read_recipe("v3").model
    no_mtp = v3.model_copy(update={"num_nextn_predict_layers": 0})
    attention = 3 * 2 * 61 * 128 * (192 + 128) * 4097 / 2
    assert flops_per_token(no_mtp, 4096) - attention == pytest.approx(6 * 36.63e9, rel=3e-4)


def test_cache_is_the_latent_and_one_key() -> None:
    v3 = read_recipe("v3").model
    assert cache_bytes_per_token(v3) == 70_272
    assert cache_bytes_per_token(v3, mtp=True) == 71_424
    assert cache_bytes_per_token(v3, bytes_per_value=4) == 2 * 70_272


def test_h800_reference_gives_back_v3s_bill() -> None:
    hours, usd = h800_cost(flops_per_token(read_recipe("v3").model, 4096) * 14.8e12)
    assert hours == pytest.approx(2_664_000)
    assert usd == pytest.approx(5_328_000)
    assert 0.34 < H800_FLOPS_PER_SECOND / 989e12 < 0.45  # of the BF16 peak; 0.34 by 6·N·D alone


def test_counting_runs_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import leanseek.plan.count"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
