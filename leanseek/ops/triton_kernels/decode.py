"""Latent attention for decoding, straight over the pages of the cache (report §2.1.1, absorbed form).

B rows · T new tokens of each · H heads, Q = T · H queries of a row · C latent width · R rotary width · Z tokens a page.
All heads share one key, C + R wide, whose first C values are the value too; so a key is read once for all of them.
The keys of a row are cut into spans that are worked through side by side; a second kernel joins the spans.

Against softmax(q kᵀ · scale) v in exact arithmetic an element is off by at most 2⁻⁸ of the largest |v| for BF16
operands (probabilities are rounded to BF16 before they weigh), 2⁻¹⁷ for FP32 ones. NaN in a query makes NaN of its
output, NaN in a key that a row sees of all the row's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.ops.triton_kernels.common import cdiv, described, power_of_two, processors

LOG2_E = 1.4426950408889634
MOST_SPANS = 64
WHOLE_PAGE = 64  # tokens that are worked through at once; pages of so many, or multiples, are fetched whole


@triton.jit
def _decode(
    q, kept, latents, ropes, table, limits, out, logs, n_queries, heads, width, rope, pages, span, q_row, kept_row,
    scale, WHOLE: tl.constexpr, SIZE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, LATENT: tl.constexpr,
    ROPE: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    asked = query < n_queries
    limit = tl.load(limits + row * (n_queries // heads) + query // heads, asked, other=0)  # keys that it may see
    c, r = tl.arange(0, LATENT), tl.arange(0, ROPE)
    known_c, known_r = (c < width)[None, :], (r < rope)[None, :]
    source = q + (row * n_queries + query)[:, None] * q_row
    q_latent = tl.load(source + c[None, :], asked[:, None] & known_c, other=0.0)
    q_rope = tl.load(source + width + r[None, :], asked[:, None] & known_r, other=0.0)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, LATENT), tl.float32)
    begin = part * span
    end = tl.minimum(begin + span, tl.max(limit, axis=0).to(tl.int32))
    for at in tl.range(begin, end, KEYS, disable_licm=True):
        key = at + tl.arange(0, KEYS)
        if WHOLE:  # the keys lie in one page; what else is in it weighs 0
            first = tl.load(table + row * pages + at // SIZE).to(tl.int32) * SIZE + at % SIZE
            k_latent, k_rope = latents.load([first, 0]), ropes.load([first, width])
        else:
            there = key < end
            page = tl.load(table + row * pages + key // SIZE, there, other=0).to(tl.int64)
            place = kept + (page * SIZE + key % SIZE)[:, None] * kept_row
            k_latent = tl.load(place + c[None, :], there[:, None] & known_c, other=0.0)
            k_rope = tl.load(place + width + r[None, :], there[:, None] & known_r, other=0.0)
        score = tl.dot(q_rope, k_rope.T, input_precision="ieee")
        score = tl.dot(q_latent, k_latent.T, score, input_precision="ieee") * scale  # in powers of two
        score = tl.where(key[None, :] < limit[:, None], score, float("-inf"))
        higher = tl.maximum(largest, tl.max(score, axis=1))
        against = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(score - against[:, None])
        shrink = tl.exp2(largest - against)
        total = total * shrink + tl.sum(share, axis=1)
        mixed = tl.dot(share.to(k_latent.dtype), k_latent, mixed * shrink[:, None], input_precision="ieee")
        largest = higher
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    place = (row * SPANS + part) * n_queries + query
    tl.store(out + place[:, None] * width + c[None, :], mixed, asked[:, None] & known_c)
    if SPANS > 1:
        tl.store(logs + place, largest + tl.log2(total), asked)


@triton.jit
def _joined(parts, logs, out, n_queries, width, SPANS: tl.constexpr, LATENT: tl.constexpr):
    row, query = tl.program_id(0).to(tl.int64), tl.program_id(1)
    span, c = tl.arange(0, SPANS), tl.arange(0, LATENT)
    place = (row * SPANS + span) * n_queries + query
    log = tl.load(logs + place)
    weight = tl.exp2(log - tl.max(log, axis=0))  # 0 for a span without keys; the first always has one
    values = tl.load(parts + place[:, None] * width + c[None, :], (c < width)[None, :], other=0.0)
    mixed = tl.sum(values * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out + (row * n_queries + query) * width + c, mixed, c < width)


def latent_decode(
    q: Tensor,
    kept: Tensor,
    table: Tensor,
    limits: Tensor,
    heads: int,
    latent: int,
    size: int,
    scale: float,
    longest: int,
) -> Tensor:
    """softmax(q kᵀ · scale) v over each row's own pages: q [B, Q, C + R], kept [slots, C + R] → [B, Q, C].

    table [B, pages] the pages of each row in order, of `size` tokens; limits [B, T]: how many keys each new token may
    see, at least one; `longest`: the largest of them, which the host knows.
    """
    rows, n_queries, width = q.shape
    q = q.contiguous()
    # Whole pages are fetched by the copy engine. Others are gathered, and their addresses take the registers that a
    # larger tile would want.
    whole = size % WHOLE_PAGE == 0 and kept.stride(0) * kept.itemsize % 16 == 0
    queries, keys = (min(max(power_of_two(n_queries), 16), 64), WHOLE_PAGE) if whole else (16, 32)
    blocks = cdiv(n_queries, queries)
    c, r = max(power_of_two(latent), 16), max(power_of_two(width - latent), 16)
    latents, ropes = (described(kept, [keys, c]), described(kept, [keys, r])) if whole else (None, None)
    spans = min(
        power_of_two(cdiv(processors(q.device), rows * blocks)), power_of_two(cdiv(longest, 4 * keys)), MOST_SPANS
    )
    span = cdiv(cdiv(longest, spans), keys) * keys
    out = torch.empty(rows, n_queries, latent, dtype=q.dtype, device=q.device)
    parts, logs = out, None
    if spans > 1:
        parts = torch.empty(rows, spans, n_queries, latent, device=q.device)
        logs = torch.empty(rows, spans, n_queries, device=q.device)
    _decode[(rows, blocks, spans)](
        q, kept, latents, ropes, table, limits, parts, logs, n_queries, heads, latent, width - latent, table.shape[1],
        span, q.stride(1), kept.stride(0), scale * LOG2_E, WHOLE=whole, SIZE=size, QUERIES=queries, KEYS=keys, LATENT=c,
        ROPE=r, SPANS=spans, num_warps=8 if whole else 4, num_stages=2,
    )  # fmt: skip
    if logs is not None:
        _joined[(rows, n_queries)](parts, logs, out, n_queries, latent, SPANS=spans, LATENT=c)
    return out
