"""The nine published accelerators end to end: a miniature of each, with its target, goes through
the command line that the README gives for it.

A miniature has the fields and file formats of the published checkpoints; widths are divided by 64
and heads by 8, which keeps every ratio (head_dim 10 for Granite 3B). Its target has random weights,
but its answer ends with the id that ends the real one's turns; its speculator's heads are solved
for that answer. So drafts are right only if every tensor is where it belongs.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import run_main, store_as_bin, tiny_gpt_bigcode, tiny_llama, tiny_speculator
from huggingface_hub.utils import filter_repo_objects
from test_model import BASES
from test_speculator import PUBLISHED, reference, store
from test_tokenizer import (
    BYTE_OF,
    FLAGS,
    GRANITE,
    GRANITE_TEMPLATE,
    LLAMA3,
    PRE_TOKENIZERS,
    llama2_json,
    ranks_file,
    save_model,
    train,
    train_sentencepiece,
)
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

import fastspec
from fastspec import DEFAULT_MAX_SEQ_LEN, DEFAULT_PROMPT, LLM, TARGETS
from model import Transformer, kv_cache_shape
from speculator import MLPSpeculator, SpeculatorArgs
from tokenizer import load_tokenizer

# ---- tokenizers: their files as published, and what the model's files say of their ids ----


@dataclass
class Ids:
    vocab_size: int
    ends: list[int]  # every id that must end an answer, first the one that ends a turn
    config: dict  # fields of config.json
    generation: dict  # fields of generation_config.json


LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\\n' + messages[0]['content']"
    " + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}{% else %}{% set system = '' %}"
    "{% set turns = messages %}{% endif %}{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip()"
    " + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA3_TEMPLATE = (
    "{% for m in messages %}{{ bos_token if loop.first else '' }}{{ '<|start_header_id|>'"
    " + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GRANITE_CODE_TEMPLATE = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ 'Question:\n' + message['content'] + '\n\n' }}{% elif message['role'] == 'system' %}\n"
    "{{ 'System:\n' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Answer:\n'  + message['content'] + '\n\n' }}{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ 'Answer:\n' }}{% endif %}{% endfor %}"
)


def write_json(directory, **files):
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def llama2_tokenizer(directory, template=LLAMA2_TEMPLATE, added=()):
    """tokenizer.model and the tokenizer.json made from it."""
    model = train_sentencepiece()
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    data, ids = llama2_json(model), {token: 420 + i for i, token in enumerate(added)}
    for token, id in ids.items():
        data["added_tokens"].append(FLAGS | {"id": id, "content": token, "special": True})
    beside = {"tokenizer_config": config}
    if added:
        beside["added_tokens"] = ids
        beside["special_tokens_map"] = {"additional_special_tokens": list(added)}
    write_json(directory, tokenizer=data)
    save_model(directory, model, **beside)
    bos_eos = {"bos_token_id": 1, "eos_token_id": 2}
    return Ids(420, [2], bos_eos, bos_eos)


def granite_7b_tokenizer(directory):
    """Llama 2's with five more tokens and three ids that are none; </s> is named as the end, but
    turns end with <|endoftext|>."""
    ids = llama2_tokenizer(directory, GRANITE_TEMPLATE, GRANITE)
    return Ids(428, [420, 2], ids.config, ids.generation)


def llama3_tokenizer(directory):
    """tokenizer.json made from original/tokenizer.model. Only generation_config.json has both ends,
    <|end_of_text|> and <|eot_id|>."""
    merges = train(PRE_TOKENIZERS["llama3"], vocab_size=330)["model"]["merges"]
    tokens = dict.fromkeys([*BYTE_OF, *("".join(pair) for pair in merges)])
    n = len(tokens)
    ranks = {bytes(BYTE_OF[c] for c in token): rank for rank, token in enumerate(tokens)}
    ours = save_model(directory, ranks_file(ranks), "original/tokenizer.model")
    special = {id: ours.decode([id], False) for id in range(n, n + 256)}
    file = str(directory / "original/tokenizer.model")
    theirs = TikTokenConverter(file, LLAMA3, extra_special_tokens=[*special.values()]).converted()
    bos = special[n]
    theirs.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, n)])
    theirs.save(str(directory / "tokenizer.json"))
    config = {"bos_token": bos, "eos_token": special[n + 1], "chat_template": LLAMA3_TEMPLATE}
    config["added_tokens_decoder"] = {
        str(id): FLAGS | {"content": token, "special": True} for id, token in special.items()
    }
    write_json(directory, tokenizer_config=config)
    start, end, turn_end = n, n + 1, n + 9
    return Ids(
        n + 256,
        [turn_end, end],
        {"bos_token_id": start, "eos_token_id": end},
        {"bos_token_id": start, "eos_token_id": [end, turn_end]},
    )


def granite_code_tokenizer(directory):
    """Byte-level BPE of single digits; <|endoftext|> is 0 and everything."""
    text = json.dumps(train(PRE_TOKENIZERS["digits"], vocab_size=400))
    data = json.loads(text.replace("<|end|>", "<|endoftext|>").replace("<|begin|>", "<fim_prefix>"))
    end = "<|endoftext|>"
    config = {"bos_token": end, "eos_token": end, "chat_template": GRANITE_CODE_TEMPLATE}
    write_json(directory, tokenizer=data, tokenizer_config=config)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return Ids(400, [0], ids, ids)


def granite_20b_tokenizer(directory):
    """... with vocab.json and merges.txt beside it."""
    ids = granite_code_tokenizer(directory)
    model = json.loads((directory / "tokenizer.json").read_text("utf-8"))["model"]
    write_json(directory, vocab=model["vocab"])
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ids


# ---- targets and accelerators ----


@dataclass
class Accelerator:
    owner: str
    weights: str  # single, sharded, bin or both: the files that hold them
    names_target: bool  # in its config.json
    tokenizer: Callable[[Path], Ids]  # of the target
    dtype: str  # of the target's weights


IBM, GRANITE_HUB = "ibm-ai-platform", "ibm-granite"
NINE = {
    "llama-13b-accelerator": Accelerator(IBM, "single", True, llama2_tokenizer, "float16"),
    "llama2-70b-accelerator": Accelerator(IBM, "bin", False, llama2_tokenizer, "float16"),
    "llama3-8b-accelerator": Accelerator(IBM, "sharded", True, llama3_tokenizer, "bfloat16"),
    "llama3-70b-accelerator": Accelerator(IBM, "both", True, llama3_tokenizer, "bfloat16"),
    "codellama-34b-accelerator": Accelerator(IBM, "bin", False, llama2_tokenizer, "bfloat16"),
    "granite-3b-code-instruct-accelerator": Accelerator(
        GRANITE_HUB, "bin", True, granite_code_tokenizer, "bfloat16"
    ),
    "granite-7b-instruct-accelerator": Accelerator(
        GRANITE_HUB, "single", True, granite_7b_tokenizer, "bfloat16"
    ),
    "granite-8b-code-instruct-accelerator": Accelerator(
        GRANITE_HUB, "single", True, granite_code_tokenizer, "bfloat16"
    ),
    "granite-20b-code-instruct-accelerator": Accelerator(
        GRANITE_HUB, "bin", False, granite_20b_tokenizer, "bfloat16"
    ),
}


def test_the_nine_are_all_there_is():
    assert NINE.keys() == TARGETS.keys() == PUBLISHED.keys()
    assert {target.rpartition("/")[2] for target in TARGETS.values()} == BASES.keys()


WIDTHS = ("hidden_size", "intermediate_size", "n_embd", "n_inner")
HEADS = ("num_attention_heads", "num_key_value_heads", "n_head")
CONTEXTS = {"max_position_embeddings": 16, "n_positions": 16}
DIVISORS = dict.fromkeys(WIDTHS, 64) | dict.fromkeys(HEADS, 8) | CONTEXTS


def miniature_config(target, ids, dtype):
    """config.json of the published target, with smaller numbers."""
    config = {k: v for k, v in BASES[target][0].items() if (k, v) != ("architectures", None)}
    config |= {key: config[key] // n for key, n in DIVISORS.items() if key in config}
    config |= {key: 2 for key in ("num_hidden_layers", "n_layer") if key in config}
    return config | ids.config | {"vocab_size": ids.vocab_size, "torch_dtype": dtype}


def save_target(directory, target, ids, dtype):
    """The miniature of a target, in shards of safetensors; returns the transformers model."""
    config = miniature_config(target, ids, dtype)
    build = tiny_gpt_bigcode if "n_embd" in config else tiny_llama
    model = build(directory, **config)
    for param in model.parameters():
        param.data = param.to(getattr(torch, dtype)).float()  # what the file will hold
    end_the_answer(model, prompt_ids(directory), ids.ends)
    (directory / "model.safetensors").unlink()
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="100KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    write_json(directory, config=config, generation_config=ids.generation)
    return type(model).from_pretrained(directory, dtype=torch.float32)


def prompt_ids(directory):
    """The default prompt as a user's turn, by transformers."""
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    chat = [{"role": "user", "content": DEFAULT_PROMPT}]
    return theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def greedy_ids(model, prompt, ends):
    """An answer of at most 40 tokens, by transformers."""
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = 0
    out = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
    return out[0, len(prompt) :].tolist()


def end_the_answer(model, prompt, ends):
    """Swap two rows of the output layer, so that the last new token of the answer becomes the id
    that ends a turn."""
    answer, head = greedy_ids(model, prompt, ends), model.get_output_embeddings().weight.data
    new = [i for i, t in enumerate(answer) if t not in [*prompt, *answer[:i], *ends]]
    assert new[-1] > 12
    head[[ends[0], answer[new[-1]]]] = head[[answer[new[-1]], ends[0]]]


def solve_heads(config, tensors, model, prompt, answer):
    """Heads that draft this answer, as far as a linear layer can: least squares on the states that
    the published formulas give at each of its positions."""
    text, n = torch.tensor(prompt + answer), config["n_predict"]
    hidden = model(text[None], output_hidden_states=True).hidden_states[-1][0]  # final norm
    first, count = len(prompt) - 1, len(answer) - n
    wanted = [text[first + i :][:count] for i in range(n + 1)]  # the last token, and n after it
    steps, _ = reference(
        config, tensors, hidden[first - 1 :][:count], wanted[0], n, lambda _, i: wanted[i]
    )
    states, drafts = [state for state, _ in steps], wanted[1:]
    if config.get("tie_weights"):
        states, drafts = [torch.cat(states)], [torch.cat(drafts)]
    one_hot = torch.eye(config["vocab_size"], dtype=torch.float64)
    heads = [
        torch.linalg.lstsq(x, one_hot[y]).solution.T for x, y in zip(states, drafts, strict=True)
    ]
    for i in range(n):
        tensors[f"head.{i}.weight"] = heads[min(i, len(heads) - 1)]


def save_accelerator(directory, name, target, ids, model):
    """The miniature of an accelerator, in float16, in the files of the published one."""
    published = PUBLISHED[name][0]
    top_k = [4, 3, 2, 2, 2][: published["n_predict"]]  # where it is not known
    config = {"top_k_tokens_per_head": top_k, "torch_dtype": "float16"} | published
    config["vocab_size"] = ids.vocab_size
    config |= {key: config[key] // 64 for key in ("emb_dim", "inner_dim")}
    if NINE[name].names_target:
        config["base_model_name_or_path"] = TARGETS[name]
    assert ("base_model_name_or_path" in config) is NINE[name].names_target
    config, tensors = tiny_speculator(directory, **config)
    prompt = prompt_ids(target)
    answer = greedy_ids(model, prompt, ids.ends)
    solve_heads(config, tensors, model, prompt, answer)
    store_accelerator(directory, tensors, NINE[name].weights)
    return prompt, answer


def store_accelerator(directory, tensors, form):
    """torch's files name tied tensors by every alias, safetensors by the first alone."""
    halves = {id(tensor): tensor.half() for tensor in tensors.values()}
    aliases = {"speculator." + name: halves[id(tensor)] for name, tensor in tensors.items()}
    firsts = {id(aliases[name]): name for name in sorted(aliases, reverse=True)}
    once = {name: aliases[name] for name in firsts.values()}
    store(directory, once, 2 if form == "sharded" else 1)
    if form == "bin":
        store_as_bin(directory, aliases)
    elif form == "both":
        torch.save(aliases, directory / "pytorch_model.bin")


# ---- through the command line ----


class Hub:
    """Answers hub ids with what the allowed patterns let through of local directories."""

    def __init__(self, repositories, cache):
        self.repositories, self.cache, self.asked = repositories, cache, []

    def snapshot_download(self, repo, revision, allow_patterns):
        self.asked.append(repo)
        source, snapshot = self.repositories[repo], self.cache / repo
        files = [str(f.relative_to(source)) for f in source.rglob("*") if f.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, snapshot / file)
        return str(snapshot)


@pytest.fixture(scope="module", params=NINE)
def nine(request, tmp_path_factory):
    """One of the nine with its target, behind a hub; the prompt's ids and the answer's."""
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    target, draft = root / "target", root / "draft"
    target.mkdir()
    ids = NINE[name].tokenizer(target)
    model = save_target(target, TARGETS[name].rpartition("/")[2], ids, NINE[name].dtype)
    prompt, answer = save_accelerator(draft, name, target, ids, model)
    repo = f"{NINE[name].owner}/{name}"
    hub = Hub({repo: draft, TARGETS[name]: target}, root / "cache")
    return SimpleNamespace(name=name, repo=repo, hub=hub, ids=ids, prompt=prompt, answer=answer)


@pytest.fixture
def main(nine, monkeypatch, capsys, tmp_path):
    """Runs the command line with this accelerator alone and returns the row that it writes."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nine.hub.snapshot_download)

    def run(*argv):
        capsys.readouterr()  # of saving
        return run_main(capsys, "--speculator", nine.repo, *argv)

    return run


def test_the_command_of_the_readme_answers(nine, main):
    """`--speculator NAME`, nothing else: target, prompt and files are found, the prompt is a turn
    of the chat template, and the answer ends where the target ends its turn."""
    code, out, err = main()
    assert code == 0, err
    target = nine.hub.cache / TARGETS[nine.name]
    assert out == load_tokenizer(target).decode(nine.answer) + "\n"
    assert f"fastspec: the target is {TARGETS[nine.name]}, which {nine.repo} is for\n" in err
    assert set(nine.hub.asked) == {nine.repo, TARGETS[nine.name]}


def test_ids_equal_those_of_transformers(nine, main, tmp_path, monkeypatch):
    """With the drafts and without any. Over three tokens a step come only from drafts that are
    right nearly always, as those of these speculators are; but for their contrived weights 8 bits
    are too few."""
    steps, prompts = [], tmp_path / "in.jsonl"
    prompts.write_text(json.dumps({"prompt": DEFAULT_PROMPT}))
    for i, options in enumerate([[], ["--num-draft-tokens", 0], []]):
        output = tmp_path / f"{i}.jsonl"
        code, _, err = main("--prompts", prompts, "--output", output, *options)
        assert code == 0, err
        row = json.loads(output.read_text("utf-8"))
        assert row["token_ids"] == nine.answer
        assert (row["prompt_tokens"], row["finish_reason"]) == (len(nine.prompt), "stop")
        steps.append(row["steps"])
        if i == 1:
            monkeypatch.delattr(torch, "quantize_per_channel")
    assert nine.answer[-1] == nine.ids.ends[0]
    assert 3 * steps[2] < steps[1] == len(nine.answer)


def test_every_end_of_the_checkpoint_ends_an_answer(nine, main):
    llm = LLM(TARGETS[nine.name], {"model": nine.repo}, device="cpu", load=False)
    assert llm.end_ids == set(nine.ids.ends)


def test_every_tokenizer_file_gives_the_ids_of_the_prompt(nine, main, tmp_path):
    """Those that lie beside tokenizer.json are read like it, where it is missing. vocab.json and
    merges.txt alone say nothing of Granite code's digits, of which the prompt has none."""
    target = tmp_path / "target"
    shutil.copytree(nine.hub.repositories[TARGETS[nine.name]], target)
    sources = ["tokenizer.json", "tokenizer.model", "vocab.json", "original/tokenizer.model"]
    sources = [source for source in sources if (target / source).exists()]
    assert len(sources) == (1 if NINE[nine.name].tokenizer is granite_code_tokenizer else 2)
    for source in sources:
        ours = load_tokenizer(target)
        assert ours.source.startswith(source)
        text = ours.apply_chat_template([{"role": "user", "content": DEFAULT_PROMPT}])
        assert ours.encode(text, add_special_tokens=False) == nine.prompt
        (target / source).unlink()


def gigabytes(name):
    """bfloat16 weights of target and speculator, and the cache of one row, on a GPU."""
    target = BASES[TARGETS[name].rpartition("/")[2]][1]
    speculator = SpeculatorArgs.from_config({"model_type": "mlp_speculator"} | PUBLISHED[name][0])
    with torch.device("meta"):
        modules = [Transformer(target), MLPSpeculator(speculator)]
    slots = min(target.max_position, DEFAULT_MAX_SEQ_LEN) + speculator.n_predict + 1
    numbers = sum(p.numel() for module in modules for p in module.parameters())
    return 2 * (numbers + math.prod(kv_cache_shape(target, 1, slots))) / 1e9


def test_the_table_of_the_readme():
    """Names, targets and computed memory."""
    readme = (Path(fastspec.__file__).parent / "README.md").read_text("utf-8")
    table = re.findall(r"^\| `([^`]+-accelerator)` \| `([^`]+)` \| ([\d.]+) GB \|$", readme, re.M)
    assert table == [
        (f"{accelerator.owner}/{name}", TARGETS[name], f"{gigabytes(name):.1f}")
        for name, accelerator in NINE.items()
    ]
