"""A task as something to train on: its examples as conversations in ids, in which the answers count."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from common.errors import UserError
from tasks import Example, Task
from tokenizer import Tokenizer, render_chats

N_PROBED, N_VALIDATION = 512, 500  # examples
Chat = tuple[np.ndarray, np.ndarray]  # ids [n], mask [n]


class TaskPart:
    """What a task gives to training, or with `is_test` to validation: see `data.Part`.

    Validation takes the first N_VALIDATION examples for testing. Examples that are longer than a block are
    left out, because an answer that is cut is wrong. Raises UserError if less than a tenth of them would
    be left, or if the tokenizer does not know all characters.
    """

    text_size: tuple[int, int] | None = None
    n_truncated, n_left_out = 0, 0

    def __init__(self, task: Task, tokenizer: Tokenizer, block_size: int, is_test: bool = False) -> None:
        self.task, self.tokenizer, self.block_size = task, tokenizer, block_size
        self.name, self.notes = task.spec, list(task.notes)
        # All there are, or enough of those that will be drawn to know what they are like.
        is_drawn = task.n_train == math.inf and not is_test
        count = N_VALIDATION if is_test else N_PROBED if is_drawn else None
        examples = list(itertools.islice(task.examples("test" if is_test else "train", 0), count))
        if not examples:
            raise UserError(f"task {task.spec} has no examples for {'testing' if is_test else 'training'}")
        chats = self._encoded(examples)
        self._check_characters(examples, chats)
        fitting = [chat for chat in chats if self._fits(chat)]
        if n_long := len(chats) - len(fitting):
            long = f"{n_long / len(chats):.1%} of the examples of task {task.spec}"
            if 10 * len(fitting) < len(chats):
                longest = max(len(ids) for ids, _ in chats) - 1
                raise UserError(
                    f"{long} are longer than block_size, which is {block_size}; with {longest}, all would fit"
                )
            self.notes.append(f"{long} are left out: they are longer than block_size")
        self.list = None if is_drawn else fitting
        self.n_sequences = math.inf if is_drawn else len(fitting)
        self.n_tokens = math.inf if is_drawn else sum(len(ids) - 1 for ids, _ in fitting)
        self.tokens_counted = sum(int(mask[1:].sum()) for _, mask in fitting) / len(fitting)
        content = hashlib.sha256(task.spec.encode())  # and how the examples are drawn and written:
        for ids, mask in chats:
            content.update(ids.tobytes() + mask.tobytes())
        self.fingerprint = content.hexdigest()[:16]
        self.size = task.spec if is_drawn else f"{len(fitting):,} examples of {task.spec}"

    def rows(self, numbers: np.ndarray, keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if self.list is None:
            chats = self._drawn(numbers.tolist(), int(keys[0]))
        else:
            chats = [self.list[number] for number in numbers]
        for ids, mask in chats:
            yield ids, mask[1:]

    def _drawn(self, numbers: list[int], seed: int) -> list[Chat]:
        """The examples of these numbers. One that is too long is drawn again, with the next seed."""
        chats = self._encoded([self.task.train_example(seed, number) for number in numbers])
        long = [i for i, chat in enumerate(chats) if not self._fits(chat)]
        again = self._drawn([numbers[i] for i in long], seed + 1) if long else []
        for i, chat in zip(long, again, strict=True):
            chats[i] = chat
        return chats

    def _encoded(self, examples: Sequence[Example]) -> list[Chat]:
        return render_chats(self.tokenizer, [self.task.conversation(example) for example in examples])

    def _fits(self, chat: Chat) -> bool:
        return len(chat[0]) <= self.block_size + 1

    def _check_characters(self, examples: Sequence[Example], chats: Sequence[Chat]) -> None:
        """Raises UserError, with the characters, if the tokenizer does not know all of them."""
        unknown_id, unknown = self.tokenizer.unknown_id, set()
        for example, (ids, _) in zip(examples, chats, strict=True):
            if (ids == unknown_id).any():
                texts = [message["content"] for message in self.task.conversation(example)]
                unknown |= {c for c in "".join(texts) if (self.tokenizer.encode(c) == unknown_id).any()}
        if unknown:
            raise UserError(
                f"task {self.task.spec} has characters that the tokenizer does not know: "
                f"{' '.join(sorted(unknown)[:20])}; take the task out of dataset_path, or train a new "
                "model with a tokenizer that knows them, such as that of `python data.py --kind bpe`"
            )
