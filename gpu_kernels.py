"""Triton kernels for the decode step, used where they measure better than torch's own.

`forward` equals `Transformer.forward` of model.py for a gated llama on a GPU: five kernels a layer
instead of sixteen. A small batch moves every weight through the bus once and computes little, so
each kernel is shaped to keep the bus busy:

- `_linear`: a product of few rows. The weights are the matrix instruction's tall operand (mostly
  64 rows of W), the tokens its narrow one (8, 16, 32 or 64), loads are several tiles ahead of the
  arithmetic, and matrices of few rows, but for the smallest, are cut along C so that every
  multiprocessor has work. One token needs no matrix instruction.
- RMS norm costs no kernel: the producer of x also writes x * weight and the sums of x^2 by tile,
  and the next product scales its result by rsqrt(mean(x^2) + eps). SiLU, bias and the residual
  are applied where the result is written.
- Where GPUs share the model, `_add_parts` adds what each has of a product, with the same end.
- A draft is one operation, so that none of the compiler's kernels come between its own.
- Each kernel may start while the one before drains (programmatic dependent launch), and then
  waits for its data.

Every operation has a plain equivalent, here or in the module that uses it.

Letters in shape comments: B rows, N tokens per row, M = B * N, D hidden width, R rows and C columns
of a weight, T tiles of R, H query heads, K KV heads, G = H / K, E head_dim, S cache slots,
V vocabulary.
"""

import functools
import itertools
import weakref
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from speculator import MLPSpeculator, tree_widths

MOST_ROWS = 64  # of a small product; more rows are the library's
TILE = 64  # rows of a weight that one matrix instruction takes
MOST_TILES = 65536  # counted at once
NEAR = tl.constexpr(1536)  # columns of a matrix so small that all of x is in the nearest cache
SUM_BLOCK = 1024  # columns of a program that adds ranks' parts
PART_BYTES, FLAG_BYTES = 2**19, 2**16  # of one of a rank's two parts, and of its flags
SHARED_BYTES = 2 * (PART_BYTES + FLAG_BYTES)


@functools.cache
def counters(device: torch.device) -> Tensor:
    """Zeros, by tile: how many parts of it are finished. Every kernel leaves zeros behind."""
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


def pdl(x: Tensor) -> dict:
    """Options of a kernel that works on x: with programmatic dependent launch on a GPU."""
    return {"PDL": True, "launch_pdl": True} if x.is_cuda else {"PDL": False}


# --- small products ----------------------------------------------------------------------------


@triton.jit
def _weights(w_at, known, EVEN: tl.constexpr):
    """A tile of weights, all of them inside if EVEN. Nothing reads them again before they are gone
    from the cache."""
    if EVEN:
        return tl.load(w_at, eviction_policy="evict_first")
    return tl.load(w_at, mask=known, other=0, eviction_policy="evict_first")


@triton.jit
def _floats(w):
    """Weights in float32; of int8 by their bits, since the GPU converts a quarter as fast as it
    adds: w + 128 in the last places of 2^23, less both."""
    if w.dtype == tl.int8:
        return (w.to(tl.int32) + 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0
    return w.to(tl.float32)


@triton.jit
def _like(w, x):
    """Weights in x's type."""
    if w.dtype == tl.int8:
        return _floats(w).to(x.dtype)
    return w.to(x.dtype)


@triton.jit
def _linear(
    x, w, row_scale, bias, squares, residual, norm, cos, sin, out, weighted, out_squares, part,
    count, M, R, in_tiles, turned, eps,
    E: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    DEEP: tl.constexpr, SPLITS: tl.constexpr, AHEAD: tl.constexpr,
    IN_TILES: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
    APART: tl.constexpr = False,
):  # fmt: skip
    """out [M, R] = x [M, C] @ w [R, C]^T, one tile of TILE rows of w and one part of C a program.

    Not None: row_scale [R] multiplies (8-bit weights), squares [in_tiles, M] holds the sums of
    the input's squares, whose root mean it is divided by; bias [R] and residual [M, R] are added;
    with norm [R], weighted [M, R] = out * norm and out_squares [T, M] are written for the next
    product. GATED: w holds gate and up rows, out [M, R / 2] = silu(gate) * up. With cos and sin
    [M, E / 2], heads of E rows are turned by these angles, as far as row `turned`. AHEAD: widths of
    the parts of a program's columns that are on their way before it waits for x: of all columns for
    one row. APART: these are summed one by one, in shorter chains of matrix instructions.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    m, i, k = tl.arange(0, ROWS), tl.arange(0, TILE), tl.arange(0, DEEP)
    half: tl.constexpr = TILE // 2
    if GATED:  # half the tile's rows are gates, half the ups that belong to them
        r = tl.where(i < half, tile * half + i, R // 2 + tile * half + i - half)
        r_in = tile * half + i % half < R // 2
    elif cos is not None:  # from both halves of a head
        first = tile * TILE // E * E + tile * TILE % E // 2
        r = first + tl.where(i < half, i, E // 2 + i - half)
        r_in = r < R
    else:
        r = tile * TILE + i
        r_in = r < R
    if PDL:
        gdc_launch_dependents()
    begin = split * (C // SPLITS)
    w_at = w + r[:, None].to(tl.int64) * C
    if GATED:
        column = tile * half + tl.arange(0, half)
        width = R // 2
    else:
        column = r
        width = R
    if row_scale is not None:
        of_row = tl.load(row_scale + r, mask=r_in, other=0.0)
    if bias is not None:
        shift = tl.load(bias + r, mask=r_in, other=0.0).to(tl.float32)
    if norm is not None:
        weight = tl.load(norm + column, mask=column < width, other=0.0).to(tl.float32)
    parts, start = (), 0
    for j in tl.static_range(len(AHEAD)):
        c_ahead = start + tl.arange(0, AHEAD[j])
        known = r_in[:, None] & (c_ahead < C // SPLITS)[None, :]
        parts += (_weights(w_at + (begin + c_ahead)[None, :], known, EVEN),)
        start += AHEAD[j]
    if PDL:
        gdc_wait()
    at = m[None, :] * width + column[:, None]
    inside = (m < M)[None, :] & (column < width)[:, None]
    # What the end needs is asked for here, and looked at there: the product does not wait for it.
    if squares is not None:
        t = tl.arange(0, IN_TILES)[:, None]
        known = (t < in_tiles) & (m < M)[None, :]
        sums = tl.load(squares + t * M + m[None, :], mask=known, other=0.0)
    if residual is not None:
        old = tl.load(residual + at, mask=inside, other=0.0)
    if cos is not None:
        angle = m[None, :] * (E // 2) + (first % E + tl.arange(0, half))[:, None]
        turn = ((m < M) & (m * 0 + first < turned))[None, :]
        c = tl.load(cos + angle, mask=turn, other=1.0)
        s = tl.load(sin + angle, mask=turn, other=0.0)

    acc = tl.zeros([TILE, ROWS], dtype=tl.float32)
    if ROWS == 1:
        wide = tl.zeros([TILE, DEEP], dtype=tl.float32)
        for j in tl.static_range(len(AHEAD)):
            c_ahead = (j * DEEP + k)[None, :]
            # Loaded by every thread that multiplies it, not handed on.
            if C <= NEAR or w.dtype.element_ty == tl.int8:
                c_ahead += (i * 0)[:, None]
            b = tl.load(x + begin + c_ahead, mask=c_ahead < C // SPLITS, other=0.0)
            wide += _floats(parts[j]) * b.to(tl.float32)
        acc += tl.reshape(tl.sum(wide, axis=1), [TILE, 1])
    else:
        xs, start = (), 0
        for j in tl.static_range(len(AHEAD)):
            c_ahead, known = start + tl.arange(0, AHEAD[j]), (m < M)[None, :]
            if not EVEN:
                known &= (c_ahead < C // SPLITS)[:, None]
            x_at = x + m[None, :] * C + (begin + c_ahead)[:, None]
            xs += (tl.load(x_at, mask=known, other=0.0),)
            start += AHEAD[j]
        for j in tl.static_range(len(AHEAD)):
            if APART:
                acc += tl.dot(_like(parts[j], xs[j]), xs[j], input_precision="ieee")
            else:
                acc = tl.dot(_like(parts[j], xs[j]), xs[j], acc, input_precision="ieee")
        for rest in range(start, C // SPLITS, DEEP):
            at_c, c_in = begin + rest + k, rest + k < C // SPLITS
            a = _weights(w_at + at_c[None, :], r_in[:, None] & c_in[None, :], EVEN)
            x_in = (m < M)[None, :]
            if not EVEN:
                x_in &= c_in[:, None]
            b = tl.load(x + m[None, :] * C + at_c[:, None], mask=x_in, other=0.0)
            acc = tl.dot(_like(a, b), b, acc, input_precision="ieee")

    last = True
    if SPLITS > 1:  # whoever finishes last adds the parts, always in the same order
        here = (tile * SPLITS * TILE + i)[:, None] * ROWS + m[None, :]
        tl.store(part + here + split * TILE * ROWS, acc)
        tl.debug_barrier()
        last = tl.atomic_add(count + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        if SPLITS > 1:
            acc = tl.zeros([TILE, ROWS], dtype=tl.float32)
            for other in tl.static_range(SPLITS):
                acc += tl.load(part + here + other * TILE * ROWS, cache_modifier=".cg")
            tl.store(count + tile, 0)
        if row_scale is not None:
            acc *= of_row[:, None]
        if squares is not None:
            acc *= tl.rsqrt(tl.sum(sums, axis=0) / C + eps)[None, :]
        if bias is not None:
            acc += shift[:, None]
        if GATED or cos is not None:
            y1, y2 = tl.split(tl.permute(tl.reshape(acc, [2, half, ROWS]), [1, 2, 0]))
        if GATED:
            y = y1 * tl.sigmoid(y1) * y2
        elif cos is not None:
            y = tl.join(y1 * c - y2 * s, y2 * c + y1 * s)
            y = tl.reshape(tl.permute(y, [2, 0, 1]), [TILE, ROWS])
        else:
            y = acc
        if residual is not None:
            y += old.to(tl.float32)
        y = y.to(out.dtype.element_ty)
        tl.store(out + at, y, mask=inside)
        if norm is not None:
            y = y.to(tl.float32)
            scaled = (y * weight[:, None]).to(weighted.dtype.element_ty)
            tl.store(weighted + at, scaled, mask=inside)
            tl.store(out_squares + tile * M + m, tl.sum(y * y, axis=0), mask=m < M)


def tiling(R: int, C: int, M: int, itemsize: int = 2) -> dict:
    """How to cut a product of M rows with w [R, C] of so many bytes each, as measured on an H100
    and an H200: narrow matrices, but for the smallest, along C too, so that every multiprocessor
    has two tiles to load, and 80 kB of loads under way in each. One row needs no matrix
    instruction, only many loads, as long as its weights fit in registers; eight take the smallest,
    which has no barriers. AHEAD, where it is not said, is all, PIECE what a part of it has at most,
    and else DEEP."""
    many, small = R >= 96 * TILE, C <= 1536
    if M == 1 and (C <= 8192 or (C <= 16384 and C % 64 == 0)):
        splits, tile = 4 if C > 8192 else 1, {"TILE": 4, "num_warps": 4}
        if C > 8192:
            tile["TILE"] = 8
        elif small and R < 10 * TILE:
            tile["num_warps"] = 2
        elif small:
            tile["TILE"] = 8 if R > 1024 else 2
        elif not many:
            tile = {"TILE": 16 if C <= 4096 else 8, "num_warps": 8}
        elif C <= 4096 and itemsize > 1:
            tile["num_warps"] = 2
        elif itemsize == 1 and C <= 3072:
            tile["TILE"] = 8
        deep = 1024 if (C > 4096 and many) or C > 8192 else 512
        return tile | {"ROWS": 1, "DEEP": deep, "SPLITS": splits}
    few, wide = M <= 16, M > 32
    if small and not many and itemsize == 2 and M <= 64 and C % 64 == 0:
        rows = max(16, triton.next_power_of_2(M))
        tile = {"ROWS": rows, "TILE": TILE, "SPLITS": 1, "DEEP": 64, "PIECE": 512, "num_warps": 4}
        if M > 8:
            tile["SPLITS"] = C // 512 if C % 512 == 0 else 1
        elif R > 1024:
            tile |= {"ROWS": 8, "PIECE": 128, "APART": True}
        else:
            tile |= {"ROWS": 8, "TILE": TILE // 2, "PIECE": 256, "APART": True}
            tile["num_warps"] = 2 if C < 1024 else 4
        if tile["TILE"] * C // tile["SPLITS"] <= 48 * 1024:
            return tile | {"num_stages": 3}
    if small and itemsize == 1 and M <= 32 and C % 512 == 0:
        tile = {"ROWS": 8, "TILE": TILE, "SPLITS": C // 512, "DEEP": 64, "num_warps": 4}
        if M > 16:
            return tile | {"ROWS": 32, "DEEP": 128, "AHEAD": 0, "num_stages": 4}
        if M > 8:
            tile |= {"ROWS": 16, "TILE": TILE // 2, "SPLITS": max(1, C // 768), "num_warps": 2}
        return tile | {"PIECE": 128, "APART": True, "num_stages": 3}
    splits = 1 if many else 2 if wide else 4
    if few:
        splits = 1 if R >= 256 * TILE else 2 if R >= 80 * TILE else 4
    if C < 1024 or C % (splits * 128):
        splits = 1
    tall = R >= 256 * TILE if wide else few and R >= 192 * TILE and not small
    deep, ahead = 128 if C // splits % 128 == 0 else 64, 0
    if wide and itemsize == 4:  # which no matrix instruction takes: it would not fit in registers
        deep = 32
    elif few and itemsize < 4 and C // splits <= 640:
        ahead = C // splits
    elif few and itemsize < 4 and splits > 1 and not tall:
        ahead = 512
    tall &= itemsize < 4
    return {
        "ROWS": max(16, triton.next_power_of_2(M)),
        "TILE": 2 * TILE if tall else TILE,
        "SPLITS": splits,
        "DEEP": deep,
        "AHEAD": ahead,
        "num_stages": (512 if itemsize < 4 else 256) // deep,
        "num_warps": 8 if tall and few else 4,
    }


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may take; the interpreter's, as much as an H100's."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def within(tile: dict, C: int, x_size: int, w_size: int, most: int) -> dict:
    """The tile, or where a GPU has less shared memory than those it was measured on, one with less
    of the weights under way."""
    if tile["ROWS"] == 1:
        return tile
    column = tile["ROWS"] * x_size + tile["TILE"] * w_size
    if column * tile.get("AHEAD", C // tile["SPLITS"]) > most:
        tile = tile | {"ROWS": max(16, tile["ROWS"]), "AHEAD": 0, "PIECE": 64, "DEEP": 64}
        tile |= {"APART": False, "num_stages": 8}
        column = tile["ROWS"] * x_size + tile["TILE"] * w_size
    stages = min(tile["num_stages"], most // (column * tile["DEEP"]))
    return tile | {"num_stages": max(1, stages)}


def pieces(n: int, most: int) -> tuple[int, ...]:
    """Powers of two, of `most` at most, that add up to n, or to what 16 divides: a matrix
    instruction takes no fewer."""
    n, found = triton.cdiv(n, 16) * 16, []
    while n:
        found.append(min(most, 1 << (n.bit_length() - 1)))
        n -= found[-1]
    return tuple(found)


def small(
    x: Tensor, w: Tensor, *, row_scale=None, bias=None, squares=None, eps=0.0, residual=None,
    norm=None, angles=None, turned=0, gated=False, dtype=None, out=None, tile: dict | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(out, weighted, squares) of `_linear` for x [M, C], w [R, C]."""
    (M, C), R = x.shape, w.shape[0]
    tile = tiling(R, C, M, w.itemsize) | (tile or {})
    tile = within(tile, C, x.itemsize, w.itemsize, shared_bytes(x.device))
    if angles is not None:  # of which a tile has one head at most
        tile["TILE"] = min(tile["TILE"], TILE)
    rows, splits, tiles = tile["ROWS"], tile["SPLITS"], triton.cdiv(R, tile["TILE"])
    n, deep, piece = C // splits, tile["DEEP"], tile.pop("PIECE", tile["DEEP"])
    if rows == 1:
        tile["AHEAD"] = (deep,) * triton.cdiv(n, deep)
    else:
        tile["AHEAD"] = pieces(tile.get("AHEAD", n), piece)
    if out is None:
        out = x.new_empty(M, R // 2 if gated else R, dtype=dtype or x.dtype)
    weighted = torch.empty_like(out) if norm is not None else None
    out_squares = x.new_empty(tiles, M, dtype=torch.float32) if norm is not None else None
    part = None
    if splits > 1:
        part = x.new_empty(splits * tiles * tile["TILE"] * rows, dtype=torch.float32)
    cos, sin = angles or (None, None)
    in_tiles = len(squares) if squares is not None else 1
    even = n * splits == C and (n - sum(tile["AHEAD"])) % deep == 0 and R % tile["TILE"] == 0
    _linear[(tiles, splits)](
        x, w, row_scale, bias, squares, residual, norm, cos, sin, out, weighted, out_squares, part,
        counters(x.device), M, R, in_tiles, turned, eps,
        E=2 * cos.shape[1] if angles else 1, C=C, GATED=gated, EVEN=even,
        IN_TILES=triton.next_power_of_2(in_tiles), **tile, **pdl(x),
    )  # fmt: skip
    return out, weighted, out_squares


# --- attention ---------------------------------------------------------------------------------

# Splits begin at fixed slots; program j of a head takes splits j, j + PARTS, ... in this order, and
# the programs' parts are joined in theirs. So the keys that a token sees are summed in the same
# order whatever the live length is, and those that it does not see add exact zeros: its bfloat16
# result is bit-identical however many tokens the steps before it accepted.
# us of a layer on an H200, 240 of 1024 slots cached, 5 and 16 candidates: of the demo 4.2 and 5.0,
# SDPA with a mask 49 and 33, FlexAttention 47 and 47; of the 8B shape 5.9 and 8.0, 66 and 48, 13
# and 26.
SPLIT = 64
QUERIES = 16  # of a program, the fewest that a matrix instruction takes
PARTS = 16  # programs at most that share a head's splits: the last of them reads all parts
TOGETHER = tl.constexpr(8)  # parts that it reads at once
PROGRAMS = 256  # if there are as many anyway, no head's splits are shared


@triton.jit
def _fold(queries, keys, values, seen, scale, top, total, y):
    """Take keys and values [SPLIT WIDTH] into the maxima, sums and numerators of a softmax."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # a query may see nothing yet
    p, kept = tl.exp(scores - base[:, None]), tl.exp(top - base)
    y = tl.dot(p.to(values.dtype), values, y * kept[:, None], input_precision="ieee")
    return higher, total * kept + tl.sum(p, axis=1), y


@triton.jit
def _join(y_at, stat_at, parts, real, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sum and numerators of all parts, TOGETHER at a time."""
    zeros = tl.zeros([ROWS], dtype=tl.int32)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    y = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for start in tl.range(0, parts, TOGETHER, num_stages=1):
        higher = top
        for j in tl.static_range(TOGETHER):
            used, at = zeros + start + j < parts, stat_at + (start + j) * 2 * ROWS
            its = tl.load(at, mask=used, other=float("-inf"), cache_modifier=".cg")
            higher = tl.maximum(higher, its)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        kept, top = tl.exp(top - base), higher
        total, y = total * kept, y * kept[:, None]
        for j in tl.static_range(TOGETHER):
            used, at = zeros + start + j < parts, stat_at + (start + j) * 2 * ROWS
            its = tl.load(at, mask=used, other=float("-inf"), cache_modifier=".cg")
            share = tl.exp(its - base)
            its = tl.load(at + ROWS, mask=used, other=0.0, cache_modifier=".cg")
            total += share * its
            known, at = (used & real)[:, None], y_at + (start + j) * ROWS * WIDTH
            its = tl.load(at, mask=known, other=0.0, cache_modifier=".cg")
            y += share[:, None] * its
    return total, y


@triton.jit
def _attend(
    qkv, kv, cached, ancestors, out, part, stats, count, scale, S, value_offset, row_ancestors,
    N: tl.constexpr, G: tl.constexpr, K: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Attention of ROWS of the G * N queries of one row's KV head. Each of PARTS programs leaves
    softmax numerators in part [tiles, PARTS, ROWS, WIDTH], maxima and sums in stats
    [tiles, PARTS, 2, ROWS]; the last to finish joins them. EARLY: `cached`, and what it counts, was
    there before the kernel before this one began, so that the first split need not wait for it."""
    tile, mine = tl.program_id(0), tl.program_id(1)
    blocks: tl.constexpr = (N * G + ROWS - 1) // ROWS
    bk, block = tile // blocks, tile % blocks
    b, head = bk // K, bk % K
    if PDL:
        gdc_launch_dependents()
    if PDL and not EARLY:
        gdc_wait()
    root = tl.load(cached + b).to(tl.int32)
    live = (root + N + SPLIT - 1) // SPLIT
    i, e, slot = tl.arange(0, ROWS), tl.arange(0, WIDTH), mine * SPLIT + tl.arange(0, SPLIT)
    in_cache = (slot < root)[:, None]
    cache_at = kv + (bk * S + slot).to(tl.int64)[:, None] * E + e[None, :]
    old_keys = tl.load(cache_at, mask=in_cache & (e < E)[None, :], other=0.0)  # [SPLIT WIDTH]
    old_values = tl.load(cache_at + value_offset, mask=in_cache & (e < E)[None, :], other=0.0)
    if PDL and EARLY:
        gdc_wait()
    if mine < live:
        query = block * ROWS + i
        node, in_head, real = query % N, (e < E)[None, :], query < N * G
        width: tl.constexpr = (G + 2) * K * E  # of a token's q, k and v
        q_at = ((b * N + node) * width + (head * G + query // N) * E)[:, None] + e[None, :]
        wanted = real[:, None] & in_head
        seen_at = ancestors + b * row_ancestors + node[:, None] * N - root
        own_at = qkv + (b * N - root) * width + (G * K + head) * E + e[None, :]
        own = (slot >= root) & (slot < root + N)
        key_at, there = own_at + slot[:, None] * width, own[:, None] & in_head
        # All are on their way before one is used: a change of its layout, which would follow the
        # load of the queries if no `where` stood between, would hold up the rest.
        queries = tl.load(qkv + q_at, mask=wanted, other=0.0)  # [ROWS WIDTH]
        own_keys = tl.load(key_at, mask=there, other=0.0)
        own_values = tl.load(key_at + K * E, mask=there, other=0.0)
        seen = tl.load(seen_at + slot[None, :], mask=own[None, :], other=0)
        keys = tl.where(in_cache, old_keys, own_keys)
        values = tl.where(in_cache, old_values, own_values)
        queries = tl.where(wanted, queries, 0.0)
        seen = seen != 0
        top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        y = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
        seen |= tl.trans(in_cache)
        top, total, y = _fold(queries, keys, values, seen, scale, top, total, y)
        for split in range(mine + PARTS, live, PARTS):
            slot = split * SPLIT + tl.arange(0, SPLIT)
            in_cache, there = (slot < root)[:, None], (slot < root + N)[:, None] & in_head
            own = (slot >= root) & (slot < root + N)
            # Loaded before the products, whose layout the compiler then keeps for the softmax.
            seen = tl.load(seen_at + slot[None, :], mask=own[None, :], other=0) != 0
            cache_at = kv + (bk * S + slot).to(tl.int64)[:, None] * E + e[None, :]
            key_at = own_at + slot[:, None] * width
            value_at = tl.where(in_cache, cache_at + value_offset, key_at + K * E)
            key_at = tl.where(in_cache, cache_at, key_at)  # one load: it is pipelined
            keys = tl.load(key_at, mask=there, other=0.0)  # [SPLIT WIDTH]
            values = tl.load(value_at, mask=there, other=0.0)
            seen |= tl.trans(in_cache)
            top, total, y = _fold(queries, keys, values, seen, scale, top, total, y)

        parts = tl.minimum(live, PARTS)
        last = parts == 1  # a join of one would leave all as it is
        if PARTS > 1:
            y_at = part + (tile * PARTS * ROWS + i)[:, None] * WIDTH + e[None, :]
            stat_at = stats + tile * PARTS * 2 * ROWS + i
            if parts > 1:
                tl.store(y_at + mine * ROWS * WIDTH, y, mask=real[:, None])
                tl.store(stat_at + mine * 2 * ROWS, top)
                tl.store(stat_at + mine * 2 * ROWS + ROWS, total)
                tl.debug_barrier()
                last = tl.atomic_add(count + tile, 1, sem="acq_rel") == parts - 1
        if last:
            if PARTS > 1:  # noqa: SIM102, known when it is compiled
                if parts > 1:
                    total, y = _join(y_at, stat_at, parts, real, ROWS, WIDTH)
                    tl.store(count + tile, 0)
            out_at = ((b * N + node) * K * G + head * G + query // N)[:, None] * E + e[None, :]
            tl.store(out + out_at, y / total[:, None], mask=real[:, None] & in_head)


@torch.library.custom_op("fastspec::attention", mutates_args=())
def attention(
    qkv: Tensor, kv: Tensor, cached: Tensor, ancestors: Tensor, n_heads: int, early: bool
) -> Tensor:
    """Attention [M, H * E] of q over the first `cached` [B] slots of a contiguous cache
    kv [2, B, K, S, E], and over the call's own tokens where `ancestors` bool [N, N] or [B, N, N]
    allows.

    qkv [M, (H + 2 K) * E] are the projections, turned. The own tokens count as slots cached ..
    cached + N - 1. early: see `_attend`.
    """
    _, B, K, S, E = kv.shape
    N, G = ancestors.shape[-1], n_heads // K
    tiles, width = B * K * triton.cdiv(N * G, QUERIES), max(16, triton.next_power_of_2(E))
    parts = max(1, min(PARTS, PROGRAMS // tiles, triton.cdiv(S + N, SPLIT)))
    shared, floats = parts > 1, {"dtype": torch.float32}
    part = qkv.new_empty(tiles, parts, QUERIES, width, **floats) if shared else None
    stats = qkv.new_empty(tiles, parts, 2, QUERIES, **floats) if shared else None
    out = qkv.new_empty(B * N, n_heads * E)
    _attend[(tiles, parts)](
        qkv, kv, cached, ancestors, out, part, stats, counters(qkv.device), E**-0.5, S,
        kv.stride(0), N * N * (ancestors.dim() - 2),
        N=N, G=G, K=K, E=E, WIDTH=width, ROWS=QUERIES, SPLIT=SPLIT, PARTS=parts, EARLY=early,
        num_warps=8, num_stages=3 if SPLIT * width * qkv.itemsize <= 32768 else 2, **pdl(qkv),
    )  # fmt: skip
    return out


@attention.register_fake
def _(qkv, kv, cached, ancestors, n_heads, early):
    return qkv.new_empty(len(qkv), n_heads * kv.shape[-1])


def cached_attention(
    qkv: Tensor, kv: Tensor, cached: Tensor, ancestors: Tensor, mask=None
) -> Tensor:
    """model.py's `plain_attention` of qkv [B, N, H+2K, E]."""
    B, N, heads, E = qkv.shape
    H = heads - 2 * kv.shape[2]
    return attention(qkv.view(B * N, -1), kv, cached, ancestors, H, False).view(B, N, H, E)


# --- sums over ranks ---------------------------------------------------------------------------
# A rank's product goes to memory that the other ranks can read; each of them then adds all parts.
# There are two parts and two sets of flags, used in turn. Who comes to the next sum is done with
# the last one (each kernel waits for the one before it), so that what is written after the next sum
# finds its part read and its flags taken: nobody waits at the end of a sum, and a flag is 0 or 1.

# By dtype, of even and odd sums: all ranks' parts, their flags in int32, and the own rank.
shared_memory: dict[torch.dtype, list[tuple[list[Tensor], list[Tensor], int]]] = {}


def share(memory: Sequence[Tensor], rank: int) -> None:
    """Add parts in this memory of all ranks: zeros, two of flags and a part each."""
    n, halves = FLAG_BYTES // memory[0].itemsize, zip(*(m.chunk(2) for m in memory), strict=True)
    shared_memory[memory[0].dtype] = [
        ([m[n:] for m in half], [m[:n].view(torch.int32) for m in half], rank) for half in halves
    ]


def can_share(x: Tensor) -> bool:
    """Whether `add_linear_ranks` takes results like x [M, D]."""
    small = len(x) <= MOST_ROWS and x.nbytes <= PART_BYTES
    return small and x.dtype in shared_memory


@triton.jit(do_not_specialize=["rank"])
def _add_parts(
    parts, flags, own, rank, residual, norm, out, weighted, out_squares, D,
    RANKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [M, D] = residual + the sum of all ranks' parts [M, D], one block of columns of a row a
    program; weighted = out * norm and out_squares [T, M] as in `_linear`. A program waits for the
    same one of every rank: own are this rank's flags."""
    tile, m = tl.program_id(0), tl.program_id(1)
    d, r = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside, at = d < D, m * D + d
    slot = (m * tl.num_programs(0) + tile) * WIDTH
    if PDL:
        gdc_launch_dependents()
    weight = tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)
    there = tl.zeros([WIDTH], dtype=tl.int64)
    for other in tl.static_range(RANKS):
        there = tl.where(r == other, flags[other].to(tl.int64), there)
    there = there.to(tl.pointer_type(tl.int32)) + slot + rank
    if PDL:
        gdc_wait()
    # All ranks at once, and nobody reads what was there: no time is spent on the way back.
    tl.atomic_or(there, 1, mask=r < RANKS, sem="release", scope="sys")
    y = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    seen = tl.zeros([WIDTH], dtype=tl.int32)
    while tl.sum(seen) < RANKS:  # a flag that was taken is 0, as those beyond RANKS always are
        seen |= tl.atomic_cas(own + slot + r, seen * 0 + 1, seen * 0, sem="acquire", scope="sys")
    tl.debug_barrier()
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for other in tl.static_range(RANKS):  # not from L1, which may hold what was there before
        part = tl.load(parts[other] + at, mask=inside, other=0.0, cache_modifier=".cg")
        total += part.to(tl.float32)
    y = (y + total).to(out.dtype.element_ty)
    tl.store(out + at, y, mask=inside)
    y = y.to(tl.float32)
    tl.store(weighted + at, (y * weight).to(weighted.dtype.element_ty), mask=inside)
    tl.store(out_squares + tile * tl.num_programs(1) + m, tl.sum(y * y, axis=0))


def add_linear_ranks(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor, norm: Tensor, odd: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y = residual + all ranks' x @ w^T + bias [M, D], y * norm, and the sums of y^2 [T, M], where
    `can_share` says so. Even and odd sums take turns on every rank."""
    (M, D), (parts, flags, rank) = residual.shape, shared_memory[residual.dtype][odd]
    small(x, w, bias=bias, out=parts[rank][: M * D].view(M, D))
    out, weighted = torch.empty_like(residual), torch.empty_like(residual)
    squares = x.new_empty(triton.cdiv(D, SUM_BLOCK), M, dtype=torch.float32)
    _add_parts[(len(squares), M)](
        tuple(parts), tuple(flags), flags[rank], rank, residual, norm, out, weighted, squares, D,
        RANKS=len(parts), WIDTH=triton.next_power_of_2(len(parts)), BLOCK=SUM_BLOCK,
        num_warps=4, **pdl(x),
    )  # fmt: skip
    return out, weighted, squares


def sums_of_ones(like: Tensor) -> list[Tensor]:
    """An even and an odd sum over the ranks of ones, to see whether they come out right."""
    ones, w = like.new_ones(1, TILE), like.new_full((TILE, TILE), 1 / TILE)
    return [add_linear_ranks(ones, w, None, 0 * ones, ones[0], odd)[0] for odd in (0, 1)]


# --- the forward pass --------------------------------------------------------------------------


@torch.library.custom_op("fastspec::linear", mutates_args=())
def linear(x: Tensor, w: Tensor, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [M, C] @ w [R, C]^T, whose rows are multiplied by row_scale [R]."""
    return small(x, w, row_scale=row_scale, dtype=dtype)[0]


@linear.register_fake
def _(x, w, row_scale, dtype):
    return x.new_empty(len(x), len(w), dtype=dtype)


@torch.library.custom_op("fastspec::qkv_linear", mutates_args=("out",))
def qkv_linear(
    x: Tensor, squares: Tensor, eps: float, w: Tensor, bias: Tensor | None, cos: Tensor,
    sin: Tensor, turned: int, out: Tensor,
) -> None:  # fmt: skip
    """Fill out with projections [M, R] of x [M, C], normed by squares [T, M], the first `turned`
    of them turned by the angles of cos and sin float32 [M, E / 2]."""
    angles = (cos, sin)
    small(x, w, bias=bias, squares=squares, eps=eps, angles=angles, turned=turned, out=out)


@triton.jit
def _enter(
    table, rows, norm, positions, inv_freq, cached, x, weighted, squares, cos, sin, kept, B, D,
    HALF, WIDTH: tl.constexpr, HALF_WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`enter` of one token. The next kernel starts when this one is done, and everything before."""
    m, d, e = tl.program_id(0), tl.arange(0, WIDTH), tl.arange(0, HALF_WIDTH)
    weight = tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
    frequency = tl.load(inv_freq + e, mask=e < HALF, other=0.0)
    if PDL:
        gdc_wait()
    row = m
    if rows is not None:
        row = tl.load(rows + m)
    y = tl.load(table + row.to(tl.int64) * D + d, mask=d < D, other=0.0)
    tl.store(x + m * D + d, y, mask=d < D)
    y = y.to(tl.float32)
    tl.store(weighted + m * D + d, (y * weight).to(weighted.dtype.element_ty), mask=d < D)
    tl.store(squares + m, tl.sum(y * y, axis=0))
    angle = tl.load(positions + m).to(tl.float32) * frequency
    tl.store(cos + m * HALF + e, tl.cos(angle), mask=e < HALF)
    tl.store(sin + m * HALF + e, tl.sin(angle), mask=e < HALF)
    if m < B:
        tl.store(kept + m, tl.load(cached + m))


@torch.library.custom_op("fastspec::enter", mutates_args=())
def enter(
    table: Tensor, rows: Tensor | None, norm: Tensor, positions: Tensor, inv_freq: Tensor,
    cached: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What the layers begin with: x [M, D], the rows [M] (None: 0, 1, ..) of a table, x * norm, and
    the sums of x^2 [1, M]; cosine and sine [M, E / 2] of the angles of positions [M]; a copy of
    `cached` [B]. No kernel after this one starts before these are there."""
    (M, D), (B, HALF) = (positions.numel(), table.shape[1]), (len(cached), len(inv_freq))
    x, weighted = table.new_empty(M, D), table.new_empty(M, D)
    squares, kept = inv_freq.new_empty(1, M), torch.empty_like(cached)
    cos, sin = inv_freq.new_empty(M, HALF), inv_freq.new_empty(M, HALF)
    _enter[(M,)](
        table, rows, norm, positions, inv_freq, cached, x, weighted, squares, cos, sin, kept, B, D,
        HALF, WIDTH=triton.next_power_of_2(D), HALF_WIDTH=triton.next_power_of_2(HALF), **pdl(x),
    )  # fmt: skip
    return x, weighted, squares, cos, sin, kept


@enter.register_fake
def _(table, rows, norm, positions, inv_freq, cached):
    M = positions.numel()
    x, cos = table.new_empty(M, table.shape[1]), inv_freq.new_empty(M, len(inv_freq))
    squares, sin = inv_freq.new_empty(1, M), torch.empty_like(cos)
    return x, torch.empty_like(x), squares, cos, sin, torch.empty_like(cached)


@torch.library.custom_op("fastspec::gated_linear", mutates_args=())
def gated_linear(x: Tensor, squares: Tensor, eps: float, w: Tensor, bias: Tensor | None) -> Tensor:
    """silu(gate) * up [M, R / 2] of x [M, C], normed by squares [T, M]."""
    return small(x, w, bias=bias, squares=squares, eps=eps, gated=True)[0]


@gated_linear.register_fake
def _(x, squares, eps, w, bias):
    return x.new_empty(len(x), len(w) // 2)


def fits(args, tokens: int) -> bool:
    """Whether `forward` takes a model of these args and so many tokens."""
    sizes = (args.dim, args.ffn_dim, args.head_dim)
    llama = args.activation == "silu" and not (args.layer_norm or args.learned_positions)
    return llama and tokens <= MOST_ROWS and all(size % TILE == 0 for size in sizes)


# The compiler takes seconds over every layer's kernels, which it cannot change, and far longer over
# an operation with all their weights. So all layers are one operation, which knows its model by a
# number.
models: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
numbers = itertools.count(1)  # none again: a CUDA graph holds where the weights of its model were


def enroll(model: nn.Module) -> None:
    """Let `forward` take a model. Its number stays, or what is compiled for it would be again."""
    if models.get(getattr(model, "number", 0)) is not model:  # a copy has that of its original
        model.number = next(numbers)
        models[model.number] = model


@torch.library.custom_op("fastspec::layers", mutates_args=())
def layers(
    number: int, of_ranks: bool, tiles: int, x: Tensor, weighted: Tensor, squares: Tensor,
    kv: Tensor, cached: Tensor, ancestors: Tensor, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """All layers of the model with this number, which ranks share or not; see `each_layer`. Tiles:
    of the last product, said here for the compiler's cache, which outlives a change of them."""

    def add(odd: int, y: Tensor, module: nn.Linear, x: Tensor, norm: Tensor):
        if of_ranks:
            return add_linear_ranks(y, module.weight, module.bias, x, norm, odd)
        return small(y, module.weight, bias=module.bias, residual=x, norm=norm)

    return each_layer(models[number], x, weighted, squares, kv, cached, ancestors, (cos, sin), add)


@layers.register_fake
def _(number, of_ranks, tiles, x, weighted, squares, kv, *_):
    args = models[number].args
    width = (args.n_heads + 2 * args.n_kv_heads) * args.head_dim
    every_qkv = x.new_empty(args.n_layers, len(x), width)
    return torch.empty_like(x), squares.new_empty(tiles, len(x)), every_qkv


def each_layer(
    model, x, weighted, squares, kv, cached, ancestors, angles, add
) -> tuple[Tensor, Tensor, Tensor]:
    """x * norm [M, D] for the product after the last layer, the sums of x^2 [T, M], and all layers'
    projections [L, M, (H + 2 K) * E]. `add` adds a product to x and norms it."""
    args = model.args
    eps, turned = args.norm_eps, (args.n_heads + args.n_kv_heads) * args.head_dim
    norms = [norm.weight for a in model.layers for norm in (a.attention_norm, a.mlp_norm)]
    norms.append(model.norm.weight)
    every_qkv = x.new_empty(len(kv), len(x), turned + args.n_kv_heads * args.head_dim)
    for i, (layer, layer_kv) in enumerate(zip(model.layers, kv.unbind(), strict=True)):
        wqkv, wo, w13, w2 = layer.attention.wqkv, layer.attention.wo, layer.mlp.w13, layer.mlp.w2
        qkv = every_qkv[i]
        qkv_linear(weighted, squares, eps, wqkv.weight, wqkv.bias, *angles, turned, qkv)
        y = attention(qkv, layer_kv, cached, ancestors, args.n_heads, True)
        x, weighted, squares = add(0, y, wo, x, norms[2 * i + 1])
        z = gated_linear(weighted, squares, eps, w13.weight, w13.bias)
        x, weighted, squares = add(1, z, w2, x, norms[2 * i + 2])
    return weighted, squares, every_qkv


def forward(
    model, tokens: Tensor, positions: Tensor, kv: Tensor, cached: Tensor, ancestors: Tensor,
    total=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`Transformer.forward` where `fits` says so, of an enrolled model. Where ranks share it,
    `total` sums what each of them has of a product, unless they share memory for it."""

    def add(odd: int, y: Tensor, module: nn.Linear, x: Tensor, norm: Tensor):
        y = linear(y, module.weight, None, x.dtype)
        x = x + total(y if module.bias is None else y + module.bias)
        return x, x * norm, x.float().square().sum(-1)[None]

    args, (B, N) = model.args, tokens.shape
    if total is None:
        rows = model.embed.weight, tokens.flatten()
    else:
        rows = model.embed(tokens).flatten(0, 1), None  # [M D]
    norm = model.layers[0].attention_norm.weight
    *state, cos, sin, cached = enter(*rows, norm, positions.flatten(), model.inv_freq, cached)
    x, angles = state[0], (cos, sin)
    state += kv, cached, ancestors
    if total is None or can_share(x):
        of_ranks = total is not None
        tile = SUM_BLOCK if of_ranks else tiling(args.dim, args.ffn_dim, len(x), x.itemsize)["TILE"]
        how = model.number, of_ranks, -(-args.dim // tile)
        weighted, squares, every_qkv = layers(*how, *state, *angles)
    else:
        weighted, squares, every_qkv = each_layer(model, *state, angles, add)
    scale = torch.rsqrt(squares.sum(0) / args.dim + args.norm_eps)[:, None]
    hidden = (weighted * scale).to(x.dtype).view(B, N, -1)
    new_kv = every_qkv.view(len(kv), B, N, -1, args.head_dim)[:, :, :, args.n_heads :]
    return hidden, new_kv.unflatten(3, (2, -1)).permute(0, 3, 1, 4, 2, 5)  # [L 2 B K N E]


def few_rows(x: Tensor, w: Tensor, dtype: torch.dtype, row_scale: Tensor | None = None) -> Tensor:
    """x [..., C] @ w [R, C]^T in `dtype`, by whichever way is faster for so many rows."""
    rows = x.flatten(0, -2)
    if len(rows) <= MOST_ROWS:
        y = linear(rows, w, row_scale, dtype)
    else:
        y = F.linear(rows, w.to(x.dtype)).to(dtype)
        y = y if row_scale is None else y * row_scale
    return y.unflatten(0, x.shape[:-1])


class SmallLinear(nn.Module):
    """An nn.Linear without bias for few rows, whose results are in `dtype` without a rounding in
    between; eight_bit: its weight in int8, with a scale for each row."""

    def __init__(self, source: nn.Linear, dtype: torch.dtype, eight_bit: bool):
        super().__init__()
        self.weight, self.row_scale, self.dtype = source.weight, None, dtype
        if eight_bit:
            top = source.weight.abs().amax(1, keepdim=True).float().clamp(min=1e-20)
            weight = (source.weight.float() * (127 / top)).round_().to(torch.int8)
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.row_scale = nn.Parameter(top[:, 0] / 127, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return few_rows(x, self.weight, self.dtype, self.row_scale)


def replace_linears(speculator: nn.Module, eight_bit: bool) -> None:
    """Let a speculator's products run as small ones, their weights in 8 bits or as they are."""
    for name, module in list(speculator.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            head = parent.split(".")[-1] == "head"
            dtype = torch.float32 if head else module.weight.dtype
            new = SmallLinear(module, dtype, eight_bit)
            setattr(speculator.get_submodule(parent), last, new)
    if isinstance(speculator, MLPSpeculator):
        join_weights(speculator)


@torch.no_grad()
def join_weights(speculator: MLPSpeculator) -> None:
    """Let each head and the projection after it, which take the same state, lie in one matrix, if
    this was not done before: the graphs of an engine know where they are."""
    for head, proj in zip(speculator.head, speculator.proj[1:], strict=False):
        if joined(head.weight, proj.weight) is None:
            for name in ("weight", "row_scale") if head.row_scale is not None else ("weight",):
                parts = getattr(head, name), getattr(proj, name)
                both = torch.cat(parts).split([len(part) for part in parts])
                for module, part in zip((head, proj), both, strict=True):
                    setattr(module, name, nn.Parameter(part, requires_grad=False))
            torch.cuda.empty_cache()  # nothing else is of the size of what is free now


def joined(head: Tensor, proj: Tensor) -> Tensor | None:
    """[V + W, W] of weights [V, W] and [W, W] that `join_weights` has joined, or [V + W] of their
    scales, without a copy. The compiler passes parameters as they are, and would copy at each step
    what is not one of them."""
    start, one = head.storage_offset(), head.untyped_storage().data_ptr()
    if one != proj.untyped_storage().data_ptr() or proj.storage_offset() != start + head.numel():
        return None
    return head.as_strided((len(head) + len(proj), *head.shape[1:]), head.stride(), start)


# --- choosing tokens ---------------------------------------------------------------------------
# fastspec.py's `kept_tokens`, `noise` and argmax. Where tokens are filtered, the programs of a row
# run at the same time and wait for each other: the choice among all tokens is taken if the filters
# keep it, as they mostly do. If not, they keep none of its probability or less, and the choice
# among the more probable ones is next. Top-k needs a rank, and its threshold only where it decides
# on top-p, which is a share of the mass that top-k keeps.

BLOCK = 4096  # tokens of a program
PIECE = 512  # of a longer part, so many at once


@functools.cache
def at_once(device: torch.device) -> int:
    """Programs of 128 threads that are sure to run at the same time; the interpreter's do not."""
    on_gpu = device.type == "cuda"
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _noise(seed, position, token):
    """Gumbel noise of tokens: `noise` and `gumbel` of fastspec.py."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    position = position.to(tl.uint32)
    a = _mix(_mix(low + position * 2654435769) ^ high)
    b = _mix(_mix(high - position * 1013904223) + a)
    h = _mix(_mix(token.to(tl.uint32) + a) ^ b)
    v = tl.minimum((h.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # -log1p(-v), by its series where 1 - v would round.
    w = tl.where(v < 0.03, v * (1 + v * (0.5 + v * (0.33333334 + v * 0.25))), -tl.log(1 - v))
    return -tl.log(w)


@triton.jit
def _noisy(x, temperature, seed, position, ids, v, V):
    """Logits x of the columns v, which stand for the tokens `ids` or for themselves, with noise."""
    token = v
    if ids is not None:
        token = tl.load(ids + v, mask=v < V, other=0)
    return x + temperature * _noise(seed, position, token)


@triton.jit
def _highest(values, columns, b):
    """The column, a number in a float's bits, of the highest value; of equal ones the first b's, as
    torch's argmax."""
    return tl.sum(tl.where(b == tl.argmax(values, axis=0), columns.to(tl.int32, bitcast=True), 0))


@triton.jit
def _meet(arrived, goal):
    """Return when so many programs have come here: what they stored before can be read."""
    tl.debug_barrier()
    came = tl.atomic_add(arrived, 1, sem="acq_rel") + 1
    while came < goal:
        came = tl.atomic_add(arrived, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _leave(arrived, goal):
    """After the last meeting: the last of so many programs leaves 0 to the next kernel."""
    if tl.atomic_add(arrived, 1, sem="acq_rel") == goal - 1:
        tl.store(arrived, 0)


@triton.jit
def _mass_of_top_k(
    x_at, begin, end, scale, top, wanted, sums, block, blocks, arrived, meetings,
    PIECE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Sum of p = exp((x - top) * scale) over the `wanted` highest of a row and their equals. Six
    passes find the 30 bits of the least such p: each counts how many reach 32 thresholds. sums: the
    row's part [2, blocks, 32]."""
    at, j, b = tl.arange(0, PIECE), tl.arange(0, 32), tl.arange(0, BLOCKS)
    known, bits = b < blocks, tl.zeros([], dtype=tl.int32)
    for i in range(6):
        threshold = (bits | (j << (25 - 5 * i))).to(tl.float32, bitcast=True)
        count = tl.zeros([32], dtype=tl.float32)
        for start in range(begin, end, PIECE):
            inside = start + at < end
            x = tl.load(x_at + start + at, mask=inside, other=float("-inf"))
            p = tl.exp((x - top) * scale)
            reached = inside[:, None] & (p[:, None] >= threshold[None, :])
            count += tl.sum(reached.to(tl.float32), axis=0)
        here = sums + (i % 2) * blocks * 32  # some may still read what they met for before
        tl.store(here + block * 32 + j, count)
        meetings += blocks
        _meet(arrived, meetings)
        counts_at = here + b[:, None] * 32 + j[None, :]
        counts = tl.load(counts_at, mask=known[:, None], other=0.0, cache_modifier=".cg")
        found = tl.sum(counts, axis=0) >= wanted
        bits |= tl.max(tl.where(found, j, 0), axis=0) << (25 - 5 * i)
    least, mass = bits.to(tl.float32, bitcast=True), tl.zeros([PIECE], dtype=tl.float32)
    for start in range(begin, end, PIECE):
        x = tl.load(x_at + start + at, mask=start + at < end, other=float("-inf"))
        p = tl.exp((x - top) * scale)
        mass += tl.where(p >= least, p, 0.0)
    tl.store(sums + block * 32, tl.sum(mass, axis=0))
    _meet(arrived, meetings + blocks)
    masses = tl.load(sums + b * 32, mask=known, other=0.0, cache_modifier=".cg")
    return tl.sum(masses, axis=0)


@triton.jit
def _filtered(
    logits, ids, temperature, seed, position, top_k, top_p, min_p, part, sums, out, count, V, n,
    size, blocks, PIECE: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """argmax of logits + T * noise over the tokens that top-k, top-p and min-p keep."""
    row, block, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at, b = tl.arange(0, PIECE), tl.arange(0, BLOCKS)
    begin, end = block * size, tl.minimum(block * size + size, V)
    x_at, known = logits + row.to(tl.int64) * V, b < blocks
    T, of, absolute = (
        tl.load(temperature + row // n), tl.load(seed + row // n), tl.load(position + row)
    )  # fmt: skip
    share, reached = tl.load(top_p + row // n), tl.load(min_p + row // n)
    if top_k is not None:
        wanted = tl.load(top_k + row // n)
    scale = 1 / tl.maximum(T, 1e-6)
    here, field = part + row * blocks + block, rows * blocks
    row_at = part + row * blocks + b
    low, going, meetings = tl.full([], float("-inf"), dtype=tl.float32), True, 0
    mass = tl.full([], -1.0, dtype=tl.float32)  # of the top_k tokens, once it was asked for
    while going:
        best = tl.full([PIECE], float("-inf"), dtype=tl.float32)
        most, column = best, begin + at
        for start in range(begin, end, PIECE):
            v = start + at
            x = tl.load(x_at + v, mask=v < end, other=float("-inf"))
            score = tl.where(x > low, _noisy(x, T, of, absolute, ids, v, end), float("-inf"))
            column = tl.where(score > best, v, column)
            best, most = tl.maximum(best, score), tl.maximum(most, x)
        value = tl.max(best, axis=0)
        first = tl.min(tl.where(best == value, column, V), axis=0)
        tl.store(here, value)
        tl.store(here + field, first.to(tl.float32, bitcast=True))
        tl.store(here + 2 * field, tl.max(most, axis=0))
        meetings += blocks
        _meet(count + row, meetings)
        values = tl.load(row_at, mask=known, other=float("-inf"), cache_modifier=".cg")
        columns = tl.load(row_at + field, mask=known, other=0.0, cache_modifier=".cg")
        tops = tl.load(row_at + 2 * field, mask=known, other=float("-inf"), cache_modifier=".cg")
        chosen = tl.minimum(_highest(values, columns, b), V - 1)
        top, its = tl.max(tops, axis=0), tl.load(x_at + chosen)
        its_p = tl.exp((its - top) * scale)
        above = tl.zeros([PIECE], dtype=tl.float32)
        total, rank = above, above
        for start in range(begin, end, PIECE):
            v = start + at
            x = tl.load(x_at + v, mask=v < end, other=float("-inf"))
            p = tl.exp((x - top) * scale)
            above += tl.where(p > its_p, p, 0.0)
            if top_k is not None:
                rank += tl.where(p > its_p, 1.0, 0.0)
            total += p
        tl.store(here + 3 * field, tl.sum(above, axis=0))
        tl.store(here + 4 * field, tl.sum(total, axis=0))
        if top_k is not None:
            tl.store(here + 5 * field, tl.sum(rank, axis=0))
        meetings += blocks
        _meet(count + row, meetings)
        above = tl.load(row_at + 3 * field, mask=known, other=0.0, cache_modifier=".cg")
        total = tl.load(row_at + 4 * field, mask=known, other=0.0, cache_modifier=".cg")
        above, total = tl.sum(above, axis=0), tl.sum(total, axis=0)
        kept = (its_p >= reached) & ((share >= 1) | (above < share * total))
        if top_k is not None:
            ranks = tl.load(row_at + 5 * field, mask=known, other=0.0, cache_modifier=".cg")
            kept &= (wanted <= 0) | (tl.sum(ranks, axis=0) < wanted)
            # The mass that top-k keeps is at most that of all tokens, and at least that of those up
            # to this one: only where these disagree has it to be known.
            unsure = kept & (wanted > 0) & (share < 1) & (above >= share * (above + its_p))
            if unsure & (mass < 0):
                mass = _mass_of_top_k(
                    x_at, begin, end, scale, top, wanted, sums + row * blocks * 64, block, blocks,
                    count + row, meetings, PIECE // 4, BLOCKS,
                )  # fmt: skip
                meetings += 7 * blocks
            kept &= (unsure == 0) | (above < share * mass)
        if block == 0:
            tl.store(out + row, chosen.to(tl.int64))
        going = (kept == 0) & (its > low)  # always, if logits are numbers
        low = its
    _leave(count + row, meetings + blocks)


@triton.jit
def _choose(
    logits, ids, temperature, seed, position, best, out, count, V, n, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """argmax of logits + T * noise; the last block of a row compares all."""
    row, block = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    v, b = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCKS)
    score = tl.load(logits + row.to(tl.int64) * V + v, mask=v < V, other=float("-inf"))
    if temperature is not None:
        T, of, absolute = (
            tl.load(temperature + row // n), tl.load(seed + row // n), tl.load(position + row)
        )  # fmt: skip
        score = _noisy(score, T, of, absolute, ids, v, V)
    value, where = tl.max(score, axis=0, return_indices=True)
    here = best + (row * blocks + block) * 2
    tl.store(here, value)
    tl.store(here + 1, (block * BLOCK + where).to(tl.float32, bitcast=True))
    tl.debug_barrier()
    if tl.atomic_add(count + row, 1, sem="acq_rel") == blocks - 1:
        at = best + (row * blocks + b) * 2
        values = tl.load(at, mask=b < blocks, other=float("-inf"), cache_modifier=".cg")
        columns = tl.load(at + 1, mask=b < blocks, other=0.0, cache_modifier=".cg")
        tl.store(out + row, _highest(values, columns, b).to(tl.int64))
        tl.store(count + row, 0)


@torch.library.custom_op("fastspec::choose", mutates_args=())
def choose(
    logits: Tensor, ids: Tensor | None, position: Tensor | None, temperature: Tensor | None,
    seed: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None,
) -> Tensor:  # fmt: skip
    """Column [B, n] chosen from float32 logits [B, n, V] of the tokens `ids` [V] (None: all).

    With temperature and seed [B] noise of the absolute positions [B, n] is added; with top_p and
    min_p [B], and top_k [B] or without, the tokens are filtered first.
    """
    B, n, V = logits.shape
    rows, floats = B * n, {"dtype": torch.float32, "device": logits.device}
    assert rows <= MOST_TILES
    out, count = torch.empty(B, n, dtype=torch.int64, device=logits.device), counters(logits.device)
    noisy = ids, temperature, seed, position
    if top_p is None:
        blocks = triton.cdiv(V, BLOCK)
        best = torch.empty(rows, blocks, 2, **floats)
        width = triton.next_power_of_2(blocks)
        _choose[(rows, blocks)](
            logits, *noisy, best, out, count, V, n, blocks, BLOCK=BLOCK, BLOCKS=width, **pdl(logits)
        )
        return out
    size = triton.cdiv(V, max(at_once(logits.device) // rows, 1))
    size = triton.cdiv(size, PIECE) * PIECE
    blocks = triton.cdiv(V, size)
    sums = None
    if top_k is not None:
        sums = torch.empty(rows, 2, blocks, 32, **floats)
    given = top_k, top_p, min_p, torch.empty(6, rows, blocks, **floats), sums, out, count
    options = {"PIECE": PIECE, "BLOCKS": triton.next_power_of_2(blocks), **pdl(logits)}
    _filtered[(rows, blocks)](logits, *noisy, *given, V, n, size, blocks, **options)
    return out


@choose.register_fake
def _(logits, *_):
    return logits.new_empty(logits.shape[:2], dtype=torch.int64)


@triton.jit
def _activate(x, scale, shift, W):
    """gelu(rms(x) * scale + shift) of the first W numbers of x; the others are 0."""
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / W + 1e-6) * scale + shift
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["n", "stride", "old_stride", "first", "ahead"])
def _top(
    logits, ids, temperature, seed, position, above, part, columns, scores, parents,
    y, emb, weight, bias, state, count,
    V, width, y_width, blocks, least, token_scale, n, stride, old_stride, first, ahead,
    k: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr, W: tl.constexpr, STATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The k highest of a row of logits plus noise, by blocks; the last block to finish compares
    all. Rows of logits are `width` apart. Row c of n in b writes k children to columns (as tokens
    of `ids`, if TOKENS), to scores (their log-softmax, added to what `above` has of c) and to
    parents (first + c), rows of `stride`. With y [rows, W], y_width apart, it goes on to the only
    child's state, see `_state`."""
    row, block = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    v, j, t = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH), tl.arange(0, BLOCKS)
    b, c = row // n, row % n
    x = tl.load(logits + row.to(tl.int64) * width + v, mask=v < V, other=float("-inf"))
    if temperature is not None:
        absolute = tl.load(position + b) + ahead
        x = _noisy(x, tl.load(temperature + b), tl.load(seed + b), absolute, ids, v, V)
    size: tl.constexpr = 2 * WIDTH + 2  # values, columns, maximum, sum of exponentials
    here = part + (row * blocks + block) * size
    if scores is not None:
        most = tl.max(x, axis=0)
        tl.store(here + 2 * WIDTH, most)
        tl.store(here + 2 * WIDTH + 1, tl.sum(tl.exp(x - most), axis=0))
    for i in tl.static_range(WIDTH):
        value = tl.max(x, axis=0)
        where = tl.min(tl.where(x == value, v, V), axis=0)
        tl.store(here + i, value if i < k else float("-inf"))
        tl.store(here + WIDTH + i, where.to(tl.float32, bitcast=True))
        x = tl.where(v == where, float("-inf"), x)
    tl.debug_barrier()
    if tl.atomic_add(count + row, 1, sem="acq_rel") == blocks - 1:
        if y is not None:  # asked for before the winner is known
            w = tl.arange(0, STATE)
            inside = w < W
            old = tl.load(y + row.to(tl.int64) * y_width + w, mask=inside, other=0.0)
            scale = tl.load(weight + w, mask=inside, other=0.0).to(tl.float32)
            shift = tl.load(bias + w, mask=inside, other=0.0).to(tl.float32)
        at = part + (row * blocks + t) * size
        known = t < blocks
        if scores is not None:
            tops = tl.load(at + 2 * WIDTH, mask=known, other=float("-inf"), cache_modifier=".cg")
            sums = tl.load(at + 2 * WIDTH + 1, mask=known, other=0.0, cache_modifier=".cg")
            top = tl.max(tops, axis=0)
            total = top + tl.log(tl.sum(sums * tl.exp(tops - top), axis=0))
            start = 0.0
            if above is not None:
                start = tl.load(above + b * old_stride + c)
        at = at[:, None] + j[None, :]
        values = tl.load(at, mask=known[:, None], other=float("-inf"), cache_modifier=".cg")
        places = tl.load(at + WIDTH, mask=known[:, None], other=0.0, cache_modifier=".cg")
        places = places.to(tl.int32, bitcast=True)
        child = b * stride + c * k
        for i in tl.static_range(k):
            highest = tl.max(tl.max(values, axis=1), axis=0)
            place = tl.min(tl.min(tl.where(values == highest, places, V), axis=1), axis=0)
            column = tl.minimum(place, V - 1).to(tl.int64)
            if y is not None:  # k is 1
                z = tl.load(emb + column * W + w, mask=inside, other=0.0).to(tl.float32)
                z = _activate(old + token_scale * z, scale, shift, W)
                z = z.to(state.dtype.element_ty)
                tl.store(state + row.to(tl.int64) * W + w, z, mask=inside)
            if TOKENS and ids is not None:
                column = tl.load(ids + column)
            tl.store(columns + child + i, column)
            if scores is not None:
                gain = highest - total
                gain = tl.minimum(tl.where(gain > least, gain, least), 0.0)
                tl.store(scores + child + i, start + gain)
            if parents is not None:
                tl.store(parents + child + i, (first + c).to(tl.int64))
            values = tl.where(places == place, float("-inf"), values)
        tl.store(count + row, 0)


def top(
    logits: Tensor, k: int, least: float, columns, scores=None, parents=None, *, n: int,
    stride: int, above=None, old_stride=0, first=0, ids=None, position=None, temperature=None,
    seed=None, ahead=0, tokens=False, y=None, emb=None, weight=None, bias=None, token_scale=0.0,
    dtype=None,
) -> Tensor | None:  # fmt: skip
    """Launch `_top` on float32 logits [M, V], M = B * n, and return states [M, W] in `dtype` if
    there is y [M, W]."""
    M, V = logits.shape
    block = BLOCK if M * V > 128 * BLOCK else BLOCK // 4  # else much of the GPU would be idle
    blocks, width = triton.cdiv(V, block), triton.next_power_of_2(k)
    part = logits.new_empty(M, blocks, 2 * width + 2)
    W, y_width, state = 1, 1, None
    if y is not None:
        W, y_width, state = y.shape[1], y.stride(0), y.new_empty(y.shape, dtype=dtype)
    _top[(M, blocks)](
        logits, ids, temperature, seed, position, above, part, columns, scores, parents,
        y, emb, weight, bias, state, counters(logits.device),
        V, logits.stride(0), y_width, blocks, least, token_scale, n, stride, old_stride, first,
        ahead, k=k, WIDTH=width, BLOCK=block, BLOCKS=triton.next_power_of_2(blocks), TOKENS=tokens,
        W=W, STATE=triton.next_power_of_2(W), num_warps=4 if y is None else 8, **pdl(logits),
    )  # fmt: skip
    return state


@torch.library.custom_op("fastspec::top_children", mutates_args=())
def top_children(scores: Tensor, k: int, least: float) -> tuple[Tensor, Tensor]:
    """speculator.py's `top_children` of scores float32 [B, C, V]: columns and log-softmax
    [B, C, k]."""
    B, C, _ = scores.shape
    columns = torch.empty(B, C, k, dtype=torch.int64, device=scores.device)
    gains = scores.new_empty(B, C, k)
    top(scores.contiguous().flatten(0, 1), k, least, columns, gains, n=C, stride=C * k)
    return columns, gains


@top_children.register_fake
def _(scores, k, least):
    columns = scores.new_empty(*scores.shape[:2], k, dtype=torch.int64)
    return columns, scores.new_empty(*scores.shape[:2], k)


# --- the draft ---------------------------------------------------------------------------------
# `draft_tree` of speculator.py. A head and the projection after it are one product of the states
# they share; `_top` finds the children of each, `_state` takes the projection of a child's parent
# on to the child's own state. A single child's state `_top` makes itself, so that a chain takes two
# kernels a head. Where a depth has too many nodes, `_state` chooses among them, and at the end of a
# tree `_best`. A drafted column is its token's row of emb.

MOST_CHOICES = 256  # nodes that every program of `_state` compares; more are left to `_best`


@triton.jit
def _before(other, j, score, i):
    """How many of the nodes j go before each node i: higher scores first, then lower numbers."""
    other, j, score, i = other[None, :], j[None, :], score[:, None], i[:, None]
    return tl.sum(((other > score) | ((other == score) & (j < i))).to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["n", "stride", "old_n", "first", "D", "out_stride"])
def _state(
    y, hidden, token, emb_row, parent, scores, emb, weight, bias, out, out_scores, out_columns,
    out_parents, y_width, token_scale, n, stride, old_n, first, D, out_stride,
    W: tl.constexpr, WIDTH: tl.constexpr, IN_WIDTH: tl.constexpr, NODES: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B * n, W] = gelu(rms(x) * weight + bias), x = y of the parent + token_scale * emb of
    the token. y is float32 [B * old_n, W], rows y_width apart, tokens and parents lie in rows of
    `stride`, and parents (None: y of the same row) are counted from `first`. Not None: emb_row
    takes a token to its row of emb; y is of a hidden [B, D] that has yet to be normed; the n nodes
    are those of the highest `scores` of a row, in order. A node goes to out_columns and the like,
    if these are not None."""
    m = tl.program_id(0)
    b, c, w = m // n, m % n, tl.arange(0, WIDTH)
    inside = w < W
    if PDL:
        gdc_launch_dependents()
    scale = tl.load(weight + w, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + w, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    old, above, score = m, 0, 0.0
    if scores is None:
        column = tl.load(token + b * stride + c).to(tl.int64)
        if parent is not None:
            above = tl.load(parent + b * stride + c)
    else:
        i = tl.arange(0, NODES)
        at, known = b * stride + i, i < stride
        every_score = tl.load(scores + at, mask=known, other=float("-inf"))
        every_column = tl.load(token + at, mask=known, other=0)
        every_parent = tl.load(parent + at, mask=known, other=0)
        place = tl.zeros([NODES], dtype=tl.int32)
        for start in tl.static_range(0, NODES, BLOCK):
            j = start + tl.arange(0, BLOCK)
            other = tl.load(scores + b * stride + j, mask=j < stride, other=float("-inf"))
            place += _before(other, j, every_score, i)
        chosen = place == c
        score = tl.sum(tl.where(chosen, every_score, 0.0), axis=0)
        column = tl.sum(tl.where(chosen, every_column, 0), axis=0)
        above = tl.sum(tl.where(chosen, every_parent, 0), axis=0)
    row = column
    if emb_row is not None:
        row = tl.load(emb_row + row)
    if parent is not None:
        old = b * old_n + (above - first).to(tl.int32)
    z = tl.load(emb + row * W + w, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(y + old.to(tl.int64) * y_width + w, mask=inside, other=0.0)
    if hidden is not None:
        d = tl.arange(0, IN_WIDTH)
        h = tl.load(hidden + m * D + d, mask=d < D, other=0.0).to(tl.float32)
        x *= tl.rsqrt(tl.sum(h * h, axis=0) / D + 1e-6) * 0.7071067811865476
    x = _activate(x + token_scale * z, scale, shift, W)
    tl.store(out + m.to(tl.int64) * W + w, x.to(out.dtype.element_ty), mask=inside)
    to = b * out_stride + c
    if out_scores is not None:
        tl.store(out_scores + to, score)
    if out_columns is not None:
        tl.store(out_columns + to, column)
        tl.store(out_parents + to, above)


def next_state(
    y: Tensor, token: Tensor, emb: Tensor, weight: Tensor, bias: Tensor, token_scale: float,
    dtype: torch.dtype, *, M: int, n=1, hidden=None, emb_row=None, parent=None, scores=None,
    stride=1, old_n=1, first=0, out: Sequence[Tensor | None] = (None, None, None),
) -> Tensor:  # fmt: skip
    """out [M, W] of `_state`, M = B * n. `out`: scores, columns and parents, rows that are as long
    as each other."""
    W, D = y.shape[1], hidden.shape[1] if hidden is not None else 1
    nodes = triton.next_power_of_2(stride) if scores is not None else 1
    states = y.new_empty(M, W, dtype=dtype)
    _state[(M,)](
        y, hidden, token, emb_row, parent, scores, emb, weight, bias, states, *out, y.stride(0),
        token_scale, n, stride, old_n, first, D, out[1].stride(0) if out[1] is not None else 0,
        W=W, WIDTH=triton.next_power_of_2(W), IN_WIDTH=triton.next_power_of_2(D), NODES=nodes,
        BLOCK=min(nodes, 32), num_warps=8, **pdl(y),
    )  # fmt: skip
    return states


@triton.jit(do_not_specialize=["n", "keep", "out_stride"])
def _best(
    scores, columns, parents, ids, out_scores, out_columns, out_parents, n, keep, out_stride,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The `keep` nodes of the highest of scores [B, n], in order. With out_scores as they are;
    without, they are the whole tree: columns, but for the root's, become tokens through `ids`, and
    parents the places that these got."""
    b, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    whole: tl.constexpr = out_scores is None
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    known = i < n
    column = tl.load(columns + b * n + i, mask=known, other=0)
    parent = tl.load(parents + b * n + i, mask=known, other=0).to(tl.int32)
    score = tl.load(scores + b * n + i, mask=known, other=0.0)
    place = tl.zeros([BLOCK], dtype=tl.int32)
    if whole:
        parent_score = tl.load(scores + b * n + parent)
        parent_place = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        other = tl.load(scores + b * n + j, mask=j < n, other=float("-inf"))
        place += _before(other, j, score, i)
        if whole:
            parent_place += _before(other, j, parent_score, parent)
    to, kept = b * out_stride + place, known & (place < keep)
    if whole:
        if ids is not None:
            column = tl.load(ids + column, mask=known & (i > 0), other=column)
        parent = parent_place
    else:
        tl.store(out_scores + to, score, mask=kept)
    tl.store(out_columns + to, column, mask=kept)
    tl.store(out_parents + to, parent.to(tl.int64), mask=kept)


def best(
    scores: Tensor, columns: Tensor, parents: Tensor, keep: int,
    out: Sequence[Tensor | None], ids=None,
) -> None:  # fmt: skip
    """Launch `_best` on nodes [B, n]; out are views of rows that are as long as each other."""
    B, n = columns.shape
    _best[(B, triton.cdiv(n, 32))](
        scores, columns, parents, ids, *out, n, keep, out[1].stride(0), BLOCK=32, **pdl(columns),
    )  # fmt: skip


Scaled = tuple[Tensor, Tensor | None]  # a weight [R, C], and the scales [R] of one in 8 bits


def products(state: Tensor, head: Scaled, proj: Scaled | None) -> tuple[Tensor, Tensor | None]:
    """float32 logits [M, V] of states [M, W], and y [M, W] of the projection after this head, if
    there is one: one product where their weights are joined."""
    floats = torch.float32
    if proj is None or (both := joined(head[0], proj[0])) is None:
        y = None if proj is None else few_rows(state, proj[0], floats, proj[1])
        return few_rows(state, head[0], floats, head[1]), y
    scales = None if head[1] is None else joined(head[1], proj[1])
    logits, y = few_rows(state, both, floats, scales).split((len(head[0]), len(proj[0])), dim=1)
    return logits, y


@torch.library.custom_op("fastspec::draft", mutates_args=())
def draft(
    hidden: Tensor, token: Tensor, position: Tensor, temperature: Tensor | None,
    seed: Tensor | None, proj: Sequence[Tensor], emb: Sequence[Tensor], norm: Sequence[Tensor],
    bias: Sequence[Tensor], head: Sequence[Tensor], proj_scale: Sequence[Tensor],
    head_scale: Sequence[Tensor], ids: Tensor | None, emb_row: Tensor | None, token_scale: float,
    scale_input: bool, top_k: Sequence[int], nodes: int, least: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tokens and parents [B, nodes] of speculator.py's `draft_tree` from hidden [B, D], token and
    position [B], with noise of temperature and seed [B] if given. Scales: of weights in 8 bits."""
    B, (children, counts) = len(token), tree_widths(top_k, nodes)
    n, chain, ints = sum(counts), max(top_k) == 1, {"dtype": torch.int64, "device": token.device}
    columns, parents = (torch.empty(B, n, **ints) for _ in range(2))
    scores = None if chain else hidden.new_empty(B, n, dtype=torch.float32)
    found = {"ids": ids, "position": position, "temperature": temperature, "seed": seed}
    found |= {"tokens": chain, "old_stride": n}

    def weights(i: int) -> dict:
        own = min(i, len(head) - 1)
        states = {"token_scale": token_scale, "dtype": hidden.dtype}
        return states | {"emb": emb[own], "weight": norm[own], "bias": bias[own]}

    def scaled(weight: Sequence[Tensor], scale: Sequence[Tensor], i: int) -> Scaled:
        own = min(i, len(weight) - 1)
        return weight[own], scale[own] if scale else None

    first_proj, first_scale = scaled(proj, proj_scale, 0)
    y = few_rows(hidden, first_proj, torch.float32, first_scale)  # [B, W]
    root = {"hidden": hidden if scale_input else None, "emb_row": emb_row}
    state = next_state(y, token, **weights(0), M=B, **root, out=(scores, columns, parents))
    # Of the nodes at a depth, which begin at `first`.
    above, first = None, 0
    for i, k in enumerate(children):
        C, after, more = counts[i], first + counts[i], i + 1 < len(children)
        then = scaled(proj, proj_scale, i + 1) if more else None
        logits, y = products(state, scaled(head, head_scale, i), then)  # [B * C, V], [B * C, W]
        kept = [None if x is None else x[:, after:] for x in (scores, columns, parents)]
        level, stride, cut = kept, n, C * k > counts[i + 1]
        if cut:
            stride = C * k
            level = [x.new_empty(B, stride) for x in kept]
        in_top = more and k == 1 and not cut
        state = top(
            logits, k, least, level[1], level[0], level[2], n=C, stride=stride, above=above,
            first=first, ahead=i + 1, **found, **(weights(i + 1) | {"y": y} if in_top else {}),
        )  # fmt: skip
        if cut and stride > MOST_CHOICES:
            best(*level, counts[i + 1], kept)
            level, stride, cut = kept, n, False
        if more and not in_top:
            choice = {"scores": level[0], "out": kept} if cut else {}
            state = next_state(
                y, level[1], **weights(i + 1), M=B * counts[i + 1], n=counts[i + 1],
                parent=level[2], stride=stride, old_n=C, first=first, **choice,
            )  # fmt: skip
        above, first = kept[0], after
    if chain:
        return columns, parents
    tokens, kept = (torch.empty(B, min(nodes, n), **ints) for _ in range(2))
    best(scores, columns, parents, min(nodes, n), (None, tokens, kept), ids)
    return tokens, kept


@draft.register_fake
def _(hidden, token, *args):
    *_, top_k, nodes, _ = args
    shape = len(token), min(nodes, sum(tree_widths(top_k, nodes)[1]))
    return token.new_empty(shape), token.new_empty(shape)


def draft_tree(
    speculator: nn.Module, hidden: Tensor, token: Tensor, position: Tensor, top_k: Sequence[int],
    nodes: int, least: float, temperature: Tensor | None = None, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`draft_tree` of a speculator whose linears are replaced."""
    weights = [[m.weight for m in ms] for ms in (speculator.proj, speculator.emb, speculator.ln)]
    biases, heads = [m.bias for m in speculator.ln], [m.weight for m in speculator.head]
    scales = [
        [m.row_scale for m in linears if m.row_scale is not None]
        for linears in (speculator.proj, speculator.head)
    ]
    return draft(
        hidden, token, position, temperature, seed, *weights, biases, heads, *scales,
        speculator.draft_ids, speculator.emb_row, speculator.token_scale,
        speculator.args.scale_input, top_k, nodes, least,
    )  # fmt: skip


@triton.jit
def _lineage(
    parents, ancestors, depths, N, DEEPEST: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr
):
    """`lineage` of one row."""
    b, n = tl.program_id(0), tl.arange(0, WIDTH)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    above, seen = n, n[:, None] == n[None, :]
    for _ in tl.static_range(DEEPEST):
        above = tl.load(parents + b * N + above, mask=n < N, other=0).to(tl.int32)
        seen |= above[:, None] == n[None, :]
    inside = (n < N)[:, None] & (n < N)[None, :]
    tl.store(ancestors + (b * N + n[:, None]) * N + n[None, :], seen, mask=inside)
    depth = tl.sum(seen.to(tl.int32), axis=1) - 1
    tl.store(depths + b * N + n, depth.to(tl.int64), mask=n < N)


@torch.library.custom_op("fastspec::lineage", mutates_args=())
def lineage(parent: Tensor, deepest: int) -> tuple[Tensor, Tensor]:
    """fastspec.py's: ancestors bool [B, N, N] and depths [B, N] of a tree's nodes."""
    B, N = parent.shape
    ancestors = parent.new_empty(B, N, N, dtype=torch.bool)
    depth = torch.empty_like(parent)
    _lineage[(B,)](
        parent, ancestors, depth, N, DEEPEST=deepest, WIDTH=triton.next_power_of_2(N),
        **pdl(parent),
    )  # fmt: skip
    return ancestors, depth


@lineage.register_fake
def _(parent, deepest):
    ancestors = parent.new_empty(*parent.shape, parent.shape[1], dtype=torch.bool)
    return ancestors, torch.empty_like(parent)


@triton.jit
def _accepted_path(
    candidates, sampled, parents, ancestors, depth, depths, path, N, P,
    WIDTH: tl.constexpr, DEPTHS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`accepted_path` of one row."""
    b, n, p = tl.program_id(0), tl.arange(0, WIDTH), tl.arange(0, DEPTHS)
    known = n < N
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    parent = tl.load(parents + b * N + n, mask=known, other=0)
    token = tl.load(candidates + b * N + n, mask=known, other=0)
    chosen = tl.load(sampled + b * N + parent, mask=known, other=0)
    inside = known[:, None] & known[None, :]
    above = tl.load(ancestors + (b * N + n[:, None]) * N + n[None, :], mask=inside, other=0) != 0
    wrong = (token != chosen) & (n > 0)
    right = tl.max((above & wrong[None, :]).to(tl.int32), axis=1) == 0
    at = tl.load(depth + b * N + n, mask=known, other=-1)
    wanted = tl.load(depths + p, mask=p < P, other=-2)
    here = right[None, :] & (at[None, :] == wanted[:, None])
    node = tl.min(tl.where(here, n[None, :], WIDTH), axis=1)
    tl.store(path + b * P + p, tl.where(node < WIDTH, node, 0).to(tl.int64), mask=p < P)


@torch.library.custom_op("fastspec::accepted_path", mutates_args=())
def accepted_path(
    candidates: Tensor, sampled: Tensor, parent: Tensor, ancestors: Tensor, depth: Tensor,
    depths: Tensor,
) -> Tensor:  # fmt: skip
    """fastspec.py's: the accepted node at each of `depths` [P], or 0; [B, P]."""
    (B, N), P = parent.shape, len(depths)
    path = parent.new_empty(B, P)
    _accepted_path[(B,)](
        candidates, sampled, parent, ancestors, depth, depths, path, N, P,
        WIDTH=triton.next_power_of_2(N), DEPTHS=triton.next_power_of_2(P), **pdl(parent),
    )  # fmt: skip
    return path


@accepted_path.register_fake
def _(candidates, sampled, parent, ancestors, depth, depths):
    return parent.new_empty(len(parent), len(depths))
