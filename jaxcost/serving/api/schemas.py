"""Bodies of requests as OpenAI's clients send them. What is not there to be honoured is refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field

Token = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Number = Annotated[float, Field(allow_inf_nan=False)]
_BIGGEST = 2**31 - 1


class _Body(BaseModel):
    # Names that no field has are what newer clients send beside what is asked for; they change nothing.
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class StreamOptions(_Body):
    """What a stream tells beside its pieces."""

    include_usage: bool = False


class _Sampled(_Body):
    """What completions and chats share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=_BIGGEST)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_BIGGEST)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    ignore_eos: bool = False
    deadline_seconds: Annotated[Number, Field(gt=0)] | None = None
    user: str | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None

    def unsupported(self) -> str | None:
        """The name of a field that is asked for and not there."""
        names = [name for name in ("presence_penalty", "frequency_penalty", "logit_bias") if getattr(self, name)]
        return names[0] if names else None


class CompletionRequest(_Sampled):
    """POST /v1/completions."""

    prompt: str | list[Token] | list[str] | list[list[Token]]
    max_tokens: Annotated[int, Field(ge=0, le=_BIGGEST)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=_BIGGEST)] | None = None
    best_of: Annotated[int, Field(ge=1, le=_BIGGEST)] | None = None
    suffix: str | None = None

    def unsupported(self) -> str | None:
        """The name of a field that is asked for and not there."""
        if self.suffix:
            return "suffix"
        return "best_of" if self.best_of is not None and self.best_of != (self.n or 1) else super().unsupported()


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """What somebody said; further fields are the template's."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    role: str
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, Any]:
        """The message with its text in one piece."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or ())
        return {**(self.model_extra or {}), "role": self.role, "content": content}


class ResponseFormat(_Body):
    """The form of an answer."""

    type: str


class ChatRequest(_Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=_BIGGEST)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_BIGGEST)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_BIGGEST)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None

    def unsupported(self) -> str | None:
        """The name of a field that is asked for and not there."""
        if self.tools:
            return "tools"
        structured = self.response_format is not None and self.response_format.type != "text"
        return "response_format" if structured else super().unsupported()


class PoolingRequest(_Body):
    """What is asked of models that answer once for a text."""

    model: str | None = None
    deadline_seconds: Annotated[Number, Field(gt=0)] | None = None
    user: str | None = None


class _OfTexts(PoolingRequest):
    """A text or several, each as it is or as ids of tokens."""

    input: str | list[Token] | list[str] | list[list[Token]]

    def texts(self) -> list[str | list[int]]:
        """The texts one by one."""
        one = isinstance(self.input, str) or (self.input and isinstance(self.input[0], int))
        return [self.input] if one else self.input


class ImageUrl(_Body):
    """Where an image is: in the address itself, as data."""

    url: str


class ImagePart(_Body):
    """An image, in the form of a part of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class EmbeddingRequest(_OfTexts):
    """POST /v1/embeddings."""

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=_BIGGEST)] | None = None


class ClassifyRequest(PoolingRequest):
    """POST /v1/classify: a text or several, each as it is or as ids of tokens, or an image or several."""

    input: str | ImagePart | list[Token] | list[str] | list[list[Token]] | list[ImagePart]

    def given(self) -> list[str | list[int] | ImagePart]:
        """The texts, or the images, one by one."""
        one = not isinstance(self.input, list) or (self.input and isinstance(self.input[0], int))
        return [self.input] if one else self.input


class SpeechRequest(PoolingRequest):
    """POST /v1/audio/translations, and what transcriptions share with it."""

    file: UploadFile
    prompt: str | None = None
    response_format: Literal["json", "text", "verbose_json"] | None = None
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None

    def unsupported(self) -> str | None:
        """The name of a field that is asked for and not there."""
        return None


class TranscriptionRequest(SpeechRequest):
    """POST /v1/audio/transcriptions."""

    language: Annotated[str, Field(max_length=32)] | None = None
    stream: bool | None = None
    chunking_strategy: str | None = None
    include: Annotated[list[str], Field(alias="include[]")] = []
    timestamp_granularities: Annotated[list[str], Field(alias="timestamp_granularities[]")] = []

    def unsupported(self) -> str | None:
        """The name of a field that is asked for and not there."""
        if self.chunking_strategy not in (None, "auto"):
            return "chunking_strategy"
        if set(self.timestamp_granularities) - {"segment"}:
            return "timestamp_granularities"
        return next((name for name in ("stream", "include") if getattr(self, name)), None)


class DocumentText(_Body):
    """A document by its text."""

    text: str


class RerankRequest(PoolingRequest):
    """POST /v1/rerank."""

    query: str
    documents: list[str | DocumentText]
    top_n: Annotated[int, Field(ge=1, le=_BIGGEST)] | None = None
    return_documents: bool = True

    def plain(self) -> list[str]:
        """The texts of the documents."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class TokenizeRequest(_Body):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Token]
