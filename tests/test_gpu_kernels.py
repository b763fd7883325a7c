"""The Triton kernels against their plain equivalents: on a GPU, else in Triton's interpreter."""

import gc
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fastspec import Engine, kept_tokens, noise, probabilities
from fastspec import accepted_path as plain_accepted_path
from fastspec import lineage as plain_lineage
from model import ModelArgs, Transformer, kv_cache_shape, plain_attention
from speculator import LEAST, MLPSpeculator, SpeculatorArgs
from speculator import top_children as plain_top_children

pytest.importorskip("triton", reason="there is no triton for this platform")
import gpu_kernels
from gpu_kernels import (
    BLOCK,
    MOST_ROWS,
    SPLIT,
    accepted_path,
    add_linear_ranks,
    best,
    cached_attention,
    choose,
    counters,
    draft_tree,
    enroll,
    fits,
    forward,
    joined,
    layers,
    lineage,
    next_state,
    pieces,
    replace_linears,
    share,
    small,
    tiling,
    top_children,
    within,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHORT = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # as the interpreter can


def attention_inputs(B, N, H, K, E, S, cached, dtype=torch.float32, seed=0, trees=1):
    """Random qkv and cache, a random tree of nodes (one of all rows, or of each: `trees` = B),
    and the mask that plain attention takes."""
    torch.manual_seed(seed)
    shapes = (B, N, H + 2 * K, E), (2, B, K, S, E)
    qkv, kv = (torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes)
    ancestors = (torch.rand(trees, N, N) < 0.5).tril(-1) | torch.eye(N, dtype=torch.bool)
    ancestors[..., 0] = True
    ancestors = ancestors[0] if trees == 1 else ancestors
    cached = torch.tensor(cached)
    in_cache = (torch.arange(S) < cached[:, None, None]).expand(-1, N, -1)
    mask = torch.cat((in_cache, ancestors.expand(B, -1, -1)), dim=-1)
    mask = mask.repeat(1, H // K, 1)[:, None]
    return tuple(x.to(DEVICE) for x in (qkv, kv, cached, ancestors, mask))


@pytest.mark.parametrize(
    ("B", "N", "H", "K", "E", "S", "cached"),
    [
        (1, 1, 9, 3, 64, 300, [200]),
        (2, 5, 8, 2, 80, 200, [199, 0]),  # a head_dim that is no power of two; an empty cache
        (3, 4, 4, 4, 16, 130, [SPLIT - 2, SPLIT - 1, SPLIT]),  # own tokens across a split's edge
        (1, 25, 8, 2, 32, 500, [311]),
        (2, 3, 6, 1, 32, 64, [64, 1]),  # one KV head; a full cache
        (1, 5, 48, 1, 128, 70, [66]),  # 240 query rows on one KV head, as in granite-20b-code
        (1, 3, 2, 1, 16, 1300, [1240]),  # more splits than programs
        (33, 1, 8, 8, 16, 70, range(33)),  # more heads than programs
        (1, 4, 8, 4, 8, 70, [60]),  # narrower than a matrix instruction is deep
    ],
)
def test_attention_equals_plain(B, N, H, K, E, S, cached):
    """float32, summed in another order: about 1e-6 relative."""
    inputs = attention_inputs(B, N, H, K, E, S, cached)
    torch.testing.assert_close(
        cached_attention(*inputs), plain_attention(*inputs), rtol=1e-4, atol=1e-5
    )


def test_each_row_has_its_own_tree():
    """float32, as above."""
    inputs = attention_inputs(2, 7, 2, 1, 16, 80, [0, SPLIT - 3], trees=2)
    torch.testing.assert_close(
        cached_attention(*inputs), plain_attention(*inputs), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("parts", [1, 2, 3, 16])
def test_any_number_of_programs_shares_the_splits(parts, monkeypatch):
    """Rows of one split and of many, three blocks of queries. float32, as above."""
    B, N, H, K, S = 3, 11, 8, 2, 1100
    monkeypatch.setattr(gpu_kernels, "PROGRAMS", parts * B * K * 3)
    inputs = attention_inputs(B, N, H, K, 16, S, [1, 130, S], trees=B)
    torch.testing.assert_close(
        cached_attention(*inputs), plain_attention(*inputs), rtol=1e-4, atol=1e-5
    )
    assert not counters(inputs[0].device).any()  # as the next kernel expects


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter runs programs in a given order")
def test_whichever_program_finishes_last_the_result_is_the_same(monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    inputs = attention_inputs(2, 3, 4, 2, 16, 500, [480, 100])
    expected, visit = cached_attention(*inputs), interpreter_builder.set_grid_idx
    for step in (1, 3):  # of the eight programs of a head; backwards, or all mixed
        monkeypatch.setattr(
            interpreter_builder, "set_grid_idx", lambda x, y, z, n=step: visit(x, -n * y % 8, z)
        )
        assert torch.equal(cached_attention(*inputs), expected)


def test_nothing_past_the_live_length_is_read():
    """NaN in dead slots would reach the result through any product with it."""
    qkv, kv, *visible = attention_inputs(2, 3, 4, 2, 32, 200, [70, 5])
    expected = cached_attention(qkv, kv, *visible)
    for row, live in enumerate([70, 5]):
        kv[:, row, :, live:] = torch.nan
    assert torch.equal(cached_attention(qkv, kv, *visible), expected)


@pytest.mark.parametrize("parts", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float32, SHORT])
def test_key_counts_the_same_in_the_cache_and_among_the_own_tokens(parts, dtype, monkeypatch):
    """Bit for bit, in steps of one width: tokens that one step ends with and a later one begins
    with, where either crosses into a split of the next program, or of the first one again."""
    N, H, K, E, S = 6, 8, 2, 64, 1400
    monkeypatch.setattr(gpu_kernels, "PROGRAMS", parts * K * 2)
    if DEVICE == "cpu":  # numpy's product of a row depends on the rows before it
        monkeypatch.setattr("numpy.matmul", partial(np.einsum, "ik,kj->ij"))
    chain = torch.ones(N, N, dtype=torch.bool, device=DEVICE).tril()
    for start in (SPLIT - 3, 16 * SPLIT - N):
        qkv, kv, cached, _, _ = attention_inputs(1, 2 * N, H, K, E, S, [start], dtype)
        together = cached_attention(qkv[:, :N], kv, cached, chain)
        for n in range(1, N):
            kv[:, 0, :, start + n - 1] = qkv[0, n - 1, H:].unflatten(0, (2, K))
            later = cached_attention(qkv[:, n : n + N], kv, cached + n, chain)
            assert torch.equal(later[:, : N - n], together[:, n:])


def random(*shape, scale=1.0):
    return torch.randn(shape, device=DEVICE) * scale


@pytest.mark.parametrize("splits", [0, 1, 2])
@pytest.mark.parametrize(
    ("M", "R", "C"),
    [
        *((1, 64, 128), (1, 100, 640), (5, 192, 256), (25, 128, 128), (3, 100, 192)),  # 100: masked
        *((1, 12, 2048), (1, 12, 4160), (1, 8, 11008), (1, 8, 8320)),  # cut in other ways
        (40, 100, 192),
    ],
)
def test_small_product_equals_plain(M, R, C, splits):
    """With everything that is fused into it, cut as usual (0) or into parts of C. float32 sums in
    another order."""
    torch.manual_seed(0)
    x, w, bias, residual, norm = (random(*s) for s in ((M, C), (R, C), (R,), (M, R), (R,)))
    squares = (x * x).view(M, 4, -1).sum(-1).T.contiguous()
    tile = splits and {"DEEP": 64, "SPLITS": splits, "num_stages": 2, "num_warps": 4}
    if splits and M > 1:  # some of the weights ahead of the rest; in tall tiles
        tile |= {"AHEAD": 64} | ({"TILE": 128} if splits == 1 else {})
    if splits and M <= 8 and M > 1:  # all of them, in parts that are summed apart, for few rows
        tile |= {"ROWS": 8, "TILE": 16, "AHEAD": C // splits, "PIECE": 256, "APART": True}
    normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)
    y = F.linear(normed, w, bias) + residual
    out, weighted, sums = small(
        x, w, bias=bias, squares=squares, eps=1e-5, residual=residual, norm=norm, tile=tile
    )
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out, y, **close)
    torch.testing.assert_close(weighted, y * norm, **close)
    torch.testing.assert_close(sums.sum(0), (y * y).sum(-1), **close)
    gate, up = F.linear(normed, w, bias).chunk(2, dim=-1)
    out, *_ = small(x, w, bias=bias, squares=squares, eps=1e-5, gated=True, tile=tile)
    # Sums of thousands, of which a gate below 0 leaves little: the error is theirs.
    torch.testing.assert_close(out, F.silu(gate) * up, rtol=1e-4, atol=2e-3)
    assert not counters(x.device).any()  # as the next kernel expects


def test_pieces_are_such_as_a_matrix_instruction_takes():
    assert pieces(0, 512) == ()
    assert pieces(100, 512) == (64, 32, 16)
    assert pieces(576, 128) == (128, 128, 128, 128, 64)


@pytest.mark.parametrize("C", [20, 64, 100, 576, 1024])
@pytest.mark.parametrize("M", [2, 8, 9, 16, 24, 40])
def test_small_product_in_16_bits_equals_plain(M, C):
    """The tiles of small matrices, whose rows and columns tiles divide or do not."""
    torch.manual_seed(0)
    for R in (100, 576, 1088):
        x, w, residual = (random(*s) for s in ((M, C), (R, C), (M, R)))
        half = [y.half() for y in (x, w / C**0.5, residual)]
        x, w, residual = (y.float() for y in half)
        squares = (x * x).view(M, 4, -1).sum(-1).T.contiguous()
        normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)
        given, close = {"squares": squares, "eps": 1e-5}, {"rtol": 2e-3, "atol": 2e-3}
        out, *_ = small(*half[:2], residual=half[2], **given)
        torch.testing.assert_close(out.float(), F.linear(normed, w) + residual, **close)
        gate, up = F.linear(normed, w).chunk(2, dim=-1)
        out, *_ = small(*half[:2], gated=True, **given)
        torch.testing.assert_close(out.float(), F.silu(gate) * up, **close)
    assert not counters(x.device).any()


@pytest.mark.parametrize(("R", "C"), [(576, 576), (576, 1536), (28672, 4096), (96, 640)])
@pytest.mark.parametrize("M", [1, 5, 16, 24, 64])
def test_tiles_fit_into_less_shared_memory(M, R, C, monkeypatch):
    """That of a consumer's GPU, 99 KiB; an H100's tiles are left as they are."""
    tile = tiling(R, C, M)
    assert within(tile, C, 2, 2, 227 * 1024) == tile
    tile, most = within(tile, C, 2, 2, 99 * 1024), 99 * 1024
    if M > 1:
        columns = max(tile.get("AHEAD", C // tile["SPLITS"]), tile["num_stages"] * tile["DEEP"])
        assert 2 * (tile["ROWS"] + tile["TILE"]) * columns <= most
    if C < 4096:
        monkeypatch.setattr(gpu_kernels, "shared_bytes", lambda device: most)
        x, w = random(M, C).half(), random(R, C, scale=C**-0.5).half()
        out, *_ = small(x, w, dtype=torch.float32)
        torch.testing.assert_close(out, F.linear(x.float(), w.float()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("C", [192, 512, 1024, 1536])
@pytest.mark.parametrize("M", [1, 2, 8, 9, 24, 40])
def test_small_product_in_8_bits_equals_plain(M, C):
    torch.manual_seed(0)
    for R in (100, 576):
        x, scale = random(M, C).half(), random(R).abs() + 0.1
        w = torch.randint(-127, 128, (R, C), device=DEVICE, dtype=torch.int8)
        out, *_ = small(x, w, row_scale=scale, dtype=torch.float32)
        torch.testing.assert_close(out, F.linear(x.float(), w * scale[:, None]), rtol=1e-3, atol=1)
    assert not counters(x.device).any()


def one_rank(y):
    return y


@pytest.mark.parametrize(
    ("B", "N", "bias", "total"),  # each number of rows has tiles of its own
    [
        *((1, 1, True, None), (1, 1, False, one_rank), (2, 3, False, None)),
        *((2, 3, True, one_rank), (2, 9, True, None), (2, 9, False, one_rank)),
    ],
)
def test_forward_equals_the_transformer(B, N, bias, total):
    """Rope inside the products, norms across them; trees of each row's own. float32."""
    torch.manual_seed(0)
    sizes = (128, 2, 4, 2) if N > 1 else (64, 1, 2, 1)  # one row has many small tiles
    args = ModelArgs(*sizes, 64, 64, 50, attention_bias=bias, mlp_bias=bias)
    model = Transformer(args).to(DEVICE)
    model.inv_freq = model.inv_freq.to(DEVICE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    tokens, cached = torch.randint(0, 50, (B, N)).to(DEVICE), torch.tensor([70, 5]).to(DEVICE)[:B]
    kv = random(*kv_cache_shape(args, B, 80))
    ancestors = torch.ones(N, N, dtype=torch.bool).tril().expand(B, -1, -1).clone()
    ancestors[1:, 2:, 1:2] = False
    inputs = tokens, cached[:, None] + torch.arange(N).to(DEVICE), kv, cached, ancestors.to(DEVICE)
    assert fits(args, B * N)
    enroll(model)
    torch._dynamo.reset()
    traced = torch.compile(forward, backend="aot_eager", fullgraph=True)  # as a step is compiled
    with torch.inference_mode():
        for ours, plain in zip(traced(model, *inputs, total), model(*inputs), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.fixture
def shared(monkeypatch):
    """Memory of some ranks in one process, as the last of them sees it."""
    monkeypatch.setattr(gpu_kernels, "shared_memory", {})

    def new(ranks, dtype=torch.float32):
        n = gpu_kernels.SHARED_BYTES // dtype.itemsize
        share([torch.zeros(n, dtype=dtype, device=DEVICE) for _ in range(ranks)], ranks - 1)
        return gpu_kernels.shared_memory[dtype]

    return new


def by_program(flags, ranks):
    """[programs, R] of a rank's flags."""
    return flags.view(-1, 1 << (ranks - 1).bit_length())[:, :ranks]


def others_come(flags, rank, programs):
    """Set what the others would in the last rank's flags: all but its own."""
    by_program(flags[rank], len(flags))[:programs, :rank] = 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("M", "D"), [(1, 192), (5, 64), (17, 192)])  # 192: two blocks
def test_sum_over_ranks_equals_plain(M, D, ranks, bias, shared, monkeypatch):
    """In the order of the ranks: bit for bit. Flags are taken, and one is put with each other."""
    torch.manual_seed(0)
    monkeypatch.setattr(gpu_kernels, "SUM_BLOCK", 128)
    x, w, residual, norm = (random(*s) for s in ((M, 64), (D, 64), (M, D), (D,)))
    bias = random(D) if bias else None
    for odd, (parts, flags, rank) in enumerate(shared(ranks)):
        for part in parts:
            part.copy_(random(*part.shape))
        programs = M * -(-D // gpu_kernels.SUM_BLOCK)
        others_come(flags, rank, programs)
        out, weighted, squares = add_linear_ranks(x, w, bias, residual, norm, odd)
        own, *_ = small(x, w, bias=bias)
        assert torch.equal(parts[rank][: M * D].view(M, D), own)
        assert torch.equal(out, residual + sum(part[: M * D].view(M, D) for part in parts))
        assert torch.equal(weighted, out * norm)
        torch.testing.assert_close(squares.sum(0), out.square().sum(-1))
        assert not flags[rank].any()
        for other in range(rank):
            assert by_program(flags[other], ranks)[:programs, rank].all()
            assert flags[other].sum() == programs


def test_sums_take_turns(shared, monkeypatch):
    """Even and odd ones through all layers of a forward pass, whose other ranks have nothing."""
    torch.manual_seed(0)
    args, taken = ModelArgs(128, 2, 4, 2, 64, 64, 50), []
    model = Transformer(args).to(DEVICE)
    model.inv_freq = model.inv_freq.to(DEVICE)
    tokens, cached = torch.tensor([[3, 7]], device=DEVICE), torch.tensor([5], device=DEVICE)
    ancestors = torch.ones(2, 2, dtype=torch.bool, device=DEVICE).tril()
    kv = random(*kv_cache_shape(args, 1, 80))
    inputs = tokens, cached[:, None] + torch.arange(2, device=DEVICE), kv, cached, ancestors
    halves, plain = shared(2), gpu_kernels.add_linear_ranks
    enroll(model)
    with torch.inference_mode():  # a model of one GPU beside it has nothing to do with that
        for ours, x in zip(forward(model, *inputs), model(*inputs), strict=True):
            torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)

    def come_and_add(*inputs):
        taken.append(inputs[-1])
        others_come(*halves[taken[-1]][1:], 2)
        return plain(*inputs)

    monkeypatch.setattr(gpu_kernels, "add_linear_ranks", come_and_add)
    with torch.inference_mode():
        for ours, x in zip(forward(model, *inputs, lambda y: 1 / 0), model(*inputs), strict=True):
            torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)
    assert taken == [0, 1, 0, 1]


def test_memory_of_ranks_holds_the_largest_sum(shared):
    """And flags of 16 ranks beside it. One that is alone finds that all is well."""
    parts, flags, _ = shared(1, torch.bfloat16)[1]
    assert all((x == 1).all() for x in gpu_kernels.sums_of_ones(parts[0]))
    most = torch.empty(32, gpu_kernels.PART_BYTES // 64, dtype=torch.bfloat16, device=DEVICE)
    assert gpu_kernels.can_share(most) and len(parts[0]) == most.numel()
    assert not gpu_kernels.can_share(torch.cat((most, most[:1])))
    assert not gpu_kernels.can_share(most.half())
    assert 16 * 32 * -(-most.shape[1] // gpu_kernels.SUM_BLOCK) <= len(flags[0])


@pytest.mark.parametrize("M", [1, 5, 20])
def test_what_the_compiler_is_told_of_shapes_is_so(M, shared, monkeypatch):
    """The number of sums depends on how a product is cut."""
    torch.manual_seed(0)
    shared(1)
    x, w = random(M, 128), random(192, 128)
    for op, args in (
        (torch.ops.fastspec.linear, (x, w, None, torch.float32)),
        (torch.ops.fastspec.gated_linear, (x, random(3, M).square(), 1e-5, w, None)),
    ):
        torch.library.opcheck(op, args, test_utils="test_faketensor")
    model = Transformer(ModelArgs(128, 1, 1, 1, 64, 1536, 50)).to(DEVICE)  # in tiles by dtype
    enroll(model)
    kv, cached = random(*kv_cache_shape(model.args, 1, 30)), torch.tensor([7], device=DEVICE)
    chain, tokens = torch.ones(M, M, device=DEVICE).bool().tril(), torch.arange(M, device=DEVICE)
    given = []
    monkeypatch.setattr(gpu_kernels, "layers", lambda *args: given.append(args) or layers(*args))
    for total in (None, one_rank):
        forward(model, tokens[None], 7 + tokens[None], kv, cached, chain, total)
    for args in given:
        torch.library.opcheck(torch.ops.fastspec.layers, args, test_utils="test_faketensor")
    assert [of_ranks for _, of_ranks, *_ in given] == [False, True]


def test_a_model_keeps_its_number_and_a_copy_gets_another():
    model = Transformer(ModelArgs(64, 1, 1, 1, 64, 64, 9))
    enroll(model)
    number, copied = model.number, deepcopy(model)
    enroll(model), enroll(copied)
    assert model.number == number != copied.number
    assert gpu_kernels.models[number] is model and gpu_kernels.models[copied.number] is copied
    before = copied.number
    del model, copied
    gc.collect()
    enroll(model := Transformer(ModelArgs(64, 1, 1, 1, 64, 64, 9)))
    assert model.number > before  # a graph that knows a number may outlive its model


def test_what_forward_does_not_take():
    llama = {"dim": 64, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 64}
    llama |= {"ffn_dim": 64, "vocab_size": 9}
    assert fits(ModelArgs(**llama), MOST_ROWS) and not fits(ModelArgs(**llama), MOST_ROWS + 1)
    for other in ({"head_dim": 80}, {"ffn_dim": 100}, {"activation": "gelu"}, {"layer_norm": True}):
        assert not fits(ModelArgs(**llama | other), 1)


def test_a_speculator_in_8_bits_drafts_nearly_the_same():
    """A weight's error is at most half of its row's largest / 127: 3e-3 of that, times the root of
    the 64 summed, beside logits of about sqrt(64) times a weight."""
    torch.manual_seed(0)
    args = SpeculatorArgs(64, 64, 2, 200)
    plain, exact, rough = (MLPSpeculator(args).to(DEVICE) for _ in range(3))
    for copy in (exact, rough):
        copy.load_state_dict(plain.state_dict())
    replace_linears(exact, False), replace_linears(rough, True)
    assert {m.weight.dtype for m in (*rough.head, *rough.proj)} == {torch.int8}
    state, token = random(3, 64), torch.tensor([5, 0, 199]).to(DEVICE)
    with torch.inference_mode():
        _, logits = plain.step(0, state, token)
        torch.testing.assert_close(exact.step(0, state, token)[1], logits, rtol=1e-4, atol=1e-5)
        error = rough.step(0, state, token)[1] - logits
        assert 0 < error.norm() / logits.norm() < 0.02
        many = random(MOST_ROWS + 6, 64)
        parts = torch.cat([rough.head[0](part) for part in many.split(MOST_ROWS // 2)])
        torch.testing.assert_close(rough.head[0](many), parts, rtol=1e-4, atol=1e-5)


def test_choices_are_those_of_the_plain_sampling():
    """Two blocks of tokens; every filter by itself, together, and none. The noise of the two may
    differ by 1e-6, the thresholds by what sums in another order do: no choice is so close."""
    torch.manual_seed(0)
    B, n, V = 4, 2, BLOCK + 100
    logits = random(B, n, V, scale=2.0)
    T = torch.tensor([0.8, 1.0, 5.0, 0.0], device=DEVICE)
    seed = torch.tensor([5, 2**61 + 3, 7, 0], device=DEVICE)
    position = torch.randint(0, 5000, (B, n), device=DEVICE)
    top_k = torch.tensor([0, 50, 7, 3], device=DEVICE)
    top_p = torch.tensor([0.9, 1.0, 0.95, 0.5], device=DEVICE)
    min_p = torch.tensor([0.0, 0.02, 0.0, 0.0], device=DEVICE)
    noisy = logits + T[:, None, None] * noise(seed, position, torch.arange(V, device=DEVICE))
    keep = kept_tokens(probabilities(logits, T), top_k, top_p, min_p)
    none = (None,) * 5
    assert torch.equal(choose(logits, None, None, *none), logits.argmax(-1))
    filters = top_k, top_p, min_p
    assert torch.equal(choose(logits, None, position, T, seed, *none[:3]), noisy.argmax(-1))
    assert torch.equal(
        choose(logits, None, position, T, seed, *filters),
        torch.where(keep, noisy, -torch.inf).argmax(-1),
    )
    keep = kept_tokens(probabilities(logits, T), None, top_p, min_p)
    assert torch.equal(
        choose(logits, None, position, T, seed, None, *filters[1:]),
        torch.where(keep, noisy, -torch.inf).argmax(-1),
    )
    ids = torch.arange(V, device=DEVICE) * 3  # of a draft vocabulary
    noisy = logits + T[:, None, None] * noise(seed, position, ids)
    assert torch.equal(choose(logits, ids, position, T, seed, *none[:3]), noisy.argmax(-1))
    assert not counters(logits.device).any()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_choice_that_the_filters_drop_is_made_again(share):
    """Of flat distributions, many choices are dropped, some several times in a row."""
    torch.manual_seed(0)
    B, n, V = 3, 40, 1300
    logits, position = random(B, n, V, scale=0.7), torch.arange(B * n, device=DEVICE).view(B, n)
    T, seed = torch.tensor([0.7, 1.0, 3.0], device=DEVICE), torch.arange(B, device=DEVICE)
    top_p, none = torch.full((B,), share, device=DEVICE), torch.zeros(B, device=DEVICE)
    keep = kept_tokens(probabilities(logits, T), None, top_p, none)
    noisy = logits + T[:, None, None] * noise(seed, position, torch.arange(V, device=DEVICE))
    dropped = ~keep.take_along_dim(noisy.argmax(-1, keepdim=True), -1)
    assert share > 0.8 or dropped.float().mean() > 0.3
    expected = torch.where(keep, noisy, -torch.inf).argmax(-1)
    assert torch.equal(choose(logits, None, position, T, seed, None, top_p, none), expected)
    # A share of the mass of few: of all tokens' it would keep them all.
    top_k = torch.tensor([40, 0, 7], device=DEVICE)
    keep = kept_tokens(probabilities(logits, T), top_k, top_p, none)
    assert share > 0.8 or (keep.sum(-1)[top_k > 0] < top_k[top_k > 0, None]).all()
    expected = torch.where(keep, noisy, -torch.inf).argmax(-1)
    assert torch.equal(choose(logits, None, position, T, seed, top_k, top_p, none), expected)
    least = torch.full((B,), 0.5, device=DEVICE)  # of the most probable one's
    keep = kept_tokens(probabilities(logits, T), None, top_p + 1, least)
    expected = torch.where(keep, noisy, -torch.inf).argmax(-1)
    assert torch.equal(choose(logits, None, position, T, seed, None, top_p + 1, least), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_end_a_choice(bad):
    logits, one = torch.full((1, 2, 700), bad, device=DEVICE), torch.ones(1, device=DEVICE)
    settings = torch.zeros(1, 2, device=DEVICE), one, one.long(), one.long() * 5, one / 2, one / 9
    assert ((chosen := choose(logits, None, *settings)) >= 0).all() and (chosen < 700).all()
    assert not counters(logits.device).any()


def test_equal_logits_choose_the_first():
    logits = torch.zeros(1, 1, BLOCK + 9, device=DEVICE)
    logits[..., [7, BLOCK + 3]] = 1.0
    assert choose(logits, None, None, *(None,) * 5).item() == 7


@pytest.mark.parametrize("k", [1, 3, 8])
def test_top_children_equal_plain(k):
    """Rounded scores: many are equal, within a block and across two."""
    torch.manual_seed(0)
    scores = random(2, 2, BLOCK + 50).round(decimals=1)
    columns, gains = top_children(scores, k, LEAST)
    expected, plain_gains = plain_top_children(scores, k)
    assert torch.equal(columns, expected)
    torch.testing.assert_close(gains, plain_gains, rtol=1e-5, atol=1e-5)


def plain_best(scores, columns, parents, keep, ids=None):
    """By a stable sort, as in speculator.py's `draft_tree`."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = order[:, :keep]
    if ids is None:
        return tuple(x.gather(1, kept) for x in (scores, columns, parents))
    tokens = torch.cat((columns[:, :1], ids[columns[:, 1:]]), dim=1)
    return tokens.gather(1, kept), order.argsort(dim=1).gather(1, parents.gather(1, kept))


@pytest.mark.parametrize(("n", "keep"), [(2, 1), (40, 33), (150, 63)])
def test_best_nodes_keep_their_order_among_equals(n, keep):
    """Rounded scores: many are equal. More nodes than a program compares at once."""
    torch.manual_seed(0)
    B = 3
    scores = -random(B, n).abs().round(decimals=1)
    columns = torch.randint(0, 20, (B, n), device=DEVICE)
    parents = (torch.rand(B, n, device=DEVICE) * torch.arange(n, device=DEVICE)).long()
    out = [x.new_full((B, keep + 5), -1) for x in (scores, columns, parents)]
    best(scores, columns, parents, keep, [x[:, 2:] for x in out])
    for ours, plain in zip(out, plain_best(scores, columns, parents, keep), strict=True):
        assert torch.equal(ours[:, 2:-3], plain)
        assert (ours[:, :2] == -1).all() and (ours[:, -3:] == -1).all()
    ids, out = torch.arange(20, device=DEVICE) * 7, [x.new_empty(B, keep) for x in out[1:]]
    scores[:, 0], columns[:, 0], parents[:, 0] = 0, 10**6, 0  # the root: a token, no column
    expected = plain_best(scores, columns, parents, keep, ids)
    best(scores, columns, parents, keep, (None, *out), ids)
    assert all(torch.equal(ours, plain) for ours, plain in zip(out, expected, strict=True))


def speculators(V=120, D=48, W=64, n=3, eight_bit=False, **options):
    """One with random weights, also of its norms; and its copy for small products. In 8 bits both
    have these, so that they hold the same."""
    torch.manual_seed(0)
    plain = MLPSpeculator(SpeculatorArgs(D, W, n, V, **options)).requires_grad_(False).to(DEVICE)
    for norm in plain.ln:
        nn.init.normal_(norm.weight, mean=1.0), nn.init.normal_(norm.bias, std=0.5)
    if drafted := options.get("draft_vocab_size"):
        plain.set_draft_ids(torch.randperm(V)[:drafted].sort().values.to(DEVICE))
    small = deepcopy(plain)
    for model in (plain, small) if eight_bit else (small,):
        replace_linears(model, eight_bit)
    return plain, small


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"tie_weights": True, "scale_input": True, "draft_vocab_size": 70}, [((4, 3, 2), 16)]),
        ({"tie_weights": True, "eight_bit": True}, [((4, 2), 9)]),
        ({"scale_input": True}, [((1, 1, 1), 4), ((6, 5, 4), 9)]),  # the last: levels are cut
        # The second shape's 72 nodes at the last depth are more than a small product takes.
        ({"draft_vocab_size": 70}, [((1, 1), 3), ((8, 3, 2), 60), ((1, 12, 1), 11), ((1,), 2)]),
        ({"eight_bit": True}, [((1, 1, 1), 4), ((2, 1, 2), 11)]),
        ({"n": 1}, [((1,), 2), ((3,), 3)]),
        ({"tie_weights": True, "V": BLOCK + 70, "W": 20}, [((1, 1, 1), 4), ((3, 2), 7)]),
    ],
)
def test_a_draft_equals_the_plain_one(options, shapes, noisy):
    """Token for token. float32 in another order: about 1e-6, and no two scores are so close."""
    plain, small = speculators(**options)
    hidden, position = random(3, 48), torch.tensor([9, 100, 4000], device=DEVICE)
    token = torch.tensor([3, 77, 110], device=DEVICE)
    T = torch.tensor([0.8, 0.0, 2.0], device=DEVICE) * noisy
    seed = torch.tensor([5, 2**61 + 3, 7], device=DEVICE)

    def score(logits, position, ids):
        ids = torch.arange(logits.shape[-1], device=DEVICE) if ids is None else ids
        return logits + T[:, None, None] * noise(seed, position[:, None], ids)

    for top_k, nodes in shapes:
        expected = plain.draft_tree(hidden, token, position, top_k, nodes, score)
        settings = (T, seed) if noisy else ()
        tree = draft_tree(small, hidden, token, position, top_k, nodes, LEAST, *settings)
        assert all(torch.equal(ours, x) for ours, x in zip(tree, expected, strict=True))
    assert not counters(hidden.device).any()


def test_a_state_chooses_its_node_among_equals():
    """Rounded scores: many are equal. More nodes than are compared at once."""
    torch.manual_seed(0)
    plain, _ = speculators()
    B, n, keep = 2, 150, 40
    scores = -random(B, n).abs().round(decimals=1)
    columns = torch.randint(0, 120, (B, n), device=DEVICE)
    parents = torch.randint(10, 15, (B, n), device=DEVICE)  # of five states per row
    expected = plain_best(scores, columns, parents, keep)
    out = [x.new_full((B, keep + 5), -1) for x in (scores, columns, parents)]
    states = random(B, 5, 64)
    y = F.linear(states, plain.proj[1].weight).flatten(0, 1)
    ours = next_state(
        y, columns, plain.emb[1].weight, plain.ln[1].weight, plain.ln[1].bias, plain.token_scale,
        torch.float32, M=B * keep, n=keep, parent=parents, scores=scores, stride=n, old_n=5,
        first=10, out=[x[:, 2:] for x in out],
    )  # fmt: skip
    for x, kept in zip(out, expected, strict=True):
        assert torch.equal(x[:, 2:-3], kept)
        assert (x[:, :2] == -1).all() and (x[:, -3:] == -1).all()
    above = states.take_along_dim(expected[2][..., None] - 10, 1)
    state, _ = plain.step(1, above, expected[1])
    torch.testing.assert_close(ours, state.flatten(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_and_the_projection_after_it_lie_in_one_matrix(tied):
    """They are what they were, each is stored once, and a second engine moves nothing."""
    plain, small = speculators(tie_weights=tied)
    pairs = [(h.weight, p.weight) for h, p in zip(small.head, small.proj[1:], strict=False)]
    assert len(pairs) == (1 if tied else 2)
    both = [joined(*pair) for pair in pairs]
    for (head, proj), one in zip(pairs, both, strict=True):
        assert torch.equal(one, torch.cat((head, proj)))
        assert head.data_ptr() == one.data_ptr() and proj.is_contiguous()
        assert one.untyped_storage().nbytes() == one.nbytes
    for name, x in plain.state_dict().items():
        assert torch.equal(small.state_dict()[name], x)
    replace_linears(small, False)
    assert [joined(*pair).data_ptr() for pair in pairs] == [one.data_ptr() for one in both]
    apart = deepcopy(small)
    assert joined(apart.head[0].weight, apart.proj[1].weight) is None
    _, small = speculators(tie_weights=tied, eight_bit=True)
    head, proj = small.head[0], small.proj[1]
    for name in ("weight", "row_scale"):
        parts = getattr(head, name), getattr(proj, name)
        assert torch.equal(joined(*parts), torch.cat(parts))
    assert joined(plain.head[0].weight, plain.proj[1].weight) is None


def test_a_wide_level_is_cut_alike(monkeypatch):
    """Of more nodes than every state's program compares."""
    _, small = speculators(scale_input=True)
    given = random(2, 48), *torch.tensor([[3, 77], [9, 100]], device=DEVICE), (6, 5, 4), 9, LEAST
    expected = draft_tree(small, *given)
    monkeypatch.setattr(gpu_kernels, "MOST_CHOICES", 8)
    assert all(torch.equal(a, b) for a, b in zip(draft_tree(small, *given), expected, strict=True))


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize(
    ("top_k", "nodes", "eight_bit", "products", "states", "others"),
    [
        ((1, 1, 1), 4, False, 4, 1, 3),  # two for each head, two before the first
        ((1, 1, 1), 4, True, 4, 1, 3),
        ((4, 3, 2), 9, False, 4, 3, 4),  # every level is cut
        ((3, 1, 2), 13, False, 4, 2, 4),  # an only child's state comes with it
    ],
)
def test_a_draft_takes_few_kernels(top_k, nodes, eight_bit, products, states, others, monkeypatch):
    _, small = speculators(tie_weights=True, scale_input=True, eight_bit=eight_bit)
    kernels = {}
    for name in ("_linear", "_state", "_top", "_best"):
        kernels[name] = Counted(getattr(gpu_kernels, name))
        monkeypatch.setattr(gpu_kernels, name, kernels[name])
    ints = torch.tensor([3], device=DEVICE), torch.tensor([9], device=DEVICE)
    draft_tree(small, random(1, 48), *ints, top_k, nodes, LEAST)
    found = {name: kernel.launches for name, kernel in kernels.items()}
    assert (found["_linear"], found["_state"]) == (products, states)
    assert found["_top"] + found["_best"] == others


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("scale_input", [False, True])
def test_states_equal_plain(scale_input, scale):
    """Small ones too, where 1e-6 beside the mean square is seen. float32 in another order, as
    above; GELU by tanh instead of erf would be 1e-4 away."""
    plain, _ = speculators(scale_input=scale_input)
    for table in (*plain.emb, *plain.proj[scale_input:]):
        table.weight.data *= scale
    hidden, token = random(2, 48) * scale, torch.tensor([3, 110], device=DEVICE)
    state, _ = plain.step(0, plain.start(hidden), token)
    sizes = plain.token_scale, torch.float32
    weights = [
        (e.weight, norm.weight, norm.bias) for e, norm in zip(plain.emb, plain.ln, strict=True)
    ]
    scaled = hidden if scale_input else None
    y = F.linear(hidden, plain.proj[0].weight)
    ours = next_state(y, token, *weights[0], *sizes, M=2, hidden=scaled)
    torch.testing.assert_close(ours, state, rtol=1e-5, atol=1e-6)
    tokens = torch.tensor([[1, 5, 7, 50], [5, 2, 3, 119]], device=DEVICE)
    parent = torch.tensor([[1, 0, 1, 0]] * 2, device=DEVICE)  # of two states per row
    states = random(2, 2, 64) * scale
    y = F.linear(states, plain.proj[1].weight).flatten(0, 1)
    tree = {"M": 6, "n": 3, "stride": 4, "old_n": 2, "first": 10}
    ours = next_state(y, tokens, *weights[1], *sizes, parent=parent + 10, **tree)
    state, _ = plain.step(1, states.take_along_dim(parent[..., None], 1), tokens)
    torch.testing.assert_close(ours, state[:, :3].flatten(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tree", [0, 9])
@pytest.mark.parametrize("noisy", [False, True])
def test_an_engine_drafts_the_same_with_kernels(tree, noisy):
    """Traced, as the step is when it is compiled."""
    import gpu_kernels

    plain, small = speculators(tie_weights=True, scale_input=True, draft_vocab_size=70)
    target = Transformer(ModelArgs(48, 1, 2, 2, 24, 64, 120)).to(DEVICE)
    options = {"num_draft_tokens": 3, "batch_size": 2, "max_seq_len": 32}
    options |= {"tree": tree, "top_k_tokens_per_head": (4, 3, 2)}
    engines = [Engine(target, speculator, **options) for speculator in (plain, small)]
    engines[1].kernels = engines[1].draft_kernels = gpu_kernels
    hidden, last, root = random(2, 48), *torch.tensor([[7, 99], [3, 5]], device=DEVICE)
    results = []
    for engine in engines:
        engine.hidden.copy_(hidden)
        engine.temperature.fill_(0.8)
        engine.done.fill_(False)
        engine.seed += torch.arange(2, device=DEVICE)
        run = engine.draft_tree if tree else engine.draft
        if engine.draft_kernels is not None:
            run = torch.compile(run, backend="aot_eager", fullgraph=True)
        with torch.inference_mode():
            result = run(last, root, noisy)
        results.append(torch.stack(result) if tree else result)
    assert torch.equal(*results)


@pytest.mark.parametrize(("N", "deepest"), [(2, 1), (16, 4), (41, 6)])
def test_lineage_and_accepted_path_equal_plain(N, deepest):
    """Random trees, no deeper than they may be; a node's siblings have other tokens than it. Often
    the target chooses a child."""
    torch.manual_seed(0)
    B = 8
    parent, depth = torch.zeros(B, N, dtype=torch.int64), torch.zeros(B, N, dtype=torch.int64)
    for n in range(1, N):
        likely = (depth[:, :n] < deepest) * torch.arange(1.0, n + 1)
        parent[:, n] = likely.multinomial(1)[:, 0]
        depth[:, n] = depth.gather(1, parent)[:, n] + 1
    tokens = torch.arange(N).expand(B, -1).contiguous()
    chosen = (torch.rand(B, N, N) * (parent[:, None] == torch.arange(N)[:, None])).argmax(-1)
    chosen[torch.rand(B, N) < 0.2] = 0
    parent, depth, tokens, chosen = (x.to(DEVICE) for x in (parent, depth, tokens, chosen))
    ours = lineage(parent, deepest)
    for x, plain in zip(ours, plain_lineage(parent, deepest), strict=True):
        assert torch.equal(x, plain)
    assert torch.equal(ours[1], depth)
    inputs = tokens, chosen, parent, *ours, torch.arange(deepest + 1, device=DEVICE)
    path = accepted_path(*inputs)
    assert torch.equal(path, plain_accepted_path(*inputs))
    assert (path > 0).any() and (path[:, 1:] == 0).any()
