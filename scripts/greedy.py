"""Greedy text for five prompts as JSON lines, by us or by another tool, and the comparison of two such files.

    ours RUN · vllm DIR DRAFTS · llama FILE.gguf → {"prompt", "text"} per line
    compare A B

Runs in the environment of the tool, so each is imported only where it is asked for.
"""

import json
import os
import sys
from collections.abc import Iterable

PROMPTS = ("Mila went to the river.", "Once upon a time", "The old fox", "One morning", "Tom said")
TOKENS = 40


def ours(run: str) -> Iterable[str]:
    from pathlib import Path

    import torch

    from leanseek.serve.llm import LLM
    from leanseek.serve.sampling import Sampling

    llm = LLM.load(Path(run), dtype=torch.float32)  # as the others, whatever the run was trained in
    return (llm.generate(prompt, Sampling(temperature=0, max_tokens=TOKENS)).text for prompt in PROMPTS)


def vllm(folder: str, drafts: str) -> Iterable[str]:
    from vllm import LLM, SamplingParams

    # CPU_MLA is vLLM's latent attention in FP32. Its own kernels are left out: that for RoPE without YaRN reads queries
    # as if the heads' rotary parts lay side by side.
    # It knows latents of 512 alone: VLLM_MLA_DISABLE=1 leaves it out, for smaller models.
    attention = {} if os.environ.get("VLLM_MLA_DISABLE") else {"backend": "CPU_MLA"}
    backend = {"attention_config": attention, "compilation_config": {"custom_ops": ["none"]}}
    if int(drafts):
        speculation = {"method": "mtp", "num_speculative_tokens": int(drafts)}
        backend["speculative_config"] = speculation | {f"attention_{key}": value for key, value in attention.items()}
    limits = {"max_model_len": 256, "max_num_seqs": 2, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}
    llm = LLM(folder, dtype="float32", disable_log_stats=False, **backend, **limits)
    results = llm.generate(list(PROMPTS), SamplingParams(temperature=0, max_tokens=TOKENS))
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value"):
            print(metric.name, metric.value, file=sys.stderr)
    return [result.outputs[0].text for result in results]


def llama(file: str) -> Iterable[str]:
    from llama_cpp import GGML_TYPE_F32, Llama

    llm = Llama(file, n_ctx=256, n_threads=1, verbose=False, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)
    return (llm.create_completion(p, max_tokens=TOKENS, temperature=0)["choices"][0]["text"] for p in PROMPTS)


def compare(a: str, b: str) -> None:
    rows = []
    for name in (a, b):
        with open(name, encoding="utf-8") as file:
            rows.append([json.loads(line) for line in file if line.startswith('{"prompt"')])  # vLLM's log is in between
    assert all(len(part) == len(PROMPTS) for part in rows)
    for left, right in zip(*rows, strict=True):
        print(f"  {'same' if left == right else 'DIFFERENT'}: {left['prompt']!r} → {left['text']!r}")
        if left != right:
            print(f"    theirs: {right['text']!r}")
    if rows[0] != rows[1]:
        sys.exit("the texts differ")


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "compare":
        compare(*arguments)
        return
    for prompt, text in zip(PROMPTS, {"ours": ours, "vllm": vllm, "llama": llama}[what](*arguments), strict=True):
        print(json.dumps({"prompt": prompt, "text": text}))


if __name__ == "__main__":
    main()
