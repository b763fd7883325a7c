"""What holds only on several GPUs: sums between them, one graph replay per step of each rank."""

import json
import os
import signal
import subprocess
import sys
from collections import ChainMap
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tiny_speculator

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")
ROOT = Path(__file__).parent.parent
RANKS = [size for size in (2, 4) if size <= max(GPUS, 2)]


def run(command, seconds):
    """Output, errors and exit code; everything it started is killed after so many seconds."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    try:
        return *process.communicate(timeout=seconds), process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return *process.communicate(), "killed"


@pytest.fixture(scope="module", params=RANKS)
def group(request):
    """What each rank found; a later part may be missing."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
    command += [str(request.param), "--master-port", str(20000 + os.getpid() % 20000)]
    command += [str(Path(__file__).with_name("gpu_tp_cases.py"))]
    out, errors, code = run(command, 240)
    print(errors, code)
    assert out, errors
    return [
        dict(ChainMap(*parts)) for parts in zip(*map(json.loads, out.splitlines()), strict=True)
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_chain_text_is_bit_identical_to_the_always_wrong_speculator(group, temperature):
    for found in group:  # the same tokens on every rank
        (expected, none), (right, most), (at_times, some) = found[f"chain {temperature}"]
        assert none == 0 and len(set(expected[0])) > 100
        assert right == at_times == expected == group[0][f"chain {temperature}"][0][0]
        assert most > some > 300


def test_a_step_is_one_graph_launch_of_each_rank(group):
    assert [found["launches"] for found in group] == [{"cudaGraphLaunch": 5}] * len(group)


def test_sums_are_those_of_nccl_and_the_same_on_all_ranks(group):
    """Each addition rounds to bfloat16, by at most 2^-8 of what has been added: by one unit."""
    assert all(found["one shot"] for found in group)
    for found in group:
        ours, nccls, bits = (found["sums"][i::3] for i in range(3))
        assert max(ours + nccls) < len(group)
        assert bits == group[0]["sums"][2::3]


@pytest.mark.parametrize("rows", [1, 5, 31])
def test_sums_in_turn_are_those_of_the_gathered_parts(group, rows):
    """Bit for bit, and the same on all ranks."""
    wrong, bits = zip(*(found[f"sums in turn {rows}"] for found in group), strict=True)
    assert set(wrong) == {0} and len(set(bits)) == 1


def test_ranks_compute_what_one_gpu_does(group):
    assert all(found["error"] < 0.05 for found in group)  # four layers whose results are rounded


SNIPPET = """
import sys
from fastspec import LLM, SamplingParams

llm = LLM(sys.argv[1], {"model": sys.argv[2]}, tensor_parallel_size=2, dtype="bfloat16")
params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
for output in llm.generate([[1, 2, 3], [4]], params):
    print(len(output.outputs[0].token_ids), flush=True)
"""


def test_a_script_that_uses_two_gpus_ends_by_itself(tmp_path):
    """Although its CUDA graphs hold collectives of a process group that nobody destroys."""
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tiny_llama(tmp_path / "target", **sizes, **heads)
    tiny_speculator(tmp_path / "draft", vocab_size=96, emb_dim=128)
    (tmp_path / "script.py").write_text(SNIPPET)
    command = [sys.executable, *(str(tmp_path / x) for x in ("script.py", "target", "draft"))]
    out, errors, code = run(command, 180)
    assert (out, code) == ("20\n20\n", 0), errors
