"""Llama-family target model over a static KV cache, loaded from Hugging Face checkpoints.

This file needs only torch and safetensors: copy it into another repository as it is.

Letters in shape comments:
    B rows (sequences)     N tokens per row in this call    S cache slots      D hidden width
    H query heads          K key/value heads, G = H / K     E head_dim         F feed-forward width
    L layers               V vocabulary
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
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

    @classmethod
    def from_config(cls, config: dict) -> "ModelArgs":
        """Args from a parsed config.json; defaults are those of transformers' LlamaConfig.

        Raises ValueError naming the field when it is missing or its value is not supported.
        """
        if (kind := config.get("model_type")) != "llama":
            raise ValueError(f"config.json: model_type {kind!r} is not supported; supported: llama")
        if (act := config.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"config.json: hidden_act {act!r} is not supported; supported: silu")
        dim, n_heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
        n_kv_heads = _number(config, "num_key_value_heads", n_heads)
        if n_heads % n_kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {n_heads} is not a multiple of "
                f"num_key_value_heads {n_kv_heads}"
            )
        head_dim = _number(config, "head_dim", dim // n_heads)
        if head_dim % 2:
            raise ValueError(f"config.json: head_dim {head_dim} is odd; rope needs pairs")
        rope_theta, rope_scaling = _read_rope(config)
        return cls(
            dim=dim,
            n_layers=_number(config, "num_hidden_layers"),
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


def _number(config: dict, key: str, default: float | None = None, kind: type = int):
    """A positive, finite number of the config; `default` when it is absent or null."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"config.json: {key} is missing")
    wrong_type = isinstance(value, bool) or not isinstance(value, (int, kind))
    if wrong_type or not 0 < value < math.inf:
        name = "integer" if kind is int else "number"
        raise ValueError(f"config.json: {key} must be a positive {name}, found {value!r}")
    return kind(value)


def _flag(config: dict, key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {key} must be true or false, found {value!r}")
    return bool(value)


def _read_rope(config: dict) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_theta` + `rope_scaling` or from the newer `rope_parameters`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
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
        q, k, v = self.wqkv(x).view(B, N, -1, self.head_dim).split(self.heads, dim=2)  # [B N h E]
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        y = attend(q, k, v, kv, *visible)  # [B N H E]
        return self.wo(y.reshape(B, N, -1)), torch.stack((k, v)).transpose(2, 3)  # [2 B K N E]


class MLP(nn.Module):
    """SwiGLU feed-forward, gate and up projections fused."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w13 = nn.Linear(args.dim, 2 * args.ffn_dim, bias=args.mlp_bias)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=args.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.attention = Attention(args)
        self.mlp_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.mlp = MLP(args)

    def forward(self, x: Tensor, *context) -> tuple[Tensor, Tensor]:
        y, new_kv = self.attention(self.attention_norm(x), *context)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), new_kv


class Transformer(nn.Module):
    """Llama decoder, a pure function: the KV cache belongs to the caller, who also writes it."""

    inv_freq: Tensor

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.embed = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Layer(args) for _ in range(args.n_layers))
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
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
        slots of each row are seen by all its tokens; ancestors: bool [N, N], True where token n
        (row) sees token m (column) of this call. `attend` replaces `plain_attention`.
        """
        B, S = tokens.shape[0], kv.shape[-2]
        in_cache = torch.arange(S, device=kv.device) < cached[:, None, None]  # [B 1 S]
        among = ancestors.expand(B, -1, -1)
        mask = torch.cat((in_cache.expand(-1, among.shape[1], -1), among), dim=-1)  # [B N S+N]
        mask = mask.repeat(1, self.args.n_heads // self.args.n_kv_heads, 1)  # [B G*N S+N]
        x, new_kv = self.embed(tokens), []
        rope = rope_angles(positions, self.inv_freq, x.dtype)
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, layer_new = layer(
                x, rope, layer_kv, (cached, ancestors, mask), attend or plain_attention
            )
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


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor, cached: Tensor, ancestors: Tensor, mask: Tensor
) -> Tensor:
    """Attention [B, N, H, E] of q [B, N, H, E] over the cache kv [2, B, K, S, E] and over the
    call's own k, v [B, N, K, E]; mask [B, G*N, S+N] says both `cached` and `ancestors` at once."""
    B, N, H, E = q.shape
    K = k.shape[2]
    keys = torch.cat((kv[0], k.transpose(1, 2)), dim=2)  # [B K S+N E]
    values = torch.cat((kv[1], v.transpose(1, 2)), dim=2)
    # The G query heads that share a KV head become G * N query rows.
    q = q.view(B, N, K, -1, E).permute(0, 2, 3, 1, 4).reshape(B, K, -1, E)  # [B K G*N E]
    with sdpa_kernel(SDPA_BACKENDS):
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None])
    return y.view(B, K, H // K, N, E).permute(0, 3, 1, 2, 4).reshape(B, N, H, E)


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
    """Cosine and sine [B, N, 1, E] for positions [B, N]; angles in float32."""
    assert inv_freq.dtype == torch.float32, "model.to(dtype) must leave inv_freq in float32"
    angles = positions[..., None].float() * inv_freq  # [B N E/2]
    angles = torch.cat((angles, angles), dim=-1)[:, :, None]  # [B N 1 E]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, N, h, E] in Hugging Face's layout (first half against second half)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


# --- weights -----------------------------------------------------------------------------------

# Our module -> the Hugging Face modules whose tensors fill it, stacked in this order.
HF_NAMES = {
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
}


def load_model(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Transformer:
    """Target model from a directory with config.json and safetensors (one file, or shards + index).

    Tensors go to `device` one at a time; `progress` may wrap the list of their names. Raises
    ValueError naming file and tensor when something is missing, unknown, of another shape or cut
    off; names, shapes and types are all checked before the first weight is read.
    """
    directory = Path(directory)
    args = ModelArgs.from_config(read_json(directory / "config.json"))
    files = safetensors_files(directory)
    with torch.device("meta"):
        model = Transformer(args).to(dtype)
    found = read_headers(files)
    check_names(directory, found, {n: t.shape for n, t in hf_tensors(model).items()}, args)
    model.to_empty(device=device)
    if args.tie_embeddings:  # to_empty gives each module its own storage
        model.output.weight = model.embed.weight
    model.inv_freq = rope_frequencies(args).to(device)
    copy_tensors(found, hf_tensors(model), progress)
    return model.eval().requires_grad_(False)


def hf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every Hugging Face tensor name of this model, with the (part of the) parameter it fills."""
    args, ours = model.args, dict(model.named_parameters())
    parts = {
        "wqkv": [h * args.head_dim for h in (args.n_heads, args.n_kv_heads, args.n_kv_heads)],
        "w13": [args.ffn_dim, args.ffn_dim],
    }
    tensors: dict[str, Tensor] = {}
    for name, theirs in HF_NAMES.items():
        for i in range(args.n_layers if "{}" in name else 1):
            for kind in ("weight", "bias"):
                if (param := ours.get(f"{name.format(i)}.{kind}")) is not None:
                    sizes = parts.get(name.rsplit(".")[-1], [len(param)])
                    pieces = zip(theirs, param.detach().split(sizes), strict=True)
                    tensors |= {f"{their.format(i)}.{kind}": piece for their, piece in pieces}
    return tensors


def read_json(path: Path) -> dict:
    """A parsed JSON object; ValueError naming the file when it is absent or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is this a model directory?") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def safetensors_files(directory: Path) -> list[Path]:
    """The checkpoint's safetensors files, all of them present."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        names = ["model.safetensors"]
    elif not isinstance(weight_map := read_json(index).get("weight_map"), dict):
        raise ValueError(f"{index}: weight_map is missing")
    else:
        names = sorted({str(name) for name in weight_map.values()})
    if bad := [name for name in names if not name.endswith(".safetensors") or "/" in name]:
        raise ValueError(f"{index}: {bad[0]!r} is not the name of a safetensors file")
    files = [directory / name for name in names]
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(f"{directory}: {', '.join(missing)} not found; download it again")
    return files


def read_headers(files: list[Path]) -> dict[str, tuple[Path, torch.Size]]:
    """Tensor name -> (file, shape), from the files' headers alone."""
    found: dict[str, tuple[Path, torch.Size]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (safe_open is not a dict)
                    if name in found:
                        raise ValueError(f"{file}: {name} is also in {found[name][0].name}")
                    header = shard.get_slice(name)
                    if (kind := header.get_dtype()) not in ("F16", "BF16", "F32"):
                        raise ValueError(f"{file}: {name} is {kind}; supported: F16, BF16, F32")
                    found[name] = (file, torch.Size(header.get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{file}: cut off or damaged ({error}); download it again") from None
    return found


def check_names(where: Path, found: dict, wanted: dict[str, torch.Size], args: ModelArgs) -> None:
    """Every wanted tensor is there with its shape, and nothing unknown is."""
    extra = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    extra |= {"lm_head.weight"} if args.tie_embeddings else set()
    if missing := wanted.keys() - found.keys():
        raise ValueError(f"{where}: {len(missing)} tensors missing, first {min(missing)}")
    if unknown := found.keys() - wanted.keys() - extra:
        raise ValueError(f"{where}: {len(unknown)} unknown tensors, first {min(unknown)}")
    for name, shape in wanted.items():
        if found[name][1] != shape:
            file, have = found[name]
            raise ValueError(
                f"{file}: {name} has shape {list(have)}, config.json says {list(shape)}"
            )


def copy_tensors(found: dict, targets: dict[str, Tensor], progress: Callable) -> None:
    """Fill the target tensors one at a time, file by file."""
    for name in progress(sorted(targets, key=lambda name: found[name][0])):
        file, _ = found[name]
        with safe_open(file, framework="pt") as shard:
            targets[name].copy_(shard.get_tensor(name))
