"""What pydantic finds wrong with a value, in words that name no pattern and no type of Python's."""

from collections.abc import Mapping
from typing import Any, Final

VALUE_CHARACTERS_MAX: Final = 80
_WORDS: Final = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}
_BOUNDS: Final = {
    "greater_than": "more than {gt:,}",
    "greater_than_equal": "at least {ge:,}",
    "less_than": "less than {lt:,}",
    "less_than_equal": "at most {le:,}",
    "too_short": "at least {min_length:,} of them",
    "too_long": "at most {max_length:,} of them",
    "string_too_short": "{min_length:,} characters or more",
    "string_too_long": "at most {max_length:,} characters",
    "literal_error": "{expected}",
}


def expected(kind: str, context: Mapping[str, Any], patterns: Mapping[str, str]) -> str:
    """What a value should have been, as in "at least 1".

    Args:
        kind: The type of pydantic's error.
        context: Its context.
        patterns: For each pattern of the model, what it asks for.
    """
    if kind == "string_pattern_mismatch":
        return patterns.get(context["pattern"], "another form")
    if kind in _BOUNDS:
        whole = {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in context.items()
        }
        return _BOUNDS[kind].format(**whole)
    return _WORDS.get(kind, "a value of another kind")


def shown(value: object) -> str:
    """A value as a configuration file has it, cut where it is long."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    if isinstance(value, dict):
        text = "a table"
    cut = len(text) > VALUE_CHARACTERS_MAX
    return text[: VALUE_CHARACTERS_MAX - 3] + "..." if cut else text


def found_instead(
    value: object, kind: str, context: Mapping[str, Any], patterns: Mapping[str, str]
) -> str:
    """As in "found 0; expected at least 1"; the arguments as those of `expected`."""
    return f"found {shown(value)}; expected {expected(kind, context, patterns)}"
