"""crane: an LLM inference server you can read in an afternoon.

`from crane import LLM, SamplingParams` for use without HTTP; `crane serve` or
`gunicorn crane.api:app` for the server. Nothing is imported until it is asked
for, so that API workers stay free of torch.
"""

__version__ = "0.1.0"

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name):
    if name == "LLM":
        from crane.llm import LLM

        return LLM
    if name == "SamplingParams":
        from crane.runtime.types import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'crane' has no attribute {name!r}")
