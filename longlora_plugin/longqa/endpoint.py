"""Questions and answers from a model behind any OpenAI-compatible endpoint.

vLLM, llama.cpp's server, Ollama and hosted services speak the same protocol; the `openai` client
does the talking, its retries with back-off and `Retry-After` included. The answer is asked for as
JSON by schema and validated with pydantic; what is not such JSON is an error of that request only.

The key comes from the environment. It is given to the client and to nothing else: messages that
come back are cleaned of it before they are shown or written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from longlora_plugin.longqa.optional import require
from longlora_plugin.longqa.options import option
from longlora_plugin.longqa.settings import EXIT_ENDPOINT
from longlora_plugin.longqa.stopping import Stop
from longlora_plugin.longqa.tasks import Pair

KEY_VARIABLE = "OPENAI_API_KEY"
PROMPT_TOKENS = 400
"""What the request says besides the document, in tokens, generously; used in estimates."""


class EndpointError(Exception):
    """One request failed for good; the others may still succeed.

    Attributes:
        spent: (prompt, completion) tokens that it used; None where nobody says, as after a
            time-out, and all that it may have used must be counted.
    """

    def __init__(self, message: str, spent: tuple[int, int] | None = (0, 0)) -> None:
        super().__init__(message)
        self.spent = spent


class MalformedReply(EndpointError):
    """The reply is not the JSON asked for; another try may bring it."""


# Strict mode wants objects closed; a server without it may still send more, which is ignored.
_CLOSED: dict[str, Any] = {"additionalProperties": False}


class ModelPair(BaseModel):
    """A question about the document, its answer, and the quotes that show it."""

    model_config = ConfigDict(json_schema_extra=_CLOSED, str_strip_whitespace=True)

    question: str
    answer: str
    evidence: list[str]

    @field_validator("question", "answer")
    @classmethod
    def _says_something(cls, text: str) -> str:
        if not text:
            raise ValueError("an empty question or answer")
        return text


class ModelPairs(BaseModel):
    """What one request asks for."""

    model_config = ConfigDict(json_schema_extra=_CLOSED)

    pairs: list[ModelPair]


@dataclass(frozen=True)
class Reply:
    """Pairs of one request, and its tokens as the endpoint reports them (None: not reported)."""

    pairs: list[Pair]
    spent: tuple[int, int] | None


@dataclass(frozen=True)
class Requests:
    """How a model is asked; every field is the option that its help describes."""

    base_url: str | None = option(
        None,
        f"OpenAI-compatible endpoint, up to /v1; without it no model is asked. Its key is "
        f"read from the environment variable {KEY_VARIABLE}.",
    )
    concurrency: int = option(4, "Requests at once.", min=1)
    retries: int = option(5, "Tries again, with back-off, after time-outs, 429 and 5xx.", min=0)
    timeout: float = option(300.0, "Seconds to wait for a reply.")
    temperature: float = option(0.7, "Temperature of the model.")
    max_tokens: int | None = option(
        None, "Budget in tokens, prompts and answers of all runs together.", min=1
    )


class Endpoint:
    """One model at one address; safe to call from several threads.

    Args:
        requests: how it is asked; `base_url` is given.
        model: name that the server knows.
        answer_tokens: longest answer to one question, in tokens.

    Raises:
        ValueError: the address is no http(s) address, or carries a password.
    """

    def __init__(self, requests: Requests, model: str, answer_tokens: int) -> None:
        base_url = requests.base_url or ""
        key = os.environ.get(KEY_VARIABLE)  # none is set for a local server
        address = urlsplit(base_url)
        if address.username or address.password:
            raise ValueError(
                "--base-url must not hold a user name or password, which would be logged; "
                f"put the key in the environment variable {KEY_VARIABLE}"
            )
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(
                f"--base-url {base_url} is no http address; "
                "write for example http://localhost:8000/v1"
            )
        openai = require("openai", "--base-url")
        self.requests = requests
        self.base_url = base_url
        self.model = model
        self.answer_tokens = answer_tokens
        self._key = key
        self._openai = openai
        self._client: Any = openai.OpenAI(
            base_url=base_url,
            api_key=key or "not-needed",
            timeout=requests.timeout,
            max_retries=requests.retries,
        )
        self._unknown: set[str] = set()

    def ask(self, document: str, kind: str, wanted: int, seed: int) -> Reply:
        """Ask for `wanted` pairs about `document`.

        Args:
            seed: passed on; servers that can then repeat themselves.

        Raises:
            Stop: no further request can succeed: a wrong key or address, an unknown model.
            MalformedReply: the reply is not what was asked for.
            EndpointError: this request failed, after all retries.
        """
        completion = self._complete(_messages(document, kind, wanted), wanted, seed)
        usage = getattr(completion, "usage", None)
        spent = None
        if usage is not None and isinstance(usage.prompt_tokens, int):
            spent = (usage.prompt_tokens, usage.completion_tokens or 0)
        choices = getattr(completion, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            shown = self.clean(str(completion))[:120]
            raise MalformedReply(
                f"{self.base_url} answers, but not as an OpenAI-compatible server: {shown!r}; "
                "check --base-url (it usually ends in /v1)",
                spent,
            )
        content = choices[0].message.content or ""
        try:
            pairs = ModelPairs.model_validate_json(_json_in(self.clean(content)))
        except ValidationError as error:
            why = "; ".join(sorted({problem["msg"] for problem in error.errors()}))[:160]
            if choices[0].finish_reason == "length":
                why = f"cut at {self.answer_tokens * wanted} tokens; raise --answer-tokens"
            raise MalformedReply(f"the reply is not the JSON asked for: {why}", spent) from None
        found = [
            Pair("model", pair.question, pair.answer, tuple(pair.evidence))
            for pair in pairs.pairs[:wanted]
        ]
        return Reply(found, spent)

    def clean(self, message: str) -> str:
        """`message` without the API key."""
        # A key of a few letters is no secret, and would blank out words.
        return message.replace(self._key, "***") if self._key and len(self._key) > 7 else message

    def _complete(self, messages: list[dict[str, str]], wanted: int, seed: int) -> Any:
        openai = self._openai
        try:
            while True:
                options = self._options(wanted, seed)
                try:
                    return self._client.chat.completions.create(
                        model=self.model, messages=messages, **options
                    )
                except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                    named = {_COMPLAINTS[word] for word in _COMPLAINTS if word in str(error)}
                    if not named & options.keys():
                        raise
                    self._unknown |= named
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise Stop(
                f"{self.base_url} refuses the key (HTTP {error.status_code}): "
                f"{self._said(error)}; export {KEY_VARIABLE}=<key>",
                EXIT_ENDPOINT,
            ) from None
        except openai.NotFoundError as error:
            raise Stop(
                f"{self.base_url} does not know the model {self.model!r} or the address is wrong "
                f"(HTTP 404): {self._said(error)}",
                EXIT_ENDPOINT,
            ) from None
        except openai.APITimeoutError:
            raise EndpointError(
                f"no reply within {self.requests.timeout:g} s, {self.requests.retries + 1} times; "
                "raise --timeout or lower --concurrency",
                spent=None,
            ) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise EndpointError(
                f"{self.base_url} cannot be reached: {self.clean(str(cause))}"
            ) from None
        except openai.APIStatusError as error:
            raise EndpointError(f"HTTP {error.status_code}: {self._said(error)}") from None
        except (openai.OpenAIError, ValueError, AttributeError, TypeError) as error:
            raise MalformedReply(
                f"the server's reply is no valid JSON: {self.clean(str(error))[:160]}", spent=None
            ) from None

    def _options(self, wanted: int, seed: int) -> dict[str, Any]:
        """What is asked for in addition, without what the server has said that it does not know."""
        limit = self.answer_tokens * wanted
        options = {
            "temperature": self.requests.temperature,
            "seed": seed,
            "max_tokens": limit,
            "response_format": _FORM,
        }
        known = {name: value for name, value in options.items() if name not in self._unknown}
        return known if "max_tokens" in known else {**known, "max_completion_tokens": limit}

    def _said(self, error: Any) -> str:
        body = error.body if isinstance(error.body, Mapping) else {}
        said = body.get("message") or error.message
        return " ".join(self.clean(str(said)).split())[:200]


_FORM = {
    "type": "json_schema",
    "json_schema": {"name": "pairs", "schema": ModelPairs.model_json_schema(), "strict": True},
}

# What a server may not know: a word of its complaint, and the option. OpenAI's newer models want
# another name for the limit; small servers have no schemas.
_COMPLAINTS = {
    "max_completion_tokens": "max_tokens",
    "response_format": "response_format",
    "json_schema": "response_format",
    "temperature": "temperature",
    "seed": "seed",
}

_ASK = {
    "paper": "what was done, how, and what was found",
    "book": "what happens, who does or says what, and why",
    "report": "what is stated, decided or recommended, and on what grounds",
}


def _messages(document: str, kind: str, wanted: int) -> list[dict[str, str]]:
    form = json.dumps(
        {"pairs": [{"question": "…", "answer": "…", "evidence": ["quote", "quote"]}]},
        ensure_ascii=False,
    )
    task = (
        f"You write training material for long-document reading. You get a {kind} and write "
        f"{wanted} questions with answers about {_ASK[kind]}.\n"
        "- Ask what only a reader of the whole text can answer; where you can, join two places "
        "that lie far apart. Spread the questions over the beginning, middle and end.\n"
        "- Answer from the text alone, in one to five full sentences.\n"
        "- Give for each answer one to three quotes that prove it, copied character by character "
        "from the text.\n"
        "- Write in the language of the text. A question must be clear without the others.\n"
        f"Reply with JSON only, in this form: {form}"
    )
    return [
        {"role": "system", "content": task},
        {"role": "user", "content": document},
    ]


def _json_in(content: str) -> str:
    """The JSON object in a reply that may wrap it in thoughts or a code fence."""
    start, end = content.find("{"), content.rfind("}")
    return content[start : end + 1] if 0 <= start < end else content
