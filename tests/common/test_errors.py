"""common/errors.py: how messages are printed."""

import pytest

from common.errors import UserError, run


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ("there is no 模型\u3000x.pt", "there is no 模型\u3000x.pt"),
        ("key \x1b[2J\r\x07\x9b\udc80: no", "key \\x1b[2J\\r\\x07\\x9b\\udc80: no"),
        ("x" * 1001, "x" * 1000 + " ..."),
    ],
)
def test_what_is_told_can_be_read(sentence, told, capsys):
    """Even if the message quotes a hostile file."""

    def main():
        raise UserError(sentence)

    with pytest.raises(SystemExit) as exit:
        run(main)
    assert exit.value.code == 2 and capsys.readouterr().err == f"error: {told}\n"
