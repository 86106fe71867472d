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
    documents      what its token files hold: "text" (a stream of documents) or "chats" (with a loss mask)
    follows        the stage before it: `"from_checkpoint": "auto"` starts from its newest model
    chat_template  the template in which its models answer; None: they only continue text
    """

    name: str
    title: str
    objective: str = "lm"
    documents: str = "text"
    follows: str | None = None
    chat_template: str | None = None


STAGES = {
    stage.name: stage
    for stage in (
        Stage("pretrain", "pretraining"),
        Stage("sft", "fine-tuning", documents="chats", follows="pretrain", chat_template="nano"),
    )
}
