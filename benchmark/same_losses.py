"""Do two versions of the project train alike, bit for bit?

    python benchmark/same_losses.py --before COMMIT             that commit beside the working tree
    python benchmark/same_losses.py --before COMMIT --only nano --only muon --steps 10

Both versions train on the same token files (the sample world, prepared by the earlier version), each in its
own folder: every kind of run below, in float32 on the CPU. The table says whether the losses in the two logs
are equal in every printed digit, and whether all weights of the last checkpoints are equal in every bit.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.errors import UserError, run  # noqa: E402

PRETRAIN = ("train.py", "-t", "pretrain")
DDP = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_ddp.py")
RUNS = {
    "nano": PRETRAIN,
    "sft": ("train.py", "-t", "sft"),
    "nanochat": (*PRETRAIN, "-m", "config/nanochat/model_config.json", "--set", "n_layer=2"),
    "deepseek_v3": (*PRETRAIN, "-m", "config/deepseek_v3/model_config.json", "--set", "block_size=64"),
    "muon": (*PRETRAIN, "--set", "optimizer=muon"),
    "dropout": (
        "train.py",
        "-t",
        "pretrain",
        "--set",
        "dropout=0.1",
        "--set",
        "gradient_accumulation_steps=2",
    ),
    "ddp x 2": (*DDP, "-t", "pretrain"),
}


def command(folder: Path, *args: str) -> None:
    """Run `python ARGS` in a version's folder. Raises UserError with its output if it fails."""
    done = subprocess.run([sys.executable, *args], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"in {folder.name}: {' '.join(args)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


def trained(folder: Path, args: tuple[str, ...], steps: int) -> tuple[list[str], str]:
    """Train in a version's folder. Returns (the loss of every step as printed, SHA-256 of all weights)."""
    import torch

    logs = set(folder.glob("train_*.log"))
    settings = {
        "max_steps": steps, "warmup_iters": 2, "log_interval": 1, "eval_interval": 25, "batch_size": 4,
        "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    command(folder, *args, *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")))
    [log] = set(folder.glob("train_*.log")) - logs
    text = log.read_text("utf-8")
    losses = re.findall(r"\| (?:Train|Val) \|.*?\| Loss: ([^ ]+)", text)
    path = re.findall(r"\| Save \|.*\| (\S+\.pt)", text)[-1]
    weights = torch.load(folder / path, weights_only=True)["model"]
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return losses, digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", required=True, metavar="COMMIT", help="the version to compare with")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="steps of each run (50)")
    parser.add_argument("--only", action="append", choices=[*RUNS], help="this kind of run; may be repeated")
    args = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{args.before} and the working tree, {args.steps} steps")
    for name in ("run", "losses", "weights", "last loss"):
        table.add_column(name)
    with tempfile.TemporaryDirectory() as place:
        before, now = Path(place) / "before", Path(place) / "now"
        subprocess.run(["git", "worktree", "add", "--detach", before, args.before], cwd=ROOT, check=True,
                       capture_output=True)  # fmt: skip
        try:
            list_files = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
            files = subprocess.check_output(list_files, cwd=ROOT, text=True).split("\0")
            for name in filter(lambda name: name and (ROOT / name).is_file(), files):
                (now / name).parent.mkdir(parents=True, exist_ok=True)
                (now / name).write_bytes((ROOT / name).read_bytes())
            command(before, "dataset/sample_world.py")
            command(before, "data.py")
            (before / "dataset" / "prepared").rename(prepared := Path(place) / "prepared")
            for folder in (before, now):
                (folder / "dataset" / "prepared").symlink_to(prepared)
            for name in args.only or RUNS:
                (losses, weights), (new_losses, new_weights) = (
                    trained(folder, RUNS[name], args.steps) for folder in (before, now)
                )
                n_equal = sum(a == b for a, b in zip(losses, new_losses, strict=False))
                same = len(losses) == len(new_losses) == n_equal
                table.add_row(name, f"all {n_equal} equal" if same else f"{n_equal} of {len(losses)} equal",
                              "equal" if weights == new_weights else "different", new_losses[-1])  # fmt: skip
                print(f"{name}: {losses == new_losses and weights == new_weights}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, capture_output=True)
    Console().print(table)


if __name__ == "__main__":
    run(main)
