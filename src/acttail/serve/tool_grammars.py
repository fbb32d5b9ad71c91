"""The grammar of answers that may call tools, in llguidance's dialect of Lark."""

import json
from collections.abc import Mapping
from typing import Any

from acttail.serve.call_form import CallForm
from acttail.serve.grammars import Grammar, json_rule
from acttail.serve.tools import ToolUse

# As chat templates write JSON, and so as models have seen it.
_SPACED = {"item_separator": ", ", "key_separator": ": "}


def grammar_of(use: ToolUse, form: CallForm, schema: Mapping[str, Any] | None) -> Grammar:
    """What an answer is held to.

    Where tools may be called, text is free until the model writes a call's tag; what follows is a call, whole and
    valid, then more of them or the end.

    Args:
        use: which tools, and whether one must be called.
        form: of the calls.
        schema: of an answer that calls none; None for free text.
    """
    tag, many = json.dumps(form.tag), use.many and form.between is not None
    more = f" ({json.dumps((form.between or '') + form.tag)} call)*" if many else ""
    lines = ["%llguidance {}"]
    if use.forced:
        lines.append(f"start: {tag} call{more}")
    elif schema is not None:
        lines += [f"start: answer | {tag} call{more}", f"answer: {json_rule(schema)}"]
    else:
        # A lazy rule ends with the first tag, so no text goes past one.
        lines += [
            f"start: TEXT | opened call{more}",
            f"opened[lazy]: TEXT {tag}",
            r"TEXT: /(.|\n)*/",
        ]
    lines.append("call: " + " | ".join(f"call_{i}" for i in use.functions))
    parts = {} if schema is None or use.forced else {"response_format": schema}
    for i, function in use.functions.items():
        head = json.dumps(form.before[len(form.tag) :] + function.name + form.middle)
        held = function.schema_held
        parts[f"tools[{i}].function.parameters ({function.name})"] = held
        lines.append(f"call_{i}: {head} arguments_{i} {json.dumps(form.after)}")
        lines.append(f"arguments_{i}: {json_rule(held, _SPACED)}")
    return Grammar("\n".join(lines) + "\n", "tools", parts)
