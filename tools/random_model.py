#!/usr/bin/env python3
"""Write a checkpoint with the shape of a known model and random weights, for timing where nothing can be downloaded.

    python tools/random_model.py qwen3-0.6b FOLDER

The folder has config.json, bfloat16 safetensors (a file for each layer) and a small tokenizer of its own. Speed does
not depend on what the weights are; what the model says does, and is noise.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from tests import tiny  # noqa: E402

# architecture, and fields of tests.tiny.Variant with the numbers of the models' own config.json
SHAPES = {
    "qwen3-0.6b": ("qwen3", dict(hidden=1024, layers=28, heads=16, kv_heads=8, head_dim=128, intermediate=3072,
                                 vocab=151936, max_position=40960, tied=True)),
    "qwen2.5-7b": ("qwen2", dict(hidden=3584, layers=28, heads=28, kv_heads=4, intermediate=18944, vocab=152064,
                                 max_position=32768)),
    "tiny": ("qwen3", dict(tied=True)),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    arch, fields = SHAPES[options.shape]
    spec = tiny.Variant(**fields)
    # everything beside the weights from a model of two small layers, then the sizes wanted
    tiny.make_tiny(options.folder, arch, tied=spec.tied)
    (options.folder / "model.safetensors").unlink()
    config = tiny.config(arch, spec) | {"torch_dtype": "bfloat16"}
    (options.folder / "config.json").write_text(json.dumps(config, indent=2))
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tiny.shapes(arch, spec).items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    total = 0
    for file, members in files.items():
        tensors = {name: _random(name, shape, generator) for name, shape in members.items()}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, options.folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": {name: file for file in files for name in files[file]}}
    (options.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"{options.folder}: {options.shape}, {total / 1e9:.2f} GB")
    return 0


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Values of a size that keeps activations near 1."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) == 1 and not name.endswith(".bias"):
        return values.mul_(0.1).add_(1).bfloat16().cpu()
    return values.mul_(shape[-1] ** -0.5).bfloat16().cpu()


if __name__ == "__main__":
    sys.exit(main())
