"""tokenizer.py against Hugging Face `tokenizers` and transformers, on tokenizers trained here."""

import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokenizer import load_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
NO_REGEX = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PRE_TOKENIZERS = {
    "gpt2": BYTE_LEVEL,
    "prefix_space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "whole_text": NO_REGEX,
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTE_LEVEL]),
    "digit_runs": pre_tokenizers.Sequence([pre_tokenizers.Digits(False), BYTE_LEVEL]),
    "digits_only": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), NO_REGEX]),
    "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), NO_REGEX]),
    "split_with_gaps": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{L}+|[ \n](?=\p{N})"), "isolated"), NO_REGEX]
    ),
}
TEMPLATE = (
    "{% for m in messages %}\n    {% if m['role'] == 'user' %}\n"
    "{{ bos_token + 'Question: ' + m['content'] }}\n{% else %}\n"
    "{{ 'Answer: ' + m['content'] + eos_token }}\n{% endif %}\n{% endfor %}\n"
    "{{ messages[0] | tojson }}{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
)
ALPHABET = [
    chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cs", "Cn", "Co")
]
WORDS = ["the", "quick", "don't", "we'll", "I'D", "it's", "naïve", "def", "==>", "3.14"]
WORDS += [
    "日本語",
    "한국어",
    "नमस्ते",
    "مرحبا",
    "🇬🇧",
    "e\u0301",
    "'\u017f",
    "½²\u2167\u0663",
    "👩\u200d👧",
]
SPACES = [" ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u3000", "\xa0", "\x85", "\x1d"]
SPECIAL = ["<|end|>", "<|begin|>", "<|end|", "<tag>"]


def random_text(rng):
    def one():
        kind = rng.randrange(8)
        if kind == 0:
            return rng.choice(ALPHABET)
        if kind == 1:
            return rng.choice(SPACES) * rng.randint(1, 3)
        if kind == 2:
            return str(rng.randrange(10 ** rng.randint(1, 6)))
        if kind == 3:
            return rng.choice(SPECIAL)
        if kind == 4:
            return bytes(rng.choices(range(256), k=rng.randint(1, 9))).decode(errors="replace")
        if kind == 5:
            return bytes(rng.choices(range(128), k=rng.randint(1, 9))).decode()
        return rng.choice(WORDS) + rng.choice(["", " "])

    return "".join(one() for _ in range(rng.randint(0, 20)))


def train(pre_tokenizer=BYTE_LEVEL, vocab_size=700, seed=0):
    """tokenizer.json, as a dict, of a byte-level BPE trained on random text."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([random_text(rng) for _ in range(400)], trainer)
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="module")
def trained():
    return train()


@pytest.fixture
def base(trained):
    """A supported tokenizer.json that a test may change."""
    return json.loads(json.dumps(trained))


def save(directory, data, config=None, **files):
    files = {"tokenizer": data, "tokenizer_config": config or {}} | files
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(directory)


def assert_same(ours, data, count=300, seed=1):
    """ids and text equal to `tokenizers`, with and without special tokens."""
    theirs, rng = Tokenizer.from_str(json.dumps(data)), random.Random(seed)
    for text in ["", " ", *(random_text(rng) for _ in range(count))]:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special).ids
            assert ours.encode(text, special) == ids, repr(text)
            assert ours.decode(ids, special) == theirs.decode(ids, special), repr(text)


# ---- ids and text equal those of `tokenizers` ----


@pytest.mark.parametrize("form", PRE_TOKENIZERS)
def test_each_pre_tokenizer_gives_the_ids_of_tokenizers(tmp_path, form):
    data = train(PRE_TOKENIZERS[form])
    assert_same(save(tmp_path, data), data, count=1000)


def test_digits_cut_white_space_like_two_passes(tmp_path):
    """All strings of length 5 over the characters whose order decides where a piece ends."""
    data = train(PRE_TOKENIZERS["digits"])
    ours, theirs = save(tmp_path, data), Tokenizer.from_str(json.dumps(data))
    for n in range(5**5):
        text = "".join(" \n7a!"[n // 5**i % 5] for i in range(5))
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


def test_ids_need_not_be_in_merge_order_and_merges_may_be_pairs_or_strings(tmp_path, base):
    ids = list(base["model"]["vocab"].values())
    random.Random(0).shuffle(ids)
    base["added_tokens"] = []
    base["model"]["vocab"] = dict(zip(base["model"]["vocab"], ids, strict=True))
    base["model"]["merges"] = [" ".join(pair) for pair in base["model"]["merges"]]
    assert_same(save(tmp_path, base), base)


def test_bytes_without_a_token_are_dropped_before_merging(tmp_path, base):
    """The signs around a dropped byte still merge, as in `tokenizers`."""
    vocab = base["model"]["vocab"]
    gone = {byte for byte in "\u0104\u0106\u0113\u011dÃ" if byte in vocab}
    assert "\u0104" in gone
    base["model"]["vocab"] = {t: i for t, i in vocab.items() if not gone & set(t)}
    base["model"]["merges"] = [m for m in base["model"]["merges"] if not gone & set("".join(m))]
    ours = save(tmp_path, base)
    assert_same(ours, base)
    assert ours.encode("=\x04=>") == ours.encode("==>") != ours.encode("=") + ours.encode("=>")


def test_half_a_surrogate_pair_is_read_as_a_replacement_character(tmp_path, base):
    ours = save(tmp_path, base)
    assert ours.decode(ours.encode("a\ud83db")) == "a\ufffdb"


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_any_list_of_merges_gives_the_ids_of_tokenizers(tmp_path, ignore_merges, seed):
    """Merges drawn at random over three letters: several pairs with one result, tokens that their
    own merges never give, merges of parts that are made later."""
    rng = random.Random(seed)
    tokens = {*"abc"} | {"".join(rng.choices("abc", k=rng.randint(2, 5))) for _ in range(40)}
    pairs = [(t[:i], t[i:]) for t in sorted(tokens) for i in range(1, len(t))]
    pairs = [list(pair) for pair in pairs if tokens.issuperset(pair)]
    rng.shuffle(pairs)
    if seed % 2:  # half of the lists in an order in which parts are made before they are used
        pairs.sort(key=lambda pair: len("".join(pair)))
    data = train(vocab_size=258)
    data["added_tokens"] = []
    data["model"]["vocab"] |= {t: 300 + i for i, t in enumerate(sorted(tokens - set("abc")))}
    data["model"] |= {"merges": pairs[: len(pairs) * 3 // 4], "ignore_merges": ignore_merges}
    ours, theirs = save(tmp_path, data), Tokenizer.from_str(json.dumps(data))
    for _ in range(300):
        text = "".join(rng.choices("abc ", (5, 5, 5, 1), k=rng.randint(1, 14)))
        assert ours.encode(text) == theirs.encode(text).ids, text


@pytest.mark.parametrize("merges", [["a a", "a aa"], ["a a", "aa a"], ["a a", "aa a", "aa aa"]])
def test_of_equal_pairs_the_leftmost_merges_first(tmp_path, merges):
    """With only the first list "aaa" is no token of "aaa": the left two merge, (aa, a) does not."""
    data = train(vocab_size=258)
    data["model"]["vocab"] |= {"aa": 300, "aaa": 301, "aaaa": 302}
    data["model"]["merges"] = merges
    ours, theirs = save(tmp_path, data), Tokenizer.from_str(json.dumps(data))
    for n in range(20):
        assert ours.encode("a" * n) == theirs.encode("a" * n).ids


def test_llama3_form_with_all_splits_as_merges(tmp_path):
    """Llama 3's list has every split of each token, sorted by token, and ignore_merges."""
    data = train(PRE_TOKENIZERS["llama3"])
    model, merges = data["model"], []
    for left, right in model["merges"]:
        token = left + right
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [[a, b] for a, b in splits if a in model["vocab"] and b in model["vocab"]]
    assert len(merges) > len(model["merges"])
    # As in Llama 3 the added tokens are not in model.vocab; their ids follow its 700 entries.
    for i, token in enumerate(data["added_tokens"]):
        del model["vocab"][token["content"]]
        token["id"] = 700 + i
    # Tokens that no merge gives: found only as whole pieces.
    model["vocab"] |= {"Ġqqzqq": 5000, "zzjzz": 5001}
    model |= {"merges": merges, "ignore_merges": True}
    ours = save(tmp_path, data)
    assert ours.encode("zzjzz qqzqq zzjzzq")[:2] == [5001, 5000]
    assert_same(ours, data)


def test_added_tokens_honour_their_flags(tmp_path, base):
    flags = [
        {"lstrip": True},
        {"rstrip": True, "special": False},
        {"single_word": True, "normalized": True},
        {"lstrip": True, "rstrip": True, "normalized": True},
        {"special": False, "normalized": True},
        {},
    ]
    contents = ["<tag>", "tag+", "wordy", "<tag> wordy", "two  words", "<tag>more"]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for i, (content, flag) in enumerate(zip(contents, flags, strict=True)):
        token = {"id": 700 + i, "content": content, "special": True} | plain | flag
        assert content not in base["model"]["vocab"]
        base["added_tokens"].append(token)
    ours, theirs = save(tmp_path, base), Tokenizer.from_str(json.dumps(base))
    rng, bits = random.Random(2), [*contents, " ", "  ", "\n", "a", "\u0301", "²", "_", "<tag", "é"]
    for _ in range(3000):
        text = "".join(rng.choices(bits, k=rng.randint(1, 8)))
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids), repr(text)
        assert ours.decode(ids, False) == theirs.decode(ids, skip_special_tokens=False)


def test_template_processing_adds_ids_before_and_after(tmp_path, base):
    special = {
        name: {"id": name, "ids": [base["model"]["vocab"][name]], "tokens": [name]}
        for name in ("<|begin|>", "<|end|>")
    }
    one = [{"SpecialToken": {"id": name, "type_id": 0}} for name in special]
    single = [one[0], {"Sequence": {"id": "A", "type_id": 0}}, one[1]]
    template = {"type": "TemplateProcessing", "single": single, "pair": single}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    steps = [byte_level, template | {"special_tokens": special}]
    base["post_processor"] = {"type": "Sequence", "processors": steps}
    ours = save(tmp_path, base, {"add_bos_token": True, "bos_token": "<|end|>"})
    assert_same(ours, base)
    assert ours.encode("") == [special["<|begin|>"]["ids"][0], special["<|end|>"]["ids"][0]]


@pytest.mark.parametrize("bos", ["<|begin|>", {"content": "<|begin|>"}])
def test_add_bos_token_counts_where_there_is_no_post_processor(tmp_path, base, bos):
    ours = save(tmp_path, base, {"add_bos_token": True, "bos_token": bos})
    begin = base["model"]["vocab"]["<|begin|>"]
    assert ours.encode("a") == [begin, *ours.encode("a", add_special_tokens=False)]
    assert save(tmp_path, base, {"bos_token": bos}).encode("a")[0] != begin


def test_random_ids_decode_and_stream_as_tokenizers_decodes(tmp_path, base):
    """Random ids are mostly invalid UTF-8, cut anywhere; some ids name no token."""
    base["added_tokens"].append(base["added_tokens"][0] | {"id": 700, "content": "日 本"})
    ours, theirs = save(tmp_path, base), Tokenizer.from_str(json.dumps(base))
    assert ours.vocab_size == 701
    rng, partial = random.Random(3), 0
    for _ in range(1000):
        ids = rng.choices(range(720), k=rng.randint(0, 40))
        for skip in (True, False):
            stream, texts, rest = ours.stream(skip), [], ids
            while rest:
                cut = rng.randint(1, 4)
                texts.append(stream.push(rest[:cut]))
                rest = rest[cut:]
            tail = stream.finish()
            partial += bool(tail)
            assert "".join(texts) + tail == ours.decode(ids, skip) == theirs.decode(ids, skip)
    assert partial  # some streams did end inside a character


def test_stream_holds_back_half_a_character(tmp_path, base):
    ours = save(tmp_path, base)
    vocab, stream = base["model"]["vocab"], ours.stream()
    pushed = [stream.push([vocab[byte]]) for byte in "ðŁĺĢð"]  # U+1F600 and a half
    assert [*pushed, stream.finish()] == ["", "", "", "\U0001f600", "", "\ufffd"]


def test_a_long_run_without_a_cut_is_read(tmp_path, base):
    """One piece of 200,001 characters: neither the regular expressions nor the merging, which
    reads each piece as a whole, take more than about linear time."""
    ours, text = save(tmp_path, base), " " * 200_000 + "a"
    assert ours.decode(ours.encode(text)) == text


# ---- tokenizer_config.json and chat templates ----


def test_eos_ids(tmp_path, base):
    end = base["model"]["vocab"]["<|end|>"]
    assert save(tmp_path, base).eos_ids == ()
    assert save(tmp_path, base, {"eos_token": {"content": "<|end|>"}}).eos_ids == (end,)
    assert save(tmp_path, base, special_tokens_map={"eos_token": "<|end|>"}).eos_ids == (end,)


def test_chat_template_renders_as_transformers_does(tmp_path, base):
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    ours = save(tmp_path, base, config)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "<b>é\n"}, {"role": "assistant", "content": "yes"}]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat_template(chat, prompt) == expected
    assert "<|begin|>Question: <b>é" in expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%Y') | length }}{{ {'b': '<é>', 'a': [1]} | tojson(indent=2) }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% if ns.n == 2 %}{% break %}{% endif %}{{ ns.n }}{% endfor %}{{ tools is none }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    ],
)
def test_template_names_behave_as_in_transformers(tmp_path, base, template):
    ours = save(tmp_path, base, {"chat_template": template})
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": str(i)} for i in range(3)]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat, tokenize=False)


def test_where_the_chat_template_is_found(tmp_path, base):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert save(tmp_path, base, {"chat_template": named}).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J", encoding="utf-8")
    assert save(tmp_path, base, {"chat_template": named}).chat_template == "J"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "TemplateError: roles must alternate$"),
        ("{% if %}", "TemplateSyntaxError: "),
        ("{{ messages[0].absent.absent }}", "UndefinedError: "),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: "),
        ("{{ messages.append(1) }}", "SecurityError: "),
        ("{% set ns = namespace() %}{% set ns.__call__ = 1 %}", "SecurityError: "),
        ("{{ namespace(__call__=1) }}", "SecurityError: "),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError: "),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
    ],
)
def test_a_hostile_or_broken_template_is_one_line(tmp_path, base, template, message):
    ours = save(tmp_path, base, {"chat_template": template})
    with pytest.raises(ValueError, match=f"^chat template: {message}") as error:
        ours.apply_chat_template([{"role": "user", "content": "hi"}])
    assert "\n" not in str(error.value)


def test_no_template_names_the_fix(tmp_path, base):
    with pytest.raises(ValueError, match=r"no default chat template: give plain prompts"):
        save(tmp_path, base).apply_chat_template([])


# ---- what is refused, and how ----


def test_no_tokenizer_file_is_none_and_no_directory_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(ValueError, match=r"/absent: no such directory$"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize("name", ["spiece.model", "vocab.txt", "merges.txt"])
def test_another_tokenizer_file_alone_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"a\n")
    with pytest.raises(ValueError, match=f"/{name}: not supported alone; supported: tokenizer.js"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON: "),
        (b"", "not JSON: "),
        (b"[" * 10**5, "not JSON: "),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"[]", "holds a JSON list; expected an object"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, base, name, content, message):
    save(tmp_path, base)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"/{name}: {message}") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": steps}


SPLIT = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
REFUSED = [
    ("model", None, "model is missing; expected an object"),
    ("model.vocab", None, "model.vocab is missing"),
    ("model.merges", None, "model.merges is missing; expected a list"),
    ("model.vocab", [], r"model.vocab is \[\]; supported: an object"),
    ("model.vocab", {}, "model.vocab is empty"),
    ("model.vocab", {"a": -1}, r'model.vocab\["a"\] is -1; supported: an id'),
    ("model.vocab", {"a": 1, "b": 1}, "model.vocab gives one id to two tokens"),
    ("model.merges", [["a", "b", "c"]], r'model.merges\[0\] is \["a", "b", "c"\]; supp'),
    ("model.merges", [7], r"model.merges\[0\] is 7; supported"),
    ("model.merges", ["a "], r'model.merges\[0\] is "a "; supported'),
    ("model.merges", ["qz qz"], r'model.merges\[0\] "qz qz" has a part or a result not in'),
    ("model.type", "Unigram", r'model.type is "Unigram"; supported: "BPE"$'),
    ("model.type", "WordPiece", 'model.type is "WordPiece"'),
    (
        "model.byte_fallback",
        True,
        r"\[normalizer, pre_tokenizer\] is .*Metaspace\] \(byte_fallback",
    ),
    ("model.dropout", 0.1, "model.dropout is 0.1"),
    ("model.end_of_word_suffix", "</w>", 'model.end_of_word_suffix is "</w>"'),
    ("normalizer", {"type": "NFC"}, 'normalizer is {"type": "NFC"}; supported: null'),
    ("decoder", {"type": "Metaspace"}, "decoder is .*; supported: ByteLevel"),
    ("decoder", None, "decoder is null; supported: ByteLevel"),
    ("pre_tokenizer", None, "pre_tokenizer is missing; expected an object"),
    ("pre_tokenizer", {"type": "Metaspace"}, 'pre_tokenizer is "Metaspace"; supported: ByteLev'),
    ("pre_tokenizer", sequence(SPLIT, SPLIT, PLAIN), r'is "Split \+ Split \+ ByteLevel"'),
    ("pre_tokenizer", sequence(SPLIT, {"type": "ByteLevel"}), "use_regex is true; supported: fal"),
    ("pre_tokenizer", sequence(SPLIT, PLAIN | {"add_prefix_space": True}), "add_prefix_space is t"),
    ("pre_tokenizer", sequence(SPLIT | {"behavior": "Removed"}, PLAIN), r'is \["Removed", false\]'),
    ("pre_tokenizer", sequence(SPLIT | {"pattern": {"Regex": "^a"}}, PLAIN), "pattern is .*comm"),
    (
        "pre_tokenizer",
        sequence(SPLIT | {"pattern": {"Regex": "a{2}+"}}, PLAIN),
        "pattern is .*comm",
    ),
    ("pre_tokenizer", sequence(SPLIT | {"pattern": {"Regex": "a)"}}, PLAIN), "Split.pattern"),
    ("pre_tokenizer", sequence(SPLIT | {"pattern": {"String": " "}}, PLAIN), "pattern is .*comm"),
    ("post_processor", {"type": "BertProcessing"}, 'post_processor.type is "BertProcessing"'),
    ("post_processor", "Template", 'post_processor.type is "Template"; supported: TemplateProc'),
    ("added_tokens", 7, "added_tokens is 7; supported: a list"),
    ("pre_tokenizer", {"type": ["ByteLevel"]}, "pre_tokenizer is .*; supported: ByteLevel"),
    ("added_tokens", [{"content": "x"}], r"added_tokens\[0\].id is missing"),
    ("added_tokens", [{"content": "x", "id": 9}], r'\[0\].id 9 of "x" contradicts another token'),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path, base, field, value, message):
    *parents, name = field.split(".")
    owner = base
    for parent in parents:
        owner = owner[parent]
    if value is None and field != "decoder":
        del owner[name]
    else:
        owner[name] = value
    with pytest.raises(ValueError, match=f"/tokenizer.json: .*{message}") as error:
        save(tmp_path, base)
    assert "\n" not in str(error.value)


def test_unknown_token_for_missing_bytes_is_refused(tmp_path, base):
    base["model"] |= {"unk_token": "<|end|>", "merges": []}
    del base["model"]["vocab"]["a"]
    with pytest.raises(ValueError, match=r'model.unk_token is "<|end|>"; supported: null where'):
        save(tmp_path, base)


def test_eos_token_without_an_id_is_refused(tmp_path, base):
    with pytest.raises(ValueError, match=r'has no token "</s>", the eos_token of tokenizer_config'):
        save(tmp_path, base, {"eos_token": "</s>"})


def test_imports_without_torch():
    """A process in which importing torch fails can still import tokenizer."""
    code = "import sys; sys.modules['torch'] = None; import tokenizer"
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
