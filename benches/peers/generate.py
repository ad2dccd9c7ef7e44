"""Sampling speed of the peer on this machine's CPU, or with --device cuda on its GPU: PyTorch and transformers' `generate`.

    python generate.py --model DIR --batch 8 --prompt 64 --new 128 --dtype bf16 --threads 2

--batch prompts of --prompt random tokens, --new tokens for each, drawn at temperature 1 and never cut short. One
JSON line with medians: what `lockstep bench decode` prints under the same keys. The prefill is a call for one
token; decoding is the whole call less that.
"""

import argparse
import json
import resource
import statistics
import time

import torch
import transformers


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", required=True)
    ap.add_argument("--batch", type=int, default=1)
    ap.add_argument("--prompt", type=int, default=64)
    ap.add_argument("--new", type=int, default=128)
    ap.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    ap.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--repeats", type=int, default=3)
    args = ap.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    prompts = torch.randint(100, model.config.vocab_size, (args.batch, args.prompt), device=args.device)
    mask = torch.ones_like(prompts)

    def taken(new: int) -> float:
        start = time.perf_counter()
        tokens = model.generate(prompts, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                min_new_tokens=new, max_new_tokens=new)
        # A GPU goes on working after the call.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        end = time.perf_counter()
        if tokens.shape != (args.batch, args.prompt + new):
            raise SystemExit(f"{tuple(tokens.shape)} tokens came")
        return end - start

    taken(2)
    prefill = statistics.median(taken(1) for _ in range(args.repeats))
    whole = statistics.median(taken(args.new) for _ in range(args.repeats)) if args.new > 1 else None
    print(json.dumps({
        "bench": "decode", "peer": "transformers", "batch": args.batch, "prompt": args.prompt, "new": args.new,
        "dtype": args.dtype, "device": args.device, "threads": args.threads, "prefill_s": round(prefill, 4),
        "prefill_tokens_per_s": round(args.batch * args.prompt / prefill, 1),
        "decode_tokens_per_s": whole and round(args.batch * (args.new - 1) / (whole - prefill), 1),
        "total_tokens_per_s": whole and round(args.batch * args.new / whole, 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }))


if __name__ == "__main__":
    main()
