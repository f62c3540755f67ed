"""The model as an API worker knows it: names, tokenizer, template, defaults. No weights."""

import re
import time
from dataclasses import dataclass
from pathlib import Path

from crane.errors import ModelError, RequestError
from crane.models.chat import ChatTemplate, load_chat_template
from crane.models.config import GenerationDefaults, ModelConfig, load_config, load_generation_defaults
from crane.models.files import Checkpoint, open_checkpoint
from crane.models.tokenizer import Tokenizer, load_tokenizer
from crane.runtime.settings import Settings


@dataclass(frozen=True)
class ServedModel:
    """Everything text-shaped about the served model; loaded once per worker.

    architectures: as config.json names them, or a GGUF file its one.
    created: Unix time of the checkpoint, the same in every worker. special_text: finds
    special tokens spelled out in a text; None when the tokenizer has none, or users may write them.
    """

    name: str
    created: int
    config: ModelConfig
    defaults: GenerationDefaults
    tokenizer: Tokenizer
    template: ChatTemplate | None
    special_text: re.Pattern[str] | None
    architectures: tuple[str, ...] = ()

    @classmethod
    def load(cls, settings: Settings) -> "ServedModel":
        """Raises ModelError naming the file and the reason."""
        if not settings.model_path:
            raise ModelError("no model: set --model-path or CRANE_MODEL_PATH to a model folder or .gguf file")
        checkpoint = open_checkpoint(settings.model_path, settings.format)
        config = load_config(checkpoint, settings.model_type)
        tokenizer = load_tokenizer(checkpoint)
        return cls(
            name=settings.served_name,
            created=_modified(checkpoint.path),
            config=config,
            defaults=load_generation_defaults(checkpoint),
            tokenizer=tokenizer,
            template=load_chat_template(checkpoint, tokenizer, config.model_type),
            special_text=None if settings.user_special_tokens else _special_text(tokenizer),
            architectures=_architectures(checkpoint),
        )

    @property
    def num_ids(self) -> int:
        """Ids below this one have both an embedding and a text."""
        return min(self.config.vocab_size, self.tokenizer.vocab_size)

    def check_name(self, name: str | None) -> None:
        """Raises RequestError (404) when `name` is given and is not the served model's."""
        if name is not None and name != self.name:
            message = f"The model `{name}` does not exist; this server has `{self.name}`."
            raise RequestError(message, field="model", code="model_not_found", status=404)

    def check_ids(self, ids: list[int], field: str) -> None:
        """Raises RequestError naming the first id that is outside the vocabulary."""
        limit = self.num_ids
        if ids and (min(ids) < 0 or max(ids) >= limit):
            at = next(i for i, token_id in enumerate(ids) if not 0 <= token_id < limit)
            message = f"{field}[{at}]: expected a token id in 0..{limit - 1}, got {ids[at]}"
            raise RequestError(message, field=field, code="invalid_value")

    def render(self, messages: list[dict], kwargs: dict, **options) -> str:
        """The chat as the model's own template writes it. kwargs: further names for the template.
        Raises RequestError."""
        if self.template is None:
            raise RequestError("this model has no chat template; use /v1/completions", field="messages")
        self.template.check_kwargs(kwargs)
        return self.template.render(messages, **options, **kwargs)


def _special_text(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    texts = {tokenizer.token_bytes(token_id).decode("utf-8", "replace") for token_id in tokenizer.special_ids}
    # of one character is no mark but a letter; and longer ones come first, as they may hold shorter ones
    marks = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, marks))) if marks else None


def _architectures(checkpoint: Checkpoint) -> tuple[str, ...]:
    if checkpoint.format == "gguf":
        return (checkpoint.metadata["general.architecture"],)
    return tuple((checkpoint.read_json("config.json") or {}).get("architectures") or ())


def _modified(path: Path) -> int:
    try:
        return int(path.stat().st_mtime)
    except OSError:
        return int(time.time())
