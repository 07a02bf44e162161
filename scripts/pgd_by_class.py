"""Why PGD on the CW loss flatters some models: robust accuracy on held-out images, also by PGD towards one class each.

python scripts/pgd_by_class.py CHECKPOINT... [--n 512] [--eps 8] [--output FILE.json]

The CW loss follows the class that is nearest at the moment. Here PGD also goes for the likeliest other class of each
image from its clean logits, then for the second and the third: what withstands all of them so far is counted.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from tqdm import tqdm

from analysis.curve import measure_distances
from data import Split, first_examples, to_input
from dyart.attacks import pgd
from evaluation.candidate import Candidate, load_candidate, load_test
from experiment import flags
from storage.files import write_json

# By name: objective, steps, and the length of a step as a share of ε.
ATTACKS = {
    "PGD-20 on CW, steps of eps/4": ("cw", 20, 1 / 4),
    "PGD-40 on CW, steps of eps/10": ("cw", 40, 1 / 10),
    "PGD-20 on the cross-entropy": ("ce", 20, 1 / 4),
}
TOWARDS = ("the likeliest other class", "also the second", "also the third")
BATCH_SIZE, PASSES = 128, 20


class TwoLogits(nn.Module):
    """Of a model on one batch, the logits (n, 2) of each image's own class and of a rival."""

    def __init__(self, model: nn.Module, y: Tensor, rival: Tensor):
        super().__init__()
        self.model, self.columns = model, torch.stack([y, rival], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).gather(1, self.columns)


def withstands(model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str) -> dict[str, Tensor]:
    """Of each attack, which images of a batch (n, ...) are classified right at its end. Of each (n,), bool."""
    options = {"norm": norm, "eps": eps, "generator": torch.Generator().manual_seed(0)}

    def right(at: Tensor) -> Tensor:
        with torch.no_grad():
            return model(at).argmax(1) == y

    standing = {"clean": right(x)}
    for name, (objective, steps, share) in ATTACKS.items():
        at = pgd(model, x, y, objective=objective, steps=steps, step_size=share * eps, **options)
        standing[name] = standing["clean"] & right(at)
    with torch.no_grad():
        others = model(x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    left = standing["clean"]
    for name, rival in zip(TOWARDS, others.unbind(1), strict=False):
        own = torch.zeros_like(y)
        at = pgd(TwoLogits(model, y, rival), x, own, objective="cw", steps=20, step_size=eps / 4, **options)
        left = left & right(at)
        standing[f"PGD-20 towards {name}"] = left
    return standing


def measure(candidate: Candidate, split: Split, eps: float) -> dict[str, float]:
    """Robust accuracy in % by every attack, and by `minimum_norm_attack`."""
    norm = candidate.settings["norm"]
    found: dict[str, list[Tensor]] = {}
    starts = range(0, len(split.labels), BATCH_SIZE)
    for start in tqdm(starts, desc=candidate.identity["checkpoint"], leave=False):
        rows = slice(start, start + BATCH_SIZE)
        standing = withstands(candidate.model, to_input(split.images[rows]), split.labels[rows], eps, norm)
        for name, images in standing.items():
            found.setdefault(name, []).append(images)
    accuracy = {name: 100 * torch.cat(parts).double().mean().item() for name, parts in found.items()}
    distance = measure_distances(candidate.model, split, norm, PASSES, BATCH_SIZE, candidate.identity["checkpoint"])
    accuracy[f"minimum_norm_attack, {PASSES} passes"] = 100 * float((distance > eps).mean())
    return {name: round(value, 3) for name, value in accuracy.items()}


def main(argv: list[str] | None = None) -> int:
    """Measure the models, print a table, write the figures."""
    parser = flags.Parser(prog="pgd_by_class.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", type=Path, help="of runs, as for eval.py")
    parser.add_argument("--n", type=flags.whole(least=1), default=512, help="held-out images, the first")
    parser.add_argument("--eps", default="8", help="radius, as for eval.py")
    parser.add_argument("--output", type=Path, default=None, help="a file for the figures")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for path in args.checkpoints:
        candidate = load_candidate(path)
        split = first_examples(load_test(candidate, None, "validation"), args.n, 0)
        eps = flags.length(args.eps, candidate.settings["norm"], "--eps")
        accuracy = measure(candidate, split, eps.value)
        rows.append({"checkpoint": f"{path.parent.name}/{path.name}", "eps": eps.text, "accuracy": accuracy})
    for name in rows[0]["accuracy"]:
        print(f"{name:45}" + "".join(f"{row['accuracy'][name]:8.1f}" for row in rows))
    if args.output is not None:
        write_json(args.output, {"n": args.n, "models": rows})
    return 0


if __name__ == "__main__":
    flags.run(main)
