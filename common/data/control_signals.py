"""Control signals as text: the nine tokens, control strings, and the token of each latent frame.

A control string lists tokens with the number of RAW frames each holds: "D*32,DL*16,D*16" is 64 frames. The
index's `control_signal_seq` is the same with every frame written out. Nothing here imports torch, so that
settings can be checked with it.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from common.config.errors import UserError

# Straight, left, right; the same backwards; the same in neutral. The order is that of the published labels'
# indices.
CONTROL_TOKENS = ("D", "DL", "DR", "B", "BL", "BR", "N", "NL", "NR")


def parse_control_string(text: str, tokens: Sequence[str] = CONTROL_TOKENS, where: str = "control string") -> list[str]:
    """One token per raw frame: "D*2,DL" → ["D", "D", "DL"]. Spaces and line breaks around tokens do not
    matter.

    `where` names the text in errors. Raises UserError for an unknown token, a bad count, or no token at all.
    """
    frames: list[str] = []
    for position, item in enumerate(text.replace("\n", ",").split(","), start=1):
        token, star, count = (part.strip() for part in item.partition("*"))
        if not token and not star:
            continue  # a comma too many, or an empty line
        if token not in tokens:
            raise UserError(
                f"{where}: unknown control token {token!r} (item {position}); known are {', '.join(tokens)}"
            )
        if star and not (count.isascii() and count.isdigit() and int(count) > 0):
            raise UserError(
                f"{where}: {item.strip()!r} (item {position}): write {token}*n with n raw frames, 1 or more"
            )
        frames += [token] * (int(count) if star else 1)
    if not frames:
        raise UserError(f"{where}: holds no control token; write for example {tokens[0]}*32")
    return frames


def read_control_file(path: str | os.PathLike, tokens: Sequence[str] = CONTROL_TOKENS) -> list[str]:
    """The control string in a text file, which may go over several lines; `#` starts a comment. Raises
    UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(f"cannot read the control file {path}: {reason}") from error
    lines = (line.partition("#")[0] for line in text.splitlines())
    return parse_control_string("\n".join(lines), tokens, where=str(path))


def read_sentences(path: str | os.PathLike, where: str) -> dict[str, str]:
    """Signal → the sentence that CLIP is told about it, from a JSON file, in index order.

    `where` names the setting in errors. Raises UserError for an unreadable file or a signal without a sentence.
    """
    try:
        sentences = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where} {path} could not be read as JSON: {error}") from error
    if not isinstance(sentences, dict):
        raise UserError(f'{where} {path} holds no object; write {{"{CONTROL_TOKENS[0]}": "a sentence", …}}')
    missing = [token for token in CONTROL_TOKENS if not isinstance(sentences.get(token), str)]
    if missing:
        raise UserError(f"{where} {path} has no sentence for {', '.join(missing)}")
    return {token: sentences[token] for token in CONTROL_TOKENS}


def token_indices(names: Sequence[str], tokens: Sequence[str] = CONTROL_TOKENS) -> list[int]:
    """The place of each name in `tokens`. Raises UserError for an unknown one."""
    place = {token: index for index, token in enumerate(tokens)}
    unknown = [name for name in names if name not in place]
    if unknown:
        raise UserError(f"unknown control token {unknown[0]!r}; known are {', '.join(tokens)}")
    return [place[name] for name in names]
