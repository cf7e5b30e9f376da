"""Bad inputs as data: what is typed, called or lies in a file, and what the error must say."""

from tests.reliability.bad_input.calls import CALLS
from tests.reliability.bad_input.case import Case
from tests.reliability.bad_input.commands import COMMANDS
from tests.reliability.bad_input.files import FILES
from tests.reliability.bad_input.runs import RUNS
from tests.reliability.bad_input.settings import SETTINGS

GROUPS: dict[str, list[Case]] = {
    "settings": SETTINGS, "commands": COMMANDS, "files": FILES, "runs": RUNS, "calls": CALLS,
}  # fmt: skip

__all__ = ["GROUPS", "Case"]
