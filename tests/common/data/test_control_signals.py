"""Control strings, and the indices of their tokens."""

import pytest

from common.config.errors import UserError
from common.data.control_signals import (
    CONTROL_TOKENS,
    parse_control_string,
    read_control_file,
    token_indices,
)


def test_the_order_is_that_of_the_published_labels():
    assert token_indices(["D", "DL", "DR", "B", "BL", "BR", "N", "NL", "NR"]) == list(range(9))
    assert len(CONTROL_TOKENS) == 9


def test_parse():
    assert parse_control_string("D*3,DL*2,N") == ["D", "D", "D", "DL", "DL", "N"]
    assert parse_control_string(" D * 2 ,\n BR*1, ") == ["D", "D", "BR"]
    assert parse_control_string("up*2,down", tokens=("up", "down")) == ["up", "up", "down"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("D*3,X*2", "unknown control token 'X' .item 2.; known are D, DL, DR"),
        ("d*3", "unknown control token 'd'"),
        ("*3", "unknown control token ''"),
        ("D*0", "'D.0' .item 1.: write D.n"),
        ("D*-1", "write D.n"),
        ("D*1.5", "write D.n"),
        ("D*²", "write D.n"),
        ("D*", "write D.n"),
        ("", "holds no control token"),
        (" , ", "holds no control token"),
    ],
)
def test_bad_strings(text, message):
    with pytest.raises(UserError, match=message):
        parse_control_string(text)


def test_control_file(tmp_path):
    path = tmp_path / "drive.txt"
    path.write_text("# a drive\nD*2, DL\nBR*2  # back\n")
    assert read_control_file(path) == ["D", "D", "DL", "BR", "BR"]
    path.write_text("D*2\nleft*3\n")
    with pytest.raises(UserError, match="drive.txt: unknown control token 'left'"):
        read_control_file(path)
    with pytest.raises(UserError, match="cannot read the control file .*none.txt: No such file"):
        read_control_file(tmp_path / "none.txt")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        read_control_file(path)
