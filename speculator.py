"""IBM's MLP speculator: drafts tokens from a target model's hidden state and the last token.

Wertheimer et al., "Accelerating Production LLMs with Combined Token/Embedding Speculators"
(arXiv 2404.19124); the checkpoint format is the one of the published "accelerators".
This file needs only torch and safetensors: copy it into another repository as it is.

Letters in shape comments:
    B rows (sequences)     D the target's hidden width (emb_dim)     W inner_dim     V vocabulary
    C nodes at one depth of a tree
"""

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class SpeculatorArgs:
    """Shape of a speculator; `from_config` reads it from an accelerator's config.json."""

    emb_dim: int
    inner_dim: int
    n_predict: int
    vocab_size: int
    tie_weights: bool = False
    scale_input: bool = False
    top_k_tokens_per_head: tuple[int, ...] = ()
    n_candidates: int | None = None
    base_model: str | None = None
    draft_vocab_size: int | None = None  # None: every token can be drafted
    emb_rank: int | None = None  # None: tokens that cannot be share an embedding

    @classmethod
    def from_config(cls, config: dict) -> "SpeculatorArgs":
        """Args from a parsed config.json. An absent `tie_weights` or `scale_input` means False
        and inner_dim 0 means emb_dim, as in the reference; `draft_vocab_size` and `emb_rank` are
        additions to the format. Raises ValueError naming the field.
        """
        if (kind := config.get("model_type")) != "mlp_speculator":
            raise ValueError(
                f"config.json: model_type {kind!r} is not a speculator; expected 'mlp_speculator'"
            )
        if (method := config.get("method")) is not None:
            raise ValueError(
                f"config.json: method {method!r} (of Arctic's LSTM speculators) is not supported"
            )
        emb_dim, n_predict = _integer(config, "emb_dim"), _integer(config, "n_predict", most=MOST)
        top_k = config.get("top_k_tokens_per_head") or [1] * n_predict
        good = isinstance(top_k, list) and all(type(k) is int and 0 < k <= MOST for k in top_k)
        if not good or len(top_k) != n_predict:
            raise ValueError(
                f"config.json: top_k_tokens_per_head must be {n_predict} (n_predict) integers "
                f"of 1 to {MOST}, found {top_k!r}"
            )
        base_model = config.get("base_model_name_or_path")
        if not isinstance(base_model, str | None):
            raise ValueError(
                f"config.json: base_model_name_or_path must be a name, found {base_model!r}"
            )
        if (n_candidates := config.get("n_candidates")) is not None:
            _integer(config, "n_candidates", most=MOST)
        vocab_size = _integer(config, "vocab_size")
        if (draft_vocab_size := config.get("draft_vocab_size")) is not None:
            _integer(config, "draft_vocab_size", most=vocab_size)
        if (emb_rank := config.get("emb_rank")) is not None:
            if not (outside := vocab_size - (draft_vocab_size or vocab_size)):
                raise ValueError("config.json: emb_rank needs a draft_vocab_size below vocab_size")
            _integer(config, "emb_rank", most=min(emb_dim, outside))
        return cls(
            emb_dim=emb_dim,
            inner_dim=_integer(config, "inner_dim", least=0) or emb_dim,
            n_predict=n_predict,
            vocab_size=vocab_size,
            tie_weights=_flag(config, "tie_weights"),
            scale_input=_flag(config, "scale_input"),
            top_k_tokens_per_head=tuple(top_k),
            n_candidates=n_candidates,
            base_model=base_model,
            draft_vocab_size=draft_vocab_size,
            emb_rank=emb_rank,
        )


MOST = 1024  # heads, tokens per head, candidates: a damaged config.json is refused, not built


def _integer(config: dict, key: str, least: int = 1, most: int = 2**24) -> int:
    value = config.get(key)
    if value is None:
        raise ValueError(f"config.json: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(
            f"config.json: {key} must be an integer of {least} to {most}, found {value!r}"
        )
    return value


def _flag(config: dict, key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {key} must be true or false, found {value!r}")
    return bool(value)


class LayerNorm(nn.Module):
    """x * rsqrt(mean(x^2) + 1e-6) * weight + bias in float32: no mean is subtracted."""

    eps = 1e-6

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return x * self.weight.float() + self.bias.float()


class RankEmbedding(nn.Module):
    """An embedding table [V, W] with `drafted` rows of their own: each of the others is the last
    row of `weight` and a combination, its row of `down`, of the `rank` rows of `up`."""

    def __init__(self, rows: int, drafted: int, rank: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(drafted + 1, width))
        self.down = nn.Parameter(torch.empty(rows - drafted, rank))
        self.up = nn.Parameter(torch.empty(rank, width))

    def forward(self, row: Tensor) -> Tensor:
        """Rows [..., W] of the table, of which a gradient is as small as what is stored."""
        other = row - (len(self.weight) - 1)
        # No branch on the device's numbers: an own row takes some row of down, times 0.
        down = F.embedding(other % len(self.down), self.down) * (other >= 0)[..., None]
        return F.embedding(row.clamp(max=len(self.weight) - 1), self.weight) + down @ self.up

    def table(self) -> Tensor:
        return torch.cat((self.weight[:-1], torch.addmm(self.weight[-1], self.down, self.up)))


class MLPSpeculator(nn.Module):
    """n_predict heads; head i predicts the (i+1)-th token after the last one.

    With a draft vocabulary, only the tokens `draft_ids` have rows of their own in emb and head:
    all others share the last row of emb, or with emb_rank differ from it as a `RankEmbedding`
    says, and are never drafted.
    """

    draft_ids: Tensor | None
    emb_row: Tensor | None
    eight_bit = False  # whether the checkpoint's matrices are int8
    gelu = "none"  # its approximation

    def __init__(self, args: SpeculatorArgs):
        super().__init__()
        self.args = args
        n, D, W, V = args.n_predict, args.emb_dim, args.inner_dim, args.vocab_size
        # The weights depend on the trained n_predict, however many tokens are drafted.
        state_weight = 0.5 ** (0.5 / n)
        self.token_scale = math.sqrt((1 - state_weight**2) * W / 2) / state_weight
        copies = 1 if args.tie_weights else n
        drafted = args.draft_vocab_size or V
        rows = drafted + 1 if args.draft_vocab_size else V
        r, self.emb = args.emb_rank, nn.ModuleList()
        for _ in range(copies):
            self.emb.append(RankEmbedding(V, drafted, r, W) if r else nn.Embedding(rows, W))
        self.ln0 = nn.RMSNorm(D, eps=LayerNorm.eps, elementwise_affine=False)
        self.ln = nn.ModuleList([LayerNorm(W) for _ in range(copies)])
        self.head = nn.ModuleList([nn.Linear(W, drafted, bias=False) for _ in range(copies)])
        # proj[0] maps the target's width; tied heads share one projection after it.
        rest = [nn.Linear(W, W, bias=False) for _ in range(min(n - 1, copies))]
        self.proj = nn.ModuleList([nn.Linear(D, W, bias=False), *rest])
        self.register_buffer("draft_ids", None)  # [drafted], ascending
        self.register_buffer("emb_row", None)  # [V], token -> row of emb

    def set_draft_ids(self, ids: Tensor) -> None:
        """Name the tokens [drafted] of the draft vocabulary, ascending."""
        row = torch.full((self.args.vocab_size,), len(ids), device=ids.device)
        row[ids] = torch.arange(len(ids), device=ids.device)
        if self.args.emb_rank:  # the others have one each
            other = row == len(ids)
            row = torch.where(other, row + other.cumsum(0) - 1, row)
        self.draft_ids, self.emb_row = ids, row

    def filled(self) -> "MLPSpeculator":
        """Itself, each RankEmbedding now an ordinary table with a row for every token."""
        if tables := [emb.table() for emb in self.emb if isinstance(emb, RankEmbedding)]:
            self.emb = nn.ModuleList(map(nn.Embedding.from_pretrained, tables))
        return self

    def start(self, hidden: Tensor) -> Tensor:
        """State before the first head, from the target's final-norm hidden state [B, D]."""
        if self.args.scale_input:
            # float32, because the square of a 16-bit hidden state can overflow.
            return (self.ln0(hidden.float()) / math.sqrt(2)).to(hidden.dtype)
        return hidden

    def step(self, i: int, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """State [B, W] and float32 logits [B, V or drafted] of head i after `token` [B]."""
        token = token if self.emb_row is None else self.emb_row[token]
        shared = 0 if self.args.tie_weights else i
        proj = self.proj[min(i, len(self.proj) - 1)]
        state = torch.add(proj(state), self.emb[shared](token), alpha=self.token_scale)
        state = F.gelu(self.ln[shared](state), approximate=self.gelu).to(state.dtype)
        return state, self.head[shared](state).float()

    def draft(
        self,
        hidden: Tensor,
        token: Tensor,
        position: Tensor,
        k: int,
        choose: Callable[..., tuple[Tensor, bool]] = lambda logits, *_: (logits.argmax(-1), True),
    ) -> Tensor:
        """A chain of k <= n_predict draft tokens, int64 [B, k].

        hidden [B, D]: the target's hidden state after its final norm, at the position whose
        logits gave `token` [B], which stands at `position` [B]; choose(logits [B, V or drafted],
        position [B], draft_ids) picks a column of the logits for a position, and says whether to
        go on after it.
        """
        state, drafts = self.start(hidden), token[:, None][:, :0]
        for i in range(k):
            state, logits = self.step(i, state, token)
            column, go_on = choose(logits, position + i + 1, self.draft_ids)
            token = column if self.draft_ids is None else self.draft_ids[column]
            drafts = torch.cat((drafts, token[:, None]), dim=1)
            if not go_on:
                break
        return drafts

    def draft_tree(
        self,
        hidden: Tensor,
        token: Tensor,
        position: Tensor,
        top_k: Sequence[int],
        nodes: int,
        score: Callable[..., Tensor] = lambda logits, position, ids: logits,
        top: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A tree of draft tokens: the tokens and the parents of its nodes, both int64 [B, nodes].

        Node 0 is the root, `token`, and its own parent; a parent comes before its children. Head i
        gives each node at depth i the top_k[i] children of the highest scores, and the tree is the
        `nodes` likeliest by the product of probabilities from the root, which are closed under
        parents. hidden, token and position are as for `draft`; score(logits [B, C, V or drafted],
        position [B], draft_ids) gives the logits whose softmax are the probabilities. `top` stands
        in for `top_children`.
        """
        state, token = self.start(hidden)[:, None], token[:, None]  # [B C D], [B C]
        top = top or top_children
        joint = torch.zeros(token.shape, device=token.device)  # log-probability from the root
        levels, first = [(token, torch.zeros_like(token), joint)], 0
        children, counts = tree_widths(top_k, nodes)
        for i, k in enumerate(children):
            state, logits = self.step(i, state, token)
            scores = score(logits, position + i + 1, self.draft_ids)
            child, gain = top(scores, k, LEAST)
            C, most = counts[i : i + 2]
            parent = (torch.arange(C * k, device=child.device) // k).expand(child.shape[0], -1)
            token, joint = child.flatten(1), (joint[..., None] + gain).flatten(1)  # [B C*k]
            if C * k > most:
                keep = torch.argsort(joint, dim=1, descending=True, stable=True)[:, :most]
                token, joint, parent = (x.gather(1, keep) for x in (token, joint, parent))
            token = token if self.draft_ids is None else self.draft_ids[token]
            levels.append((token, parent + first, joint))
            first += C
            state = state.take_along_dim(parent[..., None], dim=1)  # [B C W], of the new C
        tokens, parents, joints = (torch.cat(part, dim=1) for part in zip(*levels, strict=True))
        # A child's joint probability is at most its parent's, which stands before it; equal ones
        # keep their order: so the first `nodes` hold the parent of each of theirs, before it.
        order = torch.argsort(joints, dim=1, descending=True, stable=True)
        rank, kept = order.argsort(dim=1), order[:, :nodes]
        return tokens.gather(1, kept), rank.gather(1, parents.gather(1, kept))


# Smallest log-probability of a token: sums of a few stay finite, whatever the logits are.
LEAST = -1e4


def tree_widths(top_k: Sequence[int], nodes: int) -> tuple[list[int], list[int]]:
    """How many children each node gets, by depth, and how many nodes then go on: at most as many
    as the tree can hold there. Those of the last depth all do."""
    children, counts = [], [1]
    for i, k in enumerate(top_k):
        most = nodes - 1 - i  # the tree has i nodes between, where it is so deep
        children.append(min(k, most))
        width = counts[-1] * children[-1]
        counts.append(width if i == len(top_k) - 1 else min(width, most))
    return children, counts


def top_children(scores: Tensor, k: int, least: float = LEAST) -> tuple[Tensor, Tensor]:
    """Columns [B, C, k] of the k highest of scores [B, C, V], and their log-softmax: highest
    first, of equal ones the lowest column, and none below `least`."""
    columns, total, rest = [], scores.logsumexp(-1, keepdim=True), scores
    every = torch.arange(scores.shape[-1], device=scores.device)
    for _ in range(k):
        columns.append(rest.argmax(-1, keepdim=True))
        rest = torch.where(every == columns[-1], -torch.inf, rest)
    found = torch.cat(columns, dim=-1)
    gain = scores.gather(-1, found) - total
    return found, torch.where(gain > least, gain, least).clamp(max=0)  # NaN, too


# --- weights -----------------------------------------------------------------------------------


def load_speculator(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
    part: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> MLPSpeculator:
    """Speculator from a directory with config.json and weights: safetensors, or if there are none
    torch's .bin, as one file or as shards with their index.

    Tensor names may carry the prefix `speculator.`; tied tensors may be stored once or under
    every alias. Files are mapped, not read: tensors go to `device` one at a time (int8 matrices
    become float32 on the host first, all of them). With `part`, only part(name, tensor) of each is
    built and read. Raises ValueError naming file and tensor when something does not fit or is not
    finite; names, shapes and types are checked before the first weight is read.
    """
    directory = Path(directory)
    args = SpeculatorArgs.from_config(_read_json(directory / "config.json"))
    with torch.device("meta"):
        model = MLPSpeculator(args).to(dtype)
    found = _map_weights(directory)
    model.eight_bit = _unpack(found)
    ids = _draft_ids(directory, found, args)
    _check(directory, found, _tensor_names(model))
    for name, param in model.named_parameters():
        param.data = part(name, param.data).contiguous()
    model.to_empty(device=device)
    if ids is not None:
        model.set_draft_ids(ids.to(device))
    _copy_tensors(found, _tensor_names(model), progress, part)
    return model.requires_grad_(False).filled().eval()


def _draft_ids(where: Path, found: dict, args: SpeculatorArgs) -> Tensor | None:
    """Take `draft_ids` out of what was found, if config.json has a draft vocabulary."""
    if args.draft_vocab_size is None:
        return None
    if "draft_ids" not in found:
        raise ValueError(f"{where}: config.json says draft_vocab_size, but draft_ids is missing")
    file, stored, ids = found.pop("draft_ids")
    good = ids.shape == (args.draft_vocab_size,) and ids.dtype in (torch.int32, torch.int64)
    if not good or ids[0] < 0 or ids[-1] >= args.vocab_size or (ids.diff() <= 0).any():
        raise ValueError(
            f"{file}: {stored} must be {args.draft_vocab_size} ascending token ids (int32), "
            f"found {list(ids.shape)} of {ids.dtype}"
        )
    return ids.long()


def _unpack(found: dict) -> bool:
    """Replace int8 matrices and their scales per row, an addition to the format, by floats; whether
    there were any."""
    scales = [name for name in found if name.endswith("_scale")]
    for scale_name in scales:
        file, stored, scale = found.pop(scale_name)
        _, _, weight = found.get(name := scale_name.removesuffix("_scale"), (file, "", scale))
        if weight.dtype != torch.int8 or scale.shape != weight.shape[:1] or weight.dim() != 2:
            raise ValueError(f"{file}: {stored} must be the scales [rows] of an int8 matrix")
        found[name] = (file, stored, weight * scale.float()[:, None])
    return bool(scales)


def _tensor_names(model: MLPSpeculator) -> dict[str, Tensor]:
    """Published tensor name -> parameter, with every alias of a tied tensor."""
    params, n = {k: p.detach() for k, p in model.named_parameters()}, model.args.n_predict
    if model.args.tie_weights:
        aliases = [
            (f"{kind}.{i}.", f"{kind}.0.") for kind in ("emb", "ln", "head") for i in range(n)
        ]
        aliases += [(f"proj.{i}.", "proj.1.") for i in range(2, n)]
        for alias, first in aliases:
            for name in [name for name in params if name.startswith(first)]:
                params[name.replace(first, alias)] = params[name]
    return params


def _check(where: Path, found: dict, wanted: dict[str, Tensor]) -> None:
    """Every tensor is there under at least one alias, nothing unknown is, and shapes agree."""
    groups: dict[int, list[str]] = {}
    for name, param in wanted.items():
        groups.setdefault(id(param), []).append(name)
    if missing := [names[0] for names in groups.values() if not found.keys() & set(names)]:
        raise ValueError(f"{where}: {len(missing)} tensors missing, first {min(missing)}")
    if unknown := found.keys() - wanted.keys():
        raise ValueError(f"{where}: {len(unknown)} unknown tensors, first {min(unknown)}")
    for name, (file, stored, tensor) in found.items():
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(
                f"{file}: {stored} is {tensor.dtype}; supported: float16, bfloat16, float32"
            )
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{file}: {stored} has shape {list(tensor.shape)}, "
                f"config.json says {list(wanted[name].shape)}"
            )


def _copy_tensors(
    found: dict, targets: dict[str, Tensor], progress: Callable, part: Callable
) -> None:
    """Fill the targets one at a time with parts of what was found; each must turn out finite, and
    tied tensors equal."""
    copied: dict[int, Tensor] = {}
    ranges = {}
    for name in progress(sorted(found, key=lambda name: found[name][0])):
        (file, stored, tensor), target = found[name], targets[name]
        tensor = part(name, tensor)
        first = copied.setdefault(id(target), tensor)
        if first is tensor:
            target.copy_(tensor.to(target.device))  # a change of dtype happens on the device
            ranges[file, stored] = torch.stack(target.aminmax())
        elif not torch.equal(first, tensor.to(first.dtype)):
            raise ValueError(f"{file}: {stored} differs from the tensor it is tied to")
    finite = torch.stack(list(ranges.values())).isfinite().all(1).tolist()  # one wait for all
    if bad := [where for where, good in zip(ranges, finite, strict=True) if not good]:
        file, stored = bad[0]
        raise ValueError(
            f"{file}: {stored} holds NaN or values beyond {targets[name].dtype}; "
            "download it again or choose a wider dtype"
        )


# Reading files is written here and in model.py, so that each module can be copied alone.


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is this a speculator directory?") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _weight_files(directory: Path) -> list[Path]:
    """The checkpoint's weight files, all of them present: safetensors where there are any."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index, names = directory / f"{single}.index.json", [single]
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
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


def _map_file(file: Path) -> dict[str, Tensor]:
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


def _map_weights(directory: Path) -> dict[str, tuple[Path, str, Tensor]]:
    """Name without prefix -> (file, stored name, tensor) of all files."""
    found: dict[str, tuple[Path, str, Tensor]] = {}
    for file in _weight_files(directory):
        for name, tensor in _map_file(file).items():
            if (key := name.removeprefix("speculator.")) in found:
                raise ValueError(f"{file}: {name} is also in {found[key][0].name}")
            found[key] = (file, name, tensor)
    return found
