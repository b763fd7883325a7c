"""fastspec: lossless speculative decoding with MLP speculators, one CUDA graph per step.

Reads downward: requests, sampling, the engine (decode state, decode step, prefill), the host loop,
LLM, the command line.

Letters in shape comments:
    B rows (sequences)     N candidate tokens per row and step (nodes)     S cache slots
    D hidden width         V vocabulary          P nodes from the root on, one at each depth (1 + k)
"""

import argparse
import gc
import json
import math
import os
import re
import secrets
import signal
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

# libgomp's threads spin while one of them waits for a core that others use: not for so long. Before
# torch, which brings it.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import huggingface_hub
import torch
import torch.nn as nn
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import (
    ModelArgs,
    Transformer,
    forward_in_place,
    kv_cache_shape,
    load_model,
    read_json,
    write_cache,
)
from speculator import LEAST, LayerNorm, MLPSpeculator, SpeculatorArgs, load_speculator
from tokenizer import Tokenizer, load_tokenizer, naming

# --- requests ----------------------------------------------------------------------------------

MAX_STOP_IDS = 16


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the tokens of one request. Names and defaults are vLLM's; a checkpoint's
    generation_config.json changes none of them.

    temperature 0 is greedy; top_k 0 (or -1) and top_p 1 keep every token; min_p keeps tokens of
    at least that share of the likeliest one's probability. max_tokens None means as many as fit,
    seed None (or -1) a fresh one. `stop` strings end the text and are left out of it;
    `stop_token_ids` end it as the model's own end-of-sequence ids do, which `ignore_eos` switches
    off.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False

    def __new__(cls, *args, **kwargs):
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in kwargs if name not in known]:
            raise ValueError(
                f"SamplingParams: {unknown[0]} is not supported; supported: {', '.join(known)}"
            )
        return super().__new__(cls)

    def __post_init__(self):
        for f in fields(self):
            object.__setattr__(self, f.name, as_number(getattr(self, f.name)))
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        stop_ids = self.stop_token_ids or []
        stop_ids = [as_number(t) for t in stop_ids] if is_list(stop_ids) else stop_ids
        length, seed = self.max_tokens, self.seed
        texts = is_list(stop) and all(isinstance(text, str) and text for text in stop)
        ids = is_list(stop_ids) and all(is_integer(t, 0) for t in stop_ids)
        for name, good, range_ in (
            ("temperature", is_number(self.temperature, 0, 1e6), "a number from 0 to 1e6"),
            ("top_p", is_number(self.top_p, 1e-37, 1), "above 0, at most 1"),  # in float32
            ("min_p", is_number(self.min_p, 0, 1), "a number from 0 to 1"),
            ("top_k", is_integer(self.top_k, -1), "an integer; 0 or -1 keeps all"),
            ("max_tokens", length is None or is_integer(length, 1), "an integer above 0, or None"),
            ("seed", seed is None or is_integer(seed, -math.inf, math.inf), "an integer, or None"),
            ("stop", texts, "a string that is not empty, or several"),
            ("stop_token_ids", ids, "a list of token ids"),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "True or False"),
        ):
            if not good:
                value = getattr(self, name)
                raise ValueError(f"SamplingParams: {name} {value!r} is out of range: {range_}")
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        object.__setattr__(self, "seed", None if seed == -1 else seed)
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(stop_ids))


def is_integer(x, least: float, most: float = 2**31 - 1) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def is_number(x, least: float, most: float) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and least <= x <= most


def as_number(x):
    """x, or the number of Python's (or list of them) that it is, if it is numpy's or torch's."""
    return x.tolist() if hasattr(x, "tolist") else x


def is_list(x) -> bool:
    return isinstance(x, (list, tuple))


@dataclass(frozen=True)
class Request:
    """Prompt ids, with the seed of its noise and every id that ends the answer.

    `goes_on`: what its row's cache still holds of the prompt is not computed again. `is_turn`: the
    answer is a text of its own, so a space that sentencepiece puts before each text is left out of
    it; else it goes on the prompt's. `text` and `id` are handed on to the output.
    """

    prompt: list[int]
    params: SamplingParams
    seed: int
    stop_ids: list[int]
    goes_on: bool = False
    is_turn: bool = False
    text: str | None = None
    id: str | int | None = None


# --- sampling ----------------------------------------------------------------------------------
# The next token is argmax(logits + T * g), with g a fixed function of (seed, position, token).
# A draft is accepted exactly when it equals the target's own choice at its position, so neither
# the speculator nor the batch can change the text.


def mix(h: Tensor) -> Tensor:
    """Finalizer of MurmurHash3: a bijection of 32-bit words, held in int32."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * -2048144789  # 0x85EBCA6B
    h = (h ^ ((h >> 13) & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
    return h ^ ((h >> 16) & 0xFFFF)


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, from uniform 32-bit words in int32.

    The large values come from small v, where float32 is dense: a 24-bit uniform would cut the
    tail off and, rounded to 1, give infinity.
    """
    h = (bits.long() & 0xFFFFFFFF).float()
    v = ((h + 0.5) * 2**-32).clamp(max=1 - 2**-24)
    return -torch.log(-torch.log1p(-v))


def noise(seed: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """Gumbel noise [B, n, V] of tokens [V] at absolute `position` [B, n], for `seed` [B]."""
    seed, position = seed[:, None], position.int()
    low, high = wrap_int32(seed), wrap_int32(seed >> 32)
    a = mix(mix(low + position * -1640531527) ^ high)  # two words per (seed, position), so that
    b = mix(mix(high - position * 1013904223) + a)  # no two positions share shifted noise
    return gumbel(mix(mix(token.int() + a[..., None]) ^ b[..., None]))


def wrap_int32(x: Tensor) -> Tensor:
    """The low 32 bits of int64, as int32."""
    return (((x + 2**31) & 0xFFFFFFFF) - 2**31).int()


def probabilities(logits: Tensor, temperature: Tensor) -> Tensor:
    """[B, n, V] of logits [B, n, V] at temperature [B]; at 0 all of it is the highest ones'."""
    scaled = logits - logits.amax(-1, keepdim=True)
    return (scaled / temperature[:, None, None].clamp_min(1e-6)).softmax(-1)


def kept_tokens(
    p: Tensor, top_k: Tensor | None, top_p: Tensor, min_p: Tensor, total: Tensor | None = None
) -> Tensor:
    """Mask [B, n, C] of the tokens that top-k (None: no row has one), then top-p, and min-p leave;
    settings are [B]. p: their probabilities, of all tokens or, without top-k and with the mass
    `total` [B, n, 1] of all, of `likely_tokens`.

    Each filter keeps every token whose probability reaches some threshold (tokens of equal
    probability stay together), so thresholds are searched for and nothing is sorted. As in
    transformers and vLLM, top-p counts the mass that top-k left.
    """
    top_p, min_p = top_p[:, None, None], min_p[:, None, None]
    least = min_p * p.amax(-1, keepdim=True)
    if top_k is not None:
        top_k = top_k[:, None, None]

        def enough_tokens(t):
            return (p >= t).sum(-1, keepdim=True) >= top_k

        of_k = torch.where(top_k > 0, largest_threshold(p, enough_tokens), 0.0)
        least, p = torch.maximum(least, of_k), torch.where(p >= of_k, p, 0.0)
    wanted = top_p * (mass(p) if total is None else total)

    def enough_mass(t):
        return mass(torch.where(p >= t, p, 0.0)) >= wanted

    nucleus = torch.where(top_p < 1, largest_threshold(p, enough_mass), 0.0)
    return p >= torch.maximum(least, nucleus)


def mass(p: Tensor) -> Tensor:
    """[B, n, 1]; in float64 it does not depend on which unlikely tokens are among these."""
    return p.sum(-1, keepdim=True, dtype=torch.float64)


def likely_tokens(p: Tensor, top_p: Tensor) -> Tensor:
    """Columns [C] of the tokens that top-p can keep in any row: those that are left out could not
    fill what it leaves, however many they are."""
    unlikely = p <= (1 - top_p[:, None, None]) / p.shape[-1]
    return (~unlikely).flatten(0, 1).any(0).nonzero()[:, 0]


def largest_threshold(p: Tensor, enough) -> Tensor:
    """Largest float32 t in [0, 1] with enough(t), which must hold up to some t and not beyond.

    Bit by bit: non-negative floats order as their bit patterns do. Shape [B, n, 1].
    """
    bits = torch.zeros_like(p[..., :1], dtype=torch.int32)
    for bit in reversed(range(30)):
        trial = bits | (1 << bit)
        bits = torch.where(enough(trial.view(torch.float32)), trial, bits)
    return bits.view(torch.float32)


# --- the engine --------------------------------------------------------------------------------

PREFILL_SIZES = (64, 256, 1024)  # tokens of one prompt at once
PREFILL_TOKENS = 8192  # computed together in one eager prefill, padding included; or if more:
PREFILL_PER_ROW = 16  # this many times the batch size
# Joint probabilities of drafts on a CPU: of a chain after which one more is worth its time, and of
# another token in place of one in it.
LIKELY, SIBLING = 0.3, 0.15
HEADER = 3  # columns of a result before its tokens: tokens emitted, accepted, done


def lineage(parent: Tensor, deepest: int) -> tuple[Tensor, Tensor]:
    """For the nodes of a tree with these parents [B, N] (the root's is itself): bool [B, N, N],
    True where node n (row) is or descends from node m (column), and their depths [B, N]."""
    nodes = torch.arange(parent.shape[1], device=parent.device)
    above = nodes.expand_as(parent)
    ancestors = (nodes[:, None] == nodes).expand(parent.shape[0], -1, -1)
    for _ in range(deepest):
        above = parent.gather(1, above)
        ancestors = ancestors | (above[..., None] == nodes)
    return ancestors, ancestors.sum(-1) - 1


def accepted_path(
    candidates: Tensor,
    sampled: Tensor,
    parent: Tensor,
    ancestors: Tensor,
    depth: Tensor,
    depths: Tensor,
) -> Tensor:
    """The node at each of `depths` [P] to which the target's choices lead, or 0 past their end.

    candidates, parent, depth [B, N], ancestors [B, N, N] and sampled [B, N], the target's choice
    after each node. A node is accepted if it and all above it, but for the root, are what the
    target chose after their parents.
    """
    right = (candidates == sampled.gather(1, parent)) | (depth == 0)  # [B N]
    accepted = (right[:, None] | ~ancestors).all(-1)
    here = accepted[:, None] & (depth[:, None] == depths[:, None])  # [B P N]
    return here.int().argmax(-1)


def count_emitted(
    draft: Tensor, sampled: Tensor, stop_ids: Tensor, room: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """How many of the target's choices this step emits.

    draft [B, N-1] holds the candidates after the last token, sampled [B, N] the target's choice
    after each node, stop_ids [B, MAX_STOP_IDS] is padded with -1, room [B] is how many tokens a
    row may still emit. Returns (emitted [B], drafts among them [B], stopped [B]).

        draft        7  8  9        accepted = 2: 7 and 8 are what the target chose
        sampled   7  8  5  4        emitted  = 3: 7, 8 and the target's own 5
    """
    N = sampled.shape[1]
    node = torch.arange(N, device=sampled.device)
    # By minima, because scans are kernels of their own.
    wrong = nn.functional.pad(draft, (0, 1), value=-1) != sampled  # [B N], the last one always
    accepted = torch.where(wrong, node, N).amin(1)
    is_stop = sampled[:, :, None] == stop_ids[:, None]
    before_stop = torch.where(is_stop, node[:, None], N).flatten(1).amin(1)
    emitted = torch.minimum(torch.minimum(accepted, before_stop) + 1, room)
    return emitted, torch.minimum(accepted, emitted), before_stop < emitted


Packet = tuple[Tensor, torch.cuda.Event | None]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without making the host wait for the work queued there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


class Engine(nn.Module):
    """Static decode state on the device, and the compiled step that reads and writes it.

    A committed length counts the last token, whose keys and values are not yet in the cache: a
    step starts at that token (the root) and verifies the drafts after it.
    """

    led = ("capture_prefill", "prefill", "step", "stop_row")  # what all ranks do at once

    def __init__(
        self,
        model: Transformer,
        speculator: nn.Module | None = None,
        *,
        batch_size: int = 1,
        max_seq_len: int = 1024,
        num_draft_tokens: int = 0,
        tree: int = 0,
        top_k_tokens_per_head: Sequence[int] = (),
        compiled: bool = False,
        eight_bit_draft: bool = False,
        ranks=None,
        draft_ranks=None,
    ):
        """`ranks` (of tp.py) share the target, `draft_ranks` the speculator; None: not shared.
        eight_bit_draft: keep the speculator's matrices in int8, where there are kernels for it."""
        super().__init__()
        alone = ranks is None or ranks.size == 1  # and nothing is shared
        self.ranks, self.draft_ranks = (None, None) if alone else (ranks, draft_ranks)
        self.model, self.speculator = model, speculator
        self.k = num_draft_tokens if speculator is not None else 0
        self.tree = tree if self.k else 0  # nodes; 0: a chain, or on a CPU what is likely
        self.top_k_tokens_per_head = tuple(top_k_tokens_per_head)[: self.k]
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        self.compiled = compiled
        weight = model.embed.weight
        path, slots = self.k + 1, max_seq_len + self.k + 1  # of a tree only a path is kept
        ints = {"dtype": torch.int64, "device": weight.device}
        floats = {"dtype": torch.float32, "device": weight.device}
        state = {
            "kv": weight.new_zeros(kv_cache_shape(model.args, batch_size, slots)),
            "tokens": torch.zeros(batch_size, slots, **ints),  # prompt and answer
            "length": torch.ones(batch_size, **ints),
            "hidden": weight.new_zeros(batch_size, model.args.dim),  # that chose the last token
            "done": torch.ones(batch_size, dtype=torch.bool, device=weight.device),  # or empty
            "temperature": torch.zeros(batch_size, **floats),
            "top_p": torch.ones(batch_size, **floats),
            "min_p": torch.zeros(batch_size, **floats),
            "top_k": torch.zeros(batch_size, **ints),
            "seed": torch.zeros(batch_size, **ints),
            "limit": torch.ones(batch_size, **ints),  # largest length
            "stop_ids": torch.full((batch_size, MAX_STOP_IDS), -1, **ints),
            "result": torch.zeros(batch_size, HEADER + path, **ints),  # of the last step
            # In a chain node n follows node n - 1 and sees all before it.
            "depth": torch.arange(path, device=weight.device),
            "ancestors": torch.ones(path, path, dtype=torch.bool, device=weight.device).tril(),
        }
        for name, tensor in state.items():
            self.register_buffer(name, tensor, persistent=False)
        if compiled:
            # Of one function in a process: each engine compiles it up to four times.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
            self.compiled_step = torch.compile(
                self.decode_step, mode="reduce-overhead", fullgraph=True, dynamic=False
            )
        self.kernels, self.draft_kernels = None, None
        if compiled and weight.is_cuda:
            import gpu_kernels  # Triton is there only where torch has a GPU

            self.kernels = gpu_kernels
            gpu_kernels.counters(weight.device)  # now: in a capture they would lie in its memory
            gpu_kernels.enroll(model)
            if self.k:
                gpu_kernels.replace_linears(speculator, eight_bit_draft)
                if self.draft_ranks is None and isinstance(speculator, MLPSpeculator):
                    self.draft_kernels = gpu_kernels
        self.all_drafts = False  # True: on a CPU, too, k tokens are drafted, however unlikely
        self.busy = False  # a decode loop is running
        self.ahead = int(weight.is_cuda)  # launches queued behind the one whose result is read
        self.packets: list[Packet] = []  # free pinned buffers
        self.prefill_graphs: dict[int, tuple] = {}  # padded size -> see capture_prefill
        self.warm: set[tuple[bool, int]] = set()  # which (noisy, filtered) steps are compiled

    # draft, verify, accept, commit

    def decode_step(self, live: int | None, noisy: bool, filtered: int) -> None:
        """One step of every row over the first `live` slots of the cache, or all of them (the
        Triton attention stops at each row's own length). A batch without sampled rows needs no
        noise, one without filters no filtering; see `step_needs`."""
        root = self.length - 1  # [B], the slot and position of the last token
        candidates, parent, ancestors, depth = self.candidates(root, noisy)
        given = candidates, root, ancestors, depth, live
        sampled, hidden, new_kv = self.verify(*given, noisy, filtered)
        drafted = candidates[:, 1:]
        # From here on a tree's accepted path is a chain like any other.
        if parent is not None and new_kv is None:
            drafted, sampled, hidden = self.keep_path(candidates, sampled, hidden, parent, live)
        elif parent is not None:
            walk = accepted_path if self.kernels is None else self.kernels.accepted_path
            path = walk(candidates, sampled, parent, ancestors, depth, self.depth)  # [B P]
            sampled, hidden = sampled.gather(1, path), hidden.take_along_dim(path[..., None], 1)
            new_kv = new_kv.take_along_dim(path[None, None, :, None, :, None], 4)  # [L 2 B K P E]
            drafted = torch.where(path[:, 1:] > 0, sampled[:, :-1], -1)

        room = torch.where(self.done, 0, self.limit - self.length)
        emitted, accepted, stopped = count_emitted(drafted, sampled, self.stop_ids, room)
        if new_kv is not None:
            slots = root[:, None] + self.depth[: sampled.shape[1]]
            write_cache(self.kv, new_kv, slots)  # beyond the accepted: dead slots
        self.commit(emitted, stopped, sampled, hidden, accepted)

    def keep_path(
        self, candidates: Tensor, sampled: Tensor, hidden: Tensor, parent: Tensor, live: int
    ) -> tuple[Tensor, ...]:
        """The accepted path's drafts, choices [1, P] and states [1, P, D], of one row's tree whose
        keys and values are in the cache, after its `live` slots: the path's come to lie there."""
        (tokens,), (chosen,), (parents,) = candidates.tolist(), sampled.tolist(), parent.tolist()
        path = [0]
        for node, (token, above) in enumerate(zip(tokens, parents, strict=True)):
            if node and above == path[-1] and token == chosen[above]:
                path.append(node)
        nodes, P = torch.tensor(path), len(path)
        if path[-1] >= P:  # not the first ones
            self.kv[..., live : live + P, :] = self.kv.index_select(4, live + nodes)
        kept = [x.index_select(1, nodes) for x in (candidates, sampled, hidden)]
        return kept[0][:, 1:], *kept[1:]

    def candidates(self, root: Tensor, noisy: bool) -> tuple[Tensor, ...]:
        """The last tokens, at root [B], and drafts after them, [B, N]; their parents (None in a
        chain), which of them is whose ancestor, and their depths."""
        last = self.tokens.gather(1, root[:, None])[:, 0]  # [B]
        if self.tree:
            tokens, parent = self.draft_tree(last, root, noisy)
            find = lineage if self.kernels is None else self.kernels.lineage
            return tokens, parent, *find(parent, self.k)
        if self.k and self.batch_size == 1 and self.likely_only():
            tokens, parent = self.draft_likely(last, root, noisy)
            node = torch.arange(tokens.shape[1])
            own, above = node == node[:, None], node <= parent[..., None]  # parents: the chain
            return tokens, parent, own | above, parent + (node > 0)
        tokens = self.draft(last, root, noisy) if self.k else last[:, None]
        N = tokens.shape[1]
        return tokens, None, self.ancestors[:N, :N], self.depth[:N]

    def verify(
        self,
        tokens: Tensor,
        root: Tensor,
        ancestors: Tensor,
        depth: Tensor,
        live: int | None,
        *needs: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The target's choice after each candidate [B, N], its hidden states [B, N, D], and the
        candidates' keys and values; `live` and needs (noisy, filtered) as for `decode_step`.
        One sequence on a CPU writes them into the cache itself, after its live slots, and None is
        returned."""
        (B, N), slots = tokens.shape, self.kv.shape[-2]
        positions = root[:, None] + depth  # [B N]
        kv = self.kv if live is None else self.kv[..., :live, :]
        given = tokens, positions, kv, root, ancestors
        on_cpu = self.ranks is None and self.kernels is None and not tokens.is_cuda
        if on_cpu and B == 1 and live is not None and live + N <= slots:
            state = self.kv, live, ancestors.view(N, N)
            hidden, new_kv = forward_in_place(self.model, tokens, positions, *state), None
        elif self.kernels is None:
            hidden, new_kv = self.model(*given)
        elif self.kernels.fits(self.model.args, tokens.numel()):
            total = None if self.ranks is None else self.ranks.sum
            hidden, new_kv = self.kernels.forward(self.model, *given, total)
        else:
            hidden, new_kv = self.model(*given, self.kernels.cached_attention)
        sampled = self.choose(self.logits(hidden), positions + 1, None, *needs, self.ranks)
        return sampled, hidden, new_kv

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [B, N, V] of hidden states [B, N, D]."""
        if self.kernels is None:
            return self.model.logits(hidden)
        return self.kernels.few_rows(hidden, self.model.output.weight, torch.float32)

    def draft(self, last: Tensor, root: Tensor, noisy: bool) -> Tensor:
        """The last token and drafts, [B, N], chosen with the noise that the target will meet at
        their positions: the two then agree far more often than independent draws would."""
        if self.draft_kernels is not None:  # a chain is a tree of one branch
            tokens, _ = self.small_tree(last, root, noisy, (1,) * self.k, self.k + 1)
        else:
            choose = self.draft_chooser(noisy)
            drafts = self.speculator.draft(self.hidden, last, root, self.k, choose)
            tokens = torch.cat((last[:, None], drafts), dim=1)
        return tokens if self.ranks is None else self.ranks.same(tokens)

    def draft_likely(self, last: Tensor, root: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
        """Tokens and parents [1, N] of a row's likely drafts, on a CPU, where every candidate takes
        time: a chain that ends once it is unlikely to be accepted, with the token that shows it;
        then other likely tokens in place of one of its."""
        joint, level = 1.0, 0  # of the chain
        others, above = [], []  # and their parents

        def choose(logits: Tensor, position: Tensor, ids: Tensor | None) -> tuple[Tensor, bool]:
            nonlocal joint, level
            if noisy:
                logits = self.scores(logits[:, None], position[:, None], ids, None)[:, 0]
            p, columns = logits.softmax(-1).topk(min(4, logits.shape[-1]))
            joint, *rest = (joint * p[0]).tolist()
            count = sum(x >= SIBLING for x in rest)
            if count:
                other = columns[0, 1 : 1 + count]
                others.append(other if ids is None else ids[other])
                above.extend([level] * count)
            level += 1
            return columns[:, 0], joint >= LIKELY

        drafts = self.speculator.draft(self.hidden, last, root, self.k, choose)[0]
        parent = torch.tensor([[0, *range(len(drafts)), *above]])
        return torch.cat((last, drafts, *others))[None], parent

    def draft_chooser(self, noisy: bool) -> Callable[..., tuple[Tensor, bool]]:
        """How `speculator.draft` chooses. On a CPU, where every candidate verified takes time, the
        drafts end once no sequence's are likely to be all accepted: with the one that shows it."""
        every = not self.likely_only()
        joint = (~self.done).float()  # probability of the drafts so far, by row

        def choose(logits: Tensor, position: Tensor, ids: Tensor | None) -> tuple[Tensor, bool]:
            if every:
                given = logits[:, None], position[:, None], ids, noisy, False, self.draft_ranks
                return self.choose(*given)[:, 0], True
            if noisy:
                logits = self.scores(logits[:, None], position[:, None], ids, None)[:, 0]
            p, column = logits.softmax(-1).max(-1)
            return column, joint.mul_(p).max().item() >= LIKELY

        return choose

    def likely_only(self) -> bool:
        """Whether the number of drafts is up to the host."""
        on_cpu = self.ranks is None and not self.hidden.is_cuda
        return on_cpu and not self.compiled and not self.all_drafts

    def draft_tree(self, last: Tensor, root: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
        """Tokens and parents [B, N] of a tree of drafts, chosen with the same noise and ranked with
        it: without, the demo's tree of 16 gave 2.64 tokens per step at T = 0.8, not 2.81."""

        def score(logits: Tensor, position: Tensor, ids: Tensor | None) -> Tensor:
            logits = logits if self.draft_ranks is None else self.draft_ranks.gather(logits)
            return self.scores(logits, position[:, None], ids, None) if noisy else logits

        shape = self.top_k_tokens_per_head, self.tree
        if self.draft_kernels is not None:
            tree = self.small_tree(last, root, noisy, *shape)
        else:
            top = None if self.kernels is None else self.kernels.top_children
            tree = self.speculator.draft_tree(self.hidden, last, root, *shape, score, top)
        return tree if self.ranks is None else self.ranks.same(torch.stack(tree)).unbind()

    def small_tree(self, last: Tensor, root: Tensor, noisy: bool, top_k, nodes: int):
        """A tree of this shape, all of whose work is small kernels."""
        settings = (self.temperature, self.seed) if noisy else ()
        state = self.speculator, self.hidden, last, root
        return self.draft_kernels.draft_tree(*state, top_k, nodes, LEAST, *settings)

    def scores(self, logits: Tensor, position: Tensor, ids: Tensor | None, ranks) -> Tensor:
        """Logits [B, n, V] of the tokens `ids` [V], or of all, plus the noise of their absolute
        positions [B, n] (or [B, 1], if they share one)."""
        width = logits.shape[-1] * (1 if ranks is None else ranks.size)
        ids = torch.arange(width, device=logits.device) if ids is None else ids
        ids = ids if ranks is None else ranks.columns(ids)
        return logits + self.temperature[:, None, None] * noise(self.seed, position, ids)

    def choose(
        self,
        logits: Tensor,
        position: Tensor,
        ids: Tensor | None,
        noisy: bool,
        filtered: int,
        ranks,
    ) -> Tensor:
        """Column [B, n] for each absolute position [B, n] from float32 logits [B, n, V] of the
        tokens `ids` [V]; None: of all. Each of `ranks` has its part of the columns."""
        if filtered and ranks is not None:  # filters look at the whole distribution
            whole = ranks.gather(logits)
            return ranks.same(self.choose(whole, position, ids, noisy, filtered, None))
        by_count = self.top_k if filtered > 1 else None
        if self.kernels is not None and ranks is None:
            noise_args = (position, self.temperature, self.seed) if noisy else (None,) * 3
            filters = (by_count, self.top_p, self.min_p) if filtered else (None,) * 3
            return self.kernels.choose(logits, ids, *noise_args, *filters)
        if not filtered:
            scores = self.scores(logits, position, ids, ranks) if noisy else logits
            return scores.argmax(-1) if ranks is None else ranks.argmax(scores)
        p, total, columns = probabilities(logits, self.temperature), None, None  # of all
        if by_count is ids is None and not self.compiled and not p.is_cuda:
            # Few of them: noise and search take time.
            total, columns = mass(p), likely_tokens(p, self.top_p)
            logits, p, ids = logits[..., columns], p[..., columns], columns
        keep = kept_tokens(p, by_count, self.top_p, self.min_p, total)
        scores = self.scores(logits, position, ids, None) if noisy else logits
        column = torch.where(keep, scores, -torch.inf).argmax(-1)
        return column if columns is None else columns[column]

    def commit(self, emitted, stopped, sampled, hidden, accepted) -> None:
        """Append `emitted` [B] of the chosen tokens to each row and publish the result."""
        done, n = self.done | stopped | (self.length + emitted >= self.limit), sampled.shape[1]
        where = self.length[:, None] + self.depth[:n]
        last = (emitted - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[-1])
        chosen = hidden.gather(1, last)[:, 0]  # [B D], the state that chose the last token
        rows = torch.arange(len(where), device=where.device)[:, None]
        result = nn.functional.pad(sampled, (HEADER, 0))
        column = torch.arange(result.shape[1], device=where.device)
        for i, part in enumerate((emitted, accepted, done)):  # cat: a kernel each
            result = torch.where(column == i, part[:, None], result)
        self.tokens[rows, where] = sampled  # beyond the new length: dead. scatter_ copies it all
        self.hidden.copy_(torch.where(emitted[:, None] > 0, chosen, self.hidden))
        self.length.add_(emitted)
        self.done.copy_(done)
        self.result[:, : HEADER + n].copy_(result)

    # what the host calls

    @torch.inference_mode()
    def prefill(self, rows: Sequence[int], requests: Sequence[Request]) -> None:
        """Put requests into rows. All of a prompt but its last token is cached: the next step
        starts at that token and chooses the first one of the answer."""
        prompts = [torch.tensor(request.prompt) for request in requests]
        starts = [
            self.cached_prefix(row, prompt) if request.goes_on else 0
            for row, prompt, request in zip(rows, prompts, requests, strict=True)
        ]
        self.set_rows(rows, requests, starts)
        together: list[tuple[int, Tensor]] = []
        for row, prompt, start in zip(rows, prompts, starts, strict=True):
            if start or len(prompt) > PREFILL_SIZES[-1]:
                self.prefill_rows([row], [prompt], start)
            else:
                together.append((row, prompt))
        together.sort(key=lambda pair: len(pair[1]))  # little padding
        while together:
            tokens = max(PREFILL_TOKENS, PREFILL_PER_ROW * self.batch_size)
            count = tokens // len(together[-1][1])
            group, prompts = zip(*together[-count:], strict=True)
            self.prefill_rows(group, prompts, 0)
            del together[-count:]

    def cached_prefix(self, row: int, prompt: Tensor) -> int:
        """How many first tokens of a prompt [P] the row's cache holds from the request before, at
        most P - 2: a hidden state is needed, too. Waits for the device, as nothing else here."""
        prompt = to_device(prompt[:-2], self.kv.device)
        n = len(prompt)
        held = torch.arange(n, device=prompt.device) < self.length[row] - 1
        return int((held & (self.tokens[row, :n] == prompt)).long().cumprod(0).sum())

    def set_rows(self, rows: Sequence[int], requests: Sequence[Request], starts: list[int]) -> None:
        """Sampling settings and limits of requests, into the state of their rows."""
        state: dict[str, Sequence] = {
            name: [getattr(request.params, name) for request in requests]
            for name in ("temperature", "top_p", "min_p", "top_k")
        }
        state["seed"] = [request.seed for request in requests]
        state["length"] = [start + 1 for start in starts]  # cached, should an interrupt end this
        ends = [len(r.prompt) + (r.params.max_tokens or self.max_seq_len) for r in requests]
        state["limit"] = [min(end, self.max_seq_len) for end in ends]
        pad = [-1] * MAX_STOP_IDS
        state["stop_ids"] = [(request.stop_ids + pad)[:MAX_STOP_IDS] for request in requests]
        where = to_device(torch.tensor(rows), self.kv.device)
        for name, values in state.items():
            buffer = getattr(self, name)
            buffer[where] = to_device(torch.tensor(values, dtype=buffer.dtype), buffer.device)

    def prefill_rows(self, rows: Sequence[int], prompts: Sequence[Tensor], start: int) -> None:
        """Cache prompts [P] from `start` but for their last tokens, and start their rows there.
        Only a row by itself may go on or be longer than a chunk."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        padded = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)  # [R P]
        where, lengths, tokens = (
            to_device(x, self.kv.device) for x in (torch.tensor(rows), lengths, padded)
        )
        self.tokens[where, : tokens.shape[1]] = tokens
        # The state that chose the last token. A prompt of one has none: its own serves to draft.
        before_last = (lengths - 2).clamp(min=0)
        tokens = tokens[:, : max(tokens.shape[1] - 1, 1)]
        self.hidden[where] = self.prefill_hidden(rows[0], where, tokens, start, before_last)
        self.length[where] = lengths
        self.done.index_fill_(0, where, False)

    def prefill_hidden(
        self, first: int, rows: Tensor, tokens: Tensor, start: int, last: Tensor
    ) -> Tensor:
        """Hidden states [R, D] at `last` [R] of tokens [R, P], cached in `rows` [R] from `start`.

        A compiled engine on a GPU pads one prompt to one of a few captured sizes; several, longer
        ones or one that goes on, and any other engine, run eagerly in chunks: no length compiles
        or captures anything.
        """
        R, P = tokens.shape
        for size, (graph, padded, row, index, hidden) in self.prefill_graphs.items():
            if size >= P and R == 1 and start == 0:
                padded[:, :P] = tokens
                row.copy_(rows)
                index.copy_(last)
                graph.replay()
                return hidden
        for at in range(start, P, PREFILL_SIZES[-1]):
            # A view: a row with anything cached is by itself.
            before = self.kv[:, :, first : first + 1, :, :at].expand(-1, -1, R, -1, -1, -1)
            chunk = tokens[:, at : at + PREFILL_SIZES[-1]]
            hidden = self.prefill_chunk(chunk, at, rows, before, last)
        return hidden

    def prefill_chunk(
        self, tokens: Tensor, start: int, rows: Tensor, before: Tensor, last: Tensor
    ) -> Tensor:
        """Cache prompt tokens [R, C] at `start` in `rows` [R], after the slots of `before`; hidden
        states [R, D] at position `last` [R], or of the chunk's end where that is beyond it."""
        R, C = tokens.shape
        positions = torch.arange(start, start + C, device=tokens.device).expand(R, -1)
        causal = torch.ones(C, C, dtype=torch.bool, device=tokens.device).tril()
        hidden, new_kv = self.model(tokens, positions, before, positions[:, 0], causal)
        self.kv[..., start : start + C, :].index_copy_(2, rows, new_kv)
        at = (last - start).clamp(max=C - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return hidden.gather(1, at)[:, 0]

    @torch.inference_mode()
    def capture_prefill(self) -> None:
        """Capture prompts of each padded size as CUDA graphs: (graph, tokens, row, index of the
        last token, hidden state there). Not compiled: that would double the start-up time for
        little."""
        no_cache = self.kv[:, :, :1, :, :0]
        for size in [size for size in PREFILL_SIZES if size <= self.kv.shape[-2]]:
            tokens, (row, last) = self.tokens.new_zeros(1, size), self.tokens.new_zeros(2, 1)
            self.prefill_chunk(tokens, 0, row, no_cache, last)  # warm-up
            graph = torch.cuda.CUDAGraph()
            # Not "global": NCCL's watchdog is another thread, and asks for events.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                hidden = self.prefill_chunk(tokens, 0, row, no_cache, last)
            self.prefill_graphs[size] = (graph, tokens, row, last, hidden)

    @torch.inference_mode()
    def step(self, noisy: bool, filtered: int) -> Packet:
        """One decode step of all rows; the packet holds what each emitted."""
        if self.compiled:
            self.compiled_step(None, noisy, filtered)
        else:
            self.decode_step(int(self.length.max()) - 1, noisy, filtered)
        return self.read_result()

    def warm_up(self, noisy: bool, filtered: int) -> None:
        """Compile and capture what a run needs, on a throwaway request in row 0."""
        if not self.compiled or (noisy, filtered) in self.warm:
            return
        if self.kv.is_cuda and not self.prefill_graphs:
            self.capture_prefill()
        params = SamplingParams(temperature=float(noisy), max_tokens=None)
        self.prefill([0], [Request([0], params, 0, [])])
        for _ in range(3):  # compile, capture, replay
            self.wait(self.step(noisy, filtered))
        self.stop_row(0)
        self.warm.add((noisy, filtered))

    @torch.inference_mode()
    def stop_row(self, row: int) -> None:
        """Freeze a row that the host has ended."""
        self.done[row] = True

    def read_result(self) -> Packet:
        """Start copying the last result to the host."""
        if self.result.device.type != "cuda":
            return self.result.clone(), None
        if not self.packets:
            buffer = torch.empty_like(self.result, device="cpu", pin_memory=True)
            self.packets.append((buffer, torch.cuda.Event()))
        buffer, event = self.packets.pop()
        buffer.copy_(self.result, non_blocking=True)
        event.record()
        return buffer, event

    def wait(self, packet: Packet) -> list[list[int]]:
        """The columns of a packet, once it has arrived: few lists, however many rows."""
        buffer, event = packet
        if event is not None:
            event.synchronize()
            self.packets.append(packet)
        return buffer.T.tolist()


# --- the host loop -----------------------------------------------------------------------------


@dataclass(slots=True)
class Progress:
    """What one step gave one request."""

    request: int
    tokens: list[int]
    accepted: int  # drafts among the tokens
    done: bool
    since_start: float  # seconds since the request's prefill began
    cancel: bool = False  # set by the consumer to end the request here


def decode_loop(
    engine: Engine, requests: Iterable[Request], needs: tuple[bool, int] | None = None
) -> Iterator[Progress]:
    """Run requests through the engine's rows, refilling a row when its request ends.

    On a GPU one launch is always queued behind the one whose result is read, so it never waits for
    the host. A result is for those whose rows they were when it was launched: what a row emits
    after its request ended is dropped.
    `requests` may be an iterator, read as rows come free, if `needs` says what `step_needs` would.
    """
    if engine.busy:
        raise ValueError("this engine is generating already; finish or close that stream first")
    noisy, filtered = needs or step_needs(r.params for r in requests)
    queue, free = enumerate(requests), list(range(engine.batch_size))
    running: dict[int, tuple[int, float]] = {}  # row -> (request, start)
    in_flight: deque[tuple[Packet, list[tuple[int, tuple[int, float]]]]] = deque()
    # Free rows to wait for: an eager prefill is bound by its launches, about as long as several
    # steps, up to PREFILL_TOKENS; a wide batch fills that better for a few idle rows.
    worth_it = max(engine.batch_size // 8, 1)
    engine.busy = True
    try:
        engine.warm_up(noisy, filtered)
        waiting = next(queue, None)
        while waiting or running:
            if waiting and len(free) >= worth_it:
                numbers, new = zip(waiting, *islice(queue, len(free) - 1), strict=True)
                waiting = next(queue, None)
                rows, free = free[: len(new)], free[len(new) :]
                start = time.perf_counter()
                running |= {row: (n, start) for row, n in zip(rows, numbers, strict=True)}
                engine.prefill(rows, new)
            in_flight.append((engine.step(noisy, filtered), list(running.items())))
            if len(in_flight) <= engine.ahead:
                continue
            packet, rows = in_flight.popleft()
            emitted, accepted, ended, *tokens = engine.wait(packet)
            now = time.perf_counter()
            for row, of in rows:
                if running.get(row) is not of:
                    continue
                (number, start), done = of, bool(ended[row])
                new = [column[row] for column in tokens[: emitted[row]]]
                progress = Progress(number, new, accepted[row], done, now - start)
                yield progress
                if progress.cancel and not done:
                    engine.stop_row(row)
                if progress.cancel or done:
                    del running[row]
                    free.append(row)
    finally:  # also when the consumer stops early
        engine.busy = False
        for row in running:
            engine.stop_row(row)
        for packet, *_ in in_flight:
            engine.wait(packet)


def step_needs(params: Iterable[SamplingParams]) -> tuple[bool, int]:
    """Whether the steps of these requests need noise, and which filters: 0 for none, 1 for those by
    probability, 2 for top-k, too."""
    noisy, filtered = False, 0
    for p in params:
        if p.temperature > 0:
            needed = 2 if p.top_k > 0 else int(p.top_p < 1 or p.min_p > 0)
            noisy, filtered = True, max(filtered, needed)
    return noisy, filtered


# --- text in, text out -------------------------------------------------------------------------


@dataclass
class CompletionOutput:
    """The answer to one prompt. finish_reason: "stop" (end id or stop string) or "length"."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    index: int = 0


@dataclass
class RequestOutput:
    """One prompt with its answer and what the decode steps did for it."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    request_id: str | int | None = None
    steps: int = 0  # decode steps
    accepted_per_head: list[int] = field(default_factory=list)  # of the tokens, one draft a step
    time_to_first_token: float = 0.0  # seconds
    decode_time: float = 0.0  # seconds, from the first step's end to the last one's
    decode_tokens: int = 0  # of those steps

    @property
    def tokens_per_step(self) -> float:
        return len(self.outputs[0].token_ids) / max(self.steps, 1)


class Answer:
    """Collects one request's tokens into text: decodes, cuts at stop strings, and holds back what
    may yet become one."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None, k: int):
        self.output = RequestOutput(request.text, request.prompt, [CompletionOutput()], request.id)
        self.output.accepted_per_head = [0] * k
        self.request, self.shown, self.cut = request, 0, False
        self.stream = tokenizer.stream(continues=not request.is_turn) if tokenizer else None

    def take(self, progress: Progress) -> str:
        """Add a step's tokens and return the text that is now certain; an ended request gets its
        finish_reason, and `progress.cancel` tells the loop."""
        self.count(progress)
        answer = self.output.outputs[0]
        for token in progress.tokens:
            answer.token_ids.append(token)
            if token in self.request.stop_ids:
                answer.finish_reason = "stop"
            elif self.stream:
                self.add_text(self.stream.push([token]))
            if answer.finish_reason:
                break
        else:
            answer.finish_reason = "length" if progress.done else None
        if answer.finish_reason and self.stream and not self.cut:
            self.add_text(self.stream.finish())
        progress.cancel = answer.finish_reason is not None
        held = 0 if progress.cancel else self.held_back(answer.text)
        end = max(len(answer.text) - held, self.shown)
        piece, self.shown = answer.text[self.shown : end], end
        return piece

    def count(self, progress: Progress) -> None:
        self.output.steps += 1
        if self.output.steps == 1:
            self.output.time_to_first_token = progress.since_start
        else:
            self.output.decode_time = progress.since_start - self.output.time_to_first_token
            self.output.decode_tokens += len(progress.tokens)
        for head in range(progress.accepted):
            self.output.accepted_per_head[head] += 1

    def add_text(self, piece: str) -> None:
        answer, stops = self.output.outputs[0], self.request.params.stop
        start = max(0, len(answer.text) - max(map(len, stops), default=0))
        answer.text += piece
        found = [at for stop in stops if (at := answer.text.find(stop, start)) >= 0]
        if found:
            answer.text, answer.finish_reason, self.cut = answer.text[: min(found)], "stop", True

    def held_back(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        stops = self.request.params.stop
        for n in range(max(map(len, stops), default=1) - 1, 0, -1):
            if any(stop.startswith(text[-n:]) for stop in stops if len(text) >= n):
                return n
        return 0


class PackedLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN's kernels read it: in float32 two to three times
    as fast as nn.Linear for the 2 to 8 rows of a verification, somewhat faster for one row. `size`:
    the weight's numbers and bytes."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.size = linear.weight.numel(), linear.weight.nbytes
        # Without a hint of the rows to come: the layout for one row would be slow for more.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")


class HalfLinear(nn.Module):
    """A linear layer whose weight is in float16, all else in float32: half the bytes to read."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.size = linear.weight.numel(), linear.weight.nbytes // 2
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16.default(x, self.packed)


class ByteLinear(nn.Module):
    """A linear layer for drafts: its weight in int8 with a scale for each row, the input of a call
    in 7 bits. Half the bytes of float16, in half the time or less; drafts are as good."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, (rows, _) = linear.weight, linear.weight.shape
        self.size = weight.numel(), weight.numel() + 4 * rows
        scale = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny).double()
        zero = torch.zeros(rows, dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated since torch 2.13
            quantised = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantised, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nan_to_num(x)  # which it would not take, while a draft may be anything
        return torch.ops.quantized.linear_dynamic.default(x, self.packed, True)


class BriefNorm(nn.Module):
    """A norm of root mean squares in five operations: on a CPU torch's own is made of a dozen, and
    for few rows each takes the same time however little it does."""

    def __init__(self, norm: nn.RMSNorm | LayerNorm):
        super().__init__()
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        self.eps = torch.tensor(norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self.eps, size, size, value=1 / x.shape[-1]).rsqrt_()
        x = x * scale
        if self.bias is not None:
            return torch.addcmul(self.bias, x, self.weight)
        return x if self.weight is None else x.mul_(self.weight)


def pack_linears(module: nn.Module, exact: bool) -> None:
    """Replace every linear layer and norm below a module, one at a time: each frees its weight.
    That of a linear layer is kept in 8 bits, or if it is to be `exact` in float16 where that holds
    it exactly, as it does if it is the checkpoint's type."""
    for name in [name for name, _ in module.named_children()]:
        child = getattr(module, name)
        if isinstance(child, nn.RMSNorm | LayerNorm):
            setattr(module, name, BriefNorm(child))
        elif not isinstance(child, nn.Linear):
            pack_linears(child, exact)
        elif not exact and hasattr(torch, "quantize_per_channel"):  # a later torch may have none
            setattr(module, name, ByteLinear(child))
        else:
            half = not exact or (child.weight.half() == child.weight).all()
            setattr(module, name, HalfLinear(child) if half else PackedLinear(child))


def packs_linears(device: torch.device, dtype: torch.dtype, compiled: bool) -> bool:
    """Whether to pack: float32 on x86 is what was measured to gain, and torch.compile takes packed
    weights from its own hands only. Not every build of torch has oneDNN."""
    eager = device.type == "cpu" and dtype == torch.float32 and not compiled
    x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return eager and x86 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class LLM:
    """A target model, its speculator and its tokenizer, ready to generate.

    model: a directory, or a hub id (whose needed files are fetched). speculative_config: None, or
    {"model": directory or hub id, "method": "mlp_speculator", "num_speculative_tokens": int,
    "revision": str, "tree": int, "top_k_tokens_per_head": list of int, "draft_dtype": "auto" or
    "int8", "draft_tensor_parallel_size": int}, all but "model" optional; "tree" is how many nodes a
    step verifies, 0 for a chain (unset: on one GPU 16 for one row, 8 for up to four, else a chain),
    of which a CPU takes what is likely, for one row with other likely tokens in place of one;
    int8 keeps its matrices in 8 bits where a GPU's steps are compiled, as those stored so are for
    one row. dtype "auto" is float16 or bfloat16 on a GPU, as the checkpoint says; on a CPU float32,
    or bfloat16 if it has instructions for that and the weights are stored in it. `compile` None
    means: on a GPU. tensor_parallel_size GPUs share the target, and the speculator too where its
    own size (1, if not given) is the same. Raises ValueError for what does not fit before reading
    weights; `load=False` leaves these to a later `load()`, so that prompts can be checked first,
    too.
    """

    engine_class = Engine

    def __init__(
        self,
        model: str | Path,
        speculative_config: dict | None = None,
        *,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        batch_size: int = 1,
        max_seq_len: int | None = None,
        compile: bool | None = None,
        revision: str | None = None,
        tensor_parallel_size: int = 1,
        load: bool = True,
    ):
        self.device = choose_device(device)
        self.directory = local_checkpoint(model, revision)
        config = read_json(self.directory / "config.json")
        with naming(self.directory):  # the speculator has a config.json, too
            self.args = ModelArgs.from_config(config)
        self.tokenizer = load_tokenizer(self.directory)
        self.end_ids = end_of_sequence_ids(self.directory, config, self.tokenizer)
        self.dtype = choose_dtype(dtype, config, self.device, self.directory)
        if max_seq_len is None:
            max_seq_len = min(self.args.max_position, DEFAULT_MAX_SEQ_LEN)
        if not (is_integer(batch_size, 1) and is_integer(max_seq_len, 2)):
            raise ValueError(
                f"batch_size {batch_size} or max_seq_len {max_seq_len} is out of range: "
                "at least 1 row and 2 tokens"
            )
        if max_seq_len > self.args.max_position:
            raise ValueError(
                f"max_seq_len {max_seq_len} exceeds the model's context of {self.args.max_position}"
            )
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        self.compiled = self.device.type == "cuda" if compile is None else compile
        one_gpu = self.device.type == "cuda" and tensor_parallel_size == 1 and self.compiled
        usual = (nodes for rows, nodes in TREES if one_gpu and batch_size <= rows)
        self.usual_tree = next(usual, 0)
        self.speculator_dir, self.speculator_args, self.k = None, None, 0
        self.tree, self.top_k_tokens_per_head = 0, ()
        if speculative_config is not None:
            self.speculator_dir, self.speculator_args, self.k = read_speculative_config(
                speculative_config, self.args, self.directory
            )
            self.tree, self.top_k_tokens_per_head = read_tree(
                speculative_config, self.speculator_args, self.k, self.usual_tree
            )
            self.k = min(self.k, self.tree - 1) if self.tree else self.k
        self.draft_dtype = (speculative_config or {}).get("draft_dtype", "auto")
        if self.draft_dtype not in ("auto", "int8"):
            raise ValueError(f"draft_dtype {self.draft_dtype!r} is not supported: auto, int8")
        if self.draft_dtype == "int8" and self.device.type != "cuda":
            raise ValueError("draft_dtype int8 needs a GPU, whose kernels read it; leave it out")
        self.tensor_parallel_size = tensor_parallel_size
        self.draft_parallel_size = (speculative_config or {}).get("draft_tensor_parallel_size", 1)
        check_parallel_sizes(tensor_parallel_size, self.draft_parallel_size, self.device)
        self.local_args = self.args
        if tensor_parallel_size > 1:
            import tp  # only where there is something to share

            self.local_args = tp.local_args(self.args, tensor_parallel_size)
            if self.k:
                tp.check_draft(self.speculator_args, self.draft_parallel_size)
        self.packed = packs_linears(self.device, self.dtype, self.compiled)
        cache_shape = kv_cache_shape(self.local_args, batch_size, max_seq_len + self.k + 1)
        models = self.local_args, self.speculator_args if self.k else None
        where = self.dtype, self.device, self.packed
        check_memory(*models, cache_shape, *where, self.draft_parallel_size)
        self.engine: Engine | None = None
        if load:
            self.load()

    def load(self, ranks=None) -> None:
        """Read the weights and build the engine, on this device or on those of `ranks`, which are
        started here if there are to be several and none are given."""
        if ranks is None and self.tensor_parallel_size > 1:
            import tp

            ranks = tp.start(self.tensor_parallel_size)
            weakref.finalize(self, ranks.close)
        self.ranks = ranks
        if ranks is None:
            self.load_weights()
        else:
            ranks.load(self)

    def load_weights(self, ranks=None) -> None:
        """Build this process's engine."""
        self.engine = self.new_engine(*self.read_weights(ranks), ranks)
        if self.packed:
            pack_linears(self.engine.model, exact=True)
            if self.k:
                pack_linears(self.engine.speculator, exact=False)
                self.engine.speculator.gelu = "tanh"  # drafts are as good; "none" takes 80 us more
        if ranks is not None:
            ranks.connect(self.engine)

    def read_weights(self, ranks) -> tuple[Transformer, MLPSpeculator | None]:
        where = (self.device, self.dtype)
        target_part, draft_part = ({}, {}) if ranks is None else ranks.parts(self)
        target = load_model(self.directory, *where, progress("target"), **target_part)
        speculator = None
        if self.k:
            bar = progress("speculator")
            speculator = load_speculator(self.speculator_dir, *where, bar, **draft_part)
        return target, speculator

    def new_engine(self, target: Transformer, speculator: MLPSpeculator | None, ranks) -> Engine:
        return self.engine_class(
            target,
            speculator,
            batch_size=self.batch_size,
            max_seq_len=self.max_seq_len,
            num_draft_tokens=self.k,
            tree=self.tree,
            top_k_tokens_per_head=self.top_k_tokens_per_head,
            compiled=self.compiled,
            # Unasked for one row only: more take longer from 8 bits.
            eight_bit_draft=self.draft_dtype == "int8"
            or (self.batch_size == 1 and self.k > 0 and speculator.eight_bit),
            ranks=ranks,
            draft_ranks=ranks if self.k and self.draft_parallel_size > 1 else None,
        )

    def generate(
        self,
        prompts: str | list[str] | list[int] | list[list[int]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts. A prompt is text or a list of token ids."""
        return list(in_order(self.stream(prompts, sampling_params)))

    def stream(
        self,
        prompts: str | list[str] | list[int] | list[list[int]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, str, RequestOutput | None]]:
        """As `generate`, piece by piece: (index of the prompt, new text, output when finished).

        All requests are checked by the call itself, before any of them runs.
        """
        pairs = with_params(as_prompt_list(prompts), sampling_params)
        return self.run([self.request(p, s, f"prompt {i}") for i, (p, s) in enumerate(pairs)])

    def chat(
        self,
        messages: list[dict] | list[list[dict]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """The next turn of one conversation, or of each of several, by the chat template.

        A conversation is a list of {"role": ..., "content": ...}. Where it is the only one of the
        call, what the cache holds of its turns so far is not computed again.
        """
        return list(in_order(self.chat_stream(messages, sampling_params)))

    def chat_stream(
        self,
        messages: list[dict] | list[list[dict]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, str, RequestOutput | None]]:
        """As `chat`, piece by piece like `stream`."""
        pairs = with_params(as_conversation_list(messages), sampling_params)
        requests = [self.chat_request(c, s, f"conversation {i}") for i, (c, s) in enumerate(pairs)]
        return self.run([replace(r, goes_on=len(requests) == 1) for r in requests])

    def run(self, requests: Iterable[Request], needs: tuple[bool, int] | None = None) -> Iterator:
        """Text of requests; see `stream` for what it yields and `decode_loop` for `needs`."""
        if self.engine is None:
            raise ValueError("the weights are not loaded: call load() first")
        requests = requests if needs else list(requests)  # looked at before they are taken
        answers: dict[int, Answer] = {}

        def taken() -> Iterator[Request]:
            for number, request in enumerate(requests):
                answers[number] = Answer(request, self.tokenizer, self.k)
                yield request

        needs = needs or step_needs(r.params for r in requests)
        for progress in decode_loop(self.engine, taken(), needs):
            answer = answers[progress.request]
            piece = answer.take(progress)
            if progress.cancel:
                del answers[progress.request]
            yield progress.request, piece, answer.output if progress.cancel else None

    def request(self, prompt: str | list[int], params: SamplingParams, name: str) -> Request:
        """Checked prompt ids, seed and end ids for the prompt that errors call by this name."""
        text = prompt if isinstance(prompt, str) else None
        if text is not None:
            if self.tokenizer is None:
                raise ValueError("this checkpoint has no tokenizer files: give token ids, not text")
            prompt = self.tokenizer.encode(text)
        if params.stop and self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer files: stop strings need one")
        vocab, room = self.args.vocab_size, self.max_seq_len
        if not is_list(prompt):
            raise ValueError(f"{name} is neither text nor token ids: {prompt!r}")
        if not prompt:
            raise ValueError(f"{name} is empty")
        if bad := [t for t in prompt if not is_integer(t, 0, vocab - 1)]:
            raise ValueError(f"{name}: {bad[0]!r} is not a token id of 0..{vocab - 1}")
        if len(prompt) >= room:
            raise ValueError(
                f"{name} has {len(prompt)} tokens, and max_seq_len {room} leaves no room "
                f"for an answer"
            )
        ends = [] if params.ignore_eos else list(self.end_ids)
        ends = sorted({*ends, *params.stop_token_ids})
        if len(ends) > MAX_STOP_IDS:
            raise ValueError(
                f"{name}: {len(ends)} end ids; at most {MAX_STOP_IDS} are supported, the model's "
                "own among them: give fewer stop_token_ids"
            )
        seed = secrets.randbits(63) if params.seed is None else params.seed % 2**63
        return Request(list(prompt), params, seed, ends, text=text)

    def chat_request(self, messages: list[dict], params: SamplingParams, name: str) -> Request:
        """The next turn of a conversation as `request` gives it."""
        check_messages(messages, name)
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer files: give token ids, not messages")
        text = self.tokenizer.apply_chat_template(messages)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return replace(self.request(ids, params, name), text=text, is_turn=True)


DEFAULT_MAX_SEQ_LEN = 8192


def as_prompt_list(prompts) -> list:
    """One prompt or several, each text or token ids (also as tensors or arrays), as a list."""
    prompts = as_number(prompts)
    if isinstance(prompts, Mapping | bytes) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts are neither text nor token ids: {prompts!r}")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    prompts = [as_number(p) for p in prompts]
    prompts = [[as_number(t) for t in p] if is_list(p) else p for p in prompts]
    return [prompts] if prompts and is_integer(prompts[0], -(2**63), 2**63) else prompts


def as_conversation_list(messages) -> list:
    """One conversation or several as a list."""
    if not isinstance(messages, Iterable):
        raise ValueError(f"messages are no list but {messages!r}")
    messages = list(messages)
    return [messages] if messages and isinstance(messages[0], dict) else messages


def check_messages(messages, name: str) -> None:
    if not is_list(messages):
        raise ValueError(f"{name} is not a list of messages but {type(messages).__name__}")
    if not messages:
        raise ValueError(f"{name} has no messages")
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise ValueError(f"{name}: message {i} has no {key} that is text")


def with_params(prompts: list, params: SamplingParams | list[SamplingParams] | None) -> list[tuple]:
    """Each prompt with its own settings, or with those of all."""
    params = SamplingParams() if params is None else params
    params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    if not is_list(params) or not all(isinstance(p, SamplingParams) for p in params):
        raise ValueError(f"expected SamplingParams, or a list of them; found {params!r}")
    if len(params) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(params)} SamplingParams")
    return list(zip(prompts, params, strict=True))


def in_order(stream: Iterator) -> Iterator[RequestOutput]:
    """Outputs of a stream in the order of their prompts, each as soon as it is its turn."""
    finished: dict[int, RequestOutput] = {}
    turn = 0
    for index, _, output in stream:
        if output is not None:
            finished[index] = output
        while turn in finished:
            yield finished.pop(turn)
            turn += 1


CHECKPOINT_FILES = [
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("tokenizer.model", "original/tokenizer.model", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
    *("model.safetensors", "model-*.safetensors"),
]
BIN_FILES = ["pytorch_model.bin.index.json", "pytorch_model*.bin"]


def local_checkpoint(name: str | Path, revision: str | None = None) -> Path:
    """The directory itself, or the snapshot of a hub id: only the files that are used, among them
    pytorch_model.bin where there is no model.safetensors."""
    if not isinstance(name, str | Path) or not str(name):
        raise ValueError(f"{name!r} is neither a directory nor a hub id (owner/name)")
    if (path := Path(name).expanduser()).is_dir():
        if revision is not None:
            raise ValueError(f"{name} is a directory here: a revision ({revision}) means nothing")
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise ValueError(f"{name}: no such directory, and not a hub id (owner/name)")
    path = fetch(str(name), revision, CHECKPOINT_FILES)
    if any(path.glob("model*.safetensors")):
        return path
    return fetch(str(name), revision, CHECKPOINT_FILES + BIN_FILES)


def fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The snapshot of a hub id, with the files of these patterns."""
    try:
        path = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as error:  # network, permission and naming errors have many types there
        reason = one_line(error)
        raise ValueError(f"{name}: no such directory, and the hub said: {reason}") from None
    return Path(path)


def one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def end_of_sequence_ids(directory: Path, config: dict, tokenizer: Tokenizer | None) -> set[int]:
    """Every id by which the checkpoint says an answer ends: a chat model's turn often ends with
    another one than config.json names."""
    ids = set(tokenizer.eos_ids if tokenizer else ())
    sources = {"config.json": config}
    if (path := directory / "generation_config.json").exists():
        sources[path.name] = read_json(path)
    for name, source in sources.items():
        found = source.get("eos_token_id")
        found = found if isinstance(found, list) else [] if found is None else [found]
        if bad := [id for id in found if not is_integer(id, 0)]:
            raise ValueError(f"{directory / name}: eos_token_id {bad[0]!r} is not a token id")
        ids |= set(found)
    return ids


def choose_device(name: str | torch.device | None) -> torch.device:
    """The device for a --device name, made current; None: CUDA where there is one."""
    name = str(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device {name!r} is not supported; supported: cpu, cuda, cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        index, count = device.index or 0, torch.cuda.device_count()
        if index >= count:
            raise ValueError(f"device {name}: torch {torch.__version__} finds {count} CUDA GPUs")
        torch.cuda.set_device(index)
    return device


def choose_dtype(name: str, config: dict, device: torch.device, directory: Path) -> torch.dtype:
    """The torch dtype for a --dtype name; see LLM for "auto"."""
    named = {d: getattr(torch, d) for d in ("float32", "float16", "bfloat16")}
    if name in named:
        return named[name]
    if name != "auto":
        raise ValueError(f"dtype {name!r} is not supported; supported: auto, {', '.join(named)}")
    stored = config.get("torch_dtype") or config.get("dtype")
    if device.type == "cuda":
        return torch.float16 if stored == "float16" else torch.bfloat16
    # Weights stored in float16 are read as such in a float32 step (HalfLinear), which is faster.
    for file in sorted(directory.glob("model*.safetensors"))[:1]:
        with suppress(OSError, SafetensorError, StopIteration), safe_open(file, "pt") as tensors:
            stored = tensors.get_slice(next(iter(tensors.keys()))).get_dtype()
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native and stored in ("BF16", "bfloat16") else torch.float32


def read_speculative_config(
    config: dict, target: ModelArgs, target_dir: Path
) -> tuple[Path, SpeculatorArgs, int]:
    """Directory, args and tokens to draft of the speculator, checked against the target."""
    if not isinstance(config, dict):
        raise ValueError(f"speculative_config {config!r} is not a dict with the key model")
    known = ("model", "method", "num_speculative_tokens", "tree", "top_k_tokens_per_head")
    known = (*known, "draft_dtype", "draft_tensor_parallel_size", "revision")
    if unknown := [key for key in config if key not in known]:
        raise ValueError(
            f"speculative_config: {unknown[0]} is not supported; supported: {', '.join(known)}"
        )
    if (method := config.get("method", "mlp_speculator")) != "mlp_speculator":
        raise ValueError(f"speculative_config: method {method!r} is not 'mlp_speculator'")
    if not config.get("model"):
        raise ValueError("speculative_config: model is missing")
    directory = local_checkpoint(config["model"], config.get("revision"))
    stored = read_json(directory / "config.json")
    with naming(directory):
        args = SpeculatorArgs.from_config(stored)
    for what, ours, theirs in (
        ("hidden width", args.emb_dim, target.dim),
        ("vocabulary", args.vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            named = f"; it names {args.base_model} as its target" if args.base_model else ""
            raise ValueError(
                f"speculator {directory} expects {what} {ours}, "
                f"target {target_dir} has {theirs}{named}"
            )
    k = config.get("num_speculative_tokens")
    k = args.n_predict if k is None else k
    if not is_integer(k, 0, args.n_predict):
        raise ValueError(
            f"cannot draft {k!r} tokens: speculator {directory} has {args.n_predict} heads"
        )
    return directory, args, k


def check_parallel_sizes(size: int, draft_size: int, device: torch.device) -> None:
    if not is_integer(size, 1):
        raise ValueError(f"tensor_parallel_size {size!r} is not a number of devices")
    if draft_size not in (1, size):
        raise ValueError(
            f"draft_tensor_parallel_size {draft_size!r}: supported are 1 and "
            f"tensor_parallel_size {size}"
        )
    if device.type == "cuda" and size > (count := torch.cuda.device_count()):
        raise ValueError(
            f"tensor_parallel_size {size} needs as many GPUs; torch {torch.__version__} "
            f"finds {count}"
        )


MOST_NODES = 64
# Up to how many rows on one GPU a tree, of how many nodes, is verified where none is asked for: the
# fastest with the demo's model, but for four greedy rows, which gain a little more with 16.
TREES = ((1, 16), (4, 8))


def read_tree(
    config: dict, speculator: SpeculatorArgs, k: int, usual: int
) -> tuple[int, tuple[int, ...]]:
    """Nodes of a step's tree, 0 for a chain, and the children that each of k heads proposes.
    `usual`: how many nodes where none are asked for, if there can be more than a chain has."""
    tree, top_k = config.get("tree"), config.get("top_k_tokens_per_head")
    asked, tree = tree is not None, usual if tree is None else tree
    if not (is_integer(tree, 0, MOST_NODES) and tree != 1):
        raise ValueError(f"tree must be 0 (a chain) or 2 to {MOST_NODES} nodes, found {tree!r}")
    if top_k is not None and not tree:
        raise ValueError("top_k_tokens_per_head means nothing for a chain: give tree, too")
    top_k = list(speculator.top_k_tokens_per_head)[:k] if top_k is None else top_k
    most = speculator.draft_vocab_size or speculator.vocab_size
    if not is_list(top_k) or len(top_k) != k or not all(is_integer(n, 1, most) for n in top_k):
        raise ValueError(
            f"top_k_tokens_per_head must be {k} integers of 1 to {most}, one for each token that "
            f"is drafted in a row; found {top_k!r}"
        )
    width, nodes = 1, 1  # at one depth, in all
    for n in top_k:
        width *= n
        nodes += width
    chain = k == 0 or (not asked and (nodes == k + 1 or tree <= k))
    return 0 if chain else min(tree, nodes), tuple(top_k)


def check_memory(
    target: ModelArgs,
    speculator: SpeculatorArgs | None,
    cache_shape,
    dtype,
    device,
    packed: bool,
    draft_parallel_size: int = 1,
) -> None:
    """Refuse what cannot fit into the GPU's free memory or the host's whole memory, before
    weights are read. Packed, an output layer no longer shares the embedding table."""
    with torch.device("meta"):
        modules = [(Transformer(target), 1)]
        if speculator:
            modules.append((MLPSpeculator(speculator).filled(), draft_parallel_size))
    weights = sum(
        p.numel() * dtype.itemsize // devices
        for module, devices in modules
        for _, p in module.named_parameters(remove_duplicate=not packed)
    )
    cache = math.prod(cache_shape) * dtype.itemsize
    if device.type == "cuda":
        gc.collect()  # an engine that went out of use may still hold its cache
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = torch.cuda.mem_get_info(device)[0] + idle
    elif hasattr(os, "sysconf"):
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if weights + cache > room:
        raise ValueError(
            f"weights of {weights / 1e9:.1f} GB and a KV cache of {cache / 1e9:.1f} GB do not fit "
            f"into {room / 1e9:.1f} GB; max_seq_len and batch_size decide the cache's size"
        )


def progress(what: str):
    """A progress bar around the tensor names of a load, on a terminal only."""
    return partial(tqdm, desc=f"loading {what}", unit="tensor", leave=False, disable=None)


# --- command line ------------------------------------------------------------------------------

DEFAULT_PROMPT = "What is gravity?"
DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the demo checkpoint is called on the hub
BUNDLED = Path(__file__).parent / "speculators" / "SmolLM2-135M-Instruct"  # its speculator

# The published accelerators by the name of their repository (whose owner has changed), and the
# target each was trained for: several configs do not say it.
TARGETS = {
    "llama-13b-accelerator": "meta-llama/Llama-2-13b-chat-hf",
    "llama2-70b-accelerator": "meta-llama/Llama-2-70b-chat-hf",
    "llama3-8b-accelerator": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3-70b-accelerator": "meta-llama/Meta-Llama-3-70B-Instruct",
    "codellama-34b-accelerator": "codellama/CodeLlama-34b-Instruct-hf",
    "granite-3b-code-instruct-accelerator": "ibm-granite/granite-3b-code-instruct",
    "granite-7b-instruct-accelerator": "ibm-granite/granite-7b-instruct",
    "granite-8b-code-instruct-accelerator": "ibm-granite/granite-8b-code-instruct",
    "granite-20b-code-instruct-accelerator": "ibm-granite/granite-20b-code-instruct",
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastspec.py",
        description="Generate text with an MLP speculator. Without a model: the demo and its own.",
    )
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--checkpoint", help="target model: directory or hub id; unset: the speculator's, or demo")
    add("--revision", help="revision of a target from the hub")
    add("--speculator", help="directory or hub id; unset: the demo's, or none for a --checkpoint")
    add("--speculator-revision", help="revision of a speculator from the hub")
    add("--num-draft-tokens", type=int, help="tokens drafted per step; 0: none; unset: all heads")
    tree = "verify a tree of N nodes per step; 0: a chain; unset: on a GPU 16, up to 4 rows 8"
    add("--tree", type=int, metavar="N", help=tree)
    add("--draft-dtype", choices=["int8"], help="keep the speculator's matrices in 8 bits (GPU)")
    add("--top-k-tokens-per-head", type=integers, metavar="4,3,..", help="children in a tree")
    add("--prompt", nargs="+", help="one or more texts; with --interactive the first turns")
    add("--prompts", metavar="FILE", help="JSON lines with prompt or messages, and sampling fields")
    add("--output", metavar="FILE", help="where the answers to --prompts go, as JSON lines")
    add("--interactive", action="store_true", help="a conversation at the terminal")
    add("--max-new-tokens", type=int, default=256, help="tokens per answer (256)")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top-k", type=int, default=0, help="0, the default, keeps all")
    add("--top-p", type=float, default=1.0, help="1, the default, keeps all")
    add("--min-p", type=float, default=0.0, help="0, the default, keeps all")
    add("--seed", type=int, help="same seed, same text; unset: a fresh one")
    add("--stop", nargs="+", help="strings that end an answer")
    add("--draft-tensor-parallel-size", type=int, help="ranks that share the speculator (1)")
    add("--batch-size", type=int, help="rows decoded together; unset: as many as needed, up to 8")
    add("--max-seq-len", type=int, help="prompt + answer; unset: the model's, at most 8192")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--device", help="unset: cuda if there is one, else cpu")
    add("--compile", action=flag, help="unset: on a GPU")
    add("--chat", action=flag, help="use the chat template; unset: where there is one")
    add("--profile", metavar="FILE", help="write a Chrome trace of the generation")
    args = parser.parse_args(argv)
    if not args.checkpoint and not args.speculator and BUNDLED.is_dir():
        args.speculator = os.path.relpath(BUNDLED)
    return args


def integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        message = f"{text!r} is no list of integers, such as 4,3,2"
        raise argparse.ArgumentTypeError(message) from None


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    ranks = join_torchrun()
    try:
        args = parse_arguments(argv)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal may lack an answer's character
        run(args, ranks)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"fastspec: {one_line(error)}", file=sys.stderr)
        return 1
    finally:
        if ranks is not None:
            ranks.close()
    return 0


def join_torchrun(build: Callable[..., LLM] = LLM):
    """Under torchrun: rank 0's view of all ranks. The others do what it announces, and end here."""
    if not torch.distributed.is_torchelastic_launched():
        return None
    import tp

    ranks = tp.join()
    if ranks.rank:
        tp.follow(ranks, build)
    return ranks


def end(code: int) -> None:
    """Exit; under torchrun at once, as CUDA graphs that hold collectives may delay it for ever."""
    if not torch.distributed.is_torchelastic_launched():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(args: argparse.Namespace, ranks=None) -> None:
    params = SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop=args.stop,
        max_tokens=args.max_new_tokens,
    )
    check_options(args)
    llm = llm_without_weights(args, 1 if ranks is None else ranks.size)
    chat, needs, bad = uses_chat(llm.tokenizer, args), step_needs([params]), 0
    if args.prompts:
        good, bad, needs = check_file(llm, args.prompts, params, chat)
        rows = (row for _, row in read_rows(llm, args.prompts, params, chat))
        stream = llm.run((row for row in rows if isinstance(row, Request)), needs)
        outputs = write_answers(args.output, in_order(stream), good)
    elif args.interactive:
        outputs = converse(llm, params, args.prompt or [])
    else:
        texts = args.prompt or [DEFAULT_PROMPT]
        named = ((text, f"prompt {i}") for i, text in enumerate(texts))
        requests = [prompt_request(llm, text, params, chat, name) for text, name in named]
        outputs = show(llm.run(requests), texts)
    llm.load(ranks)
    if not llm.k:
        print("fastspec: no speculator: plain decoding, one token per step", file=sys.stderr)
    if llm.compiled:
        print("fastspec: compiling the decode step, about a minute unless cached", file=sys.stderr)
    llm.engine.warm_up(*needs)
    with torch.profiler.profile() if args.profile else nullcontext() as trace:
        speculator = args.speculator if llm.k else None
        text = summary(outputs, speculator, llm.tokenizer, not args.interactive)
    print(text, file=sys.stderr)
    if trace:
        trace.export_chrome_trace(args.profile)
    if bad:
        raise ValueError(f"{args.prompts}: {bad} of {good + bad} rows were not run")


def check_options(args: argparse.Namespace) -> None:
    """Refuse what does not go together, and files that could not be written after the run."""
    if args.revision and not args.checkpoint:
        raise ValueError("--revision needs --checkpoint")
    needing = ("num_draft_tokens", "speculator_revision", "tree", "top_k_tokens_per_head")
    needing = (*needing, "draft_dtype", "draft_tensor_parallel_size")
    if given := [name for name in needing if getattr(args, name) and not args.speculator]:
        raise ValueError(f"--{given[0].replace('_', '-')} needs --speculator")
    if bool(args.prompts) != bool(args.output):
        raise ValueError("--prompts and --output need each other")
    if args.prompts and (args.prompt or args.interactive):
        raise ValueError("--prompts goes without --prompt and --interactive")
    if args.interactive and args.chat is False:
        raise ValueError("--interactive needs the chat template: leave out --no-chat")
    if args.prompts:
        check_is_file(args.prompts)
    if args.output and os.path.isfile(args.output) and os.path.getsize(args.output):
        raise ValueError(f"{args.output}: not empty; name another file, or delete this one")
    for file in (args.output, args.profile):
        if file:
            open(file, "a").close()


def check_is_file(path: str) -> None:
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file (it is read twice, so a pipe will not do)")


def llm_without_weights(args: argparse.Namespace, devices: int) -> LLM:
    speculative, target = None, args.checkpoint
    if args.speculator:
        speculative = {"model": args.speculator, "revision": args.speculator_revision}
        speculative["num_speculative_tokens"] = args.num_draft_tokens
        speculative["draft_tensor_parallel_size"] = args.draft_tensor_parallel_size or 1
        speculative["tree"] = args.tree
        speculative["top_k_tokens_per_head"] = args.top_k_tokens_per_head
        speculative["draft_dtype"] = args.draft_dtype or "auto"
        target = target or target_of(args.speculator, args.speculator_revision)
    target = demo_checkpoint() if target is None else target
    rows = 1 if args.interactive else min(len(args.prompt or [""]), 8)
    if args.prompts:
        with open(args.prompts, "rb") as lines:
            rows = max(1, len(list(islice(filter(bytes.strip, lines), 8))))
    return LLM(
        target,
        speculative,
        dtype=args.dtype,
        device=args.device,
        batch_size=rows if args.batch_size is None else args.batch_size,
        max_seq_len=args.max_seq_len,
        compile=args.compile,
        revision=args.revision,
        tensor_parallel_size=devices,
        load=False,
    )


def target_of(speculator: str, revision: str | None) -> str | Path:
    """The target that a speculator's config names, or that is known by the speculator's name; of
    the demo's the demo checkpoint."""
    config = read_json(local_checkpoint(speculator, revision) / "config.json")
    if (kind := config.get("model_type")) != "mlp_speculator":
        raise ValueError(f"{speculator}: its model_type is {kind!r}, that of no speculator")
    target = config.get("base_model_name_or_path") or TARGETS.get(Path(speculator).name)
    if not isinstance(target, str):
        raise ValueError(f"{speculator}: its config.json does not name a target; give --checkpoint")
    print(f"fastspec: the target is {target}, which {speculator} is for", file=sys.stderr)
    return demo_checkpoint() if target == DEMO else target


def demo_checkpoint() -> Path:
    import demo  # its packages are an optional extra

    try:
        return demo.prepare()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


# one prompt or several


def uses_chat(tokenizer: Tokenizer | None, args: argparse.Namespace) -> bool:
    """Whether prompts go through the chat template."""
    if tokenizer is not None and tokenizer.chat_template is not None:
        return args.chat is not False
    if args.chat or args.interactive:
        advice = "use --no-chat" if args.chat else "--interactive needs one"
        raise ValueError(f"this checkpoint has no chat template; {advice}")
    return False


def prompt_request(
    llm: LLM, prompt: str | list[int], params: SamplingParams, chat: bool, name: str
) -> Request:
    """The request of a prompt: token ids, or a text that `chat` makes a user's turn."""
    if chat and isinstance(prompt, str):
        return llm.chat_request([{"role": "user", "content": prompt}], params, name)
    return llm.request(prompt, params, name)


def show(stream: Iterator, prompts: list[str]) -> Iterator[RequestOutput]:
    """Print one answer as it comes, several in the order of their prompts."""
    if len(prompts) > 1:
        for prompt, output in zip(prompts, in_order(stream), strict=True):
            print(f">>> {prompt}\n{output.outputs[0].text}\n", flush=True)
            yield output
        return
    for _, piece, output in stream:
        print(piece, end="" if output is None else "\n", flush=True)
        if output is not None:
            yield output


# files of prompts


def check_file(
    llm: LLM, path: str, params: SamplingParams, chat: bool
) -> tuple[int, int, tuple[bool, int]]:
    """How many rows can be run, how many not (which are reported), and what their steps need."""
    good, bad, needs = 0, 0, set()
    for line, row in read_rows(llm, path, params, chat):
        if isinstance(row, Request):
            good += 1
            needs.add(step_needs([row.params]))
        else:
            bad += 1
            print(f"fastspec: {path}:{line}: {row}", file=sys.stderr)
    if not good:
        raise ValueError(f"{path}: no row to run")
    return good, bad, tuple(map(max, zip(*needs, strict=True)))


def read_rows(
    llm: LLM, path: str, params: SamplingParams, chat: bool
) -> Iterator[tuple[int, Request | str]]:
    """Line number of every row, with its request or what is wrong with it."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = read_row(llm, line, number, params, chat)
                except (ValueError, RecursionError) as error:
                    row = one_line(error)
                yield number, row


def row_of(line: bytes) -> dict:
    """A row of JSON with either prompt or messages."""
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    if ("prompt" in row) == ("messages" in row):
        raise ValueError("expected either prompt or messages")
    return row


def as_request(llm: LLM, row: dict, params: SamplingParams, chat: bool) -> Request:
    if "messages" in row:
        return llm.chat_request(row["messages"], params, "the conversation")
    return prompt_request(llm, row["prompt"], params, chat, "the prompt")


def read_row(llm: LLM, line: bytes, number: int, params: SamplingParams, chat: bool) -> Request:
    """The request of one row: its own sampling fields, else those of `params`."""
    row = row_of(line)
    known = [f.name for f in fields(SamplingParams)]
    # Sets of prompts for evaluation have a category.
    if unknown := row.keys() - {"id", "category", "prompt", "messages", *known}:
        known = ", ".join(["id", "prompt", "messages", *known])
        raise ValueError(f"{min(unknown)!r} is not supported; supported: {known}")
    if not isinstance(id := row.get("id", number), str | int):
        raise ValueError(f"id {id!r} is neither text nor an integer")
    params = replace(params, **{name: row[name] for name in known if name in row})
    return replace(as_request(llm, row, params, chat), id=id)


def write_answers(path: str, outputs: Iterator, total: int) -> Iterator[RequestOutput]:
    """Append each of `total` outputs to a file of JSON lines as it comes."""
    # Half of a surrogate pair, which an id may hold, is written as JSON's own escape.
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        for output in tqdm(outputs, total=total, unit="row", disable=None):
            answer = output.outputs[0]
            row = {
                "id": output.request_id,
                "text": answer.text,
                "token_ids": answer.token_ids,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": len(output.prompt_token_ids),
                "steps": output.steps,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            yield output


# a conversation


def converse(llm: LLM, params: SamplingParams, first: list[str]) -> Iterator[RequestOutput]:
    """Answer the turns of `first` and then those typed, each in the light of those before."""
    print("fastspec: Ctrl-C stops an answer; /reset starts over; Ctrl-D leaves", file=sys.stderr)
    messages: list[dict] = []
    for turn in read_turns(first):
        if turn.strip() == "/exit":
            return
        if turn.strip() == "/reset":
            messages = []
            continue
        asked = [*messages, {"role": "user", "content": turn}]
        try:
            stream = llm.chat_stream(asked, params)
        except ValueError as error:
            print(f"fastspec: {one_line(error)}; /reset starts over", file=sys.stderr)
            continue
        said = ""
        with interrupts() as interrupted:
            for _, piece, output in stream:
                print(piece, end="", flush=True)
                said += piece
                if output is None and interrupted.is_set():
                    break
            stream.close()
        print(flush=True)
        messages = [*asked, {"role": "assistant", "content": said}]
        if output is not None:
            yield output


def read_turns(first: list[str]) -> Iterator[str]:
    """Turns until the input ends: those given, then lines of standard input."""
    yield from first
    with suppress(ImportError):
        import readline  # noqa: F401 (gives `input` line editing)
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            turn = input("> " if at_terminal else "")
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        except EOFError:
            return
        if turn.strip():
            yield turn


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, instead of breaking off whatever runs at that moment."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


# what was done


def summary(
    outputs: Iterable[RequestOutput],
    speculator: str | None,
    tokenizer: Tokenizer | None,
    together: bool,
) -> str:
    """What the run did, in a few lines, once all its outputs have come; `together`: also the
    tokens/s of all rows."""
    start, first, heads = time.perf_counter(), [], []
    tokens = steps = decode_time = decode_tokens = 0
    for output in outputs:
        first.append(output.time_to_first_token)
        tokens += len(output.outputs[0].token_ids)
        steps += output.steps
        decode_time += output.decode_time
        decode_tokens += output.decode_tokens
        accepted = output.accepted_per_head
        heads = [sum(pair) for pair in zip(heads or [0] * len(accepted), accepted, strict=True)]
    if not first:
        return ""
    speed = f"{decode_tokens / decode_time:.1f} per sequence" if decode_tokens else "one step each"
    lines = [
        f"tokens               {tokens}",
        f"tokens/s             {speed}",
        f"tokens per step      {tokens / max(steps, 1):.2f}",
        f"time to first token  {sorted(first)[len(first) // 2] * 1000:.0f} ms",
        f"speculator           {speculator or 'none'}",
        f"tokenizer            {tokenizer.source if tokenizer else 'none'}",
    ]
    if heads:
        rates = "  ".join(f"{head / max(steps, 1):.2f}" for head in heads)
        lines.insert(3, f"accepted per head    {rates}")
    if together and len(first) > 1:
        lines[1] += f", {tokens / (time.perf_counter() - start):.1f} in all"
    return "\n" + "\n".join(lines)


if __name__ == "__main__":
    end(main())
