"""Tables of names: pairs of beginnings such as `layers.{layer}.mlp.`, one column for each layout."""

import re
from collections.abc import Sequence


def matched(pattern: str, name: str) -> re.Match[str] | None:
    """The beginning of a name that a pattern with `{layer}` describes."""
    return re.match(re.escape(pattern).replace(r"\{layer\}", r"(?P<layer>\d+)"), name)


def renamed(name: str, table: Sequence[tuple[str, str]], source: int, target: int) -> str | None:
    """A name of the table's column `source` in its column `target`; None where no row describes it."""
    for row in table:
        match = matched(row[source], name)
        if match:
            return row[target].format(**match.groupdict()) + name[match.end() :]
    return None
