"""Small random checkpoints and scripted speculators that the tests share."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
import sentencepiece
import tokenizers
import torch
import torch.nn as nn
from safetensors.torch import save_file

import fastspec
from fastspec import LLM, SamplingParams, decode_loop
from model import load_model
from speculator import load_speculator
from tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def every_draft_is_verified(monkeypatch):
    """Also on a CPU, so that tests can count steps."""
    monkeypatch.setattr(fastspec, "LIKELY", 0.0)
    monkeypatch.setattr(fastspec, "SIBLING", 2.0)  # and no other tokens in place of one


# Tiny models: threads that wait for each other cost more than they give.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before the first import of triton

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny_llama(directory: Path, seed: int = 0, **overrides):
    """A random transformers llama, saved to `directory`; returns the transformers model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(TINY | overrides))).eval()
    for name, param in model.named_parameters():
        # Wide weights: text that does not loop, and logits whose argmax rounding does not flip.
        nn.init.normal_(param, mean=float("norm" in name), std=0.3)
    model.save_pretrained(directory)
    return model


def tiny_gpt_bigcode(directory: Path, seed: int = 0, **overrides):
    """As `tiny_llama`, a random gpt_bigcode of the same width, heads and vocabulary."""
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 97, "n_embd": 48, "n_inner": 64, "n_layer": 3, "n_head": 6}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = GPTBigCodeConfig(**(sizes | ends | {"n_positions": 128} | overrides))
    model = GPTBigCodeForCausalLM(config).eval()
    for name, param in model.named_parameters():
        mean, std = float("ln" in name and "weight" in name), 1.0 if "wpe" in name else 0.3
        nn.init.normal_(param, mean=mean, std=std)
    model.save_pretrained(directory)
    return model


def tiny_speculator(directory: Path, seed: int = 0, prefix: str = "speculator.", **overrides):
    """A random speculator checkpoint for `tiny_llama`; returns its config and tensors by name."""
    config = {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "emb_dim": 48,
        "inner_dim": 32,
        "n_predict": 3,
        "vocab_size": 97,
        "top_k_tokens_per_head": [4, 3, 2],
        "n_candidates": 5,
    } | overrides
    n, d, v = config["n_predict"], config["emb_dim"], config["vocab_size"]
    w = config["inner_dim"] or d
    g = torch.Generator().manual_seed(seed)
    shapes = {}
    for i in range(n):
        shapes |= {f"emb.{i}.weight": (v, w), f"head.{i}.weight": (v, w)}
        shapes |= {f"ln.{i}.weight": (w,), f"ln.{i}.bias": (w,)}
        shapes |= {f"proj.{i}.weight": (w, w if i else d)}
    tensors = {name: torch.randn(shape, generator=g) * 0.2 for name, shape in shapes.items()}
    if config.get("tie_weights"):
        for name in list(tensors):
            kind, i, *rest = name.split(".")
            first = min(int(i), 1 if kind == "proj" else 0)
            tensors[name] = tensors[".".join([kind, str(first), *rest])]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({prefix + k: t.clone() for k, t in tensors.items()}, directory / "model.safetensors")
    return config, tensors


def store_as_bin(directory: Path, tensors: dict, shards: int = 1) -> None:
    """Put tensors in place of a checkpoint's safetensors: torch's .bin, or shards with an index."""
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    names = ["pytorch_model.bin"] if shards == 1 else names
    for i, file in enumerate(names):
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        torch.save(part, directory / file)
    if shards > 1:
        weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


LOAD_AND_WATCH = """
import sys, threading, time
sys.path.insert(0, "")
from {module} import {load}

def anonymous():  # bytes; pages of mapped files, which the system drops at need, do not count
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

def watch():
    while not done:
        peaks.append(anonymous())
        time.sleep(0.0005)

for directory in sys.argv[1:]:
    done, peaks, before = False, [], anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = {load}(directory)
    done = True
    watcher.join()
    held = sum(p.nbytes for p in model.parameters())
    print(max(peaks) - before - held, held)
    del model
"""


def memory_beside_the_model(module: str, load: str, directories: list[Path]) -> list[tuple]:
    """For each checkpoint: bytes held at the peak of its loading beside the model; the model's.

    The first is loaded once more before, for what torch imports at its first use.
    """
    command = [sys.executable, "-c", LOAD_AND_WATCH.format(module=module, load=load)]
    command += [str(directory) for directory in (directories[0], *directories)]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [tuple(map(int, line.split())) for line in result.stdout.splitlines()[1:]]


class Unwanted:
    """Runs code when an unrestricted pickle loads it."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


# What may lie under the name of a .bin, by a function of its path, and what it is called.
SPARSE, META = torch.zeros(3).to_sparse(), torch.zeros(3, device="meta")
OLD = {"_use_new_zipfile_serialization": False}
NOT_A_ZIP = "cut off or damaged (not a whole zip archive, as torch.save writes since torch 1.6)"
RUNS_CODE = "holds more than tensors, which could run code; use a safetensors file"
BAD_BINS = {
    "empty": (lambda file: file.write_bytes(b""), NOT_A_ZIP),
    "cut_off": (lambda file: file.write_bytes(file.read_bytes()[:-1]), NOT_A_ZIP),
    "git_lfs": (lambda file: file.write_text("version https://git-lfs.github.com/"), NOT_A_ZIP),
    "before_torch_1_6": (lambda file: torch.save({"a": torch.zeros(3)}, file, **OLD), NOT_A_ZIP),
    "no_torch_zip": (lambda file: ZipFile(file, "w").writestr("a", "b"), "cut off or damaged ("),
    "code": (lambda file: torch.save({"a": Unwanted(file.parent / "ran")}, file), RUNS_CODE),
    "module": (lambda file: torch.save(nn.Linear(2, 2), file), RUNS_CODE),
    "list": (lambda file: torch.save([1], file), "expected tensors by name, found list"),
    "nested": (lambda file: torch.save({"model": {}}, file), "'model' is not a plain tensor"),
    "number": (lambda file: torch.save({"epoch": 3}, file), "'epoch' is not a plain tensor"),
    "no_name": (lambda file: torch.save({1: torch.zeros(3)}, file), "1 is not a plain tensor"),
    "sparse": (lambda file: torch.save({"a": SPARSE}, file), "'a' is not a plain tensor"),
    "meta": (lambda file: torch.save({"a": META}, file), "'a' is not a plain tensor"),
}


class Scripted(nn.Module):
    """A speculator that reads its drafts from a script [B, S] of token ids by position.

    With `wrong_every` n > 0, each n-th position is drafted wrong on purpose; 1 is always wrong.
    """

    def __init__(self, script: torch.Tensor, vocab_size: int, wrong_every: int = 0):
        super().__init__()
        self.register_buffer("script", script)
        self.register_buffer("wrong_every", torch.tensor(wrong_every or 10**9))
        self.vocab_size = vocab_size

    def draft(self, hidden, token, position, k, choose=None):
        where = position[:, None] + 1 + torch.arange(k, device=position.device)
        tokens = self.script.gather(1, where.clamp(max=self.script.shape[1] - 1))
        wrong = (where % self.wrong_every == 0).long()
        return (tokens + wrong) % self.vocab_size


def runs_of_one_graph(engine, prompts, run):
    """What run() gives, (texts, accepted drafts), with drafts as data of one graph: always wrong,
    always right, and wrong at every fifth position. The engine's speculator is a Scripted."""
    scripted = engine.speculator
    width = scripted.script.shape[1]
    scripted.script.zero_(), scripted.wrong_every.fill_(10**9)
    text, _ = run()
    # Always wrong: a draft token that never appears.
    scripted.script.fill_(min(set(range(scripted.vocab_size)) - set().union(*text)))
    runs = [run()]
    scripted.script.copy_(script_for(prompts, runs[0][0], width))
    for wrong_every in (10**9, 5):
        scripted.wrong_every.fill_(wrong_every)
        runs.append(run())
    return runs


def run_requests(engine, requests):
    """Token ids of each request, and each one's count of decode steps and accepted drafts."""
    n = len(requests)
    tokens, steps, accepted = [[] for _ in requests], [0] * n, [0] * n
    for event in decode_loop(engine, requests):
        tokens[event.request] += event.tokens
        steps[event.request] += 1
        accepted[event.request] += event.accepted
    return tokens, steps, accepted


def launches(engine, noisy=False):
    """What five steps launch, by name; T > 0 with filters if noisy."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(5):
            engine.wait(engine.step(noisy, int(noisy)))
    return {e.key: e.count for e in profile.key_averages() if "Launch" in e.key}


def script_for(prompts, answers, max_seq_len=256):
    """The right tokens by row and position."""
    script = torch.zeros(len(prompts), max_seq_len, dtype=torch.int64)
    for row, prompt, answer in zip(script, prompts, answers, strict=True):
        text = (prompt + answer)[:max_seq_len]
        row[: len(text)] = torch.tensor(text)
    return script


INDEX = "model.safetensors.index.json"
BAD_INDEXES = {
    "absent": ('{"metadata": {}}', f"{INDEX}: weight_map is missing"),
    "a_list": ('{"weight_map": ["model.safetensors"]}', f"{INDEX}: weight_map is missing"),
    "not_json": ("{", f"{INDEX}: not valid JSON ("),
    "not_an_object": ("[]", f"{INDEX}: expected a JSON object, found list"),
    "no_name": ('{"weight_map": {"a": 3}}', f"{INDEX}: '3' is not the name of a .safetensors file"),
    "a_path": ('{"weight_map": {"a": "../x.safetensors"}}', "'../x.safetensors' is not the name"),
}


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    tiny_llama(directory)
    return directory


@pytest.fixture(scope="session")
def speculator_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("speculator")
    tiny_speculator(directory)
    return directory


@pytest.fixture(scope="module")
def model(llama_dir):
    return load_model(llama_dir)


@pytest.fixture(scope="module")
def speculator(speculator_dir):
    return load_speculator(speculator_dir)


# ---- checkpoints that speak ----
# One with random weights, for texts that must be equal. And a llama made by hand that tells a fixed
# STORY, each token leading to the next, with speculators that know the story (or two thirds of it),
# for everything about text. Both have one byte-level BPE tokenizer.

STORY_VOCAB = 400
END, USER, ANSWER = range(3)  # ids of the special tokens
SPECIAL = ["<|end|>", "<|user|>", "<|answer|>"]
STORY = " one two three four five é€😀 six seven eight nine ten"
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|answer|>{{ m['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|answer|>{% endif %}"
)


def save_tokenizer(directory, **config):
    """A byte-level BPE whose tokens include the words of STORY, with <|end|> as its eos."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=STORY_VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    words = " one two three four five six seven eight nine ten"
    tokenizer.train_from_iterator([words] * 20, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|end|>"} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def story_ids(directory):
    ids = load_tokenizer(directory).encode(STORY)
    assert len(set(ids)) == len(ids) == 20  # ten words, a space, and the nine bytes of é€😀
    return ids


def story_successors(directory):
    """The id after each id: a prompt's last token leads into the story, the story to <|end|>."""
    ids = story_ids(directory)
    after = torch.full((STORY_VOCAB,), ids[0])
    after[ids] = torch.tensor([*ids[1:], END])
    return after


def save_story(directory):
    """A one-layer llama of one-hot embeddings: attention and feed-forward add 0, and the output
    layer gives the next token of the story a logit of about 20, every other token 0."""
    save_tokenizer(directory)
    config = {
        "model_type": "llama",
        "vocab_size": STORY_VOCAB,
        "hidden_size": STORY_VOCAB,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "eos_token_id": END,
    }
    (directory / "config.json").write_text(json.dumps(config))
    layer, square = "model.layers.0.", torch.zeros(STORY_VOCAB, STORY_VOCAB)
    head = square.clone()
    head[story_successors(directory), torch.arange(STORY_VOCAB)] = 1.0
    tensors = {
        "model.embed_tokens.weight": torch.eye(STORY_VOCAB),
        "model.norm.weight": torch.ones(STORY_VOCAB),
        "lm_head.weight": head,
        layer + "input_layernorm.weight": torch.ones(STORY_VOCAB),
        layer + "post_attention_layernorm.weight": torch.ones(STORY_VOCAB),
        layer + "mlp.gate_proj.weight": torch.zeros(8, STORY_VOCAB),
        layer + "mlp.up_proj.weight": torch.zeros(8, STORY_VOCAB),
        layer + "mlp.down_proj.weight": torch.zeros(STORY_VOCAB, 8),
    }
    tensors |= {layer + f"self_attn.{x}_proj.weight": square.clone() for x in "qkvo"}
    save_file(tensors, directory / "model.safetensors")


def save_story_speculator(directory, after):
    """A speculator whose heads ignore the state and draft `after` [V] of the last token."""
    directory.mkdir()
    config = {
        "model_type": "mlp_speculator",
        "emb_dim": STORY_VOCAB,
        "inner_dim": STORY_VOCAB,
        "n_predict": 3,
        "vocab_size": STORY_VOCAB,
        "tie_weights": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
    head = torch.zeros(STORY_VOCAB, STORY_VOCAB)
    head[after, torch.arange(STORY_VOCAB)] = 1.0
    tensors = {
        "emb.0.weight": torch.eye(STORY_VOCAB),
        "head.0.weight": head,
        "ln.0.weight": torch.ones(STORY_VOCAB),
        "ln.0.bias": torch.zeros(STORY_VOCAB),
        "proj.0.weight": torch.zeros(STORY_VOCAB, STORY_VOCAB),
        "proj.1.weight": torch.zeros(STORY_VOCAB, STORY_VOCAB),
    }
    save_file(tensors, directory / "model.safetensors")


@pytest.fixture(scope="session")
def dirs(tmp_path_factory):
    """Every checkpoint that speaks; `bare` is `random` without tokenizer files."""
    root = tmp_path_factory.mktemp("checkpoints")
    d = SimpleNamespace(**{name: root / name for name in ("random", "bare", "story", "draft")})
    d.right, d.partly = root / "right", root / "partly"
    tiny_llama(d.random, vocab_size=STORY_VOCAB, max_position_embeddings=256)
    shutil.copytree(d.random, d.bare)
    save_tokenizer(d.random, chat_template=TEMPLATE)
    tiny_speculator(d.draft, vocab_size=STORY_VOCAB)
    d.story.mkdir()
    save_story(d.story)
    after = story_successors(d.story)
    save_story_speculator(d.right, after)
    after[story_ids(d.story)[::3]] = USER  # every third draft is wrong
    save_story_speculator(d.partly, after)
    return d


SENTENCES = [
    "the quick brown fox jumps over the lazy dog; it's naïve",
    "def  f(x):\n    return  x + 1\n\n\tpass",
    "we'll say 3.14 ==> I'D don't",
    "日本語 한국어 <tag>",
] * 20


def train_sentencepiece(**options):
    """A model as Llama 2's: BPE, spaces kept, a space put in front, bytes for the rest."""
    options = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "minloglevel": 2,
    } | options
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=out, **options
    )
    return out.getvalue()


def pieces_and_merges(model):
    """Every way to make a piece out of two others, best piece first: as converters do."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {sp.id_to_piece(id): id for id in range(sp.vocab_size())}
    ranked = sorted(vocab, key=lambda token: -sp.get_score(vocab[token]))
    splits = [(t[:i], t[i:]) for t in ranked for i in range(1, len(t))]
    return vocab, [pair for pair in splits if vocab.keys() >= {*pair}]


@pytest.fixture
def copy(dirs, tmp_path):
    """Makes a copy of a checkpoint, with keys of its JSON files changed or added."""

    def make(name, **files):
        directory = tmp_path / name
        shutil.copytree(getattr(dirs, name), directory)
        for stem, values in files.items():
            file = directory / f"{stem}.json"
            old = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps(old | values))
        return directory

    return make


def load(directory, speculator=None, k=None, **options):
    config = speculator and {"model": str(speculator), "num_speculative_tokens": k}
    return LLM(directory, config, dtype="float32", device="cpu", **options)


def greedy(**options):
    return SamplingParams(**({"temperature": 0, "max_tokens": 60} | options))


def answer(llm, prompt="Q", params=None):
    return llm.generate(prompt, params or greedy())[0].outputs[0]


def run_main(capsys, *argv):
    """Exit code, stdout and stderr of main in this process."""
    options = ["--dtype", "float32", "--device", "cpu"]
    code = fastspec.main([*options, *map(str, argv)])
    return code, *capsys.readouterr()


def printed(capsys, *argv):
    """What a run that succeeds prints; its stderr is not of interest."""
    code, out, err = run_main(capsys, *argv)
    assert code == 0, err
    return out


def assert_one_line(result, message):
    code, out, err = result
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"fastspec: [^\n]*(?:{message})[^\n]*\n", err), err
