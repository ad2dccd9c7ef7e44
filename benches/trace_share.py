"""Where the time of a rank goes, from the trace of a run:

    lockstep bench train --model DIR --trace TRACES        # or any process with --trace
    python benches/trace_share.py TRACES/*.json

For each rank's thread, from its first operation to the end of its last: the share of each kind of span without
those inside it, and of the time between operations. `micro-batch` is kernels, and so is `execute` by itself (the
optimiser, copies of the state); everything else is coordination. A rank that waits for another in `gather` or
`all-reduce` waits for kernels, too: so read one rank alone, or the busiest.
"""

import collections
import json
import sys

KERNELS = {"micro-batch", "execute"}


def events(path):
    text = open(path, encoding="utf-8").read()
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # Of a process that was killed: the list has no end.
        return json.loads(text.rstrip().rstrip(",") + "]")


def own_times(spans):
    """Microseconds of each kind of span without those inside it, and the first and last moment."""
    own, open_spans, first, last = collections.Counter(), [], None, None
    for span in spans:
        now = span["ts"]
        if open_spans:
            own[open_spans[-1]] += now - last
        elif first is not None:
            own["between operations"] += now - last
        first, last = (now if first is None else first), now
        if span["ph"] == "B":
            open_spans.append(span["name"])
        else:
            open_spans.pop()
    return own


def main():
    for path in sys.argv[1:]:
        threads = {}
        names = {}
        for event in events(path):
            if event["ph"] == "M" and event["name"] == "thread_name":
                names[event["tid"]] = event["args"]["name"]
            elif event["ph"] in "BE":
                threads.setdefault(event["tid"], []).append(event)
        for thread, spans in threads.items():
            if not names.get(thread, "").startswith("rank-"):
                continue
            own = own_times(spans)
            total = sum(own.values())
            coordination = sum(time for name, time in own.items() if name not in KERNELS)
            print(f"{path} {names[thread]}: {total / 1e6:.2f} s, coordination {100 * coordination / total:.2f}%")
            for name, time in own.most_common():
                print(f"    {name:20} {100 * time / total:6.2f}%")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main()
