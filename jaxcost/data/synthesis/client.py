"""A language model behind an address of OpenAI's API, which is asked once for each answer: they are kept on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxcost.data.files import atomic_write
from jaxcost.data.synthesis.config import SynthesisConfig

KEY_VARIABLE = "OPENAI_API_KEY"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of one request."""

    text: str
    """The answer; empty where there was none."""
    finished: bool
    """It ended by itself, and not at the limit of tokens."""
    read_tokens: int
    """Tokens of the prompt, as the address counts them."""
    generated_tokens: int
    """Tokens of the answer, as the address counts them."""
    request: str
    """Names the request, and its file in the cache."""


class Writer:
    """Asks a model; nothing is sent before the first request that is not on disk."""

    def __init__(self, config: SynthesisConfig, cache_dir: Path):
        """`cache_dir` is the folder of the answers, one file each.

        Raises:
          ValueError: OpenAI's client is not installed.
        """
        if not importlib.util.find_spec("openai"):
            raise ValueError("Asking a language model for texts takes openai; `pip install 'jaxcost[synthesis]'`.")
        import openai

        self._config, self._cache_dir = config, cache_dir
        self._client = openai.OpenAI(
            base_url=config.url,
            api_key=os.environ.get(KEY_VARIABLE) or "none",
            timeout=config.timeout_seconds,
            max_retries=config.retries,
        )

    def model(self) -> str:
        """The name of the model that is asked.

        Raises:
          ValueError: it is not named and the address has not exactly one, or what `answers` raises it for.
        """
        if self._config.model:
            return self._config.model
        names = self._names()
        if len(names) != 1:
            raise ValueError(
                f"{self._config.url} has {len(names)} models ({', '.join(names[:8])}); set synthesis.model to one."
            )
        return names[0]

    def answers(self, model: str, prompts: Sequence[str], done: Callable[[], None] = lambda: None) -> list[Answer]:
        """The answer to each prompt, in their order; request i has the seed of the config and i.

        Args:
          model: name of the model.
          prompts: what is asked, several at once; an answer that is on disk already costs nothing.
          done: called after each answer.

        Raises:
          ValueError: the address cannot be reached, knows no such model, refuses the key or a request, has failed on
            one again and again, or does not answer as OpenAI's API does. What was answered by then is kept.
        """
        failed = threading.Event()

        def answer(number: int) -> Answer | None:
            if failed.is_set():  # those that wait their turn behind a failure are not paid for
                return None
            try:
                return self._answer(model, prompts[number], number)
            except BaseException:
                failed.set()
                raise

        found = []
        with ThreadPoolExecutor(self._config.at_once) as executor:
            try:
                for one in executor.map(answer, range(len(prompts))):
                    found.append(one)
                    done()
            finally:
                failed.set()
        return found

    def _answer(self, model: str, prompt: str, number: int) -> Answer:
        config = self._config
        asked: dict[str, Any] = {"model": model, "temperature": config.temperature, "seed": config.seed + number}
        asked |= {"stop": list(config.stop)} if config.stop else {}
        if config.api == "chat":
            asked |= {"messages": [{"role": "user", "content": prompt}], "max_completion_tokens": config.max_tokens}
        else:
            asked |= {"prompt": prompt, "max_tokens": config.max_tokens}
        said = json.dumps({"url": config.url, **asked}, sort_keys=True)
        request = hashlib.sha256(said.encode()).hexdigest()[:16]
        path = self._cache_dir / f"answer-{request}.json"
        if path.exists():
            return Answer(**json.loads(path.read_text(encoding="utf-8"))["answer"])
        answer = self._ask(asked, request)
        with atomic_write(path) as file:
            file.write(json.dumps({"asked": json.loads(said), "answer": dataclasses.asdict(answer)}).encode())
        return answer

    def _ask(self, asked: dict[str, Any], request: str) -> Answer:
        import openai

        chat = self._config.api == "chat"
        ask = self._client.chat.completions.create if chat else self._client.completions.create
        try:
            found = ask(**asked)
        except openai.NotFoundError as error:
            raise ValueError(
                f"{self._config.url} knows no model '{asked['model']}', but {', '.join(self._names()[:8])}; set "
                "synthesis.model to one of them."
            ) from error
        except openai.OpenAIError as error:
            raise ValueError(self._failure(error)) from error
        try:
            choice, usage = found.choices[0], found.usage
            text = (choice.message.content if chat else choice.text) or ""
            counts = int(usage.prompt_tokens), int(usage.completion_tokens)
            return Answer(text, choice.finish_reason == "stop", *counts, request)
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError(self._unlike("its answer has no choices or no usage")) from error

    def _names(self) -> list[str]:
        """The models of the address."""
        import openai

        try:
            return sorted(model.id for model in self._client.models.list())
        except (openai.NotFoundError, AttributeError) as error:
            raise ValueError(self._unlike("it lists no models")) from error
        except openai.OpenAIError as error:
            raise ValueError(self._failure(error)) from error

    def _failure(self, error: Exception) -> str:
        """What went wrong and what to change, in a sentence."""
        import openai

        url = self._config.url
        if isinstance(error, openai.APIConnectionError):
            reason = str(error.__cause__ or error).strip().rstrip(".") or type(error.__cause__).__name__
            return (
                f"{url} cannot be reached, with {self._config.retries} retries ({reason}); start a server there, set "
                "synthesis.url to another address, or raise synthesis.timeout_seconds."
            )
        if not isinstance(error, openai.APIStatusError):
            return self._unlike(str(error).rstrip("."))
        said = error.body.get("message") if isinstance(error.body, dict) else None
        said = " ".join(str(said or error.message).split()).rstrip(".")
        if error.status_code in (401, 403):
            return f"{url} does not let this key in ({said}); put one that it knows into {KEY_VARIABLE}."
        if error.status_code == 429 or error.status_code >= 500:
            return (
                f"{url} has failed on a request and {self._config.retries} retries ({error.status_code}: {said}); run "
                "this again later, which goes on with what was answered, or lower synthesis.at_once."
            )
        return f"{url} refuses a request ({error.status_code}: {said}); change what it names in synthesis."

    def _unlike(self, reason: str) -> str:
        return (
            f"{self._config.url} does not answer as OpenAI's API does ({reason}); set synthesis.url to an address that "
            "does, which usually ends in /v1."
        )
