"""The model as an API worker knows it: names, tokenizer, template, defaults. No weights."""

import time
from dataclasses import dataclass
from pathlib import Path

from crane.errors import ModelError, RequestError
from crane.models.chat import ChatTemplate, load_chat_template
from crane.models.config import GenerationDefaults, ModelConfig, load_config, load_generation_defaults
from crane.models.files import open_checkpoint
from crane.models.tokenizer import Tokenizer, load_tokenizer
from crane.runtime.settings import Settings


@dataclass(frozen=True)
class ServedModel:
    """Everything text-shaped about the served model; loaded once per worker.

    created: Unix time of the checkpoint, the same in every worker.
    """

    name: str
    created: int
    config: ModelConfig
    defaults: GenerationDefaults
    tokenizer: Tokenizer
    template: ChatTemplate | None

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
            raise RequestError(
                f"{field}[{at}]: expected a token id in 0..{limit - 1}, got {ids[at]}",
                field=field,
                code="invalid_value",
            )

    def render(self, messages: list[dict], **options) -> str:
        """The chat as the model's own template writes it. Raises RequestError."""
        if self.template is None:
            raise RequestError("this model has no chat template; use /v1/completions", field="messages")
        return self.template.render(messages, **options)


def _modified(path: Path) -> int:
    try:
        return int(path.stat().st_mtime)
    except OSError:
        return int(time.time())
