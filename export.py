"""Hand a model on to other programs, or take one from Transformers.

    python export.py -m checkpoint/x.pt                 checkpoint/x/: a folder for Transformers, vLLM, ...
    python export.py -o handed_on                       the newest model, into a folder of this name
    python export.py --format gguf                      checkpoint/x.gguf: a file for llama.cpp, Ollama, ...
    python export.py --format gguf --type q8_0          ... a quarter as large, its weights in int8
    python export.py --format llama2c                   checkpoint/x_llama2c/: two files for llama2.c's run
    python export.py --format llama2c --type q8_0       ... in int8, for its runq
    python export.py --read folder                      make a checkpoint of a folder of Transformers'
    python export.py --read folder -t sft               ... of a model that has learned to answer
    python export.py --read folder --tokenizer dataset/prepared/tokenizer.json

How a format is laid out is told in formats/, and how to go on from there in doc/elsewhere.md.
"""

import argparse
from pathlib import Path

from common.errors import UserError, run

# ---- the command line ------------------------------------------------------------------------------

FORMATS = {"huggingface": (), "gguf": ("float32", "float16", "q8_0"), "llama2c": ("float32", "q8_0")}


def parse_arguments():
    description, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=examples.rpartition("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-m", "--model", metavar="FILE", default="newest",
        help="checkpoint to write, or newest, or best: the one of the newest run that has the lowest "
        "validation loss (newest)")  # fmt: skip
    add("-o", "--output", metavar="PATH", help="where to (default: beside the checkpoint, by its name)")
    add("--format", choices=FORMATS, default="huggingface", help="for which program (huggingface)")
    add("--type", choices=("float32", "float16", "q8_0"),
        help="numbers of gguf and llama2c; q8_0: int8 in groups (float32)")  # fmt: skip
    add("--read", metavar="FOLDER", help="the other way: write a checkpoint of this folder's model")
    add("-t", "--task", choices=("pretrain", "sft"),
        help="with --read: what the model was trained for (as its folder says, else pretrain)")  # fmt: skip
    add("--tokenizer", metavar="FILE",
        help="with --read: this tokenizer instead of the folder's own, named as for data.py")  # fmt: skip
    args = parser.parse_args()
    if args.read is None and (args.task or args.tokenizer):
        raise UserError("--task and --tokenizer are for --read; a checkpoint knows both")
    if args.read is not None and (args.model != "newest" or args.output):
        raise UserError("--read makes a checkpoint in checkpoint/: it takes neither --model nor --output")
    if args.read is not None and (args.format != "huggingface" or args.type):
        raise UserError("--read knows folders of Transformers' only: it takes neither --format nor --type")
    if args.type and args.type not in (types := FORMATS[args.format]):
        instead = f"it has {' and '.join(types)}" if types else "a folder keeps those of the checkpoint"
        raise UserError(f"{args.format} does not write --type {args.type}: {instead}")
    return args


def main():
    args = parse_arguments()
    from common.config import display_path, resolve_path
    from decoding.text_generator import NAMED_MODELS, check_model_file, load_checkpoint

    check_model_file(args.model)
    if args.tokenizer is not None and not resolve_path(args.tokenizer).exists():
        raise UserError(f"there is no file {display_path(resolve_path(args.tokenizer))}")
    if args.read is not None:
        if not resolve_path(args.read).is_dir():
            raise UserError(f"there is no folder {display_path(resolve_path(args.read))}")
        from formats.huggingface import read_folder

        read_folder(resolve_path(args.read), args.task, args.tokenizer and resolve_path(args.tokenizer))
        return
    from formats import check_free

    def output_of(path):
        """Where to write what is made of the checkpoint at `path`."""
        if args.output:
            return Path(args.output).expanduser()
        return path.with_name(path.stem + {"huggingface": "", "gguf": ".gguf"}.get(args.format, "_llama2c"))

    if args.model not in NAMED_MODELS or args.output:
        check_free(output_of(resolve_path(args.model)))
    checkpoint, name = load_checkpoint(args.model, instruct=False)
    output = output_of(checkpoint.path if args.model in NAMED_MODELS else resolve_path(args.model))
    if args.format == "huggingface":
        from formats.huggingface import write_folder

        write_folder(checkpoint, name, output)
    elif args.format == "gguf":
        from formats.gguf_file import write

        write(checkpoint, name, output, args.type or "float32")
    else:
        from formats.llama2c import write_folder

        write_folder(checkpoint, name, output, args.type or "float32")


if __name__ == "__main__":
    run(main)
