"""What the operating system refused, in words that every package has in common."""


def os_reason(error: OSError) -> str:
    """Why, without the number of the error."""
    return (error.strerror or str(error) or "the operating system gave no reason").lower()


def os_error_text(error: OSError, path: object = None) -> str:
    """What went wrong with which file.

    Args:
        error: What the operating system said.
        path: The file, where the error does not name the one that was asked for.
    """
    named = error.filename if path is None else path
    return f"{named}: {os_reason(error)}" if named else os_reason(error)
