"""/v1/models, and /tokenize, /detokenize and /tokenizer_info by vLLM's forms."""

from __future__ import annotations

import time

import anyio.to_thread
import numpy as np
from fastapi import APIRouter

from jaxcost.serving.api.errors import ApiError, clean
from jaxcost.serving.api.schemas import DetokenizeRequest, TokenizeRequest
from jaxcost.serving.api.served import Served


def model_routes(model: Served) -> APIRouter:
    """/v1/models."""
    router, created = APIRouter(tags=["models"]), int(time.time())

    @router.get("/v1/models")
    async def models():
        """What may be asked for."""
        of_all = {"object": "model", "created": created, "owned_by": "jaxcost", "max_model_len": model.max_length}
        base = next(iter(model.names))
        parents = {name: {} if name == base else {"parent": base} for name in model.names}
        return {"object": "list", "data": [{"id": name, **of_all, **parents[name]} for name in model.names]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str):
        """One of them."""
        found = [entry for entry in (await models())["data"] if entry["id"] == name]
        if not found:
            raise ApiError(404, f"There is no model {name[:100]!r}; see /v1/models.", "model", "model_not_found")
        return found[0]

    return router


def token_routes(model: Served) -> APIRouter:
    """The other addresses, for one model of tokens."""
    router, vocabulary = APIRouter(tags=["tokens"]), model.vocabulary

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest):
        """The ids of a text or of a conversation."""
        model.adapter(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "Give either a prompt or messages.", "prompt")

        def ids() -> np.ndarray:
            if body.messages is not None:
                return model.encode_chat([m.plain() for m in body.messages], body.add_generation_prompt)
            return model.encode(body.prompt, body.add_special_tokens)

        found = (await anyio.to_thread.run_sync(ids)).tolist()
        spelled = [vocabulary.spelled(token) for token in found]
        return {"count": len(found), "max_model_len": model.max_length, "tokens": found, "token_strs": spelled}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest):
        """The text of ids."""
        model.adapter(body.model)
        if any(token >= vocabulary.tokenizer.vocab_size for token in body.tokens):
            raise ApiError(
                400, f"There are ids outside 0 to {vocabulary.tokenizer.vocab_size - 1}; leave them out.", "tokens"
            )
        return {"prompt": clean(vocabulary.decode(np.array(body.tokens, np.int32)))}

    @router.get("/tokenizer_info")
    async def tokenizer_info():
        """What a client must know to write prompts itself."""
        tokenizer = vocabulary.tokenizer
        named = dict(getattr(tokenizer, "specials", {}))
        separator = vocabulary.spelled(tokenizer.separator_id)
        named = {"bos_token": separator, "eos_token": separator, "pad_token": separator} | named
        return {
            **named,
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": model.max_length,
            "bos_token_id": tokenizer.separator_id,
            "eos_token_id": list(tokenizer.stop_ids),
            "chat_template": getattr(tokenizer, "chat_template", None),
        }

    return router
