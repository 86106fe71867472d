"""For scripts that a launcher (torch.distributed.run, deepspeed) starts once for every device."""

import os
import re

from common.errors import UserError


def local_rank_and_size(example: str) -> tuple[int, int]:
    """(local rank, local world size) of this process. Mutes the output of all ranks except 0.

    example: a command line with a launcher, for the error message. Raises UserError if there is no launcher,
    or its environment variables make no sense.
    """
    if "RANK" not in os.environ:
        raise UserError(f"this needs a launcher, here for two processes: {example}")

    def number(name: str, lowest: int, highest: int) -> int:
        text = os.environ.get(name, "")
        if not re.fullmatch("[0-9]{1,5}", text) or not lowest <= int(text) <= highest:
            raise refused(name, text)
        return int(text)

    def refused(name: str, text: str) -> UserError:
        return UserError(
            f"the environment has {name}={text[:20]!r}, which no launcher would set; "
            f"here is one for two processes: {example}"
        )

    world_size = number("WORLD_SIZE", 1, 99_999)
    rank = number("RANK", 0, world_size - 1)
    # PyTorch's launcher and DeepSpeed's use different names.
    local = "LOCAL_WORLD_SIZE" if os.environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
    local_world_size = number(local, 1, world_size)
    local_rank = number("LOCAL_RANK", 0, local_world_size - 1)
    if not os.environ.get("MASTER_ADDR"):
        raise refused("MASTER_ADDR", "")
    number("MASTER_PORT", 0, 65535)
    if rank:
        from common.log import mute

        mute()
    return local_rank, local_world_size
