"""Write the list of every command's flags, which completion scripts are made of: python tools/completion.py."""

import contextlib
import io
import json
import os
import re

os.environ["COLUMNS"] = "200"  # The order of a help in columns depends on its width.

from keeplora.cli import main as cli
from keeplora.cli.completion import FLAGS


def flags_of(name: str) -> list[str]:
    """Return the flags that the help of a command lists, in its order."""
    words = [name, "principal"] if name == "analyze" else [name]
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    return list(dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", shown.getvalue().split("╭", 1)[-1])))


def all_flags() -> dict[str, list[str]]:
    """Return the flags of every command."""
    return {name: flags_of(name) for name in cli.commands()}


if __name__ == "__main__":
    FLAGS.write_text(json.dumps(all_flags(), indent=1) + "\n")
