"""Conversations as the tokenizer's own chat template writes them.

Each answer of a conversation is one example. Its prompt is what the template writes
when a model is asked at that point, so that training and generation read the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from minipeft.errors import InputError
from minipeft.values import checked

Messages = Sequence[Mapping[str, Any]]
"""Each with a role and a content, both text; a template may read more."""


@checked
def answers(messages: Messages) -> list[Messages]:
    """Return, for each answer of the assistant, the conversation up to it.

    Without a role `assistant` behind the first message, the last one is the answer.
    """
    ends = [i for i, m in enumerate(messages) if i and m["role"] == "assistant"]
    return [messages[: end + 1] for end in ends or [len(messages) - 1]]


@checked
def lines(messages: Messages) -> tuple[str, str]:
    """Return (prompt, answer) without a template: `role: content`, line by line."""
    *before, last = messages
    prompt = "".join(f"{m['role']}: {m['content']}\n" for m in before)
    return f"{prompt}{last['role']}:", f" {last['content']}"


@checked
def written(tokenizer: Any, messages: Messages) -> tuple[str, str]:
    """Return (prompt, answer) in the tokenizer's template; the last message is answer.

    The answer holds the template's end of a turn, unless that is the tokenizer's end
    token, which is put behind every answer anyway.

    Args:
        tokenizer: with a chat template.
        messages: the conversation up to the answer.

    Raises:
        InputError: the template refuses the conversation, or does not write an answer
            where it asks for one.
    """
    try:
        prompt = _rendered(tokenizer, messages[:-1], True)
        whole = _rendered(tokenizer, messages, False)
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        roles = ", ".join(m["role"] for m in messages)
        raise InputError(
            f"the tokenizer's chat template refuses a conversation of {roles} "
            f"({error}); change the messages, or give prompt and completion"
        ) from None
    if not whole.startswith(prompt):
        raise InputError(
            "the tokenizer's chat template writes an answer elsewhere than where it "
            "asks for one; give prompt and completion, which need no template"
        )
    answer = whole.removeprefix(prompt).rstrip()
    return prompt, answer.removesuffix(tokenizer.eos_token)


def _rendered(tokenizer: Any, messages: Messages, asking: bool) -> str:
    text: str = tokenizer.apply_chat_template(
        [dict(m) for m in messages], tokenize=False, add_generation_prompt=asking
    )
    return text
