"""Hand a model on to other programs, or take one from Transformers.

    python export.py -m checkpoint/x.pt                     write checkpoint/x/, a folder for Transformers
    python export.py -o handed_on                           the newest model, into a folder of this name
    python export.py --read folder                          make a checkpoint of such a folder
    python export.py --read folder -t sft                   ... of a model that has learned to answer
    python export.py --read folder --tokenizer dataset/prepared/tokenizer.json

How a format is laid out is told in formats/.
"""

import argparse
from pathlib import Path

from engine.errors import UserError, run

# ---- the command line ------------------------------------------------------------------------------


def parse_arguments():
    description, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=examples.rpartition("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-m", "--model", metavar="FILE", help="checkpoint to write as a folder (default: the newest)")
    add("-o", "--output", metavar="FOLDER", help="where to (default: beside the checkpoint, by its name)")
    add("--read", metavar="FOLDER", help="the other way: write a checkpoint of this folder's model")
    add("-t", "--task", choices=("pretrain", "sft"),
        help="what the model that is read was trained for (as its folder says, else pretrain)")  # fmt: skip
    add("--tokenizer", metavar="JSON", help="a tokenizer of Nano's, instead of the folder's own")
    args = parser.parse_args()
    if args.read is None and (args.task or args.tokenizer):
        raise UserError("--task and --tokenizer are for --read; a checkpoint knows both")
    if args.read is not None and (args.model or args.output):
        raise UserError("--read makes a checkpoint in checkpoint/: it takes neither --model nor --output")
    return args


def main():
    args = parse_arguments()
    from engine.config import find, shown

    for path in (args.model, args.tokenizer):
        if path is not None and not find(path).is_file():
            raise UserError(f"there is no file {shown(find(path))}")
    if args.read is not None:
        if not find(args.read).is_dir():
            raise UserError(f"there is no folder {shown(find(args.read))}")
        from formats.huggingface import read_folder

        read_folder(find(args.read), args.task, args.tokenizer and find(args.tokenizer))
        return
    from formats.huggingface import write_folder
    from inference import load_checkpoint

    checkpoint, name = load_checkpoint(args.model, instruct=False)
    path = find(args.model) if args.model else checkpoint.path
    write_folder(checkpoint, name, Path(args.output).expanduser() if args.output else path.with_suffix(""))


if __name__ == "__main__":
    run(main)
