"""`transformers serve` with the classes of this package; it takes every option of that command.

python -m modeling_deepseek.serve deepseek-ai/DeepSeek-V2-Lite --continuous-batching
"""

import sys

from . import modeling_deepseek


def put_in_place() -> None:
    """Puts our causal models under their names in `transformers`, where its server looks, past the Auto classes, for
    `architectures` of a config: it would find the native classes there, and for `deepseek` none."""
    package = sys.modules["transformers"]  # which transformers makes anew while it is imported
    for name in modeling_deepseek.__all__:
        if name.endswith("ForCausalLM"):
            setattr(package, name, getattr(modeling_deepseek, name))


if __name__ == "__main__":
    from transformers.cli.transformers import app

    put_in_place()
    sys.exit(app(["serve", *sys.argv[1:]]))
