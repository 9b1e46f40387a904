"""What a setting's annotation allows: checking a Python value, and reading words from the launch line.

Understood: bool, int, float, str, list[...] of those, `X | None`, Literal[...], and `Annotated[str, "path",
*words]` (a path, where `words` are values that are not paths, such as "latest").
"""

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

PathSetting = Annotated[str, "path"]

TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")


def is_path(annotation: Any) -> bool:
    """True when the annotation marks a path setting."""
    return get_origin(annotation) is Annotated and "path" in annotation.__metadata__


def words_that_are_not_paths(annotation: Any) -> tuple[str, ...]:
    """Values of a path setting that must be kept as they are: `Annotated[str, "path", "latest"]` →
    ("latest",)."""
    return tuple(word for word in annotation.__metadata__ if word != "path")


def describe(annotation: Any) -> str:
    """The annotation in a user's words: "a list of whole numbers", "one of 'bf16', 'no'"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return "a path in quotes" if is_path(annotation) else describe(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin is list:
        return f"a list of {describe(arguments[0]).removeprefix('a ')}s"
    names = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "a text",
        type(None): "None",
    }
    return names.get(annotation, str(annotation))


def check_value(annotation: Any, value: Any) -> Any:
    """`value` as the annotation wants it (int → float, tuple → list), or TypeError when it does not fit."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return check_value(arguments[0], value)
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return check_value(option, value)
            except TypeError:
                continue
    elif origin is Literal:
        if any(value == option and type(value) is type(option) for option in arguments):
            return value
    elif origin is list:
        if isinstance(value, list | tuple):
            return [check_value(arguments[0], item) for item in value]
    elif annotation is float:
        # bool is an int to Python; nobody means learning_rate = True.
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif annotation is type(None):
        if value is None:
            return None
    elif type(value) is annotation:
        return value
    raise TypeError(f"{value!r} is not {describe(annotation)}")


def parse_words(annotation: Any, words: Sequence[str]) -> Any:
    """The value that the launch line's words after `--name` stand for.

    Raises TypeError when they do not fit. A bare `--flag` is True; numbers of a list may be separated by
    spaces or commas, texts of a list are one word (in quotes) each, since texts contain commas.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return parse_words(arguments[0], words)
    if origin in (Union, types.UnionType):
        if type(None) in arguments and len(words) == 1 and words[0].lower() == "none":
            return None
        for option in (a for a in arguments if a is not type(None)):
            try:
                return parse_words(option, words)
            except TypeError:
                continue
        raise TypeError(f"{' '.join(words)!r} is not {describe(annotation)}")
    if origin is list:
        if arguments[0] is not str:
            words = [part for word in words for part in word.strip("[]()").split(",") if part.strip()]
        return [parse_words(arguments[0], [word.strip()]) for word in words]
    if annotation is bool and not words:
        return True
    if len(words) != 1:
        what = "no value" if not words else f"{len(words)} values (quote a text that contains spaces)"
        raise TypeError(f"given {what}, wants {describe(annotation)}")
    return _parse_word(annotation, words[0])


def _parse_word(annotation: Any, word: str) -> Any:
    if get_origin(annotation) is Literal:
        for option in get_args(annotation):
            if str(option) == word:
                return option
    elif annotation is bool:
        if word.lower() in TRUE_WORDS + FALSE_WORDS:
            return word.lower() in TRUE_WORDS
    elif annotation is str:
        return word
    elif annotation in (int, float):
        try:
            return annotation(word)
        except ValueError:
            pass
    raise TypeError(f"{word!r} is not {describe(annotation)}")
