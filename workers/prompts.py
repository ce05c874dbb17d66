"""Request bodies into prompt tokens, with control tokens only where the model's template puts them.

A user who types `<|im_end|>` has typed ten characters: the tokens that the chat template writes and
the text that came with the request are encoded by two tokenisers, and only the first one knows
control tokens. Whoever wants others can send token ids to `/v1/completions`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from workers.engine import EngineError

#: Private-use characters around a control token's name inside a message.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_MARKED = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)


class PromptBuilder:
    """Wraps a Hugging Face tokeniser; thread-safe."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = tokenizer
        template = json.loads(tokenizer.backend_tokenizer.to_str())
        # Padding and truncation of the checkpoint would change prompts unseen.
        template["truncation"] = template["padding"] = None
        #: Knows control tokens.
        self.template = Tokenizer.from_str(json.dumps(template))
        added = {token["content"]: token["id"] for token in template["added_tokens"]}
        self._control_ids = frozenset(added.values())
        self._text = Tokenizer.from_str(json.dumps({**template, "added_tokens": []}))
        longest_first = sorted(added, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def prompt(self, endpoint: str, body: dict[str, Any]) -> tuple[list[int], str]:
        """Token ids, and the parameter they came from. Raises `EngineError`."""
        if endpoint in ("/v1/chat/completions", "/v1/responses"):
            return self.chat(body["messages"]), "messages"
        prompt = body["prompt"]
        if isinstance(prompt, str):
            return self.text(prompt, special=True), "prompt"
        return list(prompt), "prompt"

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """The conversation in the model's template, ready for the assistant's answer."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise EngineError(
                "invalid_request", "this model has no chat template; use /v1/completions", "model"
            )
        try:
            rendered = self._tokenizer.apply_chat_template(
                [self._marked(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:
            raise EngineError(
                "invalid_request", "the model's chat template refuses these messages", "messages"
            ) from error
        tokens: list[int] = []
        # Every second part is what stood between two marks.
        for index, part in enumerate(_MARKED.split(rendered)):
            plain = part.replace(_OPEN, "").replace(_CLOSE, "")
            if not plain:
                continue
            if index % 2:
                tokens += self.text(plain)
            else:
                tokens += self.template.encode(plain, add_special_tokens=False).ids
        return tokens

    def text(self, text: str, *, special: bool = False) -> list[int]:
        """Tokens without control tokens; `special` adds the ones a text of its own begins with."""
        tokens: list[int] = self._text.encode(text, add_special_tokens=special).ids
        body = tokens if not special else self._text.encode(text, add_special_tokens=False).ids
        if self._control_ids.isdisjoint(body):
            return tokens
        # The tokeniser's own vocabulary knows the name; letter by letter it can't.
        return [
            token
            for letter in text
            for token in self._text.encode(letter, add_special_tokens=False).ids
            if token not in self._control_ids
        ]

    def _marked(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if not isinstance(content, str):
            return message
        if _OPEN in content or _CLOSE in content:
            content = content.replace(_OPEN, "").replace(_CLOSE, "")
        marked = self._control.sub(lambda found: f"{_OPEN}{found[0]}{_CLOSE}", content)
        return message if marked is message["content"] else {**message, "content": marked}
