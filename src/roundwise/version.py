"""Version of the package."""

__version__ = "0.1.0"

#: True once the package can be installed by its name.
ON_INDEX = False


def install_command(extra: str) -> str:
    """Returns the command that installs an optional part of roundwise.

    Args:
        extra: name of the part in pyproject.toml, such as "serve".
    """
    where = "roundwise" if ON_INDEX else "."
    note = "" if ON_INDEX else " in its source folder"
    return f"pip install '{where}[{extra}]'{note}"
