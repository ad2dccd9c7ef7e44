"""All-reduce of the gloo peer (torch.distributed, TCP on loopback) between processes of this machine.

    python gloo.py --processes 2 --mb 16 64 336 --repeats 5

Each process holds an f32 vector of --mb million bytes; after one all-reduce that is not counted, --repeats
are, each behind a barrier. Prints one JSON line: for each size and repeat the time from the first process's
start to the last one's end, on the clock that all of them share, and the CPU time of all together.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time


def rank_main(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{args.store}", rank=args.rank, world_size=args.processes)
    results = []
    for megabytes in args.mb:
        # As in src/bench/allreduce/rank.rs.
        i = torch.arange(megabytes * 250_000)
        values = ((args.rank * 31 + i * 17) % 97).float() * torch.tensor([1e-3, 1.0, 1e3])[i % 3]
        spans = []
        for repeat in range(args.repeats + 1):
            vector = values.clone()
            dist.barrier()
            cpu, start = time.process_time(), time.monotonic()
            dist.all_reduce(vector)
            end, cpu = time.monotonic(), time.process_time() - cpu
            everyone = [None] * args.processes
            dist.all_gather_object(everyone, (start, end, cpu))
            if repeat > 0:
                starts, ends, cpus = zip(*everyone)
                spans.append({"start_s": min(starts), "end_s": max(ends), "cpu_s": sum(cpus)})
        results.append({"megabytes": megabytes, "spans": spans})
    if args.rank == 0:
        print(json.dumps({"bench": "gloo", "processes": args.processes, "results": results,
                          "torch": torch.__version__}))
    dist.destroy_process_group()


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--processes", type=int, default=2)
    ap.add_argument("--mb", type=int, nargs="+", default=[16, 64, 336])
    ap.add_argument("--repeats", type=int, default=5)
    ap.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    ap.add_argument("--store", help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.rank is not None:
        return rank_main(args)
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        ranks = [
            subprocess.Popen([sys.executable, __file__, *sys.argv[1:], f"--rank={rank}", f"--store={store}"])
            for rank in range(args.processes)
        ]
        codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"the ranks ended with {codes}")


if __name__ == "__main__":
    main()
