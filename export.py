"""Export a model to the formats of other programs, or import one from Hugging Face Transformers.

    python export.py -m checkpoint/x.pt                 checkpoint/x/: a folder for Transformers, vLLM, ...
    python export.py -o exported                        the newest model, into a folder with this name
    python export.py --format gguf                      checkpoint/x.gguf: a file for llama.cpp, Ollama, ...
    python export.py --format gguf --type q8_0          ... a quarter of the size, with int8 weights
    python export.py --format llama2c                   checkpoint/x_llama2c/: two files for llama2.c's run
    python export.py --format llama2c --type q8_0       ... in int8, for its runq
    python export.py --read folder                      make a checkpoint from a Transformers folder
    python export.py --read folder -t sft               ... of a chat model
    python export.py --read folder --tokenizer dataset/prepared/tokenizer.json

doc/elsewhere.md shows how to use what this writes; each file in formats/ describes one format.
"""

import argparse
from pathlib import Path

import formats
from common.errors import UserError, run
from config.stages import STAGES


def parse_arguments() -> argparse.Namespace:
    """Read the command line. Raises UserError for options that do not go together."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=examples.rpartition("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("-m", "--model", metavar="FILE", default="newest",
        help="checkpoint to export, or newest, or best: the one of the newest run with the lowest validation "
        "loss (default: newest)")
    add("-o", "--output", metavar="PATH", help="where to write (default: next to the checkpoint, same name)")
    add("--format", choices=formats.names(), default="huggingface",
        help="format to write (default: huggingface)")
    add("--type", help="number type: float32, float16 or q8_0 (int8 in groups with a common scale) for gguf, "
        "float32 or q8_0 for llama2c (default: float32); huggingface keeps that of the checkpoint")
    add("--read", metavar="FOLDER", help="the other direction: make a checkpoint from this folder's model")
    add("-t", "--task", choices=[*STAGES],
        help="with --read: the stage the model was trained in (default: as the folder says, else pretrain)")
    add("--tokenizer", metavar="FILE",
        help="with --read: use this tokenizer instead of the folder's own; same choices as in data.py")
    # fmt: on
    args = parser.parse_args()
    if args.read is None and (args.task or args.tokenizer):
        raise UserError("--task and --tokenizer need --read; a checkpoint already contains both")
    if args.read is not None and (args.model != "newest" or args.output):
        raise UserError("--read writes to checkpoint/: it takes neither --model nor --output")
    if args.read is not None and (args.format != "huggingface" or args.type):
        raise UserError("--read reads Transformers folders only: it takes neither --format nor --type")
    if args.type and args.type not in (types := formats.get(args.format).NUMBER_TYPES):
        instead = f"choose {' or '.join(types)}" if types else "it keeps the number type of the checkpoint"
        raise UserError(f"{args.format} cannot write --type {args.type}: {instead}")
    return args


def main() -> None:
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
    exporter = formats.get(args.format)

    def output_of(checkpoint_path: Path) -> Path:
        if args.output:
            return Path(args.output).expanduser()
        return checkpoint_path.with_name(checkpoint_path.stem + exporter.SUFFIX)

    if args.model not in NAMED_MODELS or args.output:  # fail before the model is loaded
        formats.refuse_to_overwrite(output_of(resolve_path(args.model)))
    checkpoint, path = load_checkpoint(args.model, instruct=False)
    exporter.write(checkpoint, display_path(path), output_of(path), args.type)


if __name__ == "__main__":
    run(main)
