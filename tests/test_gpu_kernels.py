"""The Triton kernels against their plain equivalents: on a GPU, else in Triton's interpreter."""

import pytest
import torch

from model import plain_attention

pytest.importorskip("triton", reason="there is no triton for this platform")
from gpu_kernels import SPLIT, cached_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attention_inputs(B, N, H, K, E, S, cached, dtype=torch.float32, seed=0, trees=1):
    """Random q, k, v and cache, a random tree of nodes (one of all rows, or of each: `trees` = B),
    and the mask that plain attention takes."""
    torch.manual_seed(seed)
    shapes = [(B, N, H, E), (B, N, K, E), (B, N, K, E), (2, B, K, S, E)]
    q, k, v, kv = (torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes)
    ancestors = (torch.rand(trees, N, N) < 0.5).tril(-1) | torch.eye(N, dtype=torch.bool)
    ancestors[..., 0] = True
    ancestors = ancestors[0] if trees == 1 else ancestors
    cached = torch.tensor(cached)
    in_cache = (torch.arange(S) < cached[:, None, None]).expand(-1, N, -1)
    mask = torch.cat((in_cache, ancestors.expand(B, -1, -1)), dim=-1).repeat(1, H // K, 1)
    return q, k, v, kv, cached.to(DEVICE), ancestors.to(DEVICE), mask.to(DEVICE)


@pytest.mark.parametrize(
    ("B", "N", "H", "K", "E", "S", "cached"),
    [
        (1, 1, 9, 3, 64, 300, [200]),
        (2, 5, 8, 2, 80, 200, [199, 0]),  # a head_dim that is no power of two; an empty cache
        (3, 4, 4, 4, 16, 130, [SPLIT - 2, SPLIT - 1, SPLIT]),  # own tokens across a split's edge
        (1, 25, 8, 2, 32, 500, [311]),
        (2, 3, 6, 1, 32, 64, [64, 1]),  # one KV head; a full cache
        (1, 5, 48, 1, 128, 70, [66]),  # 240 query rows on one KV head, as in granite-20b-code
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


def test_nothing_past_the_live_length_is_read():
    """NaN in dead slots would reach the result through any product with it."""
    q, k, v, kv, *visible = attention_inputs(2, 3, 4, 2, 32, 200, [70, 5])
    expected = cached_attention(q, k, v, kv, *visible)
    for row, live in enumerate([70, 5]):
        kv[:, row, :, live:] = torch.nan
    assert torch.equal(cached_attention(q, k, v, kv, *visible), expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's products round by shape")
def test_key_counts_the_same_in_the_cache_and_among_the_own_tokens():
    """Bit for bit: the last token of a step sees what a step that begins with it sees."""
    B, N, H, K, E, S, start = 1, 6, 8, 2, 64, 300, SPLIT - 3
    q, k, v, kv, cached, _, _ = attention_inputs(B, N, H, K, E, S, [start])
    chain = torch.ones(N, N, dtype=torch.bool, device=DEVICE).tril()
    together = cached_attention(q, k, v, kv, cached, chain)
    for n in range(N):
        alone = cached_attention(
            q[:, n:], k[:, n:], v[:, n:], kv, cached + n, chain[n:, n:].contiguous()
        )
        assert torch.equal(alone[:, 0], together[:, n])
        kv[0, :, :, start + n], kv[1, :, :, start + n] = k[:, n], v[:, n]
