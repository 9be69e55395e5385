"""The metric engine beside its peers: products, blocks, eigenpairs, damped solves, Jacobians and memory.

    python -m benchmarks.metric                                   all models, all figures
    python -m benchmarks.metric --models resnet20 --examples 64 --figures products top20 --rounds 5

Everybody gets the same network, batches, seeds and threads in one process and takes turns; a ratio is the median of the
rounds' ratios, with the smallest and the largest beside it. On one thread the clock is the CPU time of the process.
Records go to `benchmarks/results/metric.json` after every figure; a repeated run replaces its own, `--missing` measures
only what is not there yet. A peer that is absent, fails or exceeds `--limit` is named under "skipped". The page
docs/speed.md is made from that file.

g is J^T J / N, the Gauss-Newton matrix of a squared error summed over outputs and averaged over examples, halved.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import figures, models, peers
from benchmarks.figures import FIGURES, Bench
from benchmarks.measure import Unavailable, reason
from benchmarks.models import Case
from benchmarks.records import KEY, RESULTS, write

ROOT = Path(__file__).parents[1]
MAIN = ["mlp", "resnet20", "vit", "bert", "gpt2"]
CHOICES = [*FIGURES, "memory", "examples", "weights"]
JACOBIAN_EXAMPLES = 8
MARKS = {"products": "time_ratio_matvec", "first": "time_ratio_first", "top20": "time_ratio_top20"}
MARKS |= {"solves": "time_ratio_solve", "jacobians": "jacobian_seconds", "memory": "peak_bytes"}
MARKS |= {"examples": "seconds_by_examples", "weights": "seconds_by_weights"}
"""A figure of each group, which tells whether the group has been measured."""


def main(arguments: list[str] | None = None) -> None:
    args = parsed(arguments)
    torch.set_num_threads(args.threads)
    if args.probe:
        print(json.dumps({"peak_bytes": probe(args)}))
        return
    warm_up(args)
    for group, build in tasks(args):
        measure(args, group, build)


def warm_up(args: argparse.Namespace) -> None:
    """Let all libraries load what they load on their first use, unmeasured, so that nobody pays it for the others."""
    bench = Bench(models.build("tiny", 5, device=args.device), 1, 30.0, args.threads, args.device, args.max_bytes)
    for measured in FIGURES.values():
        measured(bench)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MAIN, choices=list(models.BUILDERS))
    parser.add_argument("--figures", nargs="+", default=CHOICES, choices=CHOICES)
    parser.add_argument("--examples", type=int, nargs="+", help="instead of each model's own numbers of examples")
    parser.add_argument("--width", type=int, help="width of the network, where it can be chosen")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a contestant's turns in one figure")
    parser.add_argument("--max-bytes", type=int, default=2**30, help="memory that our rows may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of metric.json")
    parser.add_argument("--missing", action="store_true", help="leave out what the file already holds")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def tasks(args: argparse.Namespace) -> list[tuple[str, Callable[[], Case]]]:
    """Every group of figures with the case to measure it on, smallest cases of a model first."""
    found: list[tuple[str, Callable[[], Case]]] = []

    def add(group: str, name: str, examples: int, width: int | None = None) -> None:
        found.append((group, lambda: models.build(name, examples, seed=args.seed, device=args.device, width=width)))

    for name in args.models:
        for examples in args.examples or models.EXAMPLES[name]:
            for group in [g for g in args.figures if g in FIGURES or g == "memory"]:
                if group != "jacobians":
                    add(group, name, examples, args.width)
        if "jacobians" in args.figures:
            add("jacobians", name, min(JACOBIAN_EXAMPLES, models.EXAMPLES[name][0]), args.width)
        if "examples" in args.figures:
            for examples in args.examples or models.SERIES.get(name, []):
                add("examples", name, examples, args.width)
        if "weights" in args.figures:
            for width in models.WIDTHS.get(name, []):
                add("weights", name, (args.examples or [100])[0], width)
    return found


def measure(args: argparse.Namespace, group: str, build: Callable[[], Case]) -> None:
    """One group of figures of one case: measured, printed, stored."""
    try:
        case = build()
    except Unavailable as error:
        print(f"left out: {error}", flush=True)
        return
    path = args.out / "metric.json"
    if args.missing and path.exists():
        held = {(r["case"], r["figure"]) for r in json.loads(path.read_text())["records"]}
        if (case.name, MARKS[group]) in held:
            return
    bench = Bench(case, args.rounds, args.limit, args.threads, args.device, args.max_bytes)
    try:
        if group == "memory":
            memory(bench, args)
        elif group in ("examples", "weights"):
            figures.scaling(bench, MARKS[group])
        else:
            FIGURES[group](bench)
    except Exception as error:  # one figure that fails must not cost the hours of the others; it is named
        bench.skip(MARKS[group], "fipgeo", reason(error))
    for r in bench.records:
        shown = {key: r[key] for key in ("seconds", "spread", "residual", "products", "setup_seconds") if r.get(key)}
        print(f"{r['case']:<18} {r['figure']:<30} {r['method']:<22} {r['value']} {r['unit']}  {shown}", flush=True)
    for s in bench.skipped:
        print(f"{s['case']:<18} {s['figure']:<30} {s['method']:<22} left out: {s['reason']}", flush=True)
    store(bench, args.out)
    gc.collect()
    if args.device != "cpu":
        torch.cuda.empty_cache()


def store(bench: Bench, folder: Path) -> Path:
    """Merge the records and what was left out into metric.json, with the peers' versions in its environment."""
    path = folder / "metric.json"
    before = json.loads(path.read_text()).get("skipped", []) if path.exists() else []
    write("metric", bench.records, folder)
    body = json.loads(path.read_text())
    measured = {tuple(r[k] for k in KEY) for r in bench.records}
    left = {tuple(s[k] for k in KEY): s for s in [*before, *bench.skipped]}
    body["skipped"] = [entry for key, entry in left.items() if key not in measured]
    body["environment"]["peers"] = peers.versions()
    body["command"] = " ".join(["python -m benchmarks.metric", *_without_places(sys.argv[1:])])
    path.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n")
    return path


def memory(bench: Bench, args: argparse.Namespace) -> None:
    """peak_bytes: the most memory that set-up and products take above network and inputs, a fresh process a method."""
    name, _, _ = bench.case.name.partition("-")
    for method in ("fipgeo", "curvlinops"):
        command = [sys.executable, "-m", "benchmarks.metric", "--probe", method, "--models", name]
        command += ["--examples", str(bench.case.num_examples), "--device", args.device, "--threads", str(args.threads)]
        command += ["--seed", str(args.seed), "--max-bytes", str(args.max_bytes)]
        command += [] if args.width is None else ["--width", str(args.width)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60 + 2 * bench.limit)
        except subprocess.TimeoutExpired:
            bench.skip("peak_bytes", method, "over the time limit")
            continue
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            bench.skip("peak_bytes", method, reason(Unavailable(lines[-1])))
            continue
        value = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
        bench.note("peak_bytes", value, "bytes", method=method, max_bytes=args.max_bytes)


def probe(args: argparse.Namespace) -> int:
    """Peak memory of two products and their set-up by one method, in this process."""
    examples, settings = args.examples[0], {"seed": args.seed, "device": args.device, "width": args.width}
    case = models.build(args.models[0], examples, **settings)
    warm_up = models.build("tiny", 5, device=args.device)  # what libraries load on their first use is not counted
    before = 0
    for used in (warm_up, case):
        bench = Bench(used, 1, args.limit, args.threads, args.device, args.max_bytes)
        v = used.vectors(1)[0]
        with torch.no_grad():
            used.model(used.batches[0])
        before = _peak(args.device, reset=True)
        call = figures.prepared(bench.metric()) if args.probe == "fipgeo" else peers.CurvlinopsProduct(used).matvec
        for _ in range(2):
            call(v)
    return max(0, _peak(args.device) - before)


def _peak(device: str, *, reset: bool = False) -> int:
    """Most memory in use so far, since the last reset where the system can reset."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # another system: the peak of building the case is then counted in
            pass
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return 1024 * (peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _without_places(arguments: list[str]) -> list[str]:
    """The options without a folder to write to, which is of one machine."""
    skip = {i + shift for i, word in enumerate(arguments) if word == "--out" for shift in (0, 1)}
    return [word for i, word in enumerate(arguments) if i not in skip]


if __name__ == "__main__":
    main()
