"""What travels beside the weights: the `auto_map`, the code files that it names, and a model card."""

import os
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers.dynamic_module_utils import get_relative_import_files

PREFIXES = {"deepseek": "Deepseek", "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3"}
AUTO_CLASSES = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
    "AutoModelForQuestionAnswering": "ForQuestionAnswering",
}
PLACEHOLDER = "This is the model card of a 🤗 transformers model that has been pushed on the Hub"

CARD = """
# {title}

A DeepSeek model (`model_type: {model_type}`) in the official layout, with the code that runs it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
inputs = tokenizer("DeepSeek is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```
"""


def auto_map_for(model_type: str) -> dict[str, str]:
    """`auto_map` entries of a family, by its `model_type`.

    Raises:
        ValueError: for a `model_type` that is not one of ours.
    """
    if model_type not in PREFIXES:
        raise ValueError(
            f"model_type {model_type!r} is not a DeepSeek family: expected one of {', '.join(map(repr, PREFIXES))}."
        )
    prefix = PREFIXES[model_type]
    models = {auto: f"modeling_deepseek.{prefix}{suffix}" for auto, suffix in AUTO_CLASSES.items()}
    return {"AutoConfig": f"configuration_deepseek.{prefix}Config", **models}


def code_files() -> list[Path]:
    """The files that remote code consists of: `modeling_deepseek.py` beside this file and all that it imports relatively."""
    entry = Path(__file__).with_name("modeling_deepseek.py")
    return sorted({entry, *map(Path, get_relative_import_files(entry))})


def write_model_card(folder: str | Path, model_type: str, repo_id: str | None = None) -> None:
    """Writes `README.md` with metadata and a snippet that runs; a card that somebody wrote is left alone, whatever is in it."""
    path = Path(folder) / "README.md"
    tags = ["deepseek"]
    if path.exists():
        if PLACEHOLDER not in path.read_text(encoding="utf-8", errors="replace"):
            return
        tags += [tag for tag in ModelCard.load(path).data.tags or [] if tag not in tags]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags)
    repo_id = repo_id or Path(folder).resolve().name  # not the path: cards are published
    text = CARD.format(title=Path(repo_id).name, model_type=model_type, repo_id=repo_id)
    replace_files(Path(folder), {"README.md": f"---\n{data.to_yaml()}\n---\n{text}".encode()})


def replace_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write all `contents` (name -> bytes) beside their targets, then move them into place in order.

    A full disk is met before the first target changes; a link is replaced, never written through.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for name, data in contents.items():
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            staged.append((temporary, folder / name))
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for temporary, target in staged:
            os.replace(temporary, target)
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)
