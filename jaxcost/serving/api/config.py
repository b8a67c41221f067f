"""What the API takes and from whom."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ApiConfig:
    """Limits of the API."""

    body_bytes: int = 4_000_000
    """Largest body of a request."""
    choices: int = 128
    """Sequences that one request may ask for (`n`, times its prompts)."""
    texts: int = 2048
    """Texts, or images, that one request may ask embeddings, labels or ranks of."""
    image_pixels: int = 20_000_000
    """Pixels of the images of one request together."""
    audio_bytes: int = 25_000_000
    """Largest body of a request to a model that hears, in the place of `body_bytes`."""
    audio_seconds: float = 1500.0
    """Longest recording."""
    stops: int = 16
    """Stop strings of one request."""
    stop_characters: int = 256
    """Length of a stop string."""
    requests_per_minute: int = 0
    """Requests of one key (or of all, without keys) a minute; 0 is any number."""
    concurrent_requests: int = 0
    """Requests of one key (or of all, without keys) at one time; 0 is any number."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may call the API from a browser, such as https://example.org; none by default."""

    def __post_init__(self):
        for field in (
            "body_bytes",
            "choices",
            "texts",
            "image_pixels",
            "audio_bytes",
            "audio_seconds",
            "stops",
            "stop_characters",
        ):
            if not getattr(self, field) >= 1:
                raise ValueError(f"api.{field} is {getattr(self, field)}; it must be at least 1.")
        for field in ("requests_per_minute", "concurrent_requests"):
            if getattr(self, field) < 0:
                raise ValueError(f"api.{field} is {getattr(self, field)}; it cannot be negative.")
