"""Triton kernels for the decode step, where they measure better than torch's own.

`cached_attention` equals model.py's `plain_attention`. It splits the cache over many programs and
reads nothing past the live length, where a masked `scaled_dot_product_attention` reads the whole
buffer with one program per KV head.

Letters in shape comments: B rows, N tokens per row, H query heads, K KV heads, G = H / K,
E head_dim, S cache slots, P splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Splits begin at fixed slots, so a key is summed in the same order whatever the live length is:
# that keeps bfloat16 results bit-identical however many tokens a step accepts.
SPLIT = 64


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor, cached: Tensor, ancestors: Tensor, mask=None
) -> Tensor:
    """Attention [B, N, H, E] of q [B, N, H, E] over the first `cached` [B] slots of a contiguous
    cache kv [2, B, K, S, E], and over the call's own k, v [B, N, K, E] where `ancestors` [N, N], or
    [B, N, N] of each row, allows.

    The call's tokens count as slots cached .. cached + N - 1. `mask` is not needed here.
    """
    B, N, H, E = q.shape
    K, S = kv.shape[2:4]
    q, k, v, ancestors = q.contiguous(), k.contiguous(), v.contiguous(), ancestors.contiguous()
    per_row = N * N if ancestors.dim() == 3 else 0
    splits = triton.cdiv(S + N, SPLIT)
    rows = max(16, triton.next_power_of_2(N * (H // K)))  # a matrix instruction's least
    width = triton.next_power_of_2(E)
    part = q.new_empty((B, K, splits, rows, width), dtype=torch.float32)
    stats = q.new_empty((B, K, splits, 2, rows), dtype=torch.float32)
    out = torch.empty_like(q)
    _attend_split[(B * K, splits)](
        q, k, v, kv, cached, ancestors, part, stats, E**-0.5, S, kv.stride(0), per_row,
        splits,
        N=N, G=H // K, K=K, E=E, WIDTH=width, ROWS=rows, SPLIT=SPLIT,
    )  # fmt: skip
    _combine_splits[(B * N, H)](
        part, stats, cached, out, splits,
        N=N, G=H // K, K=K, E=E, WIDTH=width, ROWS=rows, SPLIT=SPLIT,
    )  # fmt: skip
    return out


@triton.jit
def _attend_split(
    q, k, v, kv, cached, ancestors, part, stats, scale, S, value_offset, per_row, splits,
    N: tl.constexpr, G: tl.constexpr, K: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Softmax numerator, maximum and sum of one split of slots, for one row's KV head."""
    bk, split = tl.program_id(0), tl.program_id(1)
    b, head = bk // K, bk % K
    root = tl.load(cached + b)
    slot = split * SPLIT + tl.arange(0, SPLIT)
    if split * SPLIT < root + N:
        row, e = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        node, query_head = row % N, head * G + row // N
        real, in_head = row < N * G, e < E
        at = ((b * N + node) * (K * G) + query_head) * E
        queries = tl.load(
            q + at[:, None] + e[None, :], mask=real[:, None] & in_head[None, :], other=0.0
        )  # [ROWS WIDTH]

        # A key lies in the cache or among this call's tokens; the other load gives zeros.
        in_cache, own = slot < root, (slot >= root) & (slot < root + N)
        cache_at = (bk * S).to(tl.int64) * E + slot[:, None] * E + e[None, :]
        own_at = ((b * N + slot - root) * K + head)[:, None] * E + e[None, :]
        from_cache, from_own = in_cache[:, None] & in_head[None, :], own[:, None] & in_head[None, :]
        keys = tl.load(kv + cache_at, mask=from_cache, other=0.0)
        keys += tl.load(k + own_at, mask=from_own, other=0.0)  # [SPLIT WIDTH]
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale

        seen_at = b * per_row + node[:, None] * N + (slot - root)[None, :]
        allowed = tl.load(ancestors + seen_at, mask=own[None, :], other=0)
        scores = tl.where(in_cache[None, :] | (allowed != 0), scores, float("-inf"))
        top = tl.max(scores, axis=1)
        # A row may see nothing in this split.
        p = tl.exp(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])

        values = tl.load(kv + value_offset + cache_at, mask=from_cache, other=0.0)
        values += tl.load(v + own_at, mask=from_own, other=0.0)
        y = tl.dot(p.to(values.dtype), values, input_precision="ieee")
        here = bk * splits + split
        tl.store(part + (here * ROWS + row)[:, None] * WIDTH + e[None, :], y)
        tl.store(stats + here * 2 * ROWS + row, top)
        tl.store(stats + here * 2 * ROWS + ROWS + row, tl.sum(p, axis=1))


@triton.jit
def _combine_splits(
    part, stats, cached, out, splits,
    N: tl.constexpr, G: tl.constexpr, K: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Join the live splits of one token and query head, in the order of the slots."""
    bn, query_head = tl.program_id(0), tl.program_id(1)
    b, e = bn // N, tl.arange(0, WIDTH)
    row = (query_head % G) * N + bn % N
    here = (b * K + query_head // G) * splits
    live = (tl.load(cached + b) + N + SPLIT - 1) // SPLIT
    top, total = float("-inf"), 0.0
    y = tl.zeros([WIDTH], dtype=tl.float32)
    split = 0
    while split < live:
        split_top = tl.load(stats + (here + split) * 2 * ROWS + row)
        split_total = tl.load(stats + (here + split) * 2 * ROWS + ROWS + row)
        split_y = tl.load(part + ((here + split) * ROWS + row) * WIDTH + e)
        new_top = tl.maximum(top, split_top)
        old, new = tl.exp(top - new_top), tl.exp(split_top - new_top)
        y, total, top = y * old + split_y * new, total * old + split_total * new, new_top
        split += 1
    tl.store(out + (bn * K * G + query_head) * E + e, y / total, mask=e < E)
