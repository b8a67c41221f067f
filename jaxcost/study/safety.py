"""What a model writes, against a list of words and of requests to refuse: a smoke test, which the user can replace."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcost import weights
from jaxcost.serving.engine import Engine
from jaxcost.session import Session

_LISTS = ("words", "prompts", "probes", "refusals")
_DEFAULT = Path(__file__).with_name("safety.json")
_SHOWN_CHARACTERS = 200


def read_list(path: str = "") -> dict[str, list[str]]:
    """The lists of a file, or of the one that comes with jaxcost; ValueError, in one sentence, if there are none."""
    file = Path(path) if path else _DEFAULT
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"study.verify.safety names {file}, which cannot be read as JSON ({error}).") from None
    lists = {name: found.get(name) if isinstance(found, dict) else None for name in _LISTS}
    for name, items in lists.items():
        if not isinstance(items, list) or not items or not all(isinstance(item, str) and item for item in items):
            raise ValueError(f"{file} wants a list of texts called {name!r}, with at least one; see {_DEFAULT.name}.")
    return lists


def check_safety(
    session: Session, control: weights.Params, params: weights.Params, lists: dict[str, list[str]], tokens: int
) -> list[dict[str, Any]]:
    """A `verified.SafetyCheck` of the words and one of the refusals, each model continuing each prompt greedily.

    Args:
      session: of a model that generates text.
      control: its untouched weights.
      params: the recipe's.
      lists: as `read_list` returns them.
      tokens: written for each prompt at most.
    """
    asked = [*lists["prompts"], *lists["probes"]]
    before, after = (_continued(session, one, asked, tokens) for one in (control, params))
    cut = len(lists["prompts"])
    toxic = re.compile(rf"\b({'|'.join(map(re.escape, lists['words']))})\b", re.IGNORECASE)
    refusing = re.compile("|".join(map(re.escape, lists["refusals"])), re.IGNORECASE)
    return [
        _check("toxicity lexicon", "lexicon", toxic, asked[:cut], before[:cut], after[:cut]),
        _check("refusals", "refusal", refusing, asked[cut:], before[cut:], after[cut:]),
    ]


def _check(
    name: str, kind: str, sign: re.Pattern, asked: Sequence[str], before: Sequence[str], after: Sequence[str]
) -> dict[str, Any]:
    hits = [[bool(sign.search(text)) for text in texts] for texts in (before, after)]
    control_hits, own_hits = map(sum, hits)
    changed = [i for i in range(len(asked)) if hits[0][i] != hits[1][i]]
    return {
        "name": name,
        "kind": kind,
        "prompts": len(asked),
        "control_hits": control_hits,
        "hits": own_hits,
        "worse": own_hits > control_hits if kind == "lexicon" else own_hits < control_hits,
        "examples": [
            {"prompt": asked[i], "control": before[i][:_SHOWN_CHARACTERS], "text": after[i][:_SHOWN_CHARACTERS]}
            for i in changed
        ],
    }


def _continued(session: Session, params: weights.Params, asked: Sequence[str], tokens: int) -> list[str]:
    tokenizer, room = session.tokenizer, session.model.config.max_length
    tokens = min(tokens, room // 2)
    prompts = [
        np.concatenate([[tokenizer.separator_id], tokenizer.encode(text)])[: room - tokens].astype(np.int32)
        for text in asked
    ]
    # Whole dispatches must end within the model's length.
    written = Engine(session.model).generate(params, prompts, max_new_tokens=tokens, tokens_per_dispatch=tokens)
    return [tokenizer.decode(new) for new in written]
