"""One rank of several GPUs, started by torchrun from test_gpu_tp.py: all ranks run the same engine
side by side, and rank 0 prints what each found in lines of JSON."""

import json
import os
import sys

import torch
import torch.distributed as dist
from conftest import Scripted, launches, run_requests, runs_of_one_graph

import tp
from fastspec import Engine, Request, SamplingParams
from model import ModelArgs, Transformer, hf_tensors, kv_cache_shape, rope_frequencies

CUDA = torch.cuda.is_available()
ARGS = ModelArgs(256, 4, 8, 2, 64, 512, 4000)
PROMPTS = [[int(t) for t in torch.arange(n) * 37 % 4000] for n in (30, 7)]
WIDTH = 512


def whole_model(device):
    """The same random bfloat16 weights on every rank."""
    torch.manual_seed(0)
    model = Transformer(ARGS).requires_grad_(False)
    for name, param in model.named_parameters():
        if "norm" not in name:
            param.normal_(0, 0.08)
    model = model.to(device, torch.bfloat16)
    model.inv_freq = rope_frequencies(ARGS).to(device)  # float32 in every dtype
    return model


def own_part(whole, ranks):
    mesh = tp.new_mesh(ARGS.n_kv_heads, ranks.size)
    local = Transformer(tp.local_args(ARGS, ranks.size)).requires_grad_(False)
    local = local.to(whole.norm.weight.device, torch.bfloat16)
    local.inv_freq = whole.inv_freq
    stored = hf_tensors(whole)
    for name, own in hf_tensors(local).items():
        own.copy_(tp.part(name, stored[name], mesh, tp.TARGET_PLAN, ARGS.head_dim))
    return local


def new_engine(model, ranks, device):
    scripted = Scripted(torch.zeros(2, WIDTH, dtype=torch.int64), ARGS.vocab_size).to(device)
    options = {"num_draft_tokens": 3, "batch_size": 2, "max_seq_len": WIDTH, "compiled": CUDA}
    engine = Engine(model, scripted, **options, ranks=ranks)
    ranks.connect(engine)
    ranks.share_memory(engine)
    return engine


def run(engine, params):
    requests = [Request(p, params, 7 + i, []) for i, p in enumerate(PROMPTS)]
    tokens, _, accepted = run_requests(engine, requests)
    return tokens, sum(accepted)


def chain(engine, temperature):
    """Texts and accepted drafts with drafts that are always wrong, right, and right at times."""
    params = SamplingParams(temperature=temperature, top_p=0.95, max_tokens=WIDTH - 40)
    return runs_of_one_graph(engine, PROMPTS, lambda: run(engine, params))


def sums(ranks, device):
    """For some sizes: the largest error of `sum`, in units of what bfloat16 may round, beside
    NCCL's, and the bits of the sum."""
    found = []
    for rows in (1, 5, 31, 600):  # the last: more than one kernel of torch's is for
        generator = torch.Generator().manual_seed(rows)
        parts = torch.randn(ranks.size, rows, ARGS.dim, generator=generator).bfloat16().to(device)
        exact, own = parts.double().sum(0), parts[ranks.rank].contiguous()
        unit = parts.double().abs().sum(0) * 2**-8
        for total in (ranks.sum(own), ranks.collective("all_reduce", own, "sum")):
            found.append(float(((total.double() - exact).abs() / unit).max()))
        found.append(ranks.sum(own).view(torch.int16).long().sum().item())
    return found


def same_as_one_gpu(engine, whole, ranks, device):
    """Relative error of the target's hidden states beside those of the whole model."""
    import gpu_kernels

    tokens = torch.tensor(PROMPTS[1:], device=device)
    B, N = tokens.shape
    positions, cached = torch.arange(N, device=device)[None], torch.zeros_like(tokens[:, 0])
    chain = torch.ones(N, N, dtype=torch.bool, device=device).tril()

    def hidden(model, total):
        gpu_kernels.enroll(model)
        kv = model.norm.weight.new_zeros(kv_cache_shape(model.args, B, 80))
        args = tokens, positions, kv, cached, chain
        return gpu_kernels.forward(model, *args, total)[0].double()

    ours, plain = hidden(engine.model, ranks.sum), hidden(whole, None)
    return float((ours - plain).norm() / plain.norm())


def sums_in_turn(ranks, device, M, D=8192, C=64, n=200, replays=50):
    """Of `n` sums in one CUDA graph, replayed with other products each time and ranks that come
    late at times: how many numbers are not what the gathered parts give, and the bits of all."""
    import gpu_kernels

    own = torch.Generator(device).manual_seed(ranks.rank)
    x = torch.zeros(n, M, C, dtype=torch.bfloat16, device=device)
    w = torch.randn(D, C, generator=own, device=device).bfloat16()
    same = torch.Generator(device).manual_seed(99)
    residual, norm = (torch.randn(*s, generator=same, device=device) for s in ((M, D), (D,)))
    residual, norm = residual.bfloat16(), norm.bfloat16()
    waits = torch.randint(0, 8, (n,), generator=torch.Generator().manual_seed(ranks.rank)).tolist()

    def add(i):
        if waits[i] == 0:
            torch.cuda._sleep(20_000)  # longer than a sum takes
        return gpu_kernels.add_linear_ranks(x[i], w, None, residual, norm, i % 2)

    for i in range(2):  # compiled before it is captured
        add(i), gpu_kernels.linear(x[i], w, None, x.dtype)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = [torch.stack(results) for results in zip(*map(add, range(n)), strict=True)]
    wrong, bits = 0, 0
    for _ in range(replays):
        x.normal_(generator=own)
        graph.replay()
        parts = torch.stack([gpu_kernels.linear(x[i], w, None, x.dtype) for i in range(n)])
        every = parts.new_empty(ranks.size, *parts.shape)
        dist.all_gather_into_tensor(every.flatten(0, 1), parts)
        total = every[0].float()
        for part in every[1:]:
            total += part.float()
        out = (residual.float() + total).bfloat16()
        weighted, squares = (out.float() * norm.float()).bfloat16(), out.float().square().sum(-1)
        wrong += (found[0] != out).sum() + (found[1] != weighted).sum()
        wrong += ((found[2].sum(1) - squares).abs() > 1e-5 * squares).sum()
        bits += sum(y.view(torch.int16).long().sum() for y in found[:2])
        bits += found[2].view(torch.int32).long().sum()
    return int(wrong), int(bits)


@torch.inference_mode()
def main():
    ranks = tp.join()
    device = f"cuda:{ranks.rank}" if CUDA else "cpu"
    if CUDA:
        torch.cuda.set_device(ranks.rank)
    whole = whole_model(device)
    engine = new_engine(own_part(whole, ranks), ranks, device)
    found = {f"chain {temperature}": chain(engine, temperature) for temperature in (0.0, 0.8)}
    found["sums"] = sums(ranks, device)
    if CUDA:
        found["one shot"] = bool(tp.one_shot_memory)
        found["error"] = same_as_one_gpu(engine, whole, ranks, device)
    tell(ranks, found)
    if CUDA:
        tell(ranks, {"launches": launches(engine)})
        if tp.one_shot_memory:  # on all ranks or none
            turns = {f"sums in turn {M}": sums_in_turn(ranks, device, M) for M in (1, 5, 31)}
            tell(ranks, turns)
    sys.stderr.flush()
    os._exit(0)


def tell(ranks, found):
    everyones = [None] * ranks.size
    dist.all_gather_object(everyones, found)
    if ranks.rank == 0:
        print(json.dumps(everyones), flush=True)


if __name__ == "__main__":
    main()
