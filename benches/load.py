"""What many clients at once do to one `lockstep up`: 64 runs that submit ahead, and 512 sample requests at a time.

    cargo build --release --example tiny_model --bin lockstep
    python benches/load.py                  # needs Python 3.11 and httpx; --help for sizes

Starts a service of its own on a tiny model (so that requests and not matrix products are the load), trains all
runs and samples from them, and meanwhile measures what a client feels of the control plane: the time of
`/health` (of the service and of a run, its heartbeat) and of `/policy_version`, and a run's deletion at the end.
Prints a table; exits with 1 if an operation was lost or done twice, a heartbeat failed, or a sample was not
served.
"""

import argparse
import asyncio
import multiprocessing
import pathlib
import subprocess
import sys
import tempfile
import time
import uuid

import httpx

MODEL = "load/tiny"
ROOT = pathlib.Path(__file__).resolve().parent.parent

# As the Python client: an operation is polled again at once after 408, other refusals are errors.
NOT_YET = 408

# Statuses after which the Python client sends a sample request again.
SAMPLE_AGAIN = {408, 502}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--build", default="release", choices=["release", "debug"])
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="forward_backward and optim_step, each so often a run")
    parser.add_argument("--ahead", type=int, default=8, help="operations of a run that are submitted ahead")
    parser.add_argument("--samplers", type=int, default=512, help="sample requests at a time")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each sample")
    parser.add_argument("--trainers", type=int, default=2)
    return parser.parse_args()


class Times:
    """Durations in milliseconds, by what took them."""

    def __init__(self):
        self.of = {}

    def add(self, what, begun):
        self.of.setdefault(what, []).append((time.perf_counter() - begun) * 1e3)

    def rows(self):
        for what, taken in self.of.items():
            taken.sort()
            at = lambda share: taken[min(len(taken) - 1, int(share * len(taken)))]
            yield what, len(taken), at(0.5), at(0.9), at(0.99), taken[-1]


class Memory:
    """Peak resident memory of the service's processes, from /proc."""

    def __init__(self, data):
        self.data, self.peak = str(data).encode(), {}

    def look(self):
        for entry in pathlib.Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if self.data in words:
                    status = (entry / "status").read_text()
                    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
                    name = words[1].decode().replace("up", "gateway and supervisor")
                    self.peak[name] = max(peak, self.peak.get(name, 0))
            except (OSError, IndexError, ValueError):
                pass


class Load:
    def __init__(self, options, url, data):
        self.options, self.url, self.data = options, url, data
        self.times, self.failed, self.broken, self.peak = Times(), [], [], {}
        self.done = asyncio.Event()
        limits = httpx.Limits(max_connections=4096, max_keepalive_connections=4096)
        self.http = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(300.0), limits=limits)

    async def send(self, what, client, method, path, **request):
        """Sends a request, again if its connection breaks, as the Python client does; measured as a whole."""
        begun = time.perf_counter()
        while True:
            try:
                answer = await client.request(method, path, **request)
                break
            except httpx.TransportError as error:
                self.broken.append(f"{what}: {error!r}")
        self.times.add(what, begun)
        return answer

    async def expect(self, answer, status, what):
        if answer.status_code != status:
            self.failed.append(f"{what}: {answer.status_code} {answer.text[:200]}")
            return None
        return answer.json()

    async def make_run(self, session):
        body = {"session_id": session, "base_model": MODEL, "lora_rank": 8, "replicas": 1}
        made = await self.expect(await self.http.post("/v1/loops/trainers", json=body), 200, "a run")
        return made["run"]["id"]

    async def operate(self, run, operation, body, ahead):
        """Submits an operation and waits for its result on the side."""
        await ahead.acquire()
        trainer = f"/v1/loops/runs/{run}/trainer"
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        while True:
            submitted = await self.send(
                "submit", self.http, "POST", f"{trainer}/{operation}", json=body, headers=headers
            )
            if submitted.status_code != NOT_YET:
                break
        accepted = await self.expect(submitted, 202, operation)
        if accepted is None:
            ahead.release()
            return None
        return asyncio.create_task(self.result(trainer, operation, accepted["operation_id"], ahead))

    async def result(self, trainer, operation, id, ahead):
        begun = time.perf_counter()
        while True:
            polled = await self.send("poll, up to 30 s", self.http, "GET", f"{trainer}/operations/{id}")
            if polled.status_code != NOT_YET:
                break
        ahead.release()
        self.times.add(f"{operation}, accepted to done", begun)
        result = await self.expect(polled, 200, operation)
        if result is not None and result["status"] != "done":
            self.failed.append(f"{operation} of {trainer}: {result}")
        return result

    async def train(self, run, seed):
        tokens = [(seed * 31 + i * 7) % 250 for i in range(33)]
        targets = {"data": tokens[1:], "dtype": "int64", "shape": [32]}
        chunk = {"type": "encoded_text", "tokens": tokens[:-1]}
        datum = {"model_input": {"chunks": [chunk]}, "loss_fn_inputs": {"target_tokens": targets}}
        step = {"adam_params": {"learning_rate": 1e-3}}
        ahead, results = asyncio.Semaphore(self.options.ahead), []
        results.append(await self.operate(run, "init_trainer_server", {"lora_rank": 8}, ahead))
        for _ in range(self.options.steps):
            results.append(await self.operate(run, "forward_backward", {"data": [datum] * 4}, ahead))
            results.append(await self.operate(run, "optim_step", step, ahead))
        results.append(await self.operate(run, "save_weights_for_sampler", {"name": "last"}, ahead))
        results = await asyncio.gather(*(result for result in results if result))
        metrics = [r["result"].get("metrics", {}) for r in results if r and "result" in r]
        steps = [m["step"] for m in metrics if "step" in m]
        if steps != list(range(1, self.options.steps + 1)):
            self.failed.append(f"{run}: steps {steps}")

    async def sample(self, run, seed):
        """One of the requests that are always on their way, as long as anything trains."""
        body = {"prompt": [seed % 250, 40, 41], "max_tokens": self.options.tokens, "temperature": 1.0}
        while not self.done.is_set():
            headers = {"Idempotency-Key": uuid.uuid4().hex}
            while True:
                path = f"/v1/loops/samplers/{run}/serve/sample"
                answer = await self.send("sample", self.http, "POST", path, json=body, headers=headers)
                if answer.status_code not in SAMPLE_AGAIN:
                    break
            await self.expect(answer, 200, "a sample")

    async def run(self):
        session = (await self.http.post("/v1/loops/sessions")).json()["session"]["id"]
        runs = await asyncio.gather(*(self.make_run(session) for _ in range(self.options.runs)))
        begun = time.monotonic()
        samples = [asyncio.create_task(self.sample(runs[i % len(runs)], i)) for i in range(self.options.samplers)]
        processes = multiprocessing.get_context("spawn")
        stop, (hears, told) = processes.Event(), processes.Pipe(duplex=False)
        watching = processes.Process(target=watch, args=(self.url, runs, self.data, stop, told))
        watching.start()
        await asyncio.gather(*(self.train(run, i) for i, run in enumerate(runs)))
        seconds = time.monotonic() - begun
        self.done.set(), stop.set()
        times, failed, self.peak = await asyncio.to_thread(hears.recv)
        self.times.of |= times
        self.failed += failed
        await asyncio.gather(*samples)
        for run in runs:
            answer = await self.send("deletion of a run", self.http, "DELETE", f"/v1/loops/runs/{run}")
            await self.expect(answer, 200, "deletion")
        await self.http.aclose()
        return seconds


def watch(url, runs, data, stop, told):
    """The control plane as another client feels it, each run's heartbeat among it: in a process of its own, since
    hundreds of requests keep the one that sends them busy."""
    times, failed, memory, turn = Times(), [], Memory(data), 0
    with httpx.Client(base_url=url, timeout=60.0) as http:
        while not stop.is_set():
            trainer = f"/v1/loops/runs/{runs[turn % len(runs)]}/trainer"
            turn += 1
            for what, path in [
                ("health of the service", "/health"),
                ("heartbeat of a run", f"{trainer}/health"),
                ("policy_version", f"{trainer}/policy_version"),
            ]:
                begun = time.perf_counter()
                try:
                    answer = http.get(path)
                    failed += [] if answer.status_code == 200 else [f"{what}: {answer.status_code} {answer.text}"]
                except httpx.HTTPError as error:
                    failed.append(f"{what}: {error!r}")
                times.add(what, begun)
            memory.look()
            time.sleep(0.1)
    told.send((times.of, failed, memory.peak))


def main():
    options = arguments()
    target = ROOT / "target" / options.build
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        subprocess.run([target / "examples" / "tiny_model", scratch / "model"], check=True, stdout=subprocess.DEVNULL)
        data = scratch / "data"
        command = [target / "lockstep", "up", "--http", "127.0.0.1:0", "--data-dir", data]
        command += ["--model", f"{MODEL}={scratch / 'model'}", "--trainers", str(options.trainers)]
        up = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            url = up.stdout.readline().split()[1]
            load = Load(options, url, data)
            seconds = asyncio.run(load.run())
        finally:
            up.terminate()
            up.wait()
    print(f"{'':40} {'count':>7} {'median':>9} {'p90':>9} {'p99':>9} {'largest':>9}   ms")
    for what, count, *taken in load.times.rows():
        print(f"{what:40} {count:7} " + " ".join(f"{ms:9.1f}" for ms in taken))
    operations = options.runs * (2 * options.steps + 2)
    print(f"{options.runs} runs, {operations} operations in {seconds:.1f} s; {options.samplers} samples at a time")
    print(f"lost, failed or refused: {len(load.failed)}; connections lost: {len(load.broken)}")
    print("peak memory, MiB: " + ", ".join(f"{name} {peak:.0f}" for name, peak in sorted(load.peak.items())))
    for failure in load.failed[:10] + load.broken[:10]:
        print("FAILED", failure, file=sys.stderr)
    sys.exit(bool(load.failed))


if __name__ == "__main__":
    main()
