"""Addressing of two trees, side by side: the same slots and weights, then the times. One run, about a minute.

python3 .local/time_addressing.py [--main /tmp/src] [--branch /tmp/src_b] [--seconds 85] [--tiny]
--tiny: small shapes in Triton's interpreter, to try the control flow without a GPU.

1. In ten processes at once (they compile at the same time): lookups and writes of five drawn shapes in each tree.
2. Meanwhile each tree compiles what is timed.
3. One process a tree, alone, by turns: times from CUDA graphs, then the profiler.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

SHAPES = ("paper", "heads, nan", "ties", "near keys", "large")
GAP = 1e-5
NUMBER = "50"


def drawn(name, tiny):
    """cfg, memory and tokens of a shape, on the CPU; the same in each tree."""
    import torch

    from fwpkm import FwPKMConfig, Memory
    from fwpkm.backends import torch as be

    draw = torch.Generator().manual_seed(SHAPES.index(name))
    fields = {
        "paper": dict(key_dim=512, value_dim=512, num_subkeys=512, top_k=8, chunk_size=512),
        "heads, nan": dict(key_dim=96, value_dim=64, num_heads=2, num_subkeys=100, top_k=5, chunk_size=64, score="dot_product"),
        "ties": dict(key_dim=32, value_dim=32, num_subkeys=300, top_k=8, chunk_size=64),
        "near keys": dict(key_dim=64, value_dim=32, num_subkeys=512, top_k=8, chunk_size=64),
        "large": dict(key_dim=128, value_dim=16, num_subkeys=1024, top_k=16, chunk_size=256),
    }[name]
    length = {"paper": 4096, "large": 1024}.get(name, 600)
    if tiny:
        fields |= dict(key_dim=16, value_dim=16, num_subkeys=min(fields["num_subkeys"], 40), chunk_size=8)
        length = 20
    cfg = FwPKMConfig(**fields)
    memory = be.init_memory(cfg, seed=1)
    width = cfg.num_heads * cfg.key_dim
    query = torch.randn(1, length, width, generator=draw) / cfg.key_dim**0.5
    value = torch.randn(1, length, cfg.value_dim, generator=draw)
    dtype = torch.bfloat16 if name in ("paper", "large") else torch.float32
    keys = memory.keys
    if name == "heads, nan":
        query[0, 3, 1], query[0, 7, width - 1], value[0, 5, 0] = torch.nan, torch.inf, torch.nan
    if name == "ties":  # multiples of 1/2, so that every float32 sum is exact: equal distances are equal bits
        keys = torch.randint(-1, 2, keys.shape, generator=draw) / 2
        query = torch.randint(-1, 2, query.shape, generator=draw) / 2
    if name == "near keys":  # far from the origin, of whose products no digit of a distance is left
        keys = 1 + 0.01 * torch.randn(keys.shape, generator=draw)
        one, two = (keys[0, 0, i, torch.randint(cfg.num_subkeys, (length,), generator=draw)] for i in (0, 1))
        query = torch.cat([one, two], 1)[None] + 1e-4 * torch.randn(1, length, width, generator=draw)
    return cfg, Memory(keys.float().contiguous(), memory.values), query.to(dtype), value.to(dtype)


def gaps(cfg, memory, query):
    """By token, whether all gaps in float64 that decide its slots and their order are above GAP, or exact ties."""
    import torch

    n, half = query.shape[1], cfg.key_dim // 2
    q = query.double().view(n, cfg.num_heads, 2, half)
    clear = torch.ones(n, dtype=torch.bool, device=q.device)
    for h in range(cfg.num_heads):
        tops = []
        for c in range(2):
            rows = memory.keys[0, h, c].double()
            parts = []
            for x in q[:, h, c].split(256):
                if cfg.score == "idw":
                    parts.append(-((x[:, None] - rows[None]) ** 2).sum(2).add(cfg.score_eps).log())
                else:
                    parts.append(x @ rows.T)
            s = torch.cat(parts).sort(1, descending=True).values[:, : cfg.top_k + 1]
            if cfg.num_subkeys > cfg.top_k:
                last = s[:, cfg.top_k - 1] - s[:, cfg.top_k]
                clear &= (last > GAP) | (last == 0)
            tops.append(s[:, : cfg.top_k])
        sums = (tops[0][:, :, None] + tops[1][:, None, :]).flatten(1).sort(1, descending=True).values
        between = sums[:, : cfg.top_k] - sums[:, 1 : cfg.top_k + 1]
        clear &= ((between > GAP) | (between == 0)).all(1)
    return clear.cpu()


def check(name, out, tiny, reference):
    import torch

    from fwpkm import Memory
    from fwpkm.backends import torch as be

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg, memory, query, value = drawn(name, tiny)
    memory, query, value = Memory(*(x.to(device) for x in memory)), query.to(device), value.to(device)
    look = be.lookup(cfg, memory, query, implementation="triton")
    found = {"slots": look.slots[0], "weights": look.weights[0], "output": look.output[0].float()}
    state = be.init_state(cfg, memory, batch_size=1)
    output, state, trace = be.apply(cfg, state, query, value, implementation="triton")
    found |= {"read": output[0].float(), "keys": state.memory.keys, "values": state.memory.values}
    found |= {"first slots": trace.slots[0, : cfg.chunk_size]}
    if reference:
        wide = Memory(*(x.double() for x in memory))
        look = be.lookup(cfg, wide, query.double(), implementation="eager")
        found |= {"slots64": look.slots[0], "weights64": look.weights[0], "clear": gaps(cfg, memory, query)}
    torch.save({k: v.detach().cpu() for k, v in found.items()}, out)


def relative(a, b):
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return float((a - b).norm() / max(float(b.norm()), 1e-30))


def compare(name, main, branch):
    """Print one line; return what is wrong."""
    import torch

    a, b = torch.load(main), torch.load(branch)
    wrong, clear = [], a["clear"]
    dead = a["weights64"].isnan().any(1)
    alive = ~dead
    for who, x in (("main", a), ("branch", b)):
        if not torch.equal(x["weights"].isnan().any(1), dead):
            wrong.append(f"{who}: other tokens are dead than in float64")
        differ = (x["slots"] != a["slots64"]).any(1) & alive
        if bool((differ & clear).any()):
            wrong.append(f"{who}: {int((differ & clear).sum())} tokens with clear gaps have other slots than float64")
        same = alive & ~differ
        error = relative(x["weights"][same], a["weights64"][same])
        if not error < 1e-4:
            wrong.append(f"{who}: weights {error:.1e} from float64")
        print(f"  {name:12} {who:7} float64: {int(differ.sum())} of {len(differ)} slots differ, "
              f"{int((~clear).sum())} not clear, weights {error:.1e}")
    differ = (a["slots"] != b["slots"]).any(1) & alive
    if bool((differ & clear).any()):
        wrong.append(f"{int((differ & clear).sum())} tokens with clear gaps have other slots than main")
    same = alive & ~differ
    bits = bool(torch.equal(a["weights"][same], b["weights"][same]))
    after = {key: f"{relative(b[key], a[key]):.1e}" for key in ("read", "keys", "values")}
    print(f"  {name:12} branch  main:    {int(differ.sum())} slots differ, weights {relative(b['weights'][same], a['weights'][same]):.1e}"
          f" ({'equal bits' if bits else 'other bits'}); after writes {after}")
    if not bool(clear.all()):
        return wrong  # slots of a small gap may move what is written
    return wrong + [f"{key} after writes: {x}" for key, x in after.items() if not float(x) < 4e-3]


# --- Times ---

KERNELS = (
    *("propose_kernel", "rank_kernel", "select_slots_kernel", "coefficients_kernel", "key_sums_kernel"),
    "keys_kernel",
)


def workloads(tiny):
    import dataclasses

    from benchmarks.workloads import WORKLOADS

    big, single = ("tiny-kernels", "tiny-kernels") if tiny else ("shared-512", "single-512")
    decode = WORKLOADS["tiny-kernels" if tiny else "decode-512"]
    return WORKLOADS[big], WORKLOADS[single], dataclasses.replace(decode, length=1)


def vary(variant, workload):
    """A candidate's constants in place of the pinned ones."""
    import torch

    from fwpkm.kernels.runtime.shapes import shapes

    changes = {"": {}, "b128": {"propose": {"BLOCK": 128, "num_warps": 8}}, "depth2048": {"rank": {"DEPTH": 256}}}
    for dtype in (torch.bfloat16, torch.float32):
        for kernel, constants in changes[variant].items():
            getattr(shapes(workload.config, dtype), kernel).update(constants)


def median(function, number):
    from benchmarks import measure

    function()
    return statistics.median(measure.device_timed(function)[0] for _ in range(number)) * 1e6


def by_kernel(workload, inputs, number):
    """µs a forward of each kernel of the addressing: the last window's launch, as often as there are windows, in a graph."""
    import torch

    from benchmarks.workloads import capture
    from fwpkm.kernels.runtime import call
    from fwpkm.kernels.runtime.launch import Launches

    kept = {}
    run = Launches.run

    def record(self, tensors, *workspaces):
        if any(x[0].__name__ == "propose_kernel" for x in self.kernels):
            kept["self"], kept["arguments"] = self, (dict(tensors), *workspaces)
        return run(self, tensors, *workspaces)

    from benchmarks.workloads import TorchSteps

    steps = TorchSteps(workload, "cuda" if torch.cuda.is_available() else "cpu", implementation="triton")
    Launches.run = record
    try:
        steps.forward(inputs)
    finally:
        Launches.run = run
    launches, arguments = kept["self"], kept["arguments"]
    everything, found = launches.launches, {}
    names = [bound.kernel.__name__ for bound in launches.kernels]
    flush = torch.empty(2**28 if torch.cuda.is_available() else 16, dtype=torch.int8, device=inputs.query.device)
    windows = sum(names[x[0]] == "propose_kernel" for x in everything)

    def last_of(name):  # the launch of the last window, whose proposals and coefficients are still there
        return [x for x in everything if names[x[0]] in (name, f"listed_{name}")][-1:]

    again = lambda: launches.run(*arguments)  # noqa: E731
    launches.launches = last_of("propose_kernel")  # of the keys as they are now
    again()
    for name in KERNELS:  # that of the keys last: it moves them
        launches.launches = last_of(name) * windows
        again = lambda: launches.run(*arguments)  # noqa: E731
        if torch.cuda.is_available():
            again = capture(again)[0].replay
        found[name] = median(again, number)
        samples = []
        for _ in range(max(3, number // 5)):
            flush.zero_()
            from benchmarks import measure

            samples.append(measure.device_timed(again)[0])
        found[f"{name}, L2 flushed"] = statistics.median(samples) * 1e6
    launches.launches = everything
    assert call
    return found


def times(variant, tiny, warm, number):
    import torch

    from benchmarks.gpu_speed import kernels as profiled
    from benchmarks.workloads import Decoder, TorchSteps, capture, make_inputs, make_memory
    from fwpkm.backends import torch as be

    import triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    big, single, decode = workloads(tiny)
    found = {}
    for workload in {x.config: x for x in (big, single, decode)}.values():
        vary(variant, workload)
    number = 1 if warm else number
    for label, workload in (("B=8", big), ("B=1", single)):
        inputs = make_inputs(workload, seed=1, device=device, dtype="float32" if tiny else "bfloat16")
        steps = TorchSteps(workload, device, implementation="triton")
        for step in ("forward", "train"):
            function = lambda step=step: getattr(steps, step)(inputs)  # noqa: B023, E731
            if warm or not torch.cuda.is_available():
                function()
                continue
            graph, results = capture(function)
            found[f"{label} captured {step}"] = median(graph.replay, number)
            del graph, results
        del steps
        if label == "B=8" and not (warm and torch.cuda.is_available()):
            found |= by_kernel(workload, inputs, number)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if variant == "":
        cfg, chunk = decode.config, decode.config.chunk_size
        tokens = [x.detach() for x in make_inputs(type(decode)("stream", cfg, 1, 2 * chunk), seed=1, device=device).tokens]
        if not tiny:
            tokens = [x.bfloat16() for x in tokens]
        state = be.init_state(cfg, make_memory(decode, device=device), batch_size=1)
        if torch.cuda.is_available():
            decoder = Decoder(cfg, state, tokens)
            found["decode, a token"] = median(lambda: [decoder(t) for t in range(2 * chunk)], 1 if warm else 5) / (2 * chunk)
        if not warm and torch.cuda.is_available():
            for name, (seconds, *_) in profiled(big, "bfloat16").items():
                found[f"profiler {name}"] = seconds * 1e6
    return {"versions": f"torch {torch.__version__}, triton {triton.__version__}", "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", **found}


def child(tree, *arguments, tiny):
    paths = os.pathsep.join([os.path.join(tree, "src"), tree])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "FWPKM_TREE": tree}
    if tiny:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, os.path.abspath(__file__), "--child", *arguments, *(["--tiny"] if tiny else [])]
    command += ["--number", NUMBER]
    return subprocess.Popen(command, env=environment, cwd="/tmp", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result_of(process, deadline, what):
    try:
        out, err = process.communicate(timeout=max(1, deadline - time.time()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        print(f"{what}: no time left")
        return None
    if process.returncode:
        print(f"{what}: failed\n{err[-2500:]}")
        return None
    return out


def table(results):
    """Two columns and their ratio; candidates behind them."""
    trees = list(results)
    names = dict.fromkeys(name for tree in trees for name in results[tree])
    print(f"{'µs':58}" + "".join(f"{tree:>12}" for tree in trees) + f"{'branch/main':>14}")
    for name in names:
        row = [results[tree].get(name) for tree in trees]
        if any(isinstance(x, str) for x in row):
            print(f"{name:58}", *row)
            continue
        short = name.replace("_kernel", "")[:57]
        cells = "".join(f"{x:12.1f}" if x is not None else f"{'':12}" for x in row)
        a, b = results.get("main", {}).get(name), results.get("branch", {}).get(name)
        print(f"{short:58}{cells}" + (f"{b / a:14.2f}" if a and b else ""))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--main", default="/tmp/src")
    parser.add_argument("--branch", default="/tmp/src_b")
    parser.add_argument("--seconds", type=float, default=88)
    parser.add_argument("--number", type=int, default=50)
    parser.add_argument("--variants", default="b128")
    parser.add_argument("--shapes", default=";".join(SHAPES))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", nargs="+")
    options = parser.parse_args()
    if options.child:
        import fwpkm

        tree = os.path.realpath(os.environ["FWPKM_TREE"])
        assert os.path.realpath(fwpkm.__file__).startswith(tree + os.sep), (fwpkm.__file__, tree)
        kind, *rest = options.child
        if kind == "check":
            check(rest[0], rest[1], options.tiny, rest[2] == "main")
        else:
            variant = "" if rest[0] == "-" else rest[0]
            print(json.dumps(times(variant, options.tiny, kind == "warm", options.number)))
        return 0
    global NUMBER
    NUMBER = str(options.number)
    begun = time.time()
    deadline = begun + options.seconds
    trees = {"main": options.main, "branch": options.branch}
    variants = [x for x in options.variants.split(",") if x]
    folder = tempfile.mkdtemp()
    started = {}
    if not options.tiny:
        for who, tree in trees.items():
            started["warm", who] = child(tree, "warm", "-", tiny=False)
        for variant in variants:
            started["warm", variant] = child(options.branch, "warm", variant, tiny=False)
    names = options.shapes.split(";")
    for i, name in enumerate(names):
        for who, tree in trees.items():
            started[name, who] = child(tree, "check", name, f"{folder}/{i}-{who}.pt", who, tiny=options.tiny)
            if options.tiny:
                started[name, who].wait()
    done = {key: result_of(process, deadline, " ".join(key)) for key, process in started.items()}
    print(f"1. slots and weights, {time.time() - begun:.0f} s")
    wrong = []
    for i, name in enumerate(names):
        if done[name, "main"] is not None and done[name, "branch"] is not None:
            wrong += [f"{name}: {x}" for x in compare(name, *(f"{folder}/{i}-{who}.pt" for who in trees))]
        else:
            wrong.append(f"{name}: did not run")
    print("everything agreed" if not wrong else "WRONG: " + "; ".join(wrong))
    results = {}
    for who, tree, variant in [*((who, tree, "-") for who, tree in trees.items()), *((x, options.branch, x) for x in variants)]:
        out = result_of(child(tree, "time", variant, tiny=options.tiny), deadline, f"times of {who}")
        if out:
            results[who] = json.loads(out.splitlines()[-1])
            print(f"   {who} timed, {time.time() - begun:.0f} s", flush=True)
    print("2. and 3. times: medians of graphs; 'profiler' of single calls")
    table(results)
    print(f"{time.time() - begun:.0f} s")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
