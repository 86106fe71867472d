"""The stages of training: the values of `-t`.

A stage is a row here, a file config/config_<name>.json and an objective in objectives/. No other part of the
project mentions a stage by name.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    name           the value of `-t`; part of the names of configuration, checkpoints and token files
    title          the name in words
    objective      the file in objectives/ that defines the loss
    documents      what its token files hold: "text" (a stream of documents), "chats" (with a loss mask), or
                   "any": those that were prepared for other stages, of both kinds
    follows        the stages that may come before it: `"from_checkpoint": "auto"` starts from their newest
                   model; empty for a stage that starts from nothing
    chat_template  the template in which its models answer; None: they only continue text
    """

    name: str
    title: str
    objective: str = "lm"
    documents: str = "text"
    follows: tuple[str, ...] = ()
    chat_template: str | None = None


STAGES = {
    stage.name: stage
    for stage in (
        Stage("pretrain", "pretraining"),
        Stage("mid", "mid-training", documents="any", follows=("pretrain",), chat_template="nano"),
        Stage("sft", "fine-tuning", documents="chats", follows=("pretrain", "mid"), chat_template="nano"),
    )
}
