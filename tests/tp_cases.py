"""Rank 0 of a group that runs many cases, for test_tp.py: prints what they gave as JSON.

python tp_cases.py SIZE CHECKPOINTS
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import tp  # noqa: E402
from fastspec import LLM, SamplingParams  # noqa: E402

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], [12]]
GREEDY = SamplingParams(temperature=0, max_tokens=10)
# So hot that the noise, which draft and target share, decides: drafts are often accepted.
SAMPLED = [SamplingParams(temperature=5, max_tokens=10, seed=seed) for seed in (1, 2, 3)]
# One row is greedy, one filtered, one neither.
MIXED = [GREEDY, replace(SAMPLED[1], top_p=0.9, top_k=40, min_p=0.01), SAMPLED[2]]
SETTINGS = {"greedy": GREEDY, "sampled": SAMPLED, "mixed": MIXED}


def new_llm(target, draft=None, draft_size=1, tree=0, **options):
    speculative = draft and {"model": str(draft), "draft_tensor_parallel_size": draft_size}
    if tree:
        speculative |= {"tree": tree, "top_k_tokens_per_head": [3, 2, 2]}
    here = {"dtype": "float32", "device": "cpu", "batch_size": 3, "max_seq_len": 64}
    return LLM(target, speculative, **(here | options))


def answers(llm, kind):
    """Ids, steps and accepted drafts of each answer."""
    outputs = llm.generate(PROMPTS, SETTINGS[kind])
    return [[o.outputs[0].token_ids, o.steps, o.accepted_per_head] for o in outputs]


def two_turns(llm):
    """Ids of an answer, those of the next turn's, and how much of that was in the cache."""
    prompt, reused = [1, 2, 3, 4, 5], []
    find = llm.engine.cached_prefix
    llm.engine.cached_prefix = lambda *args: reused.append(find(*args)) or reused[-1]
    answers = []
    for _ in range(2):
        request = replace(llm.request(prompt, GREEDY, "prompt"), goes_on=True)
        [answer] = [output for *_, output in llm.run([request]) if output]
        answers.append(answer.outputs[0].token_ids)
        prompt = [*prompt, *answers[-1], 6, 7]
    return [*answers, reused[-1]]


def anonymous(pid):
    """Bytes of a process's memory, without pages of mapped files."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def peak_memory(ranks, load):
    """By rank, how far its memory grew above where it was."""
    pids = [os.getpid(), *(process.pid for process, _ in ranks.workers.values())]
    before, peaks, done = [anonymous(pid) for pid in pids], [0] * len(pids), threading.Event()

    def watch():
        while not done.wait(0.003):
            for i, pid in enumerate(pids):
                peaks[i] = max(peaks[i], anonymous(pid) - before[i])

    watcher = threading.Thread(target=watch)
    watcher.start()
    load()
    done.set()
    watcher.join()
    return peaks


def goes_on(ranks, directory):
    """What the same ranks answer after a stream was left, and after Ctrl-C."""
    llm = new_llm(directory, batch_size=2, tensor_parallel_size=ranks.size, load=False)
    llm.load(ranks)
    stream = llm.stream(PROMPTS, GREEDY)
    next(stream)
    stream.close()
    after_close = answers(llm, "greedy")
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        llm.generate(PROMPTS, replace(GREEDY, max_tokens=60, ignore_eos=True))
        time.sleep(1)
        after_interrupt = "was not interrupted"
    except KeyboardInterrupt:
        after_interrupt = answers(llm, "greedy")
    return {"after_close": after_close, "after_interrupt": after_interrupt}


def main(size, root):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & may have it ignored
    ranks = tp.start(size)
    results = {"pids": [process.pid for process, _ in ranks.workers.values()]}
    for target in ("gqa", "biased", "nine", "bigcode"):
        for draft_size in (0, 1, size):
            llm = new_llm(
                root / target,
                root / "draft" if draft_size else None,
                draft_size or 1,
                tensor_parallel_size=size,
                load=False,
            )
            llm.load(ranks)
            for kind in SETTINGS:
                results[f"{target} {draft_size} {kind}"] = answers(llm, kind)
    for draft in ("narrow", "ranked"):
        llm = new_llm(root / "gqa", root / draft, size, tensor_parallel_size=size, load=False)
        llm.load(ranks)
        results |= {f"{draft} {kind}": answers(llm, kind) for kind in ("greedy", "sampled")}
    for draft_size in (1, size):
        draft = root / "draft", draft_size, 9
        llm = new_llm(root / "gqa", *draft, tensor_parallel_size=size, load=False)
        llm.load(ranks)
        for kind in ("greedy", "sampled"):
            results[f"tree {draft_size} {kind}"] = answers(llm, kind)
    llm = new_llm(root / "gqa", root / "draft", tensor_parallel_size=size, load=False)
    llm.load(ranks)
    results["turns"] = two_turns(llm)
    llm = new_llm(root / "ties", tensor_parallel_size=size, load=False)
    llm.load(ranks)
    results["ties"] = [ids for ids, *_ in answers(llm, "greedy")]
    if size == 2:
        results |= goes_on(ranks, root / "gqa")
        print(json.dumps(results), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    llm = new_llm(root / "large", tensor_parallel_size=size, load=False)
    results["peaks"] = peak_memory(ranks, lambda: llm.load(ranks))
    results["parameters"] = {type(p).__name__ for p in llm.engine.model.parameters()} == {
        "Parameter"
    } and all(type(p.data) is torch.Tensor for p in llm.engine.model.parameters())
    tell = tp.worker_options
    tp.worker_options = lambda llm: tell(llm) | {"model": "/nowhere"}
    try:
        llm.load(ranks)
    except ValueError as error:
        results["unseen"] = str(error)
    tp.worker_options = tell
    llm.load(ranks)
    ranks.announce("nonsense")
    try:
        llm.generate(PROMPTS, GREEDY)
    except ConnectionError as error:
        results["lost"] = str(error)
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
