"""The stages of training, one row each: what `-t` may be.

A stage is a row here, a file config/config_<name>.json, and an objective in objectives/. Nothing else in the
project knows the stages by name.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    name           what `-t` takes; part of the names of its configuration, its checkpoints and its token
                   files
    title          the same in words
    objective      the file in objectives/ that computes the loss
    documents      what its token files hold: "text" (a stream of documents) or "chats" (with a loss mask)
    follows        the stage whose newest model `"from_checkpoint": "auto"` starts from; None: no such stage
    chat_template  the template that its models have learned to answer in; None: they only continue text
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
