"""`python data.py`: text files to token files."""

from __future__ import annotations

import argparse
from pathlib import Path

from common.config import resolve_path
from common.errors import UserError
from preparation import DATASET, default_inputs, default_names, stages_with_files


def parse_arguments() -> argparse.Namespace:
    stages = stages_with_files()
    names = " and ".join(f"dataset/{' or '.join(default_names(stage))}" for stage in stages)
    parser = argparse.ArgumentParser(
        description=f"Text files to token files: {names} to dataset/prepared/.",
        epilog="examples:\n"
        "  python data.py\n"
        "  python data.py --pretrain books/*.txt --out dataset/books --kind bpe --vocab_size 8192\n"
        "  python data.py --sft chats.jsonl --tokenizer checkpoint/x.pt --skip-bad-lines",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    shapes = {
        "text": 'text in UTF-8, or JSON lines with {"text": ...}',
        "chats": "JSON lines of conversations; doc/data.md has their shapes",
    }
    for stage in stages:
        add(f"--{stage.name}", dest=stage.name, nargs="+", metavar="FILE", help=shapes[stage.documents])
    add("--out", metavar="DIR", help="default: dataset/prepared")
    add("--val_fraction", type=float, default=0.05, help="share of documents to hold out (0.05)")
    add("--seed", type=int, default=1337, help="decides which documents these are (1337)")
    add("--kind", choices=("char", "bpe"), help="tokenizer to train (char)")
    add("--vocab_size", type=int, help="tokens of bpe, special ones included (32000)")
    add("--tokenizer", metavar="FILE",
        help="use this tokenizer.json, or that of a checkpoint or model folder; train none")  # fmt: skip
    add("--skip-bad-lines", action="store_true", help="leave bad lines out and say how many")
    args = parser.parse_args()
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction must lie between 0 and 1, not {args.val_fraction}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be 0 or more and fit in 63 bits, not {args.seed}")
    if args.tokenizer and (args.kind or args.vocab_size):
        raise UserError("--tokenizer names a finished tokenizer; leave --kind and --vocab_size out")
    if args.vocab_size is not None and args.kind != "bpe":
        raise UserError("--vocab_size is for --kind bpe; char has one token for every character")
    return args


def all_default_inputs() -> tuple[dict[str, list[Path]], list[str]]:
    """The input files in dataset/ for each stage, and notices about stages without any.

    Only the first stage for text and the first for chats get a notice: these two are what everyone expects.
    """
    stages = stages_with_files()
    inputs = {stage.name: default_inputs(stage) for stage in stages}
    if not any(inputs.values()):
        names = [name for stage in stages for name in default_names(stage)]
        raise UserError(
            f"there is no {', '.join(names[:-1])} or {names[-1]} in {DATASET}; put your text there,"
            " or let `python dataset/sample_world.py` write a sample"
        )
    first = {stage.documents: stage for stage in reversed(stages)}
    absent = [stage for stage in stages if stage is first[stage.documents] and not inputs[stage.name]]
    return inputs, [
        f"no {DATASET / default_names(stage)[0]}: nothing is prepared for {stage.title}" for stage in absent
    ]


def main() -> None:
    args = parse_arguments()
    inputs = {stage.name: getattr(args, stage.name) or [] for stage in stages_with_files()}
    notices: list[str] = []
    if not any(inputs.values()):
        inputs, notices = all_default_inputs()
    tokenizer = None
    if args.tokenizer:
        from formats import load_tokenizer

        tokenizer = load_tokenizer(resolve_path(args.tokenizer))
    from preparation.display import prepare_and_show

    prepare_and_show(
        inputs,
        Path(args.out) if args.out else DATASET / "prepared",
        notices,
        tokenizer_path=args.tokenizer,
        tokenizer=tokenizer,
        kind=args.kind or "char",
        vocab_size=args.vocab_size or 32000,
        val_fraction=args.val_fraction,
        seed=args.seed,
        skip_bad_lines=args.skip_bad_lines,
    )
