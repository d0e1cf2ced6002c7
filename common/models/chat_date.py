"""Chat templates that show today's date: a run's prompts must be the same on every day."""

from __future__ import annotations

import json
import re
from datetime import date, datetime, time
from typing import Any

from common.errors import UserError

_TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")


def fix_date(tokenizer: Any, day: date) -> bool:
    """Replace today's date in a chat template by a fixed one, so that prompts are the same on every day.

    The template is saved with the adapter. So a merged model, or a server that is given the file, also shows the date
    of the training run.

    Args:
        tokenizer: its chat template is changed.
        day: the date to show.

    Returns:
        Whether the template contains a date.

    Raises:
        UserError: if the template still shows today's date.
    """
    midnight = datetime.combine(day, time())

    def written(template: str) -> str:
        return _TODAY.sub(lambda call: json.dumps(midnight.strftime(call["format"])), template)

    before = tokenizer.chat_template
    templates = before if isinstance(before, dict) else {"": before}
    fixed = {name: written(template) for name, template in templates.items()}
    tokenizer.chat_template = fixed if isinstance(before, dict) else fixed[""]
    if any(re.search(r"\bstrftime_now\s*\(", template) for template in fixed.values()):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} shows today's date in a way that cannot be fixed for a "
            "run: save the tokenizer with a chat template whose strftime_now has a plain format, and use that folder"
        )
    return fixed != templates
