"""Tensor parallelism: one model over the GPUs of a host, one process (rank) for each.

What is sharded where is said by DTensor placements over a DeviceMesh. A rank reads its parts of
the checkpoint into plain tensors, so that the step's CUDA graph finds them at fixed addresses and
copies none; sums and gathers over the ranks are functional collectives inside the compiled step.

Rank 0 alone has the prompts, prints and decides. It announces what it does to its engine, and the
other ranks do the same to theirs.

Letters in shape comments: B rows, n tokens per row, V vocabulary, R ranks.
"""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial, reduce
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _symmetric_memory
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

# --- what is sharded where ---------------------------------------------------------------------
# The mesh has two dimensions: groups of ranks that hold the same KV heads, and the ranks of a
# group. There are as many groups as KV heads where that comes out even; else every group is a
# single rank, and heads of zeros, which change nothing, make the KV heads a multiple of the ranks.

Placements = tuple[Placement, Placement]

ROWS: Placements = (Shard(0), Shard(0))  # outputs of a linear layer, tokens of a vocabulary
COLUMNS: Placements = (Shard(1), Shard(1))  # inputs of a linear layer, channels of an embedding
KV_ROWS: Placements = (Shard(0), Replicate())  # whole KV heads
ONCE: Placements = (Partial(), Partial())  # one rank has it and the others zeros
EVERYWHERE: Placements = (Replicate(), Replicate())

# Part of a stored tensor's name -> placements; the first counts, of what has none: EVERYWHERE.
TARGET_PLAN = {
    "embed_tokens": ROWS,
    "wte": ROWS,
    "q_proj": ROWS,
    "k_proj": KV_ROWS,
    "v_proj": KV_ROWS,
    "o_proj": COLUMNS,
    "gate_proj": ROWS,
    "up_proj": ROWS,
    "down_proj": COLUMNS,
    "c_fc": ROWS,
    "c_proj": COLUMNS,
    "lm_head": ROWS,
}
DRAFT_PLAN = {"down": EVERYWHERE, "emb": COLUMNS, "proj": ROWS, "head": ROWS}
HEADS_DIM = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}  # where heads of zeros may go


def local_args(args, size: int):
    """The ModelArgs of one rank's part; ValueError where `size` ranks cannot share the model."""

    def fits(n: int) -> bool:
        whole_heads = n % args.n_kv_heads != 0 or args.n_heads % n == 0
        return whole_heads and not any(x % n for x in (args.ffn_dim, args.vocab_size))

    if not fits(size):
        sizes = ", ".join(str(n) for n in range(1, args.n_heads + 1) if fits(n))
        raise ValueError(
            f"{size} ranks cannot share {args.n_heads} heads ({args.n_kv_heads} of keys and "
            f"values), {args.ffn_dim} feed-forward channels and {args.vocab_size} tokens evenly; "
            f"possible: {sizes}"
        )
    n_kv_heads = -(-args.n_kv_heads // size)  # rounded up
    n_heads = n_kv_heads * (args.n_heads // args.n_kv_heads)
    return replace(
        args,
        n_heads=n_heads if size % args.n_kv_heads else args.n_heads // size,
        n_kv_heads=n_kv_heads,
        ffn_dim=args.ffn_dim // size,
        vocab_size=args.vocab_size // size,
    )


def check_draft(args, size: int) -> None:
    """ValueError where `size` ranks cannot share the speculator of these SpeculatorArgs."""
    drafted = args.draft_vocab_size or args.vocab_size
    if args.inner_dim % size or drafted % size:
        raise ValueError(
            f"{size} ranks cannot share the speculator's inner_dim {args.inner_dim} and "
            f"{drafted} tokens evenly; use draft_tensor_parallel_size 1"
        )


def pieces(name: str, tensor: Tensor, plan: dict, head_dim: int) -> list[tuple[Tensor, Placements]]:
    """What a stored tensor consists of, with placements; `tensor` may be a rank's part of it."""
    path = name.split(".")
    if "c_attn" in path:  # query heads, then the one key head and the one value head
        queries, kv = tensor.split([len(tensor) - 2 * head_dim, 2 * head_dim])
        return [(queries, ROWS), (kv, EVERYWHERE)]
    placements = next((plan[part] for part in plan if part in path), EVERYWHERE)
    bias_of_sum = path[-1] == "bias" and placements is COLUMNS
    return [(tensor, ONCE if bias_of_sum else placements)]


def local_part(tensor: Tensor, mesh: DeviceMesh, placements: Placements) -> Tensor:
    """This rank's part of a tensor, as DTensor would lay it out: a view."""
    for dim, placement in enumerate(placements):
        rank = mesh.get_local_rank(dim)
        if isinstance(placement, Shard):
            tensor = tensor.chunk(mesh.size(dim), placement.dim)[rank]
        elif isinstance(placement, Partial) and rank:
            tensor = torch.zeros_like(tensor)
    return tensor


def filled_up(name: str, tensor: Tensor, n_kv_heads: int, groups: int) -> Tensor:
    """A stored tensor and, after its heads, zeros that make the KV heads a multiple of groups."""
    added = -n_kv_heads % groups
    dim = next((HEADS_DIM[part] for part in name.split(".") if part in HEADS_DIM), tensor.ndim)
    if not added or dim >= tensor.ndim:  # the bias of o_proj has no heads
        return tensor
    zeros = added * (tensor.shape[dim] // n_kv_heads)
    return F.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (0, zeros))


def part(
    name: str, tensor: Tensor, mesh: DeviceMesh, plan: dict, head_dim: int = 0, n_kv_heads: int = 0
) -> Tensor:
    """What this rank holds of a stored tensor. Nothing else of it is read, unless heads of zeros
    are added to it."""
    whole = filled_up(name, tensor, n_kv_heads, mesh.size(0))
    found = pieces(name, whole, plan, head_dim)
    parts = [local_part(piece, mesh, placements) for piece, placements in found]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def as_dtensors(
    name: str, tensor: Tensor, mesh: DeviceMesh, plan: dict, head_dim: int = 0
) -> list[DTensor]:
    """The pieces of a whole stored tensor, from this rank's part of it, whose memory they share:
    to inspect or save a sharded model. Heads of zeros that were added are among them, at the end.
    """
    return [
        DTensor.from_local(piece, mesh, placements)
        for piece, placements in pieces(name, tensor, plan, head_dim)
    ]


class VocabularyEmbedding(nn.Module):
    """An embedding table of which each rank has the tokens [V / R]."""

    def __init__(self, weight: Tensor, ranks: "Ranks"):
        super().__init__()
        self.weight, self.ranks = weight, ranks

    def forward(self, tokens: Tensor) -> Tensor:
        own = tokens - self.ranks.rank * len(self.weight)
        elsewhere = (own < 0) | (own >= len(self.weight))
        x = F.embedding(own.masked_fill(elsewhere, 0), self.weight)
        return self.ranks.sum(x.masked_fill(elsewhere[..., None], 0))


def join_target(model: nn.Module, ranks: "Ranks") -> None:
    """Make a rank's part of a target compute what the whole would, but for `output`, whose columns
    stay apart."""
    model.embed = VocabularyEmbedding(model.embed.weight, ranks)
    for layer in model.layers:
        for linear in (layer.attention.wo, layer.mlp.w2):
            linear.register_forward_hook(lambda module, args, y: ranks.sum(y))


def join_speculator(speculator: nn.Module, ranks: "Ranks") -> None:
    """The same for a sharded speculator and its heads: a rank's channels of a projection and of an
    embedding are added before all ranks' come together."""
    for norm in speculator.ln:
        norm.register_forward_pre_hook(lambda module, args: (ranks.gather(args[0]),))


def new_mesh(n_kv_heads: int, size: int) -> DeviceMesh:
    """Says who holds what. Nothing is sent over it, so that its device does not matter."""
    groups = size if size % n_kv_heads else n_kv_heads
    return init_device_mesh("cpu", (groups, size // groups), mesh_dim_names=("kv", "copy"))


# --- sums on GPUs ------------------------------------------------------------------------------
# Most of what a step sends is sums of a few kilobytes, which take as long as they take to start.
# Where the GPUs can read each other's memory one kernel of torch's adds these, and NCCL brings what
# is larger; the sums of gpu_kernels.forward are its own. Multicast is not used. (Sums inside the
# products, each rank waiting for the others' parts there, measured slower: 12.4 ms a step against
# 11.6 at Llama-3-70B shapes on 4 H200.)

ONE_SHOT_SUMS = 2**18  # bytes up to which torch's kernel adds
SUMMED_ROWS = 1024  # of which all ranks' parts are here at once
one_shot_memory: dict[torch.dtype, Tensor] = {}  # for so many bytes, reached by all ranks

os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")


@torch.library.custom_op("fastspec::one_shot_sum", mutates_args=())
def one_shot_sum(x: Tensor, group: str) -> Tensor:
    """The sum of all ranks' x, added in the same order on each. An operation of its own: the
    compiler would leave torch's out of the CUDA graph."""
    memory = one_shot_memory[x.dtype][: x.numel()].view(x.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(memory, x, "sum", group)


@one_shot_sum.register_fake
def _(x, group):
    return torch.empty_like(x)


# --- ranks -------------------------------------------------------------------------------------

# Waiting for the next command may take for ever: lost ranks are noticed in other ways.
NO_TIMEOUT = timedelta(days=365)
GRACE = 10  # seconds for a lost rank to be noticed where it matters, or for a rank to end

Workers = dict[int, tuple[subprocess.Popen, BinaryIO]]  # by rank, with their standard error
WORKER = "import sys, tp, fastspec; tp.work(*map(int, sys.argv[1:]), fastspec.LLM)"


class Ranks:
    """The processes that share a model, seen from one of them."""

    def __init__(self, store: dist.Store, rank: int, size: int, workers: Workers | None = None):
        self.workers = workers or {}  # those that this rank 0 has started
        self.ended: str | None = None  # why, once they have
        self.waiting = False  # for the other ranks, perhaps
        if self.workers:
            threading.Thread(target=self.watch, daemon=True).start()
        gpus = torch.cuda.is_available() and size > 1
        options = {"store": store, "rank": rank, "world_size": size, "timeout": NO_TIMEOUT}
        with self.guard():
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", **options)
        if gpus:  # its end would wait for the CUDA graphs that hold its collectives
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
        self.rank, self.size = rank, size
        self.group = dist.group.WORLD.group_name
        # Faster than a broadcast, and rank 0 need not wait for the others. A connection of its
        # own: the others' waiting would lock out NCCL.
        self.commands = store.clone()
        self.commands.set_timeout(NO_TIMEOUT)
        # What keeps memory of other ranks here, None where it could not be set up.
        self.shared: dict[torch.dtype, object] = {}

    # in the step, on the device

    def collective(self, name: str, x: Tensor, *args) -> Tensor:
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(getattr(ops, name)(x.contiguous(), *args, self.group))

    def sum(self, x: Tensor) -> Tensor:
        small = x.nbytes <= ONE_SHOT_SUMS and x.nbytes % 16 == 0
        if small and x.dtype in one_shot_memory:
            return one_shot_sum(x.contiguous(), self.group)
        if self.size == 2:  # whose order makes no difference
            return self.collective("all_reduce", x, "sum")
        # In the order of the ranks, as torch's kernel adds: NCCL's own depends on where among how
        # many bytes a number lies, so that a prompt's last bits would depend on those beside it.
        pieces = x.flatten(0, -2).split(SUMMED_ROWS)
        parts = [self.collective("all_gather_into_tensor", piece, self.size) for piece in pieces]
        return torch.cat([reduce(torch.add, p.chunk(self.size)) for p in parts]).view(x.shape)

    def gather(self, x: Tensor) -> Tensor:
        """[..., n] of every rank, side by side: [..., R * n]."""
        stacked = self.collective("all_gather_into_tensor", x, self.size)  # [R * B ...]
        return torch.cat(stacked.chunk(self.size), -1)

    def same(self, x: Tensor) -> Tensor:
        """What rank 0 has: ranks tune their kernels each for itself, so that results which should
        be equal may differ in the last bit, and choices made of them in everything."""
        return self.collective("broadcast", x, 0)

    def columns(self, x: Tensor) -> Tensor:
        """This rank's part of a tensor [R * n]."""
        return x.chunk(self.size)[self.rank]

    def argmax(self, scores: Tensor) -> Tensor:
        """Column [B, n] of the largest of all ranks' float32 scores [B, n, V / R], the first one
        of equals."""
        own = scores.argmax(-1, keepdim=True)
        column = (own + self.rank * scores.shape[-1]).int()
        pair = torch.cat((scores.gather(-1, own).view(torch.int32), column), -1)  # [B n 2]
        best, columns = self.gather(pair).unflatten(-1, (self.size, 2)).unbind(-1)  # [B n R]
        winner = best.contiguous().view(torch.float32).argmax(-1, keepdim=True)
        return columns.gather(-1, winner)[..., 0].long()

    # between the hosts

    def announce(self, *command) -> None:
        """Rank 0: tell the other ranks what to do next."""
        message = pickle.dumps(command)
        for rank in range(1, self.size):
            self.commands.queue_push(f"commands/{rank}", message)

    def hear(self) -> tuple:
        """The next command of rank 0."""
        return pickle.loads(self.commands.queue_pop(f"commands/{self.rank}"))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Every rank gets through the block, or each raises ValueError with the first's error."""
        error = None
        try:
            yield
        except Exception as caught:
            error = one_line(caught)
        errors: list[str | None] = [None] * self.size
        dist.all_gather_object(errors, error)
        if bad := [rank for rank in range(self.size) if errors[rank]]:
            raise ValueError(f"rank {bad[0]}: {errors[bad[0]]}" if bad[0] else errors[0])

    def load(self, llm) -> None:
        """Rank 0: load an LLM here and on every other rank, which then do to their engines what is
        done to this one."""
        if llm.device.index:
            raise ValueError(f"device {llm.device}: ranks take cuda:0 and those after it")
        with self.guard():
            self.announce("load", worker_options(llm))
            with self.together():
                pass  # the others check what they see of the checkpoint
            with self.together():
                llm.load_weights(self)
            self.share_memory(llm.engine)
        self.lead(llm.engine)

    def lead(self, engine) -> None:
        """Rank 0: what is done to this engine, the others do to theirs."""
        for name in engine.led:
            setattr(engine, name, self.led(getattr(engine, name), name))
        engine.wait = self.led(engine.wait)

    def parts(self, llm) -> tuple[dict, dict]:
        """What load_model and load_speculator need to be told of this rank's parts."""
        if self.size == 1:
            return {}, {}
        mesh = new_mesh(llm.args.n_kv_heads, self.size)
        heads = {"head_dim": llm.args.head_dim, "n_kv_heads": llm.args.n_kv_heads}
        target = partial(part, mesh=mesh, plan=TARGET_PLAN, **heads)
        draft = partial(part, mesh=mesh, plan=DRAFT_PLAN if llm.draft_parallel_size > 1 else {})
        return {"local_args": llm.local_args, "part": target}, {"part": draft}

    def connect(self, engine) -> None:
        """Make this rank's parts of the engine's models compute what the whole would."""
        if self.size == 1:
            return
        join_target(engine.model, self)
        if engine.draft_ranks is not None:
            join_speculator(engine.speculator, self)

    def share_memory(self, engine) -> None:
        """All ranks at once: set up small sums, or say why NCCL takes them, too. It always does in
        float16, which torch's kernel does not take."""
        kv, kernels, n = engine.kv, engine.kernels, ONE_SHOT_SUMS // engine.kv.itemsize
        wanted = self.size > 1 and kernels is not None and kv.dtype != torch.float16
        if not wanted or kv.dtype in self.shared:
            return
        self.shared[kv.dtype] = None
        try:
            size = n + kernels.SHARED_BYTES // kv.itemsize
            with self.together():
                memory = _symmetric_memory.empty(size, dtype=kv.dtype, device=kv.device)
            with self.together():
                handle = _symmetric_memory.rendezvous(memory, self.group)
                self.shared[kv.dtype] = handle
                every = [handle.get_remote_tensor(r, [size], kv.dtype) for r in range(self.size)]
                one_shot_memory[kv.dtype] = memory[:n]
                kernels.share([m[n:] for m in every], self.rank)
            # First by itself, as if all others had come: where that fails nobody waits for it.
            with self.together():
                memory.view(torch.int32).fill_(1)
                kernels.sums_of_ones(kv)
                torch.cuda.synchronize(kv.device)
            with self.together():
                memory.zero_()
                torch.cuda.synchronize(kv.device)
            with self.together():
                ones = (self.sum(torch.ones_like(memory[:n])), *kernels.sums_of_ones(kv))
                if any((x != self.size).any() for x in ones):
                    raise ValueError("a sum over the GPUs' memory came out wrong")
        except ValueError as error:
            one_shot_memory.pop(kv.dtype, None)
            kernels.shared_memory.pop(kv.dtype, None)
            if self.rank == 0:
                print(f"fastspec: all sums go through NCCL: {error}", file=sys.stderr)

    def led(self, method: Callable, name: str | None = None) -> Callable:
        """A method of rank 0's engine, which every rank calls if it has a name."""

        def call(*args):
            with delayed_interrupt(), self.guard():
                if name is not None:
                    self.announce(name, *args)
                return method(*args)

        return call

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around what needs all ranks: where one is lost, the others end, and rank 0 says which."""
        if why := self.ended or lost(self.workers):
            self.abandon(why)
            raise ConnectionError(why)
        self.waiting = True
        try:
            yield
        except ValueError:  # the ranks are as they were
            raise
        except BaseException as error:
            # A connection breaks a little before its process has ended.
            why = lost(self.workers, seconds=2)
            self.abandon(why or one_line(error))
            if why:
                raise ConnectionError(why) from None
            raise
        finally:
            self.waiting = False

    def watch(self) -> None:
        """Where a rank is lost on a GPU, the others wait inside a kernel for ever: only the end of
        this process ends that."""
        while not (why := lost(self.workers)):
            time.sleep(1)
            if self.ended:
                return
        time.sleep(GRACE)
        if self.waiting and not self.ended:
            print(f"fastspec: {why}", file=sys.stderr, flush=True)
            self.abandon(why)
            os._exit(1)

    def abandon(self, why: str) -> None:
        """End the other ranks at once."""
        self.ended = self.ended or why
        kill(self.workers)

    def close(self) -> None:
        """Let the other ranks end."""
        if self.ended:
            return
        try:
            self.announce("end")
            self.ended = "the ranks were closed"
            for process, _ in self.workers.values():
                process.wait(GRACE)
        except (RuntimeError, subprocess.TimeoutExpired):
            self.abandon("the ranks were closed")


def worker_options(llm) -> dict:
    """What the other ranks make their LLM of."""
    speculative = None
    if llm.k:
        # Absolute, so that no rank takes a directory that it does not see for a hub id.
        speculative = {"model": str(llm.speculator_dir.absolute())}
        speculative["num_speculative_tokens"] = llm.k
        speculative["draft_tensor_parallel_size"] = llm.draft_parallel_size
        speculative["draft_dtype"], speculative["tree"] = llm.draft_dtype, llm.tree
        if llm.tree:
            speculative["top_k_tokens_per_head"] = list(llm.top_k_tokens_per_head)[: llm.k]
    return {
        "model": str(llm.directory.absolute()),
        "speculative_config": speculative,
        "dtype": str(llm.dtype).removeprefix("torch."),
        "device": llm.device.type,
        "batch_size": llm.batch_size,
        "max_seq_len": llm.max_seq_len,
        "compile": llm.compiled,
        "tensor_parallel_size": llm.tensor_parallel_size,
    }


def one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def kill(workers: Workers) -> None:
    for process, _ in workers.values():
        process.kill()
        process.wait()


def lost(workers: Workers, seconds: float = 0) -> str | None:
    """What is known of a worker that has ended, or does so within some seconds."""
    end = time.monotonic() + seconds
    while True:
        codes = ((rank, process.poll()) for rank, (process, _) in workers.items())
        if ended := {rank: code for rank, code in codes if code is not None}:
            # A killed one (below 0) first: the others end because it is gone.
            rank = min(ended, key=lambda rank: (ended[rank] == 0, ended[rank]))
            return f"rank {rank} has ended with {ended[rank]}: {last_line(workers[rank][1])}"
        if time.monotonic() >= end:
            return None
        time.sleep(0.05)


def last_line(file) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it left no message")


@contextmanager
def delayed_interrupt() -> Iterator[None]:
    """Ctrl-C takes effect after the block: broken off between two collectives, this rank would
    answer the others' next one with the wrong one."""
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C never gets there
        yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def start(size: int) -> Ranks:
    """Rank 0 of a new group, which this process becomes; the other ranks are started."""
    if dist.is_torchelastic_launched():
        raise ValueError("torchrun is for fastspec.py: LLM starts its ranks itself, use python")
    if dist.is_initialized():
        raise ValueError("this process has a process group already; use one process for each")
    store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    # One thread each, as torchrun does: more would be in each other's way.
    env = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    workers: Workers = {}
    for rank in range(1, size):
        stderr = tempfile.TemporaryFile()  # noqa: SIM115 (read once the worker has ended)
        command = [sys.executable, "-c", WORKER, str(store.port), str(size), str(rank)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": stderr}
        workers[rank] = subprocess.Popen(command, env=env, start_new_session=True, **pipes), stderr
    while not store.check([f"rank {rank}" for rank in workers]):
        if why := lost(workers, seconds=0.1):
            kill(workers)
            raise ConnectionError(why)
    return Ranks(store, 0, size, workers)


def join() -> Ranks:
    """This process's rank of the group that torchrun has started."""
    return Ranks(*next(dist.rendezvous("env://")))


def work(port: int, size: int, rank: int, build: Callable) -> None:
    """A process that `start` has started."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
    store.set(f"rank {rank}", b"")
    follow(Ranks(store, rank, size), build)


def end_with_parent() -> None:
    """Standard input is a pipe from rank 0, which ends when that does, however it does."""
    sys.stdin.buffer.read()
    os._exit(1)


def follow(ranks: Ranks, build: Callable) -> None:
    """Do what rank 0 announces, until it ends, and end the process. `build` is LLM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what Ctrl-C means is for rank 0 to say
    llm, packets = None, deque()
    try:
        while (command := ranks.hear())[0] != "end":
            name, *args = command
            if name == "load":
                packets.clear()
                llm = None  # before the next one takes memory
                with suppress(ValueError):  # which rank 0 reports
                    llm = load_part(ranks, *args, build)
                continue
            engine = llm.engine
            result = getattr(engine, name)(*args)
            if name == "step":  # run ahead as far as rank 0 does
                packets.append((engine, result))
                if len(packets) > engine.ahead:
                    waiting, packet = packets.popleft()
                    waiting.wait(packet)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def load_part(ranks: Ranks, options: dict, build: Callable):
    """This rank's LLM; for the two steps see Ranks.load."""
    if options["device"] == "cuda":
        options["device"] = f"cuda:{ranks.rank}"
    with ranks.together():
        llm = build(**options, load=False)
    with ranks.together():
        llm.load_weights(ranks)
    ranks.share_memory(llm.engine)
    return llm
