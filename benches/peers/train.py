"""LoRA training speed of the peer on this machine's CPU, or with --device cuda on its GPU: PyTorch, transformers and PEFT.

    python train.py --model DIR --batch 8 --seq 256 --rank 16 --dtype bf16 --threads 2 [--compile]

A frozen base in --dtype with f32 LoRA on all seven linear layers; --batch sequences of --seq random tokens,
every position trained. One step that is not counted (with --compile it holds the compilation), then --repeats of
each kind. One JSON line with medians: what `lockstep bench train` prints under the same keys.
"""

import argparse
import json
import resource
import statistics
import time

import peft
import torch
import transformers

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Peer:
    def __init__(self, args: argparse.Namespace) -> None:
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
        base = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa")
        base.to(args.device)
        base.config.use_cache = False
        lora = peft.LoraConfig(r=args.rank, lora_alpha=32, lora_dropout=0.0, target_modules=LINEAR_LAYERS,
                               task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, lora, autocast_adapter_dtype=True).train()
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.adam = torch.optim.AdamW(self.trained, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        self.model = torch.compile(model) if args.compile else model
        self.ids = torch.randint(100, base.config.vocab_size, (args.batch, args.seq), device=args.device)

    def forward(self) -> torch.Tensor:
        return self.model(input_ids=self.ids, labels=self.ids).loss

    def forward_only(self) -> None:
        with torch.no_grad():
            self.forward()

    def forward_backward(self) -> None:
        self.forward().backward()

    def step(self) -> None:
        self.forward_backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    # A GPU goes on working after the call.
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", required=True)
    ap.add_argument("--batch", type=int, default=8)
    ap.add_argument("--seq", type=int, default=256)
    ap.add_argument("--rank", type=int, default=16)
    ap.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    ap.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--repeats", type=int, default=5)
    ap.add_argument("--compile", action="store_true")
    args = ap.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    peer = Peer(args)

    def median(work) -> float:
        taken = []
        for _ in range(args.repeats):
            taken.append(seconds(work))
            peer.adam.zero_grad(set_to_none=True)
        return statistics.median(taken)

    warmup = seconds(peer.step)
    # Under torch.compile a forward without gradients would be compiled a second time: it is left out.
    forward = None if args.compile else median(peer.forward_only)
    forward_backward, step = median(peer.forward_backward), median(peer.step)
    tokens = args.batch * args.seq
    print(json.dumps({
        "bench": "train", "peer": "PEFT", "batch": args.batch, "seq": args.seq, "rank": args.rank,
        "dtype": args.dtype, "device": args.device, "threads": args.threads, "compile": args.compile,
        "warmup_s": round(warmup, 3), "fwdbwd_s": round(forward_backward, 4), "step_s": round(step, 4),
        "fwd_tokens_per_s": forward and round(tokens / forward, 1),
        "fwdbwd_tokens_per_s": round(tokens / forward_backward, 1),
        "step_tokens_per_s": round(tokens / step, 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}",
    }))


if __name__ == "__main__":
    main()
