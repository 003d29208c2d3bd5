"""Make tests/golden/pcb.safetensors with the PCB-Merging authors' own functions.

    python benchmarks/make_golden_pcb.py CHECKOUT [--out FILE] [--check]

CHECKOUT is a checkout of the authors' repository (duguodong7/pcb-merging on GitHub). Their functions are taken out
of their files by name and executed; none of their code is in here. Variants (they are not the same function):

    readme     pcb-merging.py                           PCB_merge
    nlp        nlp_source_code/utils/merge_utils.py     task_para_att_merge
    vision-es  vision_source_code/pcb_ES.py             PCB, then the weighted mean of compute_acc
    vision     vision_source_code/pcb.py                the statements of its main block, with lams = 1 instead of 1.2
                                                        (the lams multiply the clipped vectors, so 1.2 is 1.2 x this)

Per case and variant the file holds CASE/VARIANT/bits and /values (see tests/golden/pcb_inputs.py: which coordinates of
the merged vector are non-zero, and their float32 values), CASE/VARIANT/kept (number of S > 0 per task), and for two
tasks CASE/vision-es@1.2,0.9 (per-task lambda). ``--check`` compares a fresh run with the stored file instead of
writing it. ``--time D N`` times the ``nlp`` function on [N, D] and reports its peak memory.
"""

import argparse
import ast
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
sys.path.insert(0, str(GOLDEN))
import pcb_inputs as gold  # noqa: E402

HELPERS = {"normalize", "clamp", "act"}


def _functions(path: Path, names: set[str]) -> dict:
    """The named top-level functions of a file that cannot be imported, in a fresh namespace."""
    body = [s for s in ast.parse(path.read_text()).body if isinstance(s, ast.FunctionDef) and s.name in names]
    missing = names - {s.name for s in body}
    if missing:
        sys.exit(f"{path}: no function {sorted(missing)}; is this the authors' checkout?")
    space: dict = {"torch": torch}
    exec(compile(ast.Module(body, []), str(path), "exec"), space)
    return space


def _assigned(statement: ast.stmt) -> set[str]:
    if not isinstance(statement, ast.Assign):
        return set()
    return {t.id for target in statement.targets for t in ast.walk(target) if isinstance(t, ast.Name)}


def _statements(body: list[ast.stmt], names: set[str], path: Path):
    """The assignments of a block to the given names, in their order."""
    chosen = [s for s in body if _assigned(s) & names]
    if names - {n for s in chosen for n in _assigned(s)}:
        sys.exit(f"{path}: the expected assignments are not there")
    return compile(ast.Module(chosen, []), str(path), "exec")


class Reference:
    """merge(variant, tau, density, lams) -> (merged [D], S [N, D])."""

    def __init__(self, checkout: Path):
        self.readme = _functions(checkout / "pcb-merging.py", HELPERS | {"PCB_merge"})
        self.nlp = _functions(checkout / "nlp_source_code/utils/merge_utils.py", HELPERS | {"task_para_att_merge"})

        es = checkout / "vision_source_code/pcb_ES.py"
        self.es = _functions(es, (HELPERS - {"act"}) | {"PCB"})
        tree = ast.parse(es.read_text()).body
        acc = next(s for s in tree if isinstance(s, ast.FunctionDef) and s.name == "compute_acc")
        self.es_mean = _statements(acc.body, {"tvs", "merged_tv"}, es)

        vision = checkout / "vision_source_code/pcb.py"
        self.vision = _functions(vision, HELPERS)
        main = next(s for s in ast.parse(vision.read_text()).body if isinstance(s, ast.If))
        self.vision_main = _statements(
            main.body,
            {"n", "d", "all_checks_abs", "clamped_all_checks", "all_checks_normalized", "intra", "inter", "balancing"}
            | {"scale", "tvs", "merged_tv"},
            vision,
        )

    def merge(self, variant: str, tau: torch.Tensor, density: float, lams: list[float] | None = None):
        lams = lams or [1.0] * len(tau)
        if variant == "readme":
            merged, _, scale = self.readme["PCB_merge"](tau, density)
        elif variant == "nlp":
            merged, _, scale = self.nlp["task_para_att_merge"](tau, density)
        elif variant == "vision-es":
            clipped, scale = self.es["PCB"](tau, density)
            space = {"torch": torch, "lams": lams, "all_checks": clipped, "scale": scale}
            exec(self.es_mean, space)
            merged = space["merged_tv"]
        elif variant == "vision":
            space = dict(self.vision, all_checks=tau, att_ratio=density, lams=torch.tensor(lams).unsqueeze(1))
            exec(self.vision_main, space)
            merged, scale = space["merged_tv"], space["scale"]
        else:
            raise ValueError(variant)
        if not torch.isfinite(merged).all():
            sys.exit(f"{variant}: the reference gave values that are not finite")
        return merged, scale


def build(ref: Reference) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    tensors: dict[str, np.ndarray] = {}
    cases = {}
    for case, (d, n, density, seed, scale, grid) in gold.CASES.items():
        x = gold.task_vectors(case)
        about_case = {"D": d, "N": n, "density": density, "seed": seed, "scale": scale, "grid": grid}
        cases[case] = about_case | {"inputs_sha256": gold.sha256(x)}
        tau = torch.from_numpy(x)
        runs = [(v, v, None) for v in gold.VARIANTS]
        if n == 2:
            runs.append(("vision-es@1.2,0.9", "vision-es", [1.2, 0.9]))
        for name, variant, lams in runs:
            merged, s = ref.merge(variant, tau, density, lams)
            bits, values = gold.pack(merged.numpy())
            tensors[f"{case}/{name}/bits"] = bits
            tensors[f"{case}/{name}/values"] = values
            tensors[f"{case}/{name}/kept"] = (s > 0).sum(dim=1).numpy()
    about = (
        "PCB-Merging, merged task vectors from the authors' functions (float32), lambda 1 unless the name ends in "
        "@l1,l2. CASE/VARIANT/bits: np.packbits of merged != 0; /values: those coordinates in order; /kept: count of "
        "S > 0 per task. Inputs: pcb_inputs.task_vectors(CASE). 'vision' is without the factor 1.2 of the authors' "
        "script."
    )
    return tensors, {"about": about, "cases": json.dumps(cases), "torch": torch.__version__.split("+")[0]}


def check(tensors: dict[str, np.ndarray]) -> None:
    stored, _ = gold.load()
    for key in sorted(stored):
        if key.endswith("/kept"):
            if not np.array_equal(tensors[key], stored[key]):
                print(f"{key}: {tensors[key].tolist()} now, {stored[key].tolist()} stored")
            continue
        d = gold.CASES[key.split("/")[0]][0]
        new = gold.unpack(tensors[key + "/bits"], tensors[key + "/values"], d)
        differ = new != stored[key]
        worst = np.abs(new - stored[key]).max() if differ.any() else 0.0
        print(f"{key:40s} {int(differ.sum()):6d} of {d} differ, at most {worst:.3g}")


def timing(ref: Reference, d: int, n: int, density: float) -> None:
    tau = torch.randn(n, d) * 1e-3
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    ref.merge("nlp", tau, density)
    took, cpu = time.perf_counter() - start, time.process_time() - cpu
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(
        f"D={d} N={n}: {took:.2f} s wall, {cpu:.2f} s CPU; {took / (n * d) * 1e9:.0f} ns and "
        f"{grown / (n * d):.1f} peak bytes above the inputs per element and model ({torch.get_num_threads()} thread)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, default=gold.FILE)
    parser.add_argument("--check", action="store_true", help="compare with the stored file, write nothing")
    parser.add_argument("--time", type=int, nargs=2, metavar=("D", "N"), help="time the nlp function, write nothing")
    parser.add_argument("--density", type=float, default=0.1, help="for --time")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not (args.checkout / "pcb-merging.py").is_file():
        parser.error(f"{args.checkout} is not a checkout of the authors' repository (no pcb-merging.py)")
    ref = Reference(args.checkout)
    if args.time:
        timing(ref, *args.time, args.density)
        return
    tensors, metadata = build(ref)
    if args.check:
        check(tensors)
        return
    from safetensors.numpy import save_file

    save_file(tensors, args.out, metadata=metadata)
    args.out.chmod(0o644)
    print(f"{args.out.name}: {args.out.stat().st_size} bytes, {len(gold.CASES)} cases")


if __name__ == "__main__":
    main()
