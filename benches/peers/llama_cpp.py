"""Sampling speed of the peer on this machine's CPU: llama.cpp, through the C API that llama-cpp-python binds.

    python llama_cpp.py --model FILE.gguf --batch 8 --prompt 64 --new 128 --threads 2 [--no-repack]

All prompts are prefilled in one call, then every call takes one token of each stream, as llama-server does with
parallel slots; tokens are drawn at temperature 1 and never cut short. One JSON line with medians: what
`lockstep bench decode` prints under the same keys. --no-repack keeps llama.cpp from rewriting quantised weights
for AMX, which crashes on some machines (ggml-org/llama.cpp issue 20824).
"""

import sys

# This file has the package's name, and its folder would be searched first.
sys.path.pop(0)

import argparse  # noqa: E402
import ctypes  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402

import llama_cpp  # noqa: E402


class Streams:
    """A model, its context, and a batch that holds a row for each token of a call."""

    def __init__(self, args: argparse.Namespace) -> None:
        llama_cpp.llama_backend_init()
        of_model = llama_cpp.llama_model_default_params()
        of_model.use_extra_bufts = not args.no_repack
        self.model = llama_cpp.llama_model_load_from_file(args.model.encode(), of_model)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {args.model}")
        of_context = llama_cpp.llama_context_default_params()
        rows = args.batch * args.prompt
        of_context.n_ctx = args.batch * (-(-(args.prompt + args.new) // 256) * 256)
        of_context.n_batch = max(rows, 512)
        of_context.n_seq_max = args.batch
        of_context.n_threads = of_context.n_threads_batch = args.threads
        self.context = llama_cpp.llama_init_from_model(self.model, of_context)
        self.rows = llama_cpp.llama_batch_init(of_context.n_batch, 0, args.batch)
        words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        drawn = random.Random(0)
        self.prompts = [[drawn.randrange(100, words) for _ in range(args.prompt)] for _ in range(args.batch)]

    def run(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """One call: (token, position, stream, whether its logits are wanted) of each row."""
        for i, (token, position, stream, wanted) in enumerate(rows):
            self.rows.token[i] = token
            self.rows.pos[i] = position
            self.rows.n_seq_id[i] = 1
            self.rows.seq_id[i][0] = stream
            self.rows.logits[i] = wanted
        self.rows.n_tokens = len(rows)
        if llama_cpp.llama_decode(self.context, self.rows) != 0:
            raise SystemExit("llama_decode failed")

    def generate(self, new: int) -> tuple[float, float]:
        """Seconds of the prefill with its draws, and of the rest."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        samplers = []
        for stream in range(len(self.prompts)):
            sampler = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
            llama_cpp.llama_sampler_chain_add(sampler, llama_cpp.llama_sampler_init_temp(1.0))
            llama_cpp.llama_sampler_chain_add(sampler, llama_cpp.llama_sampler_init_dist(stream))
            samplers.append(sampler)
        length = len(self.prompts[0])
        start = time.perf_counter()
        self.run([(token, position, stream, position == length - 1)
                  for stream, prompt in enumerate(self.prompts) for position, token in enumerate(prompt)])
        last = [(stream + 1) * length - 1 for stream in range(len(self.prompts))]
        tokens = [llama_cpp.llama_sampler_sample(s, self.context, row) for s, row in zip(samplers, last)]
        prefilled = time.perf_counter()
        for step in range(new - 1):
            self.run([(token, length + step, stream, True) for stream, token in enumerate(tokens)])
            tokens = [llama_cpp.llama_sampler_sample(s, self.context, row) for row, s in enumerate(samplers)]
        end = time.perf_counter()
        for sampler in samplers:
            llama_cpp.llama_sampler_free(sampler)
        return prefilled - start, end - prefilled


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", required=True, help="a GGUF file")
    ap.add_argument("--batch", type=int, default=1)
    ap.add_argument("--prompt", type=int, default=64)
    ap.add_argument("--new", type=int, default=128)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--repeats", type=int, default=3)
    ap.add_argument("--no-repack", action="store_true")
    args = ap.parse_args()

    @llama_cpp.llama_log_callback
    def quiet(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
        pass

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    streams = Streams(args)
    streams.generate(min(args.new, 4))
    runs = [streams.generate(args.new) for _ in range(args.repeats)]
    prefill, rest = (statistics.median(part) for part in zip(*runs))
    tokens = args.batch * (args.new - 1)
    print(json.dumps({
        "bench": "decode", "peer": "llama.cpp", "batch": args.batch, "prompt": args.prompt, "new": args.new,
        "dtype": args.model.rsplit(".", 2)[-2].lower(), "threads": args.threads, "repack": not args.no_repack,
        "prefill_s": round(prefill, 4),
        "prefill_tokens_per_s": round(args.batch * args.prompt / prefill, 1),
        "decode_tokens_per_s": round(tokens / rest, 1) if tokens else None,
        "total_tokens_per_s": round(args.batch * args.new / (prefill + rest), 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "versions": f"llama-cpp-python {llama_cpp.__version__}",
    }))


if __name__ == "__main__":
    main()
