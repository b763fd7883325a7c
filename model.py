"""Target model (llama, gpt_bigcode) over a static KV cache, from Hugging Face checkpoints.

This file needs only torch and safetensors: copy it into another repository as it is.

Letters in shape comments:
    B rows (sequences)     N tokens per row in this call    S cache slots      D hidden width
    H query heads          K key/value heads, G = H / K     E head_dim         F feed-forward width
    L layers               V vocabulary
"""

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1 frequency scaling (`rope_type: llama3` of a Hugging Face config.json)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelArgs:
    """Shape of a target model; `from_config` reads it from a Hugging Face config.json."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    max_position: int = 2048
    activation: str = "silu"  # of a gated MLP; the GELUs are of a plain one
    layer_norm: bool = False  # with mean and bias; else RMSNorm
    learned_positions: bool = False  # a table added to the embeddings; else rope
    model_type: str = "llama"  # whose names the stored tensors have

    @classmethod
    def from_config(cls, config: dict) -> "ModelArgs":
        """Args from a parsed config.json; defaults are those of transformers' config classes.

        Raises ValueError naming the field when it is missing or its value is not supported.
        """
        if (kind := config.get("model_type")) == "llama":
            return _llama_args(config)
        if kind == "gpt_bigcode":
            return _gpt_bigcode_args(config)
        raise ValueError(
            f"config.json: model_type {kind!r} is not supported; supported: llama, gpt_bigcode"
        )


# A damaged config.json is refused, not built: 10**9 layers would take minutes and all memory.
MOST_LAYERS = MOST_HEADS = 1024

# GELU by the config's name for it -> torch's. As transformers does, the config is followed even
# where it is wrong: the first of granite-20b-code said "gelu", later ones "gelu_pytorch_tanh".
GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def _llama_args(config: dict) -> ModelArgs:
    if (act := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"config.json: hidden_act {act!r} is not supported; supported: silu")
    dim = _number(config, "hidden_size")
    n_heads = _number(config, "num_attention_heads", most=MOST_HEADS)
    n_kv_heads = _number(config, "num_key_value_heads", n_heads, most=MOST_HEADS)
    if n_heads % n_kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads {n_heads} is not a multiple of "
            f"num_key_value_heads {n_kv_heads}"
        )
    head_dim = _number(config, "head_dim", dim // n_heads)
    if head_dim % 2:
        raise ValueError(f"config.json: head_dim {head_dim} is odd; rope needs pairs")
    rope_theta, rope_scaling = _read_rope(config)
    return ModelArgs(
        dim=dim,
        n_layers=_number(config, "num_hidden_layers", most=MOST_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=_number(config, "intermediate_size"),
        vocab_size=_number(config, "vocab_size"),
        norm_eps=_number(config, "rms_norm_eps", 1e-6, float),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        attention_bias=_flag(config, "attention_bias"),
        mlp_bias=_flag(config, "mlp_bias"),
        tie_embeddings=_flag(config, "tie_word_embeddings"),
        max_position=_number(config, "max_position_embeddings", 2048),
    )


def _gpt_bigcode_args(config: dict) -> ModelArgs:
    gelu = config.get("activation_function", "gelu_pytorch_tanh")
    if gelu not in list(GELUS):
        raise ValueError(
            f"config.json: activation_function {gelu!r} is not supported; "
            f"supported: {', '.join(GELUS)}"
        )
    for key in ("multi_query", "scale_attn_weights"):
        if not _flag(config, key, True):
            raise ValueError(f"config.json: {key} false is not supported; supported: true")
    dim, n_heads = _number(config, "n_embd"), _number(config, "n_head", most=MOST_HEADS)
    if dim % n_heads:
        raise ValueError(f"config.json: n_embd {dim} is not a multiple of n_head {n_heads}")
    return ModelArgs(
        dim=dim,
        n_layers=_number(config, "n_layer", most=MOST_LAYERS),
        n_heads=n_heads,
        n_kv_heads=1,
        head_dim=dim // n_heads,
        ffn_dim=_number(config, "n_inner", 4 * dim),
        vocab_size=_number(config, "vocab_size"),
        norm_eps=_number(config, "layer_norm_epsilon", 1e-5, float),
        attention_bias=True,
        mlp_bias=True,
        tie_embeddings=_flag(config, "tie_word_embeddings", True),
        max_position=_number(config, "n_positions", 1024),
        activation=gelu,
        layer_norm=True,
        learned_positions=True,
        model_type="gpt_bigcode",
    )


def _number(
    config: dict, key: str, default: float | None = None, kind: type = int, most: int = 2**24
):
    """An integer of 1 to `most`, or a float above 0; `default` when it is absent or null."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"config.json: {key} is missing")
    wrong_type = isinstance(value, bool) or not isinstance(value, (int, kind))
    if wrong_type or not 0 < value <= (most if kind is int else 1e30):
        what = f"an integer of 1 to {most}" if kind is int else "a number above 0, at most 1e30"
        raise ValueError(f"config.json: {key} must be {what}, found {value!r}")
    return kind(value)


def _flag(config: dict, key: str, default: bool = False) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {key} must be true or false, found {value!r}")
    return default if value is None else value


def _read_rope(config: dict) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_theta` + `rope_scaling` or from the newer `rope_parameters`."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope parameters must be an object, found {rope!r}")
    theta = _number(config | rope, "rope_theta", 10000.0, float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(
            f"config.json: rope type {kind!r} is not supported; supported: default, llama3"
        )
    if missing := [name for name in RopeScaling.__dataclass_fields__ if name not in rope]:
        raise ValueError(f"config.json: rope type 'llama3' needs {missing[0]}")
    scaling = RopeScaling(
        factor=_number(rope, "factor", kind=float),
        low_freq_factor=_number(rope, "low_freq_factor", kind=float),
        high_freq_factor=_number(rope, "high_freq_factor", kind=float),
        original_max_position_embeddings=_number(rope, "original_max_position_embeddings"),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ValueError("config.json: low_freq_factor must be below high_freq_factor")
    return theta, scaling


# --- the model ---------------------------------------------------------------------------------


class Attention(nn.Module):
    """Grouped-query attention over one layer's cache and this call's own tokens."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.heads = (args.n_heads, args.n_kv_heads, args.n_kv_heads)
        self.head_dim = args.head_dim
        self.wqkv = nn.Linear(args.dim, sum(self.heads) * args.head_dim, bias=args.attention_bias)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=args.attention_bias)

    def forward(self, x: Tensor, rope, kv: Tensor, visible, attend) -> tuple[Tensor, Tensor]:
        B, N, _ = x.shape
        qkv = self.wqkv(x).view(B, N, -1, self.head_dim)  # [B N H+2K E]
        if rope is not None:
            apply_rope(qkv[:, :, : -self.heads[-1]], *rope)
        y = attend(qkv, kv, *visible)  # [B N H E]
        new_kv = own_kv(qkv, self.heads[-1]).contiguous()  # a view would keep the queries, too
        return self.wo(y.reshape(B, N, -1)), new_kv


class MLP(nn.Module):
    """SwiGLU feed-forward, gate and up projections fused."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w13 = nn.Linear(args.dim, 2 * args.ffn_dim, bias=args.mlp_bias)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=args.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class PlainMLP(nn.Module):
    """Feed-forward without a gate."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gelu = GELUS[args.activation]
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=args.mlp_bias)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=args.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x), approximate=self.gelu))


def new_norm(args: ModelArgs) -> nn.Module:
    kind = nn.LayerNorm if args.layer_norm else nn.RMSNorm
    return kind(args.dim, eps=args.norm_eps)


class Layer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention_norm = new_norm(args)
        self.attention = Attention(args)
        self.mlp_norm = new_norm(args)
        self.mlp = MLP(args) if args.activation == "silu" else PlainMLP(args)

    def forward(self, x: Tensor, *context) -> tuple[Tensor, Tensor]:
        y, new_kv = self.attention(self.attention_norm(x), *context)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), new_kv


class Transformer(nn.Module):
    """Decoder, a pure function: the KV cache belongs to the caller, who writes it."""

    inv_freq: Tensor

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.embed = nn.Embedding(args.vocab_size, args.dim)
        if args.learned_positions:
            self.position_embed = nn.Embedding(args.max_position, args.dim)
        self.layers = nn.ModuleList(Layer(args) for _ in range(args.n_layers))
        self.norm = new_norm(args)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.output.weight = self.embed.weight
        self.register_buffer("inv_freq", rope_frequencies(args), persistent=False)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        kv: Tensor,
        cached: Tensor,
        ancestors: Tensor,
        attend: Callable | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Final-norm hidden states [B, N, D] and `tokens`' keys and values [L, 2, B, K, N, E].

        tokens, positions: int64 [B, N]; kv: [L, 2, B, K, S, E], of which the first `cached` [B]
        slots of each row are seen by all its tokens; ancestors: bool [N, N], or [B, N, N] of each
        row, True where token n (row) sees token m (column) of this call. `attend` replaces
        `plain_attention`, and needs no mask.
        """
        x, rope, mask, new_kv = self.embed(tokens), None, None, []
        if attend is None:
            B, S = tokens.shape[0], kv.shape[-2]
            in_cache = torch.arange(S, device=kv.device) < cached[:, None, None]  # [B 1 S]
            among = ancestors.expand(B, -1, -1)
            seen = torch.cat((in_cache.expand(-1, among.shape[1], -1), among), dim=-1)  # [B N S+N]
            mask = grouped_mask(seen, self.args, x.dtype)  # [B 1 G*N S+N]
        if self.args.learned_positions:
            # Candidates may stand past the last position; they are never accepted.
            x = x + self.position_embed(positions.clamp(max=self.args.max_position - 1))
        else:
            rope = rope_angles(positions, self.inv_freq, x.dtype)
        # Entered once for all layers: it costs as much as a small attention.
        backends = sdpa_kernel(SDPA_BACKENDS) if attend is None else nullcontext()
        visible, attend = (cached, ancestors, mask), attend or plain_attention
        with backends:
            for layer, layer_kv in zip(self.layers, kv, strict=True):
                x, layer_new = layer(x, rope, layer_kv, visible, attend)
                new_kv.append(layer_new)
        return self.norm(x), torch.stack(new_kv)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] of final-norm hidden states [..., D]."""
        return self.output(hidden).float()


def kv_cache_shape(args: ModelArgs, batch_size: int, slots: int) -> tuple[int, ...]:
    """Shape of the one buffer that holds every layer's keys and values: [L, 2, B, K, S, E]."""
    return (args.n_layers, 2, batch_size, args.n_kv_heads, slots, args.head_dim)


def write_cache(kv: Tensor, new_kv: Tensor, slots: Tensor) -> None:
    """Write new_kv [L, 2, B, K, N, E] into kv at `slots` [B, N], in place."""
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
    kv[:, :, rows, :, slots] = new_kv.permute(2, 4, 0, 1, 3, 5)


def grouped_mask(seen: Tensor, args: ModelArgs, dtype: torch.dtype) -> Tensor:
    """What `plain_attention` adds to scores, [B, 1, G*N, T]: 0 where seen [B, N, T], else -inf.
    Made once: of a bool mask every layer would make it again."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
    return mask.repeat(1, args.n_heads // args.n_kv_heads, 1)[:, None]


def own_kv(qkv: Tensor, K: int) -> Tensor:
    """The keys and values [2, B, K, N, E] in qkv [B, N, H+2K, E]."""
    B, N, _, E = qkv.shape
    return qkv[:, :, -2 * K :].view(B, N, 2, K, E).permute(2, 0, 3, 1, 4)


def plain_attention(
    qkv: Tensor, kv: Tensor, cached: Tensor, ancestors: Tensor, mask: Tensor
) -> Tensor:
    """Attention [B, N, H, E] of the queries in qkv [B, N, H+2K, E] over the cache kv
    [2, B, K, S, E] and the keys and values in qkv: the G query heads that share a KV head become
    G * N query rows, of which `grouped_mask` says what they see (`cached` and `ancestors`)."""
    (B, N, _, E), K = qkv.shape, kv.shape[2]
    q = qkv[:, :, : -2 * K].view(B, N, K, -1, E).permute(0, 2, 3, 1, 4)  # [B K G N E]
    keys, values = torch.cat((kv, own_kv(qkv, K)), dim=3)  # [B K S+N E]
    y = F.scaled_dot_product_attention(q.reshape(B, K, -1, E), keys, values, attn_mask=mask)
    return y.view(B, K, -1, N, E).permute(0, 3, 1, 2, 4).reshape(B, N, -1, E)


def forward_in_place(
    model: Transformer, tokens: Tensor, positions: Tensor, kv: Tensor, live: int, ancestors: Tensor
) -> Tensor:
    """`Transformer.forward` of one row on a CPU: final-norm hidden states [1, N, D], with keys and
    values written to kv at once, after its `live` tokens, for which it has the slots.

    For few tokens an operation takes about the same time however little it does, so here is a
    quarter fewer: modules are not called but their `forward`; keys, values and queries are turned
    as one (values by no angle), into the layout that the cache and the attention take.
    """
    args, (_, N), end = model.args, tokens.shape, live + tokens.shape[1]
    H, K, E = args.n_heads, args.n_kv_heads, args.head_dim
    mask, x = None, model.embed(tokens[0])  # [N D]
    if N > 1:
        seen = F.pad(ancestors, (live, 0), value=True)[None]
        mask = grouped_mask(seen, args, x.dtype)  # [1 1 G*N T]
    if args.learned_positions:
        x = x + model.position_embed(positions[0].clamp(max=args.max_position - 1))
    else:
        cos, sin = rope_angles(positions, model.inv_freq, x.dtype)  # [1 N 1 E]
        still = (0, 0, 0, 0, 0, K)  # the values
        cos = F.pad(cos[0].transpose(0, 1).expand(H + K, -1, -1), still, value=1.0)  # [H+2K N E]
        sin = F.pad(sin[0].transpose(0, 1).expand(H + K, -1, -1), still)
    own = kv[:, :, 0, :, live:end].view(-1, 2 * K, N, E)  # [L 2K N E]
    keys, values = kv[..., :end, :].unbind(1)  # [L 1 K T E]
    layer: Any
    for layer, new_kv, k, v in zip(model.layers, own, keys, values, strict=True):
        attention = layer.attention
        qkv = attention.wqkv.forward(layer.attention_norm.forward(x))
        qkv = qkv.view(N, -1, E).transpose(0, 1)  # [H+2K N E]
        if not args.learned_positions:
            qkv = qkv.roll(E // 2, -1).mul_(sin).addcmul_(qkv, cos)
        new_kv.copy_(qkv[H:])
        q = qkv[:H].reshape(1, K, -1, E)  # [1 K G*N E]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.view(K, -1, N, E).permute(2, 0, 1, 3).reshape(N, -1)
        x = x + attention.wo.forward(y)
        x = x + layer.mlp.forward(layer.mlp_norm.forward(x))
    return model.norm(x)[None]


# Without cuDNN's, which builds a new plan for every prompt length.
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def rope_frequencies(args: ModelArgs) -> Tensor:
    """Inverse wavelengths [E / 2], float32, with Llama 3.1 scaling where the config asks for it."""
    steps = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device="cpu")
    freq = 1.0 / args.rope_theta ** (steps / args.head_dim)
    if (scaling := args.rope_scaling) is None:
        return freq
    # Long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
    turns = scaling.original_max_position_embeddings * freq / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * freq + (1 - keep) * freq / scaling.factor


def rope_angles(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, N, 1, E] for positions [B, N], from angles in float32; the sine's first
    half is negative, as `apply_rope` takes it."""
    assert inv_freq.dtype == torch.float32, "model.to(dtype) must leave inv_freq in float32"
    angles = positions[..., None].float() * inv_freq  # [B N E/2]
    angles = torch.cat((-angles, angles), dim=-1)[:, :, None]  # [B N 1 E]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x [B, N, h, E] in Hugging Face's layout (first half against second half), in place."""
    x.copy_(x.roll(x.shape[-1] // 2, -1).mul_(sin).addcmul_(x, cos))


# --- weights -----------------------------------------------------------------------------------

# By model_type: our module -> the Hugging Face modules whose tensors fill it, in this order.
HF_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {
        "embed": ("model.embed_tokens",),
        "layers.{}.attention_norm": ("model.layers.{}.input_layernorm",),
        "layers.{}.attention.wqkv": (
            "model.layers.{}.self_attn.q_proj",
            "model.layers.{}.self_attn.k_proj",
            "model.layers.{}.self_attn.v_proj",
        ),
        "layers.{}.attention.wo": ("model.layers.{}.self_attn.o_proj",),
        "layers.{}.mlp_norm": ("model.layers.{}.post_attention_layernorm",),
        "layers.{}.mlp.w13": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
        "layers.{}.mlp.w2": ("model.layers.{}.mlp.down_proj",),
        "norm": ("model.norm",),
        "output": ("lm_head",),
    },
    "gpt_bigcode": {
        "embed": ("transformer.wte",),
        "position_embed": ("transformer.wpe",),
        "layers.{}.attention_norm": ("transformer.h.{}.ln_1",),
        "layers.{}.attention.wqkv": ("transformer.h.{}.attn.c_attn",),
        "layers.{}.attention.wo": ("transformer.h.{}.attn.c_proj",),
        "layers.{}.mlp_norm": ("transformer.h.{}.ln_2",),
        "layers.{}.mlp.w1": ("transformer.h.{}.mlp.c_fc",),
        "layers.{}.mlp.w2": ("transformer.h.{}.mlp.c_proj",),
        "norm": ("transformer.ln_f",),
        "output": ("lm_head",),
    },
}

# Ends of the names of buffers that old checkpoints hold and nothing needs.
OLD_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")

STORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def load_model(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
    local_args: ModelArgs | None = None,
    part: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> Transformer:
    """Target model from a directory with config.json and weights: safetensors, or if there are
    none torch's .bin, as one file or as shards with their index.

    Files are mapped, not read: tensors go to `device` one at a time, and the host needs room for
    one. `progress` may wrap the list of their names. For a part of the model, `local_args` gives
    its shape and part(name, tensor) what it holds of a stored tensor. Raises ValueError naming
    file and tensor when something is missing, unknown, of another shape, cut off or not finite;
    names, shapes and types are all checked before the first weight is read.
    """
    directory = Path(directory)
    args = ModelArgs.from_config(read_json(directory / "config.json"))
    with torch.device("meta"):
        whole, model = Transformer(args), Transformer(local_args or args).to(dtype)
    found = map_weights(directory)
    name = HF_NAMES[args.model_type]["embed"][0] + ".weight"
    head = found.pop("lm_head.weight", None) if args.tie_embeddings else None
    if head is not None:
        found.setdefault(name, head)  # one matrix, stored under either name or both
    check_weights(directory, found, hf_tensors(whole))
    if head is not None:
        check_tied(*head, name, found[name][1])
    del head  # which would keep its file mapped
    if args.tie_embeddings:
        del model.output.weight  # to_empty would give it memory of its own
    model.to_empty(device=device)
    if args.tie_embeddings:
        model.output.weight = model.embed.weight
    model.inv_freq = rope_frequencies(args).to(device)
    copy_tensors(found, hf_tensors(model), progress, part)
    return model.eval().requires_grad_(False)


def hf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every Hugging Face tensor name of this model, with the (part of the) parameter it fills."""
    args, ours = model.args, dict(model.named_parameters())
    parts = {
        "wqkv": [h * args.head_dim for h in (args.n_heads, args.n_kv_heads, args.n_kv_heads)],
        "w13": [args.ffn_dim, args.ffn_dim],
    }
    tensors: dict[str, Tensor] = {}
    for name, theirs in HF_NAMES[args.model_type].items():
        for i in range(args.n_layers if "{}" in name else 1):
            for kind in ("weight", "bias"):
                if (param := ours.get(f"{name.format(i)}.{kind}")) is not None:
                    sizes = parts[name.rsplit(".")[-1]] if len(theirs) > 1 else [len(param)]
                    pieces = zip(theirs, param.detach().split(sizes), strict=True)
                    tensors |= {f"{their.format(i)}.{kind}": piece for their, piece in pieces}
    return tensors


def read_json(path: Path) -> dict:
    """A parsed JSON object; ValueError naming the file when it is absent or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is this a model directory?") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def weight_files(directory: Path) -> list[Path]:
    """The checkpoint's weight files, all of them present: safetensors where there are any."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index, names = directory / f"{single}.index.json", [single]
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index}: weight_map is missing")
            names = sorted({str(name) for name in weight_map.values()})
        elif not (directory / single).exists():
            continue
        suffix = Path(single).suffix
        if bad := [name for name in names if not name.endswith(suffix) or "/" in name]:
            raise ValueError(f"{index}: {bad[0]!r} is not the name of a {suffix} file")
        if missing := [name for name in names if not (directory / name).exists()]:
            raise ValueError(f"{directory}: {', '.join(missing)} not found; download it again")
        return [directory / name for name in names]
    raise ValueError(
        f"{directory}: neither model.safetensors nor pytorch_model.bin found; download it again"
    )


def map_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory: each is read from disk when it is used, and
    nothing in the file is executed."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if not zipfile.is_zipfile(file):
            raise ValueError("not a whole zip archive, as torch.save writes since torch 1.6")
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file}: holds more than tensors, which could run code; use a safetensors file"
        ) from None
    except Exception as error:  # damage shows as errors of many types
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file}: cut off or damaged ({reason}); download it again") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{file}: expected tensors by name, found {type(tensors).__name__}")
    for name, value in tensors.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided and value.is_cpu
        if not (plain and isinstance(name, str)):
            raise ValueError(f"{file}: {name!r} is not a plain tensor")
    return tensors


def map_weights(directory: Path) -> dict[str, tuple[Path, Tensor]]:
    """Tensor name -> (file, tensor) of all files."""
    found: dict[str, tuple[Path, Tensor]] = {}
    for file in weight_files(directory):
        for name, tensor in map_file(file).items():
            if name in found:
                raise ValueError(f"{file}: {name} is also in {found[name][0].name}")
            found[name] = (file, tensor)
    return found


def check_weights(where: Path, found: dict, wanted: dict[str, Tensor]) -> None:
    """Every wanted tensor is there with its shape, and nothing unknown is."""
    extra = {name for name in found if name.endswith(OLD_BUFFERS)}
    if missing := wanted.keys() - found.keys():
        raise ValueError(f"{where}: {len(missing)} tensors missing, first {min(missing)}")
    if unknown := found.keys() - wanted.keys() - extra:
        raise ValueError(f"{where}: {len(unknown)} unknown tensors, first {min(unknown)}")
    for name, target in wanted.items():
        file, tensor = found[name]
        if tensor.dtype not in STORED_DTYPES:
            raise ValueError(
                f"{file}: {name} is {tensor.dtype}; supported: float16, bfloat16, float32"
            )
        if tensor.shape != target.shape:
            raise ValueError(
                f"{file}: {name} has shape {list(tensor.shape)}, "
                f"config.json says {list(target.shape)}"
            )


def check_tied(file: Path, head: Tensor, name: str, embed: Tensor) -> None:
    """A head that is stored beside the embedding it is tied to is the same matrix."""
    if head is not embed and not torch.equal(head, embed.to(head.dtype)):
        raise ValueError(
            f"{file}: lm_head.weight differs from {name}, to which config.json ties it; set "
            "tie_word_embeddings to false"
        )


@torch.no_grad()
def copy_tensors(
    found: dict, targets: dict[str, Tensor], progress: Callable, part: Callable
) -> None:
    """Fill the targets one at a time, file by file, with parts of what was found; each must turn
    out finite."""
    ranges = {}
    for name in progress(sorted(targets, key=lambda name: found[name][0])):
        file, tensor = found.pop(name)  # a file is unmapped with its last tensor
        target = targets[name]
        target.copy_(part(name, tensor).to(target.device))  # another dtype: made on the device
        ranges[file, name] = torch.stack(target.aminmax())
    finite = torch.stack(list(ranges.values())).isfinite().all(1).tolist()  # one wait for all
    if bad := [where for where, good in zip(ranges, finite, strict=True) if not good]:
        file, name = bad[0]
        raise ValueError(
            f"{file}: {name} holds NaN or values beyond {targets[name].dtype}; "
            "download it again or choose a wider dtype"
        )
